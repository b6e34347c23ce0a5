"""Errors of ops as Python's exceptions. The checks are in C++ (csrc/torch); torch loses the type of what they throw."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ._check import describe

_TYPES: dict[str, type[Exception]] = {"TypeError": TypeError, "ValueError": ValueError}


def explained(op: Any, args: Sequence[Any], kwargs: dict[str, Any], error: Exception) -> Exception | None:
    """The exception to raise instead of `error`, which a call of `op` raised; None where that is good as it is."""
    kind, _, text = torch.ops.warpform._last_error().partition(" ")
    if not text or text not in str(error):
        return _wrong_type(op, args, kwargs)
    # The binding was reached, so torch took the types, but for None in place of a tensor.
    if kind in _TYPES:
        same = type(error) is _TYPES[kind] and str(error) == text
        return None if same else _TYPES[kind](text)
    missing = [argument for argument, value in _bound(op._schema, args, kwargs) if value is None]
    return _wrong_type(op, args, kwargs) if any(str(argument.type) == "Tensor" for argument in missing) else None


def _wrong_type(op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> TypeError | None:
    """What torch says of an argument of a wrong type names the op in C++'s words; these are ours."""
    for argument, value in _bound(op._schema, args, kwargs):
        wanted = str(argument.type)
        optional = wanted.startswith("Optional")
        if value is None and optional:
            continue
        for kind, fits, words in _KINDS:
            if kind in wanted:
                if not fits(value):
                    return TypeError(f"{op._opname}: {argument.name} must be {words}, got {describe(value)}")
                break
    return None


def _is_int(value: Any) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool)


# The type in a schema, what fits it, and how an error calls that. The first that the type's text holds counts.
_KINDS: tuple[tuple[str, Any, str], ...] = (
    ("List[int]", lambda value: isinstance(value, (list, tuple)) and all(map(_is_int, value)), "integers"),
    ("Tensor", lambda value: isinstance(value, Tensor), "a tensor"),
    ("int", _is_int, "an int"),
    ("float", _is_number, "a number"),
    ("bool", lambda value: isinstance(value, bool), "a bool"),
    ("str", lambda value: isinstance(value, str), "a string"),
)


def check_devices(name: str, schema: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Raises ValueError unless all tensors are on one device: where tensors have no values no binding looks at them."""
    first: tuple[str, torch.device] | None = None
    for argument, value in _bound(schema, args, kwargs):
        if not isinstance(value, Tensor):
            continue
        if first is None:
            first = argument.name, value.device
        elif value.device != first[1]:
            raise ValueError(f"{name}: {argument.name} must be on {first[1]} as {first[0]} is, got {value.device}")


def _bound(schema: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """The arguments that were given, each with its declaration."""
    for argument, value in zip(schema.arguments, args, strict=False):
        yield argument, value
    for argument in schema.arguments[len(args) :]:
        if argument.name in kwargs:
            yield argument, kwargs[argument.name]


def called_by(function: str, call: Callable[..., Any], *args: Any) -> Any:
    """Calls an op for a function of another name: errors about arguments name the function that the user called."""
    if torch.compiler.is_compiling():
        return call(*args)
    try:
        return call(*args)
    except (TypeError, ValueError) as error:
        op, separator, text = str(error).partition(": ")
        if not separator or op != call.__name__:
            raise
        raise type(error)(f"{function}: {text}") from None
