"""Mixing the tokens of windows by a matrix, with the LayerNorm before it and the gate behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _autocast
from . import _check
from ._register import register_op
from ._rows import statistics_like
from .examples import window_mix as examples
from .reference import window_mix as reference


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    gate: Tensor | None,
    window_size: Sequence[int],
    *,
    dilated: bool = False,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    statistics = statistics_like(x if norm_weight is not None else x.new_empty(0, 1))
    return x.new_empty(x.shape), statistics, statistics.new_empty(statistics.shape)


def _backward_fake(dout: Tensor, x: Tensor, *tensors: Any, dilated: bool = False) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), *(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in tensors[:5])


def _setup(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    *tensors, ctx.window_size = inputs
    ctx.dilated = keyword_only_inputs["dilated"]
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, mean, rstd)


def _gradient(ctx: Any, dout: Tensor | None, dmean: None, drstd: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 7
    gradients = _window_mix_backward(dout, *ctx.saved_tensors, ctx.window_size, dilated=ctx.dilated)
    return (*(g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad[:6], strict=True)), None)


_window_mix_backward = register_op(
    "window_mix_backward",
    reference=reference.window_mix_backward,
    fake=_backward_fake,
    example=examples.window_mix_backward,
)
_window_mix = register_op(
    "window_mix",
    reference=reference.window_mix,
    fake=_fake,
    example=examples.window_mix,
    backward=_gradient,
    setup_context=_setup,
    autocast=("x", "weight", "bias", "gate"),
)


def window_mix(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    window_size: int | Sequence[int],
    dilated: bool = False,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    gate: Tensor | None = None,
) -> Tensor:
    """Mixes the tokens of each window by a matrix, every channel by itself: MAXIM's spatial gating (arXiv 2201.02973).

    y_i = sum_j weight_ij LayerNorm(x)_j + bias_i over the n tokens of a window;  out = gate * (y + 1), or y

    The spatial gating unit of gMLP (arXiv 2105.08050, section 2.1) is this over one window. Here windows are cut by
    arithmetic on indices: no window is moved in memory, and neither the normal tokens nor y are written.

    Args:
        x: [B, H, W, C], float16, bfloat16, float32 or float64. Tokens may be part of wider rows, as the halves of one
            product are; other layouts are copied, and such rows too by the backward of a norm of more than 64 channels.
        weight: [n, n] in x's dtype, n = wh * ww; a row for each token that is made.
        bias: [n] in x's dtype, or None.
        window_size: tokens along each axis of a window, one number or (wh, ww). They divide H and W. CUDA kernels take
            n up to 1024, as far as shared memory goes: in float32 768 on Hopper and 512 on an A100.
        dilated: False: windows are blocks of adjacent tokens. True: a window has one token of each cell of a grid of
            wh x ww cells, token (a, b) of window (p, q) at (a * H / wh + p, b * W / ww + q).
        norm_weight: [C], x's dtype or float32: a LayerNorm over the channels of each token stands before the product.
            None: there is none.
        norm_bias: [C] in norm_weight's dtype, or None. It needs norm_weight.
        eps: of the LayerNorm, added to the variance, at least 0.
        gate: [B, H, W, C] in x's dtype, laid out in any way that x may be, or None.

    Returns:
        [B, H, W, C] like x, contiguous. Sums are float32 (float64); 16-bit kernels also round the normal tokens before
        the product. Gradients reach all tensors and repeat bit by bit. Under autocast x, weight, bias and gate are
        cast, the parameters of the norm are not.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong shape, windows that do not divide the grid, norm_bias without norm_weight, tensors on
            different devices, an eps that is negative or not finite.
    """
    op = "window_mix"
    _check.tensor(op, "x", x)
    window = _check.per_axis(op, "window_size", window_size, 2)
    if _autocast.enabled(x.device) and x.dtype != torch.float64:
        norm_weight, norm_bias = (_autocast.beside_cast(t, x) for t in (norm_weight, norm_bias))
    out, _, _ = _window_mix(x, weight, bias, norm_weight, norm_bias, gate, window, dilated=dilated, eps=eps)
    return out
