"""Attention inside the windows of a grid of tokens, shifted or not, without moving a window in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _autocast
from . import _check
from ._dtypes import accumulation_dtype
from ._register import register_op
from .examples import window as examples
from .reference import window as reference


def _fake(
    qkv: Tensor,
    relative_position_bias_table: Tensor | None,
    logit_scale: Tensor | None,
    qkv_bias: Tensor | None,
    window_size: Sequence[int],
    shift_size: Sequence[int],
    **how: Any,
) -> tuple[Tensor, Tensor]:
    batch, *grid, _, heads, head_dim = qkv.shape
    tokens = math.prod(window_size)
    windows = math.prod([(size + w - 1) // w for size, w in zip(grid, window_size, strict=True)])
    lse_dtype = accumulation_dtype(qkv.dtype)
    lse_shape = (batch, windows, heads, tokens) if tokens > reference.LSE_ABOVE else (0,)
    return qkv.new_empty((batch, *grid, heads * head_dim)), qkv.new_empty(lse_shape, dtype=lse_dtype)


def _backward_fake(dout: Tensor, *tensors: Any, **how: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    qkv, *parameters = tensors[:4]
    dqkv = qkv.new_empty(qkv.shape)
    dtable, dlogit_scale, dqkv_bias = (qkv.new_empty(0) if t is None else t.new_empty(t.shape) for t in parameters)
    return dqkv, dtable, dlogit_scale, dqkv_bias


def _setup(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, Tensor]
) -> None:
    *tensors, ctx.window_size, ctx.shift_size = inputs
    ctx.how = dict(keyword_only_inputs)
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, out, lse)


def _gradient(ctx: Any, dout: Tensor | None, dlse: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 6
    gradients = _window_attention_backward(dout, *ctx.saved_tensors, ctx.window_size, ctx.shift_size, **ctx.how)
    return (
        *(g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad[:4], strict=True)),
        *(None,) * 2,
    )


_window_attention_backward = register_op(
    "window_attention_backward",
    reference=reference.window_attention_backward,
    fake=_backward_fake,
    example=examples.window_attention_backward,
)
_window_attention = register_op(
    "window_attention",
    reference=reference.window_attention,
    fake=_fake,
    example=examples.window_attention,
    backward=_gradient,
    setup_context=_setup,
    autocast=("qkv", "qkv_bias"),
)


def window_attention(
    qkv: Tensor,
    relative_position_bias_table: Tensor | None = None,
    *,
    window_size: int | Sequence[int],
    shift_size: int | Sequence[int] = 0,
    scale: float | None = None,
    logit_scale: Tensor | None = None,
    qkv_bias: Tensor | None = None,
    mask_value: float = -100.0,
) -> Tensor:
    """Attention inside (shifted) windows: Swin (arXiv 2103.14030, eq. 4) and Swin V2 (arXiv 2111.09883, eq. 2).

    The grid is padded at its end to whole windows, rolled by -shift and cut into windows, and each token attends to
    those of its window: softmax(scale * q k^T + bias + mask) v, or with logit_scale
    softmax(cos(q, k) * exp(min(logit_scale, ln 100)) + bias + mask) v. All of that is arithmetic on indices: nothing is
    padded, rolled or copied, and no mask exists in memory.

    Args:
        qkv: [B, H, W, 3, heads, d] or [B, Z, H, W, 3, heads, d], as one product gives it; float16, bfloat16, float32 or
            float64. It is copied where it is not contiguous.
        relative_position_bias_table: [prod(2 w - 1), heads] over the axes' windows w, in qkv's dtype or float32. Its
            row for a query at place a and a key at b is that of a - b + w - 1, the last axis fastest. Swin V2 passes
            16 * sigmoid of its MLP.
        window_size: tokens along each axis of a window, one for all axes or one for each. Taken as it is: a window
            larger than the grid is mostly padding.
        shift_size: the roll of each axis, 0 <= shift < window. Of a window that holds tokens from both sides of the
            seam, pairs across get mask_value.
        scale: d ** -0.5 by default; not with logit_scale. Any finite number by which scores stay within float32.
        logit_scale: [heads], float32, or qkv's dtype: the logarithm of the factor on the cosine. The cosine of a vector
            of length 0 is 0, and so is its gradient.
        qkv_bias: [3, heads, d], in qkv's dtype or float32: q, k and v at padded positions, which take part and are not
            masked, as in Swin, where padding comes before the product. None is 0. It is added nowhere else.
        mask_value: added once to masked pairs. Swin V2 of transformers adds -100 twice: there it is -200. It and
            entries of the table may be -inf; a token whose scores all are has output 0 and no gradients.

    Returns:
        [B, (Z,) H, W, heads * d] like qkv. Gradients reach all four tensors, are the same bit by bit in each run, and
        that of qkv_bias is of padded positions only. Under autocast qkv and qkv_bias are cast, the others are not.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong shape, a shift outside of its window, scale and logit_scale together, tensors on different
            devices, a scale that is not finite, a mask_value that is neither finite nor -inf.
    """
    op = "window_attention"
    _check.tensor(op, "qkv", qkv)
    axes = qkv.dim() - 4
    window = _check.per_axis(op, "window_size", window_size, axes)
    shift = _check.per_axis(op, "shift_size", shift_size, axes)
    if _autocast.enabled(qkv.device) and qkv.dtype != torch.float64:
        relative_position_bias_table = _autocast.beside_cast(relative_position_bias_table, qkv)
        logit_scale = _autocast.beside_cast(logit_scale, qkv)
    elif isinstance(qkv_bias, Tensor) and qkv_bias.dtype == torch.float32 and qkv.dtype in _check.FLOATS:
        qkv_bias = qkv_bias.to(qkv.dtype)  # padded positions hold it as a product's output would
    out, _ = _window_attention(
        qkv, relative_position_bias_table, logit_scale, qkv_bias, window, shift, scale=scale, mask_value=mask_value
    )
    return out
