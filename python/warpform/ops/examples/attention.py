"""Examples of varlen attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .._example import Call, Draw, offsets
from ..reference import attention as reference

LENGTHS_Q = (5, 0, 131, 1, 70)
LENGTHS_K = (9, 3, 131, 0, 66)
_ROWS_PAST_THE_END = 2


def varlen_attention(draw: Draw) -> Iterator[Call]:
    """Each bucket of head_dim and each mode once; sequences of no token, of one, and of more than a tile."""
    modes: tuple[tuple[str, int, int, dict[str, Any]], ...] = (
        ("d32", 32, 2, {}),
        ("d64 causal, grouped heads", 64, 1, {"causal": True}),
        ("d96 window", 96, 2, {"window_size_left": 20, "window_size_right": 9}),
        ("d128 causal", 128, 1, {"causal": True, "softmax_scale": 0.1}),
        ("d64 softcap, slopes", 64, 2, {"softcap": 3.0, "alibi_slopes": draw(2, dtype=draw.wide).abs()}),
        ("d128 deterministic", 128, 2, {"deterministic": True}),
        ("d256", 256, 1, {"causal": True}),
    )
    for label, head_dim, kv_heads, how in modes:
        q = draw(sum(LENGTHS_Q) + _ROWS_PAST_THE_END, 2, head_dim)
        k, v = (draw(sum(LENGTHS_K), kv_heads, head_dim) for _ in range(2))
        where = offsets(LENGTHS_Q), offsets(LENGTHS_K), max(LENGTHS_Q), max(LENGTHS_K)
        yield Call(label, (q, k, v, *where), how)


def varlen_attention_backward(draw: Draw) -> Iterator[Call]:
    """Every forward's, the plain one with a gradient of lse too."""
    for call in varlen_attention(draw):
        out, lse = reference.varlen_attention(*call.args, **call.kwargs)
        q, k, v, *where = call.args
        yield Call(call.label, (draw.like(out), None, q, k, v, out, lse, *where), call.kwargs)
        if call.label == "d32":
            with_dlse = draw.like(out), draw.like(lse), q, k, v, out, lse, *where
            yield Call("d32, dlse", with_dlse, call.kwargs)
