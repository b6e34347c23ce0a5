"""Stencils over images whose channels come last: PoolFormer's pooling mixer and a depthwise convolution."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from .. import _autocast
from ._dtypes import accumulation_dtype
from ._register import register_op
from .examples import spatial as examples
from .reference import spatial as reference

# ---- the pooling mixer ----


def _pool_mixer_fake(
    x: Tensor, weight: Tensor, scale: Tensor | None = None, *, pool_size: int = 3, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    wide = accumulation_dtype(x.dtype)
    return x.new_empty(x.shape), x.new_empty(x.size(0), dtype=wide), x.new_empty(x.size(0), dtype=wide)


def _pool_mixer_backward_fake(
    dout: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None, mean: Tensor, rstd: Tensor, *, pool_size: int = 3
) -> tuple[Tensor, Tensor, Tensor]:
    dscale = weight.new_empty(0) if scale is None else scale.new_empty(scale.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dscale


def _pool_mixer_setup(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, ...]
) -> None:
    x, weight, scale = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, scale, mean, rstd)
    ctx.pool_size = keyword_only_inputs["pool_size"]


def _pool_mixer_gradient(ctx: Any, dout: Tensor, dmean: None, drstd: None) -> tuple[Tensor | None, ...]:
    gradients = _pool_mixer_backward(dout, *ctx.saved_tensors, pool_size=ctx.pool_size)
    return tuple(g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad, strict=False))


_pool_mixer_backward = register_op(
    "pool_mixer_backward",
    reference=reference.pool_mixer_backward,
    fake=_pool_mixer_backward_fake,
    example=examples.pool_mixer_backward,
)
_pool_mixer = register_op(
    "pool_mixer",
    reference=reference.pool_mixer,
    fake=_pool_mixer_fake,
    example=examples.pool_mixer,
    backward=_pool_mixer_gradient,
    setup_context=_pool_mixer_setup,
    autocast=("x",),
)


def pool_mixer(
    x: Tensor, weight: Tensor, scale: Tensor | None = None, *, pool_size: int = 3, eps: float = 1e-5
) -> Tensor:
    """PoolFormer's mixer with its norm, layer scale and residual (arXiv 2111.11418, equations 1 to 3).

    n = GroupNorm(1)(x);  out = x + scale * (P n - n), where P is the mean over the pool_size x pool_size neighbours
    that exist. P of a constant is this constant, so the norm's mean and its bias cancel, and the op takes no bias:

    out = x + scale_c weight_c rstd_b (P x - x);  rstd_b = 1 / sqrt(var_b + eps), var_b over height, width and channels

    Computed in float32 (float64 for float64) and rounded once.

    Args:
        x: [B, H, W, C], channels last, float16, bfloat16, float32 or float64.
        weight: [C], the norm's, in x's dtype or float32.
        scale: [C], the layer scale, as weight, or None for 1.
        pool_size: an odd number; on a GPU there are kernels for 3, 5 and 7.
        eps: added to the variance, at least 0. With 0 a sample of equal numbers has no result.

    Returns:
        out like x. Gradients reach x, weight and scale and repeat bit by bit. Under autocast x is cast, weight and
        scale are not.

    Raises:
        TypeError: an argument is not a tensor, or of a wrong dtype.
        ValueError: a wrong shape, tensors on different devices, an even pool_size, or an eps that is negative or not
            finite.
    """
    if isinstance(x, Tensor) and _autocast.enabled(x.device) and x.dtype != torch.float64:
        weight, scale = cast("Tensor", _autocast.beside_cast(weight, x)), _autocast.beside_cast(scale, x)
    return _pool_mixer(x, weight, scale, pool_size=pool_size, eps=eps)[0]


# ---- the depthwise convolution ----


def _conv_fake(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str = "linear") -> Tensor:
    return x.new_empty(x.shape)


def _conv_backward_fake(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *, activation: str = "linear"
) -> tuple[Tensor, Tensor, Tensor]:
    dbias = weight.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias


def _conv_setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)
    ctx.activation = keyword_only_inputs["activation"]


def _conv_gradient(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _depthwise_conv2d_backward(dout, *ctx.saved_tensors, activation=ctx.activation)
    return tuple(g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad, strict=False))


_depthwise_conv2d_backward = register_op(
    "depthwise_conv2d_backward",
    reference=reference.depthwise_conv2d_backward,
    fake=_conv_backward_fake,
    example=examples.depthwise_conv2d_backward,
)
_depthwise_conv2d = register_op(
    "depthwise_conv2d",
    reference=reference.depthwise_conv2d,
    fake=_conv_fake,
    example=examples.depthwise_conv2d,
    backward=_conv_gradient,
    setup_context=_conv_setup,
    autocast=("x", "weight", "bias"),
)


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str = "linear") -> Tensor:
    """A depthwise convolution of stride 1, with zeros around x, and an activation, channels last, in one pass.

    pre[b, h, w, c] = bias_c + sum over i, j of weight[c, i, j] x[b, h + i - k // 2, w + j - k // 2, c];  out = act(pre)

    That is torch's conv2d with groups = C and padding = k // 2 between two permutations. With GELU it is the middle of
    SegFormer's Mix-FFN (arXiv 2105.15203, equation 3). Computed in float32 (float64 for float64) and rounded once.

    Args:
        x: [B, H, W, C], channels last, float16, bfloat16, float32 or float64.
        weight: [C, k, k] in x's dtype: Conv2d's without its second dimension; k is odd. On a GPU there are kernels for
            3, 5 and 7.
        bias: [C] in x's dtype, or None.
        activation: "linear", "gelu" (by erf) or "relu".

    Returns:
        out like x. Gradients reach all three and repeat bit by bit; for the backward x is kept, and pre is made again.
        Under autocast all three are cast.

    Raises:
        TypeError: an argument is not a tensor, or of a wrong dtype.
        ValueError: a wrong shape, tensors on different devices, an even k, or an unknown activation.
    """
    return _depthwise_conv2d(x, weight, bias, activation=activation)
