"""Definitions of the stencils over [batch, height, width, channels]: PoolFormer's mixer and a depthwise convolution.

The pooling mixer (PoolFormer, arXiv 2111.11418, equations 2 and 3) is x + scale (P n - n) with n = GroupNorm(1)(x). P is
the mean over the neighbours that exist, so P of a constant is this constant, and the norm's mean and bias cancel:

    out = x + scale_c weight_c rstd_b (P x - x)_bc;  rstd_b = 1 / sqrt(var_b + eps) over height, width and channels
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._dtypes import accumulation_dtype

# ---- the pooling mixer ----


def _of_samples(t: Tensor) -> Tensor:
    """[batch] as a column for [batch, height, width, channels]."""
    return t.view(-1, 1, 1, 1)


def _pooled_minus_identity(centred: Tensor, pool_size: int) -> Tensor:
    """P x - x of x [batch, height, width, channels], whose mean may be taken away before, and should be.

    What is large beside the differences of neighbours would cost their digits.
    """
    channels_first = centred.permute(0, 3, 1, 2)
    pooled = F.avg_pool2d(channels_first, pool_size, 1, pool_size // 2, count_include_pad=False)
    return pooled.permute(0, 2, 3, 1).sub_(centred)


def _gain(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """scale * weight, [channels]."""
    return weight.to(dtype) if scale is None else weight.to(dtype) * scale.to(dtype)


def pool_mixer(
    x: Tensor, weight: Tensor, scale: Tensor | None = None, *, pool_size: int = 3, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """out like x, and mean and rstd [batch] of each sample in the dtype that sums are made in."""
    dtype = accumulation_dtype(x.dtype)
    wide = x.to(dtype)
    if x.numel() == 0:
        nothing = torch.empty_like(x, memory_format=torch.contiguous_format)
        return nothing, wide.new_zeros(x.size(0)), wide.new_zeros(x.size(0))
    dims = (1, 2, 3)
    near_mean = wide.mean(dims)
    centred = wide - _of_samples(near_mean)
    # What rounding left in near_mean matters to the variance where the mean is large beside the deviation.
    correction = centred.mean(dims)
    rstd = (centred.square().mean(dims) - correction.square()).clamp_(min=0).add_(eps).rsqrt_()
    difference = _pooled_minus_identity(centred, pool_size)
    factor = (rstd[:, None] * _gain(weight, scale, dtype)).view(x.size(0), 1, 1, x.size(3))
    return torch.addcmul(wide, difference, factor).to(x.dtype).contiguous(), near_mean + correction, rstd


def pool_mixer_backward(
    dout: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None, mean: Tensor, rstd: Tensor, *, pool_size: int = 3
) -> tuple[Tensor, Tensor, Tensor]:
    """With u = P x - x, z = dout scale weight rstd and q_bc the sums of dout u rstd over positions:

    dx = dout + P^T z - z - (x - mean) rstd^2 a / count, where a_b sums q_bc scale_c weight_c, and count is of a sample.
    dweight = sum_b q_bc scale_c;  dscale = sum_b q_bc weight_c.  (P^T z)_j sums z_i / count_i over j's neighbours i.
    """
    if x.numel() == 0:
        dscale = weight.new_empty(0) if scale is None else torch.zeros_like(scale)
        return torch.empty_like(x, memory_format=torch.contiguous_format), torch.zeros_like(weight), dscale
    dtype = accumulation_dtype(x.dtype)
    wide_dout, gain = dout.to(dtype), _gain(weight, scale, dtype)
    centred = x.to(dtype) - _of_samples(mean)
    q = (wide_dout * _pooled_minus_identity(centred, pool_size)).sum((1, 2)).mul_(rstd[:, None])
    z = wide_dout * (rstd[:, None] * gain).view(x.size(0), 1, 1, x.size(3))
    of_pool = torch.ops.aten.avg_pool2d_backward(
        z.permute(0, 3, 1, 2),
        centred.permute(0, 3, 1, 2),
        [pool_size, pool_size],
        [1, 1],
        [pool_size // 2, pool_size // 2],
        False,  # ceil_mode
        False,  # count_include_pad
        None,
    ).permute(0, 2, 3, 1)
    of_variance = rstd.square() * (q @ gain) / -(x.numel() // x.size(0))
    dx = of_pool.sub_(z).add_(wide_dout).addcmul_(centred, _of_samples(of_variance))
    sums = q.sum(0)
    dweight = sums if scale is None else sums * scale.to(dtype)
    dscale = weight.new_empty(0) if scale is None else (sums * weight.to(dtype)).to(scale.dtype)
    return dx.to(x.dtype).contiguous(), dweight.to(weight.dtype), dscale


# ---- the depthwise convolution ----


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution of x [batch, height, width, channels], weight [channels, k, k], in the dtype of all three."""
    taps = weight.size(1)
    before = taps // 2
    if x.dtype == torch.float32 and x.device.type == "cpu":
        # Elsewhere it may be computed in TF32, and in float64 torch convolves one channel at a time.
        first = x.permute(0, 3, 1, 2)
        return F.conv2d(first, weight.unsqueeze(1), bias, padding=before, groups=x.size(3)).permute(0, 2, 3, 1)
    height, width = x.shape[1:3]
    center = weight[:, before, before]
    out = x * center if bias is None else torch.addcmul(bias, x, center)
    for i in range(taps):
        for j in range(taps):
            down, right = i - before, j - before
            if (down, right) != (0, 0) and abs(down) < height and abs(right) < width:
                rows, columns = _overlap(height, down), _overlap(width, right)
                out[:, rows[0], columns[0]].addcmul_(x[:, rows[1], columns[1]], weight[:, i, j])
    return out


