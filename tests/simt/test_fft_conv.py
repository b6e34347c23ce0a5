"""spectral_conv's kernels in the emulator: what is asked of them alone."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import fft_conv as helpers
from helpers import staged_fft
from helpers.backends import AD102_SHARED, FEW_SMS, H200_SHARED
from helpers.fft_conv import FftConvCase


def _check(library: Any, case: FftConvCase, dtype: torch.dtype, *, backward: bool = True) -> None:
    helpers.check_spectral_conv(
        library,
        case,
        dtype,
        eager=staged_fft.spectral_conv,
        eager_backward=staged_fft.spectral_conv_backward,
        backward=backward,
    )


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

    simt.configure(1, FEW_SMS, AD102_SHARED)
    call(8192)
    with pytest.raises(RuntimeError, match="no kernel: sequences of this length need more shared memory"):
        call(8193)
    simt.configure(1, FEW_SMS, H200_SHARED)
    call(32768)
    with pytest.raises(RuntimeError, match="no kernel: sequences of more than 32768 values"):
        call(32769)


U, S = torch.zeros(2, 3, 100).half(), torch.zeros(3, 257, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": U.float()}, "no kernel: the kernels take float16 and bfloat16"),
        ({"spectrum": torch.zeros(3, 129, 2)}, "no kernel: the spectrum is not of twice the points"),
        ({"pregate": U.float()}, "pregate must be float16 as u is, got float32"),
        ({"skip": torch.zeros(3).double()}, "skip must be float16 as u is, or float32, got float64"),
        ({"u": U[0]}, r"u must be of shape \[batch, channels, seqlen\], got"),
        ({"spectrum": S[:2]}, r"spectrum must be of shape \[3, n / 2 \+ 1, 2\], n at least 2, got"),
        ({"spectrum": S.double()}, "spectrum must be torch.float32 where u is torch.float16, got torch.float64"),
        ({"spectrum": S[:, :50]}, "spectrum must be of at least the 100 points that u has, got 98"),
        ({"skip": torch.zeros(4)}, r"skip must be of shape \[3\], got"),
        ({"pregate": U[1:]}, r"pregate must be of shape \[2, 3, 100\], got"),
        ({"postgate": U.int()}, "postgate must be float16 as u is, got int32"),
    ],
)
def test_bad_input(simt: Any, change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"u": U, "spectrum": S, "skip": None, "pregate": None, "postgate": None} | change
    with pytest.raises(RuntimeError, match=f"spectral_conv: .*{message}"):
        simt.spectral_conv(**arguments)
    with pytest.raises(RuntimeError, match="spectral_conv_backward: "):
        simt.spectral_conv_backward(arguments["u"], **arguments)


def test_bad_gradient_input(simt: Any) -> None:
    for dout, message in ((U[1:], "dout must be of shape"), (U.float(), "dout must be float16 as u is")):
        with pytest.raises(RuntimeError, match=f"spectral_conv_backward: {message}"):
            simt.spectral_conv_backward(dout, U, S, None, None, None)
