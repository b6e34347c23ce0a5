"""Definition of attention over sequences of any lengths laid end to end.

    score[i, j] = softmax_scale * q[i] . k[j];  softcap > 0: score = softcap * tanh(score / softcap)
    ALiBi (arXiv 2108.12409) adds -slope * |i + sk - sq - j|
    key j is seen by query i of a sequence of lengths sq, sk iff  -left <= j - (i + sk - sq) <= right  (-1 = unbounded)
    lse[i] = log sum_j exp(score[i, j]);  out[i] = sum_j exp(score[i, j] - lse[i]) v[j];  no key seen: out 0, lse -inf

Short sequences of equal lengths are attended to in one call, so thousands of them cost a few calls, and no score is
ever computed for padding. The lengths are read by the host; on a GPU that waits for the device in each call, which is
why the kernels and not this are meant for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .._dtypes import accumulation_dtype

# Beyond this many bytes of q in a sequence, on a CPU, a call of its own costs less than moving it next to others ...
_GATHER_BYTES = 1 << 13
# ... and than one call for adjacent ones, whose results leave the cache before they are copied.
_ADJACENT_BYTES = 1 << 16
# Scores that exist at one time, in elements, where they have to be materialised.
_SCORES_AT_A_TIME = 1 << 22

# The least scale at which torch's fused attention masks by itself: it sets masked products to -inf before it scales
# them, which a scale of 0, or one that float32 holds as 0, makes NaN, and a negative one +inf.
LEAST_CAUSAL_SCALE = 1e-30
# Within these bounds float32 holds a softcap and its inverse. No float32 score tells a softcap beyond them from the
# bound: below the one every capped score counts as 0, above the other none is capped.
SOFTCAP_BOUNDS = (1e-30, 1e30)

# The functions below scaled_dot_product_attention that also return the log-sum-exp.
_flash: Any = getattr(torch, "_scaled_dot_product_flash_attention_for_cpu", None)
_flash_backward: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)


@dataclass(frozen=True)
class _Scores:
    """The parameters of scores and of their mask. left, right: -1 = unbounded. slopes: [1 or n, Hq]."""

    scale: float
    left: int
    right: int
    softcap: float
    slopes: Tensor | None

    def first_seeing(self, sq: int, sk: int) -> int:
        """The first query that sees any key: only leading ones can be without."""
        return min(sq, max(0, sq - sk - self.right)) if self.right >= 0 else 0

    def is_plain(self, sq: int, sk: int) -> bool:
        return (
            self.slopes is None and (self.left < 0 or self.left >= sk - 1) and (self.right < 0 or self.right >= sq - 1)
        )

    def is_causal(self, sq: int, sk: int) -> bool:
        """Tells whether torch's fused attention can mask by itself: a causal square, with a scale that it takes."""
        return (
            sq == sk
            and self.right == 0
            and (self.left < 0 or self.left >= sk - 1)
            and self.slopes is None
            and self.scale >= LEAST_CAUSAL_SCALE
        )

    def blocks(self, sq: int, sk: int, rows_at_a_time: int) -> Iterator[tuple[int, int, int, int]]:
        """Rectangles (i0, i1, j0, j1) of queries and keys which cover every pair that is seen."""
        shift = sk - sq
        for i0 in range(self.first_seeing(sq, sk), sq, rows_at_a_time):
            i1 = min(i0 + rows_at_a_time, sq)
            j0 = max(0, i0 + shift - self.left) if self.left >= 0 else 0
            j1 = min(sk, i1 + shift + self.right) if self.right >= 0 else sk
            yield i0, i1, j0, j1

    def bias(self, block: tuple[int, int, int, int], sq: int, sk: int, like: Tensor) -> Tensor | None:
        """Returns the addend of a block's scores, [1 or n, 1 or Hq, i1 - i0, j1 - j0], -inf where masked."""
        i0, i1, j0, j1 = block
        dtype = accumulation_dtype(like.dtype)
        rows = torch.arange(i0 + sk - sq, i1 + sk - sq, device=like.device).unsqueeze(1)
        distance = torch.arange(j0, j1, device=like.device) - rows
        bias = None
        if self.slopes is not None:
            bias = -self.slopes.to(dtype)[:, :, None, None] * distance.abs()
        unseen = None
        if self.left >= 0 and i1 - 1 + sk - sq - self.left > j0:
            unseen = distance < -self.left
        if self.right >= 0 and i0 + sk - sq + self.right < j1 - 1:
            past = distance > self.right
            unseen = past if unseen is None else unseen | past
        if unseen is not None:
            if bias is None:
                bias = torch.zeros((1, 1, i1 - i0, j1 - j0), dtype=dtype, device=like.device)
            bias = bias.masked_fill(unseen, -math.inf)
        return bias


