"""Sums over groups of partial sums (csrc/kernels/common/column_sum.cuh), in every layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

EPS = torch.finfo(torch.float32).eps
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# (sums, groups, cols). Whole columns: up to 8 groups, or 1024 columns a group. Split over 16 warps of 4 groups: others.
WHOLE = ((1, 1, 4), (1, 2, 513), (1, 3, 516), (2, 4, 1027), (1, 5, 130), (3, 8, 644), (1, 9, 9216))
SPLIT = ((1, 9, 4), (3, 63, 36), (1, 64, 33), (2, 65, 31), (1, 257, 64), (1, 330, 102), (1, 1025, 1))


def expected(partials: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Sums in float64, and how far off one may be: n - 1 additions in float32, and the rounding to dtype.

    Elements of the inputs are normal numbers around 1, so that no partial sum leaves the normal range of float32; a
    sum that cancels may be below that of float16, whose smallest step is added."""
    exact = partials.double().sum(1)
    bound = (partials.size(1) - 1) * EPS / 2 * partials.double().abs().sum(1)
    info = torch.finfo(dtype)
    if dtype != torch.float32:
        bound = bound + info.eps / 2 * (exact.abs() + bound) + info.tiny * info.eps
    return exact, bound


def run(simt: Any, partials: Tensor, dtype: torch.dtype, offset: int) -> Tensor:
    """The sums, written `offset` elements past an aligned address, between elements that must stay as they are."""
    sums, _, cols = partials.shape
    stride = offset + cols + 3 + (-(offset + cols + 3)) % 8
    around = torch.full((sums, stride), 7.0, dtype=dtype)
    out = around[:, offset : offset + cols]
    simt._column_sum(partials, out)
    assert (around[:, :offset] == 7).all() and (around[:, offset + cols :] == 7).all()
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*WHOLE, *SPLIT], ids=str)
def test_every_layout(simt: Any, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(shape[1])
    partials = torch.randn(shape)
    exact, bound = expected(partials, dtype)
    results = [run(simt, partials, dtype, offset) for offset in (0, 1)]
    assert ((results[0].double() - exact).abs() <= bound).all()
    # What a pointer allows changes the loads and stores, and no bit of the sums.
    assert torch.equal(results[0], results[1])


@pytest.mark.parametrize("shape", [(1, 8, 516), (1, 330, 100)], ids=str)
def test_a_misaligned_start(simt: Any, shape: tuple[int, int, int]) -> None:
    """The second array of partial sums of one workspace, as a bias has behind a weight."""
    torch.manual_seed(0)
    partials = torch.randn(shape)
    moved = torch.empty(partials.numel() + 1)[1:].view(shape).copy_(partials)
    assert moved.data_ptr() % 16 == 4
    got = [run(simt, t, torch.float32, 0) for t in (partials, moved)]
    assert torch.equal(got[0], got[1])


@pytest.mark.parametrize("cols", [5, 32])
def test_no_groups(simt: Any, cols: int) -> None:
    assert torch.equal(
        run(simt, torch.empty(2, 0, cols), torch.bfloat16, 0), torch.zeros(2, cols, dtype=torch.bfloat16)
    )


@pytest.mark.parametrize("shape", [(1, 7, 600), (1, 100, 70)], ids=str)
def test_bits_do_not_depend_on_the_order_of_threads_or_the_device(simt: Any, shape: tuple[int, int, int]) -> None:
    torch.manual_seed(1)
    partials = torch.randn(shape)
    results = []
    for seed, sm_count in ((0, 1), (1, 4), (2, 132)):
        simt.configure(seed, sm_count)
        results.append(run(simt, partials, torch.float32, 0))
    assert all(torch.equal(results[0], result) for result in results)
