"""The ops' definitions once more, straight from the formulas and apart from warpform.ops.reference.

Everything here is differentiable and computes in the dtype of its inputs: in float64 it is the truth, in the dtype
under test it is the eager computation whose error is the yardstick (see compare.py).
"""

from __future__ import annotations

import functools
import math
from itertools import pairwise

import torch
from torch import Tensor


def packing_plan(mask: list[list[int]], capacity: int) -> dict[str, object]:
    """The plan of a mask, token after token, as lists."""
    seqlen = len(mask[0]) if mask else 0
    cu_seqlens, indices, position_ids, total, longest = [0], [], [], 0, 0
    ranks = [[-1] * seqlen for _ in mask]
    for b, row in enumerate(mask):
        for s, token in enumerate(row):
            if token:
                total += 1
                if len(indices) < capacity:
                    ranks[b][s] = len(indices)
                    indices.append(b * seqlen + s)
                    position_ids.append(s)
        longest = max(longest, sum(1 for token in row if token))
        cu_seqlens.append(len(indices))
    lengths = [end - start for start, end in pairwise(cu_seqlens)]
    holes = capacity - len(indices)
    return {
        "cu_seqlens": cu_seqlens,
        "lengths": lengths,
        "indices": indices + [-1] * holes,
        "position_ids": position_ids + [0] * holes,
        "ranks": ranks,
        "summary": [total, longest],
    }


def pack(x: Tensor, indices: list[int]) -> Tensor:
    """Row by row."""
    flat = x.flatten(0, 1)
    zero = x.new_zeros(x.shape[2:])
    rows = [flat[i] if 0 <= i < flat.size(0) else zero for i in indices]
    return torch.stack(rows) if rows else x.new_zeros((0, *x.shape[2:]))


def visible(sq: int, sk: int, causal: bool, window: tuple[int, int], device: torch.device) -> Tensor:
    """[sq, sk] bool: which key each query sees, aligned at the end."""
    query = torch.arange(sq, device=device)[:, None] + (sk - sq)
    key = torch.arange(sk, device=device)[None, :]
    seen = torch.ones(sq, sk, dtype=torch.bool, device=device)
    if causal:
        seen &= key <= query
    if window[0] >= 0:
        seen &= key >= query - window[0]
    if window[1] >= 0:
        seen &= key <= query + window[1]
    return seen


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths_q: list[int],
    lengths_k: list[int],
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out [Tq, Hq, D] and lse [Hq, Tq], one sequence after another."""
    scale = q.size(-1) ** -0.5 if softmax_scale is None else softmax_scale
    group = q.size(1) // k.size(1)
    outs, lses, start_q, start_k = [], [], 0, 0
    for b, (sq, sk) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        one_q = q[start_q : start_q + sq].transpose(0, 1)  # [H, sq, D]
        one_k = k[start_k : start_k + sk].repeat_interleave(group, 1).transpose(0, 1)
        one_v = v[start_k : start_k + sk].repeat_interleave(group, 1).transpose(0, 1)
        start_q, start_k = start_q + sq, start_k + sk
        if sk == 0:
            outs.append(torch.zeros_like(one_q).transpose(0, 1))
            lses.append(q.new_full((q.size(1), sq), -math.inf))
            continue
        score = one_q @ one_k.transpose(1, 2) * scale
        if softcap > 0:
            score = softcap * torch.tanh(score / softcap)
        if slopes is not None:
            slope = (slopes if slopes.dim() == 1 else slopes[b]).to(score.dtype)
            distance = torch.arange(sq, device=q.device)[:, None] + (sk - sq) - torch.arange(sk, device=q.device)
            score = score - slope[:, None, None] * distance.abs().to(score.dtype)
        seen = visible(sq, sk, causal, window, q.device)
        alive = seen.any(1)
        # Rows that see nothing are computed as if they saw everything and then replaced, so that no NaN arises.
        score = score.masked_fill(~(seen | ~alive[:, None]), -math.inf)
        lse = torch.logsumexp(score, -1)
        out = torch.softmax(score, -1) @ one_v
        outs.append(torch.where(alive[None, :, None], out, 0).transpose(0, 1))
        lses.append(torch.where(alive[None, :], lse, -math.inf))
    rest = q.size(0) - start_q
    outs.append(q.new_zeros(rest, *q.shape[1:]))
    lses.append(q.new_full((q.size(1), rest), -math.inf))
    return torch.cat(outs), torch.cat(lses, 1)


def varlen_attention_gradients(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths_q: list[int],
    lengths_k: list[int],
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv written out, eagerly in the dtype of q: from out and lse, as every fused backward computes them.

    Autograd through a softmax rounds differently (where one key is seen it gives exact zeros), so it is the oracle in
    float64 and no yardstick in the dtype under test.
    """
    how = {"softmax_scale": softmax_scale, "causal": causal, "window": window, "softcap": softcap, "slopes": slopes}
    scale = q.size(-1) ** -0.5 if softmax_scale is None else softmax_scale
    group = q.size(1) // k.size(1)
    out, lse = varlen_attention(q, k, v, lengths_q, lengths_k, **how)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    start_q = start_k = 0
    for b, (sq, sk) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        rows, keys = slice(start_q, start_q + sq), slice(start_k, start_k + sk)
        start_q, start_k = start_q + sq, start_k + sk
        if sq == 0 or sk == 0:
            continue
        one_q, one_dout, one_out = (t[rows].transpose(0, 1) for t in (q, dout, out))
        one_k, one_v = (t[keys].repeat_interleave(group, 1).transpose(0, 1) for t in (k, v))
        score = one_q @ one_k.transpose(1, 2) * scale
        chain = torch.ones_like(score)
        if softcap > 0:
            chain = 1 - torch.tanh(score / softcap) ** 2
            score = softcap * torch.tanh(score / softcap)
        if slopes is not None:
            slope = (slopes if slopes.dim() == 1 else slopes[b]).to(score.dtype)
            distance = torch.arange(sq, device=q.device)[:, None] + (sk - sq) - torch.arange(sk, device=q.device)
            score = score - slope[:, None, None] * distance.abs().to(score.dtype)
        seen = visible(sq, sk, causal, window, q.device)
        p = torch.where(seen, torch.exp(score - lse[:, rows, None]), 0)
        delta = (one_dout * one_out).sum(-1)
        if dlse is not None:
            delta = delta - dlse[:, rows].to(delta.dtype)
        dscore = p * (one_dout @ one_v.transpose(1, 2) - delta[:, :, None]) * chain * scale
        dq[rows] = (dscore @ one_k).transpose(0, 1)
        for target, part in ((dk, dscore.transpose(1, 2) @ one_q), (dv, p.transpose(1, 2) @ one_dout)):
            target[keys] = part.unflatten(0, (-1, group)).sum(1).transpose(0, 1)
    return dq, dk, dv


