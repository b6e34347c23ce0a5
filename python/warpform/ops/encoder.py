"""Ops of the padding-free encoder (ByteTransformer, arXiv 2210.03052), but for attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._register import register_op
from ._rows import statistics_like
from .examples import encoder as examples
from .reference import encoder as reference

# ---- packing ----


def _packing_plan_fake(mask: Tensor, capacity: int) -> tuple[Tensor, ...]:
    batch = mask.size(0)
    return (
        mask.new_empty(batch + 1, dtype=torch.int32),
        mask.new_empty(batch, dtype=torch.int32),
        mask.new_empty(capacity, dtype=torch.int64),
        mask.new_empty(capacity, dtype=torch.int64),
        mask.new_empty(mask.shape, dtype=torch.int32),
        mask.new_empty(2, dtype=torch.int64),
    )


_packing_plan = register_op(
    "packing_plan", reference=reference.packing_plan, fake=_packing_plan_fake, example=examples.packing_plan
)


def packing_plan(mask: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Computes where the tokens of a padded batch go without its padding; `warpform.Packing` is the usual caller.

    Args:
        mask: bool or integer [B, S], nonzero where there is a token: any pattern.
        capacity: how many packed rows there are. Tokens past it are dropped, and sequences shortened accordingly.

    Returns:
        * cu_seqlens int32 [B + 1]: sequence b is packed into rows cu_seqlens[b] to cu_seqlens[b + 1].
        * lengths int32 [B].
        * indices int64 [capacity]: position b * S + s of a packed row, -1 past the last token.
        * position_ids int64 [capacity]: s of a packed row, 0 past the last token.
        * ranks int32 [B, S]: the packed row of a token, -1 where masked or dropped.
        * summary int64 [2]: number of tokens and longest sequence, before anything was dropped.

    Raises:
        TypeError: mask is not a bool or integer tensor, or capacity is not an int.
        ValueError: mask is not two-dimensional, or capacity is negative.
    """
    return _packing_plan(mask, capacity)


def _pack_fake(x: Tensor, indices: Tensor, ranks: Tensor) -> Tensor:
    return x.new_empty((indices.size(0), *x.shape[2:]))


def _unpack_fake(t: Tensor, indices: Tensor, ranks: Tensor) -> Tensor:
    return t.new_empty((*ranks.shape, *t.shape[1:]))


