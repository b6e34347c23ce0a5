"""Examples of RMSNorm, by itself and before GELU."""

from __future__ import annotations

from collections.abc import Iterator

from .._example import Call, Draw
from ..reference import norm as reference


def add_residual_rms_norm(draw: Draw) -> Iterator[Call]:
    """Rows of one warp, of a block, of no vector; a weight of x's dtype and in float32."""
    for label, width, dtype in (
        ("768", 768, draw.dtype),
        ("768 wide weight", 768, draw.wide),
        ("77", 77, draw.dtype),
        ("5000", 5000, draw.dtype),
    ):
        x, residual, weight = draw(37, width), draw(37, width), draw(width, dtype=dtype)
        yield Call(label, (x, residual, weight, 1e-6), {"return_sum": True})
    yield Call("96, x alone", (draw(3, 5, 96), None, draw(96)), {"return_sum": False})


def add_residual_rms_norm_backward(draw: Draw) -> Iterator[Call]:
    """Every forward's that returns a sum, the first one with a gradient of the sum too."""
    for call in add_residual_rms_norm(draw):
        if call.kwargs["return_sum"]:
            _, total, rstd = reference.add_residual_rms_norm(*call.args, **call.kwargs)
            weight = call.args[2]
            yield Call(call.label, (draw.like(total), None, total, weight, rstd))
            if call.label == "768":
                yield Call("768, dsum", (draw.like(total), draw.like(total), total, weight, rstd))


def rms_norm_gelu(draw: Draw) -> Iterator[Call]:
    """Both forms; rows of one warp, of a block, of no vector; the default and another scale."""
    for width in (768, 77, 5000):
        for approximate in ("none", "tanh"):
            yield Call(f"{width} {approximate}", (draw(37, width), None, 0.0, approximate))
    yield Call("scale and eps", (draw(3, 5, 96), 4.0, 0.5, "none"))


def rms_norm_gelu_backward(draw: Draw) -> Iterator[Call]:
    """Every forward's."""
    for call in rms_norm_gelu(draw):
        yield Call(call.label, (draw.like(call.args[0]), *call.args))
