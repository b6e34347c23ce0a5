"""varlen_attention and its backward: the CUDA kernels, run in the emulator."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from helpers import cases, checks, oracle
from helpers.cases import AttentionCase, attention_inputs
from helpers.compare import assert_close
from helpers.drawn import drawn

DTYPES = (torch.float16, torch.bfloat16)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))

# How a launch is steered to each of its variants: a GPU with few multiprocessors takes the large tiles where lengths
# allow, one with many the small ones; 99 KiB a block, as on sm_86 and sm_89, leave the small backward tile alone.
FEW_SMS, MANY_SMS = 1, 1024
H200_SHARED, AD102_SHARED = 232_448, 101_376

CASES = tuple(case for case in cases.ATTENTION_CASES if case.head_dim % 8 == 0)
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


class Deterministic:
    """The library with deterministic=True in every call."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def __getattr__(self, name: str) -> Callable[..., Any]:
        op = getattr(self._library, name)
        return lambda *args, **options: op(*args, deterministic=True, **options)


@by_dtype
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(simt: Any, case: AttentionCase, dtype: torch.dtype) -> None:
    for seed, sm_count in ((0, FEW_SMS), (len(case.name), MANY_SMS)):
        simt._configure(seed, sm_count, H200_SHARED)
        checks.check_attention(simt, case, dtype)


@pytest.mark.parametrize("sm_count", (FEW_SMS, MANY_SMS), ids=("few_sms", "many_sms"))
@pytest.mark.parametrize("case", LONG_CASES, ids=str)
def test_long_forward(simt: Any, case: AttentionCase, sm_count: int) -> None:
    simt._configure(len(case.name), sm_count, H200_SHARED)
    checks.check_attention(simt, case, torch.bfloat16, backward=False)


@pytest.mark.parametrize("case", LONG_CASES, ids=str)
def test_long_backward(simt: Any, case: AttentionCase) -> None:
    """dQ by atomics, then by the kernel that owns the queries."""
    simt._configure(len(case.name), FEW_SMS, H200_SHARED)
    checks.check_attention(simt, case, torch.bfloat16)
    checks.check_attention(Deterministic(simt), case, torch.float16)


@pytest.mark.parametrize("case", [c for c in LONG_CASES if c.head_dim <= 128 and c.head_dim % 64 == 0], ids=str)
def test_backward_with_little_shared_memory(simt: Any, case: AttentionCase) -> None:
    simt._configure(3, FEW_SMS, AD102_SHARED)
    checks.check_attention(simt, case, torch.bfloat16)


@drawn(
    60,
    case=cases.attention_cases(),
    dtype=st.sampled_from(DTYPES),
    sm_count=st.sampled_from((FEW_SMS, MANY_SMS)),
    deterministic=st.booleans(),
)
def test_drawn(
    simt: Any, case: AttentionCase, dtype: torch.dtype, seed: int, sm_count: int, deterministic: bool
) -> None:
    simt._configure(seed, sm_count, H200_SHARED)
    checks.check_attention(Deterministic(simt) if deterministic else simt, case, dtype)


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


def test_deterministic_gradients_repeat_bit_for_bit(simt: Any) -> None:
    """In any order of blocks and threads; without it, the atomics of dQ add up six blocks of keys as they come."""
    case = AttentionCase("", (700, 40), heads=2, heads_k=1, head_dim=32)
    results: dict[bool, list[tuple[Tensor, ...]]] = {True: [], False: []}
    for deterministic, runs in results.items():
        for seed in (1, 2, 3):
            simt._configure(seed, FEW_SMS, H200_SHARED)
            torch.manual_seed(0)
            runs.append(_call(simt, case, torch.float16, deterministic=deterministic))
    for name, i in (("dq", 2), ("dk", 3), ("dv", 4)):
        same = {how: all(torch.equal(runs[0][i], run[i]) for run in runs[1:]) for how, runs in results.items()}
        assert same == {True: True, False: name != "dq"}, name


def test_causal_is_aligned_at_the_end(simt: Any) -> None:
    """Two queries, four keys: the last query sees all of them, the first all but the last."""
    q = torch.zeros(2, 1, 8, dtype=torch.bfloat16)
    v = torch.eye(4, 8, dtype=torch.bfloat16)[:, None]
    cu_q, cu_k = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([0, 4], dtype=torch.int32)
    out, lse = simt.varlen_attention(q, v, v, cu_q, cu_k, 2, 4, causal=True)
    third = torch.tensor(1 / 3).bfloat16()
    assert out[0, 0, :4].tolist() == [third, third, third, 0] and out[1, 0, :4].tolist() == [0.25] * 4
    torch.testing.assert_close(lse, torch.tensor([[math.log(3), math.log(4)]]))


