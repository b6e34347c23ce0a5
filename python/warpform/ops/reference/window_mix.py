"""Definition of mixing the tokens of windows by a matrix (MAXIM, arXiv 2201.02973: its gated MLP on blocks and grids).

The grid [H, W] is cut into windows of n = wh * ww tokens. Inside of each, for every channel by itself,

    normal[j] = (x[j] - mean[j]) * rstd[j] * norm_weight + norm_bias     LayerNorm over the channels of token j, or x[j]
    y[i] = sum_j weight[i, j] normal[j] + bias[i]
    out[i] = gate[i] * (y[i] + 1), or y[i] without a gate

Token (a, b) of window (p, q) is at (p * wh + a, q * ww + b) of the grid. With `dilated` it is at (a * H / wh + p,
b * W / ww + q): a window has one token of each cell of a grid of wh x ww cells.

Windows are copied together once, so that each is a matrix [n, C] and all are multiplied by the weight in one batched
product; what comes out is gated on its way back to the grid. Statistics stay in the order of the tokens of the grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._dtypes import accumulation_dtype


def _wide(t: Tensor) -> Tensor:
    """t in the dtype that sums are made in: float32, or float64 for float64."""
    return t.to(accumulation_dtype(t.dtype))


def _view(x: Tensor, window_size: Sequence[int], dilated: bool) -> Tensor:
    """A view of x [B, H, W, C] as [B, rows of windows, columns of windows, wh, ww, C]."""
    high, wide = window_size
    if dilated:
        return x.unflatten(2, (wide, -1)).unflatten(1, (high, -1)).permute(0, 2, 4, 1, 3, 5)
    return x.unflatten(2, (-1, wide)).unflatten(1, (-1, high)).permute(0, 1, 3, 2, 4, 5)


def _windows(x: Tensor, window_size: Sequence[int], dilated: bool) -> Tensor:
    """The windows [windows, n, C] of x [B, H, W, C], copied together."""
    view = _view(x, window_size, dilated)
    return _wide(view).reshape(-1, math.prod(window_size), x.size(-1))


def _put(windows: Tensor, into: Tensor, window_size: Sequence[int], dilated: bool, factor: Tensor | None) -> None:
    """Writes windows [windows, n, C], times factor [B, H, W, C or 1] where there is one, to where they come from."""
    view = _view(into, window_size, dilated)
    values = windows.view(view.shape)
    if factor is None:
        view.copy_(values)
    else:
        torch.mul(values, _view(factor, window_size, dilated), out=view)


def _mixed(normal: Tensor, weight: Tensor, bias: Tensor | None, added: float) -> Tensor:
    """weight normal + bias + added for the windows [windows, n, C], in the wide dtype."""
    matrices = _wide(weight).expand(normal.size(0), -1, -1)
    if bias is None:
        return torch.bmm(matrices, normal).add_(added) if added else torch.bmm(matrices, normal)
    column = (_wide(bias) + added).unsqueeze(-1)
    return torch.baddbmm(column.expand(normal.shape), matrices, normal)


def window_mix(
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
    """out [B, H, W, C] like x; mean, rstd [B * H * W] of the norm, empty where there is none."""
    wide = accumulation_dtype(x.dtype)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tokens = 0 if norm_weight is None or x.numel() == 0 else x.numel() // x.size(-1)
    mean, rstd = (torch.empty(tokens, dtype=wide, device=x.device) for _ in range(2))
    if x.numel() == 0:
        return out, mean, rstd
    normal = _windows(x, window_size, dilated)
    if norm_weight is not None:
        norm_bias = None if norm_bias is None else _wide(norm_bias)
        normal, *statistics = torch.native_layer_norm(normal, normal.shape[-1:], _wide(norm_weight), norm_bias, eps)
        for values, kept in zip(statistics, (mean, rstd), strict=True):
            _put(values, kept.view(*x.shape[:3], 1), window_size, dilated, None)
    mixed = _mixed(normal, weight, bias, 0.0 if gate is None else 1.0)
    _put(mixed, out, window_size, dilated, gate)
    return out, mean, rstd


def window_mix_backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    gate: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    window_size: Sequence[int],
    *,
    dilated: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """With d = dout * gate and n the normal rows: dx by LayerNorm's rule from weight^T d, dweight = sum d n^T,

    dbias = sum d, dgate = dout * (y + 1) with y computed again. Sums are over windows and channels. Of an argument that
    is None the gradient is empty.
    """
    optional = (bias, norm_weight, norm_bias, gate)
    if x.numel() == 0:
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        rest = [x.new_empty(0) if t is None else torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in optional]
        return dx, torch.zeros_like(weight), rest[0], rest[1], rest[2], rest[3]
    scale = None
    if norm_weight is None:
        hats = _windows(x, window_size, dilated)
    else:
        # x without mean and spread is all of x that the norm's gradient needs, divided by the spread once more.
        mean, rstd = (t.view(*x.shape[:3], 1) for t in (mean, rstd))
        view, factor, shift = (_view(t, window_size, dilated) for t in (x, rstd, -mean * rstd))
        hats = torch.empty(view.shape, dtype=rstd.dtype, device=x.device)
        torch.addcmul(shift, view, factor, out=hats)
        hats, scale = hats.view(-1, weight.size(0), x.size(-1)), _wide(norm_weight)
    dgate = x.new_empty(0)
    douts = _wide(dout)
    if gate is not None:
        dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        normal = hats if scale is None else hats * scale
        normal = normal if norm_bias is None else normal.add_(_wide(norm_bias))
        _put(_mixed(normal, weight, bias, 1.0), dgate, window_size, dilated, douts)
        douts = douts * gate
    d = _windows(douts, window_size, dilated)
    # One product over all windows and channels, of d * norm_weight and the rows before it: the normal rows need not be
    # made for it. What norm_bias adds to them is the same for every token.
    rows = d.new_empty(weight.size(0), d.size(0), d.size(2))
    torch.mul(d.transpose(0, 1), 1.0 if scale is None else scale, out=rows)
    sums = d.sum(0)  # [n, C]
    dbias = x.new_empty(0) if bias is None else sums.sum(1).to(bias.dtype)
    dweight = rows.flatten(1) @ hats.transpose(0, 1).reshape(weight.size(0), -1).t()
    if norm_bias is not None:
        dweight += (sums @ _wide(norm_bias)).unsqueeze(1)
    dweight = dweight.to(weight.dtype)
    drows = torch.bmm(_wide(weight).t().expand(d.size(0), -1, -1), d)
    dnorm_weight = dnorm_bias = x.new_empty(0)
    if norm_weight is not None:
        zeros = rstd.new_zeros(()).expand(*drows.shape[:2], 1).contiguous()
        # Of the bias only the shape is read, and torch's function needs one.
        drows, found, found_bias = torch.ops.aten.native_layer_norm_backward(
            drows, hats, drows.shape[-1:], zeros, zeros + 1, scale, scale, [True, True, True]
        )
        dnorm_weight = found.to(norm_weight.dtype)
        dnorm_bias = dnorm_bias if norm_bias is None else found_bias.to(norm_bias.dtype)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _put(drows, dx, window_size, dilated, None if norm_weight is None else rstd)
    return dx, dweight, dbias, dnorm_weight, dnorm_bias, dgate
