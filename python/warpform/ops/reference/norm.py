"""Definitions of RMSNorm, by itself and before GELU."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._dtypes import accumulation_dtype


def _wide(t: Tensor) -> Tensor:
    """t in the dtype that sums are made in: float32, or float64 for float64."""
    return t.to(accumulation_dtype(t.dtype))


def _inverse_root(squares: Tensor) -> Tensor:
    """1 / sqrt(squares), and 0 for 0: a row of zeros stays one. NaN stays NaN."""
    return torch.where(squares == 0, 0, squares.rsqrt())


def add_residual_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float = 1e-6, *, return_sum: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """sum = x + residual; rstd = 1 / sqrt(mean(sum^2) + eps) over the last dimension; out = sum * rstd * weight."""
    total = _wide(x)
    if residual is not None:
        total = total + residual
    if x.numel() == 0:
        rstd = total.new_zeros(x.numel() // max(x.size(-1), 1))
        out = torch.empty_like(total)
    else:
        column = _inverse_root(total.square().mean(-1, keepdim=True) + eps)
        out, rstd = (total * column).mul_(weight), column.reshape(-1)
    kept = total.to(x.dtype, copy=total is x) if return_sum else x.new_empty(0)
    return out.to(x.dtype).contiguous(), kept.contiguous(), rstd


def add_residual_rms_norm_backward(
    dout: Tensor, dsum: Tensor | None, sum: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """xhat = sum * rstd and g = dout * weight give dx = rstd * (g - xhat * mean(g * xhat)) + dsum.

    dweight is the column sums of dout * xhat.
    """
    if sum.numel() == 0:
        return torch.empty_like(sum, memory_format=torch.contiguous_format), torch.zeros_like(weight)
    column = rstd.view(*sum.shape[:-1], 1)
    xhat, wide_dout = sum * column, _wide(dout)
    g = wide_dout * weight
    along = (g * xhat).mean(-1, keepdim=True)
    dx = g.addcmul_(xhat, along, value=-1).mul_(column)
    if dsum is not None:
        dx += dsum
    dweight = (wide_dout * xhat).reshape(-1, sum.size(-1)).sum(0)
    return dx.to(sum.dtype).contiguous(), dweight.to(weight.dtype)


def _gain_of_rows(x: Tensor, scale: float | None, eps: float) -> tuple[Tensor, Tensor]:
    """x, unrounded, and scale / sqrt(sum(x^2) + eps) of each row."""
    wide = _wide(x)
    tau = math.sqrt(x.size(-1)) if scale is None else scale
    return wide, tau * _inverse_root(wide.square().sum(-1, keepdim=True) + eps)


def rms_norm_gelu(x: Tensor, scale: float | None = None, eps: float = 0.0, approximate: str = "none") -> Tensor:
    """z = x * scale / sqrt(sum(x^2) + eps) over the last dimension, scale None is its root; out = GELU(z)."""
    wide, gain = _gain_of_rows(x, scale, eps)
    return torch.ops.aten.gelu_(wide * gain, approximate=approximate).to(x.dtype).contiguous()


def rms_norm_gelu_backward(
    dout: Tensor, x: Tensor, scale: float | None = None, eps: float = 0.0, approximate: str = "none"
) -> Tensor:
    """With r = scale / sqrt(sum(x^2) + eps), u = x / sqrt(sum(x^2) + eps) and g = dout * GELU'(r x):

    dx = r * (g - u * sum(u * g)).
    """
    wide, gain = _gain_of_rows(x, scale, eps)
    g = torch.ops.aten.gelu_backward(_wide(dout), wide * gain, approximate=approximate)
    _, inverse_length = _gain_of_rows(x, 1.0, eps)
    u = wide * inverse_length
    along = (u * g).sum(-1, keepdim=True)
    return g.addcmul_(u, along, value=-1).mul_(gain).to(x.dtype).contiguous()
