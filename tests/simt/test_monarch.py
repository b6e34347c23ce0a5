"""The kernels of block-diagonal and Monarch products in the emulator: what is asked of them alone."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import monarch
from helpers.backends import AD102_SHARED, FEW_SMS, HALF
from helpers.monarch import GLU_TILES, MONARCH_TILES, BlockdiagCase, GluCase, MonarchCase

by_dtype = pytest.mark.parametrize("dtype", HALF, ids=lambda d: str(d).removeprefix("torch."))


@by_dtype
@pytest.mark.parametrize("case", [c for c in MONARCH_TILES if monarch.backward_aligned(c)], ids=str)
def test_monarch_with_less_shared_memory(simt: Any, case: MonarchCase, dtype: torch.dtype) -> None:
    """Chunks of fewer lambdas, and two products one after the other where not even those fit."""
    simt.configure(1, FEW_SMS, AD102_SHARED)
    monarch.check_monarch_multiply(simt, case, dtype, backward=False)


@by_dtype
def test_glu_with_less_shared_memory(simt: Any, dtype: torch.dtype) -> None:
    """Fewer rows at a time, and the wide activations through memory where not even those fit."""
    for case in (GLU_TILES[0], GluCase("", (70,), 2, 2 * 72, 2 * 40, 2 * 264), GLU_TILES[1]):
        simt.configure(1, FEW_SMS, AD102_SHARED)
        monarch.check_blockdiag_glu(simt, case, dtype, backward=False)


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
        ("blockdiag_multiply", (X, _half(4, 8)), r"w must be of shape \[nblocks, out / nblocks, in / nblocks\], got"),
        ("blockdiag_multiply", (X, torch.zeros(4, 8, 8)), "w must be float16 as x is, got float32 of shape"),
        ("blockdiag_multiply", (X, _half(0, 8, 8)), "w must be of shape"),
        ("blockdiag_multiply", (X, _half(2, 8, 8)), r"x must be of shape \[\.\.\., 16\] as w has it, got \[3, 32\]"),
        ("blockdiag_multiply", (_half(), _half(2, 8, 8)), r"x must be of shape \[\.\.\., 16\] as w has it, got \[\]"),
        ("blockdiag_multiply", (X.int(), _half(2, 8, 8)), "x must be float16, bfloat16, float32 or float64, got int32"),
        ("blockdiag_multiply", (X, _half(4, 8, 8), _half(31)), r"bias must be of shape \[32\], got \[31\]"),
        ("blockdiag_multiply", (X, _half(4, 8, 8), torch.zeros(32)), "bias must be float16 as x is, got float32"),
        ("blockdiag_multiply_backward", (DOUT[1:], X, _half(2, 8, 16), False), r"dout must be of shape \[3, 16\], got"),
        ("blockdiag_multiply_backward", (DOUT.float(), X, _half(2, 8, 16), False), "dout must be float16 as x is, got"),
        ("monarch_multiply", (X, _half(2, 8, 16), _half(2, 8, 16)), r"w2 must take the 16 rows that w1 \[2, 8, 16\]"),
        ("monarch_multiply", (X, _half(4, 8, 16), _half(4, 8, 8)), r"x must be of shape \[\.\.\., 64\] as w1 has it"),
        ("monarch_multiply", (X, _half(2, 6, 16), _half(2, 8, 6)), "no kernel: a block has rows or columns that are"),
        ("monarch_multiply_backward", (X, X, _half(2, 8, 16), _half(2, 8, 8)), r"dout must be of shape \[3, 16\], got"),
        ("monarch_multiply_backward", (DOUT, X, _half(4, 4, 8), _half(2, 8, 8)), "no kernel: a block has rows or col"),
        ("blockdiag_glu", (X, _half(2, 16, 16), _half(2, 8, 16)), "w_up must give twice the 32 columns that w_down"),
        ("blockdiag_glu", (X, _half(2, 16, 16), _half(2, 8, 8), _half(8)), r"bias must be of shape \[16\], got \[8\]"),
        ("blockdiag_glu", (X, _half(2, 8, 16), _half(2, 8, 4)), "no kernel: a block has rows or columns that are not"),
        ("blockdiag_glu_backward", (X, X, _half(2, 16, 16), _half(2, 8, 8), True), r"dout must be of shape \[3, 16\],"),
    ],
)  # fmt: skip
def test_bad_input(simt: Any, op: str, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"^{op}: .*{message}"):
        getattr(simt, op)(*arguments)