@functools.cache
def log_bucket(distance: int, position_buckets: int, max_relative_positions: int) -> int:
    """The bucket of a distance >= 0, in integers: the c-th bucket past mid ends at mid * (m / mid)^(c / (mid - 1))."""
    mid, m = position_buckets // 2, max_relative_positions - 1
    if distance <= mid:
        return distance
    c = 0
    while mid > 1 and m**c * mid ** (mid - 1) < distance ** (mid - 1) * mid**c:
        c += 1
    return mid + c


def relative_index(rel: Tensor, span: int, position_buckets: int = 0, max_relative_positions: int = 512) -> Tensor:
    """Which relative embedding a distance of query minus key takes, in [0, 2 * span)."""
    if position_buckets > 0 and rel.numel() > 0:
        distances, inverse = rel.abs().unique(return_inverse=True)
        buckets = [log_bucket(d, position_buckets, max_relative_positions) for d in distances.tolist()]
        rel = rel.sign() * torch.tensor(buckets, device=rel.device)[inverse]
    return (rel + span).clamp(0, 2 * span - 1)


def disentangled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_key: Tensor | None,
    pos_query: Tensor | None,
    lengths: list[int],
    *,
    positions: Tensor | None = None,
    softmax_scale: float | None = None,
    position_buckets: int = 0,
    max_relative_positions: int = 512,
) -> tuple[Tensor, Tensor]:
    """out [T, H, D] and lse [H, T], one sequence after another."""
    outs, lses, start = [], [], 0
    for length in lengths:
        rows = slice(start, start + length)
        start += length
        if length == 0:
            continue
        index = _relative_index_of(positions, rows, pos_key, pos_query, position_buckets, max_relative_positions)
        score = _disentangled_score(q[rows], k[rows], pos_key, pos_query, index, softmax_scale)
        lses.append(torch.logsumexp(score, -1))
        outs.append((torch.softmax(score, -1) @ v[rows].transpose(0, 1)).transpose(0, 1))
    rest = q.size(0) - start
    outs.append(q.new_zeros(rest, *q.shape[1:]))
    lses.append(q.new_full((q.size(1), rest), -math.inf))
    return torch.cat(outs), torch.cat(lses, 1)


