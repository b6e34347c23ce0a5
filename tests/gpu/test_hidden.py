"""Hidden routing on the GPU: large cases, and what only hardware shows."""

from __future__ import annotations

import pytest
import torch

from helpers import hidden
from helpers.backends import HALF
from helpers.hidden import HiddenCase, HiddenInputs, hidden_inputs
from warpform import ops
from warpform.ops import RoutingPlan
from warpform.ops.reference import hidden as reference

pytestmark = pytest.mark.gpu

by_dtype = pytest.mark.parametrize("dtype", HALF, ids=lambda d: str(d).removeprefix("torch."))
by_direction = pytest.mark.parametrize("routed_out", (False, True), ids=("gather", "scatter"))


LARGE_CASES = (
    HiddenCase("large", 8192, 16, 64, 1024, num_shared=6),
    HiddenCase("uneven", 5003, 16, 72, 1000, num_shared=6),
    HiddenCase("wide", 3001, 16, 256, 2048, num_shared=6),
    HiddenCase("classes", 4099, 8, 64, 512, "random", num_classes=5),
    HiddenCase("triangular", 2050, 16, 64, 1024, "all", num_out=16),
    HiddenCase("64_groups", 3000, 64, 16, 520, "random"),
)
PLANS = (
    HiddenCase("many", 131_072, 16, 8, 8, num_shared=6),
    HiddenCase("odd", 100_003, 64, 8, 8, "random"),
    HiddenCase("classes", 70_001, 12, 8, 8, "random", num_classes=200),
    HiddenCase("alike", 65_536, 16, 8, 8, "same"),
)


def _call(x: HiddenInputs, routed_out: bool) -> tuple[torch.Tensor, ...]:
    """Plan, output, gradients."""
    library = torch.ops.warpform
    plan = x.plan(library)
    dw = library.hidden_weight_grad(x.x, x.dout, x.gates, routed_out, *plan)
    if routed_out:
        out, ungated = library.hidden_scatter_linear(x.x, x.w, x.gates, x.bias, True, *plan)
        return out, ungated, dw, *library.hidden_scatter_linear_backward(x.dout, ungated, x.w, x.gates, *plan)
    out = library.hidden_gather_linear(x.x, x.w, x.gates, x.bias, *plan)
    return out, dw, *library.hidden_gather_linear_backward(x.dout, x.x, x.w, x.gates, *plan)


@by_direction
@by_dtype
@pytest.mark.parametrize("case", LARGE_CASES, ids=str)
def test_large_cases(case: HiddenCase, dtype: torch.dtype, routed_out: bool) -> None:
    hidden.check_hidden(torch.ops.warpform, case, dtype, "cuda", routed_out=routed_out)


@pytest.mark.parametrize("case", PLANS, ids=str)
def test_plans_of_many_tokens_are_those_of_the_reference(case: HiddenCase) -> None:
    """Sorted by many blocks: integers, so the same on both."""
    x = hidden_inputs(case, torch.bfloat16, "cuda", routed_out=False)
    arguments = (case.num_groups, case.num_classes, case.tile)
    found = torch.ops.warpform.routing_plan(x.group_mask, x.token_class, *arguments)
    token_class = None if x.token_class is None else x.token_class.cpu()
    expected = reference.routing_plan(x.group_mask.cpu(), token_class, *arguments)
    assert all(torch.equal(one.cpu(), other) for one, other in zip(found, expected, strict=True))


@by_direction
@pytest.mark.parametrize("case", LARGE_CASES, ids=str)
def test_results_repeat_bit_for_bit(case: HiddenCase, routed_out: bool) -> None:
    x = hidden_inputs(case, torch.bfloat16, "cuda", routed_out=routed_out)
    runs = [[t.nan_to_num(7.0) for t in _call(x, routed_out)] for _ in range(5)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@by_direction
@pytest.mark.parametrize("tokens", (1, 4, 300, 5000))
def test_a_captured_graph_sees_another_routing(tokens: int, routed_out: bool) -> None:
    """The plan, forward and backward are captured: nothing is read back, nothing waits."""
    case = HiddenCase("graph", tokens, 16, 64, 256, num_shared=6)
    x, other = (hidden_inputs(case, torch.bfloat16, "cuda", routed_out=routed_out) for _ in range(2))
    _call(x, routed_out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = _call(x, routed_out)
    expected = _call(other, routed_out)
    for name in ("group_mask", "x", "w", "gates", "bias", "dout"):
        getattr(x, name).copy_(getattr(other, name))
    graph.replay()
    assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(results, expected, strict=True))


def test_a_side_stream_is_used() -> None:
    """The kernels are queued behind the work of the current stream, not of the default one."""
    x = hidden_inputs(LARGE_CASES[0], torch.bfloat16, "cuda", routed_out=False)
    expected = _call(x, False)
    ready, x.group_mask = x.group_mask, torch.zeros_like(x.group_mask)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        x.group_mask.copy_(ready)
        actual = _call(x, False)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_nothing_synchronises() -> None:
    """From the router's choice to every gradient, the host never waits for the GPU."""
    x = torch.randn(1000, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(512, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    scores = torch.rand(1000, 16, device="cuda", requires_grad=True)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        plan = RoutingPlan.from_topk(scores.topk(2).indices, num_groups=16, num_shared=6)
        hidden_states = ops.hidden_gather_linear(x, w, plan, scores)
        out = ops.hidden_scatter_linear(hidden_states, w.t(), plan, scores)
        torch.autograd.grad(out.sum(), (x, w, scores))
    finally:
        torch.cuda.set_sync_debug_mode(before)
