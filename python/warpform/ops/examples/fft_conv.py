"""Examples of convolutions by their spectrum."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .._example import Call, Draw


def spectral_conv(draw: Draw) -> Iterator[Call]:
    """A short, a long and the longest transform; with every operand, and with none that may be left out."""
    for label, shape, points, rest in (
        ("300", (3, 2, 300), 1024, ("skip", "pregate", "postgate")),
        ("256 bare", (2, 3, 256), 512, ()),
        ("3000 postgate", (1, 2, 3000), 8192, ("postgate",)),
        ("17000 skip", (1, 1, 17000), 65536, ("skip",)),
    ):
        u = draw(*shape)
        taps = draw(shape[1], shape[2], dtype=draw.wide) * shape[2] ** -0.5
        spectrum = torch.view_as_real(torch.fft.rfft(taps, points))
        skip = draw(shape[1], dtype=draw.wide) if "skip" in rest else None
        pregate, postgate = (draw(*shape) if name in rest else None for name in ("pregate", "postgate"))
        yield Call(label, (u, spectrum, skip, pregate, postgate))


def spectral_conv_backward(draw: Draw) -> Iterator[Call]:
    """Every forward's."""
    for call in spectral_conv(draw):
        yield Call(call.label, (draw.like(call.args[0]), *call.args))
