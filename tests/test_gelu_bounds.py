"""What helpers.gelu demands of a float32 GELU: the kernels' formulas meet it, slightly wrong ones do not."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from helpers.gelu import DENOMINATOR, NUMERATOR, QUOTIENT_END, check_gelu_everywhere

STEPS = 4001


class Formulas:
    """The kernels' formulas by torch in float32; constants with so many digits, and `other` for the other form's."""

    def __init__(self, digits: int = 9, other: bool = False) -> None:
        self.digits, self.other = digits, other

    def constant(self, value: float) -> float:
        return float(f"{value:.{self.digits}g}")

    def phi(self, x: Tensor) -> Tensor:
        return 0.5 + 0.5 * torch.erf(x * self.constant(0.7071067811865475))

    def exponential(self, x: Tensor) -> Tensor:
        return torch.exp2(self.constant(-2.302208198144325) * x * (1 + self.constant(0.044715) * x * x))

    def bias_gelu(self, x: Tensor, bias: None, approximate: str) -> Tensor:
        if (approximate == "none") != self.other:
            return x * self.phi(x)
        return x * (1 / (1 + self.exponential(x)))

    def bias_gelu_backward(self, dout: Tensor, x: Tensor, bias: None, approximate: str) -> tuple[Tensor, None]:
        if (approximate == "none") != self.other:
            density = self.constant(0.3989422804014327) * torch.exp2(-self.constant(0.7213475204444817) * x * x)
            return self.phi(x) + x * density, None
        x = x.clamp(-10, 10)
        e = self.exponential(x)
        s = 1 / (1 + e)
        slope = self.constant(1.5957691216057308) * (1 + self.constant(0.134145) * x * x)
        return s + x * (s * (e * s)) * slope, None


class QuotientFormulas(Formulas):
    """Those of the CPU kernels, where erf is a quotient of polynomials."""

    def phi(self, x: Tensor) -> Tensor:
        numerator, denominator = (self.polynomial(c, x * x) for c in (NUMERATOR, DENOMINATOR))
        half_erf = torch.where(x.abs() > QUOTIENT_END, 0.5 * x.sign(), x * numerator / denominator)
        return (0.5 + half_erf).clamp(min=0)

    def polynomial(self, coefficients: Sequence[float], square: Tensor) -> Tensor:
        value = torch.full_like(square, self.constant(coefficients[-1]))
        for coefficient in coefficients[-2::-1]:
            fused = value.double() * square + torch.tensor(self.constant(coefficient))
            value = fused.float()
        return value


by_form = pytest.mark.parametrize("approximate", ("none", "tanh"))


@by_form
def test_roundings_are_explained(approximate: str) -> None:
    check_gelu_everywhere(Formulas(), approximate, STEPS)


@by_form
@pytest.mark.parametrize(
    "wrong", (Formulas(digits=4), Formulas(digits=5), Formulas(other=True)), ids=("4", "5", "other")
)
def test_what_is_wrong_is_not(approximate: str, wrong: Formulas) -> None:
    with pytest.raises(AssertionError, match="times what roundings explain"):
        check_gelu_everywhere(wrong, approximate, STEPS)


def test_roundings_of_a_quotient_are_explained() -> None:
    check_gelu_everywhere(QuotientFormulas(), "none", STEPS, quotient=True)


@pytest.mark.parametrize("digits", (4, 5, 6))
def test_what_is_wrong_in_a_quotient_is_not(digits: int) -> None:
    with pytest.raises(AssertionError, match="times what roundings explain"):
        check_gelu_everywhere(QuotientFormulas(digits), "none", STEPS, quotient=True)
