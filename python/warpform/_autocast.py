"""Autocast of a tensor's device. torch has none for the meta device, and raises where it is asked."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch


def enabled(device: torch.device) -> bool:
    """Tells whether autocast is on for a device. It never is on the meta device."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def off(device: torch.device) -> AbstractContextManager[object]:
    """A context in which autocast is off for a device."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
