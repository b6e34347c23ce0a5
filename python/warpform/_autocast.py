"""Autocast of a tensor's device. torch has none for the meta device, and raises where it is asked."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor


def enabled(device: torch.device) -> bool:
    """Tells whether autocast is on for a device. It never is on the meta device."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def off(device: torch.device) -> AbstractContextManager[object]:
    """A context in which autocast is off for a device."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def beside_cast(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    """A parameter that autocast leaves alone: in float32 where it has a dtype that x loses by the cast."""
    if not isinstance(parameter, Tensor) or parameter.dtype != x.dtype or not x.is_floating_point():
        return parameter
    return parameter if x.dtype == torch.get_autocast_dtype(x.device.type) else parameter.float()
