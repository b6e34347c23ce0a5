"""disentangled_attention's kernels in the emulator: what is asked of them alone."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import cases, checks
from helpers.backends import AD102_SHARED
from helpers.cases import DisentangledCase, disentangled_inputs


@pytest.mark.parametrize("head_dim", (16, 64, 72, 128))
@pytest.mark.parametrize("options", ({}, {"holes": True}, cases.LOG_BUCKETS), ids=("linear", "holes", "log"))
def test_several_tiles(simt: Any, head_dim: int, options: dict[str, Any]) -> None:
    """Runs of one column that pass from tile to tile, in both walks."""
    case = DisentangledCase("", (145, 3, 70), heads=1, head_dim=head_dim, layout="qkv", **({"span": 30} | options))
    checks.check_disentangled_attention(simt, case, torch.bfloat16)


def _call(simt: Any, case: DisentangledCase, dtype: torch.dtype = torch.bfloat16, **change: Any) -> tuple[Tensor, ...]:
    """out, lse, dq, dk, dv, dpos_key, dpos_query."""
    x = disentangled_inputs(case, dtype)
    values = {
        "q": x.q, "k": x.k, "v": x.v, "pos_key": x.pos_key, "pos_query": x.pos_query, "cu_seqlens": x.cu_seqlens,
        "max_seqlen": x.max_seqlen, **x.options,
    } | change  # fmt: skip
    out, lse = simt.disentangled_attention(**values)
    return out, lse, *simt.disentangled_attention_backward(dout=x.dout, out=out, lse=lse, **values)


@pytest.mark.parametrize("offsets", ([0, 1000, 20], [5, -7, 40], [0, 30, 12], [2**31 - 1, -(2**31), 7], [3, 9, 20]))
def test_bad_offsets_stay_in_bounds(simt: Any, offsets: list[int]) -> None:
    """What cu_seqlens holds cannot be checked without waiting for the GPU; the emulator reports accesses outside."""
    for holes in (False, True):
        case = DisentangledCase("", (20, 20), holes=holes, **cases.LOG_BUCKETS)
        out, *_ = _call(simt, case, cu_seqlens=torch.tensor(offsets, dtype=torch.int32))
        assert out.shape == (40, 2, 32)


def test_misaligned_slices_are_refused(simt: Any) -> None:
    case = DisentangledCase("", (30, 11), head_dim=24)
    x = disentangled_inputs(case, torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"disentangled_attention: q must be 16-byte aligned, .* call \.clone\(\)"):
        _call(simt, case, q=cases.misaligned(x.q))
    spread = torch.zeros(*x.k.shape, 2, dtype=torch.bfloat16)[..., 0]
    with pytest.raises(RuntimeError, match=r"the last dimension of k must be contiguous, .* call k\.contiguous\(\)"):
        _call(simt, case, k=spread)


def test_offsets_and_positions_may_lie_apart(simt: Any) -> None:
    case = DisentangledCase("", (30, 11), holes=True)
    x = disentangled_inputs(case, torch.bfloat16)
    values = {
        "q": x.q, "k": x.k, "v": x.v, "pos_key": x.pos_key, "pos_query": x.pos_query, "cu_seqlens": x.cu_seqlens,
        "max_seqlen": x.max_seqlen, **x.options,
    }  # fmt: skip
    apart = {name: values[name].repeat_interleave(2)[::2] for name in ("cu_seqlens", "positions")}
    assert not any(t.is_contiguous() for t in apart.values())
    results = []
    for arguments in (values, values | apart):
        out, lse = simt.disentangled_attention(**arguments)
        gradients = simt.disentangled_attention_backward(dout=x.dout, out=out, lse=lse, **arguments)
        results.append((out, lse, *gradients))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_kernel_table_lists_what_runs(simt: Any) -> None:
    rows = [row for row in json.loads(simt._kernel_table()) if row["op"].startswith("disentangled_attention")]
    assert {(row["op"], row["dtype"]) for row in rows} == {
        (op, dtype)
        for op in ("disentangled_attention", "disentangled_attention_backward")
        for dtype in ("float16", "bfloat16")
    }
    for row in rows:
        step, most = row["head_dim"]["multiple_of"], row["head_dim"]["max"]
        for head_dim in range(step, most + 1, step):
            case = DisentangledCase("", (5,), heads=1, head_dim=head_dim)
            backward = row["op"].endswith("backward")
            checks.check_disentangled_attention(simt, case, getattr(torch, row["dtype"]), backward=backward)


def test_little_shared_memory_is_no_kernel(simt: Any) -> None:
    case = DisentangledCase("", (9,), head_dim=128, span=1500, holes=True)
    simt.configure(0, 4, 65_000)
    with pytest.raises(RuntimeError, match="no kernel: head_dim and the relative positions need more shared memory"):
        _call(simt, case)
    simt.configure(0, 4, AD102_SHARED)
    checks.check_disentangled_attention(simt, case, torch.float16)


def _table(rows: int, heads: int = 2, head_dim: int = 16, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(rows, heads, head_dim, dtype=dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 7}, "no kernel: head_dim is not a multiple of 8 up to 128"),
        ({"head_dim": 136}, "no kernel: head_dim is not a multiple of 8 up to 128"),
        ({"softmax_scale": -1.0}, "no kernel: softmax_scale is not a positive float32"),
        ({"pos_key": _table(9000), "pos_query": None, "positions": torch.arange(9)},
         "no kernel: relative positions differ past a distance of 4096"),
        ({"max_seqlen": -1}, "max_seqlen must not be negative"),
        ({"k": torch.zeros(9, 2, 16)}, "k must be bfloat16 as q is, got float32"),
        ({"v": torch.zeros(8, 2, 16).bfloat16()}, r"v must be of shape \[9, 2, 16\] as q is"),
        ({"pos_key": _table(7)}, r"pos_key must be of shape \[2 \* span, 2, 16\] .* got bfloat16 of shape"),
        ({"pos_key": _table(0)}, "pos_key must be of shape"),
        ({"pos_key": _table(16, heads=3)}, "pos_key must be of shape"),
        ({"pos_query": _table(16, head_dim=8)}, "pos_query must be of shape"),
        ({"pos_query": _table(16, dtype=torch.float16)}, "pos_query must be bfloat16 as q is, got float16"),
        ({"pos_query": _table(18)}, r"pos_query must be of shape \[16, 2, 16\] as pos_key is, got .* \[18, 2, 16\]"),
        ({"cu_seqlens": torch.zeros(2)}, r"cu_seqlens must be int32 of shape \[batch \+ 1\], got float32"),
        ({"positions": torch.zeros(9)}, "positions must be int64, got float32"),
        ({"positions": torch.zeros(8).long()}, r"positions must be of shape \[9\], the rows of q, got int64 .* \[8\]"),
        ({"position_buckets": 1}, "position_buckets must be 0 or at least 2, got 1"),
        ({"position_buckets": -1}, "position_buckets must be 0 or at least 2, got -1"),
        ({"position_buckets": 32, "max_relative_positions": 17},
         "max_relative_positions must be at least 18 with 32 position_buckets, got 17"),
    ],
)  # fmt: skip
def test_bad_input(simt: Any, change: dict[str, Any], message: str) -> None:
    change = dict(change)
    case = DisentangledCase("", (9,), head_dim=change.pop("head_dim", 16))
    with pytest.raises(RuntimeError, match=f"disentangled_attention: .*{message}"):
        _call(simt, case, **change)
