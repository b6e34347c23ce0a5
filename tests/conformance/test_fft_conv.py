"""spectral_conv, the long convolution by FFT, and its backward on every backend."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from helpers import fft_conv as convolutions
from helpers import staged_fft
from helpers.backends import FEW_SMS, HALF, MANY_SMS, Backend, drawn_on, kernels, on, one_dtype, reference, same
from helpers.fft_conv import FFT_CONV_CASES, LONG_FFT_CONV_CASES, FftConvCase, FftConvInputs, fft_conv_inputs

REFERENCE = reference()
SIMT, GPU = kernels(HALF, examples=(40, 100))
EVERY = (REFERENCE, SIMT, GPU)

# Whole and cut, even and odd batches, one and several steps a block.
SIZES = (
    FftConvCase("size_256", 19, 1, 256, pregate=True),
    FftConvCase("size_512", 17, 2, 499, postgate=True),
    FftConvCase("size_1024", 9, 1, 1000, skip="u"),
    FftConvCase("size_2048", 5, 1, 2001, skip=None, pregate=True, postgate=True),
    FftConvCase("size_4096", 3, 1, 4088, pregate=True, postgate=True),
)


# ---- against the oracle ----


def check(backend: Backend, case: FftConvCase, dtype: torch.dtype) -> None:
    """Kernels round between the stages of a transform, and are measured against a computation that does so too."""
    staged = {"eager": staged_fft.spectral_conv, "eager_backward": staged_fft.spectral_conv_backward}
    how = {} if backend is REFERENCE else staged
    convolutions.check_spectral_conv(backend.library, case, dtype, backend.device, **how)


@on(*EVERY, case=lambda backend: FFT_CONV_CASES if backend is REFERENCE else FFT_CONV_CASES + SIZES)
def test_cases(backend: Backend, case: FftConvCase, dtype: torch.dtype) -> None:
    for _ in backend.machines((0, FEW_SMS), (len(case.name), MANY_SMS)):
        check(backend, case, dtype)


@on(
    REFERENCE,
    GPU,
    case=LONG_FFT_CONV_CASES,
    dtype=lambda backend: HALF if backend is GPU else (torch.float32, torch.float16),
)
def test_long_cases(backend: Backend, case: FftConvCase, dtype: torch.dtype) -> None:
    check(backend, case, dtype)


@on(SIMT, case=LONG_FFT_CONV_CASES)
def test_long_cases_in_the_emulator(backend: Backend, case: FftConvCase) -> None:
    """It takes its time, so each in one of both dtypes."""
    check(backend, case, HALF[len(case.name) % 2])


@drawn_on(
    *EVERY,
    case=lambda backend: convolutions.fft_conv_cases(longest=3000 if backend is GPU else 600),
    sm_count=st.sampled_from((FEW_SMS, 4, MANY_SMS)),
)
def test_drawn(backend: Backend, case: FftConvCase, dtype: torch.dtype, seed: int, sm_count: int) -> None:
    backend.configure(seed, sm_count)
    check(backend, case, dtype)


def _call(backend: Backend, x: FftConvInputs) -> tuple[Tensor, ...]:
    """y, du, dspectrum, dskip, dpregate, dpostgate."""
    library = backend.library
    return library.spectral_conv(*x.tensors), *library.spectral_conv_backward(x.dout, *x.tensors)


@on(*EVERY, seqlen=(200, 1000, 8192, 32768), dtype=one_dtype)
def test_results_repeat_bit_for_bit(backend: Backend, seqlen: int, dtype: torch.dtype) -> None:
    """In any order of blocks and threads, since sums have an order of their own."""
    case = FftConvCase("", 4 if seqlen > 4096 else 19, 1, seqlen, pregate=True, postgate=True)
    x = fft_conv_inputs(case, dtype, backend.device)
    backend.assert_repeats(lambda: _call(backend, x))


# ---- places ----


def spectrum(backend: Backend, k: Tensor) -> Tensor:
    """Of taps on the whole circle, [channels, points]."""
    return torch.view_as_real(torch.fft.rfft(k)).contiguous().to(backend.device)


@on(*EVERY, seqlen=(130, 300, 1024, 2000, 4096, 5001, 16384, 20000))
def test_one_tap_shifts(backend: Backend, seqlen: int) -> None:
    """A filter of one tap moves sequences; every bin and position has its place."""
    points, tap = convolutions.points_of(seqlen), seqlen // 3
    k = torch.zeros(1, points)
    k[:, tap] = 1
    u = torch.randn(1, 1, seqlen).half().to(backend.device)
    y = backend.library.spectral_conv(u, spectrum(backend, k))
    expected = torch.nn.functional.pad(u, (tap, 0))[..., :seqlen]
    torch.testing.assert_close(y, expected, rtol=0, atol=4 * torch.finfo(torch.float16).eps * float(u.abs().max()))


@on(SIMT, GPU, seqlen=(200, 1000, 3000, 20000))
def test_sequences_do_not_disturb_each_other(backend: Backend, seqlen: int) -> None:
    """Two share a transform: one that is not finite, zero, huge or tiny leaves the other's results as they are (but for
    the last bit), and its own are what they would be alone."""
    case = FftConvCase("", 2, 1, seqlen, pregate=True, postgate=True)
    x = fft_conv_inputs(case, torch.bfloat16, backend.device)
    x.u[1] = 0
    eps = torch.finfo(torch.bfloat16).eps
    spectral_conv = backend.library.spectral_conv
    reference = _call(backend, x)
    for value in (math.nan, math.inf, 1e-30, 1e30):
        x.u[1].fill_(value)
        found = _call(backend, x)
        for i, name in ((0, "y"), (1, "du"), (4, "dpregate"), (5, "dpostgate")):
            a, b = found[i][0], reference[i][0]
            if math.isfinite(value):  # values beside it are rounded otherwise
                torch.testing.assert_close(a, b, rtol=0, atol=eps * float(b.abs().max()), msg=f"{name}, {value}")
            else:
                assert torch.equal(a, b), (name, value)
        if not math.isfinite(value):
            assert found[0][1].isnan().all() and found[2][..., 0].isnan().all()
    x = fft_conv_inputs(case, torch.bfloat16, backend.device)
    whole = spectral_conv(*x.tensors)
    x.u[0] *= 1e-20
    torch.testing.assert_close(spectral_conv(*x.tensors)[1], whole[1], rtol=0, atol=eps * float(whole[1].abs().max()))
    small, _ = convolutions._spectral_oracle(convolutions.spectral_conv, x, torch.float64)
    error = (spectral_conv(*x.tensors)[0].double() - small[0]).abs().max()
    assert error <= 2 * eps * small[0].abs().max()
    x.u[0] = 0
    assert (spectral_conv(*x.tensors)[0] == 0).all()


@on(SIMT, GPU, seqlen=(256, 1024, 4096, 8192, 16384, 32768))
def test_constants_do_not_overflow(backend: Backend, seqlen: int) -> None:
    """The largest constant that float16 holds, and a filter that adds it all up and divides by the length."""
    k = torch.zeros(1, convolutions.points_of(seqlen))
    k[:, :seqlen] = 1 / seqlen
    u = torch.full((2, 1, seqlen), 65504.0).half().to(backend.device)
    u[1] = -u[1]
    of_k = spectrum(backend, k)
    y = backend.library.spectral_conv(u, of_k)
    expected = 65504 * torch.arange(1, seqlen + 1, device=backend.device) / seqlen
    eps = torch.finfo(torch.float16).eps
    for row, sign in ((0, 1), (1, -1)):
        # The last may round to infinity only if it is more than the largest.
        assert ((y[row, 0, :-8].double() - sign * expected[:-8]).abs() <= 4 * eps * 65504).all()
    du, dspectrum, *_ = backend.library.spectral_conv_backward(u, u, of_k, None, None, None)
    assert du[..., 8:].isfinite().all() and dspectrum.isfinite().all()


@on(*EVERY)
def test_a_spectrum_of_any_size(backend: Backend) -> None:
    """Channels have scales of their own; zeros and what is not finite stay in their channel."""
    case = FftConvCase("", 2, 5, 100, skip=None)
    x = fft_conv_inputs(case, torch.float16, backend.device)
    alone = backend.library.spectral_conv(x.u, x.spectrum)
    scale = torch.tensor([2.0**-30, 1, 2.0**20, 0, math.inf], device=backend.device)
    scaled = x.spectrum * scale[:, None, None]
    scaled[4, 3] = math.nan
    y = backend.library.spectral_conv(x.u * 2.0**-10, scaled)
    assert (y[:, 3] == 0).all() and y[:, 4].isnan().all()
    torch.testing.assert_close(y[:, 1].float(), alone[:, 1].float() * 2.0**-10, rtol=2e-3, atol=1e-6)
    torch.testing.assert_close(y[:, 2].float() * 2.0**-10, alone[:, 2].float(), rtol=2e-3, atol=1e-3)


@on(*EVERY)
def test_ends_of_the_spectrum_are_real(backend: Backend, dtype: torch.dtype) -> None:
    """Imaginary parts of the first and the last bin do not count, and have no gradient."""
    x = fft_conv_inputs(FftConvCase("", 3, 2, 300), dtype, backend.device)
    expected = _call(backend, x)
    x.spectrum[:, [0, -1], 1] = 1e4
    found = _call(backend, x)
    assert same(found, expected)
    assert (found[2][:, [0, -1], 1] == 0).all()