def _overlap(size: int, shift: int) -> tuple[slice, slice]:
    """The places whose neighbour at `shift` exists, and those neighbours."""
    return slice(max(0, -shift), size - max(0, shift)), slice(max(0, shift), size - max(0, -shift))


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str = "linear") -> Tensor:
    """act(bias_c + sum over i, j of weight[c, i, j] x[b, h + i - k // 2, w + j - k // 2, c]), zeros around x."""
    if x.numel() == 0:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    dtype = accumulation_dtype(x.dtype)
    pre = _convolve(x.to(dtype).contiguous(), weight.to(dtype), None if bias is None else bias.to(dtype))
    if activation == "gelu":
        pre = torch.ops.aten.gelu_(pre)
    elif activation == "relu":
        pre = pre.relu_()
    return pre.to(x.dtype).contiguous()


def depthwise_conv2d_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *, activation: str = "linear"
) -> tuple[Tensor, Tensor, Tensor]:
    """dpre = dout act'(pre), pre made again; dx is dpre through the taps turned about their center.

    dweight[c, i, j] sums dpre[b, h, w, c] x[b, h + i - k // 2, w + j - k // 2, c];  dbias sums dpre.
    """
    if x.numel() == 0:
        dbias = weight.new_empty(0) if bias is None else torch.zeros_like(bias)
        return torch.empty_like(x, memory_format=torch.contiguous_format), torch.zeros_like(weight), dbias
    dtype, taps = accumulation_dtype(x.dtype), weight.size(1)
    wide_x, wide_weight = x.to(dtype).contiguous(), weight.to(dtype)
    dpre = dout.to(dtype).contiguous()
    if activation != "linear":
        pre = _convolve(wide_x, wide_weight, None if bias is None else bias.to(dtype))
        gelu = activation == "gelu"
        dpre = torch.ops.aten.gelu_backward(dpre, pre) if gelu else torch.ops.aten.threshold_backward(dpre, pre, 0)
    dx = _convolve(dpre, wide_weight.flip(1, 2), None)
    dweight = torch.zeros_like(wide_weight)
    for i in range(taps):
        for j in range(taps):
            down, right = i - taps // 2, j - taps // 2
            if abs(down) < x.size(1) and abs(right) < x.size(2):
                rows, columns = _overlap(x.size(1), down), _overlap(x.size(2), right)
                products = dpre[:, rows[0], columns[0]] * wide_x[:, rows[1], columns[1]]
                dweight[:, i, j] = products.sum((0, 1, 2))
    dbias = weight.new_empty(0) if bias is None else dpre.sum((0, 1, 2)).to(bias.dtype)
    return dx.to(x.dtype).contiguous(), dweight.to(weight.dtype), dbias
