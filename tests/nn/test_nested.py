"""Nested feed-forwards against their formula: act(x W1[:m]^T) W2[:, :m]^T, with and without a gate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from warpform import Packing
from warpform.nn import NestedFeedForward, Step, TokenWidths, nested

WIDTHS = (3, 6, 12)


def formula(branch: NestedFeedForward, x: Tensor, width: int) -> Tensor:
    x = F.rms_norm(x, x.shape[1:], branch.norm.weight, branch.norm.eps)
    rows = [slice(part * branch.size, part * branch.size + width) for part in range(branch.parts)]
    products = [F.linear(x, branch.inwards.weight[r], branch.inwards.bias[r]) for r in rows]
    hidden = F.gelu(products[0]) * (products[1] if branch.parts == 2 else 1)
    return F.linear(hidden, branch.outwards.weight[:, :width], branch.outwards.bias)


@pytest.mark.parametrize("grouped", (True, False), ids=("grouped", "routed"))
@pytest.mark.parametrize("gated", (True, False), ids=("gated", "plain"))
def test_widths_of_layers_and_tokens(gated: bool, grouped: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(nested, "takes_groups", lambda x: grouped)
    branch = NestedFeedForward(8, 12, 1, activation="gelu", gated=gated, bias=True).double()
    for parameter in branch.parameters():
        torch.nn.init.normal_(parameter)
    x, packing = torch.randn(9, 8, dtype=torch.float64), Packing.from_lengths([4, 5])
    for width in (*WIDTHS, 1, 99):
        step = Step.of(packing, width=(5, width, 7))
        assert torch.allclose(branch(x, step), formula(branch, x, min(width, 12)), rtol=1e-12, atol=1e-12)
    indices = torch.randint(3, (9,))
    step = Step.of(packing, width=TokenWidths(indices, WIDTHS))
    expected = torch.stack([formula(branch, row[None], WIDTHS[i])[0] for row, i in zip(x, indices, strict=True)])
    out = branch(x, step)
    assert torch.allclose(out, expected, rtol=1e-12, atol=1e-12)
    weights = list(branch.parameters())
    for one, other in zip(
        torch.autograd.grad(out.square().sum(), weights),
        torch.autograd.grad(expected.square().sum(), weights),
        strict=True,
    ):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-10)


def test_cut_weights_are_copies_of_the_first_dimensions() -> None:
    branch = NestedFeedForward(8, 12, 0, bias=True)
    small = NestedFeedForward(8, 5, 0, bias=True)
    small.load_state_dict(branch.cut(5))
    x, packing = torch.randn(6, 8), Packing.from_lengths([6])
    with torch.no_grad():
        assert torch.allclose(small(x, Step.of(packing)), branch(x, Step.of(packing, width=(5,))), atol=1e-6)
    own = {p.untyped_storage().data_ptr() for p in branch.parameters()}
    assert not own & {weight.untyped_storage().data_ptr() for weight in branch.cut(12).values()}


def test_no_tokens() -> None:
    branch, packing = NestedFeedForward(8, 12, 0), Packing.from_lengths([0])
    for width in (None, (3,), TokenWidths(torch.zeros(0, dtype=torch.int64), WIDTHS)):
        assert branch(torch.zeros(0, 8), Step.of(packing, width=width)).shape == (0, 8)
