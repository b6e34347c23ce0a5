"""varlen_attention's kernels on mma.sync in the emulator: what is asked of them alone."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import checks
from helpers.backends import AD102_SHARED, FEW_SMS, H200_SHARED, MANY_SMS, Deterministic
from helpers.cases import AttentionCase, attention_inputs

# Several blocks of queries and of keys in every head dimension bucket; 16 more than a block, so that tails count.
HEAD_DIMS = (8, 32, 40, 64, 72, 96, 128, 136, 160, 256)
LONG_CASES = tuple(
    AttentionCase(f"d{head_dim}_{mode}", (145, 3), (209, 70), head_dim=head_dim, **options)  # type: ignore[arg-type]
    for head_dim in HEAD_DIMS
    for mode, options in (
        ("plain", {}),
        ("causal_gqa", {"causal": True, "heads": 2, "heads_k": 1}),
        ("biased", {"softcap": 3.0, "slopes": "batch", "window": (90, 20)}),
    )
    if mode == "plain" or head_dim in (64, 128, 256)
)


@pytest.fixture(autouse=True)
def no_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels for compute capability 9.0 have tests of their own (test_attention_hopper.py)."""
    monkeypatch.setenv("WARPFORM_HOPPER", "0")


@pytest.mark.parametrize("sm_count", (FEW_SMS, MANY_SMS), ids=("few_sms", "many_sms"))
@pytest.mark.parametrize("case", LONG_CASES, ids=str)
def test_long_forward(simt: Any, case: AttentionCase, sm_count: int) -> None:
    simt.configure(len(case.name), sm_count, H200_SHARED)
    checks.check_attention(simt, case, torch.bfloat16, backward=False)


@pytest.mark.sampled
@pytest.mark.parametrize("case", LONG_CASES, ids=str)
def test_long_backward(simt: Any, case: AttentionCase) -> None:
    """dQ by atomics, then by the kernel that owns the queries."""
    simt.configure(len(case.name), FEW_SMS, H200_SHARED)
    checks.check_attention(simt, case, torch.bfloat16)
    checks.check_attention(Deterministic(simt), case, torch.float16)


@pytest.mark.parametrize("case", [c for c in LONG_CASES if c.head_dim <= 128 and c.head_dim % 64 == 0], ids=str)
def test_backward_with_little_shared_memory(simt: Any, case: AttentionCase) -> None:
    simt.configure(3, FEW_SMS, AD102_SHARED)
    checks.check_attention(simt, case, torch.bfloat16)


def _call(
    simt: Any, case: AttentionCase, dtype: torch.dtype = torch.bfloat16, *, deterministic: bool = False, **change: Any
) -> tuple[Tensor, ...]:
    """out, lse, dq, dk, dv."""
    x = attention_inputs(case, dtype)
    values = {
        "q": x.q, "k": x.k, "v": x.v, "cu_seqlens_q": x.cu_seqlens_q, "cu_seqlens_k": x.cu_seqlens_k,
        "max_seqlen_q": x.max_seqlen_q, "max_seqlen_k": x.max_seqlen_k, **x.options, "deterministic": deterministic,
    } | change  # fmt: skip
    out, lse = simt.varlen_attention(**values)
    return out, lse, *simt.varlen_attention_backward(dout=x.dout, dlse=None, out=out, lse=lse, **values)


def test_sums_of_dq_follow_the_order_of_blocks(simt: Any) -> None:
    """The atomics of dQ add up six blocks of keys as they come, which deterministic=True is there to avoid."""
    case = AttentionCase("", (700, 40), heads=2, heads_k=1, head_dim=32)
    runs = []
    for seed in (1, 2, 3):
        simt.configure(seed, FEW_SMS, H200_SHARED)
        torch.manual_seed(0)
        runs.append(_call(simt, case, torch.float16))
    for name, i in (("dq", 2), ("dk", 3), ("dv", 4)):
        assert all(torch.equal(runs[0][i], run[i]) for run in runs[1:]) == (name != "dq"), name


@pytest.mark.parametrize("offsets", ([0, 1000, 20], [5, -7, 40], [0, 30, 12], [2**31 - 1, -(2**31), 7], [3, 9, 20]))
def test_bad_offsets_stay_in_bounds(simt: Any, offsets: list[int]) -> None:
    """What cu_seqlens holds cannot be checked without waiting for the GPU; the emulator reports accesses outside."""
    bad = torch.tensor(offsets, dtype=torch.int32)
    good = torch.tensor([0, 20, 40], dtype=torch.int32)
    for deterministic in (False, True):
        for cu_q, cu_k in ((bad, bad), (good, bad), (bad, good)):
            case = AttentionCase("", (20, 20), head_dim=32, causal=True)
            out, *_ = _call(simt, case, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, deterministic=deterministic)
            assert out.shape == (40, 2, 32)


