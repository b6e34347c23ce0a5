"""GELU in float32 at every place: how far roundings can carry it, counted along the kernels' formulas."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# The relative error of one rounding to float32, and those of CUDA's functions: erff and ex2.approx may be off by 2
# units in the last place, rcp.approx by 1 (CUDA C++ Programming Guide, mathematical functions; PTX ISA).
ROUNDING = 2.0**-24
ERF, EXP2, RECIPROCAL = 4 * ROUNDING, 4 * ROUNDING, 2 * ROUNDING


def check_gelu_everywhere(library: Any, approximate: str, steps: int, device: str = "cpu") -> None:
    """Value and derivative in fine steps through both tails, every one by the bound of its place."""
    x = torch.linspace(-14, 14, steps, device=device)
    leaf = x.double().requires_grad_()
    # The definition of the tanh form cancels in the left tail, even in float64; 0.5 (1 + tanh(u)) = sigmoid(2 u).
    value = torch.nn.functional.gelu(leaf) if approximate == "none" else leaf * torch.sigmoid(_twice_u(leaf))
    (derivative,) = torch.autograd.grad(value.sum(), leaf)
    bounds = {"none": erf_bounds, "tanh": tanh_bounds}[approximate](x.double())
    out = library.bias_gelu(x, None, approximate)
    dx, _ = library.bias_gelu_backward(torch.ones_like(x), x, None, approximate)
    for name, found, exact, bound in zip(("out", "dx"), (out, dx), (value.detach(), derivative), bounds, strict=True):
        share = (found.double() - exact).abs() / bound
        worst = int(share.argmax())
        assert share[worst] <= 1, (
            f"{name} at {float(x[worst]):.6g}: {float(found[worst]):.9g}, exactly {float(exact[worst]):.9g}, "
            f"{float(share[worst]):.3g} times what roundings explain"
        )


def erf_bounds(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of x Phi and Phi + x density, with Phi = 0.5 + 0.5 erf(x / sqrt(2)) and density = c exp2(k x x).

    x in float64. What counts as a rounding: every product and sum of two results, and every constant.
    """
    phi, density = torch.special.ndtr(x), (-x * x / 2).exp() / math.sqrt(2 * math.pi)
    # The argument has 2 roundings, and d Phi = density dx. In the left tail 0.5 cancels erf, which is near -1, and not
    # its error: there Phi has no correct digits in the end.
    phi_error = 2 * ROUNDING * x.abs() * density + 0.5 * ERF * torch.erf(x / math.sqrt(2)).abs() + ROUNDING * phi
    value = x.abs() * (phi_error + ROUNDING * phi)
    # The exponent has 3 roundings, and x x / 2 is its size in units of e. Then come c and two products.
    term = x.abs() * density
    term_error = term * (3 * ROUNDING * x * x / 2 + EXP2 + 3 * ROUNDING)
    derivative = phi_error + term_error + ROUNDING * (phi + x * density).abs()
    return _at_least_the_smallest(value, derivative)


def tanh_bounds(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of x s and s + x s (e s) k (1 + 3 c x x), with e = exp2(k' x (1 + c x x)) and s = 1 / (1 + e).

    x in float64. Nothing cancels: where the result is small its error is, too.
    """
    c, scale = 0.044715, math.sqrt(8 / math.pi)
    exponent = _twice_u(x)
    s, rest = torch.sigmoid(exponent), torch.sigmoid(-exponent)
    # c x x has 3 roundings, which count by its share of 1 + c x x; the sum, k', and two products have 4.
    e_error = exponent.abs() * (4 + 3 * _share(c * x * x)) * ROUNDING + EXP2
    # d s / s = -(1 - s) d e / e; then the sum 1 + e and the reciprocal.
    s_error = rest * e_error + ROUNDING + RECIPROCAL
    value = x.abs() * s * (s_error + ROUNDING)
    # s (e s) is s (1 - s): d of it is |1 - 2 s| d e / e at most, and twice what s adds of its own. Then come 2 products
    # in it; 1 + 3 c x x, as above; the sum, k, and two products.
    term = x.abs() * s * rest * scale * (1 + 3 * c * x * x)
    own = 2 * (ROUNDING + RECIPROCAL) + (2 + 3 * _share(3 * c * x * x) + 5) * ROUNDING
    derivative = s * s_error + term * ((1 - 2 * s).abs() * e_error + own)
    derivative = derivative + ROUNDING * (s + term.copysign(x)).abs()
    return _at_least_the_smallest(value, derivative)


def _twice_u(x: Tensor) -> Tensor:
    """2 u, of 0.5 x (1 + tanh(u))."""
    return math.sqrt(8 / math.pi) * x * (1 + 0.044715 * x * x)


def _share(t: Tensor) -> Tensor:
    """Of t in 1 + t."""
    return t / (1 + t)


def _at_least_the_smallest(*bounds: Tensor) -> tuple[Tensor, ...]:
    """Below the smallest normal number there is no relative accuracy: the hardware's functions give 0 there.

    It may be multiplied by x and by 1 + 3 c x x, which are below 14 and 30.
    """
    return tuple(bound + 14 * 30 * torch.finfo(torch.float32).tiny for bound in bounds)
