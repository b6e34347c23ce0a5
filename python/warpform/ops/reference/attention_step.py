"""Definition of one step of attention: a block of queries against a block of keys, the softmax carried along.

    row i of the queries has position q_offset + i * q_stride, row j of the keys at k_offset + j * k_stride
    key j is seen by query i iff  -left <= position of j - position of i <= right  (-1 = unbounded); causal: right = 0
    step_lse[i] = log sum_j exp(softmax_scale * q[i] . k[j]) over the keys seen, step_out[i] the same softmax times v
    lse'[i] = log(exp(lse[i]) + exp(step_lse[i]))
    out'[i] = exp(lse[i] - lse'[i]) out[i] + exp(step_lse[i] - lse'[i]) step_out[i];  no key seen so far: 0 and -inf

Steps over the blocks of a long sequence, in any order, give the attention to all of it (Liu et al., arXiv 2310.01889).
All is computed in the dtype of the state, float32 or float64, whatever that of q, k and v.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .._dtypes import accumulation_dtype
from . import attention

# Rows and columns [i0, i1) x [j0, j1) of the scores.
_Block = tuple[int, int, int, int]


@dataclass(frozen=True)
class _Positions:
    """Who sees whom. `distance`: the position of query 0 less that of key 0. left, right: -1 = unbounded."""

    distance: int
    q_stride: int
    k_stride: int
    left: int
    right: int

    def keys(self, i: int, sk: int) -> tuple[int, int]:
        """The keys [first, last) that query i sees; neither bound falls with i."""
        position = self.distance + i * self.q_stride
        first = 0 if self.left < 0 else -((self.left - position) // self.k_stride)
        last = sk if self.right < 0 else (position + self.right) // self.k_stride + 1
        return min(max(first, 0), sk), min(max(last, 0), sk)

    def _shift(self) -> int:
        """Returns the shift of the mask where strides are equal: query i sees the keys up to i + shift."""
        return (self.distance + self.right) // self.k_stride

    def _is_triangular(self, sq: int, sk: int) -> bool:
        """Tells whether the mask is a triangle on the right alone that starts in column 0."""
        return self.right >= 0 and self.q_stride == self.k_stride and self.keys(sq - 1, sk)[0] == 0 >= self._shift()

    def is_causal(self, block: _Block, sq: int, sk: int) -> bool:
        """Tells whether the block is a square whose queries see the keys on and below its diagonal."""
        i0, i1, j0, j1 = block
        square = i1 - i0 == j1 - j0 and i1 - i0 > 1
        return square and j0 == 0 and self._is_triangular(sq, sk) and i0 + self._shift() == 0

    def blocks(self, sq: int, sk: int, rows_at_a_time: int, fused: bool) -> Iterator[_Block]:
        """Blocks which cover every pair that is seen, each query in one of them at most."""
        begin = 0
        if fused and self._is_triangular(sq, sk):
            # One call for the triangle, which needs no mask in memory, and one for the rows below it.
            first = -self._shift()
            begin = min(first + sk, sq)
            if begin > first:
                yield first, begin, 0, begin - first
        while begin < sq:
            # Rows which see all keys need no mask, so they need not come in parts.
            whole = fused and self.keys(begin, sk) == (0, sk) and self.keys(sq - 1, sk)[0] == 0
            end = sq if whole else min(begin + rows_at_a_time, sq)
            j0, j1 = self.keys(begin, sk)[0], self.keys(end - 1, sk)[1]
            if j0 < j1:
                yield begin, end, j0, j1
            begin = end

    def unseen(self, block: _Block, sk: int, device: torch.device) -> Tensor | None:
        """Which pairs of a block do not count, bool [i1 - i0, j1 - j0]; None: all do."""
        i0, i1, j0, j1 = block
        if self.keys(i1 - 1, sk)[0] <= j0 and self.keys(i0, sk)[1] >= j1:
            return None
        rows = torch.arange(i0, i1, device=device).unsqueeze(1) * self.q_stride + self.distance
        ahead = torch.arange(j0, j1, device=device) * self.k_stride - rows
        unseen = torch.zeros_like(ahead, dtype=torch.bool)
        if self.left >= 0:
            unseen |= ahead < -self.left
        if self.right >= 0:
            unseen |= ahead > self.right
        return unseen


def _positions(
    causal: bool, left: int, right: int, q_offset: int, k_offset: int, q_stride: int, k_stride: int
) -> _Positions:
    return _Positions(q_offset - k_offset, q_stride, k_stride, left, 0 if causal else right)


def _scale(q: Tensor, softmax_scale: float | None) -> float:
    return float(q.size(-1) ** -0.5) if softmax_scale is None else softmax_scale


class _Parts:
    """The sequences of a call, dense or varlen, as tensors [n, H, s, ...] that are read, changed and put back."""

    def __init__(self, op: str, q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None) -> None:
        self._offsets: dict[str, list[int]] | None = None
        self.groups: list[attention._Group | None] = [None]  # None: all rows, dense
        if cu_seqlens_q is not None and cu_seqlens_k is not None:
            q_offsets, k_offsets = attention.check_offsets(op, q, k, cu_seqlens_q, cu_seqlens_k, q.size(0), k.size(0))
            self._offsets = {"q": q_offsets, "k": k_offsets}
            row_bytes = q.size(1) * q.size(2) * q.element_size()
            self.groups = [*attention._groups(q_offsets, k_offsets, row_bytes, q.device)]

    def of(self, t: Tensor, side: str) -> _Part:
        """t: [B, s, H, ...] where dense, else [T, H, ...]."""
        return _Part(t, None if self._offsets is None else attention._Sequences(t, self._offsets[side], side))

    def of_rows(self, t: Tensor) -> _Part:
        """One number for each query and head, as lse: [B, H, s] or [H, T]."""
        return self.of(t.transpose(-1, -2), "q")


class _Part:
    def __init__(self, t: Tensor, sequences: attention._Sequences | None) -> None:
        self._t, self._sequences = t, sequences

    def __getitem__(self, group: attention._Group | None) -> Tensor:
        return self._t.transpose(1, 2) if self._sequences is None or group is None else self._sequences[group]

    def __setitem__(self, group: attention._Group | None, part: Tensor) -> None:
        # A group that was gathered is a copy; all others are views, and were changed in place.
        if self._sequences is not None and group is not None and group.single < 0 and group.q_rows is not None:
            self._sequences[group] = part


def _state(t: Tensor | None, shape: tuple[int, ...], value: float, like: Tensor) -> Tensor:
    """A contiguous copy of the carried (out, lse), or their neutral values (0, -inf)."""
    if t is not None:
        return t.clone(memory_format=torch.contiguous_format)
    return torch.full(shape, value, dtype=accumulation_dtype(like.dtype), device=like.device)


def attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    q_offset: int = 0,
    k_offset: int = 0,
    q_stride: int = 1,
    k_stride: int = 1,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """q [B, Lq, H, D], k, v [B, Lk, Hkv, D], out [B, Lq, H, D], lse [B, H, Lq]; varlen q [Tq, H, D], k, v [Tk, Hkv, D],
    out [Tq, H, D], lse [H, Tq]. Rows past the last sequence are carried through."""
    positions = _positions(causal, window_size_left, window_size_right, q_offset, k_offset, q_stride, k_stride)
    parts = _Parts("attention_step", q, k, cu_seqlens_q, cu_seqlens_k)
    rows = (q.size(1), q.size(0)) if q.dim() == 3 else (q.size(0), q.size(2), q.size(1))
    first = out is None
    out, lse = _state(out, q.shape, 0.0, q), _state(lse, rows, -math.inf, q)
    queries, outs, lses = parts.of(q, "q"), parts.of(out, "q"), parts.of_rows(lse)
    keys, values = parts.of(k, "k"), parts.of(v, "k")
    repeats = q.size(-2) // k.size(-2) if k.size(-2) else 1
    for group in parts.groups:
        group_out, group_lse = outs[group], lses[group]
        group_q, group_k, group_v = (t.to(out.dtype) for t in (queries[group], keys[group], values[group]))
        _attend(
            group_q,
            attention._repeat_heads(group_k, repeats),
            attention._repeat_heads(group_v, repeats),
            group_out,
            group_lse,
            positions,
            _scale(q, softmax_scale),
            first,
        )
        outs[group], lses[group] = group_out, group_lse
    return out, lse


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    positions: _Positions,
    scale: float,
    first: bool,
) -> None:
    """q [n, H, sq, D] against k, v [n, H, sk, D]: changes out and lse [n, H, sq]. `first`: they hold nothing yet."""
    sq, sk = q.size(2), k.size(2)
    if q.numel() == 0 or k.numel() == 0:
        return
    flash = attention._flash if q.device.type == "cpu" else None
    if q.stride(-1) != 1 or k.stride(-1) != 1 or v.stride(-1) != 1:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    rows_at_a_time = attention._rows_at_a_time(q, k, flash is not None)
    masks_itself = flash is not None and scale >= attention.LEAST_CAUSAL_SCALE
    for block in positions.blocks(sq, sk, rows_at_a_time, masks_itself):
        i0, i1, j0, j1 = block
        part = q[:, :, i0:i1], k[:, :, j0:j1], v[:, :, j0:j1]
        unseen = None
        if flash is not None and masks_itself and positions.is_causal(block, sq, sk):
            step_out, step_lse = flash(*part, 0.0, True, scale=scale)
        else:
            unseen = positions.unseen(block, sk, q.device)
            bias = None
            if unseen is not None:
                bias = torch.zeros(unseen.shape, dtype=q.dtype, device=q.device).masked_fill_(unseen, -math.inf)
            if flash is not None:
                step_out, step_lse = flash(*part, 0.0, False, attn_mask=bias, scale=scale)
                if unseen is not None:
                    # For a row that sees nothing fused attention gives 0 and 0.
                    step_lse = step_lse.masked_fill(unseen.all(-1), -math.inf)
            else:
                step_out, step_lse = _attend_explicitly(*part, bias, scale)
        rows_out, rows_lse = out[:, :, i0:i1], lse[:, :, i0:i1]
        if first:
            rows_out.copy_(step_out)
            rows_lse.copy_(step_lse)
        else:
            _merge(rows_out, rows_lse, step_out, step_lse)


def _attend_explicitly(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    score = torch.matmul(q, k.mT) * scale
    if bias is not None:
        score = score + bias
    top = _base(score.amax(-1))
    p = torch.exp(score - top.unsqueeze(-1))
    total = p.sum(-1)
    # Where no key is seen the sum is 0, and so are all p.
    return torch.matmul(p / total.clamp(min=1e-30).unsqueeze(-1), v), top + total.log()


def _base(top: Tensor) -> Tensor:
    """Returns the maximum that exponents subtract; 0 for a row without keys, whose exponentials are then 0, not NaN."""
    return top.masked_fill(top == -math.inf, 0.0)


def _merge(out: Tensor, lse: Tensor, step_out: Tensor, step_lse: Tensor) -> None:
    """Adds the part of a softmax to the one in out and lse. The weights add up to 1 however lse is rounded."""
    top = _base(torch.maximum(lse, step_lse))
    before, step = torch.exp(lse - top), torch.exp(step_lse - top)
    total = before + step
    inverse = total.clamp(min=1e-30).reciprocal()
    out.mul_((before * inverse).unsqueeze(-1)).addcmul_(step_out, (step * inverse).unsqueeze(-1))
    # A row that saw nothing in this step keeps the bits of its lse.
    lse.copy_(torch.where(step == 0, lse, top + total.log()))


def attention_step_backward(
    dout: Tensor,
    delta: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    q_offset: int = 0,
    k_offset: int = 0,
    q_stride: int = 1,
    k_stride: int = 1,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """With P = exp(score - lse), lse that of all steps, and delta = rowsum(dout * out): dv += P^T dout;
    d(score) = P * (dout v^T - delta); dq += scale * d(score) k; dk += scale * d(score)^T q."""
    positions = _positions(causal, window_size_left, window_size_right, q_offset, k_offset, q_stride, k_stride)
    parts = _Parts("attention_step_backward", q, k, cu_seqlens_q, cu_seqlens_k)
    dq, dk, dv = (_state(t, like.shape, 0.0, q) for t, like in ((dq, q), (dk, k), (dv, v)))
    queries, douts, dqs = parts.of(q, "q"), parts.of(dout, "q"), parts.of(dq, "q")
    lses, deltas = parts.of_rows(lse), parts.of_rows(delta)
    keys, values, dks, dvs = (parts.of(t, "k") for t in (k, v, dk, dv))
    for group in parts.groups:
        gradients = dqs[group], dks[group], dvs[group]
        inputs = (douts[group], queries[group], keys[group], values[group])
        group_dout, group_q, group_k, group_v = (t.to(dq.dtype) for t in inputs)
        _attend_backward(
            group_dout,
            group_q,
            group_k,
            group_v,
            lses[group],
            deltas[group],
            *gradients,
            positions,
            _scale(q, softmax_scale),
        )
        dqs[group], dks[group], dvs[group] = gradients
    return dq, dk, dv


def _attend_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    positions: _Positions,
    scale: float,
) -> None:
    """Adds to dq [n, H, sq, D] and dk, dv [n, Hkv, sk, D]. The heads that share keys are rows of one product."""
    n, heads, sq, head_dim = q.shape
    kv_heads, sk = k.shape[1:3]
    if q.numel() == 0 or k.numel() == 0:
        return
    group = heads // kv_heads

    def rows(t: Tensor, i0: int, i1: int) -> Tensor:
        return t[:, :, i0:i1].reshape(n, kv_heads, group * (i1 - i0), *t.shape[3:])

    # A query that saw no key in any step has probability 0 for all of them.
    lse = lse.masked_fill(lse == -math.inf, math.inf)
    for i0, i1, j0, j1 in positions.blocks(sq, sk, attention._rows_at_a_time(q, k, False), False):
        block_q, block_dout = rows(q, i0, i1), rows(dout, i0, i1)
        block_k, block_v = k[:, :, j0:j1], v[:, :, j0:j1]
        p = torch.matmul(block_q, block_k.mT).mul_(scale)
        unseen = positions.unseen((i0, i1, j0, j1), sk, q.device)
        if unseen is not None:
            p.unflatten(2, (group, i1 - i0)).masked_fill_(unseen, -math.inf)
        p.sub_(rows(lse, i0, i1).unsqueeze(-1)).exp_()
        dv[:, :, j0:j1] += torch.matmul(p.mT, block_dout)
        dscore = torch.matmul(block_dout, block_v.mT).sub_(rows(delta, i0, i1).unsqueeze(-1)).mul_(p).mul_(scale)
        dq[:, :, i0:i1] += torch.matmul(dscore, block_k).reshape(n, heads, i1 - i0, head_dim)
        dk[:, :, j0:j1] += torch.matmul(dscore.mT, block_q)