@dataclass(frozen=True)
class _Group:
    """n sequences of lengths sq, sk: one, adjacent ones beginning with `members[0]`, or some gathered by their rows."""

    members: Sequence[int]
    sq: int
    sk: int
    q_rows: Tensor | None = None
    k_rows: Tensor | None = None
    single: int = -1  # the member, where there is one


class _Sequences:
    """A tensor [T, H, ...] read and written by groups of its sequences, as [n, H, s, ...]."""

    def __init__(self, t: Tensor, offsets: list[int], side: str) -> None:
        self._t, self._offsets, self._side = t, offsets, side
        # One call makes all views, where three for each sequence would cost as much as attending to a short one.
        lengths = [end - start for start, end in pairwise(offsets)]
        lengths.append(t.size(0) - offsets[-1])
        self._each = t.transpose(0, 1).unsqueeze(0).split(lengths, 2)

    def _adjacent(self, group: _Group) -> Tensor:
        n, s = len(group.members), group.sq if self._side == "q" else group.sk
        start = self._offsets[group.members[0]]
        return self._t[start : start + n * s].unflatten(0, (n, s)).transpose(1, 2)

    def __getitem__(self, group: _Group) -> Tensor:
        if group.single >= 0:
            return self._each[group.single]
        rows = group.q_rows if self._side == "q" else group.k_rows
        if rows is None:
            return self._adjacent(group)
        return self._t.index_select(0, rows).unflatten(0, (len(group.members), -1)).transpose(1, 2)

    def __setitem__(self, group: _Group, part: Tensor) -> None:
        if group.single >= 0:
            self._each[group.single].copy_(part)
            return
        rows = group.q_rows if self._side == "q" else group.k_rows
        if rows is None:
            self._adjacent(group).copy_(part)
        else:
            self._t.index_copy_(0, rows, part.transpose(1, 2).flatten(0, 1).to(self._t.dtype))


def offsets_of(op: str, name: str, cu_seqlens: Tensor, rows: int, max_seqlen: int) -> list[int]:
    """cu_seqlens on the host; ValueError where its values are not what attention asks for."""
    offsets: list[int] = cu_seqlens.tolist()
    longest = 0
    if offsets[0] != 0:
        raise ValueError(f"{op}: {name} must begin with 0, got {offsets[0]}")
    for index in range(1, len(offsets)):
        length = offsets[index] - offsets[index - 1]
        if length < 0:
            raise ValueError(
                f"{op}: {name} must not decrease, got {offsets[index - 1]} then {offsets[index]} at [{index}]"
            )
        longest = max(longest, length)
    if offsets[-1] > rows:
        raise ValueError(f"{op}: {name} must not pass the end of its tensor of {rows} rows, got {offsets[-1]} last")
    if longest > max_seqlen:
        raise ValueError(
            f"{op}: {name.replace('cu_seqlens', 'max_seqlen')} must be at least the longest sequence of {name}, "
            f"{longest}, got {max_seqlen}"
        )
    return offsets


