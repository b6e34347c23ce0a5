"""The definition of every op in plain PyTorch: the specification, and the implementation where no kernel runs."""
