"""Examples of every op, by family as `reference` is: few and small calls that between them reach every kernel."""
