"""Definition of attention inside the windows of a grid of tokens (Swin, arXiv 2103.14030; Swin V2, arXiv 2111.09883).

The grid is padded at its end to whole windows, rolled by -shift and cut into windows of N tokens. Inside of each:

    score[i, j] = scale * q[i] . k[j]      with logit_scale: cos(q[i], k[j]) * exp(min(logit_scale, ln 100))
                + table[L(i) - L(j) + L(last)]     L: the linear index of a token's place in a box of sides 2 w - 1
                + mask_value where i and j come from different sides of a seam of the roll
    out[i] = sum_j softmax_j(score[i, j]) v[j]

A position of the padding has qkv_bias for its q, k and v, or 0, and is not masked. A row whose scores are all -inf, by
the table or the mask, has output 0, log-sum-exp -inf and no gradients.

Nothing is padded, rolled or cut: `_Windows` says which token has which place in which window, tokens are gathered by
that and results scattered back. Windows which touch the same seams share one mask, so there are at most 2 ** axes
masks of [N, N], and each is added to the bias of a head before fused attention takes their sum.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._dtypes import accumulation_dtype

# The log-sum-exp is returned for windows of more tokens than this: only there does a backward need it.
LSE_ABOVE = 64
MAX_LOGIT_SCALE = math.log(100.0)
# A vector that is no longer than this has no direction: its cosines are 0.
NORM_FLOOR = 1e-12
# Scores that exist at one time in the backward, in elements: on a CPU 1 MB, which stays in its cache.
_SCORES_AT_A_TIME = {"cpu": 1 << 18}
_SCORES_ELSEWHERE = 1 << 26

# The function below scaled_dot_product_attention that also returns the log-sum-exp.
_flash: Any = getattr(torch, "_scaled_dot_product_flash_attention_for_cpu", None)


@dataclass(frozen=True)
class _Group:
    """Windows that touch the same seams."""

    windows: Tensor  # int64 [n], numbers of windows, row by row
    parted: Tensor | None  # bool [N, N], pairs from different sides of a seam; None: there are none


@dataclass(frozen=True)
class _Windows:
    """The place of each token, for one grid, window and shift."""

    tokens: Tensor  # int64 [windows, N], tokens of the flattened grid, row by row; -1 is padding
    relative: Tensor  # int64 [N, N], the row of the table of each pair
    order: Tensor  # int64 [N * N], pairs sorted by their row of the table
    counts: Tensor  # int64 [prod(2 w - 1)], pairs of each row of the table
    groups: tuple[_Group, ...]


@functools.lru_cache(maxsize=32)
def _windows(grid: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...], device: torch.device) -> _Windows:
    axes = range(len(grid))
    counts = [-(-n // w) for n, w in zip(grid, window, strict=True)]
    # Along an axis, place a of window c holds coordinate c * w + a + shift of the padded grid, rolled.
    coordinates = [
        (torch.arange(c * w, device="cpu") + s) % (c * w) for c, w, s in zip(counts, window, shift, strict=True)
    ]  # per axis [c * w]
    token = torch.zeros((), dtype=torch.int64, device="cpu")
    for n, coordinate in zip(grid, coordinates, strict=True):
        inside = (token.unsqueeze(-1) >= 0) & (coordinate < n)
        token = torch.where(inside, token.unsqueeze(-1) * n + coordinate, -1)
    # [c0 * w0, c1 * w1, ..] -> [c0, w0, c1, w1, ..] -> [c0, c1, .., w0, w1, ..] -> [windows, N]
    token = token.reshape([size for pair in zip(counts, window, strict=True) for size in pair])
    tokens = token.permute(*range(0, 2 * len(grid), 2), *range(1, 2 * len(grid), 2)).reshape(-1, math.prod(window))

    places = [torch.arange(w, device="cpu") for w in window]
    inside_window = [axis.flatten() for axis in torch.meshgrid(places, indexing="ij")]  # per axis [N]
    linear = torch.zeros_like(inside_window[0])
    for w, place in zip(window, inside_window, strict=True):
        linear = linear * (2 * w - 1) + place
    relative = linear.unsqueeze(1) - linear + linear[-1]
    order = relative.flatten().argsort(stable=True)
    pairs = relative.flatten().bincount(minlength=math.prod(2 * w - 1 for w in window))

    # Only the last window of an axis holds tokens from both sides of the seam, which lies w - shift places into it.
    shifted = [axis for axis in axes if shift[axis] > 0]
    numbers = torch.arange(len(tokens), device="cpu").reshape(counts)
    groups = []
    for touched in itertools.product((False, True), repeat=len(shifted)):
        part = numbers
        parted = torch.zeros_like(relative, dtype=torch.bool)
        for axis, last in zip(shifted, touched, strict=True):
            part = part.narrow(axis, counts[axis] - 1, 1) if last else part.narrow(axis, 0, counts[axis] - 1)
            if last:
                beyond = inside_window[axis] >= window[axis] - shift[axis]
                parted |= beyond.unsqueeze(1) != beyond
        if part.numel():
            groups.append(_Group(part.flatten().to(device), parted.to(device) if any(touched) else None))
    tokens, relative, order, pairs = (t.to(device) for t in (tokens, relative, order, pairs))
    return _Windows(tokens, relative, order, pairs, tuple(groups))


class _Scores:
    """Computes scores from q and k with scale or logit_scale, bias and mask, in the dtype that sums have."""

    def __init__(
        self,
        qkv: Tensor,
        table: Tensor | None,
        logit_scale: Tensor | None,
        windows: _Windows,
        scale: float | None,
        mask_value: float,
    ) -> None:
        self.dtype = accumulation_dtype(qkv.dtype)
        # Finite numbers that only a double holds count as the largest of the dtype.
        bounds = torch.finfo(self.dtype)
        self.mask_value = mask_value if mask_value == -math.inf else min(max(mask_value, bounds.min), bounds.max)
        self.bias = None  # [heads, N, N]
        if table is not None:
            self.bias = table.to(self.dtype)[windows.relative].permute(2, 0, 1).contiguous()
        # Whether a row may see no key. Elsewhere than on a CPU to know it would be to wait for the table.
        self.may_hide = mask_value == -math.inf
        if table is not None:
            self.may_hide |= table.device.type != "cpu" or bool((table == -math.inf).any())
        self.factor = None  # [heads, 1, 1], cosine attention's
        self.scale = qkv.size(-1) ** -0.5 if scale is None else scale
        if logit_scale is not None:
            self.factor = logit_scale.to(self.dtype).clamp(max=MAX_LOGIT_SCALE).exp().view(-1, 1, 1)
            self.scale = 1.0

    def added(self, group: _Group) -> tuple[Tensor | None, Tensor | None]:
        """Returns the addend of a group's scores, [1, heads or 1, N, N], and which rows see no key, [.., N, 1].

        To those 0 is added here, which keeps NaN out; what comes of it is not to be used. None: nothing, and no rows.
        """
        added = None if self.bias is None else self.bias.unsqueeze(0)
        if group.parted is not None:
            mask = torch.zeros(group.parted.shape, dtype=self.dtype, device=group.parted.device)
            mask.masked_fill_(group.parted, self.mask_value)
            added = mask.expand(1, 1, -1, -1) if added is None else added + mask
        if added is None or not self.may_hide:
            return added, None
        hidden = (added == -math.inf).all(-1, keepdim=True)
        return added.masked_fill(hidden, 0), hidden


def _direction(x: Tensor) -> tuple[Tensor, Tensor]:
    """x / |x| and |x| [..., 1]; where x is no longer than the floor, 0 and infinity."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    length = torch.where(length > NORM_FLOOR, length, math.inf)
    return x / length, length


