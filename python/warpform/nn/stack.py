"""The structure of a decoder: branches that read and write a residual stream, in a flat list.

A branch is a norm, one product inwards, what stands between (the core), and one product outwards. A LLaMA layer is two
branches. The architectures on it differ in the parts of a branch, and in when what a branch writes is added.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import _autocast
from ..ops import RoutingPlan
from ..packing import Packing
from ._checkpoint import CheckpointedLayers
from ._product import CPU_ROWS, apply_linear, even_blocks, in_blocks, is_plain
from .cache import CachePlaces, Caches
from .norm import is_fused_norm, norm_of_sum
from .rotary import Rotary

_CHECKPOINTED = 2  # branches that are computed again together
PLACEMENTS = ("before", "output", "sum")


@dataclass
class Step:
    """What every branch needs in one call of a stack: where tokens stand, what was kept, and the choices of a system.

    A step serves one call: losses are added to it, and tables of its positions are kept in it.

    Attributes:
        positions: int64 [T]: the place of each token in its sequence, for rotary positions.
        cu_seqlens: int32 [B + 1]: sequence b has rows cu_seqlens[b] to cu_seqlens[b + 1].
        max_seqlen: at least the longest sequence.
        caches: what branches kept of earlier tokens, of `Stack.caches`; None: there are none.
        places: where in the caches the tokens of this call are.
        key_ranges: int32 [T, 2]: token t sees the keys first to last - 1 of its sequence, in place of what the cores
            say. Neither decreases within a sequence.
        plan: the routing of tokens, for products that are routed.
        width: how much of nested products is in use.
        chains: how many of the chains are in use; None: all.
        losses: what branches add to the loss of the model, such as balance losses; scalars.
    """

    positions: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    caches: Caches | None = None
    places: CachePlaces | None = None
    key_ranges: Tensor | None = None
    plan: RoutingPlan | None = None
    width: Any = None
    chains: int | None = None
    losses: list[Tensor] = field(default_factory=list)
    _tables: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, packing: Packing, **options: Any) -> Step:
        """The step of whole sequences. A token's position is its place in its padded row, as in transformers.

        Args:
            packing: of the tokens.
            **options: other attributes.
        """
        return cls(packing.position_ids, packing.cu_seqlens, packing.max_seqlen, **options)

    @classmethod
    def after(cls, caches: Caches, counts: Sequence[int], rows: Sequence[int], **options: Any) -> Step:
        """The step of new tokens behind those that caches hold: counts[i] of them in sequence rows[i].

        The caches count the new tokens once a stack has run with the step.

        Raises:
            ValueError: rows that do not increase or that the caches lack, counts below 1, or no room.
        """
        positions, offsets, places = caches.place(counts, rows)
        return cls(positions, offsets, max(counts, default=0), caches, places, **options)

    def rotary(self, rotary: Rotary, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine [T, rotary.dim / 2] at the positions, computed once for all branches."""
        key = (rotary.key, dtype)
        tables = self._tables.get(key)
        if tables is None:
            tables = self._tables[key] = rotary.tables(self.positions, dtype)
        return tables


def _depends_on_step(module: nn.Module) -> bool:
    """Tells whether a module has `at_step`. What wraps one and hands on its attributes has not, and must be called."""
    return hasattr(type(module), "at_step")


def at_step(module: nn.Module, x: Tensor, step: Step) -> Tensor:
    """module(x), or module.at_step(x, step) for a module whose result depends on the step: a width, a plan, chains."""
    if _depends_on_step(module):
        return cast("Any", module).at_step(x, step)
    return apply_linear(x, module)


def normalise(norm: nn.Module, x: Tensor, step: Step) -> Tensor:
    """norm(x), or norm.at_step(x, step) for a norm whose result depends on the step."""
    if _depends_on_step(norm):
        return cast("Any", norm).at_step(x, step)
    return _sum_and_norm(norm, x, None)[0]


def _sum_and_norm(norm: nn.Module, x: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor]:
    """norm(x + added) and x + added, in one pass where the norm allows it.

    Under autocast a stream in float32 stays in float32, and its norm too, as in transformers.
    """
    if added is not None and added.dtype != x.dtype:
        added = added.to(torch.promote_types(added.dtype, x.dtype))
        x = x.to(added.dtype)
    first, rest = (x, None) if added is None else (added, x)
    if not is_fused_norm(norm) or not _autocast.enabled(x.device):
        return norm_of_sum(norm, first, None, rest)
    with _autocast.off(x.device):
        return norm_of_sum(norm, first, None, rest)


