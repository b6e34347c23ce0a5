"""Normalisation by the root mean square (RMSNorm, arXiv 1910.07467), for itself and before GELU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._register import register_op
from ._rows import statistics_like
from .examples import norm as examples
from .reference import norm as reference

# ---- add + residual + RMSNorm ----


def _rms_norm_fake(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float = 1e-6, *, return_sum: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape if return_sum else (0,)), statistics_like(x)


def _rms_norm_backward_fake(
    dout: Tensor, dsum: Tensor | None, sum: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    return sum.new_empty(sum.shape), weight.new_empty(weight.shape)


def _rms_norm_setup(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, ...]
) -> None:
    x, residual, weight, _ = inputs
    _, total, rstd = output
    ctx.set_materialize_grads(False)
    if keyword_only_inputs["return_sum"]:
        ctx.mark_non_differentiable(rstd)
        ctx.save_for_backward(weight, rstd, total)
    else:
        ctx.mark_non_differentiable(total, rstd)
        ctx.save_for_backward(weight, rstd, x, residual)


def _rms_norm_gradient(ctx: Any, dout: Tensor | None, dsum: Tensor | None, drstd: None) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad
    if dout is None:
        # The sum alone is used, which x and residual share; the norm has no part in it.
        return dsum if needed[0] else None, dsum if needed[1] else None, None, None
    weight, rstd, total, *terms = ctx.saved_tensors
    # Without a saved sum it is computed again: this trades a pass for the memory of one more activation.
    for term in terms:
        total = total if term is None else (total + term).to(total.dtype)
    dx, dweight = _rms_norm_backward(dout, dsum, total, weight, rstd)
    # One tensor for x and residual, as torch's add hands it on: leaves take a copy of a gradient that is shared.
    return dx if needed[0] else None, dx if needed[1] else None, dweight if needed[2] else None, None


_rms_norm_backward = register_op(
    "add_residual_rms_norm_backward",
    reference=reference.add_residual_rms_norm_backward,
    fake=_rms_norm_backward_fake,
    example=examples.add_residual_rms_norm_backward,
)
_rms_norm = register_op(
    "add_residual_rms_norm",
    reference=reference.add_residual_rms_norm,
    fake=_rms_norm_fake,
    example=examples.add_residual_rms_norm,
    backward=_rms_norm_gradient,
    setup_context=_rms_norm_setup,
    autocast=("x", "residual"),
)


def add_residual_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float = 1e-6, *, return_sum: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm(x + residual) over the last dimension (arXiv 1910.07467, equation 4), in one pass over memory.

    sum = x + residual;  out = sum / sqrt(mean(sum^2) + eps) * weight

    The sum and its mean square are made in float32 (float64 for float64), and what is returned is rounded once.

    Args:
        x: [..., N], float16, bfloat16, float32 or float64.
        residual: the shape and dtype of x, or None.
        weight: [N], x's dtype or float32.
        eps: added to the mean square, at least 0. A row of zeros gives zeros, also with 0.
        return_sum: also return the sum in x's dtype, which pre-norm models carry on.

    Returns:
        out like x, or (out, sum). Under autocast x and residual are cast, the weight is not.

    Raises:
        TypeError: an argument is not a tensor, or of a wrong dtype.
        ValueError: a wrong shape, tensors on different devices, or an eps that is negative or not finite.
    """
    # The backward starts from the sum, so where there will be one it is better kept than computed again.
    keep = return_sum or (
        torch.is_grad_enabled()
        and residual is not None
        and any(isinstance(t, Tensor) and t.requires_grad for t in (x, residual, weight))
    )
    out, total, _ = _rms_norm(x, residual, weight, eps, return_sum=keep)
    return (out, total) if return_sum else out


# ---- RMSNorm + GELU ----


def _rms_norm_gelu_fake(x: Tensor, scale: float | None = None, eps: float = 0.0, approximate: str = "none") -> Tensor:
    return x.new_empty(x.shape)


def _rms_norm_gelu_backward_fake(
    dout: Tensor, x: Tensor, scale: float | None = None, eps: float = 0.0, approximate: str = "none"
) -> Tensor:
    return x.new_empty(x.shape)


def _rms_norm_gelu_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *ctx.how = inputs
    ctx.save_for_backward(x)


def _rms_norm_gelu_gradient(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    return _rms_norm_gelu_backward(dout, *ctx.saved_tensors, *ctx.how), None, None, None


_rms_norm_gelu_backward = register_op(
    "rms_norm_gelu_backward",
    reference=reference.rms_norm_gelu_backward,
    fake=_rms_norm_gelu_backward_fake,
    example=examples.rms_norm_gelu_backward,
)
_rms_norm_gelu = register_op(
    "rms_norm_gelu",
    reference=reference.rms_norm_gelu,
    fake=_rms_norm_gelu_fake,
    example=examples.rms_norm_gelu,
    backward=_rms_norm_gelu_gradient,
    setup_context=_rms_norm_gelu_setup,
    autocast=("x",),
)


def rms_norm_gelu(x: Tensor, scale: float | None = None, eps: float = 0.0, approximate: str = "none") -> Tensor:
    """GELU of rows brought to one length, in one pass over memory: Theta of TokenFormer (arXiv 2410.23168).

    z = x * scale / sqrt(sum(x^2) + eps) over the last dimension;  out = GELU(z)

    Everything is made in float32 (float64 for float64) and rounded once. For the backward x alone is kept.

    Args:
        x: [..., N], float16, bfloat16, float32 or float64.
        scale: the length of the rows of z, from -1e10 to 1e10. None is sqrt(N), with which this is an RMSNorm.
        eps: added to the sum of squares, at least 0. A row of zeros gives zeros, also with 0, and its gradient is zero.
        approximate: GELU by "none" (erf) or "tanh".

    Returns:
        like x. Under autocast x is cast.

    Raises:
        TypeError: an argument is not a tensor, or of a wrong dtype.
        ValueError: a wrong shape, a scale beyond 1e10, an eps that is negative or not finite, an unknown `approximate`.
    """
    return _rms_norm_gelu(x, scale, eps, approximate)
