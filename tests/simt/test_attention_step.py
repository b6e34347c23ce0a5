"""attention_step and its backward: the CUDA kernels, run in the emulator."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from helpers import oracle, ring
from helpers.cases import misaligned
from helpers.compare import assert_close
from helpers.drawn import drawn
from helpers.ring import StepCase, check_attention_step, step_inputs

DTYPES = (torch.float16, torch.bfloat16)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
H200_SHARED, AD102_SHARED = 232_448, 101_376

# Several blocks of queries and of keys, with tails, in both buckets of head dimensions.
LONG_CASES = tuple(
    StepCase(f"d{head_dim}_{name}", (lq,) * batch, (lk,) * batch, head_dim=head_dim, **options)  # type: ignore[arg-type]
    for head_dim in (64, 72, 128)
    for name, lq, lk, batch, options in (
        ("plain", 145, 209, 1, {}),
        ("causal_gqa", 145, 145, 2, {"causal": True, "heads": 2, "heads_k": 1, "q_offset": 20}),
        ("striped", 270, 270, 1, {"causal": True, "q_stride": 8, "k_stride": 8, "k_offset": 5, "heads": 1}),
        ("window", 150, 300, 1, {"window": (90, 20), "q_offset": 100, "sliced": True, "heads": 1}),
        ("uneven_strides", 140, 300, 1, {"causal": True, "q_stride": 5, "k_stride": 3, "q_offset": 64, "heads": 1}),
    )
)


@by_dtype
@pytest.mark.parametrize("case", ring.STEP_CASES, ids=str)
def test_cases(simt: Any, case: StepCase, dtype: torch.dtype) -> None:
    check_attention_step(simt, case, dtype)


@pytest.mark.parametrize("case", LONG_CASES, ids=str)
def test_long(simt: Any, case: StepCase) -> None:
    simt._configure(len(case.name), 1, H200_SHARED)
    check_attention_step(simt, case, torch.bfloat16)


@pytest.mark.parametrize("case", [c for c in LONG_CASES if c.name.endswith(("gqa", "window"))], ids=str)
def test_with_little_shared_memory(simt: Any, case: StepCase) -> None:
    """99 KiB a block, as on sm_86 and sm_89: the backward at 128 columns takes the small tile."""
    simt._configure(3, 1, AD102_SHARED)
    check_attention_step(simt, case, torch.float16)


@drawn(60, case=ring.step_cases(), dtype=st.sampled_from(DTYPES))
def test_drawn(simt: Any, case: StepCase, dtype: torch.dtype, seed: int) -> None:
    simt._configure(seed)
    check_attention_step(simt, case, dtype)


# ---- many steps ----

LAYOUTS = {
    # offset and stride of the rows of block r of n, each of c rows
    "contiguous": lambda r, n, c: (r * c, 1),
    "striped": lambda r, n, c: (r, n),
}


@pytest.mark.parametrize("causal", (False, True), ids=("full", "causal"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_add_up_to_attention(simt: Any, layout: str, causal: bool) -> None:
    """Four blocks of queries against four of keys, in a ring's order, are one attention; so are the gradients."""
    n, c, heads, heads_k, d = 4, 70, 2, 1, 64
    torch.manual_seed(0)
    q, dout = (torch.randn(n * c, heads, d).bfloat16() for _ in range(2))
    k, v = (torch.randn(n * c, heads_k, d).bfloat16() for _ in range(2))
    exact = [t.double().requires_grad_() for t in (q, k, v)]
    truth = oracle.varlen_attention(*exact, [n * c], [n * c], causal=causal)
    eager = oracle.varlen_attention(q, k, v, [n * c], [n * c], causal=causal)

    places = [LAYOUTS[layout](r, n, c) for r in range(n)]
    rows = [offset + stride * torch.arange(c) for offset, stride in places]
    where = [
        [
            {"causal": causal, "q_offset": places[r][0], "q_stride": places[r][1], "k_offset": places[s][0],
             "k_stride": places[s][1]}
            for s in range(n)
        ]
        for r in range(n)
    ]  # fmt: skip
    outs, lses = torch.empty(n * c, heads, d), torch.empty(heads, n * c)
    for r in range(n):
        state: tuple[Tensor | None, Tensor | None] = (None, None)
        for hop in range(n):
            s = (r - hop) % n
            state = simt.attention_step(q[rows[r]][None], k[rows[s]][None], v[rows[s]][None], *state, **where[r][s])
        outs[rows[r]], lses[:, rows[r]] = state[0][0], state[1][0]
    assert_close("out", outs, truth[0], eager[0])
    assert_close("lse", lses, truth[1], eager[1])

    gradients = torch.autograd.grad(truth[0], exact, dout.double())
    yardsticks = oracle.varlen_attention_gradients(dout, None, q, k, v, [n * c], [n * c], causal=causal)
    delta = (dout.float() * outs).sum(-1).T
    dq, dk, dv = torch.empty(q.shape), [None] * n, [None] * n
    for r in range(n):
        sum_q = None
        for hop in range(n):
            s = (r - hop) % n
            sum_q, dk[s], dv[s] = simt.attention_step_backward(
                dout[rows[r]][None], delta[:, rows[r]][None], q[rows[r]][None], k[rows[s]][None], v[rows[s]][None],
                lses[:, rows[r]][None], sum_q, dk[s], dv[s], **where[r][s],
            )  # fmt: skip
        dq[rows[r]] = sum_q[0]
    joined = [torch.empty(t.shape) for t in (k, v)]
    for s in range(n):
        joined[0][rows[s]], joined[1][rows[s]] = dk[s][0], dv[s][0]
    for name, g, exact_g, yardstick in zip(("dq", "dk", "dv"), (dq, *joined), gradients, yardsticks, strict=True):
        assert_close(name, g, exact_g, yardstick, gradient=True)


