"""Activator's gated unit against its formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.compare import assert_close
from helpers.identities import assert_same, largest
from warpform.nn import GatedUnit


def made() -> GatedUnit:
    torch.manual_seed(0)
    unit = GatedUnit(10, 14)
    for parameter in unit.parameters():
        nn.init.normal_(parameter, std=0.5)
    return unit


def formula(unit: GatedUnit, x: Tensor) -> Tensor:
    (w1, w2), (b1, b2) = unit.up.weight.chunk(2), unit.up.bias.chunk(2)

    def norm(y: Tensor) -> Tensor:
        return F.layer_norm(y, (14,), unit.norm.weight, unit.norm.bias, 1e-5)

    return unit.down(norm(F.gelu(F.linear(x, w1, b1))) * norm(F.linear(x, w2, b2)))


def test_it_is_the_formula() -> None:
    unit = made().double()
    x = torch.randn(2, 3, 4, 10, dtype=torch.float64, requires_grad=True)
    out, bias = unit(x)
    out = out if bias is None else out + bias
    expected = formula(unit, x)
    assert_same(out, expected)
    weight, parameters = torch.randn_like(out), [x, *unit.parameters()]
    for found, other in zip(
        torch.autograd.grad(out, parameters, weight), torch.autograd.grad(expected, parameters, weight), strict=True
    ):
        assert largest(other) > 0
        assert_same(found, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    unit = made().to(dtype)
    x = torch.randn(50, 10).to(dtype)
    out, bias = unit(x)
    eager = formula(unit, x)
    assert_close("out", out if bias is None else out + bias, formula(unit.double(), x.double()), eager)


def test_hooks_see_the_products() -> None:
    unit, seen = made(), []
    x = torch.randn(3, 10)
    expected, _ = unit(x)
    for part in (unit.up, unit.down, unit.norm):
        part.register_forward_hook(lambda module, args, out: seen.append(type(module).__name__))
    assert torch.allclose(unit(x)[0], expected)
    assert seen == ["Linear", "AddBiasResidualLayerNorm", "AddBiasResidualLayerNorm", "Linear"]
