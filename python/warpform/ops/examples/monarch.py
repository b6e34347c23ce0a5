"""Examples of products with block-diagonal and Monarch matrices."""

from __future__ import annotations

from collections.abc import Iterator

from .._example import Call, Draw


def blockdiag_multiply(draw: Draw) -> Iterator[Call]:
    """More rows than a tile, blocks of no whole tile; with and without a bias."""
    for label, rows, (blocks, out, width), biased in (
        ("bias", (3, 50), (4, 40, 24), True),
        ("wide", (70,), (2, 136, 200), False),
    ):
        scale = width**-0.5
        bias = draw(blocks * out) if biased else None
        yield Call(label, (draw(*rows, blocks * width), draw(blocks, out, width) * scale, bias))


def blockdiag_multiply_backward(draw: Draw) -> Iterator[Call]:
    """Every forward's."""
    for call in blockdiag_multiply(draw):
        x, w, bias = call.args
        dout = draw(*x.shape[:-1], w.size(0) * w.size(1))
        yield Call(call.label, (dout, x, w, bias is not None))


def monarch_multiply(draw: Draw) -> Iterator[Call]:
    """In one pass, and, where the product of the first factor is too wide for it, in two."""
    for label, rows, (k, q, p), (m, s, r) in (
        ("one pass", (3, 50), (4, 16, 24), (8, 40, 8)),
        ("two passes", (20,), (4, 1024, 8), (8, 8, 512)),
    ):
        yield Call(label, (draw(*rows, k * p), draw(k, q, p) * p**-0.5, draw(m, s, r) * r**-0.5))


def monarch_multiply_backward(draw: Draw) -> Iterator[Call]:
    """Every forward's."""
    for call in monarch_multiply(draw):
        x, w1, w2 = call.args
        yield Call(call.label, (draw(*x.shape[:-1], w2.size(0) * w2.size(1)), x, w1, w2))


def blockdiag_glu(draw: Draw) -> Iterator[Call]:
    """In one pass, and, where the two factors have other numbers of blocks, in three."""
    for label, (up, inner, width), (down, out), biased in (
        ("one pass", (2, 64, 24), (2, 24), True),
        ("three passes", (2, 64, 24), (4, 16), False),
    ):
        x, w_up = draw(3, 50, up * width), draw(up, 2 * inner, width) * width**-0.5
        w_down = draw(down, out, up * inner // down) * inner**-0.5
        yield Call(label, (x, w_up, w_down, draw(down * out) if biased else None))


def blockdiag_glu_backward(draw: Draw) -> Iterator[Call]:
    """Every forward's."""
    for call in blockdiag_glu(draw):
        x, w_up, w_down, bias = call.args
        yield Call(
            call.label, (draw(*x.shape[:-1], w_down.size(0) * w_down.size(1)), x, w_up, w_down, bias is not None)
        )
