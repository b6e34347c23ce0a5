"""Hidden routing through its public functions: meaning, gradients, errors, compilation and export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import hidden
from helpers.compilations import Compilations
from helpers.hidden import HIDDEN_CASES, HiddenCase
from warpform import ops
from warpform.ops import RoutingPlan

OPS = torch.ops.warpform
by_case = pytest.mark.parametrize("case", HIDDEN_CASES, ids=str)
by_direction = pytest.mark.parametrize("routed_out", (False, True), ids=("gather", "scatter"))


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def layer(routed_out: bool) -> Callable[..., Tensor]:
    return ops.hidden_scatter_linear if routed_out else ops.hidden_gather_linear


# ---- autograd against the oracle ----


@by_direction
@by_case
def test_autograd_equals_the_dense_product_with_zeros(case: HiddenCase, routed_out: bool) -> None:
    """Every gradient through the public function, gates and bias too, in float64."""
    x = hidden.hidden_inputs(case, torch.float64, routed_out=routed_out)
    plan = RoutingPlan(*x.plan(OPS))
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (x.x, x.w, x.gates, x.bias)]
    out = layer(routed_out)(leaves[0], leaves[1], plan, leaves[2], leaves[3])
    grads = iter(torch.autograd.grad(out, [t for t in leaves if t is not None], x.dout))
    truth = hidden.oracle(x, torch.float64, routed_out=routed_out)
    for name, t in zip(("dx", "dw", "dgates", "dbias"), leaves, strict=True):
        if t is not None:
            found = next(grads)
            size = max(1.0, float(truth[name].abs().max()) if found.numel() else 0.0)
            assert found.numel() == 0 or float((found - truth[name]).abs().max()) <= 1e-12 * size, name


# ---- plans ----


def test_constructors_say_the_same_in_their_words() -> None:
    idx = torch.tensor([[3, 1], [1, 1], [2, 0]])
    plan = RoutingPlan.from_topk(idx, num_groups=5, num_shared=1)
    mask = torch.tensor([[1, 1, 0, 1, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0]]).bool()
    assert torch.equal(plan.selected, mask)
    same = RoutingPlan.from_mask(mask)
    for one, other in zip(plan.arguments(), same.arguments(), strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other

    widths = torch.tensor([0, 5, 2])
    assert torch.equal(RoutingPlan.prefix(widths, 5).selected.sum(1), widths)
    assert RoutingPlan.prefix(widths, 5).selected.tolist()[2] == [True, True, False, False, False]
    assert RoutingPlan.prefix(torch.tensor([64]), 64).selected.all()

    classes = torch.tensor([2, 0, 2, 1])
    assert torch.equal(RoutingPlan.by_class(classes, 3).token_class, classes)
    triangular = RoutingPlan.lower_triangular(4, 3, 3)
    assert triangular.out_mask.tolist() == [1, 3, 7] and triangular.selected.all()
    assert RoutingPlan.lower_triangular(4, 2, 4).out_mask.tolist() == [1, 1, 3, 3]
    assert RoutingPlan.lower_triangular(4, 4, 2).out_mask.tolist() == [3, 15]


def test_tiles_that_gain_nothing_are_dense() -> None:
    """More than 85 % of all pairs of tile and group: every tile takes every group; at 85 % it does not."""
    few = torch.zeros(20, 20, dtype=torch.bool)
    few[:, :17] = True
    assert RoutingPlan.from_mask(few, tile=4).tile_mask.tolist() == [2**17 - 1] * 5 + [0]
    few[0, 17] = True
    assert RoutingPlan.from_mask(few, tile=4).tile_mask.tolist() == [2**20 - 1] * 5 + [0]


def test_an_index_out_of_range_is_dropped_where_it_is_not_seen() -> None:
    idx = torch.tensor([[1, -1], [7, 99]])
    assert OPS.routing_mask(idx, 8, 0).tolist() == [2, 128]
    with pytest.raises(ValueError, match=r"RoutingPlan.from_topk: idx must be within 0 to 7, got -1"):
        RoutingPlan.from_topk(idx, num_groups=8)


# ---- what autograd promises ----


@by_direction
def test_gradcheck(routed_out: bool) -> None:
    plan = RoutingPlan.by_class(torch.tensor([0, 1, 1, 0, 1]), 2, torch.rand(5, 3) < 0.6, tile=2)
    size_in, size_out = (4, 6) if routed_out else (6, 4)
    gates = (torch.rand(5, 3, dtype=torch.float64) * plan.selected).requires_grad_()
    inputs = (leaf(5, size_in), leaf(2, size_out, size_in), gates, leaf(2, size_out))
    assert torch.autograd.gradcheck(lambda x, w, g, b: layer(routed_out)(x, w, plan, g, b), inputs)


@by_direction
def test_only_gradients_that_are_needed(routed_out: bool) -> None:
    plan = RoutingPlan.from_mask(torch.rand(5, 4) < 0.5)
    x, w = torch.randn(5, 8), leaf(8, 8, dtype=torch.float32)
    layer(routed_out)(x, w, plan).sum().backward()
    assert w.grad is not None
    x = x.requires_grad_()
    layer(routed_out)(x, w.detach(), plan).sum().backward()
    assert x.grad is not None


@by_direction
def test_double_backward_raises(routed_out: bool) -> None:
    plan = RoutingPlan.from_mask(torch.ones(3, 2, dtype=torch.bool))
    x = leaf(3, 4)
    (g,) = torch.autograd.grad(layer(routed_out)(x, leaf(4, 4), plan).square().sum(), x, create_graph=True)
    name = layer(routed_out).__name__
    with pytest.raises(RuntimeError, match=f"{name}: double backward is not implemented"):
        g.square().sum().backward()


@by_direction
def test_autocast_casts_products_and_not_gates(routed_out: bool) -> None:
    plan = RoutingPlan.from_mask(torch.rand(5, 4) < 0.5)
    x, w, gates, bias = torch.randn(5, 8), torch.randn(8, 8), torch.rand(5, 4), torch.randn(8)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(routed_out)(x, w, plan, gates, bias)
    assert out.dtype == torch.bfloat16
    cast = [t.bfloat16() for t in (x, w)]
    assert torch.equal(out, layer(routed_out)(*cast, plan, gates, bias.bfloat16()))


# ---- compilation, export ----


class Layer(torch.nn.Module):
    """A router and two routed products, from scores to gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.router = torch.nn.Linear(16, 8)
        self.down, self.up = (torch.nn.Parameter(torch.randn(16, 16)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x).softmax(1)
        plan = RoutingPlan.from_topk(scores.topk(2).indices, num_groups=8, num_shared=2)
        hidden = ops.hidden_gather_linear(x, self.down, plan, scores)
        return ops.hidden_scatter_linear(hidden, self.up, plan, scores)


TOKENS = (37, 300, 129, 128, 513, 2)


def test_compile_once_for_all_sizes(fresh_dynamo: None) -> None:
    model, backend = Layer(), Compilations()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for tokens in TOKENS:
        x = torch.randn(tokens, 16)
        results = []
        for function in (model, compiled):
            out = function(x)
            results.append((out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)
    assert backend.count == 1


@pytest.mark.parametrize("strict", (False, True))
def test_export_with_dynamic_sizes(strict: bool, fresh_dynamo: None) -> None:
    model = Layer()
    program = torch.export.export(
        model, (torch.randn(37, 16),), dynamic_shapes=({0: torch.export.Dim.AUTO},), strict=strict
    )
    for tokens in TOKENS:
        x = torch.randn(tokens, 16)
        torch.testing.assert_close(program.module()(x), model(x))


# ---- bad input ----

X, W = torch.randn(5, 8), torch.randn(6, 8)
PLAN = RoutingPlan.from_mask(torch.rand(5, 4) < 0.5)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": [1.0]}, TypeError, r"x must be a tensor, got \[1.0\] \(list\)"),
    ({"x": X.int()}, TypeError, r"x must be float16, bfloat16, float32 or float64, got int32"),
    ({"x": X[0]}, ValueError, r"x must be of shape \[tokens, width\], got float32 of shape \[8\]"),
    ({"w": W.half()}, TypeError, r"w must be float32 as x is, got float16"),
    ({"w": W[:, :4]}, ValueError, r"w must be of shape \[outputs, 8\] for this x and plan, got .* \[6, 4\]"),
    ({"w": W.expand(2, 6, 8)}, ValueError, r"w must be of shape \[1, outputs, 8\]"),
    ({"plan": PLAN.group_mask}, TypeError, r"plan must be a RoutingPlan, got int64 of shape \[5\]"),
    ({"x": X[:4]}, ValueError, r"plan must be of 4 tokens as x is, got one of 5"),
    ({"x": X[:, :6], "w": W[:, :6]}, ValueError, r"x must come in 4 groups of equal width, got 6"),
    ({"gates": torch.rand(5, 4).half()}, TypeError, r"gates must be float32 for this x, got float16"),
    ({"gates": torch.rand(5, 3)}, ValueError, r"gates must be of shape \[5, 4\], got float32 of shape \[5, 3\]"),
    ({"bias": torch.rand(5)}, ValueError, r"bias must be of shape \[6\] or \[1, 6\], got float32 of shape \[5\]"),
    ({"bias": torch.rand(6).half()}, TypeError, r"bias must be float32 as x is, got float16"),
    ({"w": W.to("meta")}, ValueError, r"w must be on cpu as x is, got meta"),
    (
        {"plan": RoutingPlan.lower_triangular(5, 4, 5)},
        ValueError,
        r"w's outputs must come in 5 parts of equal width, got 6",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^hidden_gather_linear: {message}"):
        ops.hidden_gather_linear(**({"x": X, "w": W, "plan": PLAN} | change))


def test_bad_arguments_of_the_others() -> None:
    with pytest.raises(ValueError, match=r"hidden_scatter_linear: w's outputs must come in 4 groups .* got 6"):
        ops.hidden_scatter_linear(X, W, PLAN)
    with pytest.raises(ValueError, match=r'hidden_weight_grad: routed must be "in" or "out", got \'up\''):
        ops.hidden_weight_grad(X, X, PLAN, routed="up")
    with pytest.raises(ValueError, match=r"hidden_weight_grad: dy must have 5 rows as x has"):
        ops.hidden_weight_grad(X, X[:3], PLAN, routed="in")
    with pytest.raises(ValueError, match=r"RoutingPlan.from_topk: num_groups must be within 1 to 64, got 65"):
        RoutingPlan.from_topk(torch.zeros(1, 1).long(), num_groups=65)
    with pytest.raises(TypeError, match=r"RoutingPlan.from_topk: idx must be integers, got float32"):
        RoutingPlan.from_topk(torch.zeros(1, 1), num_groups=4)
    with pytest.raises(TypeError, match=r"RoutingPlan.from_mask: mask must be bool, got int64"):
        RoutingPlan.from_mask(torch.zeros(1, 1).long())
    with pytest.raises(ValueError, match=r"RoutingPlan.by_class: token_class must be within 0 to 1, got 2"):
        RoutingPlan.by_class(torch.tensor([0, 2]), 2)
    with pytest.raises(ValueError, match=r"RoutingPlan.prefix: widths must be within 0 to 4, got 5"):
        RoutingPlan.prefix(torch.tensor([5]), 4)
