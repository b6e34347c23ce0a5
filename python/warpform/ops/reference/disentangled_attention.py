"""Definition of DeBERTa's disentangled attention (arXiv 2006.03654, equation 4) over sequences laid end to end.

    distance d(i, j) = position[i] - position[j], the query's less the key's
    bucket(d) = d  where position_buckets = 0 or |d| <= mid = position_buckets // 2; farther apart, of either sign,
        mid + ceil(log(|d| / mid) / log((max_relative_positions - 1) / mid) * (mid - 1))
    r(i, j) = clamp(bucket(d) + span, 0, 2 span - 1), a row of the tables of relative positions
    score[i, j] = softmax_scale * (q[i] . k[j] + q[i] . pos_key[r(i, j)] + k[j] . pos_query[r(i, j)])
    lse[i] = log sum_j exp(score[i, j]);  out[i] = sum_j exp(score[i, j] - lse[i]) v[j]

One product of all queries with the rows of a table that the sequence reaches, and one gather, make the second term; the
third is the same with keys. Sequences of equal lengths are attended to together, as in `varlen_attention`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .._dtypes import accumulation_dtype
from . import attention

# The error that floating point may make in an exact integer; it is subtracted before rounding up.
_CEIL_SLACK = 2.0**-32


def relative_index(distance: Tensor, span: int, position_buckets: int, max_relative_positions: int) -> Tensor:
    """The row of a table [2 * span, ...] of a distance: int64 of any shape to int64 of that shape."""
    bucket = distance
    if position_buckets > 0:
        mid = position_buckets // 2
        far = distance.abs().clamp(min=mid).double() / mid
        steps = torch.log(far) / math.log((max_relative_positions - 1) / mid) * (mid - 1)
        far_bucket = (mid + torch.ceil(steps - _CEIL_SLACK)).long()
        bucket = torch.where(distance.abs() <= mid, distance, torch.sign(distance) * far_bucket)
    return (bucket + span).clamp(0, 2 * span - 1)


class _Table:
    """A table of relative positions [2 * span, H, D], cut to the rows that some sequences reach."""

    def __init__(self, table: Tensor, index: Tensor, dtype: torch.dtype) -> None:
        first, last = (int(bound) for bound in index.aminmax())
        self.rows = slice(first, last + 1)
        self.values = table[self.rows].transpose(0, 1).to(dtype)  # [H, R, D]
        self.index = (index - first).unsqueeze(1)  # [n or 1, 1, s, s]

    def products(self, x: Tensor) -> Tensor:
        """x [n, H, a, D] with every row: [n, H, a, R]."""
        return torch.matmul(x, self.values.mT)


def _pick(products: Tensor, index: Tensor) -> Tensor:
    """products [n, H, a, R] at index [n or 1, 1, a, b]: [n, H, a, b]."""
    return products.gather(-1, index.expand(*products.shape[:2], -1, -1))


def _unpick(values: Tensor, index: Tensor, rows: int) -> Tensor:
    """The transpose of `_pick`: values [n, H, a, b] summed by index into [n, H, a, rows], in an order that is fixed."""
    if values.device.type != "cpu":
        return _sums_in_order(values, index, rows)
    return values.new_zeros((*values.shape[:-1], rows)).scatter_add_(-1, index.expand(values.shape), values)


def _sums_in_order(values: Tensor, index: Tensor, rows: int) -> Tensor:
    """`_unpick` where scatter_add_ adds in the order in which threads come: accumulating by index sorts first."""
    first = rows * torch.arange(math.prod(values.shape[:-1]), device=values.device)
    places = index.expand(values.shape).flatten(0, -2) + first.unsqueeze(1)
    sums = values.new_zeros((*values.shape[:-1], rows))
    sums.view(-1).index_put_((places.flatten(),), values.flatten(), accumulate=True)
    return sums


class _Scores:
    """Scores of n sequences of one length s: q, k [n, H, s, D], in the accumulation's dtype."""

    def __init__(
        self, q: Tensor, k: Tensor, index: Tensor | None, pos_key: Tensor | None, pos_query: Tensor | None, scale: float
    ) -> None:
        self.q, self.k, self.scale = q, k, scale
        self.pos_key = None if pos_key is None or index is None else _Table(pos_key, index, q.dtype)
        self.pos_query = None if pos_query is None or index is None else _Table(pos_query, index, q.dtype)
        # For all queries at once: a block of queries meets every key.
        self.k_products = None if self.pos_query is None else self.pos_query.products(k)

    def bias(self, block: slice) -> Tensor | None:
        """Returns the terms of relative positions in the scores of a block of queries, [n, H, b, s]."""
        bias = None
        if self.pos_key is not None:
            bias = _pick(self.pos_key.products(self.q[:, :, block]), self.pos_key.index[:, :, block])
        if self.pos_query is not None and self.k_products is not None:
            term = _pick(self.k_products, self.pos_query.index[:, :, block].mT).mT
            bias = term.contiguous() if bias is None else bias.add_(term)
        return None if bias is None else bias.mul_(self.scale)

    def __getitem__(self, block: slice) -> Tensor:
        """All scores of a block of queries: [n, H, b, s]."""
        score = torch.matmul(self.q[:, :, block], self.k.mT).mul_(self.scale)
        bias = self.bias(block)
        return score if bias is None else score.add_(bias)

    def blocks(self) -> Iterator[slice]:
        """Blocks of queries whose scores may exist at one time."""
        n, heads, s, _ = self.q.shape
        rows = max(1, attention._SCORES_AT_A_TIME // max(1, n * heads * s))
        for i in range(0, s, rows):
            yield slice(i, min(i + rows, s))


class _Problem:
    """The checked arguments of forward and backward: sequences in groups, and the scores of each group."""

    def __init__(
        self,
        op: str,
        q: Tensor,
        pos_key: Tensor | None,
        pos_query: Tensor | None,
        cu_seqlens: Tensor,
        max_seqlen: int,
        positions: Tensor | None,
        softmax_scale: float | None,
        position_buckets: int,
        max_relative_positions: int,
    ) -> None:
        self.offsets = attention.offsets_of(op, "cu_seqlens", cu_seqlens, q.size(0), max_seqlen)
        heads, head_dim = q.shape[1:]
        terms = 1 + (pos_key is not None) + (pos_query is not None)
        self.scale = (head_dim * terms) ** -0.5 if softmax_scale is None else softmax_scale
        self.pos_key, self.pos_query = pos_key, pos_query
        self._buckets = position_buckets, max_relative_positions
        self._places = None if positions is None else self.sequences(positions.unsqueeze(1))
        self.groups = [
            part
            for group in attention._groups(self.offsets, self.offsets, heads * head_dim * q.element_size(), q.device)
            for part in _split(group, attention._SCORES_AT_A_TIME // max(1, heads * group.sq * group.sq))
        ]

    def sequences(self, t: Tensor) -> attention._Sequences:
        return attention._Sequences(t, self.offsets, "q")

    def scores(self, group: attention._Group, q: Tensor, k: Tensor) -> _Scores:
        """q, k [n, H, s, D] of a group."""
        index = self._index(group, q.device)
        dtype = accumulation_dtype(q.dtype)
        return _Scores(q.to(dtype), k.to(dtype), index, self.pos_key, self.pos_query, self.scale)

    def _index(self, group: attention._Group, device: torch.device) -> Tensor | None:
        """r(i, j): [n, s, s], or [1, s, s] where it is the same for all sequences of the group."""
        table = self.pos_query if self.pos_key is None else self.pos_key
        if table is None:
            return None
        span, s = table.size(0) // 2, group.sq
        if self._places is not None:
            places = self._places[group].squeeze(1)  # [n, s]
            # If no sequence has a hole, distances of places equal distances of rows, and one window serves all.
            if bool((places[:, -1] - places[:, 0] != s - 1).any()):
                return relative_index(places.unsqueeze(2) - places.unsqueeze(1), span, *self._buckets)
        # Row i holds r of i, i - 1, ..., i - s + 1: a window on all distances, read backwards.
        distances = torch.arange(1 - s, s, device=device)
        return relative_index(distances, span, *self._buckets).unfold(0, s, 1).flip(1).unsqueeze(0)


def _split(group: attention._Group, most: int) -> Iterator[attention._Group]:
    """The group, in parts of at most so many sequences (at least one)."""
    most = max(1, most)
    if len(group.members) <= most:
        yield group
        return
    for first in range(0, len(group.members), most):
        members = group.members[first : first + most]
        rows = None
        if group.q_rows is not None:
            rows = group.q_rows[first * group.sq : (first + len(members)) * group.sq]
        yield attention._Group(members, group.sq, group.sk, rows, rows)


def disentangled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_key: Tensor | None,
    pos_query: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    positions: Tensor | None = None,
    softmax_scale: float | None = None,
    position_buckets: int = 0,
    max_relative_positions: int = 512,
) -> tuple[Tensor, Tensor]:
    """q, k, v [T, H, D], pos_key, pos_query [2 * span, H, D] -> out [T, H, D], lse [H, T]; past the end 0 and -inf."""
    problem = _Problem(
        "disentangled_attention", q, pos_key, pos_query, cu_seqlens, max_seqlen,
        positions, softmax_scale, position_buckets, max_relative_positions,
    )  # fmt: skip
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full((q.size(1), q.size(0)), -math.inf, dtype=accumulation_dtype(q.dtype), device=q.device)
    queries, keys, values, outs, lses = (problem.sequences(t) for t in (q, k, v, out, lse.t()))
    for group in problem.groups:
        scores = problem.scores(group, queries[group], keys[group])
        parts = [_attend(scores, block, queries[group], keys[group], values[group]) for block in scores.blocks()]
        outs[group], lses[group] = (
            torch.cat(part, 2) if len(parts) > 1 else part[0] for part in zip(*parts, strict=True)
        )
    return out, lse


def _attend(scores: _Scores, block: slice, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out [n, H, b, D] and lse [n, H, b] of a block of queries; q, k, v [n, H, s, D]."""
    if attention._flash is not None and q.device.type == "cpu":
        bias = scores.bias(block)
        return attention._flash(q[:, :, block], k, v, 0.0, False, attn_mask=bias, scale=scores.scale)
    score = scores[block]
    lse = score.logsumexp(-1)
    return torch.matmul(torch.exp(score - lse.unsqueeze(-1)), v.to(score.dtype)).to(q.dtype), lse


def disentangled_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_key: Tensor | None,
    pos_query: Tensor | None,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    positions: Tensor | None = None,
    softmax_scale: float | None = None,
    position_buckets: int = 0,
    max_relative_positions: int = 512,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """With P = exp(score - lse), dP = dout v^T and d(score) = P * (dP - rowsum(dout * out)): dv = P^T dout;
    d(score) reaches q and k as in any attention, and summed by r(i, j) it is the gradient of q pos_key^T and of
    k pos_query^T. Rows past the last sequence: 0. A table that is None has an empty gradient."""
    problem = _Problem(
        "disentangled_attention_backward", q, pos_key, pos_query, cu_seqlens, max_seqlen,
        positions, softmax_scale, position_buckets, max_relative_positions,
    )  # fmt: skip
    dtype = accumulation_dtype(q.dtype)
    q, k, v, dout = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v, dout))
    dq, dk, dv = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    dpos_key, dpos_query = (
        None if t is None else torch.zeros(t.shape, dtype=dtype, device=t.device) for t in (pos_key, pos_query)
    )
    queries, keys, values, douts, outs = (problem.sequences(t) for t in (q, k, v, dout, out))
    lses, dqs, dks, dvs = (problem.sequences(t) for t in (lse.t(), dq, dk, dv))
    for group in problem.groups:
        scores = problem.scores(group, queries[group], keys[group])
        group_dq, group_dk, group_dv, key_rows, query_rows = _attend_backward(
            scores, values[group].to(dtype), douts[group].to(dtype), outs[group].to(dtype), lses[group]
        )
        dqs[group], dks[group], dvs[group] = group_dq, group_dk, group_dv
        for table, total, rows in ((scores.pos_key, dpos_key, key_rows), (scores.pos_query, dpos_query, query_rows)):
            if table is not None and total is not None and rows is not None:
                total[table.rows] += rows.transpose(0, 1)
    tables = (q.new_empty(0) if t is None else t.to(q.dtype) for t in (dpos_key, dpos_query))
    return dq, dk, dv, next(tables), next(tables)


def _attend_backward(
    scores: _Scores, v: Tensor, dout: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """dq, dk, dv [n, H, s, D], and the gradients [H, R, D] of the rows of the tables that the sequences reach."""
    q, k, pos_key, pos_query = scores.q, scores.k, scores.pos_key, scores.pos_query
    dq, dk, dv = (torch.zeros_like(t) for t in (q, k, v))
    dpos_key = None if pos_key is None else torch.zeros_like(pos_key.values)
    dk_products = None if scores.k_products is None else torch.zeros_like(scores.k_products)
    delta = (dout * out).sum(-1, keepdim=True)
    for block in scores.blocks():
        p = torch.exp(scores[block] - lse[:, :, block].unsqueeze(-1))
        block_dout = dout[:, :, block]
        dv += torch.matmul(p.mT, block_dout)
        dscore = (torch.matmul(block_dout, v.mT) - delta[:, :, block]).mul_(p).mul_(scores.scale)
        dq[:, :, block] = torch.matmul(dscore, k)
        dk += torch.matmul(dscore.mT, q[:, :, block])
        if pos_key is not None and dpos_key is not None:
            dproducts = _unpick(dscore, pos_key.index[:, :, block], pos_key.values.size(1))  # [n, H, b, R]
            dq[:, :, block] += torch.matmul(dproducts, pos_key.values)
            dpos_key += torch.matmul(dproducts.mT, q[:, :, block]).sum(0)
        if pos_query is not None and dk_products is not None:
            dk_products += _unpick(dscore.mT, pos_query.index[:, :, block].mT, pos_query.values.size(1))
    dpos_query = None
    if pos_query is not None and dk_products is not None:
        dk += torch.matmul(dk_products, pos_query.values)
        dpos_query = torch.matmul(dk_products.mT, k).sum(0)
    return dq, dk, dv, dpos_key, dpos_query
