"""Attention where each token sees one run of keys, for masks that are neither causal nor windows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_in_ranges(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    ranges: Tensor,
    softmax_scale: float | None = None,
) -> Tensor:
    """Attention of packed sequences in which query i sees the keys ranges[i, 0] to ranges[i, 1] - 1 of its sequence.

    It is torch's fused attention with a mask, sequence by sequence, and reads the offsets from the device.

    Args:
        query: [Tq, Hq, D].
        key, value: [Tk, Hkv, D].
        cu_seqlens_q, cu_seqlens_k: int32 [B + 1].
        ranges: integer [Tq, 2], counted from the first key of the sequence.
        softmax_scale: None: D ** -0.5.

    Returns:
        [Tq, Hq, D], 0 for a query that sees no key.

    Raises:
        ValueError: ranges of another shape.
    """
    if ranges.shape != (query.size(0), 2):
        raise ValueError(f"key_ranges must be of shape [{query.size(0)}, 2], got {list(ranges.shape)}")
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    out = []
    for i in range(len(starts_q) - 1):
        rows, keys = slice(*starts_q[i : i + 2]), slice(*starts_k[i : i + 2])
        if rows.start == rows.stop:
            continue
        q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (query[rows], key[keys], value[keys]))
        places = torch.arange(k.size(2), device=query.device)
        first, last = ranges[rows].unsqueeze(2).unbind(1)
        mask = (places >= first) & (places < last)
        found = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=softmax_scale, enable_gqa=q.size(1) != k.size(1)
        )
        found = found.squeeze(0).transpose(0, 1)
        out.append(found.masked_fill(~mask.any(1)[:, None, None], 0))
    out.append(query.new_zeros(query.size(0) - starts_q[-1], query.size(1), value.size(2)))
    return torch.cat(out)
