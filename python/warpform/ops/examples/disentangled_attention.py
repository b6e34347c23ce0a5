"""Examples of DeBERTa's attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .._example import Call, Draw, offsets
from ..reference import disentangled_attention as reference

LENGTHS = (5, 0, 70, 1)


def disentangled_attention(draw: Draw) -> Iterator[Call]:
    """Both buckets of head_dim; both tables, one of them, and none."""
    positions = torch.cat([torch.arange(length) * 2 for length in LENGTHS])
    modes: tuple[tuple[str, int, bool, bool, dict[str, Any]], ...] = (
        ("d64", 64, True, True, {}),
        ("d128 buckets", 128, True, True, {"position_buckets": 16, "max_relative_positions": 40}),
        ("d32 without pos_query", 32, True, False, {"positions": positions}),
        ("d64 without pos_key", 64, False, True, {"softmax_scale": 0.1}),
        ("d64 without tables", 64, False, False, {}),
    )
    for label, head_dim, with_key, with_query, how in modes:
        q, k, v = (draw(sum(LENGTHS), 2, head_dim) for _ in range(3))
        pos_key, pos_query = (draw(32, 2, head_dim) if given else None for given in (with_key, with_query))
        yield Call(label, (q, k, v, pos_key, pos_query, offsets(LENGTHS), max(LENGTHS)), how)


def disentangled_attention_backward(draw: Draw) -> Iterator[Call]:
    """Every forward's."""
    for call in disentangled_attention(draw):
        out, lse = reference.disentangled_attention(*call.args, **call.kwargs)
        *tensors, cu_seqlens, max_seqlen = call.args
        yield Call(call.label, (draw.like(out), *tensors, out, lse, cu_seqlens, max_seqlen), call.kwargs)
