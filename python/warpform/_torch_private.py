"""All that warpform uses of torch beyond its public names.

Torch may move or rename such a name in any release. Each is looked up here once, and `missing()` says which this torch
lacks: where that costs a check, the check is left out; where an op cannot be registered without it, that raises.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# The names, each as module:attribute.
NAMES = (
    "torch._library.autograd:make_autograd_impl",
    "torch._library.autograd:Info",
    "torch.autograd.forward_ad:_current_level",
    "torch._C:_are_functorch_transforms_active",
    "torch._subclasses.fake_tensor:is_fake",
    "torch.distributed.distributed_c10d:_resolve_process_group",
    "torch._C._aoti:alloc_tensor_by_stealing_from_void_ptr",
    "torch._C:_len_torch_function_stack",
    "torch._C:_len_torch_dispatch_stack",
    "torch._C:_is_any_autocast_enabled",
    "torch._C:_get_tracing_state",
    "torch.autograd:_profiler_enabled",
)


def _find(name: str) -> Any:
    """The object of a name, or None."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute, None)
    except (ImportError, AttributeError):  # torch may be built without torch.distributed
        return None


def missing() -> list[str]:
    """Those of NAMES that this torch lacks."""
    return [name for name in NAMES if _find(name) is None]


_make_autograd_impl, _info, _, _transforms_active, _is_fake, _resolve_process_group, _from_handle, *_modes = (
    _find(name) for name in NAMES
)


def autograd_rule(
    op: Any, backward: Callable[..., Any], setup_context: Callable[..., None] | None
) -> Callable[..., Any]:
    """The rule that `torch.library.register_autograd` registers, called with a dispatch keyset and the arguments.

    Raises:
        ImportError: this torch has no such function under the name that is known.
    """
    if _make_autograd_impl is None or _info is None:
        raise ImportError(
            f"warpform needs {NAMES[0]} and {NAMES[1]}, which torch {torch.__version__} lacks; use an earlier torch"
        )
    rule: Callable[..., Any] = _make_autograd_impl(op, _info(backward, setup_context))
    return rule


def in_forward_mode() -> bool:
    """Tells whether forward-mode differentiation is on. It reads one global, as every call of an op asks."""
    return bool(getattr(forward_ad, "_current_level", -1) >= 0)


def in_functorch() -> bool:
    """Tells whether a transform of torch.func is active."""
    return _transforms_active is not None and bool(_transforms_active())


def tensor_from_handle() -> Callable[[Any], Tensor]:
    """The function that makes a tensor of the capsule of a handle of the stable ABI, which it takes over.

    Raises:
        ImportError: this torch has no such function under the name that is known.
    """
    if _from_handle is None:
        raise ImportError(f"there is no {NAMES[6]}")
    function: Callable[[Any], Tensor] = _from_handle
    return function


def dispatcher_needed() -> tuple[Callable[[], Any], ...]:
    """Functions without arguments, of which each says whether something is on that sees calls in torch's dispatcher.

    They are: modes of `__torch_function__` and `__torch_dispatch__`, autocast, tracing by `torch.jit`, the profiler,
    and transforms of `torch.func`, forward-mode differentiation among them.

    Raises:
        ImportError: this torch lacks one under the name that is known.
    """
    functions = (*_modes, _transforms_active)
    if None in functions:
        raise ImportError(f"there is no {', '.join(name for name in missing())}")
    return (*functions, in_forward_mode)


def is_fake(t: Tensor) -> bool:
    """Tells whether a tensor is a fake one, which tracing makes and which has no values."""
    return _is_fake is not None and bool(_is_fake(t))


def process_group(name: str) -> Any:
    """The group of torch.distributed that is registered under a name, as ops name their groups.

    Raises:
        ImportError: this torch has no such function under the name that is known.
    """
    if _resolve_process_group is None:
        raise ImportError(f"warpform needs {NAMES[-1]}, which torch {torch.__version__} lacks; use an earlier torch")
    return _resolve_process_group(name)
