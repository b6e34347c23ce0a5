"""packing_plan, pack and unpack: the CUDA kernels, run in the emulator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from helpers import cases, checks
from helpers.drawn import drawn


def plain_plan(mask: Tensor, capacity: int) -> tuple[Tensor, ...]:
    """packing_plan in plain PyTorch."""
    batch, seqlen = mask.shape
    tokens = mask != 0
    lengths = tokens.sum(1)
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    flat = tokens.flatten().nonzero().flatten()[:capacity]
    indices = torch.full((capacity,), -1)
    indices[: len(flat)] = flat
    position_ids = torch.zeros(capacity, dtype=torch.int64)
    position_ids[: len(flat)] = flat % max(seqlen, 1)
    ranks = torch.full((batch * seqlen,), -1, dtype=torch.int32)
    ranks[flat] = torch.arange(len(flat), dtype=torch.int32)
    clamped = ends.clamp(max=capacity)
    longest = int(lengths.max()) if batch else 0
    return (
        clamped.int(),
        (clamped[1:] - clamped[:-1]).int(),
        indices,
        position_ids,
        ranks.view(batch, seqlen),
        torch.tensor([int(ends[-1]), longest]),
    )


def check_plan(simt: Any, mask: Tensor, capacity: int) -> tuple[Tensor, ...]:
    plan = simt.packing_plan(mask, capacity)
    names = ("cu_seqlens", "lengths", "indices", "position_ids", "ranks", "summary")
    for name, got, expected in zip(names, plan, plain_plan(mask, capacity), strict=True):
        assert got.dtype == expected.dtype, name
        assert torch.equal(got, expected), name
    return plan


@pytest.mark.parametrize("case", cases.MASK_CASES, ids=str)
def test_plan_of_each_pattern(simt: Any, seed: int, case: cases.MaskCase) -> None:
    checks.check_packing_plan(simt, case)


@pytest.mark.parametrize("rows", cases.ROW_CASES, ids=str)
@pytest.mark.parametrize("case", cases.MASK_CASES[:13], ids=str)
def test_rows_of_each_dtype(simt: Any, case: cases.MaskCase, rows: cases.RowCase) -> None:
    checks.check_pack(simt, case, rows)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("seqlen", [1, 15, 16, 17, 1024, 1025, 2500])
def test_mask_dtypes(simt: Any, seed: int, dtype: torch.dtype, seqlen: int) -> None:
    torch.manual_seed(seqlen)
    # Any nonzero value is a token; with more than one byte an element, some have only high bits set.
    high = {torch.bool: 1, torch.uint8: 128, torch.int8: -128, torch.int32: 1 << 24, torch.int64: 1 << 40}[dtype]
    mask = (torch.rand(3, seqlen) < 0.7).to(dtype) * torch.where(torch.rand(3, seqlen) < 0.5, 1, high).to(dtype)
    check_plan(simt, mask, mask.numel())


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("seqlen", [5, 100, 1100])
@pytest.mark.parametrize("offset", [1, 3])
def test_masks_at_odd_addresses(simt: Any, dtype: torch.dtype, seqlen: int, offset: int) -> None:
    """Rows begin anywhere in a 16-byte line, and lie further apart than they are long."""
    torch.manual_seed(offset)
    whole = (torch.rand(3, seqlen + 9) < 0.6).to(dtype)
    check_plan(simt, whole[:, offset : offset + seqlen], 2 * seqlen)


def test_more_rows_than_one_scan_step(simt: Any, seed: int) -> None:
    torch.manual_seed(1)
    check_plan(simt, torch.rand(2100, 3) < 0.5, 3000)


def test_expanded_mask(simt: Any) -> None:
    check_plan(simt, (torch.rand(1, 40) < 0.5).expand(5, 40), 200)


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0, 0)])
@pytest.mark.parametrize("capacity", [0, 7])
def test_plans_of_nothing(simt: Any, shape: tuple[int, int], capacity: int) -> None:
    check_plan(simt, torch.ones(shape, dtype=torch.bool), capacity)


DTYPES = (torch.uint8, torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64)


def check_gather(simt: Any, x: Tensor, mask: Tensor, capacity: int) -> None:
    """pack and unpack of x [batch, seqlen, ...], bit by bit."""
    _, _, indices, _, ranks, _ = plain_plan(mask, capacity)
    packed = simt.pack(x, indices, ranks)
    expected = torch.zeros(capacity, *x.shape[2:], dtype=x.dtype)
    kept = indices >= 0
    expected[kept] = x.flatten(0, 1)[indices[kept]]
    assert torch.equal(packed, expected)
    restored = simt.unpack(packed, indices, ranks)
    expected = torch.zeros_like(x, memory_format=torch.contiguous_format)
    expected[ranks >= 0] = x[ranks >= 0]
    assert torch.equal(restored, expected)


def random_as(dtype: torch.dtype, *shape: int) -> Tensor:
    if dtype.is_floating_point:
        return torch.randn(shape).to(dtype)
    return torch.randint(0, 2 if dtype == torch.bool else 200, shape).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("trailing", [(), (1,), (3,), (8,), (5, 7), (2, 3, 4), (64,), (129,), (768,), (1500,)], ids=str)
def test_rows_of_each_size(simt: Any, dtype: torch.dtype, trailing: tuple[int, ...]) -> None:
    torch.manual_seed(len(trailing))
    check_gather(simt, random_as(dtype, 3, 13, *trailing), torch.rand(3, 13) < 0.6, 20)


def test_seeds_change_nothing(simt: Any, seed: int) -> None:
    torch.manual_seed(0)
    check_gather(simt, torch.randn(5, 37, 24), torch.rand(5, 37) < 0.5, 100)


@pytest.mark.parametrize("offset", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32], ids=str)
def test_rows_at_odd_addresses(simt: Any, dtype: torch.dtype, offset: int) -> None:
    """A tensor that begins at any element of its storage is read with the width that its address allows."""
    storage = random_as(dtype, 2 * 9 * 32 + 16)
    x = storage[offset : offset + 2 * 9 * 32].view(2, 9, 32)
    assert x.is_contiguous() and x.data_ptr() % 16 == offset * x.element_size() % 16
    check_gather(simt, x, torch.rand(2, 9) < 0.7, 18)


def test_strided_rows(simt: Any) -> None:
    check_gather(simt, torch.randn(4, 7, 6, 2)[..., 0], torch.rand(4, 7) < 0.7, 28)
    check_gather(simt, torch.randn(7, 4, 6).transpose(0, 1), torch.rand(4, 7) < 0.7, 28)


def test_very_long_rows(simt: Any) -> None:
    check_gather(simt, torch.randint(0, 255, (2, 2, 70001)).to(torch.uint8), torch.tensor([[1, 0], [1, 1]]), 3)


def test_bad_indices_read_nothing(simt: Any) -> None:
    """Whatever stands in indices and ranks, nothing outside the tensors is touched."""
    x = torch.randn(2, 3, 8)
    indices = torch.tensor([5, -1, 6, 2**40, -(2**40), 0])
    ranks = torch.tensor([[0, 6, -7], [2**31 - 1, -(2**31), 5]], dtype=torch.int32)
    packed = simt.pack(x, indices, ranks)
    assert torch.equal(packed[[0, 5]], x.flatten(0, 1)[[5, 0]]) and not packed[1:5].any()
    restored = simt.unpack(packed, indices, ranks).flatten(0, 1)
    assert torch.equal(restored[[0, 5]], packed[[0, 5]]) and not restored[1:5].any()


@drawn(40, data=st.data())
def test_drawn_masks(simt: Any, data: st.DataObject) -> None:
    simt._configure(data.draw(st.integers(0, 1000), label="seed"), data.draw(st.integers(1, 9), label="sm_count"))
    batch = data.draw(st.integers(0, 6), label="batch")
    seqlen = data.draw(st.integers(0, 70), label="seqlen")
    bits = data.draw(st.lists(st.booleans(), min_size=batch * seqlen, max_size=batch * seqlen), label="mask")
    capacity = data.draw(st.integers(0, batch * seqlen + 5), label="capacity")
    mask = torch.tensor(bits, dtype=data.draw(st.sampled_from([torch.bool, torch.int32, torch.int64]), label="dtype"))
    mask = mask.view(batch, seqlen)
    plan = check_plan(simt, mask, capacity)
    assert plan[0][-1] <= capacity
    dtype = data.draw(st.sampled_from(DTYPES), label="rows")
    trailing = data.draw(st.lists(st.integers(0, 40), max_size=2), label="trailing")
    check_gather(simt, random_as(dtype, batch, seqlen, *trailing), mask, capacity)


def test_errors_name_the_argument(simt: Any) -> None:
    x, indices, ranks = torch.randn(2, 3, 4), torch.arange(6), torch.arange(6, dtype=torch.int32).view(2, 3)
    with pytest.raises(RuntimeError, match=r"pack: x must be of shape \[2, 3, ...\] as the mask was, got float32"):
        simt.pack(x[:, :2], indices, ranks)
    with pytest.raises(RuntimeError, match=r"pack: indices must be int64 of shape \[total\], got int32"):
        simt.pack(x, indices.int(), ranks)
    with pytest.raises(RuntimeError, match=r"unpack: t must be of shape \[6, ...\]"):
        simt.unpack(x, indices, ranks)
    with pytest.raises(RuntimeError, match=r"packing_plan: mask must be bool or integer, got float32"):
        simt.packing_plan(torch.ones(2, 3), 6)
    with pytest.raises(RuntimeError, match=r"packing_plan: mask must be of shape \[batch, seqlen\]"):
        simt.packing_plan(torch.ones(6, dtype=torch.bool), 6)