def test_misaligned_slices_are_refused(simt: Any) -> None:
    """From a place that is not 16-byte aligned, with gaps between elements, with odd rows."""
    case = AttentionCase("", (30, 11), head_dim=24)
    x = attention_inputs(case, torch.bfloat16)
    shifted = torch.zeros(x.q.numel() + 3, dtype=torch.bfloat16)[3:].view_as(x.q)
    spread = torch.zeros(*x.k.shape, 2, dtype=torch.bfloat16)[..., 0]
    odd_rows = torch.zeros(x.v.size(0), x.v.size(1) * 24 + 1, dtype=torch.bfloat16)[:, :-1].unflatten(1, (-1, 24))
    with pytest.raises(RuntimeError, match=r"varlen_attention: q must be 16-byte aligned, .* call \.clone\(\)"):
        _call(simt, case, q=shifted)
    with pytest.raises(
        RuntimeError, match=r"the last dimension of k must be contiguous, got stride 2; call k\.contiguous\(\)"
    ):
        _call(simt, case, k=spread)
    with pytest.raises(RuntimeError, match="v must be 16-byte aligned"):
        _call(simt, case, v=odd_rows)


def test_kernel_table_lists_what_runs(simt: Any) -> None:
    rows = [row for row in json.loads(simt._kernel_table()) if row["op"].startswith("varlen_attention")]
    assert {(row["op"], row["dtype"]) for row in rows} == {
        (op, dtype) for op in ("varlen_attention", "varlen_attention_backward") for dtype in ("float16", "bfloat16")
    }
    for row in rows:
        step, most = row["head_dim"]["multiple_of"], row["head_dim"]["max"]
        for head_dim in range(step, most + 1, step):
            case = AttentionCase("", (5,), heads=1, head_dim=head_dim)
            checks.check_attention(simt, case, getattr(torch, row["dtype"]), backward=row["op"].endswith("backward"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 7}, "no kernel: head_dim is not a multiple of 8 up to 256"),
        ({"head_dim": 264}, "no kernel: head_dim is not a multiple of 8 up to 256"),
        ({"softmax_scale": -1.0}, "no kernel: softmax_scale is not a positive float32"),
        ({"softmax_scale": 1e-46}, "no kernel: softmax_scale is not a positive float32"),
        ({"window_size_left": -2}, r"window_size must be at least -1, which is unbounded, got \(-2, -1\)"),
        ({"softcap": -1.0}, "softcap must not be negative, got -1.0"),
        ({"max_seqlen_k": -1}, "max_seqlen_q and max_seqlen_k must not be negative"),
        ({"k": torch.zeros(9, 2, 16), "v": torch.zeros(9, 2, 16)}, "k and v must be bfloat16 as q is, got float32 and"),
        (
            {"k": torch.zeros(9, 3, 16).bfloat16(), "v": torch.zeros(9, 3, 16).bfloat16()},
            "the 2 heads of q must be a multiple of the heads of k and v, got 3",
        ),
        ({"v": torch.zeros(9, 2, 24).bfloat16()}, r"k and v must both be of shape \[total_k, heads_k, 16\], got"),
        (
            {"cu_seqlens_q": torch.zeros(2)},
            r"cu_seqlens_q must be int32 of shape \[batch \+ 1\], got float32 of shape \[2\]",
        ),
        (
            {"cu_seqlens_q": torch.zeros(3, dtype=torch.int32)},
            r"cu_seqlens_k must be of shape \[3\] as cu_seqlens_q is, got int32 of shape \[2\]",
        ),
        (
            {"alibi_slopes": torch.zeros(3)},
            r"alibi_slopes must be of shape \[2\] or \[1, 2\], got float32 of shape \[3\]",
        ),
        ({"alibi_slopes": torch.zeros(2).double()}, "alibi_slopes must be float32"),
    ],
)
def test_bad_input(simt: Any, change: dict[str, Any], message: str) -> None:
    change = dict(change)
    case = AttentionCase("", (9,), head_dim=change.pop("head_dim", 16))
    with pytest.raises(RuntimeError, match=f"varlen_attention: .*{message}"):
        _call(simt, case, **change)
