"""Ring attention against attention in one process: over gloo, and with all ranks in this process."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from helpers import ring_attention as helper
from helpers.processes import Processes
from warpform.distributed import LocalGroup

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
# Outer and inner ranks, or one ring.
SHAPES = ((2,), (3,), (4,), (8,), (2, 2), (2, 4), (4, 2))


@pytest.mark.distributed
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_over_gloo(processes: Callable[[int], Processes], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Every layout, dense, varlen and padded, with GQA: output and all gradients."""
    some = helper.cases()
    if dtype == torch.float64:
        some = some if len(shape) == 1 else some[1::2]  # causal
    else:
        some = some[::3] if dtype == torch.float32 else some[2::3]  # every kind, causal and not, two layouts
    processes(torch.Size(shape).numel()).run(helper.run_cases, shape, some, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", helper.cases(), ids=str)
def test_in_one_process(case: helper.RingCase, dtype: torch.dtype) -> None:
    helper.check_ring_attention(case, dtype, LocalGroup(3), 3)


@pytest.mark.parametrize("case", helper.cases(), ids=str)
@pytest.mark.parametrize(("size", "inner_size"), [(1, None), (8, 2), (6, 1)])
def test_double_ring_in_one_process(case: helper.RingCase, size: int, inner_size: int | None) -> None:
    helper.check_ring_attention(case, torch.float64, LocalGroup(size, inner_size), size)
