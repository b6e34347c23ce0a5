"""Direct calls of ops, through `warpform._C` where it is there: what runs them, and when torch's dispatcher is needed.

`warpform._C` is compiled for one Python and needs functions of torch that an older or a later torch may lack. Where
anything is missing the ops are called through torch, and `why_not` says why.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from . import _env

_module: ModuleType | None = None
_why_not: str | None = "the library of ops is not loaded"
_closed = 0


def attach() -> None:
    """Imports `warpform._C` and hands it what it needs of torch. It never raises."""
    global _module, _why_not
    import torch

    from . import _torch_private

    if not _env.direct():
        _why_not = "WARPFORM_DIRECT=0"
        return
    try:
        from . import _C as module
    except ImportError as error:
        _why_not = f"warpform._C cannot be imported ({error})"
        return
    try:
        from_handle, frees_handle = _torch_private.tensor_from_handle()
        module.use_torch(
            tensor_type=torch.Tensor,
            parameter_type=torch.nn.Parameter,
            grad_enabled=torch.is_grad_enabled,
            from_handle=from_handle,
            frees_handle=frees_handle,
            autograd_excluded=_torch_private.autograd_excluded(),
            busy=_torch_private.dispatcher_needed(),
            flags=_torch_private.dispatcher_flags(),
        )
    except Exception as error:
        _why_not = f"torch {torch.__version__} has not what direct calls need ({error})"
        return
    _module, _why_not = module, None


def why_not() -> str | None:
    """Why ops are called through torch's dispatcher alone; None where direct calls are open."""
    return _why_not


@contextlib.contextmanager
def closed() -> Iterator[None]:
    """A context in which every op is called through torch, in all threads."""
    global _closed
    if _module is None:
        yield
        return
    _closed += 1
    _module.set_open(False)
    try:
        yield
    finally:
        _closed -= 1
        _module.set_open(_closed == 0)


def direct(
    name: str, through_torch: Callable[..., Any], recorded: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """A callable of an op's arguments: straight to the kernels where that is open, else `through_torch`.

    Where only gradients stand in the way, `recorded`; None: `through_torch` then too.
    """
    if _module is None:
        return through_torch
    call: Callable[..., Any] = _module.library.direct(name, through_torch, recorded)
    return call


def launch_limits(device: int) -> dict[str, int]:
    """What `warpform._C.launch_plan` asks of a GPU: its SMs, bytes of shared memory a block, compute capability."""
    import torch

    facts: Any = torch.cuda.get_device_properties(device)
    return {
        "sm_count": facts.multi_processor_count,
        "shared_memory_limit": facts.shared_memory_per_block_optin,
        "capability": 10 * facts.major + facts.minor,
    }
