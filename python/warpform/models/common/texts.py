"""The texts that `encode` takes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def read_texts(caller: str, texts: str | Iterable[str]) -> tuple[list[str], bool]:
    """The texts in a list, and whether it was one that is not in a container.

    A container is anything that gives strings one by one: a list, an array of numpy, a Series of pandas, a generator.

    Raises:
        TypeError: something else, or a container of something else.
    """
    if isinstance(texts, str):
        return [str(texts)], True
    if isinstance(texts, bytes | dict) or not hasattr(texts, "__iter__"):
        raise TypeError(f"{caller}: texts must be a string or strings, got {type(texts).__name__}")
    array: Any = texts
    if getattr(array, "ndim", 1) == 0:  # an array that holds one text
        return read_texts(caller, array.item())
    found = list(texts)
    for text in found:
        if not isinstance(text, str):
            raise TypeError(f"{caller}: texts must be strings, got {type(text).__name__}")
    return [str(text) for text in found], False
