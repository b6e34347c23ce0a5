"""window_attention on the GPU: large cases, and what only hardware shows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from helpers import cases, checks
from helpers.cases import WindowCase, WindowInputs, window_inputs
from helpers.compare import assert_close

pytestmark = pytest.mark.gpu

DTYPES = (torch.float16, torch.bfloat16)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
CASES = tuple(case for case in cases.WINDOW_CASES if case.head_dim % 8 == 0)
# Enough windows for every block of the GPU to walk over several.
MANY_CASES = tuple(
    replace(case, name=f"{case.name}_many", grid=tuple(4 * n + 3 for n in case.grid), batch=case.batch * 8)
    for case in CASES
    if case.tokens <= 256
)
LARGE_CASES = (
    WindowCase("swin_t_56", (56, 56), (7, 7), (3, 3), batch=16, heads=3),
    WindowCase("swin_t_14", (14, 14), (7, 7), (3, 3), batch=16, heads=12),
    WindowCase("swin_v2_64", (64, 64), (8, 8), (4, 4), batch=8, heads=3, cosine=True, mask_value=-200.0),
    WindowCase("swin_v2_w16", (48, 64), (16, 16), (8, 8), batch=2, heads=6, cosine=True, qkv_bias=True),
    WindowCase("swin_l_w12", (45, 50), (12, 12), (6, 6), batch=2, heads=12, qkv_bias=True),
    WindowCase("w24", (48, 30), (24, 24), (12, 12), heads=4, qkv_bias=True),
    WindowCase("video", (8, 28, 28), (8, 7, 7), (4, 3, 3), heads=6),
    WindowCase("dit_3d", (8, 8, 8), (4, 4, 4), batch=16, heads=6, head_dim=64),
)


def _call(x: WindowInputs) -> tuple[torch.Tensor, ...]:
    """out, lse, dqkv, dtable, dlogit_scale, dqkv_bias."""
    ops = torch.ops.warpform
    out, lse = ops.window_attention(*x.tensors, **x.options)
    return out, lse, *ops.window_attention_backward(x.dout, *x.tensors, out, lse, **x.options)


@by_dtype
@pytest.mark.parametrize("case", MANY_CASES + LARGE_CASES, ids=str)
def test_large_cases(case: WindowCase, dtype: torch.dtype) -> None:
    checks.check_window_attention(torch.ops.warpform, case, dtype, "cuda")


@pytest.mark.parametrize("case", LARGE_CASES, ids=str)
def test_results_repeat_bit_for_bit(case: WindowCase) -> None:
    x = window_inputs(case, torch.bfloat16, "cuda")
    runs = [_call(x) for _ in range(5)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("case", LARGE_CASES, ids=str)
def test_forward_allocates_its_results_alone(case: WindowCase) -> None:
    """No copy that is rolled, padded or cut into windows, no mask, no expanded bias."""
    x = window_inputs(case, torch.bfloat16, "cuda")
    torch.ops.warpform.window_attention(*x.tensors, **x.options)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # a larger block that lies about would be counted whole
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, lse = torch.ops.warpform.window_attention(*x.tensors, **x.options)
    block = 512  # what the allocator rounds up to
    results = sum(-(-t.numel() * t.element_size() // block) * block for t in (out, lse))
    assert torch.cuda.max_memory_allocated() - before <= results


@pytest.mark.parametrize("case", LARGE_CASES[:4:3], ids=str)
def test_a_captured_graph_sees_new_values(case: WindowCase) -> None:
    """Forward and backward: nothing is read back by the host, nothing waits."""
    x, other = (window_inputs(case, torch.bfloat16, "cuda") for _ in range(2))
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
    x = window_inputs(LARGE_CASES[0], torch.bfloat16, "cuda")
    expected = _call(x)
    ready = x.qkv
    x.qkv = torch.zeros_like(ready)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        x.qkv.copy_(ready)
        actual = _call(x)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.huge(gigabytes=20)
def test_more_elements_than_32_bits_count() -> None:
    """qkv has more than 2^31 elements; the last image is checked against the same image by itself."""
    case = WindowCase("", (56, 56), (7, 7), (3, 3), batch=2**31 // (56 * 56 * 3 * 4 * 32) + 2, heads=4)
    small = window_inputs(replace(case, batch=1), torch.bfloat16, "cuda")
    expected = _call(small)
    large = replace(
        small,
        qkv=torch.zeros(case.batch, *small.qkv.shape[1:], dtype=torch.bfloat16, device="cuda"),
        dout=torch.zeros(case.batch, *small.dout.shape[1:], dtype=torch.bfloat16, device="cuda"),
    )
    large.qkv[-1], large.dout[-1] = small.qkv[0], small.dout[0]
    actual = _call(large)
    assert torch.equal(actual[0][-1], expected[0][0]) and torch.equal(actual[2][-1], expected[2][0])
    # Zeros have no gradient, so the sums are the same up to their order.
    _, truths = checks.window_oracle(small, torch.float64, backward=True)
    assert_close("dtable", actual[3], truths["dtable"], expected[3], gradient=True)
