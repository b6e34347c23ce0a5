"""What a call launches, and how far that fills the GPU: the call's ops, and warpform's plans of their launches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

Call = tuple[str, tuple[Any, ...], dict[str, Any]]


class _Ops(TorchDispatchMode):
    """Keeps the name and the arguments of each call of an op of warpform, their tensors without data."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "warpform":
            self.calls.append((func._opname, *tree_map_only(torch.Tensor, _without_data, (args, kwargs))))
        return func(*args, **kwargs)


def _without_data(t: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device="meta")


def ops_of(call: Callable[[], Any]) -> list[Call]:
    """Makes a call and returns the calls of warpform's ops in it, in order: name, arguments, keyword arguments."""
    with _Ops() as seen:
        call()
    return seen.calls


def _launches(calls: Sequence[Call], machine: dict[str, int]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yields each op's name with its planned launches. An op without a kernel for its arguments is left out."""
    import warpform._C as module

    for name, args, kwargs in calls:
        with contextlib.suppress(TypeError, ValueError):  # a dtype that no op takes, or no kernel
            yield name, module.launch_plan(name, *args, **machine, **kwargs)["launches"]


def kernels(calls: Sequence[Call], **machine: int) -> list[str]:
    """The kernels that calls of ops launch, in order, by name and template arguments. machine: as for `waves`."""
    return [launch["kernel"] for _, launches in _launches(calls, machine) for launch in launches]


def waves(calls: Sequence[Call], **machine: int) -> dict[str, float]:
    """Waves of each op's largest launch: its blocks over those that the GPU holds at once.

    Below 1 a part of the GPU has nothing to do. machine: what `warpform._C.launch_plan` takes of the GPU. An op without
    a kernel for its arguments, or that launches nothing, is left out.
    """
    found: dict[str, float] = {}
    for name, launches in _launches(calls, machine):
        most = max((launch["waves"] for launch in launches), default=0.0)
        if most:
            found[name] = max(found.get(name, 0.0), most)
    return found


def text(found: dict[str, float]) -> str:
    """A cell of results: "varlen_attention=3.2"."""
    return " ".join(f"{name}={round(value, 2 if value < 1 else 1):g}" for name, value in found.items())
