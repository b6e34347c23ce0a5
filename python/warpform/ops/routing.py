"""Which groups of hidden dimensions each token uses, and the order of tokens in which products skip the rest."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _check, _errors
from ._register import register_op
from .examples import hidden as examples
from .reference import hidden as reference

MAX_GROUPS = 64  # bits of a mask


def _mask_fake(idx: Tensor, num_groups: int, num_shared: int) -> Tensor:
    return idx.new_empty(idx.size(0), dtype=torch.int64)


def _plan_fake(
    group_mask: Tensor, token_class: Tensor | None, num_groups: int, num_classes: int, tile: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tiles = reference.plan_tiles(group_mask.size(0), num_classes, tile)
    return (
        group_mask.new_empty(tiles * tile, dtype=torch.int32),
        group_mask.new_empty(group_mask.size(0), dtype=torch.int32),
        group_mask.new_empty(tiles),
        group_mask.new_empty(tiles, dtype=torch.int32),
    )


_routing_mask = register_op(
    "routing_mask", reference=reference.routing_mask, fake=_mask_fake, example=examples.routing_mask
)
_routing_plan = register_op(
    "routing_plan", reference=reference.routing_plan, fake=_plan_fake, example=examples.routing_plan
)


@dataclass(frozen=True, eq=False)
class RoutingPlan:
    """Tokens sorted by the groups of hidden dimensions that they use, for `hidden_gather_linear` and its like.

    A pytree of device tensors whose sizes follow from the number of tokens, groups, classes and the tile, so that
    nothing is read from the device, and a captured CUDA graph or a compiled function serves any routing. Equal masks
    are neighbours (the sort is stable), so that the tokens of a tile use few groups between them; a tile whose union of
    masks lacks a group skips it. Where the tiles together would use more than 85 % of all groups, each uses all.

    Attributes:
        group_mask: int64 [T]: bit g of a token's mask says that it uses group g.
        perm: int32 [tiles * tile]: the token at each place of the sorted order, -1 where there is none.
        inverse: int32 [T]: the place of each token.
        tile_mask: int64 [tiles]: the groups that a tile works on; 0 for a tile without tokens.
        tile_class: int32 [tiles]: the class of a tile's tokens; no tile mixes classes.
        out_mask: int64 [num_out] or None: the groups that each part of the other dimension sees (`lower_triangular`).
        num_groups: groups of the routed dimension, 1 to 64.
        num_classes: weights to choose among.
    """

    group_mask: Tensor
    perm: Tensor
    inverse: Tensor
    tile_mask: Tensor
    tile_class: Tensor
    out_mask: Tensor | None
    num_groups: int
    num_classes: int

    @property
    def tokens(self) -> int:
        """T."""
        return self.group_mask.size(0)

    @property
    def selected(self) -> Tensor:
        """bool [T, num_groups]: the groups of each token."""
        return reference.unpack_bits(self.group_mask, self.num_groups)

    @property
    def token_class(self) -> Tensor:
        """int64 [T]: the class of each token."""
        return self._routing().token_class

    @functools.cached_property
    def class_rows(self) -> tuple[Tensor, ...]:
        """For each class int64 [its tokens]: the rows of its tokens, in order. It reads the device, once for a plan."""
        token_class = self.token_class
        return tuple((token_class == c).nonzero().flatten() for c in range(self.num_classes))

    @classmethod
    def from_topk(cls, idx: Tensor, *, num_groups: int, num_shared: int = 0, tile: int = 128) -> RoutingPlan:
        """The plan of a router that chooses k groups for each token (MoHD, arXiv 2412.05644).

        Args:
            idx: integer [T, k], over all groups, in any order; one that is named twice counts once.
            num_groups: groups in all.
            num_shared: so many of the first are used by every token, whether idx names them or not.
            tile: tokens that are worked on together; the kernels take 128.

        Raises:
            TypeError: idx is not an integer tensor, or a number is not an int.
            ValueError: idx is not two-dimensional, num_groups is not within 1 to 64 or num_shared not within it, or an
                index is outside of [0, num_groups); the last is seen on a CPU and with WARPFORM_VALIDATE=1, elsewhere
                such an index is dropped.
        """
        op = "RoutingPlan.from_topk"
        group_mask = _errors.called_by(op, _routing_mask, idx, num_groups, num_shared)
        _check_values(op, "idx", idx, num_groups)
        return cls._of_mask(op, group_mask, num_groups, tile)

    @classmethod
    def from_mask(cls, mask: Tensor, *, tile: int = 128) -> RoutingPlan:
        """The plan of any choice: mask, bool [T, num_groups], says which groups each token uses.

        Raises:
            TypeError: mask is not a bool tensor.
            ValueError: mask is not two-dimensional, or has more than 64 groups or none.
        """
        op = "RoutingPlan.from_mask"
        _check_mask(op, mask)
        return cls._of_mask(op, reference.pack_bits(mask), mask.size(1), tile)

    @classmethod
    def prefix(cls, widths: Tensor, num_groups: int, *, tile: int = 128) -> RoutingPlan:
        """Nested models (MatFormer, arXiv 2310.07707): token t uses the first widths[t] groups, integer [T].

        Raises:
            TypeError, ValueError: as from_topk; a width outside of 0 to num_groups counts as the nearest of them where
                it is not seen.
        """
        op = "RoutingPlan.prefix"
        _check_groups(op, "num_groups", num_groups)
        _check_integers(op, "widths", widths)
        _check_values(op, "widths", widths, num_groups + 1)
        mask = torch.arange(num_groups, device=widths.device) < widths.unsqueeze(1)
        return cls._of_mask(op, reference.pack_bits(mask), num_groups, tile)

    @classmethod
    def lower_triangular(
        cls, tokens: int, num_in: int, num_out: int, *, tile: int = 128, device: torch.device | str | None = None
    ) -> RoutingPlan:
        """Block lower-triangular weights: part o of num_out sees groups g of num_in, g / num_in < (o + 1) / num_out.

        Every token uses all groups. In `hidden_scatter_linear` the plan means the transposed weight: x comes in num_out
        parts, and group g of the output sees the parts whose mask has its bit.

        Raises:
            TypeError: a number is not an int.
            ValueError: num_in is not within 1 to 64, num_out is below 1, or tokens is negative.
        """
        op = "RoutingPlan.lower_triangular"
        _check_groups(op, "num_in", num_in)
        for name, value, least in (("tokens", tokens, 0), ("num_out", num_out, 1)):
            _check.integer(op, name, value)
            if value < least:
                raise ValueError(f"{op}: {name} must be at least {least}, got {value}")
        g, o = torch.arange(num_in, device=device), torch.arange(num_out, device=device).unsqueeze(1)
        return cls._of_parts(op, tokens, g * num_out < (o + 1) * num_in, tile)

    @classmethod
    def chains(
        cls, tokens: int, sizes: Sequence[int], *, tile: int = 128, device: torch.device | str | None = None
    ) -> RoutingPlan:
        """Block lower-triangular weights of unequal parts: chain i sees the chains up to i (arXiv 2505.11820).

        Both dimensions of the weight come in chains whose widths are in the proportion of `sizes`, so that sizes may be
        the widths themselves. A group, and a part of the other dimension, has the width of the greatest common divisor
        of the sizes: num_groups is the sum of the sizes over it. For equal sizes it is
        `lower_triangular(tokens, len(sizes), len(sizes))`.

        Every token uses all groups. `hidden_gather_linear` with the plan is `nn.ChainLinear` from its dense weight; in
        `hidden_scatter_linear` the plan means the transposed weight, as that of `lower_triangular` does: chain i of the
        output sees the chains from i on.

        Raises:
            TypeError: a number is not an int.
            ValueError: there are no sizes, one is below 1, they come to more than 64 of their greatest common divisor,
                or tokens is negative.
        """
        op = "RoutingPlan.chains"
        _check.integer(op, "tokens", tokens)
        if tokens < 0:
            raise ValueError(f"{op}: tokens must be at least 0, got {tokens}")
        for size in sizes:
            _check.integer(op, "sizes", size)
        if not sizes or min(sizes) < 1:
            raise ValueError(f"{op}: sizes must be at least one number of at least 1, got {list(sizes)}")
        counts = [size // math.gcd(*sizes) for size in sizes]
        if sum(counts) > MAX_GROUPS:
            raise ValueError(
                f"{op}: sizes must come to at most {MAX_GROUPS} of their greatest common divisor, got {list(sizes)}"
            )
        chain = torch.tensor([i for i, count in enumerate(counts) for _ in range(count)], device=device)
        return cls._of_parts(op, tokens, chain <= chain.unsqueeze(1), tile)

    @classmethod
    def by_class(
        cls, token_class: Tensor, num_classes: int, mask: Tensor | None = None, *, tile: int = 128
    ) -> RoutingPlan:
        """A weight for each class of tokens (Mixture-of-Transformers, arXiv 2411.04996), w [num_classes, ...].

        Args:
            token_class: integer [T], the class of each token, say its modality.
            num_classes: weights.
            mask: bool [T, num_groups], as from_mask; by default one group that every token uses.

        Raises:
            TypeError: token_class is not an integer tensor, mask is not bool.
            ValueError: a wrong shape, or a class outside of [0, num_classes); where it is not seen, it counts as the
                nearest.
        """
        op = "RoutingPlan.by_class"
        _check_integers(op, "token_class", token_class)
        if mask is None:
            mask = torch.ones(token_class.size(0), 1, dtype=torch.bool, device=token_class.device)
        _check_mask(op, mask)
        if mask.size(0) != token_class.size(0):
            raise ValueError(
                f"{op}: mask must be of shape [{token_class.size(0)}, num_groups] as token_class has as many tokens, "
                f"got {_check.describe(mask)}"
            )
        _check.same_device(op, "mask", mask, "token_class", token_class)
        plan = cls._of_mask(op, reference.pack_bits(mask), mask.size(1), tile, token_class, num_classes)
        _check_values(op, "token_class", token_class, num_classes)
        return plan

    @classmethod
    def _of_parts(cls, function: str, tokens: int, sees: Tensor, tile: int) -> RoutingPlan:
        """Every token uses all groups; sees, bool [num_out, num_in], says which of them each part sees."""
        num_in = sees.size(1)
        mask = torch.full((tokens,), -1 if num_in == 64 else 2**num_in - 1, dtype=torch.int64, device=sees.device)
        return cls._of_mask(function, mask, num_in, tile, out_mask=reference.pack_bits(sees))

    @classmethod
    def _of_mask(
        cls,
        function: str,
        group_mask: Tensor,
        num_groups: int,
        tile: int,
        token_class: Tensor | None = None,
        num_classes: int = 1,
        out_mask: Tensor | None = None,
    ) -> RoutingPlan:
        perm, inverse, tile_mask, tile_class = _errors.called_by(
            function, _routing_plan, group_mask, token_class, num_groups, num_classes, tile
        )
        return cls(group_mask, perm, inverse, tile_mask, tile_class, out_mask, num_groups, num_classes)

    def _routing(self) -> reference.Routing:
        return reference.Routing(
            self.group_mask,
            self.perm,
            self.inverse,
            self.tile_mask,
            self.tile_class,
            self.out_mask,
            self.num_groups,
            self.num_classes,
        )

    def arguments(self) -> tuple[Tensor | int | None, ...]:
        """Returns the part of the plan that the ops of `torch.ops.warpform` take, in the order of their arguments."""
        return (
            self.group_mask,
            self.perm,
            self.inverse,
            self.tile_mask,
            self.tile_class,
            self.out_mask,
            self.num_groups,
            self.num_classes,
        )


torch.serialization.add_safe_globals([RoutingPlan])
torch.export.register_dataclass(RoutingPlan, serialized_type_name="warpform.RoutingPlan")


# ---- checks of arguments of which a constructor makes the tensors that the ops take ----


def _check_groups(op: str, name: str, num_groups: int) -> None:
    _check.integer(op, name, num_groups)
    if not 1 <= num_groups <= MAX_GROUPS:
        raise ValueError(f"{op}: {name} must be within 1 to {MAX_GROUPS}, got {num_groups}")


def _check_integers(op: str, name: str, value: Tensor) -> None:
    _check.tensor(op, name, value)
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{op}: {name} must be integers, got {_check.describe(value)}")
    if value.dim() != 1:
        raise ValueError(f"{op}: {name} must be of shape [tokens], got {_check.describe(value)}")


def _check_values(op: str, name: str, value: Tensor, end: int) -> None:
    """Raises for values outside of [0, end), where reading them costs nothing or was asked for."""
    if not _check.cheap_to_read(value) or not value.numel():
        return
    least, most = (int(v) for v in value.aminmax())
    if least < 0 or most >= end:
        raise ValueError(f"{op}: {name} must be within 0 to {end - 1}, got {least if least < 0 else most}")


def _check_mask(op: str, mask: Tensor) -> None:
    _check.tensor(op, "mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"{op}: mask must be bool, got {_check.describe(mask)}")
    if mask.dim() != 2:
        raise ValueError(f"{op}: mask must be of shape [tokens, num_groups], got {_check.describe(mask)}")
    _check_groups(op, "mask's num_groups", mask.size(1))