# ---- what is carried ----


def test_rows_that_see_nothing_are_carried_bit_for_bit(simt: Any) -> None:
    """In blocks that see nothing at all, and beside rows that do."""
    case = StepCase("", (150,), (40,), head_dim=64, causal=True, k_offset=100)
    x = step_inputs(case, torch.bfloat16)
    out, lse = simt.attention_step(x.q, x.k, x.v, x.out, x.lse, **x.options)
    assert torch.equal(out[:, :100], x.out[:, :100]) and torch.equal(lse[..., :100], x.lse[..., :100])
    assert not torch.equal(out[:, 100:], x.out[:, 100:])
    gradients = simt.attention_step_backward(
        x.dout, torch.zeros_like(lse), x.q, x.k, x.v, lse, x.dq, x.dk, x.dv, **x.options, deterministic=True
    )
    assert torch.equal(gradients[0][:, :100], x.dq[:, :100])


def test_nan_goes_nowhere_from_keys_that_are_not_seen(simt: Any) -> None:
    """Keys past the mask, in blocks that are skipped."""
    case = StepCase("", (64,), (300,), head_dim=64, causal=True, q_offset=10, heads=1)
    x = step_inputs(case, torch.bfloat16)
    clean = simt.attention_step(x.q, x.k, x.v, x.out, x.lse, **x.options)
    x.k[:, 128:], x.v[:, 128:] = float("nan"), float("inf")
    dirty = simt.attention_step(x.q, x.k, x.v, x.out, x.lse, **x.options)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


def test_the_state_is_not_rounded(simt: Any) -> None:
    """Scores of 0 and values of few bits: sums and weights are exact but for float32, so the result is as well."""
    case = StepCase("", (40,), (96,), head_dim=64)
    x = step_inputs(case, torch.bfloat16)
    x.q.zero_()
    x.v.copy_(torch.randint(-8, 9, x.v.shape))
    out, lse = simt.attention_step(x.q, x.k, x.v, x.out, x.lse, **x.options)
    truth, eager = (ring.step_oracle(case, x, t) for t in (torch.float64, torch.float32))
    assert_close("out", out, truth[0], eager[0], scale=8.0)
    assert_close("lse", lse, truth[1], eager[1])


