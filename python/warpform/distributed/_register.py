"""Registers an op that is defined in Python, with its schema."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .. import _library
from ..ops._register import implement


def register_op(
    schema: str,
    implementation: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    autocast: Sequence[str] = (),
) -> Callable[..., Any]:
    """Registers warpform::NAME and returns the op.

    Args:
        schema: "NAME(Tensor q, str group, ...) -> Tensor". Groups are passed by name (`_group.name_of`).
        implementation: called with the op's arguments, below autograd.
        fake, backward, setup_context, autocast: as in `warpform.ops._register.register_op`.
    """
    _library.require()
    name = schema.partition("(")[0]
    return implement(
        name,
        implementation,
        fake=fake,
        schema=schema,
        backward=backward,
        setup_context=setup_context,
        autocast=autocast,
    )
