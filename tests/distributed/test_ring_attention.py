"""Ring attention against attention in one process: over gloo, and with all ranks in this process."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from helpers import ring_attention as helper
from helpers.processes import Processes
from warpform.distributed import LocalGroup, _ring_steps, ring_attention, ring_attention_varlen, shard_sequence

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
# Outer and inner ranks, or one ring.
SHAPES = ((2,), (3,), (4,), (8,), (2, 2), (2, 4), (4, 2))


@pytest.mark.sampled
@pytest.mark.distributed
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_over_gloo(processes: Callable[[int], Processes], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Every layout, dense, varlen and padded, with GQA: output and all gradients."""
    some = helper.cases()
    if dtype == torch.float64:
        some = some if len(shape) == 1 else some[1::2]  # causal
    else:
        some = some[::3] if dtype == torch.float32 else some[2::3]  # every kind, causal and not, two layouts
    processes(torch.Size(shape).numel()).run(helper.run_cases, shape, some, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", helper.cases(), ids=str)
def test_in_one_process(case: helper.RingCase, dtype: torch.dtype) -> None:
    helper.check_ring_attention(case, dtype, LocalGroup(3), 3)


@pytest.mark.sampled
@pytest.mark.parametrize("case", helper.cases(), ids=str)
@pytest.mark.parametrize(("size", "inner_size"), [(1, None), (8, 2), (6, 1)])
def test_double_ring_in_one_process(case: helper.RingCase, size: int, inner_size: int | None) -> None:
    helper.check_ring_attention(case, torch.float64, LocalGroup(size, inner_size), size)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_does_not_grow_with_ranks(dtype: torch.dtype) -> None:
    """Mean error of output and gradients at 64 ranks against that at one."""
    torch.manual_seed(0)
    whole = helper.Whole(helper.RingCase("zigzag", True, length=1), 64, dtype)
    exact = whole.results(torch.float64, helper.attention)

    def errors(size: int) -> list[float]:
        found = whole.by_ring(LocalGroup(size))
        return [(f.double() - e).abs().mean().item() for f, e in zip(found, exact, strict=True)]

    once, often = errors(1), errors(64)
    for name, few, many in zip(("out", "dq", "dk", "dv"), once, often, strict=True):
        # float32 sums of what is in float32 already are rounded once more in each step.
        assert many <= few * (3 if dtype == torch.float32 else 1.1), f"{name}: {few:.2e} on one rank, {many:.2e} on 64"


@pytest.mark.parametrize("size", [1, 2, 8])
def test_what_is_saved_is_a_share(size: int) -> None:
    """Per rank q, k, v, the output and its log-sum-exp of L / N tokens, and nothing else."""
    batch, length, heads, kv_heads, head_dim = 2, 64, 4, 2, 16
    group, saved = LocalGroup(size), []
    q, k, v = (
        shard_sequence(torch.randn(batch, length, h, head_dim), group=group, dim=1).requires_grad_()
        for h in (heads, kv_heads, kv_heads)
    )
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        ring_attention(q, k, v, group=group, causal=True)
    per_rank = batch * length // size * (2 * heads * head_dim + 2 * kv_heads * head_dim + heads)
    assert sum(saved) == size * per_rank


def test_buffers_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside what a rank sends first: one buffer in a ring, however long, three in a double ring."""
    made: list[int] = []

    class Counted(_ring_steps._Buffers):
        def take(self, like: torch.Tensor) -> torch.Tensor:
            made.append(not self._free)
            return super().take(like)

    monkeypatch.setattr(_ring_steps, "_Buffers", Counted)
    q = torch.randn(12, 1, 4, 2, 8)
    ring_attention(q, q, q, group=LocalGroup(12))
    assert sum(made) == 12 and len(made) == 12 * 11
    made.clear()
    ring_attention(q, q, q, group=LocalGroup(12, 4))
    assert sum(made) <= 12 * 3


def test_opcheck() -> None:
    group = LocalGroup(2)
    q, k, v = (torch.randn(2, 1, 4, h, 8, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    how = {
        "cu_seqlens": None, "causal": True, "layout": "zigzag", "softmax_scale": None, "seqlen": None, "timeout": None,
        "check": "always",
    }  # fmt: skip
    op = torch.ops.warpform.ring_attention.default
    torch.library.opcheck(op, (q, k, v, group.name), how)
    out, lse = op(q.detach(), k.detach(), v.detach(), group.name, **how)
    backward = torch.ops.warpform.ring_attention_backward.default
    detached = [t.detach() for t in (out, q, k, v, out, lse)]
    torch.library.opcheck(backward, (*detached, group.name), how)


def test_compiled_without_recompiling_for_new_lengths() -> None:
    group = LocalGroup(2)

    def attend(q: torch.Tensor) -> torch.Tensor:
        return ring_attention(q, q, q, group=group, causal=True) * 2

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (4, 6, 10):
            q = torch.randn(2, 3, rows, 2, 8, dtype=torch.float64, requires_grad=True)
            out = compiled(q)
            (gradient,) = torch.autograd.grad(out.sum(), q)
            expected = attend(q)
            assert torch.equal(out, expected)
            assert torch.equal(gradient, torch.autograd.grad(expected.sum(), q)[0])


@pytest.mark.distributed
def test_compiled_over_gloo(processes: Callable[[int], Processes]) -> None:
    processes(2).run(helper.run_compiled)


def test_bad_input() -> None:
    group = LocalGroup(2)
    q = torch.randn(2, 1, 4, 4, 8)
    good = {"group": group}
    with pytest.raises(TypeError, match="ring_attention: q must be a tensor, got None"):
        ring_attention(None, q, q, **good)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="after the ranks of a LocalGroup, got float32 of shape"):
        ring_attention(q[0], q, q, **good)
    with pytest.raises(ValueError, match="but for the heads"):
        ring_attention(q, q[:, :, :2], q[:, :, :2], **good)
    with pytest.raises(ValueError, match="the 4 heads of q must be a multiple of the heads of k and v, got 3"):
        ring_attention(q, q[..., :3, :], q[..., :3, :], **good)
    with pytest.raises(TypeError, match="k must be float32 as q is"):
        ring_attention(q, q.double(), q, **good)
    with pytest.raises(ValueError, match="layout must be one of"):
        ring_attention(q, q, q, layout="spiral", **good)
    with pytest.raises(ValueError, match='multiple of 2 for layout "zigzag", got 3'):
        ring_attention(q[:, :, :3], q[:, :, :3], q[:, :, :3], **good)
    with pytest.raises(ValueError, match="seqlen must be between 0 and the 8 rows of all ranks, got 9"):
        ring_attention(q, q, q, seqlen=9, **good)
    with pytest.raises(ValueError, match="timeout must be above 0"):
        ring_attention(q, q, q, timeout=0.0, **good)
    with pytest.raises(ValueError, match="check must be one of"):
        ring_attention(q, q, q, check="never", **good)
    with pytest.raises(TypeError, match="group must be a ProcessGroup"):
        ring_attention(q, q, q, group=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0"):
        cu_seqlens = torch.tensor([0, 3, 4], dtype=torch.int32)
        ring_attention_varlen(q[:, 0], q[:, 0], q[:, 0], cu_seqlens, **good)
    with pytest.raises(TypeError, match="cu_seqlens must be int32"):
        ring_attention_varlen(q[:, 0], q[:, 0], q[:, 0], torch.tensor([0, 4]), **good)


def test_empty_and_differentiated_twice() -> None:
    group = LocalGroup(2)
    empty = torch.randn(2, 0, 4, 2, 8)
    assert ring_attention(empty, empty, empty, group=group).shape == empty.shape
    rows = torch.randn(2, 3, 0, 2, 8)
    assert ring_attention(rows, rows, rows, group=group).shape == rows.shape
    q = torch.randn(2, 1, 2, 2, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(ring_attention(q, q, q, group=group).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not implemented"):
        gradient.sum().backward()
