"""disentangled_attention on the GPU: long cases, and what only hardware shows."""

from __future__ import annotations

import pytest
import torch

import warpform
from helpers import checks
from helpers.backends import HALF
from helpers.cases import DisentangledCase, disentangled_inputs

pytestmark = pytest.mark.gpu

by_dtype = pytest.mark.parametrize("dtype", HALF, ids=lambda d: str(d).removeprefix("torch."))
# The configurations of published models: v1 has linear positions, v2 and v3 buckets.
LINEAR = {"span": 512}
BUCKETS = {"span": 256, "position_buckets": 256, "max_relative_positions": 512}
LENGTHS = (1031, 3, 512, 700, 0, 129) * 2
LONG_CASES = tuple(
    DisentangledCase(f"d{head_dim}_{name}{'_holes' * holes}", LENGTHS, heads=4, head_dim=head_dim, holes=holes, **how)
    for head_dim in (16, 64, 72, 128)
    for name, how in (("linear", LINEAR), ("buckets", BUCKETS))
    for holes in (False, True)
)


@by_dtype
@pytest.mark.parametrize("case", LONG_CASES, ids=str)
def test_long_cases(case: DisentangledCase, dtype: torch.dtype) -> None:
    checks.check_disentangled_attention(torch.ops.warpform, case, dtype, "cuda")


@pytest.mark.parametrize("how", (LINEAR, BUCKETS), ids=("linear", "buckets"))
def test_results_repeat_bit_for_bit(how: dict[str, int]) -> None:
    x = disentangled_inputs(DisentangledCase("", LENGTHS, heads=8, head_dim=64, **how), torch.bfloat16, "cuda")  # type: ignore[arg-type]
    arguments, where = (x.q, x.k, x.v, x.pos_key, x.pos_query), (x.cu_seqlens, x.max_seqlen)
    runs = []
    for _ in range(5):
        out, lse = torch.ops.warpform.disentangled_attention(*arguments, *where, **x.options)
        gradients = torch.ops.warpform.disentangled_attention_backward(
            x.dout, *arguments, out, lse, *where, **x.options
        )
        runs.append((out, lse, *gradients))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_a_captured_graph_serves_other_lengths() -> None:
    """Nothing is read back by the host, backward neither: new lengths of the same capacity need no new capture."""
    capacity, batch, seqlen = 512, 8, 128

    def packing(lengths: list[int]) -> warpform.Packing:
        return warpform.Packing.from_lengths(torch.tensor(lengths, device="cuda"), seqlen=seqlen, capacity=capacity)

    static = packing([64] * batch)
    q, k, v, dout = torch.randn(4, capacity, 4, 64, dtype=torch.bfloat16, device="cuda").unbind(0)
    tables = torch.randn(2, 512, 4, 64, dtype=torch.bfloat16, device="cuda").unbind(0)

    def run(p: warpform.Packing) -> tuple[torch.Tensor, ...]:
        options = {"positions": p.position_ids, "position_buckets": 256, "max_relative_positions": 512}
        arguments, where = (q, k, v, *tables), (p.cu_seqlens, p.max_seqlen)
        out, lse = torch.ops.warpform.disentangled_attention(*arguments, *where, **options)
        gradients = torch.ops.warpform.disentangled_attention_backward(dout, *arguments, out, lse, *where, **options)
        return out, lse, *gradients

    run(static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(static)
    for lengths in ([64] * batch, [1, 128, 30, 0, 7, 128, 99, 3]):
        other = packing(lengths)
        static.cu_seqlens.copy_(other.cu_seqlens)
        static.position_ids.copy_(other.position_ids)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, run(other), strict=True))


def test_a_side_stream_is_used() -> None:
    """The products and the kernel are queued behind the work of the current stream, not of the default one."""
    x = disentangled_inputs(
        DisentangledCase("", (512,) * 8, heads=8, head_dim=64, **BUCKETS),
        torch.bfloat16,
        "cuda",  # type: ignore[arg-type]
    )
    rest = (x.k, x.v, x.pos_key, x.pos_query, x.cu_seqlens, x.max_seqlen)
    expected = torch.ops.warpform.disentangled_attention(x.q, *rest, **x.options)[0]
    late = torch.zeros_like(x.q)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        late.copy_(x.q)
        out = torch.ops.warpform.disentangled_attention(late, *rest, **x.options)[0]
    torch.cuda.synchronize()
    assert torch.equal(out, expected)
