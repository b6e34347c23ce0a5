"""Weights for each class of tokens, such as its modality (Mixture-of-Transformers, arXiv 2411.04996)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import _torch_private, ops
from ..ops import RoutingPlan
from ._product import PLAIN_TENSORS, linear
from .stack import Step


class _OfClasses(nn.Module):
    """A module with parameters [num_classes, ...]; a plan says which of them each token gets."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"{type(self).__name__}: num_classes must be at least 1, got {num_classes}")
        self.num_classes = num_classes

    def at_step(self, x: Tensor, step: Step) -> Tensor:
        """forward(x, step.plan)."""
        out: Tensor = self(x, step.plan)
        return out

    def _check(self, x: Tensor, plan: RoutingPlan | None) -> None:
        if plan is None and self.num_classes == 1:
            return
        name = type(self).__name__
        if not isinstance(plan, RoutingPlan):
            raise TypeError(f"{name}: plan must be a RoutingPlan, as RoutingPlan.by_class makes it, got {plan!r}")
        if plan.num_classes != self.num_classes or plan.tokens != x.shape[0] or plan.num_groups != 1:
            raise ValueError(
                f"{name}: plan must be of {self.num_classes} classes, {x.shape[0]} tokens and 1 group, "
                f"got {plan.num_classes}, {plan.tokens} and {plan.num_groups}"
            )


class ClassLinear(_OfClasses):
    """y_t = W_c x_t + b_c, where c is the class of token t.

    On a GPU it is `ops.hidden_gather_linear`. On a CPU it is one product for each class that has tokens. Both give the
    same to rounding. A class without tokens gets a gradient of zeros.

    Each class begins as nn.Linear does.

    Args:
        in_features, out_features, bias: as in nn.Linear.
        num_classes: C.

    Attributes:
        weight: [C, out_features, in_features].
        bias: [C, out_features], or None.

    Raises:
        ValueError: num_classes below 1.
    """

    def __init__(self, in_features: int, out_features: int, num_classes: int, bias: bool = False) -> None:
        super().__init__(num_classes)
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(num_classes, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(num_classes, out_features)) if bias else None
        bound = 1 / math.sqrt(max(in_features, 1))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor, plan: RoutingPlan | None = None) -> Tensor:
        """x: [T, in_features] -> [T, out_features].

        Args:
            x: float16, bfloat16, float32 or float64, of the weight's dtype.
            plan: `RoutingPlan.by_class` of T classes; may be None where there is one class.

        Raises:
            TypeError: no plan where there are several classes.
            ValueError: a plan of other classes or tokens.
        """
        self._check(x, plan)
        if plan is None or self.num_classes == 1:
            return linear(x, self.weight[0], None if self.bias is None else self.bias[0])
        return class_linear(x, self.weight, plan, self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, num_classes={self.num_classes}, "
            f"bias={self.bias is not None}"
        )


class ClassRMSNorm(_OfClasses):
    """y = w_c x / sqrt(mean(x^2) + eps) over the last dimension, where c is the class of the token.

    Args:
        hidden_size: of the last dimension: the width of the model, or of a head.
        num_classes: C.
        eps: is added to the mean of squares.

    Attributes:
        weight: [C, hidden_size], which begins as ones.

    Raises:
        ValueError: num_classes below 1.
    """

    def __init__(self, hidden_size: int, num_classes: int, eps: float = 1e-5) -> None:
        super().__init__(num_classes)
        self.weight = nn.Parameter(torch.ones(num_classes, hidden_size))
        self.eps = eps

    def forward(self, x: Tensor, plan: RoutingPlan | None = None) -> Tensor:
        """x: [T, hidden_size], or heads [T, H, hidden_size] -> the same shape.

        Args:
            x: floating point.
            plan: as of `ClassLinear.forward`.

        Raises:
            TypeError, ValueError: as `ClassLinear.forward`.
        """
        self._check(x, plan)
        if plan is None or self.num_classes == 1:
            out: Tensor = ops.add_residual_rms_norm(x, None, self.weight[0], self.eps)  # type: ignore[assignment]
            return out
        weight = _of_tokens(self.weight, plan)
        return F.rms_norm(x, x.shape[-1:], None, self.eps) * (weight if x.dim() == 2 else weight.unsqueeze(1))

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, num_classes={self.num_classes}, eps={self.eps}"


