"""packing_plan, pack and unpack on every backend, bit by bit."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from helpers import checks
from helpers.backends import Backend, cpu, drawn_on, kernels, on, reference
from helpers.cases import MASK_CASES, ROW_CASES, MaskCase, RowCase

# The dtypes of masks.
REFERENCE = reference((torch.bool, torch.int64, torch.uint8, torch.int16))
CPU = cpu((torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64))
SIMT, GPU = kernels((torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64), examples=(40, 100))
EVERY = (REFERENCE, CPU, SIMT, GPU)
ORDERS = ((0,), (1,), (2,))


# ---- plans ----


@on(*EVERY, case=MASK_CASES)
def test_plan(backend: Backend, case: MaskCase, dtype: torch.dtype) -> None:
    for _ in backend.machines(*ORDERS):
        checks.check_packing_plan(backend.library, case, backend.device, dtype)


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


def check_plan(backend: Backend, mask: Tensor, capacity: int) -> tuple[Tensor, ...]:
    """The plan of a mask, by plain_plan."""
    plan = backend.library.packing_plan(mask.to(backend.device), capacity)
    names = ("cu_seqlens", "lengths", "indices", "position_ids", "ranks", "summary")
    for name, got, expected in zip(names, plan, plain_plan(mask, capacity), strict=True):
        assert got.dtype == expected.dtype, name
        assert torch.equal(got.cpu(), expected), name
    return plan


@on(*EVERY, seqlen=(1, 15, 16, 17, 1024, 1025, 2500))
def test_mask_dtypes(backend: Backend, dtype: torch.dtype, seqlen: int) -> None:
    # Any nonzero value is a token; with more than one byte an element, some have only high bits set.
    high = {torch.bool: 1, torch.int8: -128, torch.uint8: 128, torch.int16: 1 << 8, torch.int32: 1 << 24}
    high_bit = high.get(dtype, 1 << 40)
    mask = (torch.rand(3, seqlen) < 0.7).to(dtype) * torch.where(torch.rand(3, seqlen) < 0.5, 1, high_bit).to(dtype)
    for _ in backend.machines(*ORDERS):
        check_plan(backend, mask, mask.numel())


@on(*EVERY, dtype=(torch.bool, torch.int32, torch.int64), seqlen=(5, 100, 1100), offset=(1, 3))
def test_masks_at_odd_addresses(backend: Backend, dtype: torch.dtype, seqlen: int, offset: int) -> None:
    """Rows begin anywhere in a 16-byte line, and lie further apart than they are long."""
    whole = (torch.rand(3, seqlen + 9) < 0.6).to(backend.device, dtype)
    mask = whole[:, offset : offset + seqlen]
    plan = backend.library.packing_plan(mask, 2 * seqlen)
    for got, expected in zip(plan, plain_plan(mask.cpu(), 2 * seqlen), strict=True):
        assert torch.equal(got.cpu(), expected)


@on(REFERENCE, CPU, seqlen=(1, 7, 40))
def test_masks_with_strides(backend: Backend, dtype: torch.dtype, seqlen: int) -> None:
    for mask in (
        (torch.rand(seqlen, 3) < 0.6).to(dtype).T,
        (torch.rand(4, seqlen, 2) < 0.6).to(dtype)[..., 1],
        (torch.rand(5, 1) < 0.6).to(dtype).expand(5, seqlen),
    ):
        for capacity in (mask.numel(), mask.numel() // 3):
            check_plan(backend, mask, capacity)


@on(REFERENCE, CPU, density=(0.0, 0.5, 1.0))
def test_plans_of_many_places(backend: Backend, density: float) -> None:
    """Threads share out such a mask. Rows are empty, full, cut short by padding on either side, and have holes."""
    mask = torch.rand(40, 3000) < density
    mask[7] = True
    mask[3, :1700] = True
    mask[4, 1700:] = False
    for capacity in (mask.numel() + 50000, 61111):
        check_plan(backend, mask, capacity)


@on(*EVERY)
def test_more_rows_than_one_scan_step(backend: Backend) -> None:
    mask = torch.rand(2100, 3) < 0.5
    for _ in backend.machines(*ORDERS):
        check_plan(backend, mask, 3000)


@on(*EVERY)
def test_expanded_mask(backend: Backend) -> None:
    check_plan(backend, (torch.rand(1, 40) < 0.5).expand(5, 40), 200)


@on(*EVERY, shape=((0, 5), (4, 0), (0, 0)), capacity=(0, 7))
def test_plans_of_nothing(backend: Backend, shape: tuple[int, int], capacity: int) -> None:
    check_plan(backend, torch.ones(shape, dtype=torch.bool), capacity)


# ---- rows ----

ROW_DTYPES = (torch.uint8, torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64)


@on(*EVERY, case=MASK_CASES, rows=ROW_CASES)
def test_pack_and_unpack(backend: Backend, case: MaskCase, rows: RowCase) -> None:
    checks.check_pack(backend.library, case, rows, backend.device)


def check_gather(backend: Backend, x: Tensor, mask: Tensor, capacity: int) -> None:
    """pack and unpack of x [batch, seqlen, ...], bit by bit."""
    _, _, indices, _, ranks, _ = (t.to(backend.device) for t in plain_plan(mask, capacity))
    packed = backend.library.pack(x, indices, ranks)
    expected = torch.zeros(capacity, *x.shape[2:], dtype=x.dtype, device=x.device)
    kept = indices >= 0
    expected[kept] = x.flatten(0, 1)[indices[kept]]
    assert torch.equal(packed, expected)
    restored = backend.library.unpack(packed, indices, ranks)
    expected = torch.zeros_like(x, memory_format=torch.contiguous_format)
    expected[ranks >= 0] = x[ranks >= 0]
    assert torch.equal(restored, expected)


def random_rows(backend: Backend, dtype: torch.dtype, *shape: int) -> Tensor:
    """Random values of any dtype."""
    values = (
        torch.randn(shape) if dtype.is_floating_point else torch.randint(0, 2 if dtype == torch.bool else 200, shape)
    )
    return values.to(backend.device, dtype)


@on(
    *EVERY,
    dtype=ROW_DTYPES,
    trailing=((), (1,), (3,), (8,), (5, 7), (2, 3, 4), (64,), (129,), (768,), (1500,)),
)
def test_rows_of_each_size(backend: Backend, dtype: torch.dtype, trailing: tuple[int, ...]) -> None:
    check_gather(backend, random_rows(backend, dtype, 3, 13, *trailing), torch.rand(3, 13) < 0.6, 20)


@on(*EVERY)
def test_rows_in_any_order_of_threads(backend: Backend) -> None:
    x, mask = random_rows(backend, torch.float32, 5, 37, 24), torch.rand(5, 37) < 0.5
    for _ in backend.machines(*ORDERS):
        check_gather(backend, x, mask, 100)


@on(*EVERY, dtype=(torch.uint8, torch.float16, torch.float32), offset=(1, 2, 3, 4, 8))
def test_rows_at_odd_addresses(backend: Backend, dtype: torch.dtype, offset: int) -> None:
    """A tensor that begins at any element of its storage is read with the width that its address allows."""
    storage = random_rows(backend, dtype, 2 * 9 * 32 + 16)
    x = storage[offset : offset + 2 * 9 * 32].view(2, 9, 32)
    assert x.is_contiguous() and x.data_ptr() % 16 == offset * x.element_size() % 16
    check_gather(backend, x, torch.rand(2, 9) < 0.7, 18)


@on(*EVERY)
def test_strided_rows(backend: Backend) -> None:
    for x in (
        random_rows(backend, torch.float32, 4, 7, 6, 2)[..., 0],
        random_rows(backend, torch.float32, 7, 4, 6).transpose(0, 1),
        random_rows(backend, torch.float32, 4, 7, 18)[..., 6:12],
        random_rows(backend, torch.float32, 4, 1, 18)[..., 6:12].expand(4, 7, 6),
        random_rows(backend, torch.float32, 4, 9, 6)[:, 1:8],
        random_rows(backend, torch.float32, 4, 7, 1).expand(4, 7, 6),
    ):
        check_gather(backend, x, torch.rand(4, 7) < 0.7, 28)


@on(*EVERY)
def test_very_long_rows(backend: Backend) -> None:
    x = random_rows(backend, torch.uint8, 2, 2, 70001)
    check_gather(backend, x, torch.tensor([[1, 0], [1, 1]]), 3)


@on(*EVERY)
def test_bad_indices_read_nothing(backend: Backend) -> None:
    """Whatever stands in indices and ranks, nothing outside the tensors is touched."""
    x = random_rows(backend, torch.float32, 2, 3, 8)
    indices = torch.tensor([5, -1, 6, 2**40, -(2**40), 0], device=backend.device)
    ranks = torch.tensor([[0, 6, -7], [2**31 - 1, -(2**31), 5]], dtype=torch.int32, device=backend.device)
    packed = backend.library.pack(x, indices, ranks)
    assert torch.equal(packed[[0, 5]], x.flatten(0, 1)[[5, 0]]) and not packed[1:5].any()
    restored = backend.library.unpack(packed, indices, ranks).flatten(0, 1)
    assert torch.equal(restored[[0, 5]], packed[[0, 5]]) and not restored[1:5].any()


# ---- drawn ----


@st.composite
def masks(draw: st.DrawFn, backend: Backend) -> Tensor:
    """[batch, seqlen], of any pattern."""
    batch, seqlen = draw(st.integers(0, 6)), draw(st.integers(0, 70))
    bits = draw(st.lists(st.booleans(), min_size=batch * seqlen, max_size=batch * seqlen))
    return torch.tensor(bits, dtype=draw(st.sampled_from(backend.dtypes))).view(batch, seqlen)


@drawn_on(
    *EVERY,
    mask=masks,
    spare=st.integers(-420, 5),
    rows=st.sampled_from(ROW_DTYPES),
    trailing=st.lists(st.integers(0, 40), max_size=2),
    sm_count=st.integers(1, 9),
)
def test_drawn(
    backend: Backend, mask: Tensor, spare: int, rows: torch.dtype, trailing: list[int], sm_count: int, seed: int
) -> None:
    """Capacities from none to more than there are places."""
    backend.configure(seed, sm_count)
    capacity = max(mask.numel() + spare, 0)
    plan = check_plan(backend, mask, capacity)
    assert plan[0][-1] <= capacity
    check_gather(backend, random_rows(backend, rows, *mask.shape, *trailing), mask, capacity)
