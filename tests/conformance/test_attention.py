"""varlen_attention and its backward on every backend."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from helpers import cases, checks, oracle
from helpers.backends import (
    FEW_SMS,
    HALF,
    MANY_SMS,
    Backend,
    Deterministic,
    cpu,
    drawn_on,
    kernels,
    on,
    one_dtype,
    reference,
    same,
)
from helpers.cases import ATTENTION_CASES, AttentionCase, attention_inputs, offsets
from helpers.compare import assert_close
from helpers.threads import assert_same_on_threads

REFERENCE = reference()
CPU = cpu(cases.KERNEL_DTYPES)
SIMT, GPU = kernels(HALF, has_kernel=lambda case: case.head_dim % 8 == 0)
EVERY = (REFERENCE, CPU, SIMT, GPU)


# ---- against the oracle ----


@on(*EVERY, case=ATTENTION_CASES)
def test_cases(backend: Backend, case: AttentionCase, dtype: torch.dtype) -> None:
    """A GPU with few multiprocessors takes the large tiles where lengths allow, one with many the small ones."""
    for _ in backend.machines((0, FEW_SMS), (len(case.name), MANY_SMS)):
        for _ in backend.kernel_sets():
            checks.check_attention(backend.library, case, dtype, backend.device)


@drawn_on(
    *EVERY,
    case=cases.attention_cases(),
    sm_count=st.sampled_from((FEW_SMS, MANY_SMS)),
    deterministic=st.booleans(),
    hopper=st.booleans(),
)
def test_drawn(
    backend: Backend,
    case: AttentionCase,
    dtype: torch.dtype,
    seed: int,
    sm_count: int,
    deterministic: bool,
    hopper: bool,
) -> None:
    backend.configure(seed, sm_count)
    library = Deterministic(backend.library) if deterministic else backend.library
    with backend.hopper(hopper):
        checks.check_attention(library, case, dtype, backend.device)


@on(CPU, SIMT, GPU)  # PyTorch's fused attention, which the reference calls, rounds scores to q's dtype
@pytest.mark.parametrize(
    "mode", ({}, {"causal": True}, {"softcap": 3.0, "slopes": "heads"}), ids=("plain", "causal", "biased")
)
def test_lse_is_as_exact_as_float32(backend: Backend, mode: dict[str, Any]) -> None:
    """It is float32 whatever q and k are, and is judged as float32: gradients and ring attention start from it."""
    case = AttentionCase("", (130, 1, 70), head_dim=64, score_spread=8.0, **mode)
    x = attention_inputs(case, torch.bfloat16, backend.device)
    where = (x.cu_seqlens_q, x.cu_seqlens_k, x.max_seqlen_q, x.max_seqlen_k)
    _, lse = backend.library.varlen_attention(x.q, x.k, x.v, *where, **x.options)
    truth, eager = (
        oracle.varlen_attention(
            x.q.to(t), x.k.to(t), x.v.to(t), list(case.lengths_q), list(case.keys), **x.oracle_options
        )[1]
        for t in (torch.float64, torch.float32)
    )
    assert_close("lse", lse, truth, eager)


def _call(
    backend: Backend,
    case: AttentionCase,
    dtype: torch.dtype = torch.bfloat16,
    *,
    deterministic: bool = False,
    **change: Any,
) -> tuple[Tensor, ...]:
    """out, lse, dq, dk, dv, of the same inputs in every call of a test, but for what is changed."""
    torch.manual_seed(0)
    x = attention_inputs(case, dtype, backend.device)
    values = {
        "q": x.q, "k": x.k, "v": x.v, "cu_seqlens_q": x.cu_seqlens_q, "cu_seqlens_k": x.cu_seqlens_k,
        "max_seqlen_q": x.max_seqlen_q, "max_seqlen_k": x.max_seqlen_k, **x.options, "deterministic": deterministic,
    } | change  # fmt: skip
    out, lse = backend.library.varlen_attention(**values)
    return out, lse, *backend.library.varlen_attention_backward(dout=x.dout, dlse=None, out=out, lse=lse, **values)


@on(
    *EVERY,
    case=(
        AttentionCase("several_blocks_of_keys", (700, 40), heads=2, heads_k=1, head_dim=32),
        AttentionCase("equal_lengths", (40, 3, 40, 3, 100), heads=4, head_dim=32, causal=True),
    ),
    dtype=one_dtype,
)
def test_deterministic_results_repeat_bit_for_bit(backend: Backend, case: AttentionCase, dtype: torch.dtype) -> None:
    machines = [(seed, FEW_SMS) for seed in (1, 2, 3)]
    backend.assert_repeats(lambda: _call(backend, case, dtype, deterministic=True), machines)


# ---- who sees whom ----


def seen_keys(backend: Backend, sq: int, sk: int, dtype: torch.dtype, **how: Any) -> list[list[int]]:
    """Which keys each query of one sequence attends to: v is the identity, so out shows the probabilities."""
    q, k = torch.randn(sq, 1, 8), torch.randn(sk, 1, 8)
    q, k, v = (t.to(backend.device, dtype) for t in (q, k, torch.eye(sk, 8).unsqueeze(1)))
    cu_q, cu_k = offsets([sq], backend.device), offsets([sk], backend.device)
    out, _ = backend.library.varlen_attention(q, k, v, cu_q, cu_k, sq, sk, **how)
    return [row.nonzero().flatten().tolist() for row in out.squeeze(1)]


@on(*EVERY)
def test_causal_is_aligned_at_the_end(backend: Backend, dtype: torch.dtype) -> None:
    assert seen_keys(backend, 2, 4, dtype, causal=True) == [[0, 1, 2], [0, 1, 2, 3]]
    assert seen_keys(backend, 4, 2, dtype, causal=True) == [[], [], [0], [0, 1]]
    assert seen_keys(backend, 3, 3, dtype, causal=True) == [[0], [0, 1], [0, 1, 2]]


@on(*EVERY)
def test_windows_include_both_ends(backend: Backend, dtype: torch.dtype) -> None:
    def seen(sq: int, sk: int, left: int, right: int, **how: bool) -> list[list[int]]:
        return seen_keys(backend, sq, sk, dtype, window_size_left=left, window_size_right=right, **how)

    assert seen(4, 4, 1, 0) == [[0], [0, 1], [1, 2], [2, 3]]
    assert seen(4, 4, 0, 1) == [[0, 1], [1, 2], [2, 3], [3]]
    assert seen(5, 5, 1, 2) == [[0, 1, 2], [0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4], [3, 4]]
    assert seen(2, 4, 1, 1) == [[1, 2, 3], [2, 3]]
    assert seen(4, 2, 1, 0) == [[], [], [0], [0, 1]]
    assert seen(3, 3, -1, 0) == [[0], [0, 1], [0, 1, 2]]
    assert seen(3, 3, 1, 5, causal=True) == [[0], [0, 1], [1, 2]]


@on(*EVERY)
def test_equal_scores_give_the_mean(backend: Backend) -> None:
    """Two queries, four keys, causal: the last query sees all of them, the first all but the last."""
    q = torch.zeros(2, 1, 8, dtype=torch.bfloat16, device=backend.device)
    v = torch.eye(4, 8, dtype=torch.bfloat16, device=backend.device)[:, None]
    cu_q, cu_k = offsets([2], backend.device), offsets([4], backend.device)
    out, lse = backend.library.varlen_attention(q, v, v, cu_q, cu_k, 2, 4, causal=True)
    third = torch.tensor(1 / 3).bfloat16()
    assert out[0, 0, :4].tolist() == [third, third, third, 0] and out[1, 0, :4].tolist() == [0.25] * 4
    torch.testing.assert_close(lse.cpu(), torch.tensor([[math.log(3), math.log(4)]]))


# ---- what stays where ----


@on(*EVERY)
def test_rows_that_see_nothing(backend: Backend) -> None:
    """More queries than keys under a causal mask: out 0, lse -inf, dq 0; NaN in them goes into no other row."""
    case = AttentionCase("", (70,), (5,), head_dim=64, causal=True)
    x = attention_inputs(case, torch.bfloat16, backend.device)
    for poison in (None, float("nan")):
        if poison is not None:
            x.q[:65] = poison
        out, lse, dq, dk, dv = _call(backend, case, q=x.q)
        assert (out[:65] == 0).all() and (lse[:, :65] == -math.inf).all() and (dq[:65] == 0).all()
        assert all(t.isfinite().all() for t in (out[65:], lse[:, 65:], dq[65:], dv))
        assert poison is not None or dk.isfinite().all()


@on(*EVERY)
def test_infinite_values_stay_out_of_rows_that_see_nothing(backend: Backend) -> None:
    case = AttentionCase("", (6,), (2,), head_dim=16, causal=True)
    x = attention_inputs(case, torch.bfloat16, backend.device)
    x.v[1] = float("inf")
    out, *_ = _call(backend, case, q=x.q, k=x.k, v=x.v)
    assert (out[:4] == 0).all() and (out[5] == float("inf")).all()


MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (3, 2)},
    "softcap": {"softcap": 2.0},
    "alibi": {"slopes": "heads"},
}


@on(*EVERY, dtype=one_dtype)
@pytest.mark.parametrize("bad", (math.nan, math.inf))
@pytest.mark.parametrize("how", MODES.values(), ids=MODES.keys())
def test_a_sequence_keeps_its_bad_values_to_itself(
    backend: Backend, how: dict[str, Any], bad: float, dtype: torch.dtype
) -> None:
    """Beside a sequence of NaN or infinities, and before rows of them past the end: tiles in memory are shared,
    results never."""
    case = AttentionCase("", checks.LENGTHS_ALIKE, head_dim=16, rows_past_the_end=2, **how)
    torch.manual_seed(0)
    x = attention_inputs(case, dtype, backend.device)
    checks.check_bad_values_stay((x.q, x.k, x.v), bad, lambda **change: _call(backend, case, dtype, **change))


@on(SIMT, GPU)
def test_rows_before_the_first_sequence_are_zero(backend: Backend) -> None:
    """The reference refuses such offsets; to read them, a GPU would have to wait."""
    cu = torch.tensor([7, 20, 33], dtype=torch.int32, device=backend.device)
    out, lse, *gradients = _call(backend, AttentionCase("", (20, 20), head_dim=32), cu_seqlens_q=cu, cu_seqlens_k=cu)
    for t in (out, lse.T, *gradients):
        outside = torch.cat([t[:7], t[33:]])
        assert (outside == (-math.inf if t.shape == lse.T.shape else 0)).all() and t[7:33].isfinite().all()


@on(SIMT, GPU)
@pytest.mark.parametrize("deterministic", (False, True))
def test_tokens_past_max_seqlen_take_no_part(backend: Backend, deterministic: bool) -> None:
    case = AttentionCase("", (90, 200), head_dim=32)
    out, lse, dq, dk, dv = _call(backend, case, max_seqlen_q=64, max_seqlen_k=48, deterministic=deterministic)
    for t, limit in ((out, 64), (lse.T, 64), (dq, 64), (dk, 48), (dv, 48)):
        past = torch.cat([t[limit:90], t[90 + limit :]])
        assert (past == (-math.inf if t.shape == lse.T.shape else 0)).all()
        assert t.isfinite()[:limit].all() and (t[:limit] != 0).any()


@on(*EVERY)
def test_an_expanded_gradient_is_copied(backend: Backend) -> None:
    x = attention_inputs(AttentionCase("", (30, 11), head_dim=24), torch.bfloat16, backend.device)
    where = (x.cu_seqlens_q, x.cu_seqlens_k, x.max_seqlen_q, x.max_seqlen_k)
    out, lse = backend.library.varlen_attention(x.q, x.k, x.v, *where)
    ones = torch.ones((), dtype=torch.bfloat16, device=backend.device)
    expanded, plain = (
        backend.library.varlen_attention_backward(dout, None, x.q, x.k, x.v, out, lse, *where, deterministic=True)
        for dout in (ones.expand_as(out), ones.expand_as(out).contiguous())
    )
    assert same(expanded, plain)


# ---- on a CPU ----

# Shapes that take every path there: several blocks of keys, queries and keys that are cut into parts, rows in panels of
# a part of the width, windows that begin inside of a panel.
CPU_CASES = (
    AttentionCase("blocks_of_keys", (530, 3, 300), heads=2, head_dim=40),
    AttentionCase("parts_of_keys", (90, 1100), (1100, 5), heads=1, head_dim=16),
    AttentionCase("parts_of_keys_causal", (1100,), heads=2, heads_k=1, head_dim=8, causal=True, slopes="heads"),
    AttentionCase("parts_of_queries", (700,), (65,), heads=1, head_dim=20),
    AttentionCase("window_in_a_panel", (600,), (640,), heads=2, heads_k=1, window=(70, 90), head_dim=24),
    AttentionCase("window_of_many_blocks", (520,), heads=1, window=(300, 280), softcap=4.0, head_dim=16),
    AttentionCase("gqa_causal", (300, 70), (310, 280), heads=6, heads_k=2, causal=True, head_dim=48),
    AttentionCase("d1", (40, 5), head_dim=1),
    AttentionCase("d7_causal", (300, 5), head_dim=7, causal=True),
    AttentionCase("d129", (50, 5), head_dim=129),
    AttentionCase("d255", (40, 300), (280, 20), head_dim=255, heads=1),
    AttentionCase("scale_0", (30, 5), softmax_scale=0.0),
    AttentionCase("scale_negative", (30, 70), softmax_scale=-0.4, causal=True),
    AttentionCase("softcap_tiny", (30, 9), softcap=1e-35),
    AttentionCase("softcap_huge", (30, 70), softcap=1e35, score_spread=3.0),
    AttentionCase("softcap_of_small_scores", (50, 70), softcap=300.0),
)


@on(CPU, case=CPU_CASES)
def test_cases_of_the_cpu(backend: Backend, case: AttentionCase, dtype: torch.dtype) -> None:
    checks.check_attention(backend.library, case, dtype, backend.device)


@on(CPU, case=CPU_CASES[:7], dtype=one_dtype)
def test_threads_change_no_bit(backend: Backend, case: AttentionCase, dtype: torch.dtype) -> None:
    assert_same_on_threads(lambda: _call(backend, case, dtype))


@on(CPU)
def test_any_address_and_stride_of_an_element(backend: Backend, dtype: torch.dtype) -> None:
    """Of q, k and v; dout with strides that no copy keeps, too."""
    case = AttentionCase("", (70, 3, 31), heads=4, heads_k=2, head_dim=20, causal=True)
    x = attention_inputs(case, dtype)
    expected = _call(backend, case, dtype, q=x.q, k=x.k, v=x.v)
    for change in (cases.misaligned, cases.strided, lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)):
        q, k, v = (change(t) for t in (x.q, x.k, x.v))
        assert same(_call(backend, case, dtype, q=q, k=k, v=v), expected)


@on(REFERENCE, CPU, dtype=one_dtype)
def test_scores_of_any_size(backend: Backend, dtype: torch.dtype) -> None:
    """Scores of 2^31 and more: float32 holds them to 256 and their differences exactly."""
    torch.manual_seed(0)
    q, k, v = 1e5 * torch.randn(4, 1, 64), 1e5 * torch.randn(4, 1, 64), torch.randn(4, 1, 64)
    cu = offsets([4])
    out, lse = backend.library.varlen_attention(q, k, v, cu, cu, 4, 4)
    scores = torch.einsum("ihd,jhd->hij", q, k) / 8
    torch.testing.assert_close(out, torch.einsum("hij,jhd->ihd", scores.softmax(2), v))
    # Terms of opposite signs cancel in a score, and are rounded at their size.
    unit = torch.finfo(dtype).eps * float(scores.abs().max())
    torch.testing.assert_close(lse, scores.logsumexp(2), rtol=1.3e-6, atol=unit)


@on(CPU, dtype=one_dtype)
@pytest.mark.parametrize("bits", (0x7FC00000, 0x7F800001, 0x7FFFFFFF, -1), ids=hex)
def test_every_kind_of_nan_comes_through(backend: Backend, bits: int, dtype: torch.dtype) -> None:
    x = attention_inputs(AttentionCase("", (20,), head_dim=32), dtype)
    bad = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    for name in ("q", "k", "v"):
        values = {"q": x.q, "k": x.k, "v": x.v}
        values[name] = values[name].clone()
        values[name].view(torch.int32)[3, 0, 5] = bad.view(torch.int32)
        out, lse, *_ = _call(backend, AttentionCase("", (20,), head_dim=32), dtype, **values)
        rows = slice(3, 4) if name == "q" else slice(None)
        assert (lse[0, rows].isnan().all() or name == "v") and out[rows, 0].isnan().any(-1).all(), name


@on(CPU, dtype=one_dtype)
def test_bad_offsets_are_refused_as_by_the_reference(backend: Backend, dtype: torch.dtype) -> None:
    case = AttentionCase("", (20, 20), head_dim=32)
    for bad, text in (
        ([7, 20, 33], "cu_seqlens_q must begin with 0, got 7"),
        ([0, 30, 20], "cu_seqlens_q must not decrease, got 30 then 20 at [2]"),
        ([0, 20, 41], "cu_seqlens_q must not pass the end of its tensor of 40 rows, got 41 last"),
        ([0, 5, 40], "max_seqlen_q must be at least the longest sequence of cu_seqlens_q, 35, got 20"),
    ):
        with pytest.raises(RuntimeError) as error:
            _call(backend, case, dtype, cu_seqlens_q=torch.tensor(bad, dtype=torch.int32))
        assert text in str(error.value)
