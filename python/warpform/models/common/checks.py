"""Checks of the arguments of models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

# Arguments that heads hand on to the model below them, on which they have no effect.
_FOR_HEADS = ("num_items_in_batch",)


def refuse_arguments(model: str, arguments: Mapping[str, Any]) -> None:
    """Raises ValueError for an argument that is neither None nor False, unless only a head has a use for it."""
    for name, value in arguments.items():
        if value is not None and value is not False and name not in _FOR_HEADS:
            raise ValueError(f"{model}: {name} is not supported")


def check_shape(model: str, name: str, value: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raises ValueError where value is given and has another shape."""
    if value is not None and tuple(value.shape) != shape:
        raise ValueError(f"{model}: {name} must have shape {list(shape)}, got {list(value.shape)}")


def check_pixels(model: str, pixel_values: Tensor, channels: int, least: int = 1) -> None:
    """Raises ValueError where images are not [batch, channels, height, width] with at least `least` pixels a side."""
    shape = list(pixel_values.shape)
    if len(shape) != 4 or shape[1] != channels:
        raise ValueError(f"{model}: pixel_values must be of shape [batch, {channels}, height, width], got {shape}")
    if min(shape[2:]) < least:
        raise ValueError(f"{model}: pixel_values must have at least {least} pixels a side, got {shape}")
