"""attention_step and its backward on every backend: a step, and steps that add up."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import oracle, ring
from helpers.backends import FEW_SMS, HALF, Backend, cpu, drawn_on, kernels, on, one_dtype, reference, same
from helpers.cases import KERNEL_DTYPES, misaligned
from helpers.compare import assert_close
from helpers.ring import STEP_CASES, StepCase, StepInputs, check_attention_step, step_inputs
from helpers.threads import assert_same_on_threads

REFERENCE = reference(examples=150)
CPU = cpu(KERNEL_DTYPES)
SIMT, GPU = kernels(HALF)
EVERY = (REFERENCE, CPU, SIMT, GPU)


# ---- against the oracle ----


@on(*EVERY, case=STEP_CASES)
def test_cases(backend: Backend, case: StepCase, dtype: torch.dtype) -> None:
    check_attention_step(backend.library, case, dtype, backend.device)


@drawn_on(*EVERY, case=ring.step_cases())
def test_drawn(backend: Backend, case: StepCase, dtype: torch.dtype, seed: int) -> None:
    backend.configure(seed)
    check_attention_step(backend.library, case, dtype, backend.device)


@on(*EVERY)
@pytest.mark.parametrize("change", ({}, {"causal": True}, {"score_spread": 8.0}), ids=("plain", "causal", "spread"))
def test_lse_is_as_exact_as_float32(backend: Backend, change: dict[str, Any]) -> None:
    case = replace(StepCase("", (130,), (140,), head_dim=64), **change)
    x = step_inputs(case, torch.bfloat16, backend.device)
    _, lse = backend.library.attention_step(x.q, x.k, x.v, x.out, x.lse, **x.options)
    truth, eager = (ring.step_oracle(case, x, t)[1] for t in (torch.float64, torch.float32))
    assert_close("lse", lse, truth, eager)


def _gradients(backend: Backend, x: StepInputs, lse: Tensor, delta: Tensor | None = None) -> tuple[Tensor, ...]:
    """dq, dk, dv on top of what came before, deterministic."""
    delta = torch.zeros_like(lse) if delta is None else delta
    return backend.library.attention_step_backward(
        x.dout, delta, x.q, x.k, x.v, lse, x.dq, x.dk, x.dv, **x.options, deterministic=True
    )


@on(*EVERY, dtype=one_dtype)
def test_deterministic_results_repeat_bit_for_bit(backend: Backend, dtype: torch.dtype) -> None:
    """In any order of blocks and threads, over several blocks of keys."""
    x = step_inputs(StepCase("", (70,), (700,), heads=2, heads_k=1, head_dim=64), dtype, backend.device)

    def call() -> tuple[Tensor, ...]:
        out, lse = backend.library.attention_step(x.q, x.k, x.v, x.out, x.lse, **x.options)
        return out, lse, *_gradients(backend, x, lse, (x.dout * out).sum(-1).transpose(1, 2))

    backend.assert_repeats(call, [(seed, FEW_SMS) for seed in (1, 2, 3)])


# ---- many steps ----

LAYOUTS = {
    # offset and stride of the rows of block r of n, each of c rows
    "contiguous": lambda r, n, c: (r * c, 1),
    "striped": lambda r, n, c: (r, n),
}


@on(*EVERY)
@pytest.mark.parametrize("causal", (False, True), ids=("full", "causal"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_add_up_to_attention(backend: Backend, layout: str, causal: bool) -> None:
    """Four blocks of queries against four of keys, in a ring's order, are one attention; so are the gradients."""
    n, c, heads, heads_k, d = 4, 70, 2, 1, 64
    torch.manual_seed(0)
    q, dout = (torch.randn(n * c, heads, d).to(backend.device, torch.bfloat16) for _ in range(2))
    k, v = (torch.randn(n * c, heads_k, d).to(backend.device, torch.bfloat16) for _ in range(2))
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
    outs, lses = (torch.empty(shape, device=backend.device) for shape in ((n * c, heads, d), (heads, n * c)))
    for r in range(n):
        state: tuple[Tensor | None, Tensor | None] = (None, None)
        for hop in range(n):
            s = (r - hop) % n
            state = backend.library.attention_step(
                q[rows[r]][None], k[rows[s]][None], v[rows[s]][None], *state, **where[r][s]
            )
        outs[rows[r]], lses[:, rows[r]] = state[0][0], state[1][0]
    assert_close("out", outs, truth[0], eager[0])
    assert_close("lse", lses, truth[1], eager[1])

    gradients = torch.autograd.grad(truth[0], exact, dout.double())
    yardsticks = oracle.varlen_attention_gradients(dout, None, q, k, v, [n * c], [n * c], causal=causal)
    delta = (dout.float() * outs).sum(-1).T
    dq, dk, dv = torch.empty(q.shape, device=q.device), [None] * n, [None] * n
    for r in range(n):
        sum_q = None
        for hop in range(n):
            s = (r - hop) % n
            sum_q, dk[s], dv[s] = backend.library.attention_step_backward(
                dout[rows[r]][None], delta[:, rows[r]][None], q[rows[r]][None], k[rows[s]][None], v[rows[s]][None],
                lses[:, rows[r]][None], sum_q, dk[s], dv[s], **where[r][s],
            )  # fmt: skip
        dq[rows[r]] = sum_q[0]
    joined = [torch.empty(t.shape, device=t.device) for t in (k, v)]
    for s in range(n):
        joined[0][rows[s]], joined[1][rows[s]] = dk[s][0], dv[s][0]
    for name, g, exact_g, yardstick in zip(("dq", "dk", "dv"), (dq, *joined), gradients, yardsticks, strict=True):
        assert_close(name, g, exact_g, yardstick, gradient=True)