def _save_packing(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _pack_gradient(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    return _unpack(dout, *ctx.saved_tensors), None, None


def _unpack_gradient(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    return _pack(dout, *ctx.saved_tensors), None, None


_pack = register_op(
    "pack",
    reference=reference.pack,
    fake=_pack_fake,
    example=examples.pack,
    backward=_pack_gradient,
    setup_context=_save_packing,
)
_unpack = register_op(
    "unpack",
    reference=reference.unpack,
    fake=_unpack_fake,
    example=examples.unpack,
    backward=_unpack_gradient,
    setup_context=_save_packing,
)


def pack(x: Tensor, indices: Tensor, ranks: Tensor) -> Tensor:
    """Drops padding: row r of the result is token indices[r] of the batch, or zeros where indices[r] names none.

    Args:
        x: [B, S, ...] of any dtype and trailing shape.
        indices: int64 [N], and ranks: int32 [B, S], of one `packing_plan`. ranks serves the gradient.

    Returns:
        [N, ...]. Its gradient is `unpack`, and may be differentiated again.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: a wrong shape or index dtype, or tensors on different devices.
    """
    return _pack(x, indices, ranks)


def unpack(t: Tensor, indices: Tensor, ranks: Tensor) -> Tensor:
    """Puts packed rows back: token (b, s) of the result is row ranks[b, s] of t, or zeros where ranks[b, s] names none.

    Args:
        t: [N, ...] of any dtype and trailing shape.
        indices: int64 [N], and ranks: int32 [B, S], of one `packing_plan`. indices serves the gradient.

    Returns:
        [B, S, ...]. Its gradient is `pack`, and may be differentiated again.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: a wrong shape or index dtype, or tensors on different devices.
    """
    return _unpack(t, indices, ranks)


# ---- add + bias + residual + LayerNorm ----


def _layer_norm_fake(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    ln_bias: Tensor,
    eps: float = 1e-5,
    *,
    return_sum: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = x.new_empty(x.shape if return_sum else (0,))
    return x.new_empty(x.shape), total, statistics_like(x), statistics_like(x)


def _layer_norm_backward_fake(
    dout: Tensor, dsum: Tensor | None, sum: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    parameters = [weight.new_empty(weight.shape) for _ in range(3)]
    return sum.new_empty(sum.shape), parameters[0], parameters[1], parameters[2]


def _layer_norm_setup(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, ...]
) -> None:
    x, bias, residual, weight, _, _ = inputs
    _, total, mean, rstd = output
    ctx.has_sum = keyword_only_inputs["return_sum"]
    ctx.set_materialize_grads(False)
    if ctx.has_sum:
        ctx.mark_non_differentiable(mean, rstd)
        ctx.save_for_backward(weight, mean, rstd, total)
    else:
        ctx.mark_non_differentiable(total, mean, rstd)
        ctx.save_for_backward(weight, mean, rstd, x, bias, residual)


def _layer_norm_gradient(
    ctx: Any, dout: Tensor | None, dsum: Tensor | None, dmean: None, drstd: None
) -> tuple[Tensor | None, ...]:
    weight, mean, rstd, total, *terms = ctx.saved_tensors
    # Without a saved sum it is computed again: this trades a pass for the memory of one more activation.
    for term in terms:
        total = total if term is None else (total + term).to(total.dtype)
    if dout is None:
        if dsum is None:
            return (None,) * 6
        dout = torch.zeros_like(dsum)
    dx, dbias, dweight, dln_bias = _layer_norm_backward(dout, dsum, total, weight, mean, rstd)
    needed = ctx.needs_input_grad
    return (
        dx if needed[0] else None,
        dbias if needed[1] else None,
        # One tensor for both inputs, as torch's add hands it on: leaves take a copy of a gradient that is shared.
        dx if needed[2] else None,
        dweight if needed[3] else None,
        dln_bias if needed[4] else None,
        None,
    )


_layer_norm_backward = register_op(
    "add_bias_residual_layer_norm_backward",
    reference=reference.add_bias_residual_layer_norm_backward,
    fake=_layer_norm_backward_fake,
    example=examples.add_bias_residual_layer_norm_backward,
)
_layer_norm = register_op(
    "add_bias_residual_layer_norm",
    reference=reference.add_bias_residual_layer_norm,
    fake=_layer_norm_fake,
    example=examples.add_bias_residual_layer_norm,
    backward=_layer_norm_gradient,
    setup_context=_layer_norm_setup,
    autocast=("x", "residual"),
)


def add_bias_residual_layer_norm(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    ln_bias: Tensor,
    eps: float = 1e-5,
    *,
    return_sum: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm(x + bias + residual) over the last dimension (arXiv 1607.06450), in one pass over memory.

    sum = x + bias + residual;  out = (sum - mean(sum)) / sqrt(var(sum) + eps) * weight + ln_bias

    The sum and its statistics are made in float32 (float64 for float64) and rounded once.

    Args:
        x: [..., N], float16, bfloat16, float32 or float64.
        bias: [N] or None.
        residual: the shape and dtype of x, or None.
        weight, ln_bias: [N]. bias, weight and ln_bias are of one dtype, that of x or float32.
        eps: added to the variance, at least 0. With 0 a row of equal numbers has no result, and gives NaN.
        return_sum: also return the sum in x's dtype, which pre-norm models carry on.

    Returns:
        out like x, or (out, sum). Under autocast x and residual are cast, parameters are not.

    Raises:
        TypeError: an argument is not a tensor, or of a wrong dtype.
        ValueError: a wrong shape, tensors on different devices, or an eps that is negative or not finite.
    """
    # The backward starts from the sum, so where there will be one it is better kept than computed again.
    keep = return_sum or (
        torch.is_grad_enabled()
        and (bias is not None or residual is not None)
        and any(isinstance(t, Tensor) and t.requires_grad for t in (x, bias, residual, weight, ln_bias))
    )
    out, total, _, _ = _layer_norm(x, bias, residual, weight, ln_bias, eps, return_sum=keep)
    return (out, total) if return_sum else out


# ---- bias + GELU ----


def _gelu_fake(x: Tensor, bias: Tensor | None, approximate: str = "none") -> Tensor:
    return x.new_empty(x.shape)


def _gelu_backward_fake(
    dout: Tensor, x: Tensor, bias: Tensor | None, approximate: str = "none"
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0) if bias is None else bias.new_empty(bias.shape)


def _gelu_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, ctx.approximate = inputs
    ctx.save_for_backward(x, bias)


def _gelu_gradient(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    x, bias = ctx.saved_tensors
    dx, dbias = _gelu_backward(dout, x, bias, ctx.approximate)
    return dx if ctx.needs_input_grad[0] else None, dbias if ctx.needs_input_grad[1] else None, None


_gelu_backward = register_op(
    "bias_gelu_backward",
    reference=reference.bias_gelu_backward,
    fake=_gelu_backward_fake,
    example=examples.bias_gelu_backward,
)
_gelu = register_op(
    "bias_gelu",
    reference=reference.bias_gelu,
    fake=_gelu_fake,
    example=examples.bias_gelu,
    backward=_gelu_gradient,
    setup_context=_gelu_setup,
    autocast=("x",),
)


def bias_gelu(x: Tensor, bias: Tensor | None, approximate: str = "none") -> Tensor:
    """GELU(x + bias) (arXiv 1606.08415), in one pass over memory, the sum unrounded.

    Args:
        x: [..., N], float16, bfloat16, float32 or float64.
        bias: [N], x's dtype or float32, or None.
        approximate: "none" (erf) or "tanh".

    Returns:
        like x. Under autocast x is cast, the bias is not.

    Raises:
        TypeError: an argument is not a tensor, or of a wrong dtype.
        ValueError: a wrong shape, an unknown `approximate`, or tensors on different devices.
    """
    return _gelu(x, bias, approximate)
