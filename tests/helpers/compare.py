"""The rule by which a floating-point result passes; there are no other tolerances.

One unit is eps(dtype) * max|oracle|. Pass: the largest error is at most twice (for gradients three times) that of the
same computation done eagerly in the same dtype plus one unit, and the mean error at most 1.5 times plus one unit.

In float64 the oracle is no more exact than what it judges, and its own rounding is what remains: there eps counts 64
times.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


def assert_close(
    name: str, actual: Tensor, oracle: Tensor, eager: Tensor, *, gradient: bool = False, scale: float = 0.0
) -> None:
    """actual in the dtype under test, oracle in float64, eager computed in the dtype under test.

    They are compared in float64 on the device of actual: nothing but a few numbers goes to the host.
    scale: the size of what was added up, for results that are small because it cancels; if larger, the unit is of it.
    """
    assert actual.shape == oracle.shape, f"{name}: shape {list(actual.shape)}, expected {list(oracle.shape)}"
    if actual.numel() == 0:
        return
    eps = max(torch.finfo(actual.dtype).eps, torch.finfo(eager.dtype).eps)
    if eps == torch.finfo(torch.float64).eps:
        eps *= 64
    actual, oracle, eager = (t.detach().to(actual.device, torch.float64) for t in (actual, oracle, eager))
    infinite = oracle.isinf()
    if infinite.any():
        assert torch.equal(actual[infinite], oracle[infinite]), f"{name}: infinities differ"
        actual, oracle, eager = (t[~infinite] for t in (actual, oracle, eager))
        if actual.numel() == 0:
            return
    assert torch.isfinite(oracle).all(), f"{name}: the oracle itself is not finite"
    assert torch.isfinite(actual).all(), f"{name}: {int((~torch.isfinite(actual)).sum())} values are not finite"
    error, allowed = (actual - oracle).abs(), (eager - oracle).abs()
    # One transfer for the five numbers.
    size, largest, mean, eager_largest, eager_mean = torch.stack(
        [oracle.abs().max(), error.max(), error.mean(), allowed.max(), allowed.mean()]
    ).tolist()
    unit = eps * max(size, scale)
    factor = 3 if gradient else 2
    most, most_mean = factor * eager_largest + unit, 1.5 * eager_mean + unit
    assert largest <= most, f"{name}: largest error {largest:.3e}, allowed {most:.3e} (one unit {unit:.3e})"
    assert mean <= most_mean, f"{name}: mean error {mean:.3e}, allowed {most_mean:.3e} (one unit {unit:.3e})"


def farthest(truth: Tensor, *others: Tensor) -> Tensor:
    """Of results by other ways, the one with the largest error: a yardstick where one of them may be exact by luck."""
    return max(others, key=lambda t: float((t.double() - truth).abs().max()) if t.numel() else 0.0)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory that torch allocates without setting it holds NaN (or the largest integer) inside."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]
