"""All that warpform uses of torch beyond its public names.

Torch may move or rename such a name in any release. Each is looked up here once, and `missing()` says which this torch
lacks: where that costs a check, the check is left out; where an op cannot be registered without it, that raises.
"""

from __future__ import annotations

import functools
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
    "torch._C._aoti:unsafe_alloc_void_ptr_from_tensor",
    "torch._C:_len_torch_function_stack",
    "torch._C:_len_torch_dispatch_stack",
    "torch._C:_is_any_autocast_enabled",
    "torch._C:_get_tracing_state",
    "torch._C:_dispatch_tls_is_dispatch_key_excluded",
    "torch.autograd.profiler:_is_profiler_enabled",
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


_FULL_NAMES = {name.partition(":")[2]: name for name in NAMES}
_FOUND = {attribute: _find(name) for attribute, name in _FULL_NAMES.items()}


def _need(attribute: str) -> Any:
    """The object of a name. Raises ImportError where this torch lacks it."""
    if _FOUND[attribute] is None:
        raise ImportError(
            f"warpform needs {_FULL_NAMES[attribute]}, which torch {torch.__version__} lacks; use an earlier torch"
        )
    return _FOUND[attribute]


def autograd_rule(
    op: Any, backward: Callable[..., Any], setup_context: Callable[..., None] | None
) -> Callable[..., Any]:
    """The rule that `torch.library.register_autograd` registers, called with a dispatch keyset and the arguments.

    Raises:
        ImportError: this torch has no such function under the name that is known.
    """
    rule: Callable[..., Any] = _need("make_autograd_impl")(op, _need("Info")(backward, setup_context))
    return rule


def in_forward_mode() -> bool:
    """Tells whether forward-mode differentiation is on. It reads one global, as every call of an op asks."""
    return bool(getattr(forward_ad, "_current_level", -1) >= 0)


def in_functorch() -> bool:
    """Tells whether a transform of torch.func is active."""
    active = _FOUND["_are_functorch_transforms_active"]
    return active is not None and bool(active())


def tensor_from_handle() -> tuple[Callable[[Any], Tensor], bool]:
    """The function that makes a tensor of the capsule of a handle of the stable ABI, and whether it frees the handle.

    Its name says that it takes the handle over. In the torch versions that are known it does not: so it is tried.

    Raises:
        ImportError: this torch lacks it, or what it is tried with, under the names that are known.
    """
    function: Callable[[Any], Tensor] = _need("alloc_tensor_by_stealing_from_void_ptr")
    to_handle, count = _need("unsafe_alloc_void_ptr_from_tensor"), getattr(Tensor, "_use_count", None)
    if count is None:
        raise ImportError(f"warpform needs torch.Tensor._use_count, which torch {torch.__version__} lacks")
    tensor = torch.empty(0)
    before = count(tensor)
    function(to_handle(tensor))
    left = count(tensor) - before
    if left not in (0, 1):
        raise ImportError(f"torch's alloc_tensor_by_stealing_from_void_ptr leaves {left} references to a tensor")
    return function, left == 0


def dispatcher_needed() -> tuple[Callable[[], Any], ...]:
    """Functions without arguments, of which each says whether something is on that sees calls in torch's dispatcher.

    They are: modes of `__torch_function__` and `__torch_dispatch__`, autocast, tracing by `torch.jit`, and transforms
    of `torch.func`. For the profiler and forward-mode differentiation see `dispatcher_flags`.

    Raises:
        ImportError: this torch lacks one under the name that is known.
    """
    names = (
        "_len_torch_function_stack",
        "_len_torch_dispatch_stack",
        "_is_any_autocast_enabled",
        "_get_tracing_state",
        "_are_functorch_transforms_active",
    )
    return tuple(_need(name) for name in names)


def autograd_excluded() -> Callable[[], bool]:
    """A function that tells whether this thread is below autograd, as the implementation of an op is.

    Raises:
        ImportError: this torch has no such function under the name that is known.
    """
    return functools.partial(_need("_dispatch_tls_is_dispatch_key_excluded"), "AutogradCUDA")


def dispatcher_flags() -> tuple[tuple[dict[str, Any], str, Any], ...]:
    """Variables of torch that say the same of forward-mode differentiation and of the profiler, at less cost.

    Each is the dict of a module, the name of the variable, and the object that it is while nothing is on.

    Raises:
        ImportError: this torch lacks one under the name that is known.
    """
    flags = []
    for attribute, idle in (("_current_level", -1), ("_is_profiler_enabled", False)):
        found = vars(importlib.import_module(_FULL_NAMES[attribute].partition(":")[0]))
        if type(found.get(attribute)) is not type(idle):
            raise ImportError(f"{_FULL_NAMES[attribute]} is not of the type of {idle}")
        flags.append((found, attribute, idle))
    return tuple(flags)


def is_fake(t: Tensor) -> bool:
    """Tells whether a tensor is a fake one, which tracing makes and which has no values."""
    if type(t) is Tensor and not in_functorch():
        return False  # fake ones are of a class of their own, though a transform may have wrapped them
    fake = _FOUND["is_fake"]
    return fake is not None and bool(fake(t))


def process_group(name: str) -> Any:
    """The group of torch.distributed that is registered under a name, as ops name their groups.

    Raises:
        ImportError: this torch has no such function under the name that is known.
    """
    return _need("_resolve_process_group")(name)


# The types of the arguments of mkldnn::_linear_pointwise: x, weight, bias, and what is fused behind the product.
_LINEAR_ARGUMENTS = ["Tensor", "Tensor", "Optional[Tensor]", "str", "List[Optional[number]]", "Optional[str]"]


@functools.cache
def onednn_linear() -> Callable[..., Tensor] | None:
    """A function (x, weight, bias) that computes torch.nn.functional.linear by oneDNN, for float32 tensors on a CPU.

    It records no gradient. None where torch was built without oneDNN, or has this op with other arguments.
    """
    if not torch.backends.mkldnn.is_available():
        return None
    op = getattr(getattr(torch.ops.mkldnn, "_linear_pointwise", None), "default", None)
    if op is None or [str(argument.type) for argument in op._schema.arguments] != _LINEAR_ARGUMENTS:
        return None
    if [str(result.type) for result in op._schema.returns] != ["Tensor"]:
        return None

    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out: Tensor = op(x, weight, bias, "none", [], "")
        return out

    return product


@functools.cache
def _asked_of_dispatcher() -> tuple[Callable[[], Any], ...] | None:
    try:
        return dispatcher_needed()
    except ImportError:
        return None


def sees_calls() -> bool:
    """Tells whether something of `dispatcher_needed` is on, or forward mode. True where this torch cannot say it."""
    asked = _asked_of_dispatcher()
    return asked is None or in_forward_mode() or any(ask() for ask in asked)