class Branch(nn.Module):
    """x -> what is added to the stream: outwards(core(inwards(norm(x)))).

    Modules whose result depends on the step, such as products with a weight for each class, have a method
    `at_step(x, step)`, which is called in place of `forward`.

    Args:
        norm: [T, hidden] -> [T, hidden].
        inwards: one product for all that the core reads.
        core: called with the product, the step and its own cache; returns [T, ...].
        outwards: [T, ...] -> [T, hidden].
        placement: where the norm stands: "before" adds f(norm(x)), as LLaMA does, "output" adds norm(f(x)), and "sum"
            makes norm(x + f(x)) of the stream. With "sum" the norm runs in `join`, outside of the call of the branch,
            where what wraps such a branch by itself (FSDP, checkpointing) does not reach it.

    Raises:
        ValueError: another placement.
    """

    def __init__(
        self, norm: nn.Module, inwards: nn.Module, core: nn.Module, outwards: nn.Module, *, placement: str = "before"
    ) -> None:
        super().__init__()
        if placement not in PLACEMENTS:
            raise ValueError(f"Branch: placement must be one of {', '.join(PLACEMENTS)}, got {placement!r}")
        self.norm = norm
        self.inwards = inwards
        self.core = core
        self.outwards = outwards
        self.placement = placement

    def forward(self, x: Tensor, step: Step, cache: Any = None) -> Any:
        """x: [T, hidden] -> [T, hidden], what `join` adds; or that and scalars that are added to the loss.

        cache: what the core keeps, if anything.
        """
        if self.placement == "before":
            return self.body(normalise(self.norm, x, step), step, cache)
        out = self.body(x, step, cache)
        return normalise(self.norm, out, step) if self.placement == "output" else out

    def body(self, x: Tensor, step: Step, cache: Any = None) -> Any:
        """What is between the norm and the stream: outwards(core(inwards(x))), x [T, hidden]."""
        if self._takes_blocks(x):
            return torch.cat([self._body(rows, step, cache) for rows in even_blocks(x, CPU_ROWS)])
        return self._body(x, step, cache)

    def _body(self, x: Tensor, step: Step, cache: Any) -> Tensor:
        return at_step(self.outwards, self.core(at_step(self.inwards, x, step), step, cache), step)

    def _takes_blocks(self, x: Tensor) -> bool:
        """Tells whether rows may be taken some at a time, for a CPU's cache: where nothing mixes or watches them."""
        return (
            "rowwise" in type(self.core).__dict__
            and in_blocks(x)
            and is_plain(self.core, type(self.core))
            and is_plain(self.inwards, nn.Linear)
            and is_plain(self.outwards, nn.Linear)
        )

    def after_sum(self, x: Tensor, added: Tensor, step: Step, cache: Any = None) -> tuple[Any, Tensor]:
        """forward(x + added) and x + added, with the sum and the norm in one pass over memory.

        Only where `fuses()`.
        """
        normed, x = _sum_and_norm(self.norm, x, added)
        return self.body(normed, step, cache), x

    def fuses(self) -> bool:
        """Tells whether `after_sum` does what a call does: there are no hooks, and `forward` is this class's own."""
        return (
            self.placement == "before"
            and is_fused_norm(self.norm)
            and is_plain(self, type(self))
            and type(self).forward is Branch.forward
        )

    def join(self, x: Tensor, out: Tensor, step: Step) -> Tensor:
        """The stream [T, hidden] after what this branch made of it."""
        if self.placement != "sum":
            return x + out
        if _depends_on_step(self.norm):
            return normalise(self.norm, x + out, step)
        return _sum_and_norm(self.norm, x, out)[0]

    def cache(self, batch: int, capacity: int, device: Any = None, dtype: torch.dtype | None = None) -> Any:
        """What the core keeps of earlier tokens; None where it keeps nothing."""
        make = getattr(self.core, "cache", None)
        return None if make is None else make(batch, capacity, device, dtype)

    def extra_repr(self) -> str:
        return f"placement={self.placement!r}"


