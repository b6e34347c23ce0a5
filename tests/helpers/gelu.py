"""GELU in float32 at every place: how far roundings can carry it, counted along the kernels' formulas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# The relative error of one rounding to float32, and those of CUDA's functions: erff and ex2.approx may be off by 2
# units in the last place, rcp.approx by 1 (CUDA C++ Programming Guide, mathematical functions; PTX ISA).
ROUNDING = 2.0**-24
ERF, EXP2, RECIPROCAL = 4 * ROUNDING, 4 * ROUNDING, 2 * ROUNDING

# The CPU kernels' 0.5 erf(x / sqrt(2)): x times a quotient of polynomials in x^2, lowest power first. It is so far off
# before anything is rounded; from x = 5.5 on it is 0.5.
NUMERATOR = (3.989422738e-01, 3.345889215e-02, 4.651482000e-03, 1.645737301e-04, 6.301588131e-06, 2.293114062e-08)
DENOMINATOR = (1.0, 2.505354065e-01, 2.841612967e-02, 1.860645883e-03, 7.216701647e-05, 1.199027697e-06)
QUOTIENT_ERROR, QUOTIENT_END = 1.7e-8, 5.5


def check_gelu_everywhere(
    library: Any, approximate: str, steps: int, device: str = "cpu", *, quotient: bool = False
) -> None:
    """Value and derivative in fine steps through both tails, every one by the bound of its place.

    quotient: erf is that of the CPU kernels, not CUDA's.
    """
    x = torch.linspace(-14, 14, steps, device=device)
    leaf = x.double().requires_grad_()
    # The definitions cancel in the left tail, even in float64; 0.5 (1 + tanh(u)) = sigmoid(2 u).
    value = leaf * (_phi(leaf) if approximate == "none" else torch.sigmoid(_twice_u(leaf)))
    (derivative,) = torch.autograd.grad(value.sum(), leaf)
    bounds = tanh_bounds(x.double()) if approximate == "tanh" else erf_bounds(x.double(), quotient=quotient)
    out = library.bias_gelu(x, None, approximate)
    dx, _ = library.bias_gelu_backward(torch.ones_like(x), x, None, approximate)
    for name, found, exact, bound in zip(("out", "dx"), (out, dx), (value.detach(), derivative), bounds, strict=True):
        share = (found.double() - exact).abs() / bound
        worst = int(share.argmax())
        assert share[worst] <= 1, (
            f"{name} at {float(x[worst]):.6g}: {float(found[worst]):.9g}, exactly {float(exact[worst]):.9g}, "
            f"{float(share[worst]):.3g} times what roundings explain"
        )


def erf_bounds(x: Tensor, *, quotient: bool = False) -> tuple[Tensor, Tensor]:
    """Of x Phi and Phi + x density, with Phi = 0.5 + 0.5 erf(x / sqrt(2)) and density = c exp2(k x x).

    x in float64. What counts as a rounding: every product and sum of two results, and every constant.
    """
    phi, density = _phi(x), (-x * x / 2).exp() / math.sqrt(2 * math.pi)
    # The argument has 2 roundings, and d Phi = density dx. In the left tail 0.5 cancels erf, which is near -1, and not
    # its error: there Phi has no correct digits in the end.
    half_erf = 0.5 * torch.erf(x / math.sqrt(2)).abs()
    if quotient:
        half_erf_error = torch.where(x.abs() > QUOTIENT_END, _phi(-x.abs()), half_erf * _quotient_error(x * x))
        phi_error = half_erf_error + ROUNDING * phi
    else:
        phi_error = 2 * ROUNDING * x.abs() * density + ERF * half_erf + ROUNDING * phi
    value = x.abs() * (phi_error + ROUNDING * phi)
    # The exponent has 3 roundings, and x x / 2 is its size in units of e. Then come c and two products.
    term = x.abs() * density
    term_error = term * (3 * ROUNDING * x * x / 2 + EXP2 + 3 * ROUNDING)
    derivative = phi_error + term_error + ROUNDING * (phi + x * density).abs()
    return _at_least_the_smallest(value, derivative)


def _quotient_error(square: Tensor) -> Tensor:
    """The relative error of x NUMERATOR(x x) / DENOMINATOR(x x), which nothing cancels in."""
    # x x has a rounding, and the quotient changes with its root at most. Then come the product and the division.
    roundings = 0.5 + 2 + _polynomial_roundings(NUMERATOR, square) + _polynomial_roundings(DENOMINATOR, square)
    return QUOTIENT_ERROR + roundings * ROUNDING


def _polynomial_roundings(coefficients: Sequence[float], square: Tensor) -> Tensor:
    """The roundings of a polynomial in Horner's form, whose terms are positive: a fused product and sum a step."""
    value = torch.full_like(square, coefficients[-1])
    roundings = torch.ones_like(square)
    for coefficient in coefficients[-2::-1]:
        before, value = value * square, value * square + coefficient
        # What was there counts by its share, and so does the constant, unless it is exact; the sum counts as a whole.
        roundings = (before * roundings + (0 if coefficient == 1 else coefficient)) / value + 1
    return roundings


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


def _phi(x: Tensor) -> Tensor:
    """0.5 (1 + erf(x / sqrt(2))), without its cancellation."""
    return 0.5 * torch.erfc(-x / math.sqrt(2))


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