@pytest.mark.parametrize(
    "mode", ({}, {"causal": True}, {"softcap": 3.0, "slopes": "heads"}), ids=("plain", "causal", "biased")
)
def test_lse_is_as_exact_as_float32(simt: Any, mode: dict[str, Any]) -> None:
    """It is float32 whatever q and k are, and is judged as float32: gradients and ring attention start from it."""
    case = AttentionCase("", (130, 1, 70), head_dim=64, score_spread=8.0, **mode)
    x = attention_inputs(case, torch.bfloat16)
    where = (x.cu_seqlens_q, x.cu_seqlens_k, x.max_seqlen_q, x.max_seqlen_k)
    _, lse = simt.varlen_attention(x.q, x.k, x.v, *where, **x.options)
    truth, eager = (
        oracle.varlen_attention(
            x.q.to(t), x.k.to(t), x.v.to(t), list(case.lengths_q), list(case.keys), **x.oracle_options
        )[1]
        for t in (torch.float64, torch.float32)
    )
    assert_close("lse", lse, truth, eager)


def test_windows_are_inclusive(simt: Any) -> None:
    q = torch.zeros(5, 1, 8, dtype=torch.float16)
    v = torch.eye(5, 8, dtype=torch.float16)[:, None]
    cu = torch.tensor([0, 5], dtype=torch.int32)
    out, _ = simt.varlen_attention(q, v, v, cu, cu, 5, 5, window_size_left=1, window_size_right=2)
    seen = out[:, 0, :5] > 0
    assert seen.tolist() == [[j >= i - 1 and j <= i + 2 for j in range(5)] for i in range(5)]


def test_rows_that_see_nothing(simt: Any) -> None:
    """More queries than keys under a causal mask: out 0, lse -inf, dq 0; NaN in them goes into no other row."""
    case = AttentionCase("", (70,), (5,), head_dim=64, causal=True)
    x = attention_inputs(case, torch.bfloat16)
    for poison in (None, float("nan")):
        if poison is not None:
            x.q[:65] = poison
        out, lse, dq, dk, dv = _call(simt, case, q=x.q)
        assert (out[:65] == 0).all() and (lse[:, :65] == -math.inf).all() and (dq[:65] == 0).all()
        assert all(t.isfinite().all() for t in (out[65:], lse[:, 65:], dq[65:], dv))
        assert poison is not None or dk.isfinite().all()


def test_infinite_values_stay_out_of_rows_that_see_nothing(simt: Any) -> None:
    case = AttentionCase("", (6,), (2,), head_dim=16, causal=True)
    x = attention_inputs(case, torch.bfloat16)
    x.v[1] = float("inf")
    out, *_ = _call(simt, case, q=x.q, k=x.k, v=x.v)
    assert (out[:4] == 0).all() and (out[5] == float("inf")).all()


def test_other_sequences_do_not_leak(simt: Any) -> None:
    """A neighbour full of NaN and Inf shares tiles in memory, never results."""
    case = AttentionCase("", (20, 30, 9), head_dim=32)
    torch.manual_seed(1)
    clean = _call(simt, case)
    torch.manual_seed(1)
    x = attention_inputs(case, torch.bfloat16)
    for t, poison in ((x.q, float("nan")), (x.k, float("inf")), (x.v, float("nan"))):
        t[20:50] = poison
    torch.manual_seed(1)
    dirty = _call(simt, case, q=x.q, k=x.k, v=x.v)
    keep = [i for i in range(59) if not 20 <= i < 50]
    for before, after in zip(clean[:1] + clean[2:], dirty[:1] + dirty[2:], strict=True):
        assert torch.equal(before[keep], after[keep])
    assert torch.equal(clean[1][:, keep], dirty[1][:, keep])


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


def test_rows_before_the_first_sequence_are_zero(simt: Any) -> None:
    offsets = torch.tensor([7, 20, 33], dtype=torch.int32)
    out, lse, *gradients = _call(
        simt, AttentionCase("", (20, 20), head_dim=32), cu_seqlens_q=offsets, cu_seqlens_k=offsets
    )
    for t in (out, lse.T, *gradients):
        outside = torch.cat([t[:7], t[33:]])
        assert (outside == (-math.inf if t.shape == lse.T.shape else 0)).all() and t[7:33].isfinite().all()


