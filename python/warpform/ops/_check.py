"""Checks of arguments, all with messages of one form: `op: argument must be this, got that`."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from .. import _env
from .._torch_private import is_fake

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_logger = logging.getLogger("warpform")


def describe(value: Any) -> str:
    """Describes an argument in an error message, a tensor as `int64 of shape [5]`."""
    if isinstance(value, Tensor):
        return f"{dtype_name(value.dtype)} of shape {list(value.shape)}"
    return f"{value!r} ({type(value).__name__})"


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` rather than `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def tensor(op: str, name: str, value: Any) -> None:
    """Raises TypeError unless value is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {describe(value)}")


def floating(op: str, name: str, value: Tensor) -> None:
    """Raises TypeError unless value has one of the floating-point dtypes that the ops take."""
    if value.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} must be float16, bfloat16, float32 or float64, got {describe(value)}")


def same_device(op: str, name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    """Raises ValueError unless both tensors are on one device."""
    if value.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device} as {like_name} is, got {value.device}")


def cu_seqlens(op: str, name: str, value: Any, q: Tensor) -> None:
    """Raises unless value is what offsets of sequences have to be, as far as can be seen without reading them."""
    tensor(op, name, value)
    if value.dtype != torch.int32 or value.dim() != 1 or value.size(0) == 0:
        raise (TypeError if value.dtype != torch.int32 else ValueError)(
            f"{op}: {name} must be int32 of shape [batch + 1], got {describe(value)}"
        )
    same_device(op, name, value, "q", q)


def integer(op: str, name: str, value: Any) -> None:
    """Raises TypeError unless value is an integer, which under tracing may be symbolic."""
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be an int, got {describe(value)}")


def window(op: str, window_size: Any) -> tuple[int, int]:
    """The two numbers of a window. Raises TypeError unless there are two."""
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise TypeError(f"{op}: window_size must be (left, right), got {describe(window_size)}")
    for index, number in enumerate(window_size):
        integer(op, f"window_size[{index}]", number)
    return window_size[0], window_size[1]


def per_axis(op: str, name: str, value: Any, axes: int) -> list[int]:
    """One int for each axis, of one for all axes or of one for each. Raises TypeError unless they are ints."""
    values: list[Any] = list(value) if isinstance(value, (tuple, list)) else [value] * axes
    for one in values:
        integer(op, name, one)
    return values


def has_values(t: Tensor) -> bool:
    """Tells whether a tensor has values. A tensor on the meta device has none, nor a fake one outside of a compiler.

    A compiler's fake tensors give symbols.
    """
    return t.device.type != "meta" and (torch.compiler.is_compiling() or not is_fake(t))


def cheap_to_read(t: Tensor) -> bool:
    """Tells whether a check may read values: it costs no synchronisation, or the user asked for it."""
    if torch.compiler.is_compiling() or not (t.device.type == "cpu" or _env.validate()):
        return False
    return has_values(t)


def log(op: str, **arguments: Any) -> None:
    """With WARPFORM_LOG=debug, logs the op and its arguments before it is launched."""
    if torch.compiler.is_compiling() or not _env.log_debug():
        return
    if not _logger.isEnabledFor(logging.DEBUG):
        # Asking through the environment is enough to see it; a program that configured logging keeps its handlers.
        _logger.setLevel(logging.DEBUG)
        if not _logger.hasHandlers():
            _logger.addHandler(logging.StreamHandler())
    shown = ", ".join(f"{name}={_shown(value)}" for name, value in arguments.items())
    _logger.debug("%s(%s)", op, shown)


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{dtype_name(value.dtype)}{list(value.shape)}@{value.device}"
    return repr(value)
