"""Examples of mixing the tokens of windows by a matrix."""

from __future__ import annotations

import math
from collections.abc import Iterator

from .._example import Call, Draw
from ..reference import window_mix as reference


def window_mix(draw: Draw) -> Iterator[Call]:
    """Blocks and grids; n of several tiles, of one, of no whole number of them; with and without norm and gate."""
    modes: tuple[tuple[str, tuple[int, int], tuple[int, int], int, bool, bool], ...] = (
        ("16x16", (32, 16), (16, 16), 32, False, True),
        ("16x16 dilated", (16, 32), (16, 16), 72, True, True),
        ("8x8", (16, 24), (8, 8), 128, False, True),
        ("8x8 dilated, bare", (24, 8), (8, 8), 64, True, False),
        ("3x5", (6, 20), (3, 5), 24, False, False),
        ("3x5 dilated, 7 channels", (9, 10), (3, 5), 7, True, True),
    )
    for label, grid, window, channels, dilated, gated in modes:
        n = math.prod(window)
        both = draw(2, *grid, 2 * channels)
        gate, x = both.split(channels, -1)
        norm = (draw(channels, dtype=draw.wide), draw(channels, dtype=draw.wide)) if gated else (None, None)
        bias = draw(n) if gated else None
        # Rows of unit length, so that a sum over many tokens is of the size of one.
        weight = draw(n, n) * n**-0.5
        yield Call(
            label,
            (x, weight, bias, *norm, gate if gated else None, list(window)),
            {"dilated": dilated, "eps": 1e-6} if gated else {"dilated": dilated},
        )
    yield Call(
        "norm without bias, no gate",
        (draw(1, 8, 8, 16), draw(16, 16) * 0.25, draw(16), draw(16), None, None, [4, 4]),
        {"dilated": False, "eps": 1e-3},
    )


def window_mix_backward(draw: Draw) -> Iterator[Call]:
    """Every forward's."""
    for call in window_mix(draw):
        out, mean, rstd = reference.window_mix(*call.args, **call.kwargs)
        *tensors, window = call.args
        yield Call(call.label, (draw.like(out), *tensors, mean, rstd, window), {"dilated": call.kwargs["dilated"]})
