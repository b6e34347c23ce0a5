"""Linear layers whose input or output is routed: each token reads, or writes, its groups of hidden dimensions alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _check
from ._dtypes import accumulation_dtype
from ._register import register_op
from .examples import hidden as examples
from .reference import hidden as reference
from .routing import RoutingPlan


def _gather_fake(x: Tensor, w: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.size(0), w.size(-2))


def _gather_backward_fake(
    dout: Tensor, x: Tensor, w: Tensor, gates: Tensor | None, *plan: Any
) -> tuple[Tensor, Tensor]:
    shape = (0,) if gates is None else gates.shape
    return x.new_empty(x.shape), x.new_empty(shape, dtype=accumulation_dtype(x.dtype))


def _scatter_fake(
    x: Tensor, w: Tensor, gates: Tensor | None, bias: Tensor | None, keep_ungated: bool, *plan: Any
) -> tuple[Tensor, Tensor]:
    shape = (x.size(0), w.size(-2))
    return x.new_empty(shape), x.new_empty(shape if keep_ungated else (0,))


def _scatter_backward_fake(
    dout: Tensor, ungated: Tensor | None, w: Tensor, gates: Tensor | None, *plan: Any
) -> tuple[Tensor, Tensor]:
    shape = (0,) if ungated is None else (dout.size(0), plan[6])
    return dout.new_empty(dout.size(0), w.size(-1)), dout.new_empty(shape, dtype=accumulation_dtype(dout.dtype))


def _weight_fake(x: Tensor, dy: Tensor, gates: Tensor | None, routed_out: bool, *plan: Any) -> Tensor:
    return x.new_empty(plan[7], dy.size(1), x.size(1), dtype=accumulation_dtype(x.dtype))


def _save_gather(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w, gates, bias, *tensors, ctx.num_groups, ctx.num_classes = inputs
    ctx.bias = bias is not None and bias.dim()
    ctx.save_for_backward(x, w, gates, *tensors)


def _gather_gradient(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    x, w, gates, *tensors = ctx.saved_tensors
    plan = (*tensors, ctx.num_groups, ctx.num_classes)
    need_x, need_w, need_gates, need_bias = ctx.needs_input_grad[:4]
    dx = dw = dgates = dbias = None
    if need_x or need_gates:
        dx, dgates = _gather_backward(dout, x, w, gates, *plan)
    if need_w:
        dw = _weight_grad(x, dout, gates, False, *plan).view(w.shape).to(w.dtype)
    if need_bias:
        dbias = _sum_of_tokens(dout, ctx.bias, plan).to(w.dtype)
    return (dx if need_x else None), dw, (dgates if need_gates else None), dbias, *(None,) * 8


def _save_scatter(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, w, gates, bias, ctx.kept, *tensors, ctx.num_groups, ctx.num_classes = inputs
    ctx.bias = bias is not None and bias.dim()
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, w, gates, output[1], *tensors)


def _scatter_gradient(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 13
    x, w, gates, ungated, *tensors = ctx.saved_tensors
    plan = (*tensors, ctx.num_groups, ctx.num_classes)
    need_x, need_w, need_gates, need_bias = ctx.needs_input_grad[:4]
    dx = dw = dgates = dbias = None
    if need_gates and not ctx.kept:
        raise RuntimeError("hidden_scatter_linear: gates have a gradient, so call it with keep_ungated")
    if need_x or need_gates:
        dx, dgates = _scatter_backward(dout, ungated if need_gates else None, w, gates, *plan)
    if need_w:
        dw = _weight_grad(x, dout, gates, True, *plan).view(w.shape).to(w.dtype)
    if need_bias:
        there = reference.unpack_bits(plan[0], ctx.num_groups).unsqueeze(2)
        scaled = torch.where(there, dout.unflatten(1, (ctx.num_groups, -1)), 0).to(accumulation_dtype(dout.dtype))
        if gates is not None:
            scaled = scaled * torch.where(there, gates.unsqueeze(2), 0)
        dbias = _sum_of_tokens(scaled.flatten(1), ctx.bias, plan).to(w.dtype)
    return (dx if need_x else None), dw, (dgates if need_gates else None), dbias, *(None,) * 9


def _sum_of_tokens(t: Tensor, dim: int, plan: tuple[Any, ...]) -> Tensor:
    """[T, n] -> [n], or of each class [C, n], for a bias of `dim` dimensions."""
    t = t.to(accumulation_dtype(t.dtype))
    if dim == 1:
        return t.sum(0)
    token_class = reference.Routing(*plan).token_class
    members = token_class == torch.arange(plan[7], device=t.device).unsqueeze(1)
    return members.to(t.dtype) @ t


_gather_backward = register_op(
    "hidden_gather_linear_backward",
    reference=reference.hidden_gather_linear_backward,
    fake=_gather_backward_fake,
    example=examples.hidden_gather_linear_backward,
)
_scatter_backward = register_op(
    "hidden_scatter_linear_backward",
    reference=reference.hidden_scatter_linear_backward,
    fake=_scatter_backward_fake,
    example=examples.hidden_scatter_linear_backward,
)
_weight_grad = register_op(
    "hidden_weight_grad", reference=reference.hidden_weight_grad, fake=_weight_fake, example=examples.hidden_weight_grad
)
_gather = register_op(
    "hidden_gather_linear",
    reference=reference.hidden_gather_linear,
    fake=_gather_fake,
    example=examples.hidden_gather_linear,
    backward=_gather_gradient,
    setup_context=_save_gather,
    autocast=("x", "w", "bias"),
)
_scatter = register_op(
    "hidden_scatter_linear",
    reference=reference.hidden_scatter_linear,
    fake=_scatter_fake,
    example=examples.hidden_scatter_linear,
    backward=_scatter_gradient,
    setup_context=_save_scatter,
    autocast=("x", "w", "bias"),
)


def hidden_gather_linear(
    x: Tensor, w: Tensor, plan: RoutingPlan, gates: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """y = sum over a token's groups g of gates_g W_g x_g, + bias: a linear layer that reads what the token uses.

    MoHD (arXiv 2412.05644). What x holds in groups that a token does not use is never used, be it NaN.

    Args:
        x: [T, N * m], N groups of m dimensions; float16, bfloat16, float32 or float64. Rows may be strided.
        w: [O, N * m] as in a linear layer, or [C, O, N * m] for a plan with classes; x's dtype. Transposed views are
            read as they are.
        plan: of T tokens and N groups. With an out_mask, O must be a multiple of its length.
        gates: [T, N], float32 (float64 for float64 inputs), of any size; they carry the activation scale. None: 1. For
            the gradient of w in float16, x times its gate must stay below 65504.
        bias: [O], or [C, O] with classes; x's dtype.

    Returns:
        [T, O] like x, summed in float32 (float64 for float64). Gradients reach x, w, gates and bias, and are the same
        bit by bit in each run.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong shape, tensors on different devices.
    """
    _check_plan("hidden_gather_linear", plan)
    return _gather(x, w, gates, bias, *plan.arguments())


def hidden_scatter_linear(
    x: Tensor, w: Tensor, plan: RoutingPlan, gates: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """y_g = gates_g (W_g x + bias_g) for a token's groups g, 0 in its others: it writes what the token uses.

    MoHD (arXiv 2412.05644). Where gates have a gradient, the result without them is kept for it, as many bytes as the
    output.

    Args:
        x: [T, K], float16, bfloat16, float32 or float64. Rows may be strided.
        w: [N * m, K] as in a linear layer, N groups of m dimensions, or [C, N * m, K] for a plan with classes; x's
            dtype. Transposed views are read as they are.
        plan: of T tokens and N groups. With an out_mask, K must be a multiple of its length.
        gates: [T, N], float32 (float64 for float64 inputs), of any size. None: 1. For the gradients of w and of gates
            in float16, the output's gradient times its gate, and the result before the gate, must stay below 65504.
        bias: [N * m], or [C, N * m] with classes; x's dtype.

    Returns:
        [T, N * m] like x. Gradients reach x, w, gates and bias, and are the same bit by bit in each run.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong shape, tensors on different devices.
    """
    _check_plan("hidden_scatter_linear", plan)
    keep = isinstance(gates, Tensor) and gates.requires_grad and torch.is_grad_enabled()
    out, _ = _scatter(x, w, gates, bias, keep, *plan.arguments())
    return out


def hidden_weight_grad(x: Tensor, dy: Tensor, plan: RoutingPlan, gates: Tensor | None = None, *, routed: str) -> Tensor:
    """The gradient of the weight of `hidden_gather_linear` (routed "in") or `hidden_scatter_linear` (routed "out").

    Args:
        x: the layer's input, [T, N * m] or [T, K].
        dy: the gradient of its output, [T, O] or [T, N * m]; x's dtype.
        plan, gates: as in the layer.
        routed: "in" or "out".

    Returns:
        float32 (float64 for float64 inputs) [O, N * m] or [N * m, K], behind [C] with classes; sum over tokens of
        dy_t (gates_g x_g)_t^T, or (gates_g dy_g)_t x_t^T. The same bit by bit in each run.

    Raises:
        TypeError, ValueError: as hidden_gather_linear, and for another `routed`.
    """
    op = "hidden_weight_grad"
    if routed not in ("in", "out"):
        raise ValueError(f'{op}: routed must be "in" or "out", got {routed!r}')
    _check_plan(op, plan)
    dw = _weight_grad(x, dy, gates, routed == "out", *plan.arguments())
    return dw if plan.num_classes > 1 else dw.squeeze(0)


def _check_plan(op: str, plan: RoutingPlan) -> None:
    if not isinstance(plan, RoutingPlan):
        raise TypeError(f"{op}: plan must be a RoutingPlan, got {_check.describe(plan)}")