@pytest.mark.parametrize("change", ({}, {"causal": True}, {"score_spread": 8.0}), ids=("plain", "causal", "spread"))
def test_lse_is_as_exact_as_float32(simt: Any, change: dict[str, Any]) -> None:
    case = replace(StepCase("", (130,), (140,), head_dim=64), **change)
    x = step_inputs(case, torch.bfloat16)
    _, lse = simt.attention_step(x.q, x.k, x.v, x.out, x.lse, **x.options)
    truth, eager = (ring.step_oracle(case, x, t)[1] for t in (torch.float64, torch.float32))
    assert_close("lse", lse, truth, eager)


def test_deterministic_gradients_repeat_bit_for_bit(simt: Any) -> None:
    """In any order of blocks and threads; without it, the atomics of dQ add up the blocks of keys as they come."""
    x = step_inputs(StepCase("", (70,), (700,), heads=2, heads_k=1, head_dim=64), torch.float16)
    out, lse = simt.attention_step(x.q, x.k, x.v, x.out, x.lse, **x.options)
    delta = (x.dout * out).sum(-1).transpose(1, 2)
    results: dict[bool, list[tuple[Tensor, ...]]] = {True: [], False: []}
    for deterministic, runs in results.items():
        for seed in (1, 2, 3):
            simt._configure(seed)
            runs.append(
                simt.attention_step_backward(
                    x.dout, delta, x.q, x.k, x.v, lse, x.dq, x.dk, x.dv, **x.options, deterministic=deterministic
                )
            )
    for i, name in enumerate(("dq", "dk", "dv")):
        same = {how: all(torch.equal(runs[0][i], run[i]) for run in runs[1:]) for how, runs in results.items()}
        assert same == {True: True, False: name != "dq"}, name


# ---- positions ----


@pytest.mark.parametrize("window", ((-1, -1), (3, -1), (-1, 2), (4, 1), (0, 0)), ids=str)
@pytest.mark.parametrize(("q_stride", "k_stride"), ((1, 1), (3, 3), (1, 4), (5, 2), (64, 1), (1, 64)))
def test_every_pair_is_seen_or_not(simt: Any, window: tuple[int, int], q_stride: int, k_stride: int) -> None:
    """Scores of 0: the probabilities, read off through values of 1 and 0, are 1 over the number of keys seen."""
    for causal in (False, True):
        for distance in (-130, -7, 0, 1, 90):
            case = StepCase(
                "", (40,), (8,), heads=1, head_dim=8, causal=causal, window=window, q_offset=distance,
                q_stride=q_stride, k_stride=k_stride, carried=False,
            )  # fmt: skip
            x = step_inputs(case, torch.float16)
            x.q.zero_()
            x.v.copy_(torch.eye(8)[None, :, None])
            out, lse = simt.attention_step(x.q, x.k, x.v, **x.options)
            seen = ring.seen_pairs(case, 40, 8)
            assert torch.equal(out[0, :, 0] > 0, seen), (causal, distance)
            assert torch.equal(lse[0, 0].exp().round(), seen.sum(1).float())


