"""How far the launches of a call fill the GPU: the call's ops, and warpform's plans of their launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

Call = tuple[str, tuple[Any, ...], dict[str, Any]]


class _Ops(TorchDispatchMode):
    """Keeps each call of an op of warpform, and makes it. Its tensors stay alive as long as this does."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "warpform":
            self.calls.append((func._opname, args, kwargs))
        return func(*args, **kwargs)


def ops_of(call: Callable[[], Any]) -> list[Call]:
    """Makes a call and returns the calls of warpform's ops in it, in order: name, arguments, keyword arguments."""
    with _Ops() as seen:
        call()
    return seen.calls


def waves(calls: Sequence[Call], **machine: int) -> str:
    """Waves of each op's largest launch, as "varlen_attention=3.2": the blocks over those that the GPU holds at once.

    Below 1 a part of the GPU has nothing to do. machine: what `warpform._C.launch_plan` takes of the GPU. An op without
    a kernel for its arguments is left out.
    """
    import warpform._C as module

    found: dict[str, float] = {}
    for name, args, kwargs in calls:
        try:
            plan = module.launch_plan(name, *args, **machine, **kwargs)
        except ValueError:
            continue
        most = max((launch["waves"] for launch in plan["launches"]), default=0.0)
        found[name] = max(found.get(name, 0.0), most)
    return " ".join(f"{name}={value:.2g}" for name, value in found.items() if value)
