"""short_conv_gate on the GPU: large cases, and what only hardware shows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import warpform
from helpers import cases
from helpers import fft_conv as convolutions
from helpers.fft_conv import ShortConvCase, ShortConvInputs, short_conv_inputs

pytestmark = pytest.mark.gpu

OPS: Any = torch.ops.warpform
by_dtype = pytest.mark.parametrize("dtype", cases.KERNEL_DTYPES, ids=lambda d: str(d).removeprefix("torch."))
# Enough tiles that every block of the backward pass walks over many.
LARGE_CASES = (
    ShortConvCase("m2_128", 64, 128, 768),
    ShortConvCase("m2_4096", 4, 4096, 768),
    ShortConvCase("m2_odd", 3, 4097, 961),
    ShortConvCase("many_rows", 70000, 3, 8),
    ShortConvCase("long", 1, 100_003, 24, taps=4),
)


def _call(x: ShortConvInputs) -> tuple[torch.Tensor, ...]:
    """gated, gate, dx, dweight, dbias."""
    arguments = (x.x, x.weight, x.bias)
    return *OPS.short_conv_gate(*arguments), *OPS.short_conv_gate_backward(x.dgated, x.dgate, *arguments)


@by_dtype
@pytest.mark.parametrize("case", LARGE_CASES, ids=str)
def test_large_cases(case: ShortConvCase, dtype: torch.dtype) -> None:
    convolutions.check_short_conv_gate(OPS, case, dtype, "cuda")


@by_dtype
def test_results_repeat_bit_for_bit(dtype: torch.dtype) -> None:
    x = short_conv_inputs(ShortConvCase("", 7, 1000, 200), dtype, "cuda")
    runs = [_call(x) for _ in range(5)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.huge(gigabytes=24)
def test_more_elements_than_32_bits_count() -> None:
    batch, seqlen, channels = 90, 10_000, 1024  # x has 2.8e9 elements
    x = torch.empty(batch, seqlen, 3 * channels, dtype=torch.float16, device="cuda").normal_()
    weight = torch.randn(3 * channels, 3, device="cuda").half()
    gated, gate = OPS.short_conv_gate(x, weight)
    alone = OPS.short_conv_gate(x[-1:], weight)
    assert torch.equal(gated[-1:], alone[0]) and torch.equal(gate[-1:], alone[1])
    dx, _, _ = OPS.short_conv_gate_backward(gated, gate, x, weight, None)
    assert torch.equal(dx[-1:], OPS.short_conv_gate_backward(*alone, x[-1:], weight, None)[0])


def test_gradients_reach_the_parameters() -> None:
    x = short_conv_inputs(ShortConvCase("", 2, 50, 24), torch.bfloat16, "cuda")
    assert x.bias is not None
    leaves = [t.requires_grad_() for t in (x.x, x.weight, x.bias)]
    outputs = warpform.ops.short_conv_gate(*leaves)
    found = torch.autograd.grad(outputs, leaves, (x.dgated, x.dgate))
    assert all(torch.equal(a, b) for a, b in zip(found, _call(x)[2:], strict=True))


def test_a_captured_graph_replays() -> None:
    x = short_conv_inputs(ShortConvCase("", 2, 333, 72), torch.float16, "cuda")
    with torch.inference_mode():
        _call(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = _call(x)
        x.x.normal_()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, _call(x), strict=True))


def test_what_has_no_kernel_is_refused_under_strict() -> None:
    x = torch.zeros(1, 9, 24, device="cuda")
    with pytest.raises(RuntimeError, match="float64"):
        OPS.short_conv_gate(x.double(), torch.zeros(24, 3, device="cuda").double())
    with pytest.raises(RuntimeError, match="5 taps"):
        OPS.short_conv_gate(x, torch.zeros(24, 5, device="cuda"))
