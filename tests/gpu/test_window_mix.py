"""window_mix on the GPU: large cases, and what only hardware shows."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from helpers.cases import KERNEL_DTYPES
from helpers.window_mix import WindowMixCase, WindowMixInputs, check_window_mix, window_mix_inputs

pytestmark = pytest.mark.gpu

by_dtype = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=lambda d: str(d).removeprefix("torch."))
# Enough tiles that every block of the weight's gradient walks over several. Those of MAXIM-S at 256 x 256, and others.
LARGE_CASES = (
    WindowMixCase("level_0", (256, 256), (16, 16), 32),
    WindowMixCase("level_0_grid", (256, 256), (16, 16), 32, dilated=True),
    WindowMixCase("level_1", (128, 128), (16, 16), 64, batch=2, wide_norm=True),
    WindowMixCase("level_2_grid", (64, 64), (8, 8), 128, batch=2, dilated=True, wide_norm=True),
    WindowMixCase("cross_gating", (64, 64), (8, 8), 128, batch=2, norm=None, gate=False),
    WindowMixCase("odd", (105, 99), (15, 11), 97, batch=2, dilated=True),
    WindowMixCase("one_window", (31, 17), (31, 17), 72, batch=3),
)


def _call(x: WindowMixInputs) -> tuple[torch.Tensor, ...]:
    return x.call(torch.ops.warpform)


@by_dtype
@pytest.mark.parametrize("case", LARGE_CASES, ids=str)
def test_large_cases(case: WindowMixCase, dtype: torch.dtype) -> None:
    check_window_mix(torch.ops.warpform, case, dtype, "cuda")


@pytest.mark.parametrize("case", LARGE_CASES, ids=str)
def test_results_repeat_bit_for_bit(case: WindowMixCase) -> None:
    x = window_mix_inputs(case, torch.bfloat16, "cuda")
    runs = [_call(x) for _ in range(5)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("case", LARGE_CASES, ids=str)
def test_forward_allocates_its_results_alone(case: WindowMixCase) -> None:
    """Halves of one product are read where they are; no window is moved, and y is not written beside its gate."""
    x = window_mix_inputs(case, torch.bfloat16, "cuda")
    x.forward(torch.ops.warpform)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # a larger block that lies about would be counted whole
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = x.forward(torch.ops.warpform)
    block = 512  # what the allocator rounds up to
    results = sum(-(-t.numel() * t.element_size() // block) * block for t in found)
    assert torch.cuda.max_memory_allocated() - before <= results


@pytest.mark.parametrize("case", LARGE_CASES[2:4], ids=str)
def test_a_captured_graph_sees_new_values(case: WindowMixCase) -> None:
    """Forward and backward: nothing is read back by the host, nothing waits."""
    x, other = (window_mix_inputs(case, torch.bfloat16, "cuda") for _ in range(2))
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
    x = window_mix_inputs(LARGE_CASES[2], torch.bfloat16, "cuda")
    expected = _call(x)
    ready = x.x
    x.x = torch.zeros_like(ready)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        x.x.copy_(ready)
        actual = _call(x)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.huge(gigabytes=40)
@pytest.mark.parametrize("channels", (32, 96), ids=("whole_tokens", "norm_apart"))
def test_more_elements_than_32_bits_count(channels: int) -> None:
    """x has more than 2^31 elements; the last image is checked against the same image by itself."""
    case = WindowMixCase("", (64, 64), (8, 8), channels, wide_norm=True)
    batch = 2**31 // (math.prod(case.grid) * channels) + 2
    small = window_mix_inputs(case, torch.bfloat16, "cuda")
    expected = _call(small)
    wide = torch.zeros(batch, *case.grid, 2 * channels, dtype=torch.bfloat16, device="cuda")
    gate, x = wide.split(channels, -1)
    large = replace(small, x=x, gate=gate, dout=torch.zeros_like(x, memory_format=torch.contiguous_format))
    assert small.gate is not None
    x[-1], gate[-1], large.dout[-1] = small.x[0], small.gate[0], small.dout[0]
    actual = _call(large)
    for i in (0, 3, 8):  # out, dx, dgate
        assert torch.equal(actual[i][-1], expected[i][0])
