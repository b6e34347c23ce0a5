"""Registers an op that is defined in Python: its schema, and what `warpform.ops` registers for one from the library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import _library
from ..ops import _register


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
    library = torch.library.Library(_register.NAMESPACE, "FRAGMENT")
    _register._libraries.append(library)
    library.define(schema)
    op = getattr(getattr(torch.ops, _register.NAMESPACE), name).default
    library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{_register.NAMESPACE}::{name}", fake, lib=library)
    library.impl(name, _register._autograd_kernel(op, backward, setup_context), "Autograd", with_keyset=True)
    if autocast:
        for device_type in ("cuda", "cpu"):
            kernel = _register._autocast_kernel(op, device_type, autocast)
            library.impl(name, kernel, f"Autocast{device_type.upper()}")
    return op
