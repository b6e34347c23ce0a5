"""pool_mixer and depthwise_conv2d on the GPU: large cases, and what only hardware shows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import warpform
from helpers import cases
from helpers import spatial as helpers
from helpers.spatial import DepthwiseCase, DepthwiseInputs, PoolMixerCase, PoolMixerInputs

pytestmark = pytest.mark.gpu

OPS: Any = torch.ops.warpform
by_dtype = pytest.mark.parametrize("dtype", cases.KERNEL_DTYPES, ids=lambda d: str(d).removeprefix("torch."))
LARGE_POOL_CASES = (
    PoolMixerCase("s12_first_stage", (16, 56, 56, 64)),
    PoolMixerCase("s12_last_stage", (32, 7, 7, 512), wide_parameters=True),
    PoolMixerCase("odd", (5, 93, 61, 65), pool_size=5),
    PoolMixerCase("many_samples", (70000, 2, 3, 8)),
    PoolMixerCase("many_chunks", (1, 1100, 1000, 24), pool_size=7, scale=False),  # of more than one pass each
)
LARGE_DEPTHWISE_CASES = (
    DepthwiseCase("b5_first_stage", (1, 128, 128, 256)),
    DepthwiseCase("b5_last_stage", (4, 16, 16, 2048)),
    DepthwiseCase("odd", (3, 93, 61, 65), size=5, activation="relu"),
    DepthwiseCase("seven", (4, 64, 64, 64), size=7, activation="linear"),
    DepthwiseCase("many_samples", (70000, 2, 3, 8)),
    DepthwiseCase("one_channel", (2, 600, 601, 1), activation="linear", bias=False),
)


def _pool(x: PoolMixerInputs) -> tuple[torch.Tensor, ...]:
    """out, mean, rstd, dx, dweight, dscale."""
    out, mean, rstd = OPS.pool_mixer(*x.tensors)
    return out, mean, rstd, *OPS.pool_mixer_backward(x.dout, *x.tensors, mean, rstd)


def _convolve(x: DepthwiseInputs, activation: str = "gelu") -> tuple[torch.Tensor, ...]:
    """out, dx, dweight, dbias."""
    out = OPS.depthwise_conv2d(*x.tensors, activation=activation)
    return out, *OPS.depthwise_conv2d_backward(x.dout, *x.tensors, activation=activation)


@by_dtype
@pytest.mark.parametrize("case", LARGE_POOL_CASES, ids=str)
def test_large_cases_of_pool_mixer(case: PoolMixerCase, dtype: torch.dtype) -> None:
    helpers.check_pool_mixer(OPS, case, dtype, "cuda")


@by_dtype
@pytest.mark.parametrize("case", LARGE_DEPTHWISE_CASES, ids=str)
def test_large_cases_of_depthwise_conv2d(case: DepthwiseCase, dtype: torch.dtype) -> None:
    helpers.check_depthwise_conv2d(OPS, case, dtype, "cuda")


@by_dtype
def test_results_repeat_bit_for_bit(dtype: torch.dtype) -> None:
    pooled = helpers.pool_mixer_inputs(PoolMixerCase("", (9, 57, 40, 96)), dtype, "cuda")
    convolved = helpers.depthwise_inputs(DepthwiseCase("", (9, 57, 40, 96)), dtype, "cuda")
    runs = [(*_pool(pooled), *_convolve(convolved)) for _ in range(5)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_gradients_reach_the_parameters() -> None:
    x = helpers.pool_mixer_inputs(PoolMixerCase("", (2, 9, 20, 24)), torch.bfloat16, "cuda")
    assert x.scale is not None
    leaves = [t.requires_grad_() for t in (x.x, x.weight, x.scale)]
    found = torch.autograd.grad(warpform.ops.pool_mixer(*leaves), leaves, x.dout)
    assert all(torch.equal(a, b) for a, b in zip(found, _pool(x)[3:], strict=True))
    y = helpers.depthwise_inputs(DepthwiseCase("", (2, 9, 20, 24)), torch.bfloat16, "cuda")
    assert y.bias is not None
    leaves = [t.requires_grad_() for t in (y.x, y.weight, y.bias)]
    found = torch.autograd.grad(warpform.ops.depthwise_conv2d(*leaves, activation="gelu"), leaves, y.dout)
    assert all(torch.equal(a, b) for a, b in zip(found, _convolve(y)[1:], strict=True))


def test_a_captured_graph_replays() -> None:
    pooled = helpers.pool_mixer_inputs(PoolMixerCase("", (2, 19, 33, 72)), torch.float16, "cuda")
    convolved = helpers.depthwise_inputs(DepthwiseCase("", (2, 19, 33, 72)), torch.float16, "cuda")

    def call() -> tuple[torch.Tensor, ...]:
        return *_pool(pooled), *_convolve(convolved)

    with torch.inference_mode():
        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        pooled.x.normal_()
        convolved.x.normal_()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, call(), strict=True))


def test_other_streams() -> None:
    """Kernels run on the current stream, behind what it holds."""
    x = helpers.depthwise_inputs(DepthwiseCase("", (4, 64, 64, 64)), torch.float16, "cuda")
    expected = _convolve(x)
    source = x.x.clone()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        x.x.zero_()
        torch.cuda._sleep(10_000_000)
        x.x.copy_(source)
        found = _convolve(x)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.huge(gigabytes=32)
def test_more_elements_than_32_bits_count() -> None:
    batch, height, width, channels = 11, 500, 500, 1024  # 2.8e9 elements
    x = torch.empty(batch, height, width, channels, dtype=torch.float16, device="cuda").normal_()
    weight, taps = torch.randn(channels, device="cuda").half(), torch.randn(channels, 3, 3, device="cuda").half()
    for whole, alone in (
        (OPS.pool_mixer(x, weight), OPS.pool_mixer(x[-1:], weight)),
        ((OPS.depthwise_conv2d(x, taps),), (OPS.depthwise_conv2d(x[-1:], taps),)),
    ):
        assert all(torch.equal(a[-1:], b) for a, b in zip(whole, alone, strict=True))
    dx, _, _ = OPS.depthwise_conv2d_backward(x, x, taps, None)
    assert torch.equal(dx[-1:], OPS.depthwise_conv2d_backward(x[-1:], x[-1:], taps, None)[0])
    one = torch.ones(batch, device="cuda")
    dx, _, _ = OPS.pool_mixer_backward(x, x, weight, None, 0 * one, one)
    assert torch.equal(dx[-1:], OPS.pool_mixer_backward(x[-1:], x[-1:], weight, None, 0 * one[:1], one[:1])[0])


def test_what_has_no_kernel_is_refused_under_strict() -> None:
    x, row = torch.zeros(1, 9, 9, 8, device="cuda"), torch.ones(8, device="cuda")
    with pytest.raises(RuntimeError, match="float64"):
        OPS.pool_mixer(x.double(), row.double())
    with pytest.raises(RuntimeError, match="stencils of 3, 5 or 7"):
        OPS.depthwise_conv2d(x, torch.zeros(8, 9, 9, device="cuda"))
