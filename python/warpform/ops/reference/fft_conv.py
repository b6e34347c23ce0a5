"""Definition of long convolutions by a filter's spectrum (FlashFFTConv, arXiv 2311.05908; Hyena, arXiv 2302.10866).

With S the real FFT of n points of the filter and n at least the length plus the taps less one, so that nothing wraps:

    v = pregate * u
    y = postgate * (irfft(rfft(v, n) * S, n)[:L] + skip * v)

On a CPU some rows are transformed at a time, so that padding, spectra and products stay in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._dtypes import accumulation_dtype

# Points that are transformed at one time on a CPU, and the rows at least: threads share whole rows.
_POINTS_AT_A_TIME, _LEAST_ROWS = 1 << 19, 16


def _blocks(u: Tensor, points: int) -> Iterator[tuple[slice, slice]]:
    """Batches and channels: blocks of about as many points as should be transformed at one time."""
    batch, channels, _ = u.shape
    rows = max(_LEAST_ROWS, _POINTS_AT_A_TIME // points) if u.device.type == "cpu" else max(1, batch * channels)
    channel_step = max(1, min(channels, rows))
    batch_step = max(1, min(batch, rows // channel_step))
    for channel in range(0, channels, channel_step):
        for row in range(0, batch, batch_step):
            yield slice(row, min(row + batch_step, batch)), slice(channel, min(channel + channel_step, channels))


def _gated(u: Tensor, gate: Tensor | None, where: tuple[slice, slice]) -> Tensor:
    """A block of u, times its gate, in the wide dtype."""
    block = u[where].to(accumulation_dtype(u.dtype))
    return block if gate is None else block * gate[where]


def spectral_conv(
    u: Tensor,
    spectrum: Tensor,
    skip: Tensor | None = None,
    pregate: Tensor | None = None,
    postgate: Tensor | None = None,
) -> Tensor:
    """y [batch, channels, seqlen] of u and gates alike, spectrum [channels, n / 2 + 1, 2], skip [channels]."""
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    if y.numel() == 0:
        return y
    points, seqlen = 2 * (spectrum.size(1) - 1), u.size(2)
    filters = torch.view_as_complex(spectrum.contiguous())
    for where in _blocks(u, points):
        v = _gated(u, pregate, where)
        out = _convolve(v, filters[where[1]], points)[..., :seqlen]
        if skip is not None:
            out = torch.addcmul(out, v, skip[where[1], None].to(v.dtype))
        y[where] = out if postgate is None else out * postgate[where]
    return y


def _convolve(v: Tensor, filters: Tensor, points: int) -> Tensor:
    return torch.fft.irfft(torch.fft.rfft(v, points).mul_(filters), points)


def spectral_conv_backward(
    dout: Tensor,
    u: Tensor,
    spectrum: Tensor,
    skip: Tensor | None,
    pregate: Tensor | None,
    postgate: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """With d = postgate * dout, V and D the real FFTs of v and d, and c = 1 for the bins 0 and n / 2, 2 for those
    between, which count for their conjugates too:

        dv = irfft(D conj(S)) + skip * d;  du = pregate * dv;  dpregate = u * dv
        dspectrum = c / n sum_batch conj(V) D;  dskip = sum d * v
        dpostgate = dout * (conv(v) + skip * v)
    """
    du, dskip, dpregate, dpostgate = (
        u.new_empty(0) if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device)
        for t in (u, skip, pregate, postgate)
    )
    points, seqlen = 2 * (spectrum.size(1) - 1), u.size(2)
    filters = torch.view_as_complex(spectrum.contiguous())
    dfilters = torch.zeros_like(filters)
    sums = torch.zeros(u.size(1), dtype=accumulation_dtype(u.dtype), device=u.device)
    for where in _blocks(u, points) if u.numel() else ():
        channels = where[1]
        v, d = _gated(u, pregate, where), _gated(dout, postgate, where)
        scale = None if skip is None else skip[channels, None].to(v.dtype)
        transformed, gradient = torch.fft.rfft(v, points), torch.fft.rfft(d, points)
        # conj() only marks a tensor, and torch 2.13 overlooks the mark in an op that a traced graph calls.
        dfilters[channels] += (gradient * transformed.conj_physical()).sum(0)
        if postgate is not None:
            conv = torch.fft.irfft(transformed.mul_(filters[channels]), points)[..., :seqlen]
            conv = conv if scale is None else torch.addcmul(conv, v, scale)
            dpostgate[where] = conv.mul_(dout[where])
        dv = torch.fft.irfft(gradient.mul_(filters[channels].conj_physical()), points)[..., :seqlen]
        if scale is not None:
            dv = torch.addcmul(dv, d, scale)
            sums[channels] += (d * v).sum((0, 2))
        if pregate is None:
            du[where] = dv
        else:
            dpregate[where] = dv * u[where]
            du[where] = dv.mul_(pregate[where])
    dfilters /= points
    dfilters[:, 1:-1] *= 2
    if skip is not None:
        dskip = sums.to(skip.dtype)
    return du, torch.view_as_real(dfilters), dskip, dpregate, dpostgate
