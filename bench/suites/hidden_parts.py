"""Parts of layers with sparse hidden dimensions by themselves: the plan of a batch, and the gradient of weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import harness
import torch
from harness import Case, Session
from torch import Tensor

import warpform
from helpers.compare import assert_close
from warpform.ops import RoutingPlan

GROUPS, SHARED, CHOSEN = 16, 6, 2


def draw_choices(tokens: int, device: str) -> Tensor:
    """int64 [tokens, CHOSEN]: different groups that are not shared."""
    return torch.rand(tokens, GROUPS - SHARED, device=device).argsort(1)[:, :CHOSEN] + SHARED


def used_groups(chosen: Tensor) -> Tensor:
    """bool [tokens, GROUPS]."""
    used = torch.zeros(chosen.size(0), GROUPS, dtype=torch.bool, device=chosen.device).scatter_(1, chosen, True)
    used[:, :SHARED] = True
    return used


class PlanCase(Case):
    """Choices [tokens, CHOSEN] in; out come the masks of groups, and an order of tokens that brings like together."""

    def __init__(self, spec: Any, session: Session) -> None:
        self.tokens, self.device = spec.tokens, session.device
        self.flops, self.bytes = spec.work(session.dtype.itemsize)
        count = harness.copies(self.device, self.bytes)
        self.inputs = [draw_choices(spec.tokens, self.device) for _ in range(count)]

    def with_warpform(self) -> list[Callable[[], Any]]:
        def plan(chosen: Tensor) -> tuple[Tensor, ...]:
            made = RoutingPlan.from_topk(chosen, num_groups=GROUPS, num_shared=SHARED)
            return made.group_mask, made.perm, made.inverse, made.tile_mask

        return [functools.partial(plan, chosen) for chosen in self.inputs]

    def with_torch_sort(self) -> list[Callable[[], Any]]:
        """The masks, and a stable sort by them."""

        def plan(chosen: Tensor) -> tuple[Tensor, Tensor]:
            mask = self.mask_of(chosen)
            return mask, mask.argsort(stable=True)

        return [functools.partial(plan, chosen) for chosen in self.inputs]

    def mask_of(self, chosen: Tensor) -> Tensor:
        """int64 [tokens], a bit for each group in use."""
        return (1 << chosen).sum(1) + ((1 << SHARED) - 1)

    def check(self, provider: str, output: Sequence[Tensor]) -> None:
        mask, order = output[:2]
        assert torch.equal(mask, self.mask_of(self.inputs[0])), "masks: other groups"
        tokens = torch.arange(self.tokens, device=mask.device)
        places = order[order >= 0].long()
        assert torch.equal(places.sort().values, tokens), "order: not every token once"
        if len(output) == 2:  # of the sort
            assert bool((mask[places].diff() >= 0).all()), "order: masks are not sorted"
            return
        inverse, tile_mask = output[2:]
        assert bool(((inverse >= 0) & (inverse < order.numel())).all()), "inverse: places that are not there"
        assert torch.equal(order[inverse.long()].long(), tokens), "inverse: other places than those of the order"
        of_slot = torch.where(order >= 0, mask[order.clamp(min=0).long()], 0).view(tile_mask.numel(), -1)
        bits = torch.arange(GROUPS, device=mask.device)
        union = (((of_slot[..., None] >> bits) & 1).amax(1) << bits).sum(1)
        # A plan may take in all groups where tiles leave out next to none.
        assert torch.equal(union & tile_mask, union), "tiles: not all groups of their tokens"
        assert bool((tile_mask < 1 << GROUPS).all()), "tiles: groups that are not there"


class WeightGradientCase(Case):
    """x and dout [tokens, width]: dout^T (c x), where c are a token's gates of the groups that it uses."""

    def __init__(self, spec: Any, session: Session) -> None:
        self.session = session
        tokens, width, size = spec.tokens, spec.width, session.dtype.itemsize
        self.flops, self.bytes = spec.work(size)
        make = functools.partial(torch.randn, tokens, width, device=session.device, dtype=session.dtype)
        self.inputs = []
        for _ in range(harness.copies(session.device, 2 * tokens * width * size)):
            chosen = draw_choices(tokens, session.device)
            plan = RoutingPlan.from_topk(chosen, num_groups=GROUPS, num_shared=SHARED)
            self.inputs.append((make(), make(), torch.rand(tokens, GROUPS, device=session.device), chosen, plan))

    def with_warpform(self) -> list[Callable[[], Any]]:
        """The plan is there: both of a layer's products use it too."""

        def gradient(x: Tensor, dout: Tensor, gates: Tensor, _: Tensor, plan: RoutingPlan) -> Tensor:
            return warpform.ops.hidden_weight_grad(x, dout, plan, gates, routed="in")

        return [functools.partial(gradient, *given) for given in self.inputs]

    def with_masked_dense(self) -> list[Callable[[], Any]]:
        return [functools.partial(self.masked, *given[:4]) for given in self.inputs]

    def with_dense(self) -> list[Callable[[], Any]]:
        """Every dimension, no gates: what half of the groups should take half the time of."""
        return [functools.partial(lambda x, dout, *_: dout.t() @ x, *given) for given in self.inputs]

    def masked(self, x: Tensor, dout: Tensor, gates: Tensor, chosen: Tensor) -> Tensor:
        factor = (gates * used_groups(chosen)).to(x.dtype)
        return dout.t() @ (x * factor.repeat_interleave(x.size(1) // GROUPS, 1))

    @functools.cached_property
    def truth(self) -> tuple[Tensor, Tensor]:
        """In float64 and in the dtype itself."""
        x, dout, gates, chosen, _ = self.inputs[0]
        exact = self.masked(x.double(), dout.double(), gates.double(), chosen)
        return exact, self.masked(x, dout, gates, chosen)

    def check(self, provider: str, output: Tensor) -> None:
        assert torch.isfinite(output).all(), "not finite"
        if provider == "dense":
            return  # other groups are on: another result, and the time is what is asked for
        exact, eager = self.truth
        if provider == "warpform":
            assert_close("dw", output, exact, eager.to(output.dtype), gradient=True)
        else:
            harness.assert_near("dw", output, exact, eager)
