"""NVIDIA drivers and the CUDA that they serve. The build reads this file too, by its path."""

from __future__ import annotations

# The first driver that serves each CUDA; later ones of its major version run what an earlier one's toolkit compiled.
DRIVERS = {12: "525", 13: "580"}


def needed_driver(cuda: str) -> str | None:
    """What kernels compiled with this CUDA need, as in "an NVIDIA driver 580 or later"; None for an unknown CUDA."""
    first = DRIVERS.get(int(cuda.split(".")[0]))
    return None if first is None else f"an NVIDIA driver {first} or later"
