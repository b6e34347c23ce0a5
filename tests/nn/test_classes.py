"""Products and norms with weights for each class of tokens, against a weight gathered for every token."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.compare import assert_close
from warpform import ops
from warpform.nn import ClassLayerNorm, ClassLinear, ClassRMSNorm
from warpform.nn.classes import class_linear
from warpform.ops import RoutingPlan

# Classes of tokens, of three: all of them, one that has none, one alone, none.
CLASSES = {"all": (2, 0, 1, 1, 0, 2, 2, 1, 0), "two": (0, 2, 2, 0, 2), "one": (1, 1, 1, 1), "no tokens": ()}


def plan_of(name: str) -> RoutingPlan:
    return RoutingPlan.by_class(torch.tensor(CLASSES[name], dtype=torch.int64), 3)


def plain_linear(x: Tensor, weight: Tensor, plan: RoutingPlan, bias: Tensor | None = None) -> Tensor:
    c = plan.token_class
    out = torch.einsum("ti,toi->to", x, weight[c])
    return out if bias is None else out + bias[c]


def op(x: Tensor, weight: Tensor, plan: RoutingPlan, bias: Tensor | None = None) -> Tensor:
    return ops.hidden_gather_linear(x, weight, plan, None, bias)


def results(function: Callable[..., Tensor], plan: RoutingPlan, given: list[Tensor]) -> list[Tensor]:
    """What it gives and every gradient."""
    given = [t.detach().requires_grad_() for t in given]
    out = function(given[0], given[1], plan, *given[2:])
    probe = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out.detach(), *torch.autograd.grad(out, given, probe)]


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("bias", (False, True), ids=("", "bias"))
@pytest.mark.parametrize("name", CLASSES)
def test_both_ways_are_the_product_with_a_weight_for_each_token(name: str, bias: bool, dtype: torch.dtype) -> None:
    plan = plan_of(name)
    given = [torch.randn(plan.tokens, 8), torch.randn(3, 5, 8), *([torch.randn(3, 5)] if bias else [])]
    given = [t.to(dtype) for t in given]
    oracle = results(plain_linear, plan, [t.double() for t in given])
    eager = results(plain_linear, plan, given)
    for way in (class_linear, op):
        for i, (actual, truth, yardstick) in enumerate(zip(results(way, plan, given), oracle, eager, strict=True)):
            assert actual.dtype == dtype
            assert_close(f"{way.__name__} {i}", actual, truth, yardstick, gradient=i > 0)


def test_a_class_without_tokens_has_a_gradient_of_zeros() -> None:
    module, plan = ClassLinear(8, 5, 3, bias=True), plan_of("two")
    module(torch.randn(5, 8), plan).sum().backward()
    for parameter in module.parameters():
        assert parameter.grad is not None and not parameter.grad[1].any() and parameter.grad[[0, 2]].any()
    for norm in (ClassRMSNorm(8, 3), ClassLayerNorm((8,), 3)):
        norm(torch.randn(5, 8), plan).sum().backward()
        assert norm.weight.grad is not None and not norm.weight.grad[1].any() and norm.weight.grad[[0, 2]].any()


def test_weights_of_other_classes_may_be_anything() -> None:
    plan = plan_of("two")
    for module, x in (
        (ClassLinear(8, 5, 3, bias=True), torch.randn(5, 8)),
        (ClassRMSNorm(8, 3), torch.randn(5, 4, 8)),
        (ClassLayerNorm((4, 8), 3), torch.randn(5, 4, 8)),
    ):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter[1] = torch.nan
        x.requires_grad_()
        out = module(x, plan)
        assert out.isfinite().all() and torch.autograd.grad(out.sum(), x)[0].isfinite().all()


def test_one_class_needs_no_plan() -> None:
    x, plan = torch.randn(6, 8), RoutingPlan.by_class(torch.zeros(6, dtype=torch.int64), 1)
    linear, norm = ClassLinear(8, 5, 1, bias=True), ClassRMSNorm(8, 1)
    assert linear.bias is not None
    for given in (None, plan):
        assert torch.equal(linear(x, given), F.linear(x, linear.weight[0], linear.bias[0]))
        assert_close("norm", norm(x, given), nn.RMSNorm(8, 1e-5).double()(x.double()), nn.RMSNorm(8, 1e-5)(x))


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("heads", (None, 4))
def test_norms_have_the_weight_of_each_token(name: str, heads: int | None) -> None:
    plan = plan_of(name)
    shape = (8,) if heads is None else (heads, 8)
    x = torch.randn(plan.tokens, *shape, dtype=torch.float64, requires_grad=True)
    rms, layer = ClassRMSNorm(8, 3, 0.1).double(), ClassLayerNorm(shape, 3, 0.1).double()
    for module in (rms, layer):
        for parameter in module.parameters():
            nn.init.normal_(parameter)
    c, given = plan.token_class, [x, rms.weight, layer.weight, layer.bias]
    weight = rms.weight[c] if heads is None else rms.weight[c][:, None]
    square, deviation = x.square().mean(-1, True), x - x.mean(-1, True)
    expected = (
        x * (square + 0.1).rsqrt() * weight,
        deviation * (deviation.square().mean(-1, True) + 0.1).rsqrt() * layer.weight[c] + layer.bias[c],
    )
    probe = torch.randn_like(x)
    for actual, truth in zip((rms(x, plan), layer(x, plan)), expected, strict=True):
        found = [actual, *torch.autograd.grad(actual, given, probe, allow_unused=True)]
        right = [truth, *torch.autograd.grad(truth, given, probe, allow_unused=True)]
        for one, other in zip(found, right, strict=True):
            assert (one is None) == (other is None)
            if one is not None and one.numel():
                assert float((one - other).detach().abs().max()) < 1e-12


def test_a_plan_serves_inference_and_then_training() -> None:
    module = ClassLinear(8, 5, 3)
    with torch.inference_mode():
        plan = plan_of("all")
        first = module(torch.ones(9, 8), plan)
    second = module(torch.ones(9, 8), plan)
    second.sum().backward()
    assert torch.equal(first, second)
    assert torch.equal(torch.cat(plan.class_rows).sort().values, torch.arange(9))


def test_autocast_casts_the_product() -> None:
    module, plan, x = ClassLinear(8, 5, 3), plan_of("all"), torch.randn(9, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x, plan)
    assert out.dtype == torch.bfloat16
    with torch.no_grad():
        assert_close(
            "product",
            out,
            plain_linear(x.double(), module.weight.double(), plan),
            plain_linear(x.bfloat16(), module.weight.bfloat16(), plan),
        )


def test_a_second_derivative_is_refused() -> None:
    x, weight = torch.randn(9, 8, requires_grad=True), torch.randn(3, 5, 8)
    (dx,) = torch.autograd.grad(class_linear(x, weight, plan_of("all")).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_bad_arguments() -> None:
    for make in (lambda: ClassLinear(8, 5, 0), lambda: ClassRMSNorm(8, 0), lambda: ClassLayerNorm((8,), 0)):
        with pytest.raises(ValueError, match=r"^Class\w+: num_classes must be at least 1, got 0$"):
            make()
    module, x = ClassLinear(8, 5, 3), torch.randn(9, 8)
    with pytest.raises(TypeError, match=r"^ClassLinear: plan must be a RoutingPlan, .* got None$"):
        module(x)
    two = RoutingPlan.by_class(torch.zeros(9, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match=r"^ClassLinear: plan must be of 3 classes, 9 tokens and 1 group, got 2, 9"):
        module(x, two)
    with pytest.raises(ValueError, match=r"^ClassRMSNorm: plan must be of 3 classes, 4 tokens .* got 3, 9 and 1$"):
        ClassRMSNorm(8, 3)(x[:4], plan_of("all"))
    with pytest.raises(ValueError, match=r"hidden_gather_linear: .*"):
        module(torch.randn(9, 7), plan_of("all"))
    with pytest.raises(TypeError, match=r"hidden_gather_linear: .*"):
        module(x.double(), plan_of("all"))