def _relative_index_of(
    positions: Tensor | None,
    rows: slice,
    pos_key: Tensor | None,
    pos_query: Tensor | None,
    position_buckets: int,
    max_relative_positions: int,
) -> Tensor | None:
    """[s, s] of a sequence; None where no term asks for it."""
    table = pos_key if pos_key is not None else pos_query
    if table is None:
        return None
    at = torch.arange(rows.stop - rows.start, device=table.device) if positions is None else positions[rows]
    return relative_index(at[:, None] - at[None, :], table.size(0) // 2, position_buckets, max_relative_positions)


def _disentangled_score(
    q: Tensor, k: Tensor, pos_key: Tensor | None, pos_query: Tensor | None, index: Tensor | None, scale: float | None
) -> Tensor:
    """[H, s, s] of one sequence."""
    terms = 1 + (pos_key is not None) + (pos_query is not None)
    scale = (q.size(-1) * terms) ** -0.5 if scale is None else scale
    q, k = q.transpose(0, 1), k.transpose(0, 1)
    score = q @ k.transpose(1, 2)
    if pos_key is not None and index is not None:
        c2p = q @ pos_key.permute(1, 2, 0)  # [H, query, 2 * span]
        score = score + c2p.gather(2, index.expand(q.size(0), -1, -1))
    if pos_query is not None and index is not None:
        p2c = k @ pos_query.permute(1, 2, 0)  # [H, key, 2 * span]
        score = score + p2c.gather(2, index.T.expand(q.size(0), -1, -1)).transpose(1, 2)
    return score * scale


def disentangled_attention_gradients(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_key: Tensor | None,
    pos_query: Tensor | None,
    lengths: list[int],
    *,
    positions: Tensor | None = None,
    softmax_scale: float | None = None,
    position_buckets: int = 0,
    max_relative_positions: int = 512,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """dq, dk, dv, dpos_key, dpos_query written out, eagerly in the dtype of q, as varlen_attention_gradients does."""
    how = {"position_buckets": position_buckets, "max_relative_positions": max_relative_positions}
    out, lse = disentangled_attention(
        q, k, v, pos_key, pos_query, lengths, positions=positions, softmax_scale=softmax_scale, **how
    )
    terms = 1 + (pos_key is not None) + (pos_query is not None)
    scale = (q.size(-1) * terms) ** -0.5 if softmax_scale is None else softmax_scale
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    dpos_key, dpos_query = (None if t is None else torch.zeros_like(t) for t in (pos_key, pos_query))
    start = 0
    for length in lengths:
        rows = slice(start, start + length)
        start += length
        if length == 0:
            continue
        index = _relative_index_of(positions, rows, pos_key, pos_query, **how)
        score = _disentangled_score(q[rows], k[rows], pos_key, pos_query, index, softmax_scale)
        one_q, one_k, one_v, one_out, one_dout = (t[rows].transpose(0, 1) for t in (q, k, v, out, dout))
        p = torch.exp(score - lse[:, rows, None])
        delta = (one_dout * one_out).sum(-1)
        dscore = p * (one_dout @ one_v.transpose(1, 2) - delta[:, :, None]) * scale
        dq[rows] += (dscore @ one_k).transpose(0, 1)
        dk[rows] += (dscore.transpose(1, 2) @ one_q).transpose(0, 1)
        dv[rows] += (p.transpose(1, 2) @ one_dout).transpose(0, 1)
        for table, dtable, own, down, along, at in (
            (pos_key, dpos_key, one_q, dq, dscore, index),
            (pos_query, dpos_query, one_k, dk, dscore.transpose(1, 2), None if index is None else index.T),
        ):
            if table is None or dtable is None or at is None:
                continue
            dterm = table.new_zeros(along.size(0), length, table.size(0))  # [H, s, 2 * span]
            dterm.scatter_add_(2, at.expand(along.size(0), -1, -1), along)
            down[rows] += (dterm @ table.transpose(0, 1)).transpose(0, 1)
            dtable += (dterm.transpose(1, 2) @ own).transpose(0, 1)
    return dq, dk, dv, dpos_key, dpos_query


def unit_rows(x: Tensor) -> Tensor:
    """x over the norm of its last dimension; rows of norm at most 1e-12 become 0 and have gradient 0."""
    square = (x * x).sum(-1, keepdim=True)
    zero = square <= 1e-24
    return torch.where(zero, 0, x / torch.where(zero, 1, square).sqrt())


def window_attention(
    qkv: Tensor,
    table: Tensor | None,
    logit_scale: Tensor | None,
    qkv_bias: Tensor | None,
    *,
    window_size: list[int],
    shift_size: list[int],
    scale: float | None = None,
    mask_value: float = -100.0,
) -> tuple[Tensor, Tensor]:
    """out [B, *grid, heads * d] and lse [B, windows, heads, N]: pad, roll, partition, attend, and all of it back.

    logit_scale may also be one for every score, [B, windows, heads, N, N]: its gradient is what the op's adds up.
    """
    axes = len(window_size)
    batch, grid, heads, d = qkv.size(0), list(qkv.shape[1 : 1 + axes]), qkv.size(-2), qkv.size(-1)
    padded = [-(-n // w) * w for n, w in zip(grid, window_size, strict=True)]
    counts = [n // w for n, w in zip(padded, window_size, strict=True)]
    tokens, windows = math.prod(window_size), math.prod(counts)
    dims = list(range(1, 1 + axes))
    back = [-s for s in shift_size]

    x = qkv
    for axis, (n, p) in enumerate(zip(grid, padded, strict=True), start=1):
        shape = list(x.shape)
        shape[axis] = p - n
        filler = x.new_zeros(3, heads, d) if qkv_bias is None else qkv_bias.to(x.dtype)
        x = torch.cat([x, filler.expand(shape)], axis)
    x = x.roll(back, dims)

    def partition(t: Tensor) -> Tensor:
        """[b, *padded, ...] -> [b, windows, N, ...]."""
        rest = t.shape[1 + axes :]
        t = t.reshape(t.size(0), *(e for c, w in zip(counts, window_size, strict=True) for e in (c, w)), *rest)
        order = [0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), *range(2 * axes + 1, t.dim())]
        return t.permute(order).reshape(t.size(0), windows, tokens, *rest)

    q, k, v = partition(x).movedim((3, 4), (0, 3)).unbind(0)  # [B, windows, heads, N, d]
    if logit_scale is None:
        score = q @ k.mT * (d**-0.5 if scale is None else scale)
    else:
        factor = logit_scale.clamp(max=math.log(100.0)).exp().to(q.dtype)
        score = unit_rows(q) @ unit_rows(k).mT * (factor[:, None, None] if factor.dim() == 1 else factor)
    if table is not None:
        places = torch.cartesian_prod(*(torch.arange(w, device=qkv.device) for w in window_size)).view(tokens, axes)
        index = torch.zeros(tokens, tokens, dtype=torch.int64, device=qkv.device)
        for axis, w in enumerate(window_size):
            index = index * (2 * w - 1) + places[:, None, axis] - places[None, :, axis] + w - 1
        bias = table.to(q.dtype)[index.flatten()].view(tokens, tokens, heads)
        score = score + bias.permute(2, 0, 1)
    region = torch.zeros(1, *[1] * axes, 1, dtype=torch.int64, device=qkv.device)
    for axis, (p, w, s) in enumerate(zip(padded, window_size, shift_size, strict=True)):
        place = torch.arange(p, device=qkv.device)
        of_axis = (place >= p - w).long() + (place >= p - s).long() if s else torch.zeros_like(place)
        region = 3 * region + of_axis.view([1, *(-1 if i == axis else 1 for i in range(axes)), 1])
    region = partition(region.expand(1, *padded, 1))[0, :, :, 0]  # [windows, N]
    apart = region[:, :, None] != region[:, None, :]
    score = score.where(~apart[:, None], score + mask_value)

    hidden = (score == -math.inf).all(-1, keepdim=True)  # rows that see no key
    score = score.masked_fill(hidden, 0)
    out = torch.softmax(score, -1).masked_fill(hidden, 0) @ v  # [B, windows, heads, N, d]
    out = out.transpose(2, 3).reshape(batch, *counts, *window_size, heads * d)
    order = [0, *(e for i in range(axes) for e in (1 + i, 1 + axes + i)), 1 + 2 * axes]
    out = out.permute(order).reshape(batch, *padded, heads * d).roll(shift_size, dims)
    for axis, n in enumerate(grid, start=1):
        out = out.narrow(axis, 0, n)
    return out, torch.logsumexp(score, -1).masked_fill(hidden.squeeze(-1), -math.inf)


def add_bias_residual_layer_norm(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, weight: Tensor, ln_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """out and sum."""
    total = x
    if bias is not None:
        total = total + bias.to(x.dtype)
    if residual is not None:
        total = total + residual
    centred = total - total.mean(-1, keepdim=True)
    variance = (centred * centred).mean(-1, keepdim=True)
    return centred / torch.sqrt(variance + eps) * weight.to(x.dtype) + ln_bias.to(x.dtype), total


def add_residual_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """out and sum."""
    total = x if residual is None else x + residual
    length = torch.sqrt((total * total).mean(-1, keepdim=True) + eps)
    return total / length * weight.to(x.dtype), total


def rms_norm_gelu(x: Tensor, scale: float | None, eps: float, approximate: str) -> Tensor:
    """GELU of each row divided by its length and times `scale`."""
    tau = math.sqrt(x.size(-1)) if scale is None else scale
    length = torch.sqrt((x * x).sum(-1, keepdim=True) + eps)
    return bias_gelu(x / length * tau, None, approximate)


def bias_gelu(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """GELU of x + bias."""
    s = x if bias is None else x + bias.to(x.dtype)
    if approximate == "none":
        return s * 0.5 * (1 + torch.erf(s * 2**-0.5))
    return s * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (s + 0.044715 * s**3)))
