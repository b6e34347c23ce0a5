"""Block-diagonal products on wgmma (compute capability 9.0) in the emulator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import monarch
from helpers.backends import AD102_SHARED, H200_SHARED, HALF, order_of
from helpers.cases import random
from helpers.compare import poisoned
from helpers.monarch import BLOCKDIAG_TILES, BlockdiagCase, MonarchCase

WIDE, NARROW = "WarpgroupTile<256, 4", "WarpgroupTile<128, 6"

by_dtype = pytest.mark.parametrize("dtype", HALF, ids=lambda d: str(d).removeprefix("torch."))


def products(simt: Any) -> list[str]:
    """The kernels of products with block-diagonal matrices since the last configure."""
    return [launch["kernel"] for launch in simt.launches() if launch["kernel"].startswith("block_gemm")]


def all_hopper(simt: Any, count: int) -> bool:
    """Whether there were so many products, all of them by the kernel for compute capability 9.0."""
    kernels = products(simt)
    return len(kernels) == count and all(kernel.startswith("block_gemm_hopper<") for kernel in kernels)


def no_hopper(simt: Any, count: int) -> bool:
    """Whether there were so many products, all of them by the kernels for every GPU."""
    kernels = products(simt)
    return len(kernels) == count and all(kernel.startswith("block_gemm<") for kernel in kernels)


# Rows around a tile's 128 and a warpgroup's 64; columns and depth around 64, 128 and 256, all tails of whole 16 bytes.
CASES = (
    BlockdiagCase("one_row", (1,), 2, 64, 64),
    BlockdiagCase("one_row_less", (127,), 1, 72, 64, bias=False),
    BlockdiagCase("a_tile_of_rows", (128,), 1, 128, 128),
    BlockdiagCase("one_row_more", (129,), 3, 64, 72),
    BlockdiagCase("half_a_tile_of_rows", (64,), 1, 256, 64),
    BlockdiagCase("leading_dimensions", (3, 100), 2, 136, 72, bias=False),
    BlockdiagCase("tails_of_both", (131,), 2, 200, 88),
    BlockdiagCase("beyond_a_wide_tile", (130,), 1, 264, 72),
    BlockdiagCase("two_wide_tiles", (40,), 1, 512, 64),
    BlockdiagCase("deeper_than_the_stages", (70,), 1, 64, 456),
    BlockdiagCase("deep_and_wide", (33,), 1, 456, 328),
    BlockdiagCase("many_groups", (20,), 17, 64, 64),
    BlockdiagCase("strided", (70,), 3, 72, 80, layout="strided"),
    BlockdiagCase("transposed", (5, 17), 2, 64, 96, layout="transposed", bias=False),
    BlockdiagCase("misaligned", (13,), 2, 80, 64, layout="misaligned"),
)


@by_dtype
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(simt: Any, seed: int, case: BlockdiagCase, dtype: torch.dtype) -> None:
    """Forward and the gradient of x, whose weight is read the other way."""
    simt.configure(seed, 2, H200_SHARED)
    with poisoned():
        monarch.check_blockdiag_multiply(simt, case, dtype)
    assert all_hopper(simt, 2), products(simt)


@pytest.mark.parametrize("multiprocessors", [1, 3, 5])
def test_walk(simt: Any, multiprocessors: int) -> None:
    """Blocks of threads with several items, not all of them as many, and with steps that go around the ring."""
    for case in (BlockdiagCase("", (260,), 2, 136, 72), BlockdiagCase("", (140,), 3, 264, 136)):
        simt.configure(multiprocessors, multiprocessors, H200_SHARED)
        monarch.check_blockdiag_multiply(simt, case, torch.float16)
        assert all_hopper(simt, 2), products(simt)
        grids = [launch["grid"] for launch in simt.launches() if launch["kernel"].startswith("block_gemm_hopper<")]
        assert grids == [[multiprocessors, 1, 1]] * 2


@pytest.mark.parametrize(
    ("rows", "cols", "multiprocessors", "tile"),
    [
        (128, 128, 1, NARROW),  # a wide tile would be half empty
        (128, 256, 1, WIDE),  # one step of 1,024 clocks, not two of 640
        (128, 256, 2, NARROW),  # both at a time
        (128, 384, 1, NARROW),
        (128, 512, 2, WIDE),
    ],
)
def test_tiles(simt: Any, rows: int, cols: int, multiprocessors: int, tile: str) -> None:
    simt.configure(1, multiprocessors, H200_SHARED)
    monarch.check_blockdiag_multiply(simt, BlockdiagCase("", (rows,), 1, cols, 64), torch.bfloat16, backward=False)
    assert all_hopper(simt, 1) and tile in products(simt)[0], products(simt)


@by_dtype
@pytest.mark.parametrize("good", [0, 1, 2])
def test_nan_beside_a_block(simt: Any, seed: int, good: int, dtype: torch.dtype) -> None:
    """Boxes reach past a block, and the rows between rows of x are NaN: neither arrives."""
    simt.configure(seed, 2, H200_SHARED)
    groups, q, p, rows = 3, 72, 88, 70
    torch.manual_seed(0)
    case = BlockdiagCase("", (rows,), groups, q, p, layout="strided")
    inputs = monarch.blockdiag_inputs(case, dtype)
    (w,), bias, dout = inputs.weights, inputs.bias, inputs.dout
    assert bias is not None
    others = [g for g in range(groups) if g != good]
    expected = simt.blockdiag_multiply(inputs.x, w, bias)
    expected_dx = simt.blockdiag_multiply_backward(dout, inputs.x, w, True)[0]
    for blocks in (
        inputs.x.unflatten(-1, (groups, p)),
        bias.unflatten(0, (groups, q)),
        dout.unflatten(-1, (groups, q)),
    ):
        blocks[..., others, :] = torch.nan
    w[others] = torch.nan
    out = simt.blockdiag_multiply(inputs.x, w, bias)
    dx = simt.blockdiag_multiply_backward(dout, inputs.x, w, True)[0]
    assert all_hopper(simt, 4), products(simt)
    for found, whole, width in ((out, expected, q), (dx, expected_dx, p)):
        found, whole = (t.unflatten(-1, (groups, width)) for t in (found, whole))
        assert torch.equal(found[:, good], whole[:, good]) and torch.isfinite(whole).all()
        assert found[:, others].isnan().all()


def test_columns_of_a_wider_x(simt: Any) -> None:
    """Rows as far apart as the matrix around is wide, which is no multiple of a block's depth."""
    simt.configure(1, 2, H200_SHARED)
    torch.manual_seed(0)
    around = random(150, 3 * 72 + 40, dtype=torch.float16)
    x, w = around[:, 16 : 16 + 2 * 72], random(2, 80, 72, dtype=torch.float16)
    expected = simt.blockdiag_multiply(x.contiguous(), w)
    around[:, :16] = around[:, 16 + 2 * 72 :] = torch.nan
    assert torch.equal(simt.blockdiag_multiply(x, w), expected)
    assert all_hopper(simt, 2), products(simt)


