"""spectral_conv and its backward on a GPU: large cases, and what only hardware can show."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from helpers import fft_conv as helpers
from helpers import staged_fft
from helpers.backends import HALF
from helpers.fft_conv import FftConvCase, FftConvInputs, fft_conv_inputs

pytestmark = pytest.mark.gpu

by_dtype = pytest.mark.parametrize("dtype", HALF, ids=lambda d: str(d).removeprefix("torch."))

# Every size, whole and cut, with more sequences than a block takes at a time.
LARGE_CASES = tuple(
    FftConvCase(f"l{seqlen}", 37, 24, seqlen, pregate=seqlen % 3 > 0, postgate=seqlen % 2 == 0)
    for points in staged_fft.SIZES
    for seqlen in (points, points - points // 5 - 3)
)


def _check(case: FftConvCase, dtype: torch.dtype) -> None:
    helpers.check_spectral_conv(
        torch.ops.warpform,
        case,
        dtype,
        "cuda",
        eager=staged_fft.spectral_conv,
        eager_backward=staged_fft.spectral_conv_backward,
    )


def _call(x: FftConvInputs) -> tuple[torch.Tensor, ...]:
    """y, du, dspectrum, dskip, dpregate, dpostgate."""
    ops = torch.ops.warpform
    return ops.spectral_conv(*x.tensors), *ops.spectral_conv_backward(x.dout, *x.tensors)


@by_dtype
@pytest.mark.parametrize("case", LARGE_CASES, ids=str)
def test_large_cases(case: FftConvCase, dtype: torch.dtype) -> None:
    _check(case, dtype)


@pytest.mark.parametrize("case", LARGE_CASES, ids=str)
def test_results_repeat_bit_for_bit(case: FftConvCase) -> None:
    x = fft_conv_inputs(case, torch.bfloat16, "cuda")
    runs = [_call(x) for _ in range(5)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("case", LARGE_CASES[::5], ids=str)
def test_a_captured_graph_sees_new_values(case: FftConvCase) -> None:
    """Forward and backward: nothing is read back by the host, nothing waits."""
    x, other = (fft_conv_inputs(case, torch.bfloat16, "cuda") for _ in range(2))
    _call(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = _call(x)
    expected = _call(other)
    for t, values in zip((x.dout, *x.tensors), (other.dout, *other.tensors), strict=True):
        if t is not None and values is not None:
            t.copy_(values)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_a_side_stream_is_used() -> None:
    """The kernels are queued behind the work of the current stream, not of the default one."""
    x = fft_conv_inputs(LARGE_CASES[4], torch.bfloat16, "cuda")
    expected = _call(x)
    ready = x.u
    x.u = torch.zeros_like(ready)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        x.u.copy_(ready)
        actual = _call(x)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.huge(gigabytes=20)
def test_more_elements_than_32_bits_count() -> None:
    """u has more than 2^31 elements; the last sequences are checked against the same ones by themselves."""
    case = FftConvCase("", 2**31 // (32 * 32768) + 2, 32, 32768, skip=None)
    small = fft_conv_inputs(replace(case, batch=2), torch.bfloat16, "cuda")
    expected = _call(small)
    large = replace(
        small,
        u=torch.zeros(case.batch, *small.u.shape[1:], dtype=torch.bfloat16, device="cuda"),
        dout=torch.zeros(case.batch, *small.dout.shape[1:], dtype=torch.bfloat16, device="cuda"),
    )
    large.u[-2:], large.dout[-2:] = small.u, small.dout
    actual = _call(large)
    assert torch.equal(actual[0][-2:], expected[0]) and torch.equal(actual[1][-2:], expected[1])
    assert torch.equal(actual[2], expected[2])  # zeros add nothing
