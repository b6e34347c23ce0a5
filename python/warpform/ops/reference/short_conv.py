"""Definition of what lies between Monarch Mixer's projection and its long convolution (arXiv 2310.12109, section 4.1).

    c[b, ch, t] = bias[ch] + sum_j weight[ch, j] x[b, t - (K - 1) + j, ch]      0 before the first token
    gated = c[:, 2 D : 3 D] * c[:, : D];  gate = c[:, D : 2 D]

x has its channels last, as a projection gives them, and the results have them first, as a long convolution takes them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._dtypes import accumulation_dtype

# Positions that are taken at one time on a CPU, so that what lies between stays in its cache.
_POSITIONS_AT_A_TIME = 128


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """c, channels last, [batch, seqlen, 3 D], in the dtype of all three."""
    taps = weight.size(1)
    c = x * weight[:, -1] if bias is None else torch.addcmul(bias, x, weight[:, -1])
    for back in range(1, min(taps, x.size(1))):
        c[:, back:].addcmul_(x[:, :-back], weight[:, -1 - back])
    return c


def short_conv_gate(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """gated and gate, [batch, D, seqlen], of x [batch, seqlen, 3 D], weight [3 D, K] and bias [3 D]."""
    dtype = accumulation_dtype(x.dtype)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    gated, gate = (
        torch.empty((x.size(0), x.size(2) // 3, x.size(1)), dtype=x.dtype, device=x.device) for _ in range(2)
    )
    step = _POSITIONS_AT_A_TIME if x.device.type == "cpu" else max(1, x.size(1))
    for begin in range(0, x.size(1), step):
        before = max(0, begin - weight.size(1) + 1)  # whose own outputs lack taps, and are dropped
        some = slice(begin, begin + step)
        c = _convolve(x[:, before : begin + step].to(dtype).contiguous(), weight, bias)[:, begin - before :]
        first, second, value = c.chunk(3, 2)
        gated[:, :, some] = (value * first).mT
        gate[:, :, some] = second.mT
    return gated, gate


def short_conv_gate_backward(
    dgated: Tensor, dgate: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """dc of the three parts is dgated * value, dgate, dgated * first; c is made again.

    dx[t] = sum_j weight[j] dc[t + (K - 1) - j];  dweight[j] = sum dc[t] x[t - (K - 1) + j];  dbias = sum dc
    """
    dtype, taps = accumulation_dtype(x.dtype), weight.size(1)
    wide_x, wide_weight = x.to(dtype).contiguous(), weight.to(dtype)
    c = _convolve(wide_x, wide_weight, None if bias is None else bias.to(dtype))
    first, second, value = c.chunk(3, 2)
    part = dgated.mT.to(dtype)
    dfirst = part * value
    value.copy_(part.mul(first))  # c becomes dc, part by part
    first.copy_(dfirst)
    second.copy_(dgate.mT)
    dx = c * wide_weight[:, -1]
    dweight = torch.empty_like(wide_weight)
    dweight[:, -1] = (c * wide_x).sum((0, 1))
    for back in range(1, taps):
        if back < x.size(1):
            dx[:, :-back].addcmul_(c[:, back:], wide_weight[:, -1 - back])
            dweight[:, -1 - back] = (c[:, back:] * wide_x[:, :-back]).sum((0, 1))
        else:
            dweight[:, -1 - back] = 0
    dbias = x.new_empty(0) if bias is None else c.sum((0, 1)).to(bias.dtype)
    return dx.to(x.dtype), dweight.to(weight.dtype), dbias
