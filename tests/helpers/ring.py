"""Steps of attention: inputs, an oracle in float64, and the check of one case against it.

The oracle knows nothing of merging: what a row has seen before is one more key, whose score is the log-sum-exp that
came in and whose value is the output that came in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from helpers.cases import offsets, random, strided
from helpers.compare import assert_close


@dataclass(frozen=True)
class StepCase:
    """Sequences and where their rows stand. Dense: all lengths_q are equal, and all lengths_k."""

    name: str
    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]
    varlen: bool = False
    heads: int = 2
    heads_k: int | None = None
    head_dim: int = 16
    softmax_scale: float | None = None
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    q_offset: int = 0
    k_offset: int = 0
    q_stride: int = 1
    k_stride: int = 1
    carried: bool = True  # there were steps before
    sliced: bool = False  # all tensors are parts of larger ones
    rows_past_the_end: int = 0
    score_spread: float = 1.0

    def __str__(self) -> str:
        return self.name

    @property
    def kv_heads(self) -> int:
        """Heads of k and v."""
        return self.heads if self.heads_k is None else self.heads_k


@dataclass
class StepInputs:
    """Tensors of one StepCase. Dense [B, L, H, D] and [B, H, L], varlen [T, H, D] and [H, T]."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    out: Tensor | None
    lse: Tensor | None
    dq: Tensor | None
    dk: Tensor | None
    dv: Tensor | None
    options: dict[str, Any] = field(default_factory=dict)  # keyword arguments of both ops


def step_inputs(case: StepCase, dtype: torch.dtype, device: str = "cpu") -> StepInputs:
    """Fresh random tensors. Of the rows before a step, some have seen nothing yet; rows past the last sequence hold
    NaN, but for what is carried."""
    state = torch.float64 if dtype == torch.float64 else torch.float32

    def operand(lengths: tuple[int, ...], heads: int, scale: float = 1.0, kind: torch.dtype = dtype) -> Tensor:
        total = sum(lengths)
        rows = random(total + case.rows_past_the_end, heads, case.head_dim, dtype=kind, device=device) * scale
        if kind == dtype and kind != state:
            rows[total:] = float("nan")
        return _laid_out(case, rows, lengths)

    q = operand(case.lengths_q, case.heads, case.score_spread)
    k, v = (operand(case.lengths_k, case.kv_heads) for _ in range(2))
    dout = operand(case.lengths_q, case.heads)
    out = lse = dq = dk = dv = None
    if case.carried:
        out = operand(case.lengths_q, case.heads, kind=state)
        rows = random(case.heads, sum(case.lengths_q) + case.rows_past_the_end, dtype=state, device=device) * 3
        unseen = torch.rand(rows.shape).to(device) < 0.2
        lse = rows.masked_fill_(unseen, -math.inf)
        if not case.varlen:
            batch = len(case.lengths_q)
            lse = lse.view(case.heads, batch, -1).transpose(0, 1) if batch else lse.view(0, case.heads, 0)
        out = torch.where((lse == -math.inf).transpose(-1, -2).unsqueeze(-1), 0.0, out)
        dq = operand(case.lengths_q, case.heads, kind=state)
        dk, dv = (operand(case.lengths_k, case.kv_heads, kind=state) for _ in range(2))
    tensors = (q, k, v, dout, out, lse, dq, dk, dv)
    if case.sliced:
        tensors = tuple(None if t is None else _slice_of_a_larger(case, t) for t in tensors)
    options: dict[str, Any] = {
        "softmax_scale": case.softmax_scale,
        "causal": case.causal,
        "window_size_left": case.window[0],
        "window_size_right": case.window[1],
        "q_offset": case.q_offset,
        "k_offset": case.k_offset,
        "q_stride": case.q_stride,
        "k_stride": case.k_stride,
    }
    if case.varlen:
        options["cu_seqlens_q"] = offsets(case.lengths_q, device)
        options["cu_seqlens_k"] = offsets(case.lengths_k, device)
    return StepInputs(*tensors, options)  # type: ignore[arg-type]


def _laid_out(case: StepCase, rows: Tensor, lengths: tuple[int, ...]) -> Tensor:
    if case.varlen:
        return rows
    return rows.unflatten(0, (len(lengths), -1)) if lengths else rows.unsqueeze(0)[:0]


def _slice_of_a_larger(case: StepCase, t: Tensor) -> Tensor:
    """The second half of the rows of every sequence, as the zigzag layout takes them; varlen: every second row."""
    if case.varlen:
        return strided(t)
    dim = 1 if t.dim() == 4 else 2
    whole = torch.cat([torch.full_like(t, float("nan")), t], dim)
    return whole.narrow(dim, t.size(dim), t.size(dim))


# ---- the oracle ----


