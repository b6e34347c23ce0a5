"""DeBERTa's attention over padded batches, forward and backward, against its composition in torch and FlexAttention."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import harness
import torch
from harness import Case, Missing, Session
from torch import Tensor

import warpform
from helpers import oracle
from helpers.compare import assert_close

PROVIDERS = ("warpform", "eager_padded", "compiled_padded", "flex_compiled")
# Scores that an eager composition may write out.
MOST_SCORE_BYTES = 4e9

# The table of sizes. "ragged", "equal": (sequences, longest); ragged lengths are uniform on [0.2 S, S]. "model":
# (heads, head size, position buckets, max_relative_positions), those of DeBERTa-v3-base but in a tiny run.
_BASE = (12, 64, 256, 512)
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"model": (2, 16, 8, 16), "ragged": ((3, 24),), "equal": ((2, 20),)},
    "cpu": {"model": _BASE, "ragged": ((8, 128), (4, 512)), "equal": ((4, 256),)},
    "cuda": {"model": _BASE, "ragged": ((128, 128), (32, 512), (8, 2048)), "equal": ((32, 512),)},
    "cuda everything": {
        "model": _BASE,
        "ragged": ((128, 128), (64, 256), (32, 512), (16, 1024), (8, 2048)),
        "equal": ((128, 128), (64, 256), (32, 512), (16, 1024), (8, 2048)),
    },
}

# The main ones' (sequences, longest), with lengths that differ and equal ones.
MAIN = (32, 512)


@dataclass(frozen=True)
class Spec(harness.Spec):
    lengths: tuple[int, ...] = ()
    heads: int = 1
    head_dim: int = 64
    buckets: int = 256
    farthest: int = 512

    family = "disentangled_attention"

    def __str__(self) -> str:
        equal = "-equal" if len(set(self.lengths)) == 1 else ""
        name = f"{self.kernel}-{self.direction}-B{len(self.lengths)}-S{max(self.lengths)}-T{sum(self.lengths)}"
        return f"{name}-H{self.heads}-D{self.head_dim}{equal}"

    @property
    def rows(self) -> int:
        """Rows of a table of relative positions, one for each bucket of either side."""
        return 2 * self.buckets

    def work(self, itemsize: int) -> tuple[float, float]:
        """Counts work. The scores' content terms take two products forward and five backward, as in any attention.

        Each relative term needs a product of every token with the rows it meets, or with the tokens, whichever are
        fewer; backward that product again, and one for each of its two gradients.
        """
        width, total = self.heads * self.head_dim, sum(self.lengths)
        pairs = sum(s * s for s in self.lengths)
        met = sum(s * min(s, self.rows) for s in self.lengths)
        tables, lse = 2 * self.rows * width, 4 * total * self.heads
        if self.direction == "backward":
            return (10 * pairs + 12 * met) * width, (8 * total * width + 2 * tables) * itemsize + lse
        return (4 * pairs + 4 * met) * width, (4 * total * width + tables) * itemsize + lse

    def build(self, session: Session) -> DisentangledCase:
        return DisentangledCase(self, session)


def specs(session: Session) -> list[Spec]:
    everything = session.everything and session.device == "cuda"
    sizes = SIZES["tiny" if session.tiny else "cuda everything" if everything else session.device]
    heads, head_dim, buckets, farthest = sizes["model"]
    shapes = [harness.draw_lengths(batch, seqlen) for batch, seqlen in sizes["ragged"]]
    shapes += [(seqlen,) * batch for batch, seqlen in sizes["equal"]]
    found = []
    for lengths in shapes:
        columns = {
            "batch": len(lengths), "seqlen": max(lengths), "tokens": sum(lengths), "heads": heads, "kv_heads": heads,
            "head_dim": head_dim,
        }  # fmt: skip
        for direction in ("forward", "backward"):
            shape = (lengths, heads, head_dim, buckets, farthest)
            main = harness.is_main(session, lengths in (harness.draw_lengths(*MAIN), (MAIN[1],) * MAIN[0]))
            found.append(
                Spec("disentangled_attention", direction, tuple(columns.items()), PROVIDERS, *shape, main=main)
            )
    return found


def eager_attention(
    q: Tensor, k: Tensor, v: Tensor, pos_key: Tensor, pos_query: Tensor, index: Tensor, seen: Tensor | None
) -> Tensor:
    """Composes attention as models do; q, k, v: [B, H, S, D], pos_key, pos_query: [H, 2 * span, D], index: [S, S]."""
    where = index.expand(*q.shape[:2], -1, -1)
    score = q @ k.mT + (q @ pos_key.mT).gather(-1, where) + (k @ pos_query.mT).gather(-1, where.mT).mT
    score = score * (3 * q.size(-1)) ** -0.5
    if seen is not None:
        score = score.masked_fill(~seen, float("-inf"))
    return torch.softmax(score, -1) @ v


class DisentangledCase(Case):
    """q, k, v: [T, H, D], pos_key, pos_query: [2 * span, H, D]. Backward is timed alone, over a forward done before."""

    def __init__(self, spec: Spec, session: Session) -> None:
        self.spec, self.session, self.device = spec, session, session.device
        self.lengths, self.longest, self.total = spec.lengths, max(spec.lengths), sum(spec.lengths)
        self.backward = spec.direction == "backward"
        self.equal = len(set(spec.lengths)) == 1
        self.rows = spec.rows
        size, width = session.dtype.itemsize, spec.heads * spec.head_dim
        self.flops, self.bytes = spec.work(size)
        tables = 2 * self.rows * width
        make = functools.partial(torch.randn, device=self.device, dtype=session.dtype)
        token, row = (self.total, spec.heads, spec.head_dim), (self.rows, spec.heads, spec.head_dim)
        count = harness.copies(self.device, (4 * self.total * width + tables) * size)
        # q, k, v, pos_key, pos_query, dout
        self.inputs = [[make(shape) for shape in (token, token, token, row, row, token)] for _ in range(count)]
        self.offsets = torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=self.device)
        self.packing = warpform.Packing.from_lengths(self.lengths, device=self.device)
        self.buckets = {"position_buckets": spec.buckets, "max_relative_positions": spec.farthest}

    # ---- what each provider calls ----

    def calls(
        self,
        attention: Callable[..., Tensor],
        lay_out: Callable[[Tensor], Tensor],
        lay_out_table: Callable[[Tensor], Tensor],
        back: Callable[[Tensor], Tensor],
        back_table: Callable[[Tensor], Tensor],
    ) -> list[Callable[[], Any]]:
        """Calls of attention(q, k, v, pos_key, pos_query) on inputs in the provider's own layout, made before the clock
        runs. `back` and `back_table` turn its tensors into packed ones and its tables into the op's, for the check."""
        self.back, self.back_table = back, back_table
        found: list[Callable[[], Any]] = []
        for *inputs, dout in self.inputs:
            leaves = [lay_out(t).detach() for t in inputs[:3]] + [lay_out_table(t).detach() for t in inputs[3:]]
            if not self.backward:
                found.append(functools.partial(_infer, attention, leaves))
                continue
            for t in leaves:
                t.requires_grad_()
            out = attention(*leaves)
            found.append(functools.partial(torch.autograd.grad, out, leaves, lay_out(dout), retain_graph=True))
        return found

    def with_warpform(self) -> list[Callable[[], Any]]:
        op, offsets, longest, how = warpform.ops.disentangled_attention, self.offsets, self.longest, self.buckets
        return self.calls(lambda *tensors: op(*tensors, offsets, longest, **how), _same, _same, _same, _same)

    def padded(self, attention: Callable[..., Tensor]) -> list[Callable[[], Any]]:
        """[B, H, S, D], and tables [H, 2 * span, D]."""
        return self.calls(
            attention,
            lambda t: self.packing.unpack(t).transpose(1, 2),
            lambda t: t.transpose(0, 1),
            lambda t: self.packing.pack(t.transpose(1, 2).contiguous()),
            lambda t: t.transpose(0, 1),
        )

    def index_of(self, distance: Tensor) -> Tensor:
        """The row of a table for a distance of query less key."""
        return oracle.relative_index(distance, self.rows // 2, **self.buckets)

    def composed(self, attention: Callable[..., Tensor]) -> list[Callable[[], Any]]:
        """Index and mask are made outside of the clock, as a model makes them once for all layers."""
        scores = len(self.lengths) * self.spec.heads * self.longest**2 * self.session.dtype.itemsize
        if scores > MOST_SCORE_BYTES:
            raise Missing(f"would write {scores / 1e9:.0f} GB of scores")
        place = torch.arange(self.longest, device=self.device)
        index = self.index_of(place[:, None] - place)
        seen = None if self.equal else (self.packing.ranks >= 0)[:, None, None, :]
        return self.padded(lambda *tensors: attention(*tensors, index, seen))

    def with_eager_padded(self) -> list[Callable[[], Any]]:
        return self.composed(eager_attention)

    def with_compiled_padded(self) -> list[Callable[[], Any]]:
        self.session.allow_compile()
        return self.composed(harness.compiled(eager_attention))

    def with_flex_compiled(self) -> list[Callable[[], Any]]:
        """Both relative terms from tables that two products make beforehand, gathered score by score."""
        if self.device == "cpu" and self.backward:
            raise Missing("FlexAttention has no backward on a CPU")
        self.session.allow_compile()
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        longest, scale = self.longest, (3 * self.spec.head_dim) ** -0.5
        index = self.index_of(torch.arange(1 - longest, longest, device=self.device))  # of distances, from the least
        block_mask = None
        if not self.equal:
            lengths = torch.tensor(self.lengths, device=self.device)
            sizes = (len(self.lengths), None, longest, longest)
            block_mask = create_block_mask(lambda b, h, i, j: j < lengths[b], *sizes, device=self.device)

        def attention(q: Tensor, k: Tensor, v: Tensor, pos_key: Tensor, pos_query: Tensor) -> Tensor:
            to_position, from_position = q @ pos_key.mT, k @ pos_query.mT  # [B, H, S, 2 * span] each

            def relative(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                row = index[i - j + (longest - 1)]
                return score + (to_position[b, h, i, row] + from_position[b, h, j, row]) * scale

            return flex_attention(q, k, v, score_mod=relative, block_mask=block_mask, scale=scale)

        return self.padded(torch.compile(attention, dynamic=False))  # at its best: one kernel for each shape

    # ---- what has to come out ----

    @functools.cached_property
    def truth(self) -> list[tuple[slice, list[Tensor], list[Tensor]]]:
        """The results of the first and the last head: the head, the tensors in float64, and those in the dtype itself.

        A head depends on no other, and all sequences share its tables' gradients.
        """
        found = []
        for head in sorted({0, self.spec.heads - 1}):
            heads = slice(head, head + 1)
            parts = [t[:, heads] for t in self.inputs[0]]
            results = []
            for dtype in (torch.float64, self.session.dtype):
                *tensors, dout = (t.to(dtype) for t in parts)
                if self.backward:
                    gradients = oracle.disentangled_attention_gradients(
                        dout, *tensors, list(self.lengths), **self.buckets
                    )
                    results.append([g for g in gradients if g is not None])
                else:
                    results.append([oracle.disentangled_attention(*tensors, list(self.lengths), **self.buckets)[0]])
            found.append((heads, *results))
        return found

    def check(self, provider: str, output: Any) -> None:
        names = ("dq", "dk", "dv", "dpos_key", "dpos_query") if self.backward else ("out",)
        tensors = [
            (self.back_table if name.startswith("dpos") else self.back)(t)
            for name, t in zip(names, output if self.backward else [output], strict=True)
        ]
        for name, tensor in zip(names, tensors, strict=True):
            assert torch.isfinite(tensor).all(), f"{name}: not finite"
        for heads, exact, eager in self.truth:
            for name, tensor, wanted, plain in zip(names, tensors, exact, eager, strict=True):
                if provider == "warpform":
                    assert_close(name, tensor[:, heads], wanted, plain, gradient=self.backward)
                else:
                    harness.assert_near(name, tensor[:, heads], wanted, plain)


def _same(t: Tensor) -> Tensor:
    return t


def _infer(function: Callable[..., Tensor], inputs: list[Tensor]) -> Tensor:
    with torch.inference_mode():
        return function(*inputs)


def test_disentangled_attention(spec: Spec, provider: str, measure: Callable[[harness.Spec, str], None]) -> None:
    measure(spec, provider)