def check_offsets(
    op: str, q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int
) -> tuple[list[int], list[int]]:
    """The values of both cu_seqlens on the host; ValueError where they are not what `varlen_attention` asks for."""
    q_offsets = offsets_of(op, "cu_seqlens_q", cu_seqlens_q, q.size(0), max_seqlen_q)
    if cu_seqlens_k is cu_seqlens_q and k.size(0) == q.size(0) and max_seqlen_k >= max_seqlen_q:
        return q_offsets, q_offsets
    return q_offsets, offsets_of(op, "cu_seqlens_k", cu_seqlens_k, k.size(0), max_seqlen_k)


def _groups(q_offsets: list[int], k_offsets: list[int], row_bytes: int, device: torch.device) -> list[_Group]:
    """Groups which cover every sequence that has queries and keys, each once."""
    by_lengths: dict[tuple[int, int], list[int]] = {}
    for b in range(len(q_offsets) - 1):
        lengths = (q_offsets[b + 1] - q_offsets[b], k_offsets[b + 1] - k_offsets[b])
        if lengths[0] > 0 and lengths[1] > 0:
            by_lengths.setdefault(lengths, []).append(b)
    gather_below, adjacent_below = (_GATHER_BYTES, _ADJACENT_BYTES) if device.type == "cpu" else (math.inf, math.inf)
    groups = []
    for (sq, sk), members in by_lengths.items():
        size = max(sq, sk) * row_bytes
        if len(members) > 1 and members[-1] - members[0] == len(members) - 1 and size < adjacent_below:
            groups.append(_Group(members, sq, sk))
        elif len(members) == 1 or size >= gather_below:
            groups.extend(_Group((b,), sq, sk, single=b) for b in members)
        else:
            q_starts = [q_offsets[b] for b in members]
            k_starts = [k_offsets[b] for b in members]
            q_rows = _rows(q_starts, sq, device)
            k_rows = q_rows if k_starts == q_starts and sk == sq else _rows(k_starts, sk, device)
            groups.append(_Group(members, sq, sk, q_rows, k_rows))
    return groups


def _rows(starts: list[int], length: int, device: torch.device) -> Tensor:
    return (torch.tensor(starts, device=device).unsqueeze(1) + torch.arange(length, device=device)).flatten()


def _repeat_heads(t: Tensor, times: int) -> Tensor:
    """Key heads [n, Hkv, s, D] -> [n, Hkv * times, s, D]."""
    return t if times == 1 else t.repeat_interleave(times, dim=1)


def _sum_heads(t: Tensor, times: int) -> Tensor:
    """Gradients of repeated heads [n, Hkv * times, s, D] -> [n, Hkv, s, D]."""
    return t if times == 1 else t.unflatten(1, (-1, times)).sum(2)


