"""Nested feed-forwards: a call, a layer or a token uses the first hidden dimensions alone (MatFormer, 2310.07707)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.routing import MAX_GROUPS
from ._product import CPU_ROWS, apply_linear, even_blocks, is_plain, linear
from .cores import Activation, GatedActivation
from .stack import Branch, Step


@dataclass
class TokenWidths:
    """A width for each token, with the orders and plans that products with them need, made once for all layers.

    Attributes:
        indices: int64 [T]: which of the widths each token has.
        widths: numbers of hidden dimensions, increasing.
    """

    indices: Tensor
    widths: tuple[int, ...]
    _groups: tuple[Tensor, Tensor, list[int]] | None = field(default=None, repr=False)
    _plans: dict[tuple[int, int], tuple[ops.RoutingPlan, ops.RoutingPlan]] = field(default_factory=dict, repr=False)

    @property
    def unit(self) -> int:
        """Hidden dimensions of a group, which divides every width."""
        return math.gcd(*self.widths)

    @property
    def each(self) -> Tensor:
        """int64 [T]: the number of hidden dimensions of each token."""
        # A table of the widths would be copied from the host.
        steps = zip(self.widths[1:], self.widths, strict=False)
        more = [(self.indices > i) * (wide - narrow) for i, (wide, narrow) in enumerate(steps)]
        return sum(more, torch.full_like(self.indices, self.widths[0]))

    def groups(self) -> tuple[Tensor, Tensor, list[int]]:
        """The tokens sorted by width, int64 [T]; the place of each in that order, int64 [T]; how many have each width.

        It reads the indices on the host.
        """
        if self._groups is None:
            order = self.indices.argsort(stable=True)
            counts = self.indices.bincount(minlength=len(self.widths)).tolist()
            self._groups = order, order.argsort(), counts
        return self._groups

    def plans(self, size: int, parts: int) -> tuple[ops.RoutingPlan, ops.RoutingPlan]:
        """The plans of the products in and out of `size` hidden dimensions, where the product in makes `parts` of each.

        Nothing is read on the host.
        """
        if (size, parts) not in self._plans:
            groups = size // self.unit
            widths = (self.each // self.unit).clamp(max=groups)
            out = ops.RoutingPlan.prefix(widths, groups)
            # Gate and up lie behind each other, so the masks repeat.
            into = out if parts == 1 else ops.RoutingPlan.from_mask(out.selected.repeat(1, parts))
            self._plans[size, parts] = into, out
        return self._plans[size, parts]


class NestedFeedForward(Branch):
    """A feed-forward branch of which the first m hidden dimensions are a feed-forward too, for any m.

    T_m(x) = act(x W1[:m]^T) W2[:, :m]^T (arXiv 2310.07707, equation 1), of norm(x); with a gate, the first m rows of
    its weight too. `Step.width` says how many are used: None, all; a sequence, one number for each layer, where numbers
    above the size mean all; a `TokenWidths`, one for each token.

    One number for all tokens takes slices of the two weights, which are views. Numbers for each token are grouped by
    them on a CPU; elsewhere, and where a compiler looks, the products are `ops.hidden_scatter_linear` and
    `ops.hidden_gather_linear`, which read nothing on the host. Where modules stand in the place of the linear ones,
    such as adapters, they are called whole, and 0 is put where a token has no hidden dimension; so it is too where the
    greatest common divisor of the widths makes more groups than the routed products take.

    Args:
        hidden_size: of x.
        size: hidden dimensions in all.
        layer: the place in a sequence of widths.
        activation: one of `ACTIVATIONS`.
        gated: whether the activation is of a gate that is multiplied with a second product, as in SwiGLU.
        bias: whether the products have biases.
        eps: of the RMSNorm before it.
    """

    def __init__(
        self,
        hidden_size: int,
        size: int,
        layer: int,
        *,
        activation: str = "silu",
        gated: bool = True,
        bias: bool = False,
        eps: float = 1e-6,
    ) -> None:
        parts = 2 if gated else 1
        super().__init__(
            nn.RMSNorm(hidden_size, eps),
            nn.Linear(hidden_size, parts * size, bias=bias),
            GatedActivation(activation) if gated else Activation(activation),
            nn.Linear(size, hidden_size, bias=bias),
        )
        self.size, self.layer, self.parts = size, layer, parts

    def cut(self, width: int) -> dict[str, Tensor]:
        """The weights of the feed-forward of `width` hidden dimensions, by the names of this one's; copies."""
        own = {name: weight for name, weight in self.state_dict(keep_vars=True).items() if isinstance(weight, Tensor)}
        for name in ("inwards.weight", "inwards.bias"):
            if name in own:
                own[name] = own[name].unflatten(0, (self.parts, -1))[:, :width].flatten(0, 1)
        own["outwards.weight"] = own["outwards.weight"][:, :width]
        return {name: weight.detach().clone(memory_format=torch.contiguous_format) for name, weight in own.items()}

    def body(self, x: Tensor, step: Step, cache: None = None) -> Tensor:
        """x: [T, hidden], normalised -> [T, hidden]."""
        width = step.width
        if width is None:
            return cast("Tensor", super().body(x, step, cache))
        if not isinstance(width, TokenWidths):
            return self._of_width(x, width[self.layer], step)
        if not self._is_plain() or (not takes_groups(x) and self.parts * self.size > MAX_GROUPS * width.unit):
            return self._masked(x, width.each.unsqueeze(1))
        if takes_groups(x):
            order, inverse, counts = width.groups()
            pieces = zip(width.widths, x[order].split(counts), strict=True)
            outs = [self._of_width(piece, m, step) for m, piece in pieces if len(piece) or not len(x)]
            return torch.cat(outs)[inverse]
        into, out = width.plans(self.size, self.parts)
        first, last = self._linears()
        hidden = self.core(ops.hidden_scatter_linear(x, first.weight, into, bias=first.bias))
        return ops.hidden_gather_linear(hidden, last.weight, out, bias=last.bias)

    def _linears(self) -> tuple[nn.Linear, nn.Linear]:
        return cast("nn.Linear", self.inwards), cast("nn.Linear", self.outwards)

    def _is_plain(self) -> bool:
        return is_plain(self.inwards, nn.Linear) and is_plain(self.outwards, nn.Linear)

    def _of_width(self, x: Tensor, width: int, step: Step) -> Tensor:
        if width >= self.size:
            return cast("Tensor", super().body(x, step))
        if not self._is_plain():
            return self._masked(x, width)
        if self._takes_blocks(x):
            return torch.cat([self._sliced(rows, width) for rows in even_blocks(x, CPU_ROWS)])
        return self._sliced(x, width)

    def _sliced(self, x: Tensor, width: int) -> Tensor:
        first, last = self._linears()
        weights = self._first(first.weight, width)
        biases = (None,) * self.parts if first.bias is None else self._first(first.bias, width)
        products = [linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
        core = cast("GatedActivation | Activation", self.core)
        hidden = core.gated(*products) if isinstance(core, GatedActivation) else core(*products)
        return linear(hidden, last.weight[:, :width], last.bias)

    def _first(self, weight: Tensor, width: int) -> Sequence[Tensor]:
        """The first rows of each part of a weight or bias, views. One slice serves all, so that one gradient does."""
        return weight.unflatten(0, (self.parts, -1))[:, :width].unbind(0)

    def _masked(self, x: Tensor, width: Tensor | int) -> Tensor:
        hidden = self.core(apply_linear(x, self.inwards))
        used = torch.arange(self.size, device=x.device) < width
        return apply_linear(torch.where(used, hidden, 0), self.outwards)


def takes_groups(x: Tensor) -> bool:
    """Tells whether rows of different widths are grouped, which reads the widths on the host."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


__all__ = ["NestedFeedForward", "TokenWidths"]