class Stack(CheckpointedLayers):
    """Branches, one after the other, on one residual stream.

    What a branch with lag n reads lacks the results of the n branches before it; they are added later. Lag 0 everywhere
    is the usual decoder. Lag 1 everywhere is ladder residual (arXiv 2501.06589): a branch does not read the result of
    the branch before it, so that GPUs can sum that result at the same time. Lags 0, 1, 0, 1, ... are parallel attention
    and feed-forward.

    With gradient checkpointing two branches at a time, a layer of a usual decoder, are computed again in the backward
    pass.

    Args:
        branches: in order. A branch may stand in several places, and then has the same weights in all of them.
        lags: for each place; None: 0.

    Raises:
        ValueError: another number of lags, or a negative one.
    """

    def __init__(self, branches: Iterable[nn.Module], lags: Sequence[int] | None = None) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.lags = [0] * len(self.branches) if lags is None else list(lags)
        if len(self.lags) != len(self.branches) or min(self.lags, default=0) < 0:
            raise ValueError(
                f"Stack: lags must be {len(self.branches)} numbers of at least 0, one for each branch, got {self.lags}"
            )

    def slice(self, first: int, last: int) -> Stack:
        """A stack of the branches first to last - 1, the same modules. Its end adds all that was still to be added."""
        return Stack(list(self.branches)[first:last], self.lags[first:last])

    def insert(self, place: int, branch: nn.Module, lag: int = 0) -> None:
        """Puts a branch before the one that is at `place`, or behind all where that is their number.

        Raises:
            ValueError: another place, or a negative lag.
        """
        if not 0 <= place <= len(self.branches) or lag < 0:
            raise ValueError(
                f"Stack.insert: place must be from 0 to {len(self.branches)} and lag at least 0, got {place} and {lag}"
            )
        self.branches.insert(place, branch)
        self.lags.insert(place, lag)

    def caches(
        self, batch: int, capacity: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Caches:
        """Empty caches for `batch` sequences of at most `capacity` tokens, one for each place.

        Args:
            batch, capacity: the sizes.
            device, dtype: None: those of the weights of products.
        """
        products = (p for p in self.parameters() if p.is_floating_point() and p.dim() > 1)
        weight = next(products, torch.empty(0))
        device, dtype = device or weight.device, dtype or weight.dtype
        parts = [branch.cache(batch, capacity, device, dtype) for branch in self._places()]
        return Caches(parts, batch, capacity, device)

    def _places(self) -> list[Branch]:
        return cast("list[Branch]", list(self.branches))

    def forward(self, x: Tensor, step: Step, norm: nn.Module | None = None) -> Tensor:
        """x: [T, hidden] -> the stream after all branches, [T, hidden].

        Args:
            x: packed rows.
            step: of these rows. What branches give besides, such as balance losses, is appended to its losses.
            norm: normalises the result, in one pass with the last sum.

        Raises:
            ValueError: the step has the caches of another stack.
        """
        branches = self._places()
        if len(self.lags) != len(branches):
            raise ValueError(
                f"Stack: there must be a lag for each of the {len(branches)} branches, got {len(self.lags)}; put a "
                "branch in by Stack.insert"
            )
        parts: Sequence[Any] = [None] * len(branches)
        if step.caches is not None:
            parts = step.caches.parts
            if len(parts) != len(branches):
                raise ValueError(
                    f"Stack: the step must have caches that this stack made, for {len(branches)} branches, got those "
                    f"of {len(parts)}"
                )
        outs: list[Any] = []  # results of the branches just before, which are still to be added
        again = self.gradient_checkpointing and self.training
        each = _CHECKPOINTED if again else max(1, len(branches))
        for first in range(0, len(branches), each):
            run = partial(self._run, branches, first, min(first + each, len(branches)), step, parts)
            x, kept, *found = self._gradient_checkpointing_func(run, x, *map(settle, outs)) if again else run(x, *outs)
            outs, losses = found[:kept], found[kept:]
            step.losses += losses
        waiting = list(zip(branches[len(branches) - len(outs) :], outs, strict=True))
        last = None
        if norm is not None and waiting and waiting[-1][0].placement != "sum" and is_fused_norm(norm):
            last = settle(waiting.pop()[1])
        for other, out in waiting:
            x = other.join(x, settle(out), step)
        if step.caches is not None and step.places is not None:
            step.caches.lengths = list(step.places.lengths)  # all branches have the new tokens
        if last is not None:
            return _sum_and_norm(cast("nn.Module", norm), x, last)[0]
        return x if norm is None else normalise(norm, x, step)

    def _run(
        self, branches: list[Branch], first: int, last: int, step: Step, parts: Sequence[Any], x: Tensor, *outs: Any
    ) -> tuple[Any, ...]:
        """Runs the branches first to last - 1.

        Args:
            x: the stream, to which outs, the results of the branches just before `first`, are still to be added.

        Returns:
            The stream; how many results behind it are still to be added; these; and scalars for the loss. They are no
            containers, as checkpointing sees the gradients of what is returned alone.
        """
        waiting = list(zip(branches[first - len(outs) : first], outs, strict=True))
        losses: list[Tensor] = []
        for branch, lag, cache in zip(branches[first:last], self.lags[first:last], parts[first:last], strict=True):
            due, waiting = waiting[: max(0, len(waiting) - lag)], waiting[max(0, len(waiting) - lag) :]
            added = None
            # What wraps a branch, such as FSDP or a checkpoint, is no Branch, and is called.
            if due and due[-1][0].placement != "sum" and isinstance(branch, Branch) and branch.fuses():
                added = settle(due.pop()[1])
            for other, out in due:
                x = other.join(x, settle(out), step)
            if added is None:
                result = branch(x, step, cache)
            else:
                result, x = branch.after_sum(x, added, step, cache)
            if isinstance(result, tuple):
                result, *more = result
                losses += more
            waiting.append((branch, result))
        again = self.gradient_checkpointing and self.training  # which keeps tensors alone
        return x, len(waiting), *(settle(out) if again else out for _, out in waiting), *losses


def settle(out: Any) -> Tensor:
    """A tensor as it is, or what a pending result gives when it is waited for."""
    return out if isinstance(out, Tensor) else cast("Tensor", out.wait())