def _prepare(
    op: str,
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None,
    causal: bool,
    left: int,
    right: int,
    softcap: float,
    slopes: Tensor | None,
) -> tuple[_Scores, list[_Group], list[int], list[int]]:
    q_offsets, k_offsets = check_offsets(op, q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    row_bytes = q.size(1) * q.size(2) * q.element_size()
    groups = _groups(q_offsets, k_offsets, row_bytes, q.device)
    scores = _Scores(
        scale=q.size(-1) ** -0.5 if softmax_scale is None else softmax_scale,
        left=left,
        right=(0 if right < 0 else min(right, 0)) if causal else right,
        softcap=softcap and min(max(softcap, SOFTCAP_BOUNDS[0]), SOFTCAP_BOUNDS[1]),
        slopes=slopes if slopes is None or slopes.dim() == 2 else slopes.unsqueeze(0),
    )
    return scores, groups, q_offsets, k_offsets


def _of_group(scores: _Scores, group: _Group) -> _Scores:
    if scores.slopes is None or scores.slopes.size(0) == 1:
        return scores
    return replace(scores, slopes=scores.slopes[list(group.members)])


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    """q [Tq, Hq, D], k, v [Tk, Hkv, D] -> out [Tq, Hq, D], lse [Hq, Tq]; past the last sequence out 0, lse -inf."""
    scores, groups, q_offsets, k_offsets = _prepare(
        "varlen_attention", q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
    )  # fmt: skip
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    covered = sum(len(group.members) * group.sq for group in groups)
    out = (torch.empty if covered == q.size(0) else torch.zeros)(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full((q.size(1), q.size(0)), -math.inf, dtype=accumulation_dtype(q.dtype), device=q.device)
    queries, outs, lses = (_Sequences(t, q_offsets, "q") for t in (q, out, lse.t()))
    keys, values = (_Sequences(t, k_offsets, "k") for t in (k, v))
    repeats = q.size(1) // k.size(1) if k.size(1) else 1
    for group in groups:
        outs[group], lses[group] = _attend(
            queries[group],
            _repeat_heads(keys[group], repeats),
            _repeat_heads(values[group], repeats),
            _of_group(scores, group),
        )
    return out, lse


def _attend(q: Tensor, k: Tensor, v: Tensor, scores: _Scores) -> tuple[Tensor, Tensor]:
    """Attention of n sequences of one length: q [n, H, sq, D], k, v [n, H, sk, D] -> out like q, lse [n, H, sq]."""
    n, heads, sq, _ = q.shape
    sk = k.size(2)
    fused = _flash is not None and q.device.type == "cpu" and scores.softcap == 0
    if fused and scores.is_plain(sq, sk):
        return _flash(q, k, v, 0.0, False, scale=scores.scale)
    if fused and scores.is_causal(sq, sk):
        return _flash(q, k, v, 0.0, True, scale=scores.scale)

    out = torch.zeros_like(q)
    lse = torch.full((n, heads, sq), -math.inf, dtype=accumulation_dtype(q.dtype), device=q.device)
    for block in scores.blocks(sq, sk, _rows_at_a_time(q, k, fused)):
        i0, i1, j0, j1 = block
        bias = scores.bias(block, sq, sk, q)
        part = q[:, :, i0:i1], k[:, :, j0:j1], v[:, :, j0:j1]
        if fused:
            block_out, block_lse = _flash(*part, 0.0, False, attn_mask=bias, scale=scores.scale)
        else:
            block_out, block_lse = _attend_explicitly(*part, bias, scores)
        out[:, :, i0:i1] = block_out
        lse[:, :, i0:i1] = block_lse
    return out, lse


def _rows_at_a_time(q: Tensor, k: Tensor, fused: bool) -> int:
    # Fused attention materialises the bias alone, which has at most the heads that the slopes have.
    n, heads = (1, 1) if fused else q.shape[:2]
    return max(1, min(512, _SCORES_AT_A_TIME // max(1, n * heads * k.size(2))))


def _final_scores(q: Tensor, k: Tensor, bias: Tensor | None, scores: _Scores) -> tuple[Tensor, Tensor | None]:
    """The scores of a block, and d(score) / d(scale * q.k) where that is not 1."""
    score = torch.matmul(q, k.mT) * scores.scale
    slope = None
    if scores.softcap > 0:
        bounded = torch.tanh(score / scores.softcap)
        slope = 1 - bounded * bounded
        score = scores.softcap * bounded
    return (score if bias is None else score + bias), slope


def _attend_explicitly(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scores: _Scores) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(q.dtype)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    score, _ = _final_scores(q, k, bias, scores)
    lse = score.logsumexp(-1)
    return torch.matmul(torch.exp(score - lse.unsqueeze(-1)), v), lse


def varlen_attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """With P = exp(score - lse) and dP = dout v^T: dv = P^T dout; d(score) = P * (dP - rowsum(dout * out) + dlse);
    dq and dk follow through the softcap and the scale. Rows past the last sequence, and queries that see nothing: 0."""
    scores, groups, q_offsets, k_offsets = _prepare(
        "varlen_attention_backward", q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
    )  # fmt: skip
    q, k, v, dout = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v, dout))
    if dlse is not None and dlse.device.type == "cpu" and not dlse.any():
        dlse = None
    dq, dk, dv = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    queries, douts, outs, dqs = (_Sequences(t, q_offsets, "q") for t in (q, dout, out, dq))
    lses = _Sequences(lse.t(), q_offsets, "q")
    dlses = None if dlse is None else _Sequences(dlse.t(), q_offsets, "q")
    keys, values, dks, dvs = (_Sequences(t, k_offsets, "k") for t in (k, v, dk, dv))
    repeats = q.size(1) // k.size(1) if k.size(1) else 1
    dtype = accumulation_dtype(q.dtype)
    for group in groups:
        inputs = douts[group], queries[group], keys[group], values[group], outs[group]
        group_dout, group_q, group_k, group_v, group_out = (t.to(dtype) for t in inputs)
        group_dq, group_dk, group_dv = _attend_backward(
            group_dout,
            None if dlses is None else dlses[group],
            group_q,
            _repeat_heads(group_k, repeats),
            _repeat_heads(group_v, repeats),
            group_out,
            lses[group],
            _of_group(scores, group),
        )
        dqs[group] = group_dq
        dks[group] = _sum_heads(group_dk, repeats)
        dvs[group] = _sum_heads(group_dv, repeats)
    return dq, dk, dv


def _attend_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scores: _Scores
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `_attend`; dlse, lse [n, H, sq], the others as there, all in the accumulation's dtype.

    From 16-bit tensors torch's fused backward would make its sums over queries in 16 bits.
    """
    sq, sk = q.size(2), k.size(2)
    fused = _flash_backward is not None and q.device.type == "cpu" and scores.softcap == 0 and dlse is None
    if fused and scores.is_plain(sq, sk):
        return _flash_backward(dout, q, k, v, out, lse, 0.0, False, scale=scores.scale)
    if fused and scores.is_causal(sq, sk):
        return _flash_backward(dout, q, k, v, out, lse, 0.0, True, scale=scores.scale)

    dq, dk, dv = (torch.zeros_like(t) for t in (q, k, v))
    for block in scores.blocks(sq, sk, _rows_at_a_time(q, k, fused)):
        i0, i1, j0, j1 = block
        bias = scores.bias(block, sq, sk, q)
        rows, keys = slice(i0, i1), slice(j0, j1)
        block_q, block_k, block_v = q[:, :, rows], k[:, :, keys], v[:, :, keys]
        block_dout, block_out, block_lse = dout[:, :, rows], out[:, :, rows], lse[:, :, rows]
        if fused:
            parts = _flash_backward(
                block_dout, block_q, block_k, block_v, block_out, block_lse, 0.0, False,
                attn_mask=bias, scale=scores.scale,
            )  # fmt: skip
        else:
            block_dlse = None if dlse is None else dlse[:, :, rows]
            parts = _attend_backward_explicitly(
                block_dout, block_dlse, block_q, block_k, block_v, block_out, block_lse, bias, scores
            )
        dq[:, :, rows] = parts[0]
        dk[:, :, keys] += parts[1]
        dv[:, :, keys] += parts[2]
    return dq, dk, dv


def _attend_backward_explicitly(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    scores: _Scores,
) -> tuple[Tensor, Tensor, Tensor]:
    score, slope = _final_scores(q, k, bias, scores)
    p = torch.exp(score - lse.unsqueeze(-1))
    delta = (dout * out).sum(-1)
    if dlse is not None:
        delta = delta - dlse
    dscore = p * (torch.matmul(dout, v.mT) - delta.unsqueeze(-1))
    if slope is not None:
        dscore = dscore * slope
    dscore = dscore * scores.scale
    return torch.matmul(dscore, k), torch.matmul(dscore.mT, q), torch.matmul(p.mT, dout)