@pytest.mark.parametrize("deterministic", (False, True))
def test_tokens_past_max_seqlen_take_no_part(simt: Any, deterministic: bool) -> None:
    case = AttentionCase("", (90, 200), head_dim=32)
    out, lse, dq, dk, dv = _call(simt, case, max_seqlen_q=64, max_seqlen_k=48, deterministic=deterministic)
    for t, limit in ((out, 64), (lse.T, 64), (dq, 64), (dk, 48), (dv, 48)):
        past = torch.cat([t[limit:90], t[90 + limit :]])
        assert (past == (-math.inf if t.shape == lse.T.shape else 0)).all()
        assert t.isfinite()[:limit].all() and (t[:limit] != 0).any()


def test_misaligned_slices_are_refused(simt: Any) -> None:
    """From a place that is not 16-byte aligned, with gaps between elements, with odd rows; gradients are copied."""
    case = AttentionCase("", (30, 11), head_dim=24)
    x = attention_inputs(case, torch.bfloat16)
    shifted = torch.zeros(x.q.numel() + 3, dtype=torch.bfloat16)[3:].view_as(x.q)
    spread = torch.zeros(*x.k.shape, 2, dtype=torch.bfloat16)[..., 0]
    odd_rows = torch.zeros(x.v.size(0), x.v.size(1) * 24 + 1, dtype=torch.bfloat16)[:, :-1].unflatten(1, (-1, 24))
    with pytest.raises(RuntimeError, match=r"varlen_attention: q must be 16-byte aligned, .* call \.clone\(\)"):
        _call(simt, case, q=shifted)
    with pytest.raises(RuntimeError, match=r"k must be contiguous in its last dimension; call \.contiguous\(\)"):
        _call(simt, case, k=spread)
    with pytest.raises(RuntimeError, match="v must be 16-byte aligned"):
        _call(simt, case, v=odd_rows)

    out, lse, *_ = _call(simt, case, q=x.q, k=x.k, v=x.v)
    where = (x.cu_seqlens_q, x.cu_seqlens_k, x.max_seqlen_q, x.max_seqlen_k)
    ones = torch.ones((), dtype=torch.bfloat16)
    expanded, plain = (
        simt.varlen_attention_backward(dout, None, x.q, x.k, x.v, out, lse, *where)
        for dout in (ones.expand_as(out), ones.expand_as(out).contiguous())
    )
    assert all(torch.equal(a, b) for a, b in zip(expanded, plain, strict=True))


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
        ({"window_size_left": -2}, r"window_size must be at least -1 on both sides, got \(-2, -1\)"),
        ({"softcap": -1.0}, "softcap must not be negative, got -1"),
        ({"max_seqlen_k": -1}, "max_seqlen_q and max_seqlen_k must not be negative"),
        ({"k": torch.zeros(9, 3, 16), "v": torch.zeros(9, 3, 16)}, "k must be of shape .* got float32"),
        (
            {"k": torch.zeros(9, 3, 16).bfloat16(), "v": torch.zeros(9, 3, 16).bfloat16()},
            "a multiple of those of k and v",
        ),
        ({"v": torch.zeros(9, 2, 24).bfloat16()}, "v must have the shape and dtype of k"),
        (
            {"cu_seqlens_q": torch.zeros(2)},
            r"cu_seqlens_q must be int32 of shape \[batch \+ 1\], got float32 of shape \[2\]",
        ),
        ({"cu_seqlens_q": torch.zeros(3, dtype=torch.int32)}, "must have the same length, got 3 and 2"),
        (
            {"alibi_slopes": torch.zeros(3)},
            r"alibi_slopes must be float32 of shape \[2\] or \[1, 2\], got float32 of shape",
        ),
        ({"alibi_slopes": torch.zeros(2).double()}, "alibi_slopes must be float32"),
    ],
)
def test_bad_input(simt: Any, change: dict[str, Any], message: str) -> None:
    change = dict(change)
    case = AttentionCase("", (9,), head_dim=change.pop("head_dim", 16))
    with pytest.raises(RuntimeError, match=f"varlen_attention: .*{message}"):
        _call(simt, case, **change)