def _blocks(windows: _Windows, batch: int, scores_of_window: int) -> Iterator[tuple[_Group, slice, Tensor]]:
    """Group, images and windows: blocks of about as many scores as should exist at one time, every window once."""
    scores = _SCORES_AT_A_TIME.get(windows.tokens.device.type, _SCORES_ELSEWHERE)
    at_a_time = max(1, scores // max(1, scores_of_window))
    for group in windows.groups:
        images = max(1, at_a_time // len(group.windows))
        for numbers in group.windows.split(at_a_time):
            for first in range(0, batch, images):
                yield group, slice(first, min(first + images, batch)), numbers


def _gather(rows: Tensor, tokens: Tensor, padding: Tensor | None) -> Tensor:
    """rows [b, tokens, ...] by tokens [n, N], -1 giving `padding` [...] or 0: [b, n, N, ...]."""
    flat = tokens.flatten()
    absent = (flat < 0).nonzero().flatten()
    out = rows.index_select(1, flat.clamp(min=0))
    if len(absent):
        out[:, absent] = 0 if padding is None else padding.to(out.dtype)
    return out.unflatten(1, tuple(tokens.shape))


def _heads(x: Tensor, parts: int) -> tuple[Tensor, ...]:
    """[b, n, N, parts * heads.., d] -> parts times [b * n, heads, N, d]."""
    return x.flatten(0, 1).unflatten(2, (parts, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _flat_grid(qkv: Tensor) -> tuple[tuple[int, ...], Tensor]:
    """The sizes of the grid, and qkv as [batch, tokens, 3 * heads, d]."""
    grid = tuple(qkv.shape[1:-3])
    return grid, qkv.reshape(qkv.size(0), math.prod(grid), 3 * qkv.size(-2), qkv.size(-1))


def window_attention(
    qkv: Tensor,
    relative_position_bias_table: Tensor | None,
    logit_scale: Tensor | None,
    qkv_bias: Tensor | None,
    window_size: Sequence[int],
    shift_size: Sequence[int],
    *,
    scale: float | None = None,
    mask_value: float = -100.0,
) -> tuple[Tensor, Tensor]:
    """out [batch, *grid, heads * d]; lse [batch, windows, heads, N], or [0] where N is at most LSE_ABOVE."""
    grid, rows = _flat_grid(qkv)
    batch, heads, d = qkv.size(0), qkv.size(-2), qkv.size(-1)
    window = tuple(window_size)
    count, n = math.prod(-(-g // w) for g, w in zip(grid, window, strict=True)), math.prod(window)
    wide = accumulation_dtype(qkv.dtype)
    lse = torch.empty((batch, count, heads, n) if n > LSE_ABOVE else 0, dtype=wide, device=qkv.device)
    out = torch.empty((batch, *grid, heads * d), dtype=qkv.dtype, device=qkv.device)
    if out.numel() == 0:
        return out, lse
    windows = _windows(grid, window, tuple(shift_size), qkv.device)
    scores = _Scores(qkv, relative_position_bias_table, logit_scale, windows, scale, mask_value)
    padding = None if qkv_bias is None else qkv_bias.reshape(-1, d)  # [3 * heads, d]
    out_rows = out.view(batch, math.prod(grid), heads * d)
    for group, images, numbers in _blocks(windows, batch, heads * n * n):
        tokens = windows.tokens[numbers]
        q, k, v = _heads(_gather(rows[images], tokens, padding), 3)  # each [b * n, heads, N, d]
        added, hidden = scores.added(group)
        part, part_lse = _attend(q, k, v, scores, added)
        if hidden is not None:
            part = part.masked_fill(hidden, 0)
            part_lse = part_lse.masked_fill(hidden.squeeze(-1), -math.inf) if n > LSE_ABOVE else part_lse
        _scatter(out_rows[images], tokens, part.transpose(1, 2).reshape(-1, *tokens.shape, heads * d))
        if n > LSE_ABOVE:
            lse[images, numbers] = part_lse.view(-1, len(numbers), heads, n)
    return out, lse


def _scatter(rows: Tensor, tokens: Tensor, values: Tensor) -> None:
    """rows [b, tokens, ...] = values [b, n, N, ...] by tokens [n, N]; values at -1 are dropped."""
    flat, values = tokens.flatten(), values.flatten(1, 2)
    present = (flat >= 0).nonzero().flatten()
    if len(present) < len(flat):
        flat, values = flat[present], values.index_select(1, present)
    rows.index_copy_(1, flat, values.to(rows.dtype))


def _attend(q: Tensor, k: Tensor, v: Tensor, scores: _Scores, added: Tensor | None) -> tuple[Tensor, Tensor]:
    """q, k, v [n, heads, N, d] -> out alike and lse [n, heads, N]."""
    if scores.factor is not None:
        q, k = (_direction(t.to(scores.dtype))[0] for t in (q, k))
        q, v = q * scores.factor, v.to(scores.dtype)
    if _flash is not None and q.device.type == "cpu":
        return _flash(q, k, v, 0.0, False, attn_mask=added, scale=scores.scale)
    if q.size(2) <= LSE_ABOVE:
        mask = None if added is None else added.to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scores.scale), q.new_empty(0)
    score = torch.matmul(q.to(scores.dtype), k.to(scores.dtype).mT) * scores.scale
    score = score if added is None else score + added
    lse = score.logsumexp(-1)
    return torch.matmul(torch.exp(score - lse.unsqueeze(-1)), v.to(scores.dtype)), lse


def window_attention_backward(
    dout: Tensor,
    qkv: Tensor,
    relative_position_bias_table: Tensor | None,
    logit_scale: Tensor | None,
    qkv_bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    window_size: Sequence[int],
    shift_size: Sequence[int],
    *,
    scale: float | None = None,
    mask_value: float = -100.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """With P the probabilities and dP = dout v^T: dv = P^T dout; dS = P * (dP - rowsum(P * dP)), from which dq and dk
    follow through the scale or the cosine. dtable sums dS over the pairs of a row and over all windows; dlogit_scale
    sums dS * cos * exp(logit_scale), 0 above the clamp; dqkv_bias sums over the padding. All in a fixed order. The
    gradient of a vector of length 0 through its cosine is 0.
    """
    grid, rows = _flat_grid(qkv)
    batch, heads, d = qkv.size(0), qkv.size(-2), qkv.size(-1)
    window = tuple(window_size)
    n = math.prod(window)
    table = relative_position_bias_table
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    wide = accumulation_dtype(qkv.dtype)
    dbias = torch.zeros((heads, n, n), dtype=wide, device=qkv.device)
    dfactor = torch.zeros(heads, dtype=wide, device=qkv.device)
    dpadding = torch.zeros((3 * heads, d), dtype=wide, device=qkv.device)
    windows = _windows(grid, window, tuple(shift_size), qkv.device)
    if dqkv.numel():
        scores = _Scores(qkv, table, logit_scale, windows, scale, mask_value)
        padding = None if qkv_bias is None else qkv_bias.reshape(-1, d)
        dqkv_rows = dqkv.view(batch, math.prod(grid), 3 * heads, d)
        dout_rows = dout.reshape(batch, math.prod(grid), heads, d)
        for group, images, numbers in _blocks(windows, batch, heads * n * n):
            tokens = windows.tokens[numbers]
            q, k, v = _heads(_gather(rows[images], tokens, padding).to(wide), 3)
            (part_dout,) = _heads(_gather(dout_rows[images], tokens, None).to(wide), 1)
            added, hidden = scores.added(group)
            if hidden is not None:
                part_dout = part_dout.masked_fill(hidden, 0)
            gradients, dscore, part_dfactor = _attend_backward(part_dout, q, k, v, scores, added)
            dwindows = torch.empty((len(q), n, 3, heads, d), dtype=wide, device=qkv.device)
            for target, gradient in zip(dwindows.permute(2, 0, 3, 1, 4).unbind(0), gradients, strict=True):
                target.copy_(gradient)
            dwindows = dwindows.view(-1, *tokens.shape, 3 * heads, d)
            _scatter(dqkv_rows[images], tokens, dwindows)
            if table is not None:
                dbias += dscore.sum(0)
            if part_dfactor is not None:
                dfactor += part_dfactor
            if qkv_bias is not None:
                absent = (tokens.flatten() < 0).nonzero().flatten()
                dpadding += dwindows.flatten(1, 2).index_select(1, absent).sum((0, 1))

    dtable, dlogit_scale, dqkv_bias = (qkv.new_empty(0) for _ in range(3))
    if table is not None:
        dtable = _sum_pairs(dbias, windows).to(table.dtype)
    if logit_scale is not None:
        dlogit_scale = torch.where(logit_scale > MAX_LOGIT_SCALE, 0, dfactor).to(logit_scale.dtype)
    if qkv_bias is not None:
        dqkv_bias = dpadding.view(qkv_bias.shape).to(qkv_bias.dtype)
    return dqkv, dtable, dlogit_scale, dqkv_bias


def _attend_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, scores: _Scores, added: Tensor | None
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor | None]:
    """dq, dk, dv [n, heads, N, d], dS [n, heads, N, N] and the gradient of logit_scale [heads], unclamped."""
    if scores.factor is None:
        left, right = q * scores.scale, k
    else:
        left, length_q = _direction(q)
        right, length_k = _direction(k)
        unit_q, unit_k, left = left, right, left * scores.factor
    plain = torch.matmul(left, right.mT)
    p = torch.softmax(plain if added is None else plain + added, -1)
    dv = torch.matmul(p.mT, dout)
    dp = torch.matmul(dout, v.mT)
    dscore = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
    if scores.factor is None:
        return (torch.matmul(dscore, k) * scores.scale, torch.matmul(dscore.mT, left), dv), dscore, None
    dfactor = (dscore * plain).sum((0, 2, 3))
    dunit_q, dunit_k = torch.matmul(dscore, unit_k) * scores.factor, torch.matmul(dscore.mT, left)
    # A direction has length 1, so the part of its gradient along itself changes nothing and is subtracted.
    dq = (dunit_q - unit_q * (unit_q * dunit_q).sum(-1, keepdim=True)) / length_q
    dk = (dunit_k - unit_k * (unit_k * dunit_k).sum(-1, keepdim=True)) / length_k
    return (dq, dk, dv), dscore, dfactor


def _sum_pairs(dbias: Tensor, windows: _Windows) -> Tensor:
    """[heads, N, N] -> [prod(2 w - 1), heads], adding the pairs of each row of the table in a fixed order."""
    pairs = dbias.flatten(1).index_select(1, windows.order).t().contiguous()  # [N * N, heads]
    return torch.segment_reduce(pairs, "sum", lengths=windows.counts, axis=0, unsafe=True)
