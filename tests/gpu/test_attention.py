"""varlen_attention on the GPU: long cases, and what only hardware shows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import warpform
from helpers import checks
from helpers.backends import HALF, Deterministic
from helpers.cases import AttentionCase, attention_inputs
from warpform import ops

pytestmark = pytest.mark.gpu

by_dtype = pytest.mark.parametrize("dtype", HALF, ids=lambda d: str(d).removeprefix("torch."))
HEAD_DIMS = (8, 32, 40, 64, 72, 96, 128, 136, 160, 192, 256)
MODES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("plain", {}),
    ("causal_gqa", {"causal": True, "heads": 8, "heads_k": 2}),
    ("biased", {"softcap": 3.0, "slopes": "batch", "window": (200, 50)}),
)
# Lengths that fill the large tiles, enough of them for the launch to choose those.
LONG = (1031, 3, 512, 700, 0, 129) * 2
LONG_CASES = tuple(
    AttentionCase(f"d{head_dim}_{mode}", LONG, head_dim=head_dim, **({"heads": 4} | options))
    for head_dim in HEAD_DIMS
    for mode, options in MODES
)


@by_dtype
@pytest.mark.parametrize("case", LONG_CASES, ids=str)
def test_long_cases(case: AttentionCase, dtype: torch.dtype) -> None:
    checks.check_attention(torch.ops.warpform, case, dtype, "cuda")


@pytest.mark.parametrize("case", LONG_CASES, ids=str)
def test_deterministic(case: AttentionCase) -> None:
    checks.check_attention(Deterministic(torch.ops.warpform), case, torch.bfloat16, "cuda")


def test_deterministic_gradients_repeat_bit_for_bit() -> None:
    x = attention_inputs(AttentionCase("", LONG, heads=8, head_dim=64), torch.bfloat16, "cuda")
    where = (x.cu_seqlens_q, x.cu_seqlens_k, x.max_seqlen_q, x.max_seqlen_k)
    out, lse = torch.ops.warpform.varlen_attention(x.q, x.k, x.v, *where)
    runs = [
        torch.ops.warpform.varlen_attention_backward(x.dout, None, x.q, x.k, x.v, out, lse, *where, deterministic=True)
        for _ in range(5)
    ]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.huge(gigabytes=48)
def test_more_elements_than_32_bits_count() -> None:
    """q alone has more than 2^31 elements; the last sequence is checked against the same sequence by itself."""
    heads, head_dim = 128, 128
    total = 2**31 // (heads * head_dim) + 300
    generator = torch.Generator("cuda").manual_seed(0)
    q = torch.randn(total, heads, head_dim, dtype=torch.bfloat16, device="cuda", generator=generator)
    cu = torch.arange(0, total, 512, dtype=torch.int32, device="cuda")
    cu = torch.cat([cu, torch.tensor([total], dtype=torch.int32, device="cuda")])
    last = int(cu[-2])
    out, lse = torch.ops.warpform.varlen_attention(q, q, q, cu, cu, 512, 512)
    alone = torch.tensor([0, total - last], dtype=torch.int32, device="cuda")
    tail = q[last:]
    out_alone, lse_alone = torch.ops.warpform.varlen_attention(tail, tail, tail, alone, alone, 512, 512)
    assert torch.equal(out[last:], out_alone) and torch.equal(lse[:, last:], lse_alone)
    gradients = torch.ops.warpform.varlen_attention_backward(
        q, None, q, q, q, out, lse, cu, cu, 512, 512, deterministic=True
    )
    expected = torch.ops.warpform.varlen_attention_backward(
        tail, None, tail, tail, tail, out_alone, lse_alone, alone, alone, 512, 512, deterministic=True
    )
    assert all(torch.equal(a[last:], b) for a, b in zip(gradients, expected, strict=True))


def test_a_captured_graph_serves_other_lengths() -> None:
    """Nothing is read back by the host: new lengths of the same capacity need no new capture."""
    capacity, batch, seqlen = 512, 8, 128

    def packing(lengths: list[int]) -> warpform.Packing:
        return warpform.Packing.from_lengths(torch.tensor(lengths, device="cuda"), seqlen=seqlen, capacity=capacity)

    static = packing([64] * batch)
    qkv = torch.randn(capacity, 3, 4, 64, dtype=torch.bfloat16, device="cuda")

    def run(p: warpform.Packing) -> torch.Tensor:
        return ops.varlen_attention(*qkv.unbind(1), p.cu_seqlens, p.cu_seqlens, p.max_seqlen, p.max_seqlen, causal=True)  # type: ignore[return-value]

    with torch.inference_mode():
        run(static)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run(static)
        for lengths in ([64] * batch, [1, 128, 30, 0, 7, 128, 99, 3]):
            other = packing(lengths)
            static.cu_seqlens.copy_(other.cu_seqlens)
            graph.replay()
            assert torch.equal(out, run(other))


def test_a_side_stream_is_used() -> None:
    """The kernel is queued behind the work of the current stream, not of the default one."""
    x = attention_inputs(AttentionCase("", (512,) * 8, heads=8, head_dim=64), torch.bfloat16, "cuda")
    where = (x.cu_seqlens_q, x.cu_seqlens_k, x.max_seqlen_q, x.max_seqlen_k)
    expected = torch.ops.warpform.varlen_attention(x.q, x.k, x.v, *where)[0]
    late = torch.zeros_like(x.q)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        late.copy_(x.q)
        out = torch.ops.warpform.varlen_attention(late, x.k, x.v, *where)[0]
    torch.cuda.synchronize()
    assert torch.equal(out, expected)
