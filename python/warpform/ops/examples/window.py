"""Examples of attention inside windows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .._example import Call, Draw
from ..reference import window as reference


def window_attention(draw: Draw) -> Iterator[Call]:
    """Windows up to 64 tokens and above, of an image and of a volume, with a bias table, padding and cosines."""
    modes: tuple[tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...], int, bool], ...] = (
        ("7x7, d32", (9, 15), (7, 7), (3, 3), 32, False),
        ("8x8 cosine, d32", (8, 17), (8, 8), (4, 4), 32, True),
        ("9x10, d64", (9, 21), (9, 10), (4, 3), 64, False),
        ("12x12 cosine, d32", (12, 13), (12, 12), (6, 6), 32, True),
        ("2x4x4, d128", (3, 5, 4), (2, 4, 4), (1, 2, 0), 128, False),
    )
    for label, grid, window, shift, head_dim, cosine in modes:
        heads = 2
        qkv = draw(2, *grid, 3, heads, head_dim)
        table = draw(math.prod(2 * w - 1 for w in window), heads, dtype=draw.wide)
        logit_scale: Tensor | None = torch.tensor([1.5, 3.0], dtype=draw.wide) if cosine else None
        how: dict[str, Any] = {"mask_value": -200.0} if cosine else {}
        yield Call(label, (qkv, table, logit_scale, draw(3, heads, head_dim), list(window), list(shift)), how)
    yield Call("1x1, bare", (draw(2, 3, 4, 3, 2, 16), None, None, None, [1, 1], [0, 0]))


def window_attention_backward(draw: Draw) -> Iterator[Call]:
    """Every forward's."""
    for call in window_attention(draw):
        out, lse = reference.window_attention(*call.args, **call.kwargs)
        *tensors, window, shift = call.args
        # Part of it is out itself: of another one the terms of the logit scale's gradient, one sum over all scores,
        # would cancel, and leave little but their rounding.
        dout = draw.like(out) + out
        yield Call(call.label, (dout, *tensors, out, lse, window, shift), call.kwargs)
