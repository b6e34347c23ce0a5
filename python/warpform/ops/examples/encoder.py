"""Examples of the padding-free encoder's ops, but for attention."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .._example import Call, Draw
from ..reference import encoder as reference


def _mask() -> torch.Tensor:
    """Padding at the right, none at all, everything, at the left, and holes."""
    mask = torch.arange(19) < torch.tensor([5, 19, 0, 19, 17])[:, None]
    mask[3, :4] = False
    mask[4, ::3] = False
    return mask


def packing_plan(draw: Draw) -> Iterator[Call]:
    """All tokens, and a capacity that drops some."""
    mask = _mask()
    yield Call("bool", (mask, mask.numel()))
    yield Call("int64, some dropped", (mask.long(), 21))


def pack(draw: Draw) -> Iterator[Call]:
    """Rows of whole 16-byte chunks, and of one element."""
    _, _, indices, _, ranks, _ = reference.packing_plan(_mask(), 70)
    for trailing in ((2, 16), (1,)):
        yield Call(f"rows of {list(trailing)}", (draw(*ranks.shape, *trailing), indices, ranks))


def unpack(draw: Draw) -> Iterator[Call]:
    """Yields the same examples as `pack`, in the other direction."""
    _, _, indices, _, ranks, _ = reference.packing_plan(_mask(), 70)
    for trailing in ((2, 16), (1,)):
        yield Call(f"rows of {list(trailing)}", (draw(len(indices), *trailing), indices, ranks))


def add_bias_residual_layer_norm(draw: Draw) -> Iterator[Call]:
    """Rows of one warp, of a block, of no vector; parameters of x's dtype and float32."""
    for label, width, dtype in (
        ("768", 768, draw.dtype),
        ("768 wide parameters", 768, draw.wide),
        ("77", 77, draw.dtype),
        ("5000", 5000, draw.dtype),
    ):
        x, residual = draw(37, width) + 1, draw(37, width)
        bias, weight, ln_bias = (draw(width, dtype=dtype) for _ in range(3))
        yield Call(label, (x, bias, residual, weight, ln_bias, 1e-5), {"return_sum": True})
    x, weight, ln_bias = draw(3, 5, 96), draw(96), draw(96)
    yield Call("96, x alone", (x, None, None, weight, ln_bias), {"return_sum": False})


def add_bias_residual_layer_norm_backward(draw: Draw) -> Iterator[Call]:
    """Every forward's that returns a sum, the first one with a gradient of the sum too."""
    for call in add_bias_residual_layer_norm(draw):
        if call.kwargs["return_sum"]:
            _, total, mean, rstd = reference.add_bias_residual_layer_norm(*call.args, **call.kwargs)
            weight = call.args[3]
            yield Call(call.label, (draw.like(total), None, total, weight, mean, rstd))
            if call.label == "768":
                yield Call("768, dsum", (draw.like(total), draw.like(total), total, weight, mean, rstd))


def bias_gelu(draw: Draw) -> Iterator[Call]:
    """Both forms; with a bias of x's dtype, one in float32, and none; rows of vectors and of no vector."""
    for label, width, dtype in (("256", 256, draw.dtype), ("256 wide bias", 256, draw.wide), ("77", 77, draw.dtype)):
        for approximate in ("none", "tanh"):
            yield Call(f"{label} {approximate}", (draw(37, width), draw(width, dtype=dtype), approximate))
    yield Call("without bias", (draw(3, 5, 40), None))


def bias_gelu_backward(draw: Draw) -> Iterator[Call]:
    """Every forward's."""
    for call in bias_gelu(draw):
        yield Call(call.label, (draw.like(call.args[0]), *call.args))
