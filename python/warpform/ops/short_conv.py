"""A short causal convolution, a split and a gate: from a projection to the operands of a long convolution."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._register import register_op
from .examples import short_conv as examples
from .reference import short_conv as reference


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    shape = (x.size(0), x.size(2) // 3, x.size(1))
    return x.new_empty(shape), x.new_empty(shape)


def _backward_fake(
    dgated: Tensor, dgate: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    dbias = x.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Any, dgated: Tensor, dgate: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _short_conv_gate_backward(dgated, dgate, *ctx.saved_tensors)
    return tuple(g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad, strict=False))


_short_conv_gate_backward = register_op(
    "short_conv_gate_backward",
    reference=reference.short_conv_gate_backward,
    fake=_backward_fake,
    example=examples.short_conv_gate_backward,
)
_short_conv_gate = register_op(
    "short_conv_gate",
    reference=reference.short_conv_gate,
    fake=_fake,
    example=examples.short_conv_gate,
    backward=_gradient,
    setup_context=_setup,
    autocast=("x", "weight", "bias"),
)


def short_conv_gate(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A short causal depthwise convolution, its split in three and the first gate (Monarch Mixer, arXiv 2310.12109).

    c[b, ch, t] = bias[ch] + sum_j weight[ch, j] x[b, t - (K - 1) + j, ch], with zeros before the first token
    gated = c[:, 2 D : 3 D] * c[:, : D];  gate = c[:, D : 2 D]

    That is torch's depthwise Conv1d of padding K - 1, cut to L, between two transpositions, in one pass over memory.

    Args:
        x: [B, L, 3 D], channels last, float16, bfloat16, float32 or float64.
        weight: [3 D, K] in x's dtype: Conv1d's without its middle dimension. Monarch Mixer's K is 3.
        bias: [3 D] in x's dtype, or None.

    Returns:
        gated and gate, both [B, D, L], channels first, like x. Computed in float32 (float64) and rounded once.
        Gradients reach all three and repeat bit by bit. Under autocast all three are cast.

    Raises:
        TypeError: an argument is not a tensor, or of a wrong dtype.
        ValueError: a wrong shape, or tensors on different devices.
    """
    return _short_conv_gate(x, weight, bias)
