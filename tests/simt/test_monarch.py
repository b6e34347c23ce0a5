"""Block-diagonal and Monarch products and their backwards: the CUDA kernels, run in the emulator."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from helpers import monarch
from helpers.compare import assert_close
from helpers.drawn import drawn
from helpers.monarch import BlockdiagCase, GluCase, MonarchCase

DTYPES = (torch.float16, torch.bfloat16)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))

# On few multiprocessors a CTA walks over many blocks, tiles are large and rows are summed in few ranges; on many, the
# other way round.
FEW_SMS, MANY_SMS = 1, 1024
H200_SHARED, AD102_SHARED = 232_448, 101_376

# Every tile of every kernel, with more than one step each way and tails.
BLOCKDIAG_CASES = (
    BlockdiagCase("large_tiles", (139,), 2, 200, 152),
    BlockdiagCase("split_rows", (1100,), 2, 24, 40),
    BlockdiagCase("split_rows_of_large_tiles", (1030,), 1, 136, 72),
)
MONARCH_CASES = (
    MonarchCase("several_tiles_of_each_product", (70,), (4, 160, 72), (4, 136, 160)),
    MonarchCase("three_lambdas", (33,), (5, 24, 72), (3, 144, 40)),
    MonarchCase("two_lambdas", (33,), (2, 40, 16), (2, 24, 40)),
    MonarchCase("chunks_of_lambdas", (40,), (16, 32, 16), (16, 40, 32)),
    MonarchCase("a_last_chunk_of_fewer", (40,), (6, 64, 8), (12, 24, 32)),
    MonarchCase("wide_runs_of_many_lambdas", (20,), (2, 640, 8), (8, 16, 160)),
    MonarchCase("rank_one_of_odd_counts", (20,), (27, 8, 8), (27, 8, 8)),
    MonarchCase("runs_across_kappas", (20,), (9, 40, 8), (15, 8, 24)),
)
GLU_CASES = (
    GluCase("blocks_of_256", (131,), 2, 2 * 136, 2 * 72, 2 * 200),
    GluCase("blocks_of_512", (70,), 2, 2 * 264, 2 * 40, 2 * 328),
    GluCase("blocks_beyond_the_registers", (20,), 2, 2 * 24, 2 * 24, 2 * 520),
    GluCase("an_odd_number_of_blocks", (20,), 3, 3 * 136, 3 * 8, 3 * 40),
)


def _backward_aligned(case: MonarchCase) -> bool:
    """The backward pass has rows of h's and dout's blocks, too."""
    return case.aligned and case.first[1] % 8 == 0 and case.second[1] % 8 == 0


def _aligned(cases: tuple[Any, ...]) -> list[Any]:
    return [case for case in cases if case.aligned]


@by_dtype
@pytest.mark.parametrize("case", _aligned(monarch.BLOCKDIAG_CASES + BLOCKDIAG_CASES), ids=str)
def test_blockdiag_cases(simt: Any, case: BlockdiagCase, dtype: torch.dtype) -> None:
    for seed, sm_count in ((0, FEW_SMS), (len(case.name), MANY_SMS)):
        simt._configure(seed, sm_count, H200_SHARED)
        monarch.check_blockdiag_multiply(simt, case, dtype)


@by_dtype
@pytest.mark.parametrize("case", _aligned(monarch.MONARCH_CASES + MONARCH_CASES), ids=str)
def test_monarch_cases(simt: Any, case: MonarchCase, dtype: torch.dtype) -> None:
    for seed, sm_count in ((0, FEW_SMS), (len(case.name), MANY_SMS)):
        simt._configure(seed, sm_count, H200_SHARED)
        monarch.check_monarch_multiply(simt, case, dtype, backward=_backward_aligned(case))


@by_dtype
@pytest.mark.parametrize("case", _aligned(monarch.GLU_CASES + GLU_CASES), ids=str)
def test_glu_cases(simt: Any, case: GluCase, dtype: torch.dtype) -> None:
    for seed, sm_count in ((0, FEW_SMS), (len(case.name), MANY_SMS)):
        simt._configure(seed, sm_count, H200_SHARED)
        monarch.check_blockdiag_glu(simt, case, dtype)


@by_dtype
@pytest.mark.parametrize("case", [c for c in _aligned(MONARCH_CASES) if _backward_aligned(c)], ids=str)
def test_monarch_with_less_shared_memory(simt: Any, case: MonarchCase, dtype: torch.dtype) -> None:
    """Chunks of fewer lambdas, and two products one after the other where not even those fit."""
    simt._configure(1, FEW_SMS, AD102_SHARED)
    monarch.check_monarch_multiply(simt, case, dtype, backward=False)


@by_dtype
def test_glu_with_less_shared_memory(simt: Any, dtype: torch.dtype) -> None:
    """Fewer rows at a time, and the wide activations through memory where not even those fit."""
    for case in (GLU_CASES[0], GluCase("", (70,), 2, 2 * 72, 2 * 40, 2 * 264), GLU_CASES[1]):
        simt._configure(1, FEW_SMS, AD102_SHARED)
        monarch.check_blockdiag_glu(simt, case, dtype, backward=False)


machine = {"dtype": st.sampled_from(DTYPES), "sm_count": st.sampled_from((1, 4, 1024))}


@drawn(40, case=monarch.blockdiag_cases(aligned=True), **machine)
def test_drawn_blockdiag(simt: Any, case: BlockdiagCase, dtype: torch.dtype, seed: int, sm_count: int) -> None:
    simt._configure(seed, sm_count, H200_SHARED)
    monarch.check_blockdiag_multiply(simt, case, dtype)


@drawn(40, case=monarch.monarch_cases(aligned=True), shared=st.sampled_from((AD102_SHARED, H200_SHARED)), **machine)
def test_drawn_monarch(simt: Any, case: MonarchCase, dtype: torch.dtype, shared: int, seed: int, sm_count: int) -> None:
    simt._configure(seed, sm_count, shared)
    monarch.check_monarch_multiply(simt, case, dtype, backward=_backward_aligned(case))


@drawn(40, case=monarch.glu_cases(aligned=True), **machine)
def test_drawn_glu(simt: Any, case: GluCase, dtype: torch.dtype, seed: int, sm_count: int) -> None:
    simt._configure(seed, sm_count, H200_SHARED)
    monarch.check_blockdiag_glu(simt, case, dtype)


def test_glu_of_two_counts_of_blocks(simt: Any) -> None:
    """w_up and w_down need not have the same number: such a product goes in three steps."""
    x, bias = torch.randn(21, 64).bfloat16(), torch.randn(48).bfloat16()
    w_up, w_down = torch.randn(4, 32, 16).bfloat16() / 4, torch.randn(2, 24, 32).bfloat16() / 6
    tensors = (x, w_up, w_down, bias)
    truth = monarch.blockdiag_glu(*(t.double() for t in tensors))
    assert_close("out", simt.blockdiag_glu(*tensors), truth, monarch.blockdiag_glu(*tensors))


Calls = Callable[[Any, torch.dtype], list[Tensor]]


def _blockdiag_calls(simt: Any, dtype: torch.dtype) -> list[Tensor]:
    x = monarch.blockdiag_inputs(BlockdiagCase("", (1100,), 3, 40, 72), dtype)
    return [
        simt.blockdiag_multiply(x.x, *x.weights, x.bias),
        *simt.blockdiag_multiply_backward(x.dout, x.x, *x.weights, True),
    ]


def _monarch_calls(simt: Any, dtype: torch.dtype) -> list[Tensor]:
    x = monarch.monarch_inputs(MonarchCase("", (67,), (16, 16, 16), (8, 24, 32)), dtype)
    return [simt.monarch_multiply(x.x, *x.weights), *simt.monarch_multiply_backward(x.dout, x.x, *x.weights)]


def _glu_calls(simt: Any, dtype: torch.dtype) -> list[Tensor]:
    x = monarch.glu_inputs(GluCase("", (133,), 4, 96, 160, 128), dtype)
    return [
        simt.blockdiag_glu(x.x, *x.weights, x.bias),
        *simt.blockdiag_glu_backward(x.dout, x.x, *x.weights, True),
    ]


@pytest.mark.parametrize("calls", (_blockdiag_calls, _monarch_calls, _glu_calls), ids=lambda f: f.__name__)
def test_results_repeat_bit_for_bit(simt: Any, calls: Calls) -> None:
    """In any order of blocks and threads: nothing is added by whoever comes first."""
    runs = []
    for seed in (1, 2, 3):
        simt._configure(seed, 5, H200_SHARED)
        torch.manual_seed(0)
        runs.append(calls(simt, torch.bfloat16))
    for results in zip(*runs, strict=True):
        assert all(torch.equal(results[0], r) for r in results[1:])


def test_bad_values_stay_in_their_row_and_block(simt: Any) -> None:
    """NaN in one block of one row of x reaches what the blocks make of it, and no other row, forward and backward."""
    x = monarch.blockdiag_inputs(BlockdiagCase("", (70,), 4, 24, 40), torch.bfloat16)
    clean = simt.blockdiag_multiply(x.x, *x.weights, x.bias)
    x.x[65, 40:80] = float("nan")
    dirty = simt.blockdiag_multiply(x.x, *x.weights, x.bias)
    hit = torch.zeros_like(clean, dtype=torch.bool)
    hit[65, 24:48] = True
    assert dirty[hit].isnan().all() and torch.equal(dirty[~hit], clean[~hit])
    dx, *_ = simt.blockdiag_multiply_backward(x.dout, x.x, *x.weights, True)
    assert dx.isfinite().all()

    # One row of the second factor's lambdas: infinities of h are in columns beside those of other lambdas.
    x = monarch.monarch_inputs(MonarchCase("", (70,), (4, 24, 16), (4, 16, 24)), torch.float16)
    clean = simt.monarch_multiply(x.x, *x.weights)
    x.weights[0][1, 6] = float("inf")  # theta = 6 of kappa = 1: rho 7 of lambda 2
    dirty = simt.monarch_multiply(x.x, *x.weights)
    hit = torch.zeros_like(clean, dtype=torch.bool).view(70, 16, 4)
    hit[..., 2] = True
    hit = hit.view(70, 64)
    assert (~dirty[hit].isfinite()).all() and torch.equal(dirty[~hit], clean[~hit])

    # Block 1 of x feeds halves 2 and 3: the gates of output blocks 2 and 3.
    x = monarch.glu_inputs(GluCase("", (70,), 4, 32, 64, 32), torch.bfloat16)
    clean = simt.blockdiag_glu(x.x, *x.weights, x.bias)
    x.x[3, 8:16] = float("nan")
    dirty = simt.blockdiag_glu(x.x, *x.weights, x.bias)
    hit = torch.zeros_like(clean, dtype=torch.bool)
    hit[3, 16:] = True
    assert dirty[hit].isnan().all() and torch.equal(dirty[~hit], clean[~hit])


def test_nothing_to_multiply(simt: Any) -> None:
    """Blocks without columns give the bias, or zeros."""
    for dtype in DTYPES:
        bias = torch.randn(16, dtype=dtype)
        x, w = torch.zeros(5, 0, dtype=dtype), torch.zeros(2, 8, 0, dtype=dtype)
        assert torch.equal(simt.blockdiag_multiply(x, w, bias), bias.expand(5, 16))
        dx, dw, dbias = simt.blockdiag_multiply_backward(torch.ones(5, 16, dtype=dtype), x, w, True)
        assert dx.shape == x.shape and dw.shape == w.shape and (dbias == 5).all()
        w1, w2 = torch.zeros(2, 8, 0, dtype=dtype), torch.zeros(2, 8, 8, dtype=dtype)
        assert torch.equal(simt.monarch_multiply(x, w1, w2), torch.zeros(5, 16, dtype=dtype))
        w1, w2 = torch.zeros(2, 0, 8, dtype=dtype), torch.zeros(2, 8, 0, dtype=dtype)
        x = torch.randn(5, 16, dtype=dtype)
        assert torch.equal(simt.monarch_multiply(x, w1, w2), torch.zeros(5, 16, dtype=dtype))
        dx, dw1, dw2 = simt.monarch_multiply_backward(x, x, w1, w2)
        assert (dx == 0).all() and dw1.numel() == 0 and dw2.numel() == 0


def test_kernel_table_lists_what_runs(simt: Any) -> None:
    ops = ("blockdiag_multiply", "monarch_multiply", "blockdiag_glu")
    rows = [row for row in json.loads(simt._kernel_table()) if row["op"].removesuffix("_backward") in ops]
    assert {(row["op"], row["dtype"]) for row in rows} == {
        (f"{op}{backward}", dtype) for op in ops for backward in ("", "_backward") for dtype in ("float16", "bfloat16")
    }
    for row in rows:
        step, dtype = row["block_sizes"]["multiple_of"], getattr(torch, row["dtype"])
        backward = row["op"].endswith("_backward")
        for n in (1, 2, 3):
            if row["op"].startswith("blockdiag_multiply"):
                case = BlockdiagCase("", (9,), 3, n * step, 2 * step)
                monarch.check_blockdiag_multiply(simt, case, dtype, backward=backward)
            elif row["op"].startswith("monarch_multiply"):
                case_m = MonarchCase("", (9,), (3, n * step, 2 * step), (3, step, n * step))
                monarch.check_monarch_multiply(simt, case_m, dtype, backward=backward)
            else:
                case_g = GluCase("", (9,), 2, 2 * n * step, 2 * step, 4 * step)
                monarch.check_blockdiag_glu(simt, case_g, dtype, backward=backward)


def _half(*shape: int) -> Tensor:
    return torch.zeros(shape).half()


X, DOUT = _half(3, 32), _half(3, 16)


@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        ("blockdiag_multiply", (X, _half(4, 5, 8)), "no kernel: a block has rows or columns that are not a multiple"),
        ("blockdiag_multiply", (_half(3, 36), _half(4, 8, 9)), "no kernel: a block has rows or columns that are not"),
        ("blockdiag_multiply", (_half(1, 32), _half(2, 16392, 16)), "no kernel: a block has more than 16384 rows"),
        ("blockdiag_multiply", (X.float(), torch.zeros(4, 8, 8)), "no kernel: the kernels take float16 and bfloat16"),
        ("blockdiag_multiply", (X, _half(4, 8)), r"w must be float16 of shape \[nblocks, out / nblocks, in / nblocks"),
        ("blockdiag_multiply", (X, torch.zeros(4, 8, 8)), "w must be float16 of shape .*, got float32 of shape"),
        ("blockdiag_multiply", (X, _half(0, 8, 8)), "w must be float16 of shape"),
        ("blockdiag_multiply", (X, _half(2, 8, 8)), r"x must be of shape \[\.\.\., 16\] as w has it, got float16"),
        ("blockdiag_multiply", (_half(), _half(2, 8, 8)), r"x must be a floating-point tensor of shape \[\.\.\., col"),
        ("blockdiag_multiply", (X.int(), _half(2, 8, 8)), r"x must be a floating-point tensor of shape \[\.\.\., col"),
        ("blockdiag_multiply", (X, _half(4, 8, 8), _half(31)), r"bias must be float16 of shape \[32\], got float16 of"),
        ("blockdiag_multiply", (X, _half(4, 8, 8), torch.zeros(32)), r"bias must be float16 of shape \[32\], got flo"),
        ("blockdiag_multiply_backward", (DOUT[1:], X, _half(2, 8, 16), False), "dout must have the shape and dtype"),
        ("blockdiag_multiply_backward", (DOUT.float(), X, _half(2, 8, 16), False), "dout must have the shape and dty"),
        ("monarch_multiply", (X, _half(2, 8, 16), _half(2, 8, 16)), "w2 must take the 16 columns that w1 gives, got"),
        ("monarch_multiply", (X, _half(4, 8, 16), _half(4, 8, 8)), r"x must be of shape \[\.\.\., 64\] as w1 has it"),
        ("monarch_multiply", (X, _half(2, 6, 16), _half(2, 8, 6)), "no kernel: a block has rows or columns that are"),
        ("monarch_multiply_backward", (X, X, _half(2, 8, 16), _half(2, 8, 8)), "dout must have the shape and dtype"),
        ("monarch_multiply_backward", (DOUT, X, _half(4, 4, 8), _half(2, 8, 8)), "no kernel: a block has rows or col"),
        ("blockdiag_glu", (X, _half(2, 16, 16), _half(2, 8, 16)), "w_up must give twice the 32 columns that w_down"),
        ("blockdiag_glu", (X, _half(2, 16, 16), _half(2, 8, 8), _half(8)), r"bias must be float16 of shape \[16\]"),
        ("blockdiag_glu", (X, _half(2, 8, 16), _half(2, 8, 4)), "no kernel: a block has rows or columns that are not"),
        ("blockdiag_glu_backward", (X, X, _half(2, 16, 16), _half(2, 8, 8), True), "dout must have the shape and dty"),
    ],
)  # fmt: skip
def test_bad_input(simt: Any, op: str, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"^{op}: .*{message}"):
        getattr(simt, op)(*arguments)