class ClassLayerNorm(_OfClasses):
    """y = w_c (x - mean) / sqrt(variance + eps) + b_c, where c is the class of the token.

    Mean and variance are those of the last dimension; weights may differ in the ones before it too, as Chameleon has
    them for each head (arXiv 2405.09818).

    Args:
        shape: of a token: (heads, head_dim), or (hidden_size,).
        num_classes: C.
        eps: is added to the variance.

    Attributes:
        weight, bias: [C, *shape], which begin as ones and zeros.

    Raises:
        ValueError: num_classes below 1.
    """

    def __init__(self, shape: Sequence[int], num_classes: int, eps: float = 1e-5) -> None:
        super().__init__(num_classes)
        self.weight = nn.Parameter(torch.ones(num_classes, *shape))
        self.bias = nn.Parameter(torch.zeros(num_classes, *shape))
        self.eps = eps

    def forward(self, x: Tensor, plan: RoutingPlan | None = None) -> Tensor:
        """x: [T, *shape] -> the same shape.

        Args:
            x: floating point.
            plan: as of `ClassLinear.forward`.

        Raises:
            TypeError, ValueError: as `ClassLinear.forward`.
        """
        self._check(x, plan)
        weight, bias = (
            parameter[0] if plan is None or self.num_classes == 1 else _of_tokens(parameter, plan)
            for parameter in (self.weight, self.bias)
        )
        return torch.addcmul(bias, F.layer_norm(x, x.shape[-1:], None, None, self.eps), weight)

    def extra_repr(self) -> str:
        return f"{list(self.weight.shape[1:])}, num_classes={self.num_classes}, eps={self.eps}"


def _of_tokens(parameter: Tensor, plan: RoutingPlan) -> Tensor:
    """[C, ...] -> [T, ...]: what the class of each token has."""
    return F.embedding(plan.token_class, parameter.flatten(1)).unflatten(1, parameter.shape[1:])


def class_linear(x: Tensor, weight: Tensor, plan: RoutingPlan, bias: Tensor | None = None) -> Tensor:
    """The product of `ClassLinear`, by what is faster on the device.

    At 2048 tokens, 1024 to 1024 features and 2 classes, forward and backward take 168 ms by one product for each class
    on a core of an AMD EPYC, 195 ms by `ops.hidden_gather_linear`, and 156 ms with one weight for all; with the tokens
    sorted by class beforehand it would be 165 ms.

    Args:
        x: [T, in].
        weight: [C, out, in].
        plan: of T tokens and C classes.
        bias: [C, out], or None.

    Returns:
        [T, out].
    """
    given = [t for t in (x, weight, bias) if t is not None]
    if (
        x.device.type != "cpu"
        or torch.compiler.is_compiling()
        or _torch_private.sees_calls()
        or any(type(t) not in PLAIN_TENSORS or t.dtype != x.dtype or t.device != x.device for t in given)
        or x.dim() != 2
        or x.shape[1] != weight.shape[2]
    ):
        return ops.hidden_gather_linear(x, weight, plan, None, bias)
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        out: Tensor = _ClassLinear.apply(x, weight, bias, plan.class_rows)
        return out
    return _multiply(x, weight, bias, plan.class_rows)


def _rows(x: Tensor, rows: Tensor) -> Tensor:
    """The rows of a class; x itself where it has all of them."""
    return x if len(rows) == len(x) else x.index_select(0, rows)


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, class_rows: Sequence[Tensor]) -> Tensor:
    out = x.new_empty(x.shape[0], weight.shape[1])
    for c, rows in enumerate(class_rows):
        if len(rows):
            product = linear(_rows(x, rows), weight[c], None if bias is None else bias[c])
            if len(rows) == len(x):
                return product
            out.index_copy_(0, rows, product)
    return out


class _ClassLinear(torch.autograd.Function):
    """`_multiply` with its gradient; that gradient has none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, class_rows: Sequence[Tensor]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.class_rows = class_rows
        return _multiply(x, weight, bias, class_rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        dx = torch.empty_like(x) if need_x else None
        dweight = torch.empty_like(weight) if need_weight else None
        dbias = dout.new_zeros(weight.shape[:2]) if need_bias else None
        for c, rows in enumerate(ctx.class_rows):
            mine = _rows(dout, rows)
            if dx is not None and len(rows):
                dx.index_copy_(0, rows, linear(mine, weight[c].t()))
            if dweight is not None:
                dweight[c] = linear(mine.t(), _rows(x, rows).t()) if len(rows) else 0
            if dbias is not None:
                dbias[c] = mine.sum(0)
        return dx, dweight, dbias, None
