"""Hidden routing through its public functions: meaning, gradients, errors, compilation and export."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
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
    unequal = RoutingPlan.chains(4, (8, 24))
    assert unequal.out_mask.tolist() == [1, 15, 15, 15] and unequal.num_groups == 4 and unequal.selected.all()
    assert RoutingPlan.chains(4, (512, 512, 1024)).out_mask.tolist() == [1, 3, 15, 15]
    assert RoutingPlan.chains(2, [1] * 64).out_mask.tolist() == [2 ** (i + 1) - 1 for i in range(63)] + [-1]
    same = RoutingPlan.lower_triangular(5, 3, 3)
    for one, other in zip(RoutingPlan.chains(5, (7, 7, 7)).arguments(), same.arguments(), strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other


@by_direction
@pytest.mark.parametrize("sizes", ((2, 6), (4, 2, 2), (3,), (1, 2, 3)), ids=str)
def test_chains_are_a_block_triangular_weight(sizes: tuple[int, ...], routed_out: bool) -> None:
    """Outputs of twice the width of inputs; in scatter the weight is transposed; NaN above the blocks is never read."""
    total = sum(sizes)
    chain = torch.tensor([i for i, size in enumerate(sizes) for _ in range(size)])
    below = chain.unsqueeze(1) >= chain
    blocks = below.repeat_interleave(3, 1).repeat_interleave(6, 0)  # inputs of width 3 a unit, outputs of 6
    x, w = leaf(5, 6 * total if routed_out else 3 * total), torch.randn(6 * total, 3 * total, dtype=torch.float64)
    plain = w.masked_fill(~blocks, 0).requires_grad_()
    poisoned = w.masked_fill(~blocks, torch.nan).requires_grad_()
    truth = x @ (plain if routed_out else plain.t())
    found = layer(routed_out)(x, poisoned.t() if routed_out else poisoned, RoutingPlan.chains(5, sizes))
    dout = torch.randn_like(truth)
    expected = (truth, *torch.autograd.grad(truth, (x, plain), dout))
    results = (found, *torch.autograd.grad(found, (x, poisoned), dout))
    for name, one, other in zip(("out", "dx", "dw"), results, expected, strict=True):
        other = other.masked_fill(~blocks, 0) if name == "dw" else other
        assert float((one - other).detach().abs().max()) <= 1e-12, name


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
    ({"bias": torch.rand(6).to("meta")}, ValueError, r"bias must be on cpu as x is, got meta"),
    ({"gates": [1.0]}, TypeError, r"gates must be a tensor, got \[1.0\] \(list\)"),
    ({"w": None}, TypeError, r"w must be a tensor, got None \(NoneType\)"),
    ({"w": W[0, 0]}, ValueError, r"w must be of shape \[outputs, 8\] for this x and plan, got float32 of shape \[\]"),
    ({"plan": replace(PLAN, num_classes=2)}, ValueError, r"w must be of shape \[2, outputs, 8\] .* got .* \[6, 8\]"),
    ({"plan": replace(PLAN, num_groups=0)}, ValueError, r"num_groups must be within 1 to 64, got 0"),
    ({"plan": replace(PLAN, num_groups=65)}, ValueError, r"num_groups must be within 1 to 64, got 65"),
    (
        {"plan": replace(PLAN, group_mask=PLAN.group_mask.int())},
        TypeError,
        r"group_mask must be int64 of shape \[tokens\], got int32 of shape \[5\]",
    ),
    (
        {"plan": replace(PLAN, group_mask=PLAN.group_mask[:, None])},
        ValueError,
        r"group_mask must be int64 of shape \[tokens\], got int64 of shape \[5, 1\]",
    ),
    ({"plan": replace(PLAN, inverse=PLAN.perm)}, ValueError, r"inverse must be of shape \[5\], got int32 .* \[256\]"),
    ({"plan": replace(PLAN, perm=PLAN.perm.long())}, TypeError, r"perm must be int32 of shape \[places\], got int64"),
    (
        {"plan": replace(PLAN, perm=PLAN.perm[:-1])},
        ValueError,
        r"perm must have the same number of places for each of the 2 tiles, got int32 of shape \[255\]",
    ),
    (
        {"plan": replace(PLAN, tile_mask=PLAN.tile_mask.int())},
        TypeError,
        r"tile_mask must be int64 of shape \[tiles\], got int32",
    ),
    ({"plan": replace(PLAN, tile_class=PLAN.tile_class[:1])}, ValueError, r"tile_class must be of shape \[2\], got"),
    (
        {"plan": replace(PLAN, out_mask=torch.ones(3))},
        TypeError,
        r"out_mask must be int64 of shape \[num_out\], got float32 of shape \[3\]",
    ),
    ({"plan": replace(PLAN, out_mask=PLAN.group_mask[:0])}, ValueError, r"out_mask must not be empty"),
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
    with pytest.raises(
        TypeError, match=r"hidden_weight_grad: dy must be float32 as x is, got float64 of shape \[5, 8\]"
    ):
        ops.hidden_weight_grad(X, X.double(), PLAN, routed="in")
    with pytest.raises(ValueError, match=r"hidden_weight_grad: dy must be of shape \[tokens, width\], got .* \[8\]"):
        ops.hidden_weight_grad(X, X[0], PLAN, routed="in")
    for routed, x, dy, message in (
        ("in", X[:, :6], X, "x must come in 4 groups of equal width, got 6"),
        ("out", X, X[:, :6], "dy must come in 4 groups of equal width, got 6"),
    ):
        with pytest.raises(ValueError, match=f"hidden_weight_grad: {message}"):
            ops.hidden_weight_grad(x, dy, PLAN, routed=routed)
    with pytest.raises(TypeError, match=r"hidden_scatter_linear: gates must be a tensor, got \[1.0\] \(list\)"):
        ops.hidden_scatter_linear(X, torch.randn(8, 8), PLAN, [1.0])
    for function, arguments in (
        (ops.hidden_scatter_linear, (X, X, None)),
        (ops.hidden_weight_grad, (X, X, None)),
    ):
        how = {"routed": "in"} if function is ops.hidden_weight_grad else {}
        with pytest.raises(TypeError, match=f"{function.__name__}: plan must be a RoutingPlan, got None"):
            function(*arguments, **how)


IDX, MASK = torch.zeros(3, 2).long(), torch.ones(3, 4).bool()
BAD_PLANS: list[tuple[str, tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ("from_topk", (IDX,), {"num_groups": 65}, ValueError, "num_groups must be within 1 to 64, got 65"),
    ("from_topk", (IDX,), {"num_groups": 0}, ValueError, "num_groups must be within 1 to 64, got 0"),
    ("from_topk", (IDX,), {"num_groups": 4.0}, TypeError, r"num_groups must be an int, got 4.0 \(float\)"),
    ("from_topk", (IDX,), {"num_groups": 4, "tile": 0}, ValueError, "tile must be at least 1, got 0"),
    ("from_topk", (IDX,), {"num_groups": 4, "tile": 1.5}, TypeError, r"tile must be an int, got 1.5 \(float\)"),
    (
        "from_topk",
        (IDX,),
        {"num_groups": 4, "num_shared": 5},
        ValueError,
        "num_shared must be within 0 to num_groups, 4, got 5",
    ),
    ("from_topk", (IDX,), {"num_groups": 4, "num_shared": None}, TypeError, "num_shared must be an int, got None"),
    ("from_topk", (IDX.float(),), {"num_groups": 4}, TypeError, r"idx must be integers, got float32 of shape \[3, 2\]"),
    ("from_topk", (IDX.bool(),), {"num_groups": 4}, TypeError, r"idx must be integers, got bool of shape \[3, 2\]"),
    ("from_topk", (IDX[0],), {"num_groups": 4}, ValueError, r"idx must be of shape \[tokens, k\], got int64 .* \[2\]"),
    ("from_topk", ([[1]],), {"num_groups": 4}, TypeError, r"idx must be a tensor, got \[\[1\]\] \(list\)"),
    ("from_topk", (IDX + 4,), {"num_groups": 4}, ValueError, "idx must be within 0 to 3, got 4"),
    ("from_mask", (IDX,), {}, TypeError, r"mask must be bool, got int64 of shape \[3, 2\]"),
    ("from_mask", (MASK[0],), {}, ValueError, r"mask must be of shape \[tokens, num_groups\], got bool of shape \[4\]"),
    ("from_mask", (MASK[:, :0],), {}, ValueError, "mask's num_groups must be within 1 to 64, got 0"),
    ("from_mask", (MASK,), {"tile": -1}, ValueError, "tile must be at least 1, got -1"),
    ("by_class", (torch.tensor([0, 2]), 2), {}, ValueError, "token_class must be within 0 to 1, got 2"),
    ("by_class", (torch.tensor([0, 1]), 0), {}, ValueError, "num_classes must be at least 1, got 0"),
    ("by_class", (torch.tensor([0, 1]), 2.0), {}, TypeError, "num_classes must be an int, got 2.0"),
    ("by_class", (torch.tensor([0.0, 1]), 2), {}, TypeError, "token_class must be integers, got float32"),
    ("by_class", (IDX, 2), {}, ValueError, r"token_class must be of shape \[tokens\], got int64 of shape \[3, 2\]"),
    (
        "by_class",
        (torch.tensor([0, 1]), 2, MASK),
        {},
        ValueError,
        r"mask must be of shape \[2, num_groups\] as token_class has as many tokens, got bool of shape \[3, 4\]",
    ),
    ("by_class", (IDX[:, 0], 2, MASK.to("meta")), {}, ValueError, "mask must be on cpu as token_class is, got meta"),
    ("prefix", (torch.tensor([5]), 4), {}, ValueError, "widths must be within 0 to 4, got 5"),
    ("prefix", (torch.tensor([5]), 65), {}, ValueError, "num_groups must be within 1 to 64, got 65"),
    ("prefix", (torch.tensor([4.0]), 4), {}, TypeError, "widths must be integers, got float32"),
    ("prefix", (torch.tensor([4]), 4), {"tile": 0}, ValueError, "tile must be at least 1, got 0"),
    ("lower_triangular", (3, 65, 2), {}, ValueError, "num_in must be within 1 to 64, got 65"),
    ("lower_triangular", (3, 4, 0), {}, ValueError, "num_out must be at least 1, got 0"),
    ("lower_triangular", (-1, 4, 2), {}, ValueError, "tokens must be at least 0, got -1"),
    ("lower_triangular", (3, 4, 2), {"tile": 0}, ValueError, "tile must be at least 1, got 0"),
    ("chains", (3, ()), {}, ValueError, r"sizes must be at least one number of at least 1, got \[\]"),
    ("chains", (3, (4, 0)), {}, ValueError, r"sizes must be at least one number of at least 1, got \[4, 0\]"),
    ("chains", (3, (4, 1.0)), {}, TypeError, r"sizes must be an int, got 1.0 \(float\)"),
    ("chains", (-1, (4, 4)), {}, ValueError, "tokens must be at least 0, got -1"),
    ("chains", (3, (1, 64)), {}, ValueError, r"sizes must come to at most 64 of their .* got \[1, 64\]"),
    ("chains", (3, (4, 4)), {"tile": 0}, ValueError, "tile must be at least 1, got 0"),
]


@pytest.mark.parametrize(
    ("constructor", "arguments", "how", "error", "message"), BAD_PLANS, ids=[f"{b[0]}: {b[-1]}" for b in BAD_PLANS]
)
def test_bad_arguments_of_a_plan(
    constructor: str, arguments: tuple[Any, ...], how: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^RoutingPlan.{constructor}: {message}"):
        getattr(RoutingPlan, constructor)(*arguments, **how)


def test_ops_called_directly_check_arguments() -> None:
    plan, w = PLAN.arguments(), torch.randn(8, 8)
    mask = PLAN.group_mask
    for name, arguments, message in (
        ("routing_mask", (IDX, 65, 0), "num_groups must be within 1 to 64, got 65"),
        ("routing_mask", (IDX.double(), 4, 0), "idx must be integers, got float64"),
        ("routing_plan", (mask.int(), None, 4, 1, 128), r"group_mask must be int64 of shape \[tokens\], got int32"),
        ("routing_plan", (mask, mask[:3], 4, 1, 128), r"token_class must be of shape \[5\], got int64 of shape \[3\]"),
        ("routing_plan", (mask, mask.float(), 4, 1, 128), "token_class must be integers, got float32"),
        ("hidden_gather_linear", (X, W.half(), None, None, *plan), "w must be float32 as x is, got float16"),
        ("hidden_gather_linear_backward", (X[:3], X, w, None, *plan), "dout must have 5 rows as x has, got .*[3, 8]"),
        ("hidden_gather_linear_backward", (X.half(), X, w, None, *plan), "dout must be float32 as x is, got float16"),
        ("hidden_gather_linear_backward", (X, X, W, None, *plan), r"w must be of shape \[8, 8\] for this x and plan"),
        ("hidden_scatter_linear", (X, w, X, None, False, *plan), r"gates must be of shape \[5, 4\], got .* \[5, 8\]"),
        ("hidden_scatter_linear_backward", (X, X[:, :4], w, None, *plan), r"ungated must be of shape \[5, 8\] as dout"),
        ("hidden_scatter_linear_backward", (X, X[:4], w, None, *plan), "ungated must have 5 rows as dout has"),
        (
            "hidden_scatter_linear_backward",
            (X, None, W, None, *plan),
            r"w must be of shape \[8, inputs\] for this dout",
        ),
        ("hidden_weight_grad", (X, X[:3], None, True, *plan), "dy must have 5 rows as x has"),
    ):
        with pytest.raises(RuntimeError, match=f"^{name}: {message}"):
            getattr(OPS, name)(*arguments)


@pytest.mark.parametrize("dtype", (torch.uint8, torch.int8, torch.int16, torch.int32))
def test_integers_of_every_width(dtype: torch.dtype) -> None:
    idx, classes = torch.tensor([[3, 1], [2, 0]]), torch.tensor([1, 0])
    for one, other in (
        (RoutingPlan.from_topk(idx.to(dtype), num_groups=4), RoutingPlan.from_topk(idx, num_groups=4)),
        (RoutingPlan.by_class(classes.to(dtype), 2), RoutingPlan.by_class(classes, 2)),
        (RoutingPlan.prefix(classes.to(dtype), 4), RoutingPlan.prefix(classes, 4)),
    ):
        assert torch.equal(one.group_mask, other.group_mask) and torch.equal(one.perm, other.perm)


def test_a_plan_of_strided_tensors() -> None:
    strided = replace(
        PLAN, **{n: getattr(PLAN, n).repeat_interleave(2)[::2] for n in ("group_mask", "perm", "inverse", "tile_mask")}
    )
    assert not strided.perm.is_contiguous()
    assert torch.equal(ops.hidden_gather_linear(X, W, strided), ops.hidden_gather_linear(X, W, PLAN))
