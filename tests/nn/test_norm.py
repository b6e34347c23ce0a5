"""The normalised sum and the sum of a block that normalises first."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from helpers.compare import assert_close
from warpform.nn.norm import norm_of_sum


def made(dtype: torch.dtype = torch.float32) -> tuple[nn.LayerNorm, Tensor, Tensor, Tensor]:
    """A norm whose weights are not those of its beginning; x and residual [2, 5, 12], bias [12]."""
    draw = torch.Generator().manual_seed(1)
    norm = nn.LayerNorm(12, 1e-3)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(12, generator=draw))
    x, residual = (torch.randn(2, 5, 12, generator=draw) for _ in range(2))
    return norm.to(dtype), x.to(dtype), torch.randn(12, generator=draw).to(dtype), residual.to(dtype)


def plain(norm: nn.Module, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """What `norm_of_sum` says that it computes."""
    for term in (bias, residual):
        x = x if term is None else x + term
    return norm(x), x


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_it_is_the_norm_of_the_sum(with_bias: bool, with_residual: bool) -> None:
    runs = []
    for function, dtype in ((norm_of_sum, torch.float32), (plain, torch.float64), (plain, torch.float32)):
        norm, x, bias, residual = made(dtype)
        x.requires_grad_()
        normed, total = function(norm, x, bias if with_bias else None, residual if with_residual else None)
        gradients = torch.autograd.grad((normed * total).sum(), (x, *norm.parameters()))
        runs.append((normed, total, *gradients))
    for name, *results in zip(("norm", "sum", "dx", "dweight", "dbias"), *runs, strict=True):
        assert_close(name, *results, gradient=name.startswith("d"))


def test_a_hook_sees_the_sum() -> None:
    norm, x, bias, residual = made()
    before, seen = norm_of_sum(norm, x, bias, residual), []
    norm.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    after = norm_of_sum(norm, x, bias, residual)
    assert len(seen) == 1 and torch.equal(seen[0], after[1])
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other)