def test_positions_as_far_apart_as_the_kernels_count(simt: Any) -> None:
    far = 2**29 - 1
    for stride in (far // 9, far // 9 - 5):
        case = StepCase("", (10,), (10,), head_dim=8, causal=True, q_stride=stride, k_stride=stride, q_offset=7)
        check_attention_step(simt, case, torch.float16)
        check_attention_step(simt, replace(case, q_offset=-far, window=(far, -1)), torch.float16)
        check_attention_step(simt, replace(case, k_offset=-(2**61), q_offset=2**61), torch.float16)
    one = StepCase("", (1,), (10,), head_dim=8, causal=True, q_stride=2**50, q_offset=4)
    check_attention_step(simt, one, torch.float16)
    x = step_inputs(replace(case, q_stride=far // 9 + 1), torch.float16)
    with pytest.raises(RuntimeError, match="no kernel: positions of one block more than 2.29 apart"):
        simt.attention_step(x.q, x.k, x.v, x.out, x.lse, **x.options)


# ---- what comes in ----


def test_state_of_any_layout(simt: Any) -> None:
    """What 8 bytes at a time cannot read is copied; what stands transposed is read as it stands."""
    case = StepCase("", (30, 30), (20, 20), head_dim=24, causal=True)
    x = step_inputs(case, torch.bfloat16)
    expected = simt.attention_step(x.q, x.k, x.v, x.out, x.lse, **x.options)
    delta = torch.randn_like(x.lse)
    back = simt.attention_step_backward(
        x.dout, delta, x.q, x.k, x.v, x.lse, x.dq, x.dk, x.dv, **x.options, deterministic=True
    )
    layouts = (
        misaligned,
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: torch.stack([t, t], -1)[..., 0],
    )
    for change in layouts:
        out, lse, dq, dk, dv = (change(t) for t in (x.out, x.lse, x.dq, x.dk, x.dv))
        found = simt.attention_step(x.q, x.k, x.v, out, lse, **x.options)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        found = simt.attention_step_backward(
            change(x.dout), change(delta), x.q, x.k, x.v, lse, dq, dk, dv, **x.options, deterministic=True
        )
        assert all(torch.equal(a, b) for a, b in zip(found, back, strict=True))


@pytest.mark.parametrize("offsets", ([0, 1000, 20], [5, -7, 40], [0, 30, 12], [2**31 - 1, -(2**31), 7], [3, 9, 20]))
def test_bad_offsets_stay_in_bounds(simt: Any, offsets: list[int]) -> None:
    """What cu_seqlens holds cannot be checked without waiting for the GPU; the emulator reports accesses outside."""
    bad = torch.tensor(offsets, dtype=torch.int32)
    for names in (("cu_seqlens_q",), ("cu_seqlens_k",), ("cu_seqlens_q", "cu_seqlens_k")):
        x = step_inputs(StepCase("", (20, 20), (20, 20), varlen=True, causal=True), torch.float16)
        x.options.update(dict.fromkeys(names, bad))
        _, lse = simt.attention_step(x.q, x.k, x.v, x.out, x.lse, **x.options)
        for deterministic in (False, True):
            simt.attention_step_backward(
                x.dout, lse, x.q, x.k, x.v, lse, x.dq, x.dk, x.dv, **x.options, deterministic=deterministic
            )


def test_rows_outside_of_sequences_are_carried(simt: Any) -> None:
    x = step_inputs(StepCase("", (20, 20), (20, 20), varlen=True), torch.float16)
    x.options["cu_seqlens_q"] = x.options["cu_seqlens_k"] = torch.tensor([7, 20, 33], dtype=torch.int32)
    out, lse = simt.attention_step(x.q, x.k, x.v, x.out, x.lse, **x.options)
    gradients = simt.attention_step_backward(
        x.dout, lse, x.q, x.k, x.v, lse, x.dq, x.dk, x.dv, **x.options, deterministic=True
    )
    for t, before in zip((out, lse.T, *gradients), (x.out, x.lse.T, x.dq, x.dk, x.dv), strict=True):
        assert torch.equal(torch.cat([t[:7], t[33:]]), torch.cat([before[:7], before[33:]]))
        assert not torch.equal(t[7:33], before[7:33])


def test_kernel_table_lists_what_runs(simt: Any) -> None:
    rows = [row for row in json.loads(simt._kernel_table()) if row["op"].startswith("attention_step")]
    assert {(row["op"], row["dtype"]) for row in rows} == {
        (op, dtype) for op in ("attention_step", "attention_step_backward") for dtype in ("float16", "bfloat16")
    }
    for row in rows:
        step, most = row["head_dim"]["multiple_of"], row["head_dim"]["max"]
        for head_dim in range(step, most + 1, step):
            case = StepCase("", (5,), (6,), heads=1, head_dim=head_dim)
            check_attention_step(simt, case, getattr(torch, row["dtype"]), backward=row["op"].endswith("backward"))


def _zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": _zeros(1, 9, 2, 7), "k": _zeros(1, 8, 2, 7), "v": _zeros(1, 8, 2, 7)}, "no kernel: head_dim is not a"),
        ({"q": _zeros(1, 9, 2, 136), "k": _zeros(1, 8, 2, 136), "v": _zeros(1, 8, 2, 136)}, "multiple of 8 up to 128"),
        ({"softmax_scale": -1.0}, "no kernel: softmax_scale is not a positive float32"),
        ({"q": _zeros(9, 2, 16)}, r"q must be of shape \[batch, length, heads, head_dim\], got bfloat16 of shape"),
        ({"k": _zeros(2, 8, 2, 16)}, "k must be of shape .* with q's batch"),
        ({"k": _zeros(1, 8, 2, 16, dtype=torch.float16)}, "k must be of shape .* and dtype, got float16"),
        ({"v": _zeros(1, 8, 2, 24)}, "v must have the shape and dtype of k"),
        ({"k": _zeros(1, 8, 3, 16), "v": _zeros(1, 8, 3, 16)}, "a multiple of those of k and v, got 2 and 3"),
        ({"k_stride": 0}, "q_stride and k_stride must be at least 1, got 1 and 0"),
        ({"q_offset": 2**62}, "offsets must be within 2.62"),
        ({"window_size_left": -2}, r"window_size must be at least -1 on both sides, got \(-2, -1\)"),
        ({"cu_seqlens_q": torch.zeros(2, dtype=torch.int32)}, "must both be given, or neither"),
        ({"lse": None}, "out and lse must both be given, or neither"),
        ({"out": _zeros(1, 9, 2, 16)}, "out must be float32 of the shape that belongs to q .* got bfloat16"),
        ({"lse": _zeros(1, 9, 2, dtype=torch.float32)}, r"lse must be float32 .* got float32 of shape \[1, 9, 2\]"),
        ({"q": misaligned(_zeros(1, 9, 2, 16))}, r"q must be 16-byte aligned, .* call \.clone\(\)"),
        ({"k": _zeros(1, 8, 2, 16, 2)[..., 0]}, "k must be contiguous in its last dimension"),
        ({"v": _zeros(1, 8, 2, 17)[..., :16]}, "v must be 16-byte aligned"),
    ],
)  # fmt: skip
def test_bad_input(simt: Any, change: dict[str, Any], message: str) -> None:
    x = step_inputs(StepCase("", (9,), (8,)), torch.bfloat16)
    arguments = {"q": x.q, "k": x.k, "v": x.v, "out": x.out, "lse": x.lse, **x.options} | change
    with pytest.raises(RuntimeError, match=f"attention_step: .*{message}"):
        simt.attention_step(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dout": _zeros(1, 9, 2, 16, dtype=torch.float32)}, "dout must have the shape and dtype of q"),
        ({"delta": _zeros(1, 2, 8, dtype=torch.float32)}, "delta must be float32"),
        ({"lse": _zeros(1, 2, 9, dtype=torch.float64)}, "lse must be float32"),
        ({"dq": _zeros(1, 9, 2, 16)}, "dq must be float32"),
        ({"dk": _zeros(1, 9, 2, 16, dtype=torch.float32)}, "dk must be float32"),
        ({"dv": _zeros(1, 8, 2, 24, dtype=torch.float32)}, "dv must be float32"),
        ({"q_stride": -1}, "q_stride and k_stride must be at least 1"),
    ],
)
def test_bad_input_of_the_backward(simt: Any, change: dict[str, Any], message: str) -> None:
    x = step_inputs(StepCase("", (9,), (8,)), torch.bfloat16)
    arguments = {
        "dout": x.dout, "delta": torch.zeros(1, 2, 9), "q": x.q, "k": x.k, "v": x.v, "lse": torch.zeros(1, 2, 9),
        "dq": x.dq, "dk": x.dk, "dv": x.dv, **x.options,
    } | change  # fmt: skip
    with pytest.raises(RuntimeError, match=f"attention_step_backward: .*{message}"):
        simt.attention_step_backward(**arguments)


def test_infinite_lse_means_no_gradient(simt: Any) -> None:
    """Rows that saw nothing in any step: their probabilities are 0 for keys that they could see here, too."""
    x = step_inputs(StepCase("", (30,), (20,)), torch.float16)
    lse = torch.full_like(x.lse, -math.inf)
    for deterministic in (False, True):
        gradients = simt.attention_step_backward(
            x.dout,
            torch.zeros_like(lse),
            x.q,
            x.k,
            x.v,
            lse,
            x.dq,
            x.dk,
            x.dv,
            **x.options,
            deterministic=deterministic,
        )
        assert all(torch.equal(g, before) for g, before in zip(gradients, (x.dq, x.dk, x.dv), strict=True))
