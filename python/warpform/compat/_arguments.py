"""Arguments as callers of other libraries pass them: numpy scalars, tensors of one element, lists and arrays of two."""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import Tensor

from ..ops import _check

Window = tuple[int, int]


def integer(op: str, name: str, value: Any) -> int:
    """value as an int: an int, a numpy integer, or an integer tensor or array of one element.

    A tensor on a GPU is read, which waits for the device.

    Raises:
        TypeError: anything else, a float that happens to be whole too.
    """
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return cast("int", value)
    if isinstance(value, Tensor):
        real = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
        if real and value.numel() == 1:
            return int(value.item())
    elif not isinstance(value, bool):
        one = _of_one_element(value)
        try:
            return operator.index(one)
        except TypeError:
            pass
    raise TypeError(f"{op}: {name} must be an int, got {_check.describe(value)}")


def number(op: str, name: str, value: Any) -> float:
    """value as a float: a number, a numpy number, or a tensor or array of one real element, which has no gradient.

    Raises:
        TypeError: anything else.
        ValueError: a tensor that requires a gradient, while gradients are recorded.
    """
    if isinstance(value, (float, int, torch.SymFloat, torch.SymInt)) and not isinstance(value, bool):
        return cast("float", value)
    if isinstance(value, Tensor):
        if value.numel() == 1 and not value.is_complex() and value.dtype != torch.bool:
            if value.requires_grad and torch.is_grad_enabled():
                raise ValueError(f"{op}: {name} has no gradient; pass {name}.detach()")
            return float(value.item())
    elif not isinstance(value, (bool, str, bytes)):
        one = _of_one_element(value)
        if getattr(getattr(one, "dtype", None), "kind", "f") in "iuf":  # numpy's booleans and complex numbers are not
            try:
                return float(one)
            except TypeError:
                pass
    raise TypeError(f"{op}: {name} must be a number, got {_check.describe(value)}")


def flag(op: str, name: str, value: Any) -> bool:
    """value as a bool: a bool, a number, or a tensor or numpy array of one element."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str) or (isinstance(value, Tensor) and value.numel() != 1):
        raise TypeError(f"{op}: {name} must be a bool, got {_check.describe(value)}")
    return bool(value)


def window(op: str, value: Any) -> Window:
    """(left, right) of a tuple, list, tensor or array of two integers; every negative number becomes -1.

    None is unbounded on both sides.

    Raises:
        TypeError: not two integers.
    """
    if value is None:
        return -1, -1
    pair = value.tolist() if isinstance(value, Tensor) and not value.is_floating_point() and value.dim() == 1 else value
    if getattr(value, "shape", None) == (2,) and not isinstance(value, Tensor):
        pair = list(value)  # a numpy array
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"{op}: window_size must be (left, right), got {_check.describe(value)}")
    left, right = (integer(op, f"window_size[{side}]", bound) for side, bound in enumerate(pair))
    return (-1 if left < 0 else left), (-1 if right < 0 else right)


def _of_one_element(value: Any) -> Any:
    """The element of a numpy array of one element; other values as they are."""
    return value.reshape(-1)[0] if getattr(value, "size", None) == 1 and hasattr(value, "reshape") else value
