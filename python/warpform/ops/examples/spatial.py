"""Examples of the stencils."""

from __future__ import annotations

from collections.abc import Iterator

from .._example import Call, Draw
from ..reference import spatial as reference


def pool_mixer(draw: Draw) -> Iterator[Call]:
    """Every window; parameters of x's dtype and in float32, with a layer scale and without; sizes that fill no tile."""
    for label, shape, dtype, pool_size in (
        ("3x3", (2, 19, 21, 72), draw.dtype, 3),
        ("3x3, wide parameters", (1, 9, 33, 64), draw.wide, 3),
        ("5x5", (2, 10, 18, 40), draw.dtype, 5),
        ("7x7, 13 channels", (1, 9, 11, 13), draw.dtype, 7),
    ):
        channels = shape[-1]
        parameters = draw(channels, dtype=dtype), draw(channels, dtype=dtype)
        yield Call(label, (draw(*shape), *parameters), {"pool_size": pool_size, "eps": 1e-5})
    yield Call("no scale", (draw(3, 7, 5, 16), draw(16), None), {"pool_size": 3, "eps": 0.1})


def pool_mixer_backward(draw: Draw) -> Iterator[Call]:
    """Every forward's."""
    for call in pool_mixer(draw):
        _, mean, rstd = reference.pool_mixer(*call.args, **call.kwargs)
        arguments = (draw.like(call.args[0]), *call.args, mean, rstd)
        yield Call(call.label, arguments, {"pool_size": call.kwargs["pool_size"]})


def depthwise_conv2d(draw: Draw) -> Iterator[Call]:
    """Every size and activation, with a bias and without; sizes that fill no tile."""
    for k, shape in ((3, (2, 19, 21, 72)), (5, (1, 9, 20, 40)), (7, (1, 10, 9, 13))):
        for activation in ("linear", "gelu", "relu"):
            channels = shape[-1]
            bias = None if activation == "linear" else draw(channels)
            arguments = (draw(*shape), draw(channels, k, k), bias)
            yield Call(f"{k}x{k} {activation}", arguments, {"activation": activation})


def depthwise_conv2d_backward(draw: Draw) -> Iterator[Call]:
    """Every forward's."""
    for call in depthwise_conv2d(draw):
        yield Call(call.label, (draw.like(call.args[0]), *call.args), call.kwargs)
