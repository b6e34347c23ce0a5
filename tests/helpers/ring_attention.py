"""Cases of ring attention, what each rank runs, and the whole computed in one process to judge it by."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from warpform.distributed import (
    LocalGroup,
    ring_attention,
    ring_attention_varlen,
    shard_cu_seqlens,
    shard_sequence,
    unshard_sequence,
)

from .compare import assert_close, poisoned

LAYOUTS = ("contiguous", "zigzag", "striped")


@dataclass(frozen=True)
class RingCase:
    """Sizes of one call. Lengths are in units that every layout can divide, of at least 24 tokens."""

    layout: str
    causal: bool
    length: int = 3  # of the sequence; or of each
    lengths: tuple[int, ...] | None = None
    padding: int = 0  # tokens that the last unit lacks
    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    scale: float | None = None

    def __str__(self) -> str:
        kind = "varlen" if self.lengths is not None else f"padding{self.padding}" if self.padding else "dense"
        return f"{kind}-{self.layout}{'-causal' * self.causal}-{self.heads}over{self.kv_heads}"


def cases() -> list[RingCase]:
    """Every layout with every kind; head counts vary."""
    both = list(itertools.product(LAYOUTS, (False, True)))
    return [
        *(RingCase(layout, causal) for layout, causal in both),
        *(RingCase(layout, causal, lengths=(2, 0, 1, 4), heads=3, kv_heads=1) for layout, causal in both),
        *(RingCase(layout, causal, padding=3, heads=2, kv_heads=2, head_dim=20, scale=0.2) for layout, causal in both),
    ]


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> Tensor:
    """[B, L, H, D] of a whole sequence, in the dtype of q, with every score in memory."""
    scale = 1 / math.sqrt(q.size(3)) if scale is None else scale
    k, v = (t.repeat_interleave(q.size(2) // t.size(2), dim=2) for t in (k, v))
    score = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    if causal:
        place = torch.arange(q.size(1), device=q.device)
        score = score.masked_fill(place > place[:, None], -math.inf)
    return torch.einsum("bhij,bjhd->bihd", torch.softmax(score, -1), v)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> Tensor:
    """The same by torch's own, which rounds a log-sum-exp too."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


class Whole:
    """Inputs of a case as one process has them, and the results to judge by."""

    def __init__(self, case: RingCase, size: int, dtype: torch.dtype, device: str = "cpu") -> None:
        unit = 2 * size * max(1, 12 // size)
        self.case = case
        self.lengths = None if case.lengths is None else tuple(n * unit for n in case.lengths)
        self.seqlen = case.length * unit - case.padding if self.lengths is None else sum(self.lengths)
        shape = (case.batch, self.seqlen) if self.lengths is None else (self.seqlen,)
        self.inputs = [
            torch.randn(*shape, heads, case.head_dim).to(device, dtype)
            for heads in (case.heads, case.kv_heads, case.kv_heads)
        ]
        self.dout = torch.randn(*shape, case.heads, case.head_dim).to(device, dtype)

    def results(self, dtype: torch.dtype, attend: Callable[..., Tensor]) -> list[Tensor]:
        """out, dq, dk, dv of the whole sequences, computed in dtype."""
        q, k, v = (t.to(dtype).requires_grad_() for t in self.inputs)
        if self.lengths is None:
            out = attend(q, k, v, self.case.causal, self.case.scale)
        else:
            parts = zip(*(t.unsqueeze(0).split(self.lengths, 1) for t in (q, k, v)), strict=True)
            out = torch.cat([attend(*part, self.case.causal, self.case.scale) for part in parts], 1).squeeze(0)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), self.dout.to(dtype))]

    def by_ring(self, group: Any) -> list[Tensor]:
        """The same by the ranks of a group: each has its part of the inputs, and the whole is put together again."""
        case = self.case
        how: dict[str, Any] = {"group": group, "layout": case.layout}
        whole: dict[str, Any] = {"dim": 1, "seqlen": self.seqlen}
        parts: dict[str, Any] = {"dim": 1, "pad": math.nan}
        if self.lengths is not None:
            cu_seqlens = torch.tensor([0, *itertools.accumulate(self.lengths)], dtype=torch.int32)
            whole = parts = {"dim": 0, "cu_seqlens": cu_seqlens}
        q, k, v = (shard_sequence(t, **how, **parts).requires_grad_() for t in self.inputs)
        dout = shard_sequence(self.dout, **how, **{**parts, **({"pad": 0.0} if "pad" in parts else {})})
        with poisoned():
            if self.lengths is None:
                out = ring_attention(
                    q, k, v, causal=case.causal, softmax_scale=case.scale,
                    seqlen=self.seqlen if case.padding else None, **how,
                )  # fmt: skip
            else:
                own = shard_cu_seqlens(cu_seqlens, **how).to(q.device)
                out = ring_attention_varlen(q, k, v, own, causal=case.causal, softmax_scale=case.scale, **how)
            gradients = torch.autograd.grad(out, (q, k, v), dout)
        return [unshard_sequence(t.detach(), **how, **whole) for t in (out, *gradients)]


def check_ring_attention(case: RingCase, dtype: torch.dtype, group: Any, size: int, device: str = "cpu") -> None:
    """Output and all gradients against the whole: to 1e-12 in float64, else by the rule of docs/numerics.md."""
    whole = Whole(case, size, dtype, device)
    found = whole.by_ring(group)
    if not isinstance(group, LocalGroup) and dist.get_rank() > 0:
        return  # all ranks hold the same by now
    exact = whole.results(torch.float64, attention)
    eager = whole.results(dtype, fused_attention)
    for name, actual, oracle, roughly in zip(("out", "dq", "dk", "dv"), found, exact, eager, strict=True):
        assert actual.dtype == dtype and actual.shape == oracle.shape
        if dtype == torch.float64:
            error = (actual - oracle).abs().max().item() if actual.numel() else 0.0
            assert error <= 1e-12, f"{name}: largest error {error:.1e}"
        else:
            assert_close(name, actual, oracle, roughly, gradient=name != "out")


def ring_of(shape: tuple[int, ...]) -> Any:
    """All processes as one ring, or as (outer, inner) rings."""
    if len(shape) == 1:
        return dist.group.WORLD
    return _mesh(shape)


_meshes: dict[tuple[int, ...], Any] = {}


def _mesh(shape: tuple[int, ...]) -> Any:
    if shape not in _meshes:
        _meshes[shape] = dist.device_mesh.init_device_mesh("cpu", shape, mesh_dim_names=("outer", "inner"))
    return _meshes[shape]


def run_cases(shape: tuple[int, ...], some: list[RingCase], dtype: torch.dtype) -> None:
    """On each rank of as many processes as the shape says. One that is judged wrong does not stop the others."""
    wrong = []
    for number, case in enumerate(some):
        torch.manual_seed(number)
        try:
            check_ring_attention(case, dtype, ring_of(shape), math.prod(shape))
        except AssertionError as error:
            wrong.append(f"{case}, {dtype}: {error}")
    assert not wrong, "\n".join(wrong)


def run_compiled() -> None:
    """A compiled function with ring attention in it, on each rank, against the same called plainly."""
    group = dist.group.WORLD

    def attend(q: Tensor) -> Tensor:
        return ring_attention(q, q, q, group=group, causal=True) * 2

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (4, 6):
        q = torch.randn(2, rows, 2, 8, dtype=torch.float64, requires_grad=True)
        gradients = [torch.autograd.grad(f(q).square().sum(), q)[0] for f in (compiled, attend)]
        assert torch.equal(*gradients)
