"""Who takes part in a ring, and what runs on whom: process groups, meshes, double rings, ranks in one process."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from .._torch_private import process_group
from ..ops import _check
from ._transport import LocalTransport, ProcessGroupTransport, Steps, Transport, run, run_in_lock_step


@dataclass(frozen=True)
class Ring:
    """A ring as one of its ranks sees it: one, or inner rings (within a node) joined by outer ones (between nodes).

    Ranks count through the inner ring first: rank = outer.rank * inner.size + inner.rank.
    """

    inner: Transport
    outer: Transport | None = None

    @property
    def rank(self) -> int:
        """This rank's place in the sequence."""
        return self.inner.rank + (0 if self.outer is None else self.outer.rank * self.inner.size)

    @property
    def size(self) -> int:
        """The number of ranks that hold the sequence."""
        return self.inner.size * (1 if self.outer is None else self.outer.size)


@dataclass(eq=False)
class LocalGroup:
    """N ranks on one device in one process, for tests and for studying how a ring scales, without a cluster.

    It takes the place of a process group. Tensors then have one dimension more, the first, of size N: the shards of all
    ranks. Ranks compute one after another, so a call takes the time of all of them together, and hops are copies.

    Args:
        size: how many ranks.
        inner_size: ranks of an inner ring, for a double ring; it divides size.
    """

    size: int
    inner_size: int | None = None
    # Called with rank, number of the stretch and seconds of each stretch of computing between two waits.
    on_segment: Callable[[int, int, float], None] | None = field(default=None, repr=False)
    name: str = field(default="", init=False)

    def __post_init__(self) -> None:
        inner = self.size if self.inner_size is None else self.inner_size
        if self.size < 1 or inner < 1 or self.size % inner != 0:
            raise ValueError(
                f"LocalGroup: size must be at least 1 and a multiple of inner_size, got {self.size} and {inner}"
            )
        self.name = f"{_LOCAL}{next(_numbers)}"
        _local_groups[self.name] = self

    @staticmethod
    def named(name: str) -> LocalGroup | None:
        """The group of this name; None for names of process groups."""
        return _local_groups[name] if name.startswith(_LOCAL) else None

    def rings(self) -> list[Ring]:
        """The ring as each rank sees it."""
        inner = self.size if self.inner_size is None else self.inner_size
        inner_mail: list[dict[tuple[int, int], Tensor]] = [{} for _ in range(self.size // inner)]
        outer_mail: list[dict[tuple[int, int], Tensor]] = [{} for _ in range(inner)]
        return [
            Ring(
                LocalTransport(r % inner, inner, inner_mail[r // inner]),
                None if inner == self.size else LocalTransport(r // inner, self.size // inner, outer_mail[r % inner]),
            )
            for r in range(self.size)
        ]


Group: TypeAlias = dist.ProcessGroup | dist.DeviceMesh | tuple[dist.ProcessGroup, dist.ProcessGroup] | LocalGroup

_LOCAL = "warpform-local-"
_numbers = itertools.count()
_local_groups: weakref.WeakValueDictionary[str, LocalGroup] = weakref.WeakValueDictionary()


def name_of(op: str, group: Any) -> str:
    """The group as an op can take it, a string: names of process groups, the outer one first, with / between them."""
    if isinstance(group, LocalGroup):
        return group.name
    return "/".join(one.group_name for one in process_groups(op, group))


def process_groups(op: str, group: Any) -> tuple[dist.ProcessGroup, ...]:
    """(ring,) or (outer, inner), checked."""
    if isinstance(group, dist.DeviceMesh):
        if group.ndim not in (1, 2):
            raise ValueError(f"{op}: group must be a mesh of one dimension or two, (outer, inner), got {group}")
        groups = tuple(group.get_all_groups())
    elif isinstance(group, (tuple, list)):
        groups = tuple(group)
    else:
        groups = (group,)
    if not 1 <= len(groups) <= 2 or not all(isinstance(one, dist.ProcessGroup) for one in groups):
        raise TypeError(
            f"{op}: group must be a ProcessGroup, a DeviceMesh, (outer, inner) process groups or a LocalGroup, "
            f"got {_check.describe(group)}"
        )
    for one in groups:
        if dist.get_rank(one) < 0:
            raise ValueError(f"{op}: this process, rank {dist.get_rank()}, is not a member of group")
    return groups


def rank_and_size(op: str, group: Any) -> tuple[int, int]:
    """This process's place in the sequence, and among how many. Not for a LocalGroup."""
    groups = process_groups(op, group)
    rank, size = 0, 1
    for one in groups:
        rank, size = rank * dist.get_world_size(one) + dist.get_rank(one), size * dist.get_world_size(one)
    return rank, size


def _named_process_groups(name: str) -> list[dist.ProcessGroup]:
    return [process_group(one) for one in name.split("/")]


def size_of(name: str) -> int:
    """Returns the number of ranks of a named group."""
    local = LocalGroup.named(name)
    return math.prod(one.size() for one in _named_process_groups(name)) if local is None else local.size


def _ring(op: str, name: str, timeout: float | None) -> Ring:
    groups = _named_process_groups(name)
    *outer, inner = (ProcessGroupTransport(one, op=op, timeout=timeout) for one in groups)
    if outer:
        # A rank that waits in the other ring must learn of the failure too.
        inner.on_failure, outer[0].on_failure = outer[0].close, inner.close
    return Ring(inner, outer[0] if outer else None)


def execute(
    op: str, group: str, timeout: float | None, steps: Callable[..., Steps[Any]], /, *tensors: Tensor | None, **how: Any
) -> Any:
    """Runs steps(ring, *tensors, **how) on this rank of the group, and returns its tensor or tuple of tensors.

    With a LocalGroup it runs on all its ranks: tensors are split along their first dimension, results stacked.
    """
    local = LocalGroup.named(group)
    if local is None:
        return run(steps(_ring(op, group, timeout), *tensors, **how))
    shards = zip(*(itertools.repeat(None, local.size) if t is None else t.unbind(0) for t in tensors), strict=True)
    results = run_in_lock_step(
        [steps(ring, *own, **how) for ring, own in zip(local.rings(), shards, strict=True)], local.on_segment
    )
    if isinstance(results[0], Tensor):
        return torch.stack(results)
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True))
