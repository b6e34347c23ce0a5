"""The ops' definitions once more, straight from the formulas and apart from warpform.ops.reference.

Everything here is differentiable and computes in the dtype of its inputs: in float64 it is the truth, in the dtype
under test it is the eager computation whose error is the yardstick (see compare.py).
"""

from __future__ import annotations

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


def bias_gelu(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """GELU of x + bias."""
    s = x if bias is None else x + bias.to(x.dtype)
    if approximate == "none":
        return s * 0.5 * (1 + torch.erf(s * 2**-0.5))
    return s * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (s + 0.044715 * s**3)))
