"""attention_step on the GPU: long cases, long chains, and what only hardware shows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers.backends import HALF
from helpers.compare import assert_close
from helpers.ring import StepCase, check_attention_step, step_inputs
from warpform import ops

pytestmark = pytest.mark.gpu

by_dtype = pytest.mark.parametrize("dtype", HALF, ids=lambda d: str(d).removeprefix("torch."))
LONG_CASES = tuple(
    StepCase(f"d{head_dim}_{name}", (lq,) * batch, (lk,) * batch, head_dim=head_dim, **options)  # type: ignore[arg-type]
    for head_dim in (8, 64, 72, 128)
    for name, lq, lk, batch, options in (
        ("plain", 1031, 700, 3, {"heads": 4}),
        ("causal_gqa", 1031, 1031, 2, {"causal": True, "heads": 8, "heads_k": 2, "q_offset": 20}),
        ("striped", 900, 900, 2, {"causal": True, "q_stride": 8, "k_stride": 8, "k_offset": 5}),
        ("window", 900, 1300, 2, {"window": (300, 50), "q_offset": 400, "sliced": True}),
        ("uneven_strides", 700, 1200, 2, {"causal": True, "q_stride": 5, "k_stride": 3, "q_offset": 64}),
    )
)


@by_dtype
@pytest.mark.parametrize("case", LONG_CASES, ids=str)
def test_long_cases(case: StepCase, dtype: torch.dtype) -> None:
    check_attention_step(torch.ops.warpform, case, dtype, "cuda")


@pytest.mark.parametrize("causal", (False, True), ids=("full", "causal"))
@pytest.mark.parametrize("steps", (2, 16, 64))
def test_steps_add_up_to_attention(steps: int, causal: bool) -> None:
    """Striped blocks of keys, one after the other, against one attention in float64."""
    total, heads, d = 4096, 4, 128
    q, k, v, dout = (torch.randn(1, total, heads, d, dtype=torch.bfloat16, device="cuda") for _ in range(4))
    state: tuple[Tensor | None, Tensor | None] = (None, None)
    blocks = [slice(s, None, steps) for s in range(steps)]
    for s, keys in enumerate(blocks):
        state = ops.attention_step(q, k[:, keys], v[:, keys], *state, causal=causal, k_offset=s, k_stride=steps)
    out, lse = state
    assert out is not None and lse is not None
    delta = (dout.float() * out).sum(-1).transpose(1, 2)
    dq, dk, dv = None, torch.empty_like(k, dtype=torch.float32), torch.empty_like(v, dtype=torch.float32)
    for s, keys in enumerate(blocks):
        dq, dk[:, keys], dv[:, keys] = ops.attention_step_backward(
            dout, delta, q, k[:, keys], v[:, keys], lse, dq, causal=causal, k_offset=s, k_stride=steps
        )
    assert dq is not None

    def whole(dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        result = torch.nn.functional.scaled_dot_product_attention(
            *(t.transpose(1, 2) for t in leaves), is_causal=causal
        ).transpose(1, 2)
        return (result.detach(), *torch.autograd.grad(result, leaves, dout.to(dtype)))

    truths, yardsticks = whole(torch.float64), whole(torch.bfloat16)
    for name, t, truth, yardstick in zip(("out", "dq", "dk", "dv"), (out, dq, dk, dv), truths, yardsticks, strict=True):
        assert_close(name, t, truth, yardstick, gradient=name != "out")


def test_deterministic_gradients_repeat_bit_for_bit() -> None:
    x = step_inputs(StepCase("", (1031, 1031), (1500, 1500), heads=8, head_dim=64), torch.bfloat16, "cuda")
    out, lse = torch.ops.warpform.attention_step(x.q, x.k, x.v, x.out, x.lse)
    delta = (x.dout * out).sum(-1).transpose(1, 2)
    runs = [
        torch.ops.warpform.attention_step_backward(
            x.dout, delta, x.q, x.k, x.v, lse, x.dq, x.dk, x.dv, deterministic=True
        )
        for _ in range(5)
    ]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_a_captured_graph_replays() -> None:
    x = step_inputs(StepCase("", (300, 300), (300, 300), heads=4, head_dim=64), torch.bfloat16, "cuda")
    arguments = (x.q, x.k, x.v, x.out, x.lse)
    torch.ops.warpform.attention_step(*arguments, causal=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.ops.warpform.attention_step(*arguments, causal=True)
    x.k.normal_()
    graph.replay()
    again = torch.ops.warpform.attention_step(*arguments, causal=True)
    assert all(torch.equal(a, b) for a, b in zip(captured, again, strict=True))


def test_a_side_stream_is_used() -> None:
    """The kernels and the copy of dq are queued behind the work of the current stream, not of the default one."""
    x = step_inputs(StepCase("", (512,) * 4, (512,) * 4, heads=8, head_dim=64), torch.bfloat16, "cuda")
    delta = torch.zeros_like(x.lse)
    expected = torch.ops.warpform.attention_step_backward(
        x.dout, delta, x.q, x.k, x.v, x.lse + 9, x.dq, deterministic=True
    )
    late_q, late_dq = torch.zeros_like(x.q), torch.zeros_like(x.dq)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        late_q.copy_(x.q)
        late_dq.copy_(x.dq)
        found = torch.ops.warpform.attention_step_backward(
            x.dout, delta, late_q, x.k, x.v, x.lse + 9, late_dq, deterministic=True
        )
        atomics = torch.ops.warpform.attention_step_backward(x.dout, delta, late_q, x.k, x.v, x.lse + 9, late_dq)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    # Sums in another order: what counts is that dq had come in.
    assert (atomics[0] - expected[0]).abs().max() < 1e-3 * expected[0].abs().max()
