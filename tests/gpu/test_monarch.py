"""Block-diagonal and Monarch products on the GPU: large cases, and what only hardware shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import monarch
from helpers.backends import HALF
from helpers.monarch import BlockdiagCase, GluCase, Inputs, MonarchCase

pytestmark = pytest.mark.gpu

by_dtype = pytest.mark.parametrize("dtype", HALF, ids=lambda d: str(d).removeprefix("torch."))

# The benchmarks' sizes, with numbers of tokens that no tile divides.
LARGE_BLOCKDIAG = (
    BlockdiagCase("768_to_6144", (4, 515), 4, 1536, 192, bias=False),
    BlockdiagCase("1024_by_32", (3, 1001), 32, 32, 32),
    BlockdiagCase("4096_by_64", (777,), 64, 64, 64),
    BlockdiagCase("4096_by_4", (2050,), 4, 1024, 1024),
)
LARGE_MONARCH = (
    MonarchCase("768_to_3072", (4, 515), (4, 192, 192), (4, 768, 192)),
    MonarchCase("3072_to_768", (4, 515), (4, 192, 768), (4, 192, 192)),
    MonarchCase("1024_by_4", (2001,), (4, 256, 256), (4, 256, 256)),
    MonarchCase("1024_by_32", (3, 1001), (32, 32, 32), (32, 32, 32)),
    MonarchCase("4096_by_64", (777,), (64, 64, 64), (64, 64, 64)),
    MonarchCase("4096_by_4", (1030,), (4, 1024, 1024), (4, 1024, 1024)),
)
LARGE_GLU = (
    GluCase("m2_80m", (4, 515), 4, 768, 3072, 768),
    GluCase("m2_110m", (1030,), 4, 960, 3840, 960),
    GluCase("m2_260m", (515,), 4, 1536, 6144, 1536),
    GluCase("m2_341m", (515,), 4, 1792, 7168, 1792),
    GluCase("beyond_the_registers", (300,), 4, 2304, 2304, 2304),
)


@by_dtype
@pytest.mark.parametrize("case", LARGE_BLOCKDIAG, ids=str)
def test_large_blockdiag_cases(case: BlockdiagCase, dtype: torch.dtype) -> None:
    monarch.check_blockdiag_multiply(torch.ops.warpform, case, dtype, "cuda")


@by_dtype
@pytest.mark.parametrize("case", LARGE_MONARCH, ids=str)
def test_large_monarch_cases(case: MonarchCase, dtype: torch.dtype) -> None:
    monarch.check_monarch_multiply(torch.ops.warpform, case, dtype, "cuda")


@by_dtype
@pytest.mark.parametrize("case", LARGE_GLU, ids=str)
def test_large_glu_cases(case: GluCase, dtype: torch.dtype) -> None:
    monarch.check_blockdiag_glu(torch.ops.warpform, case, dtype, "cuda")


def _blockdiag(x: Inputs) -> list[Tensor]:
    ops = torch.ops.warpform
    out = ops.blockdiag_multiply(x.x, *x.weights, x.bias)
    return [out, *ops.blockdiag_multiply_backward(x.dout, x.x, *x.weights, x.has_bias)]


def _monarch(x: Inputs) -> list[Tensor]:
    ops = torch.ops.warpform
    return [ops.monarch_multiply(x.x, *x.weights), *ops.monarch_multiply_backward(x.dout, x.x, *x.weights)]


def _glu(x: Inputs) -> list[Tensor]:
    ops = torch.ops.warpform
    out = ops.blockdiag_glu(x.x, *x.weights, x.bias)
    return [out, *ops.blockdiag_glu_backward(x.dout, x.x, *x.weights, x.has_bias)]


# The op's calls, forward and backward, its inputs, and cases of it.
CALLS = [
    *((_blockdiag, monarch.blockdiag_inputs, case) for case in LARGE_BLOCKDIAG),
    *((_monarch, monarch.monarch_inputs, case) for case in LARGE_MONARCH),
    *((_glu, monarch.glu_inputs, case) for case in LARGE_GLU),
]
Call = Callable[[Inputs], list[Tensor]]
MakeInputs = Callable[..., Inputs]


def _name(value: Any) -> str:
    """Of a function its name: an address would differ from run to run, and the test's seed with it."""
    return str(getattr(value, "__name__", value))


by_call = pytest.mark.parametrize(("call", "inputs", "case"), CALLS, ids=_name)


@by_call
def test_results_repeat_bit_for_bit(call: Call, inputs: MakeInputs, case: Any) -> None:
    x = inputs(case, torch.bfloat16, "cuda")
    runs = [call(x) for _ in range(5)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@by_call
def test_a_captured_graph_sees_new_values(call: Call, inputs: MakeInputs, case: Any) -> None:
    """Forward and backward: nothing is read back by the host, nothing waits."""
    x, other = (inputs(case, torch.bfloat16, "cuda") for _ in range(2))
    call(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call(x)
    expected = call(other)
    for t, values in zip(
        (x.x, x.dout, x.bias, *x.weights), (other.x, other.dout, other.bias, *other.weights), strict=True
    ):
        if t is not None and values is not None:
            t.copy_(values)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@by_call
def test_a_side_stream_is_used(call: Call, inputs: MakeInputs, case: Any) -> None:
    """The kernels are queued behind the work of the current stream, not of the default one."""
    x = inputs(case, torch.bfloat16, "cuda")
    expected = call(x)
    ready = x.x
    x.x = torch.zeros_like(ready)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        x.x.copy_(ready)
        actual = call(x)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize(
    ("inputs", "case"),
    [
        *((monarch.monarch_inputs, case) for case in LARGE_MONARCH[:-1]),
        *((monarch.glu_inputs, case) for case in LARGE_GLU[:-1]),
    ],
    ids=_name,
)
def test_forward_allocates_its_result_alone(inputs: MakeInputs, case: Any) -> None:
    """What lies between the factors never leaves the chip."""
    if torch.cuda.get_device_properties(0).shared_memory_per_block_optin < 200_000:
        pytest.skip("needs the shared memory of Hopper")
    x = inputs(case, torch.bfloat16, "cuda")
    ops = torch.ops.warpform

    def forward() -> Tensor:
        if isinstance(case, GluCase):
            return ops.blockdiag_glu(x.x, *x.weights, x.bias)
        return ops.monarch_multiply(x.x, *x.weights)

    forward()
    torch.cuda.synchronize()
    # Bytes that were asked for: what the allocator hands out may be a larger block that it has left.
    requested = "requested_bytes.all."
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()[requested + "current"]
    out = forward()
    assert torch.cuda.memory_stats()[requested + "peak"] - before <= out.numel() * out.element_size()


@pytest.mark.huge(gigabytes=20)
def test_more_elements_than_32_bits_count() -> None:
    """x and the output have more than 2^31 elements; the last rows are checked against the same rows by themselves."""
    rows, width = 300, 4096
    tokens = 2**31 // width + 1000
    ops = torch.ops.warpform
    small = monarch.monarch_inputs(MonarchCase("", (rows,), (64, 64, 64), (64, 64, 64)), torch.bfloat16, "cuda")
    x = torch.zeros(tokens, width, dtype=torch.bfloat16, device="cuda")
    x[-rows:] = small.x
    assert torch.equal(ops.monarch_multiply(x, *small.weights)[-rows:], ops.monarch_multiply(small.x, *small.weights))
    w = small.weights[0]
    assert torch.equal(ops.blockdiag_multiply(x, w)[-rows:], ops.blockdiag_multiply(small.x, w))