# ---- what is carried ----


@on(*EVERY)
def test_rows_that_see_nothing_are_carried_bit_for_bit(backend: Backend) -> None:
    """In blocks that see nothing at all, and beside rows that do."""
    case = StepCase("", (150,), (40,), head_dim=64, causal=True, k_offset=100)
    x = step_inputs(case, torch.bfloat16, backend.device)
    out, lse = backend.library.attention_step(x.q, x.k, x.v, x.out, x.lse, **x.options)
    assert torch.equal(out[:, :100], x.out[:, :100]) and torch.equal(lse[..., :100], x.lse[..., :100])
    assert not torch.equal(out[:, 100:], x.out[:, 100:])
    assert torch.equal(_gradients(backend, x, lse)[0][:, :100], x.dq[:, :100])


@on(*EVERY)
def test_rows_that_see_nothing_in_the_first_step(backend: Backend) -> None:
    q, k = torch.randn(1, 6, 2, 8), torch.randn(1, 4, 2, 8)
    q, k = (t.to(backend.device, torch.bfloat16) for t in (q, k))
    out, lse = backend.library.attention_step(q, k, k, causal=True, k_offset=3)
    assert not out[:, :3].any() and (lse[..., :3] == -math.inf).all() and lse[..., 3:].isfinite().all()


@on(*EVERY)
def test_infinite_lse_means_no_gradient(backend: Backend) -> None:
    """Rows that saw nothing in any step: their probabilities are 0 for keys that they could see here, too."""
    x = step_inputs(StepCase("", (30,), (20,)), torch.float16, backend.device)
    lse = torch.full_like(x.lse, -math.inf)
    for deterministic in (False, True):
        gradients = backend.library.attention_step_backward(
            x.dout, torch.zeros_like(lse), x.q, x.k, x.v, lse, x.dq, x.dk, x.dv, **x.options,
            deterministic=deterministic,
        )  # fmt: skip
        assert same(gradients, (x.dq, x.dk, x.dv))


@on(*EVERY)
def test_nan_goes_nowhere_from_keys_that_are_not_seen(backend: Backend) -> None:
    """Keys past the mask, in blocks that are skipped."""
    case = StepCase("", (64,), (300,), head_dim=64, causal=True, q_offset=10, heads=1)
    x = step_inputs(case, torch.bfloat16, backend.device)
    clean = backend.library.attention_step(x.q, x.k, x.v, x.out, x.lse, **x.options)
    x.k[:, 128:], x.v[:, 128:] = float("nan"), float("inf")
    dirty = backend.library.attention_step(x.q, x.k, x.v, x.out, x.lse, **x.options)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


@on(*EVERY)
def test_the_state_is_not_rounded(backend: Backend) -> None:
    """Scores of 0 and values of few bits: sums and weights are exact but for float32, so the result is as well."""
    case = StepCase("", (40,), (96,), head_dim=64)
    x = step_inputs(case, torch.bfloat16, backend.device)
    x.q.zero_()
    x.v.copy_(torch.randint(-8, 9, x.v.shape))
    out, lse = backend.library.attention_step(x.q, x.k, x.v, x.out, x.lse, **x.options)
    truth, eager = (ring.step_oracle(case, x, t) for t in (torch.float64, torch.float32))
    assert_close("out", out, truth[0], eager[0], scale=8.0)
    assert_close("lse", lse, truth[1], eager[1])


# ---- positions ----


@on(*EVERY)
@pytest.mark.parametrize("window", ((-1, -1), (3, -1), (-1, 2), (4, 1), (0, 0)), ids=str)
@pytest.mark.parametrize(("q_stride", "k_stride"), ((1, 1), (3, 3), (1, 4), (5, 2), (64, 1), (1, 64)))
def test_every_pair_is_seen_or_not(backend: Backend, window: tuple[int, int], q_stride: int, k_stride: int) -> None:
    """Scores of 0: the probabilities, read off through values of 1 and 0, are 1 over the number of keys seen."""
    for causal in (False, True):
        for distance in (-130, -7, 0, 1, 90):
            case = StepCase(
                "", (40,), (8,), heads=1, head_dim=8, causal=causal, window=window, q_offset=distance,
                q_stride=q_stride, k_stride=k_stride, carried=False,
            )  # fmt: skip
            x = step_inputs(case, torch.float16, backend.device)
            x.q.zero_()
            x.v.copy_(torch.eye(8)[None, :, None])
            out, lse = backend.library.attention_step(x.q, x.k, x.v, **x.options)
            seen = ring.seen_pairs(case, 40, 8)
            assert torch.equal(out[0, :, 0].cpu() > 0, seen), (causal, distance)
            assert torch.equal(lse[0, 0].cpu().exp().round(), seen.sum(1).float())


