"""spectral_conv and its backward: the CUDA kernels, run in the emulator."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from helpers import fft_conv as helpers
from helpers import staged_fft
from helpers.drawn import drawn
from helpers.fft_conv import FftConvCase, FftConvInputs, fft_conv_inputs

DTYPES = (torch.float16, torch.bfloat16)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))

# On one multiprocessor a block walks over the whole batch; on many, every step has a block of its own.
FEW_SMS, MANY_SMS = 1, 1024
H200_SHARED, AD102_SHARED = 232_448, 101_376

# Whole and cut, even and odd batches, one and several steps a block.
SIZES = (
    FftConvCase("l256", 19, 1, 256, pregate=True),
    FftConvCase("l512", 17, 2, 499, postgate=True),
    FftConvCase("l1024", 9, 1, 1000, skip="u"),
    FftConvCase("l2048", 5, 1, 2001, skip=None, pregate=True, postgate=True),
    FftConvCase("l4096", 3, 1, 4088, pregate=True, postgate=True),
)


def _check(library: Any, case: FftConvCase, dtype: torch.dtype, *, backward: bool = True) -> None:
    helpers.check_spectral_conv(
        library,
        case,
        dtype,
        eager=staged_fft.spectral_conv,
        eager_backward=staged_fft.spectral_conv_backward,
        backward=backward,
    )


def _call(library: Any, x: FftConvInputs) -> tuple[Tensor, ...]:
    """y, du, dspectrum, dskip, dpregate, dpostgate."""
    return library.spectral_conv(*x.tensors), *library.spectral_conv_backward(x.dout, *x.tensors)


@by_dtype
@pytest.mark.parametrize("case", helpers.FFT_CONV_CASES + SIZES, ids=str)
def test_cases(simt: Any, case: FftConvCase, dtype: torch.dtype) -> None:
    for seed, sm_count in ((0, FEW_SMS), (len(case.name), MANY_SMS)):
        simt._configure(seed, sm_count)
        _check(simt, case, dtype)


@pytest.mark.parametrize("case", helpers.LONG_FFT_CONV_CASES, ids=str)
def test_long_cases(simt: Any, case: FftConvCase) -> None:
    _check(simt, case, DTYPES[len(case.name) % 2])


@drawn(
    40,
    case=helpers.fft_conv_cases(),
    dtype=st.sampled_from(DTYPES),
    sm_count=st.sampled_from((FEW_SMS, 4, MANY_SMS)),
)
def test_drawn(simt: Any, case: FftConvCase, dtype: torch.dtype, seed: int, sm_count: int) -> None:
    simt._configure(seed, sm_count)
    _check(simt, case, dtype)


@pytest.mark.parametrize("seqlen", (200, 1000, 8192, 32768))
def test_results_repeat_bit_for_bit(simt: Any, seqlen: int) -> None:
    """In any order of blocks and threads: nothing is added by whoever comes first."""
    case = FftConvCase("", 4 if seqlen > 4096 else 19, 1, seqlen, pregate=True, postgate=True)
    x = fft_conv_inputs(case, torch.bfloat16)
    runs = []
    for seed in (1, 2, 3):
        simt._configure(seed, 3)
        runs.append(_call(simt, x))
    for name, *results in zip(("y", "du", "dspectrum", "dskip", "dpregate", "dpostgate"), *runs, strict=True):
        assert all(torch.equal(results[0], r) for r in results[1:]), name


@pytest.mark.parametrize("seqlen", (130, 300, 1024, 2000, 4096, 5001, 16384, 20000))
def test_one_tap_shifts(simt: Any, seqlen: int) -> None:
    """A filter of one tap moves sequences; every bin and position has its place."""
    points, tap = helpers.points_of(seqlen), seqlen // 3
    k = torch.zeros(1, points)
    k[:, tap] = 1
    u = torch.randn(1, 1, seqlen).half()
    y = simt.spectral_conv(u, torch.view_as_real(torch.fft.rfft(k)).contiguous())
    expected = torch.nn.functional.pad(u, (tap, 0))[..., :seqlen]
    torch.testing.assert_close(y, expected, rtol=0, atol=4 * torch.finfo(torch.float16).eps * float(u.abs().max()))


@pytest.mark.parametrize("seqlen", (200, 1000, 3000, 20000))
def test_sequences_do_not_disturb_each_other(simt: Any, seqlen: int) -> None:
    """Two share a transform: one that is not finite, zero, huge or tiny leaves the other's results as they are (but for
    the last bit), and its own are what they would be alone."""
    torch.manual_seed(0)
    case = FftConvCase("", 2, 1, seqlen, pregate=True, postgate=True)
    x = fft_conv_inputs(case, torch.bfloat16)
    x.u[1] = 0
    eps = torch.finfo(torch.bfloat16).eps
    reference = _call(simt, x)
    for value in (math.nan, math.inf, 1e-30, 1e30):
        x.u[1].fill_(value)
        found = _call(simt, x)
        for i, name in ((0, "y"), (1, "du"), (4, "dpregate"), (5, "dpostgate")):
            a, b = found[i][0], reference[i][0]
            if math.isfinite(value):  # values beside it are rounded otherwise
                torch.testing.assert_close(a, b, rtol=0, atol=eps * float(b.abs().max()), msg=f"{name}, {value}")
            else:
                assert torch.equal(a, b), (name, value)
        if not math.isfinite(value):
            assert found[0][1].isnan().all() and found[2][..., 0].isnan().all()
    x = fft_conv_inputs(case, torch.bfloat16)
    whole = simt.spectral_conv(*x.tensors)
    x.u[0] *= 1e-20
    torch.testing.assert_close(
        simt.spectral_conv(*x.tensors)[1], whole[1], rtol=0, atol=eps * float(whole[1].abs().max())
    )
    small, _ = helpers._spectral_oracle(helpers.spectral_conv, x, torch.float64)
    error = (simt.spectral_conv(*x.tensors)[0].double() - small[0]).abs().max()
    assert error <= 2 * eps * small[0].abs().max()
    x.u[0] = 0
    assert (simt.spectral_conv(*x.tensors)[0] == 0).all()


@pytest.mark.parametrize("seqlen", (256, 1024, 4096, 8192, 16384, 32768))
def test_constants_do_not_overflow(simt: Any, seqlen: int) -> None:
    """The largest constant that float16 holds, and a filter that adds it all up and divides by the length."""
    points = helpers.points_of(seqlen)
    k = torch.zeros(1, points)
    k[:, :seqlen] = 1 / seqlen
    u = torch.full((2, 1, seqlen), 65504.0).half()
    u[1] = -u[1]
    spectrum = torch.view_as_real(torch.fft.rfft(k)).contiguous()
    y = simt.spectral_conv(u, spectrum)
    expected = 65504 * torch.arange(1, seqlen + 1) / seqlen
    eps = torch.finfo(torch.float16).eps
    for row, sign in ((0, 1), (1, -1)):
        # The last may round to infinity only if it is more than the largest.
        assert ((y[row, 0, :-8].double() - sign * expected[:-8]).abs() <= 4 * eps * 65504).all()
    du, dspectrum, *_ = simt.spectral_conv_backward(u, u, spectrum, None, None, None)
    assert du[..., 8:].isfinite().all() and dspectrum.isfinite().all()


def test_a_spectrum_of_any_size(simt: Any) -> None:
    """Channels have scales of their own; zeros and what is not finite stay in their channel."""
    case = FftConvCase("", 2, 5, 100, skip=None)
    x = fft_conv_inputs(case, torch.float16)
    alone = simt.spectral_conv(x.u, x.spectrum)
    scale = torch.tensor([2.0**-30, 1, 2.0**20, 0, math.inf])
    spectrum = x.spectrum * scale[:, None, None]
    spectrum[4, 3] = math.nan
    y = simt.spectral_conv(x.u * 2.0**-10, spectrum)
    assert (y[:, 3] == 0).all() and y[:, 4].isnan().all()
    torch.testing.assert_close(y[:, 1].float(), alone[:, 1].float() * 2.0**-10, rtol=2e-3, atol=1e-6)
    torch.testing.assert_close(y[:, 2].float() * 2.0**-10, alone[:, 2].float(), rtol=2e-3, atol=1e-3)


def test_ends_of_the_spectrum_are_real(simt: Any) -> None:
    """Imaginary parts of the first and the last bin do not count, and have no gradient."""
    x = fft_conv_inputs(FftConvCase("", 3, 2, 300), torch.float16)
    expected = _call(simt, x)
    x.spectrum[:, [0, -1], 1] = 1e4
    found = _call(simt, x)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert (found[2][:, [0, -1], 1] == 0).all()


@pytest.mark.parametrize("wrong", ("skip", "pregate", "postgate", "bin", "conjugate"))
def test_a_broken_call_is_caught(simt: Any, wrong: str) -> None:
    """The kernels told something else than the oracle."""

    class Broken:
        @staticmethod
        def spectral_conv(u: Tensor, s: Tensor, *rest: Tensor | None) -> Tensor:
            skip, pregate, postgate = rest
            if wrong == "bin":
                s = s.clone()
                s[:, 77] = 0
            if wrong == "conjugate":
                s = s * torch.tensor([1.0, -1.0])
            return simt.spectral_conv(
                u,
                s,
                None if wrong == "skip" else skip,
                None if wrong == "pregate" else pregate,
                None if wrong == "postgate" else postgate,
            )

    case = FftConvCase("", 2, 2, 256, pregate=True, postgate=True)
    _check(simt, case, torch.float16, backward=False)
    with pytest.raises(AssertionError, match="y: (largest|mean) error"):
        _check(Broken, case, torch.float16, backward=False)


def test_kernel_table_lists_what_runs(simt: Any) -> None:
    rows = [row for row in json.loads(simt._kernel_table()) if row["op"].startswith("spectral_conv")]
    assert {(row["op"], row["dtype"]) for row in rows} == {
        (op, dtype) for op in ("spectral_conv", "spectral_conv_backward") for dtype in ("float16", "bfloat16")
    }
    assert all(row["length"] == {"max": staged_fft.SIZES[-1]} for row in rows)


def test_sequences_too_long_for_the_gpu(simt: Any) -> None:
    def call(seqlen: int) -> None:
        simt.spectral_conv(torch.zeros(1, 0, seqlen).half(), torch.zeros(0, helpers.points_of(seqlen) // 2 + 1, 2))

    simt._configure(1, FEW_SMS, AD102_SHARED)
    call(8192)
    with pytest.raises(RuntimeError, match="no kernel: sequences of this length need more shared memory"):
        call(8193)
    simt._configure(1, FEW_SMS, H200_SHARED)
    call(32768)
    with pytest.raises(RuntimeError, match="no kernel: sequences of more than 32768 values"):
        call(32769)


U, S = torch.zeros(2, 3, 100).half(), torch.zeros(3, 257, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": U.float()}, "no kernel: the kernels take float16 and bfloat16"),
        ({"spectrum": torch.zeros(3, 129, 2)}, "no kernel: the spectrum is not of twice the points"),
        ({"pregate": U.float()}, "no kernel: a gate is not of u's dtype"),
        ({"skip": torch.zeros(3).double()}, "no kernel: skip is neither of u's dtype nor float32"),
        ({"u": U[0]}, r"u must be floating-point of shape \[batch, channels, seqlen\], got"),
        ({"spectrum": S[:2]}, r"spectrum must be float32 of shape \[3, n / 2 \+ 1, 2\], got"),
        ({"spectrum": S.double()}, r"spectrum must be float32 of shape"),
        ({"spectrum": S[:, :50]}, "spectrum must be of at least the 100 points that u has, got 98"),
        ({"skip": torch.zeros(4)}, r"skip must be floating-point of shape \[3\], got"),
        ({"pregate": U[1:]}, "pregate must be floating-point and have the shape of u"),
        ({"postgate": U.int()}, "postgate must be floating-point and have the shape of u"),
    ],
)
def test_bad_input(simt: Any, change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"u": U, "spectrum": S, "skip": None, "pregate": None, "postgate": None} | change
    with pytest.raises(RuntimeError, match=f"spectral_conv: .*{message}"):
        simt.spectral_conv(**arguments)
    with pytest.raises(RuntimeError, match="spectral_conv_backward: "):
        simt.spectral_conv_backward(arguments["u"], **arguments)


def test_bad_gradient_input(simt: Any) -> None:
    for dout, message in ((U[1:], "dout must be floating-point and have the shape"), (U.float(), "dout must have the")):
        with pytest.raises(RuntimeError, match=f"spectral_conv_backward: {message}"):
            simt.spectral_conv_backward(dout, U, S, None, None, None)