def seen_pairs(case: StepCase, sq: int, sk: int, device: torch.device | None = None) -> Tensor:
    """Bool [sq, sk]: which keys a query of the case sees, by positions."""
    query = case.q_offset + case.q_stride * torch.arange(sq, device=device)[:, None]
    key = case.k_offset + case.k_stride * torch.arange(sk, device=device)[None]
    seen = torch.ones(sq, sk, dtype=torch.bool, device=device)
    if case.causal:
        seen &= key <= query
    if case.window[0] >= 0:
        seen &= key >= query - case.window[0]
    if case.window[1] >= 0:
        seen &= key <= query + case.window[1]
    return seen


def attend(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seen: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """q [sq, H, D], k, v [sk, Hkv, D], out as q, lse [H, sq], all of one dtype, in which all is computed."""
    group = q.size(1) // k.size(1)
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    score = (torch.einsum("ihd,jhd->hij", q, k) * scale).masked_fill(~seen, -math.inf)
    score = torch.cat([score, lse.unsqueeze(-1)], -1)
    alive = (score > -math.inf).any(-1, keepdim=True)
    p = torch.softmax(score.masked_fill(~alive, 0.0), -1) * alive
    before = p[..., -1].transpose(0, 1).unsqueeze(-1) * out
    return torch.einsum("hij,jhd->ihd", p[..., :-1], v) + before, torch.logsumexp(score, -1)


def attend_gradients(
    dout: Tensor, delta: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, seen: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What one block adds to dq, dk and dv: products in the dtype of q, exponents in that of lse."""
    group, dtype = q.size(1) // k.size(1), q.dtype
    keys, values = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    score = (torch.einsum("ihd,jhd->hij", q, keys) * scale).to(lse.dtype)
    counts = seen & (lse > -math.inf).unsqueeze(-1)
    p = torch.where(counts, torch.exp(score - lse.unsqueeze(-1)), 0.0)
    dscore = torch.einsum("ihd,jhd->hij", dout, values).to(lse.dtype) - delta.unsqueeze(-1)
    dscore = (torch.where(counts, p * dscore, 0.0) * scale).to(dtype)
    dq = torch.einsum("hij,jhd->ihd", dscore, keys)
    dk = torch.einsum("hij,ihd->jhd", dscore, q).unflatten(1, (-1, group)).sum(2)
    dv = torch.einsum("hij,ihd->jhd", p.to(dtype), dout).unflatten(1, (-1, group)).sum(2)
    return dq, dk, dv


def _sequences(case: StepCase) -> Iterator[tuple[Any, Any, Any, int, int]]:
    """For every sequence, what indexes its queries, its keys and its rows of lse, and its lengths."""
    start_q = start_k = 0
    for b, (sq, sk) in enumerate(zip(case.lengths_q, case.lengths_k, strict=True)):
        if case.varlen:
            rows, keys = slice(start_q, start_q + sq), slice(start_k, start_k + sk)
            yield rows, keys, (slice(None), rows), sq, sk
        else:
            yield b, b, b, sq, sk
        start_q, start_k = start_q + sq, start_k + sk


def _scale(case: StepCase) -> float:
    return case.head_dim**-0.5 if case.softmax_scale is None else case.softmax_scale


def _carried(t: Tensor | None, shape: Any, value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full(shape, value, dtype=dtype, device=device) if t is None else t.to(dtype, copy=True)


def step_oracle(case: StepCase, x: StepInputs, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """out and lse after the step, computed in dtype."""
    shape = (x.q.size(-2), x.q.size(0)) if case.varlen else (x.q.size(0), x.q.size(2), x.q.size(1))
    out = _carried(x.out, x.q.shape, 0.0, dtype, x.q.device)
    lse = _carried(x.lse, shape, -math.inf, dtype, x.q.device)
    for rows, keys, at, sq, sk in _sequences(case):
        out[rows], lse[at] = attend(
            *(t.to(dtype) for t in (x.q[rows], x.k[keys], x.v[keys])),
            out[rows].clone(), lse[at].clone(), seen_pairs(case, sq, sk, x.q.device), _scale(case),
        )  # fmt: skip
    return out, lse


def step_gradients(
    case: StepCase, x: StepInputs, delta: Tensor, lse: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv with the step's parts added; products in dtype, lse and delta as they are (float64: in float64)."""
    before = ((x.dq, x.q), (x.dk, x.k), (x.dv, x.v))
    dq, dk, dv = (_carried(t, like.shape, 0.0, dtype, x.q.device) for t, like in before)
    rows_dtype = torch.float64 if dtype == torch.float64 else lse.dtype
    for rows, keys, at, sq, sk in _sequences(case):
        parts = attend_gradients(
            x.dout[rows].to(dtype), delta[at].to(rows_dtype),
            *(t.to(dtype) for t in (x.q[rows], x.k[keys], x.v[keys])),
            lse[at].to(rows_dtype), seen_pairs(case, sq, sk, x.q.device), _scale(case),
        )  # fmt: skip
        for target, where, part in zip((dq, dk, dv), (rows, keys, keys), parts, strict=True):
            target[where] += part
    return dq, dk, dv


# ---- the check ----


def check_attention_step(
    library: Any,
    case: StepCase,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    backward: bool = True,
    deterministic: tuple[bool, ...] = (False, True),
) -> None:
    """attention_step and its backward, all gradients, by the rule of numerics.md; what came in stays as it was."""
    x = step_inputs(case, dtype, device)
    came = [None if t is None else t.clone() for t in (x.out, x.lse, x.dq, x.dk, x.dv)]
    state = torch.float64 if dtype == torch.float64 else torch.float32

    out, lse = library.attention_step(x.q, x.k, x.v, x.out, x.lse, **x.options)
    assert out.is_contiguous() and lse.is_contiguous() and out.dtype == lse.dtype == state
    truth, eager = step_oracle(case, x, torch.float64), step_oracle(case, x, dtype)
    # What is carried has the weight exp(lse - lse'), with a relative error of eps(lse) * |lse|.
    finite = truth[1][truth[1].isfinite()]
    growth = 1 + 2 * _largest(finite) * torch.finfo(state).eps / torch.finfo(dtype).eps
    assert_close("out", out, truth[0], eager[0], scale=growth * _largest(truth[0]))
    assert_close("lse", lse, truth[1], eager[1], scale=_largest_terms(case, x))
    if not backward:
        return

    delta = torch.nan_to_num((x.dout.double() * truth[0]).sum(-1).transpose(-1, -2)).to(state)
    total = truth[1].to(state)
    expected = step_gradients(case, x, delta, total, torch.float64)
    yardsticks = step_gradients(case, x, delta, total, dtype)
    # P = exp(score - lse) has that error too; where a gradient cancels, down to what one rounding leaves of the
    # largest one (a query that sees a single key has dq 0), that one stands for its size.
    largest = max(_largest(torch.nan_to_num(t)) for t in expected)
    for how in deterministic:
        gradients = library.attention_step_backward(
            x.dout, delta, x.q, x.k, x.v, total, x.dq, x.dk, x.dv, **x.options, deterministic=how
        )
        for name, g, exact, yardstick in zip(("dq", "dk", "dv"), gradients, expected, yardsticks, strict=True):
            assert g.dtype == state and g.is_contiguous(), name
            cancels = _largest(exact) <= growth * torch.finfo(dtype).eps * largest
            size = growth * (largest if cancels else _largest(exact))
            assert_close(f"{name} (deterministic={how})", g, exact, yardstick, gradient=True, scale=size)
    for name, before, t in zip(("out", "lse", "dq", "dk", "dv"), came, (x.out, x.lse, x.dq, x.dk, x.dv), strict=True):
        assert t is None or torch.equal(torch.nan_to_num(t), torch.nan_to_num(before)), f"{name} was changed in place"


def _largest_terms(case: StepCase, x: StepInputs) -> float:
    """The largest sum of the sizes of what a score adds up: a score may be small only because that cancels."""
    terms = [
        _largest(torch.einsum("ihd,jhd->hij", x.q[rows].abs().double(), keys_of.abs().double()))
        for rows, keys, _, _, _ in _sequences(case)
        for keys_of in (x.k[keys].repeat_interleave(case.heads // case.kv_heads, 1),)
    ]
    return _scale(case) * max(terms, default=0.0)


def _largest(t: Tensor) -> float:
    return t.abs().max().item() if t.numel() else 0.0


# ---- cases ----

RAGGED_Q, RAGGED_K = (17, 0, 1, 33, 64, 5), (9, 4, 1, 70, 0, 5)
STEP_CASES = (
    StepCase("first", (37,), (41,), carried=False),
    StepCase("dense", (37, 37), (41, 41)),
    StepCase("gqa", (33, 33), (29, 29), heads=6, heads_k=2),
    StepCase("mqa", (5, 5, 5), (70, 70, 70), heads=5, heads_k=1, head_dim=8),
    StepCase("causal", (70,), (70,), causal=True),
    StepCase("causal_first", (70,), (70,), causal=True, carried=False),
    StepCase("causal_before", (40,), (50,), causal=True, q_offset=200, k_offset=20),
    StepCase("causal_partly", (40,), (90,), causal=True, q_offset=30, k_offset=0),
    StepCase("causal_late_keys", (90,), (40,), causal=True, q_offset=0, k_offset=30),
    StepCase("causal_nothing", (40,), (50,), causal=True, q_offset=0, k_offset=40),
    StepCase("causal_nothing_first", (40,), (50,), causal=True, k_offset=40, carried=False),
    StepCase("striped_inclusive", (45, 45), (45, 45), causal=True, q_offset=3, k_offset=1, q_stride=4, k_stride=4),
    StepCase("striped_strict", (45, 45), (45, 45), causal=True, q_offset=1, k_offset=3, q_stride=4, k_stride=4),
    StepCase("uneven_strides", (50,), (31,), causal=True, q_offset=7, k_offset=2, q_stride=2, k_stride=5),
    StepCase("uneven_strides_back", (31,), (80,), causal=True, q_offset=2, k_offset=11, q_stride=5, k_stride=2),
    StepCase("window", (60,), (60,), window=(7, 4), q_offset=10, k_offset=3),
    StepCase("window_left", (60,), (60,), window=(7, -1), q_offset=0, k_offset=3),
    StepCase("window_right", (60,), (60,), window=(-1, 3), q_offset=5, k_offset=20),
    StepCase("window_causal", (60,), (60,), window=(20, 9), causal=True, q_offset=64, k_offset=32),
    StepCase("window_behind", (20,), (30,), window=(10, 0), q_offset=100, k_offset=0),
    StepCase("window_between_keys", (64,), (20,), window=(1, 0), k_stride=5),
    StepCase("negative_offsets", (30,), (30,), causal=True, q_offset=-10, k_offset=-20),
    StepCase("far", (40,), (40,), causal=True, window=(100, -1), q_offset=2**40 + 50, k_offset=2**40),
    StepCase("varlen", RAGGED_Q, RAGGED_K, varlen=True),
    StepCase("varlen_first", RAGGED_Q, RAGGED_K, varlen=True, carried=False, causal=True),
    StepCase("varlen_causal", RAGGED_Q, RAGGED_K, varlen=True, causal=True, q_offset=3, q_stride=2, k_stride=3),
    StepCase("varlen_rows_past_the_end", (9, 30), (12, 7), varlen=True, rows_past_the_end=6),
    StepCase("varlen_gqa", (20, 9), (11, 30), varlen=True, heads=4, heads_k=2, causal=True, k_offset=-4),
    StepCase("varlen_sliced", (20, 9), (11, 30), varlen=True, sliced=True, window=(6, 2)),
    StepCase("sliced", (35, 35), (27, 27), sliced=True, heads=4, heads_k=2),
    StepCase("sliced_causal", (35, 35), (27, 27), sliced=True, causal=True, q_offset=35, k_offset=20),
    StepCase("one_row", (1,), (1,)),
    StepCase("one_row_each", (1, 1, 1), (1, 1, 1), sliced=True),
    StepCase("no_queries", (0, 0), (9, 9)),
    StepCase("no_keys", (9, 9), (0, 0)),
    StepCase("no_keys_first", (9, 9), (0, 0), carried=False),
    StepCase("no_sequences", (), ()),
    StepCase("varlen_no_sequences", (), (), varlen=True, rows_past_the_end=4),
    StepCase("scale", (30,), (40,), softmax_scale=0.7),
    StepCase("large_scores", (40,), (60,), score_spread=30.0),
    StepCase("d8", (20,), (20,), head_dim=8, causal=True),
    StepCase("d24", (20,), (20,), head_dim=24),
)  # fmt: skip


@st.composite
def step_cases(draw: st.DrawFn) -> StepCase:
    """Any combination of lengths, positions and masks."""
    varlen = draw(st.booleans())
    batch = draw(st.integers(0, 4))
    length = st.one_of(st.integers(0, 3), st.integers(0, 40), st.sampled_from((31, 32, 33, 64, 65, 129)))
    count = batch if varlen else 1
    lengths_q = tuple(draw(st.lists(length, min_size=count, max_size=count)))
    lengths_k = tuple(draw(st.lists(length, min_size=count, max_size=count)))
    if not varlen:
        lengths_q, lengths_k = lengths_q * batch, lengths_k * batch
    heads_k = draw(st.integers(1, 2))
    side = st.one_of(st.just(-1), st.integers(0, 60))
    stride = draw(st.integers(1, 6))
    return StepCase(
        "drawn",
        lengths_q,
        lengths_k,
        varlen=varlen,
        heads=heads_k * draw(st.integers(1, 3)),
        heads_k=heads_k,
        head_dim=draw(st.sampled_from((8, 16, 24, 64, 72))),
        softmax_scale=draw(st.none() | st.floats(0.05, 1.0)),
        causal=draw(st.booleans()),
        window=(draw(side), draw(side)),
        q_offset=draw(st.integers(-100, 100)),
        k_offset=draw(st.integers(-100, 100)),
        q_stride=stride,
        k_stride=draw(st.just(stride) | st.integers(1, 6)),
        carried=draw(st.booleans()),
        sliced=draw(st.booleans()),
        rows_past_the_end=draw(st.sampled_from((0, 0, 1, 5))) if varlen else 0,
    )
