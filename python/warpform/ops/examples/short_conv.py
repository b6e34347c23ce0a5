"""Examples of the short convolution."""

from __future__ import annotations

from collections.abc import Iterator

from .._example import Call, Draw


def short_conv_gate(draw: Draw) -> Iterator[Call]:
    """Three taps with a bias, four without; channels that fill no tile."""
    yield Call("3 taps", (draw(2, 75, 3 * 40), draw(3 * 40, 3), draw(3 * 40)))
    yield Call("4 taps, no bias", (draw(1, 33, 3 * 13), draw(3 * 13, 4), None))


def short_conv_gate_backward(draw: Draw) -> Iterator[Call]:
    """Every forward's."""
    for call in short_conv_gate(draw):
        batch, length, channels = call.args[0].shape
        gradients = (draw(batch, channels // 3, length) for _ in range(2))
        yield Call(call.label, (*gradients, *call.args))
