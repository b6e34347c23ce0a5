"""Two ways to compute one thing in float64, which differ by rounding alone."""

from __future__ import annotations

from torch import Tensor


def largest(t: Tensor) -> float:
    """The largest magnitude in t."""
    return float(t.detach().abs().max())


def assert_same(one: Tensor, other: Tensor, name: str = "", *, scale: float = 1.0) -> None:
    """They differ by at most 1e-12 of the largest number of `other`, or of `scale` where that is more."""
    assert one.shape == other.shape, f"{name}: shape {list(one.shape)}, expected {list(other.shape)}"
    difference, size = largest(one - other), max(scale, largest(other))
    assert difference <= 1e-12 * size, f"{name}: largest difference {difference:.3e} beside {size:.3e}"
