"""Torch's functions of images on grids whose channels come last, [batch, height, width, channels]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ._product import is_plain


def channels_first(x: Tensor) -> Tensor:
    """x [batch, height, width, channels] as torch's convolutions and BatchNorm take it, without a copy."""
    return x.permute(0, 3, 1, 2)


def channels_last(x: Tensor) -> Tensor:
    """The opposite of `channels_first`; without a copy where x is in torch's channels_last format."""
    return x.permute(0, 2, 3, 1).contiguous()


def convolve(x: Tensor, convolution: nn.Module) -> Tensor:
    """convolution(x) with channels last: x [batch, height, width, in], returns [batch, rows, columns, out]."""
    # Where channels are the last in memory, torch convolves so and copies nothing.
    return channels_last(convolution(channels_first(x.contiguous())))


def depthwise(x: Tensor, conv: nn.Module, activation: str = "linear") -> Tensor:
    """activation(conv(x)) for a depthwise `nn.Conv2d` that keeps the size of the grid, by `ops.depthwise_conv2d`.

    Args:
        x: [batch, height, width, channels].
        conv: the convolution. A module that takes its place, such as an adapter, is called.
        activation: "linear", "gelu" (by erf) or "relu".
    """
    if is_plain(conv, nn.Conv2d):
        plain = cast("nn.Conv2d", conv)
        return ops.depthwise_conv2d(x, plain.weight.squeeze(1), plain.bias, activation=activation)
    out = convolve(x, conv)
    if activation == "gelu":
        return ops.bias_gelu(out, None)
    return F.relu(out) if activation == "relu" else out


def resize(x: Tensor, size: Sequence[int], *, antialias: bool = False) -> Tensor:
    """x [batch, height, width, channels], bilinearly and with corners not aligned: [batch, *size, channels].

    Args:
        x: the grid. It is returned where it has this size.
        size: height and width.
        antialias: whether x is smoothed where it shrinks.
    """
    if tuple(x.shape[1:3]) == tuple(size):
        return x
    how = {"mode": "bilinear", "align_corners": False, "antialias": antialias}
    return channels_last(F.interpolate(channels_first(x), tuple(size), **how))  # type: ignore[arg-type]