def test_one_row_of_any_stride(simt: Any) -> None:
    simt.configure(1, 2, H200_SHARED)
    x, w = random(1, 128, dtype=torch.float16), random(2, 64, 64, dtype=torch.float16)
    expected = simt.blockdiag_multiply(x, w)
    for stride in (0, 8, 1 << 20):
        assert torch.equal(simt.blockdiag_multiply(x.as_strided((1, 128), (stride, 1)), w), expected)
    assert all_hopper(simt, 4), products(simt)


def test_no_rows(simt: Any) -> None:
    simt.configure(1, 2, H200_SHARED)
    monarch.check_blockdiag_multiply(simt, BlockdiagCase("", (0,), 2, 64, 64), torch.float16)
    assert products(simt) == []


def test_two_products_of_a_monarch_matrix(simt: Any) -> None:
    """Where the intermediate does not fit into shared memory, both factors are products of blocks."""
    simt.configure(1, 2, H200_SHARED)
    monarch.check_monarch_multiply(simt, MonarchCase("", (40,), (2, 1024, 64), (2, 64, 1024)), torch.bfloat16)
    assert all_hopper(simt, len(products(simt))) and products(simt), products(simt)


# ---- what takes mma.sync ----

FALLS_BACK = BlockdiagCase("falls_back", (139,), 2, 136, 72)


def _check_without(simt: Any, case: BlockdiagCase = FALLS_BACK) -> None:
    monarch.check_blockdiag_multiply(simt, case, torch.bfloat16)
    assert no_hopper(simt, 2), products(simt)


