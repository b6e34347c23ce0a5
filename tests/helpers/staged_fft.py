"""The long convolution as the kernels factor it, run eagerly: what its accuracy in 16 bits is measured against.

The same stages in the same order, every one rounded to float16 and accumulated in float32, the DFT matrices and the
spectrum in float16 too; float16 for bfloat16 tensors as well, whose rows the kernels scale by powers of two. The
factors are `csrc/kernels/fft_conv/plan.h`'s. Rows are transformed two at a time, as real and imaginary part.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SIZES = tuple(2**k for k in range(8, 16))  # points that a row is padded to; the transform has twice as many


def padded_length(length: int) -> int:
    """The points that a row of `length` is padded to."""
    return max(SIZES[0], 1 << (length - 1).bit_length())


def factors(points: int) -> tuple[int, int]:
    """(outer, radix): points = outer * radix * radix."""
    radix = 16 if points <= 4096 else 32
    return points // radix**2, radix


def _half(x: Tensor) -> Tensor:
    if x.is_complex():
        return torch.complex(x.real.half().float(), x.imag.half().float())
    return x.half().float()


def _roots(rows: int, cols: int, n: int, like: Tensor) -> Tensor:
    """exp(-2 pi i row col / n)."""
    product = torch.arange(rows, device=like.device)[:, None] * torch.arange(cols, device=like.device)
    angle = -2 * math.pi / n * (product % n).double()
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)


def _dft(rows: int, cols: int, n: int, like: Tensor) -> Tensor:
    return _half(_roots(rows, cols, n, like))


def _row_scale(v: Tensor, points: int) -> Tensor:
    """The power of two that brings the largest value of a row to just under 2^target."""
    target = 13 - int(math.log2(points)) // 2
    largest = v.abs().amax(-1, keepdim=True)
    scale = torch.ldexp(torch.ones_like(largest), target - torch.frexp(largest).exponent)
    return torch.where(largest > 0, scale, 0.0)


def _transform(v: Tensor, scale: Tensor) -> Tensor:
    """[B, H, L] -> [pairs, H, 2 outer, radix, radix]: bins k1 + 2 outer (k2 + radix k3), divided by outer radix."""
    points = padded_length(v.shape[-1])
    outer, radix = factors(points)
    z = torch.nn.functional.pad(v * scale, (0, points - v.shape[-1], 0, 0, 0, v.shape[0] % 2))
    z = torch.complex(_half(z[0::2]), _half(z[1::2])).unflatten(-1, (outer, radix**2))
    z = _dft(2 * outer, outer, 2 * outer, v) @ z
    z = _half(z * (_roots(2 * outer, radix**2, 2 * points, v) / outer))
    square = _dft(radix, radix, radix, v)
    z = _half(square @ z.unflatten(-1, (radix, radix)) * (_roots(radix, radix, radix**2, v) / radix))
    return z @ square


def _inverse(z: Tensor, length: int) -> Tensor:
    """What `_transform` does undone, twice as large; rows in pairs again."""
    outer, radix = z.shape[-3] // 2, z.shape[-1]
    square = _dft(radix, radix, radix, z).conj()
    z = _half(_half(z) @ square * (_roots(radix, radix, radix**2, z).conj() / radix))
    z = (square @ z).flatten(-2) * _roots(2 * outer, radix**2, 2 * outer * radix**2, z).conj()
    z = _half(_dft(outer, 2 * outer, 2 * outer, z).conj() @ _half(z)).flatten(-2)
    return torch.stack([z.real, z.imag], 1).flatten(0, 1)[..., :length]


def _order(spectrum: Tensor, points: int) -> Tensor:
    """complex [H, points + 1] -> [H, 2 outer, radix, radix], the order of `_transform`."""
    outer, radix = factors(points)
    full = torch.cat([spectrum, spectrum[:, 1:points].flip(-1).conj()], -1)
    full[:, 0], full[:, points] = spectrum[:, 0].real, spectrum[:, points].real
    return full.unflatten(-1, (radix, radix, 2 * outer)).permute(0, 3, 2, 1)


def _convolve(v: Tensor, spectrum: Tensor, *, conjugate: bool = False) -> Tensor:
    """float32 [B, H, L]."""
    if v.numel() == 0:
        return v.float()
    points = padded_length(v.shape[-1])
    s = _order(torch.view_as_complex(spectrum.float()), points)
    parts = torch.view_as_real(s)
    largest = parts.abs().amax((-4, -3, -2, -1), keepdim=True)
    unit = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent)
    s = torch.view_as_complex((parts / unit).half().float().contiguous())
    v = v.float()
    scale = _row_scale(v, points)
    y = _inverse(_transform(v, scale) * (s.conj() if conjugate else s), v.shape[-1])[: v.shape[0]]
    return torch.where(scale > 0, y / scale * (unit[..., 0, 0, 0] / 2), 0.0)


def spectral_conv(
    u: Tensor,
    spectrum: Tensor,
    skip: Tensor | None = None,
    pregate: Tensor | None = None,
    postgate: Tensor | None = None,
) -> Tensor:
    """warpform::spectral_conv in float16 or bfloat16."""
    v = u if pregate is None else u * pregate
    y = _convolve(v, spectrum)
    if skip is not None:
        y = y + skip.float()[:, None] * v.float()
    return (y if postgate is None else y * postgate.float()).to(u.dtype)


def spectral_conv_backward(
    dout: Tensor, u: Tensor, spectrum: Tensor, skip: Tensor | None, pregate: Tensor | None, postgate: Tensor | None
) -> tuple[Tensor | None, ...]:
    """warpform::spectral_conv_backward; None for what is not there."""
    v = u if pregate is None else u * pregate
    d = dout if postgate is None else dout * postgate
    dv = _convolve(d, spectrum, conjugate=True)
    if skip is not None:
        dv = dv + skip.float()[:, None] * d.float()
    du = dv if pregate is None else dv * pregate.float()
    dpregate = None if pregate is None else (dv * u.float()).to(u.dtype)
    dpostgate = None if postgate is None else spectral_conv(u, spectrum, skip, pregate, dout)
    dskip = None if skip is None else (d.float() * v.float()).sum((0, 2)).to(skip.dtype)
    return du.to(u.dtype), _spectrum_gradient(v.float(), d.float()), dskip, dpregate, dpostgate


def _spectrum_gradient(v: Tensor, d: Tensor) -> Tensor:
    points = padded_length(v.shape[-1])
    _, radix = factors(points)
    if v.numel() == 0:
        return v.new_zeros(v.shape[1], points + 1, 2)
    pad = (0, 0, 0, 0, 0, v.shape[0] % 2)
    v, d = torch.nn.functional.pad(v, pad), torch.nn.functional.pad(d, pad)
    own, t = _row_scale(v, points), _row_scale(d, points)
    # The product of both scales is the same for both rows of a pair, so that their products add up.
    common = torch.where((own > 0) & (t > 0), own * t, math.inf).unflatten(0, (-1, 2)).amin(1, keepdim=True)
    scale = torch.where((own > 0) & (t > 0), common.expand(-1, 2, -1, -1).flatten(0, 1) / t, 0.0)
    a, b = _transform(v, scale), _transform(d, t)
    weight = torch.where(common.isfinite(), 1 / common, 0.0)[:, 0, :, :, None, None]
    p = (a.conj() * torch.complex(b.real.half().float(), b.imag.half().float()) * weight).sum(0) * float(
        points // radix
    ) ** 2
    p = p.permute(0, 3, 2, 1).flatten(1)  # in order of bins
    even = (p + p.roll(-1, -1).flip(-1).conj()) / 2  # the part that is the spectrum of a real sequence
    g = torch.view_as_real(even[:, : points + 1] / points).clone()
    g[:, [0, points]] /= 2
    g[:, [0, points], 1] = 0
    return g
