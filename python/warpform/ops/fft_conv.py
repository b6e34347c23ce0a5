"""Convolutions as long as the sequence, through the Fourier transform."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _autocast, _library
from . import _check, _errors
from ._dtypes import accumulation_dtype
from ._register import NAMESPACE, register_op
from .examples import fft_conv as examples
from .reference import fft_conv as reference

# Shorter sequences are transformed as if they were so long, the least that kernels transform.
_SHORTEST = 256


def _fake(
    u: Tensor,
    spectrum: Tensor,
    skip: Tensor | None = None,
    pregate: Tensor | None = None,
    postgate: Tensor | None = None,
) -> Tensor:
    return u.new_empty(u.shape)


def _backward_fake(dout: Tensor, u: Tensor, spectrum: Tensor, *optional: Tensor | None) -> tuple[Tensor, ...]:
    gradients = (u.new_empty(0) if t is None else t.new_empty(t.shape) for t in optional)
    return u.new_empty(u.shape), spectrum.new_empty(spectrum.shape), *gradients


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _spectral_conv_backward(dout, *ctx.saved_tensors)
    return tuple(g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad, strict=False))


_spectral_conv_backward = register_op(
    "spectral_conv_backward",
    reference=reference.spectral_conv_backward,
    fake=_backward_fake,
    example=examples.spectral_conv_backward,
)
_spectral_conv = register_op(
    "spectral_conv",
    reference=reference.spectral_conv,
    fake=_fake,
    example=examples.spectral_conv,
    backward=_gradient,
    setup_context=_setup,
    autocast=("u", "pregate", "postgate"),
)


def _points(seqlen: int) -> int:
    """Points of the transform: twice the power of two that holds seqlen, so that no filter wraps around.

    Under tracing these are guards: a graph serves the lengths between two powers of two.
    """
    points = 2 * _SHORTEST
    while points < 2 * seqlen:
        points *= 2
    return points


def fft_conv_spectrum(k: Tensor, k_reverse: Tensor | None = None, *, seqlen: int) -> Tensor:
    """The spectrum of a filter as `fft_conv` takes it: to be made once where the filter does not change.

    The circular filter of n points has k[j] at j and k_reverse[j] at n - 1 - j, with n twice the power of two that
    holds seqlen, at least 512; this is its real FFT. It is made of torch.fft and differentiated by autograd.

    Args:
        k: [H, Lk] with Lk <= seqlen, taps for what came before: k[j] weighs u[i - j]. Computed in float32, or float64
            where it is that.
        k_reverse: [H, Lr] with Lr <= seqlen, taps for what comes after: k_reverse[j] weighs u[i + 1 + j]; or None.
        seqlen: the longest sequence that it will serve.

    Returns:
        float32 (float64) [H, n / 2 + 1, 2], real and imaginary parts.

    Raises:
        TypeError: an argument is not a tensor, or of a wrong dtype.
        ValueError: a wrong shape, more taps than seqlen, or tensors on different devices.
    """
    op = "fft_conv_spectrum"
    _check.integer(op, "seqlen", seqlen)
    _check_taps(op, "k", k, seqlen)
    if k_reverse is not None:
        _check_taps(op, "k_reverse", k_reverse, seqlen, k.size(0), like=k)
    return _spectrum(k, k_reverse, seqlen)


def _spectrum(k: Tensor, k_reverse: Tensor | None, seqlen: int) -> Tensor:
    points = _points(seqlen)
    dtype = accumulation_dtype(k.dtype)
    if k.size(0) == 0:  # which torch.fft does not take
        return k.new_zeros((0, points // 2 + 1, 2), dtype=dtype)
    filters = k.to(dtype)
    if k_reverse is not None:  # from the end of the circle backwards
        behind = F.pad(k_reverse.to(dtype).flip(1), (points - k_reverse.size(1), 0))
        filters = F.pad(filters, (0, points - k.size(1))) + behind
    return torch.view_as_real(torch.fft.rfft(filters, points))


def _check_taps(
    op: str, name: str, k: Any, seqlen: int, channels: int | None = None, *, like: Tensor | None = None
) -> None:
    _check.tensor(op, name, k)
    _check.floating(op, name, k)
    if k.dim() != 2 or (channels is not None and k.size(0) != channels):
        expected = "channels" if channels is None else channels
        raise ValueError(f"{op}: {name} must be of shape [{expected}, taps], got {_check.describe(k)}")
    if k.size(1) > seqlen:
        raise ValueError(f"{op}: {name} must have at most the {seqlen} taps that seqlen allows, got {k.size(1)}")
    if like is not None:
        if k.dtype != like.dtype:
            raise TypeError(f"{op}: {name} must be {_check.dtype_name(like.dtype)} as k is, got {_check.describe(k)}")
        _check.same_device(op, name, k, "k", like)


# ---- fft_conv: an op made of the two above ----


def _composite(
    u: Tensor,
    k: Tensor,
    skip: Tensor | None = None,
    pregate: Tensor | None = None,
    postgate: Tensor | None = None,
    k_reverse: Tensor | None = None,
) -> Tensor:
    """Its gradients, and the rules for autocast and tracing, are those of its parts."""
    op = "fft_conv"
    # Taps are made a spectrum for the shape of u before an op sees it.
    if u.dim() != 3:
        raise ValueError(f"{op}: u must be of shape [batch, channels, seqlen], got {_check.describe(u)}")
    _, channels, seqlen = u.shape
    _check_taps(op, "k", k, seqlen, channels)
    if k_reverse is not None:
        _check_taps(op, "k_reverse", k_reverse, seqlen, channels, like=k)
    spectrum = _spectrum(k, k_reverse, seqlen).to(accumulation_dtype(u.dtype))
    return _errors.called_by(op, _spectral_conv, u, spectrum, skip, pregate, postgate)


if _library.loaded():
    _fragment = torch.library.Library(NAMESPACE, "FRAGMENT")
    _fragment.define(
        "fft_conv(Tensor u, Tensor k, Tensor? skip=None, Tensor? pregate=None, Tensor? postgate=None, "
        "Tensor? k_reverse=None) -> Tensor"
    )
    _fragment.impl("fft_conv", _composite, "CompositeImplicitAutograd")


def fft_conv(
    u: Tensor,
    k: Tensor | None,
    skip: Tensor | None = None,
    pregate: Tensor | None = None,
    postgate: Tensor | None = None,
    k_reverse: Tensor | None = None,
    *,
    spectrum: Tensor | None = None,
) -> Tensor:
    """Convolution along the whole sequence (FlashFFTConv, arXiv 2311.05908; Hyena, arXiv 2302.10866), with its gates.

    v = pregate * u
    conv[i] = sum_{j <= i} k[i - j] v[j] + sum_{j > i} k_reverse[j - i - 1] v[j]
    y = postgate * (conv + skip * v)

    Without k_reverse it is causal. The transform is of the next power of two of twice the length, in float32 at least
    but for 16-bit kernels, which round each of its stages to the dtype of u; a length need be no power of two. Traced
    with taps, a graph serves the lengths up to the next power of two; with a spectrum, all that the spectrum serves.

    Args:
        u: [B, H, L], float16, bfloat16, float32 or float64.
        k: [H, Lk] with Lk <= L, in u's dtype or float32; None where spectrum is given.
        skip: [H] in u's dtype or float32, or None for 0.
        pregate, postgate: the shape and dtype of u, or None for 1. In float16 pregate * u has to fit, and in the
            backward postgate times the output's gradient.
        k_reverse: [H, Lr] with Lr <= L in k's dtype, or None for 0.
        spectrum: what `fft_conv_spectrum` makes of k and k_reverse for this L, kept from an earlier call: one that is
            for a longer sequence is right too, but of more points. [H, n / 2 + 1, 2], float32, or float64 where u is.

    Returns:
        [B, H, L] like u. Gradients reach all tensors and are the same bit by bit in each run; that of the filter sums
        over the batch in float32 (float64). Under autocast u and the gates are cast.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong shape, more taps than L, spectrum and taps together, or tensors on different devices.
    """
    op = "fft_conv"
    if spectrum is not None:
        if k is not None or k_reverse is not None:
            raise ValueError(f"{op}: k and k_reverse must be None where spectrum is given")
        return _errors.called_by(op, _spectral_conv, u, spectrum, skip, pregate, postgate)
    _check.tensor(op, "u", u)
    if k is None:
        raise TypeError(f"{op}: k must be a tensor where spectrum is None, got None")
    for name, taps in (("k", k), ("k_reverse", k_reverse)):
        if taps is not None:
            _check.tensor(op, name, taps)
            if taps.dtype not in (u.dtype, torch.float32) and not _autocast.enabled(u.device):
                raise TypeError(
                    f"{op}: {name} must be {_check.dtype_name(u.dtype)} as u is, or float32, "
                    f"got {_check.describe(taps)}"
                )
            _check.same_device(op, name, taps, "u", u)
    if torch.compiler.is_compiling():
        return torch.ops.warpform.fft_conv(u, k, skip, pregate, postgate, k_reverse)
    return _composite(u, k, skip, pregate, postgate, k_reverse)
