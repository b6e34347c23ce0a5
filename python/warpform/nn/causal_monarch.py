"""Causal maps along a sequence whose transforms are learned Monarch matrices (Monarch Mixer, arXiv 2310.12109, 4.2).

The paper writes y = M0^-1 (M1 u . M2 k) with Monarch matrices M, and asks when that is causal. Its answer, polynomials
of low enough degree, is taken here in coefficients rather than in values: M = F Q with F a Fourier transform and Q
lower triangular. So y = Q0^-1 [(Q1 u) * (Q2 k)] with the causal convolution *, and is causal whatever the weights are.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _autocast, ops
from ..ops._dtypes import accumulation_dtype
from ._product import is_plain
from .long_convolution import MonarchMixerSequenceMixer


class TriangularMonarch(nn.Module):
    """A lower-triangular Monarch matrix Q with unit diagonal, [m h, m h]; the identity before training.

    Q[d + m e, a + m b] = L[d, a] C_a[e, b], with L [m, m] and every C_a [h, h] lower triangular with unit diagonal. So
    a product costs n (m + h) multiplications a row of n = m h, and so does its inverse.

    Args:
        block: m.
        blocks: h.

    Attributes:
        outer: [m, m], inner: [m, h, h]; strictly below their diagonals they hold L and C_a; the rest is not read.
    """

    def __init__(self, block: int, blocks: int) -> None:
        super().__init__()
        self.block, self.blocks = block, blocks
        self.outer = nn.Parameter(torch.zeros(block, block))
        self.inner = nn.Parameter(torch.zeros(block, blocks, blocks))

    def forward(self, u: Tensor) -> Tensor:
        """Q u; u: [rows, seqlen], seqlen <= m h, as if zeros followed. Returns the same shape, in float32 at least."""
        outer, inner, blocks = self._factors(u)
        mixed = torch.einsum("aeb,rba->rea", inner, blocks.tokens)
        return blocks.flattened(torch.einsum("da,rea->red", outer, mixed))

    def solve(self, w: Tensor) -> Tensor:
        """Q^-1 w, as `forward`."""
        outer, inner, blocks = self._factors(w)
        rows, count, block = blocks.tokens.shape
        x = blocks.tokens.permute(2, 1, 0).reshape(block, count * rows)
        x = torch.linalg.solve_triangular(outer, x, upper=False, unitriangular=True)
        x = torch.linalg.solve_triangular(inner, x.view(block, count, rows), upper=False, unitriangular=True)
        return blocks.flattened(x.permute(2, 1, 0))

    def row(self, place: int) -> Tensor:
        """Q[place, : place + 1], in float32 at least."""
        e, d = divmod(place, self.block)
        outer, inner = (_with_unit_diagonal(x) for x in (self.outer, self.inner[:, : e + 1, : e + 1]))
        return (inner[:, e].t() * outer[d]).flatten()[: place + 1]

    def _factors(self, u: Tensor) -> tuple[Tensor, Tensor, _Blocks]:
        """L, the part of C that this length needs, and u in blocks."""
        seqlen = u.shape[1]
        if seqlen > self.block * self.blocks:
            raise ValueError(f"TriangularMonarch: seqlen must be at most {self.block * self.blocks}, got {seqlen}")
        blocks = -(-seqlen // self.block)
        outer = _with_unit_diagonal(self.outer)
        inner = _with_unit_diagonal(self.inner[:, :blocks, :blocks])
        padded = F.pad(u.to(outer.dtype), (0, blocks * self.block - seqlen))
        return outer, inner, _Blocks(padded.view(len(u), blocks, self.block), seqlen)

    def extra_repr(self) -> str:
        return f"block={self.block}, blocks={self.blocks}"


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """Sequences in blocks."""

    tokens: Tensor  # [rows, blocks, block]: token a + m b of a row is at [b, a]
    seqlen: int

    def flattened(self, tokens: Tensor) -> Tensor:
        """[rows, seqlen] from tokens in this form."""
        return tokens.reshape(len(tokens), -1)[:, : self.seqlen]


def _with_unit_diagonal(x: Tensor) -> Tensor:
    """x: [..., n, n]; what is below the diagonal, and ones on it, in float32 at least."""
    x = x.to(accumulation_dtype(x.dtype))
    return x.tril(-1) + torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)


class CausalMonarchConvolution(nn.Module):
    """Q0^-1 [(Q1 u) * (Q2 k)] with learned `TriangularMonarch` matrices: a causal convolution before training.

    Matrices are shared by channels. Nothing here is quadratic in the length: with m and h near its square root n, it is
    O(n^1.5) a row, beside the O(n log n) of the convolution.

    Args:
        l_max: the longest sequence.
        block: m. None: a power of two near sqrt(2 l_max), which is as the paper has it: then this is the Monarch form
            M0^-1 (M1 u . M2 k) of order m^2 on zero-padded sequences.
    """

    def __init__(self, l_max: int, block: int | None = None) -> None:
        super().__init__()
        if l_max < 1 or (block is not None and block < 1):
            raise ValueError(f"CausalMonarchConvolution: l_max and block must be at least 1, got {l_max} and {block}")
        m = 1 << math.ceil(math.log2(2 * l_max) / 2) if block is None else block
        self.q0, self.q1, self.q2 = (TriangularMonarch(m, -(-l_max // m)) for _ in range(3))

    def forward(self, u: Tensor, k: Tensor) -> Tensor:
        """u: [batch, channels, seqlen], k: [channels, at most seqlen]; returns like u."""
        with _autocast.off(u.device):
            v = self.q1(u.flatten(0, 1)).view(u.shape)
            y = ops.fft_conv(v.to(u.dtype), self.filter(k, u.shape[2]))
            return self.q0.solve(y.flatten(0, 1)).view(u.shape).to(u.dtype)

    def filter(self, k: Tensor, seqlen: int) -> Tensor:
        """Q2 k, [channels, seqlen]."""
        return cast("Tensor", self.q2(F.pad(k, (0, seqlen - k.shape[1]))))


@dataclasses.dataclass
class MixerState:
    """The state of `CausalMonarchMixer.step`. Histories are [batch, hidden, l_max], float32 at least.

    Attributes:
        length: tokens so far.
        k, k2: filters of the two convolutions, [hidden, l_max at most], the first one transformed by Q2; k2 None
            without the second.
        v: history of what the gated convolution is of, transformed by Q1.
        raw, y: histories of v before the transform and of what Q0^-1 gives; None where the convolution is a plain one.
        u: history of what the second convolution is of, or None.
        projected: the last two rows of in_linear, [batch, 2, 3 hidden].
    """

    length: int
    k: Tensor
    k2: Tensor | None
    v: Tensor
    raw: Tensor | None = None
    y: Tensor | None = None
    u: Tensor | None = None
    projected: Tensor | None = None


class CausalMonarchMixer(MonarchMixerSequenceMixer):
    """The causal `MonarchMixerSequenceMixer`, its gated convolution between learned causal Monarch matrices.

    Args:
        hidden_size, l_max, residual, pre_norm, **filters: as of `MonarchMixerSequenceMixer`.
        monarch: False: the gated convolution is a plain one too.
        block: of `CausalMonarchConvolution`.
    """

    def __init__(
        self,
        hidden_size: int,
        l_max: int,
        *,
        monarch: bool = True,
        block: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(hidden_size, l_max, bidirectional=False, **options)
        self.l_max = l_max
        self.monarch = CausalMonarchConvolution(l_max, block) if monarch else None

    def mix(self, v: Tensor, gate: Tensor) -> Tensor:
        if self.monarch is None:
            return super().mix(v, gate)
        k, _ = self.filter_fn.taps(v.shape[2])
        skip = self.filter_fn.bias.to(v.dtype)[:, None]
        return gate * (self.monarch(v, k) + skip * v)

    @torch.no_grad()
    def start(self, u: Tensor) -> tuple[Tensor, MixerState]:
        """`forward` on the first tokens u [batch, length, hidden], length from 1 to l_max, and the state after them."""
        u, x, v, gate = self.project(u)
        batch, length, hidden = u.shape
        wide = accumulation_dtype(u.dtype)
        k, k2 = (None if f is None else f.taps(self.l_max)[0].to(wide) for f in (self.filter_fn, self.filter_fn2))
        assert k is not None

        def history(known: Tensor) -> Tensor:
            places = known.new_zeros(batch, hidden, self.l_max, dtype=wide)
            places[:, :, :length] = known.to(wide)
            return places

        if self.monarch is None:
            state = MixerState(length, k, k2, history(v))
        else:
            transformed = self.monarch.q1(v.flatten(0, 1)).view(v.shape)
            y = history(self.monarch(v, k[:, :length]))
            state = MixerState(length, self.monarch.filter(k, self.l_max), k2, history(transformed), history(v), y)
        state.u = None if k2 is None else history(u.transpose(1, 2))
        state.projected = F.pad(x, (0, 0, 2, 0))[:, -2:]
        return self.finish(self.mix(v, gate), u), state

    @torch.no_grad()
    def step(self, u: Tensor, state: MixerState) -> Tensor:
        """The output for the next token, whose input is u [batch, hidden]; the state moves on to it.

        The same as the last row of `forward` on all tokens so far, at O(length) a channel instead of O(length^1.5).

        Raises:
            ValueError: the state holds l_max tokens already.
        """
        if state.length >= self.l_max:
            raise ValueError(f"CausalMonarchMixer: at most l_max = {self.l_max} tokens, got more")
        if self.layernorm is not None:
            u = self.layernorm(u, None, None)
        place, end = state.length, state.length + 1
        assert state.projected is not None
        rows = torch.cat([state.projected, self.in_linear(u)[:, None]], dim=1)  # [batch, 3, 3 hidden]
        state.projected = rows[:, 1:]
        if is_plain(self.short_filter, nn.Conv1d):
            weight, bias = self.short_filter.weight.squeeze(1), self.short_filter.bias
            assert bias is not None
            filtered = (rows * weight.t()).sum(1) + bias
        else:
            filtered = self.short_filter(rows.transpose(1, 2))[..., 2]
        x1, gate, v = filtered.chunk(3, dim=1)
        v = v * x1
        skip = self.filter_fn.bias.to(v.dtype) * v
        if self.monarch is not None:
            assert state.raw is not None and state.y is not None
            state.raw[:, :, place] = v
            v = state.raw[:, :, :end] @ self.monarch.q1.row(place)
        state.v[:, :, place] = v
        y = _last_of_convolution(state.v, state.k, end)
        if self.monarch is not None:
            assert state.y is not None
            y = y - state.y[:, :, :place] @ self.monarch.q0.row(place)[:place]
            state.y[:, :, place] = y
        y = (y + skip) * gate
        if self.filter_fn2 is not None:
            assert state.u is not None and state.k2 is not None
            state.u[:, :, place] = u
            y = y + _last_of_convolution(state.u, state.k2, end) + self.filter_fn2.bias * u
        state.length = end
        return cast("Tensor", self.out_linear(y.to(u.dtype)))


def _last_of_convolution(v: Tensor, k: Tensor, end: int) -> Tensor:
    """Row end - 1 of the causal convolution; v: [batch, hidden, places], k: [hidden, taps]; returns [batch, hidden]."""
    taps = min(end, k.shape[1])
    return torch.einsum("bdj,dj->bd", v[:, :, end - taps : end], k[:, :taps].flip(1))