def test_switched_off(simt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    simt.configure(1, 2, H200_SHARED)
    monkeypatch.setenv("WARPFORM_HOPPER", "0")
    _check_without(simt)
    monkeypatch.setenv("WARPFORM_HOPPER", "1")
    simt.configure(1, 2, H200_SHARED)
    monarch.check_blockdiag_multiply(simt, FALLS_BACK, torch.bfloat16)
    assert all_hopper(simt, 2), products(simt)


@pytest.mark.parametrize("facts", [{"capability": 80}, {"capability": 100}, {"tensor_maps": False}], ids=str)
def test_other_machines(simt: Any, facts: dict[str, Any]) -> None:
    simt.configure(1, 2, H200_SHARED)
    simt.claim(**facts)
    try:
        _check_without(simt)
    finally:
        simt.claim()


@by_dtype
@pytest.mark.parametrize("case", BLOCKDIAG_TILES, ids=str)
def test_tiles_for_every_gpu(simt: Any, case: BlockdiagCase, dtype: torch.dtype) -> None:
    """The tiles of mma.sync, which the tests of all backends see on machines that take wgmma."""
    simt.configure(order_of(f"{case}{dtype}"), 2, H200_SHARED)
    simt.claim(capability=80)
    try:
        monarch.check_blockdiag_multiply(simt, case, dtype)
        assert no_hopper(simt, 2), products(simt)
    finally:
        simt.claim()


def test_less_shared_memory(simt: Any) -> None:
    simt.configure(1, 2, AD102_SHARED)
    _check_without(simt)


@pytest.mark.parametrize(("q", "p"), [(56, 56), (24, 128), (128, 40)])
def test_small_blocks(simt: Any, q: int, p: int) -> None:
    """Fewer columns or less depth than a step has."""
    simt.configure(1, 2, H200_SHARED)
    _check_without(simt, BlockdiagCase("", (139,), 2, q, p))


def test_few_tiles(simt: Any) -> None:
    """Tiles for fewer than half of the multiprocessors."""
    case = BlockdiagCase("", (139,), 1, 136, 200)  # 4 tiles, and 4 of the gradient's
    simt.configure(1, 9, H200_SHARED)
    _check_without(simt, case)
    simt.configure(1, 8, H200_SHARED)
    monarch.check_blockdiag_multiply(simt, case, torch.float16)
    assert all_hopper(simt, 2), products(simt)


def test_same_results(simt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both kernels add the same products in float32 and round once."""
    simt.configure(1, 2, H200_SHARED)
    torch.manual_seed(0)
    inputs = monarch.blockdiag_inputs(FALLS_BACK, torch.float16)

    def both() -> tuple[Tensor, Tensor]:
        out = simt.blockdiag_multiply(inputs.x, *inputs.weights, inputs.bias)
        return out, simt.blockdiag_multiply_backward(inputs.dout, inputs.x, *inputs.weights, inputs.has_bias)[0]

    with_wgmma = both()
    monkeypatch.setenv("WARPFORM_HOPPER", "0")
    for found, other in zip(with_wgmma, both(), strict=True):
        unit = torch.finfo(torch.float16).eps * other.abs().max()
        assert (found - other).abs().max() <= unit


# ---- both factors in one pass ----

# Second factors of four blocks, in whole panels of 64 of h for each.
MONARCH_CASES = (
    MonarchCase("square", (70,), (4, 256, 64), (4, 64, 256)),
    MonarchCase("wider", (65,), (4, 192, 72), (4, 200, 192)),
    MonarchCase("narrower", (64,), (4, 192, 328), (4, 66, 192)),
    MonarchCase("one_row", (1,), (4, 192, 64), (4, 64, 192)),
    MonarchCase("first_of_one_block", (63,), (1, 256, 72), (4, 72, 64)),
    MonarchCase("two_tiles_of_rhos", (40,), (1, 512, 64), (4, 66, 128)),
    MonarchCase("half_of_a_tile_of_rhos", (129,), (6, 128, 80), (4, 130, 192)),
    MonarchCase("strided", (33,), (2, 128, 88), (4, 72, 64), layout="strided"),
)


def fused(simt: Any) -> list[str]:
    """The kernels of Monarch products in one pass since the last configure."""
    return [launch["kernel"] for launch in simt.launches() if launch["kernel"].startswith("monarch_forward")]


@by_dtype
@pytest.mark.parametrize("case", MONARCH_CASES, ids=str)
def test_monarch_cases(simt: Any, case: MonarchCase, dtype: torch.dtype) -> None:
    simt.configure(order_of(f"{case}{dtype}"), 2, H200_SHARED)
    with poisoned():
        monarch.check_monarch_multiply(simt, case, dtype, backward=False)
    assert len(fused(simt)) == 1 and fused(simt)[0].startswith("monarch_forward_hopper<")


def test_monarch_walk(simt: Any, seed: int) -> None:
    """Several tiles of rows a block of threads, and not as many in each."""
    simt.configure(seed, 2, H200_SHARED)
    case = MonarchCase("", (300,), (2, 128, 72), (4, 72, 64))
    monarch.check_monarch_multiply(simt, case, torch.bfloat16, backward=False)
    assert [launch["grid"] for launch in simt.launches()] == [[2, 1, 1]]
    assert fused(simt)[0].startswith("monarch_forward_hopper<")


@pytest.mark.parametrize(("r", "stages"), [(192, 3), (256, 2)])
def test_monarch_stages(simt: Any, r: int, stages: int) -> None:
    """Three stages where h leaves room for them, else two."""
    simt.configure(1, 1, H200_SHARED)
    monarch.check_monarch_multiply(
        simt, MonarchCase("", (20,), (r // 32, 128, 64), (4, 64, r)), torch.float16, backward=False
    )
    assert f"MonarchHopperTile<{stages}>" in fused(simt)[0]


def test_monarch_nan_beside_a_block(simt: Any) -> None:
    """What boxes reach past a block of x or of a factor, and past the last row, does not arrive."""
    simt.configure(1, 2, H200_SHARED)
    torch.manual_seed(0)
    case = MonarchCase("", (70,), (2, 128, 72), (4, 72, 64), layout="strided")
    inputs = monarch.monarch_inputs(case, torch.float16)
    w1, w2 = inputs.weights
    expected = simt.monarch_multiply(inputs.x, w1, w2)
    w2[1] = torch.nan  # one lambda
    out = simt.monarch_multiply(inputs.x, w1, w2).unflatten(-1, (72, 4))
    assert out[..., 1].isnan().all()
    assert torch.equal(out[..., [0, 2, 3]], expected.unflatten(-1, (72, 4))[..., [0, 2, 3]])
    inputs.x[..., 72:] = torch.nan  # a kappa, and nothing of it in the other's h
    w2[1] = 0
    w2[:, :, 32:] = 0  # the rhos of that kappa
    assert simt.monarch_multiply(inputs.x, w1, w2).isnan().all()  # 0 times NaN
    assert all(kernel.startswith("monarch_forward_hopper<") for kernel in fused(simt)) and len(fused(simt)) == 3


@pytest.mark.parametrize(
    "case",
    [
        MonarchCase("two_lambdas", (20,), (2, 128, 64), (2, 64, 128)),
        MonarchCase("eight_lambdas", (20,), (4, 128, 64), (8, 64, 64)),
        MonarchCase("rhos_of_no_whole_steps", (20,), (8, 96, 64), (4, 64, 192)),
        MonarchCase("few_rhos", (20,), (4, 64, 64), (4, 64, 64)),
        MonarchCase("h_of_no_whole_panels", (20,), (3, 128, 64), (4, 64, 96)),
        MonarchCase("small_first", (20,), (4, 128, 56), (4, 64, 128)),
        MonarchCase("small_second", (20,), (4, 128, 64), (4, 56, 128)),
    ],
    ids=str,
)
def test_monarch_of_other_shapes(simt: Any, case: MonarchCase) -> None:
    simt.configure(1, 2, H200_SHARED)
    monarch.check_monarch_multiply(simt, case, torch.float16, backward=False)
    assert len(fused(simt)) == 1 and fused(simt)[0].startswith("monarch_forward<")


def test_monarch_without(simt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other machines, less shared memory, and WARPFORM_HOPPER=0."""
    case = MONARCH_CASES[-1]
    for facts in ({"capability": 80}, {"capability": 100}, {"tensor_maps": False}, {}):
        simt.configure(1, 2, H200_SHARED if facts else AD102_SHARED)
        simt.claim(**facts)
        monarch.check_monarch_multiply(simt, case, torch.float16, backward=False)
        assert len(fused(simt)) == 1 and fused(simt)[0].startswith("monarch_forward<")
    simt.configure(1, 2, H200_SHARED)
    monkeypatch.setenv("WARPFORM_HOPPER", "0")
    monarch.check_monarch_multiply(simt, case, torch.float16, backward=False)
    assert fused(simt)[0].startswith("monarch_forward<")