@on(*EVERY)
def test_positions_far_apart(backend: Backend) -> None:
    """As far as the kernels count within one block; between blocks, further."""
    library, far = backend.library, 2**29 - 1
    for stride in (far // 9, far // 9 - 5):
        case = StepCase("", (10,), (10,), head_dim=8, causal=True, q_stride=stride, k_stride=stride, q_offset=7)
        check_attention_step(library, case, torch.float16, backend.device)
        check_attention_step(library, replace(case, q_offset=-far, window=(far, -1)), torch.float16, backend.device)
        check_attention_step(library, replace(case, k_offset=-(2**61), q_offset=2**61), torch.float16, backend.device)
    one = StepCase("", (1,), (10,), head_dim=8, causal=True, q_stride=2**50, q_offset=4)
    check_attention_step(library, one, torch.float16, backend.device)


# ---- what comes in ----


@on(*EVERY)
def test_state_of_any_layout(backend: Backend) -> None:
    """What 8 bytes at a time cannot read is copied; what stands transposed is read as it stands."""
    case = StepCase("", (30, 30), (20, 20), head_dim=24, causal=True)
    x = step_inputs(case, torch.bfloat16, backend.device)
    expected = backend.library.attention_step(x.q, x.k, x.v, x.out, x.lse, **x.options)
    delta = torch.randn_like(x.lse)
    back = backend.library.attention_step_backward(
        x.dout, delta, x.q, x.k, x.v, x.lse, x.dq, x.dk, x.dv, **x.options, deterministic=True
    )
    layouts = (
        misaligned,
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: torch.stack([t, t], -1)[..., 0],
    )
    for change in layouts:
        out, lse, dq, dk, dv = (change(t) for t in (x.out, x.lse, x.dq, x.dk, x.dv))
        found = backend.library.attention_step(x.q, x.k, x.v, out, lse, **x.options)
        assert same(found, expected)
        found = backend.library.attention_step_backward(
            change(x.dout), change(delta), x.q, x.k, x.v, lse, dq, dk, dv, **x.options, deterministic=True
        )
        assert same(found, back)


@on(SIMT, GPU)
def test_rows_outside_of_sequences_are_carried(backend: Backend) -> None:
    """The reference refuses such offsets; to read them, a GPU would have to wait."""
    x = step_inputs(StepCase("", (20, 20), (20, 20), varlen=True), torch.float16, backend.device)
    offsets = torch.tensor([7, 20, 33], dtype=torch.int32, device=backend.device)
    x.options["cu_seqlens_q"] = x.options["cu_seqlens_k"] = offsets
    out, lse = backend.library.attention_step(x.q, x.k, x.v, x.out, x.lse, **x.options)
    gradients = _gradients(backend, x, lse, lse)
    for t, before in zip((out, lse.T, *gradients), (x.out, x.lse.T, x.dq, x.dk, x.dv), strict=True):
        assert torch.equal(torch.cat([t[:7], t[33:]]), torch.cat([before[:7], before[33:]]))
        assert not torch.equal(t[7:33], before[7:33])


# ---- on a CPU ----

CPU_CASES = (
    StepCase("blocks_of_keys", (300,), (600,), heads=4, heads_k=2, head_dim=40, causal=True, q_offset=200),
    StepCase("varlen", (300, 5, 70), (20, 300, 530), varlen=True, heads_k=1, head_dim=7, window=(90, 300)),
    StepCase("d1", (40, 40), (50, 50), head_dim=1, sliced=True),
    StepCase("d200", (40,), (300,), head_dim=200, carried=False),
    StepCase("scale_negative", (40,), (60,), softmax_scale=-0.3),
)


@on(CPU, case=CPU_CASES)
def test_cases_of_the_cpu(backend: Backend, case: StepCase, dtype: torch.dtype) -> None:
    check_attention_step(backend.library, case, dtype, backend.device)


@on(CPU, case=CPU_CASES, dtype=one_dtype)
def test_threads_change_no_bit(backend: Backend, case: StepCase, dtype: torch.dtype) -> None:
    x = step_inputs(case, dtype, backend.device)

    def call() -> tuple[Tensor, ...]:
        out, lse = backend.library.attention_step(x.q, x.k, x.v, x.out, x.lse, **x.options)
        return out, lse, *_gradients(backend, x, lse)

    assert_same_on_threads(call)
