"""Linear layers that read or write the hidden dimensions that a token uses, against products with all of them.

Tokens choose 2 of 10 groups at random beside 6 that all use. warpform's time has the plan's in it. "warpform_all_on" is
the same kernel with every group in use: half of the groups should take half of its time, so the share of the ideal
speed-up is a row's ratio to it, divided by 2. "warpform_mma_sync" has the kernels for every GPU where plain calls take
kernels for Hopper.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import harness
import torch
import torch.nn.functional as F
from harness import Case, Missing, Session
from torch import Tensor

import warpform
from helpers.compare import assert_close
from suites.hidden_parts import CHOSEN, GROUPS, SHARED, PlanCase, WeightGradientCase
from warpform.ops import RoutingPlan

PROVIDERS = ("warpform", "warpform_all_on", "warpform_mma_sync", "dense", "masked_dense", "index_select", "grouped_mm")
GRADIENT_PROVIDERS = ("warpform", "dense", "masked_dense")
PLAN_PROVIDERS = ("warpform", "torch_sort")

# (tokens, width), square weights.
SIZES: dict[str, tuple[tuple[int, int], ...]] = {
    "tiny": ((5, 128), (150, 128)),
    "cpu": ((1, 2048), (4, 2048), (2048, 1024), (8192, 2048)),
    "cuda": tuple((tokens, width) for width in (1024, 2048, 4096) for tokens in (1, 4, 2048, 8192, 32768, 131072)),
}

MAIN = ((4, 2048), (8192, 2048))
# Main ones of the layers, forward alone. Where half of the groups are in use, 1.5 times the speed of cuBLAS's dense
# product is aimed at.
MAIN_FORWARD = ((8192, 4096),)


@dataclass(frozen=True)
class Spec(harness.Spec):
    tokens: int = 1
    width: int = 0  # of a plan none

    family = "hidden"

    def __str__(self) -> str:
        return f"{self.kernel}-{self.direction}-T{self.tokens}{f'-d{self.width}' if self.width else ''}"

    def work(self, itemsize: int) -> tuple[float, float]:
        """The products of the groups in use; half of one activation, all of the other, the weights in use (for few
        tokens: what any of them uses is not less). Of the weights' gradient alone its product, and it is float32. Of a
        plan the choices in, each token's mask and places out."""
        tokens, width, share = self.tokens, self.width, (SHARED + CHOSEN) / GROUPS
        if self.kernel == "RoutingPlan":
            return 0.0, tokens * (8 * CHOSEN + 8 + 2 * 4)
        both = self.direction == "forward+backward"
        flops = (6 if both else 2) * tokens * width * width * share
        weights = width * width * share * (4 if self.kernel == "hidden_weight_grad" else itemsize)
        return flops, (tokens * width * (1 + share) * itemsize + weights) * (3 if both else 1)

    def build(self, session: Session) -> Case:
        kinds = {"hidden_weight_grad": WeightGradientCase, "RoutingPlan": PlanCase}
        return kinds.get(self.kernel, HiddenCase)(self, session)


def specs(session: Session) -> list[Spec]:
    found = []
    sizes = SIZES["tiny" if session.tiny else session.device]
    for tokens, width in sizes:
        main = harness.is_main(session, (tokens, width) in MAIN)
        main_forward = main or (tokens, width) in MAIN_FORWARD
        columns = {"tokens": tokens, "hidden": width, "grid": f"{SHARED} and {CHOSEN} of {GROUPS} groups"}
        for kernel in ("hidden_gather_linear", "hidden_scatter_linear"):
            for direction in ("forward", "forward+backward")[: 1 if tokens <= 4 else 2]:
                listed = main_forward if direction == "forward" else main
                found.append(Spec(kernel, direction, tuple(columns.items()), PROVIDERS, tokens, width, main=listed))
        if tokens > 4:
            kernel = "hidden_weight_grad"
            found.append(Spec(kernel, "forward", tuple(columns.items()), GRADIENT_PROVIDERS, tokens, width, main=main))
    for tokens in sorted({tokens for tokens, _ in sizes}):
        columns = {"tokens": tokens, "grid": f"{SHARED} and {CHOSEN} of {GROUPS} groups"}
        main = harness.is_main(session, tokens == MAIN[-1][0])
        found.append(Spec("RoutingPlan", "forward", tuple(columns.items()), PLAN_PROVIDERS, tokens, main=main))
    return found


class HiddenCase(Case):
    """x [tokens, width], a square weight, gates and choices. With backward the gradients of x, w and the gates."""

    def __init__(self, spec: Spec, session: Session) -> None:
        self.spec, self.session, self.device = spec, session, session.device
        self.backward = spec.direction == "forward+backward"
        self.routed_out = spec.kernel == "hidden_scatter_linear"
        tokens, width, size = spec.tokens, spec.width, session.dtype.itemsize
        self.flops, self.bytes = spec.work(size)
        make = functools.partial(torch.randn, device=self.device, dtype=session.dtype)
        self.inputs = []
        for _ in range(harness.copies(self.device, (2 * tokens * width + width * width) * size)):
            chosen = torch.rand(tokens, GROUPS - SHARED, device=self.device).argsort(1)[:, :CHOSEN] + SHARED
            gates = torch.rand(tokens, GROUPS, device=self.device)
            tensors = [make(tokens, width), make(width, width) * width**-0.5, gates]
            self.inputs.append((chosen, tensors, make(tokens, width)))

    def calls(self, function: Callable[..., Tensor]) -> list[Callable[[], Any]]:
        return [self.call(function, *given) for given in self.inputs]

    def call(
        self, function: Callable[..., Tensor], chosen: Tensor, tensors: list[Tensor], dout: Tensor
    ) -> Callable[[], Any]:
        return harness.inference_or_step(
            functools.partial(function, chosen), tensors, [dout], self.backward, allow_unused=True
        )

    # ---- what each provider calls ----

    def with_warpform(self) -> list[Callable[[], Any]]:
        return self.calls(functools.partial(self.routed, GROUPS))

    def with_warpform_all_on(self) -> list[Callable[[], Any]]:
        """The same kernel with every group in use."""
        return self.calls(lambda chosen, x, w, gates: self.routed(GROUPS, chosen, x, w, gates, GROUPS))

    def with_warpform_mma_sync(self) -> list[Callable[[], Any]]:
        return harness.on_mma_sync(self.session, self.with_warpform)

    def routed(self, groups: int, chosen: Tensor, x: Tensor, w: Tensor, gates: Tensor, shared: int = SHARED) -> Tensor:
        plan = RoutingPlan.from_topk(chosen, num_groups=groups, num_shared=shared)
        layer = warpform.ops.hidden_scatter_linear if self.routed_out else warpform.ops.hidden_gather_linear
        return layer(x, w, plan, gates)

    def with_dense(self) -> list[Callable[[], Any]]:
        """Every dimension, no gates: what half of the groups should take half the time of."""
        return self.calls(lambda chosen, x, w, gates: F.linear(x, w))

    def with_masked_dense(self) -> list[Callable[[], Any]]:
        return self.calls(self.masked)

    def masked(self, chosen: Tensor, x: Tensor, w: Tensor, gates: Tensor) -> Tensor:
        """Zeros for what is not used, in one dense product."""
        used = torch.zeros_like(gates).scatter_(1, chosen, 1.0)
        used[:, :SHARED] = 1.0
        factor = (gates * used).to(x.dtype).repeat_interleave(x.size(1) // GROUPS, 1)
        return F.linear(x, w) * factor if self.routed_out else F.linear(x * factor, w)

    def with_index_select(self) -> list[Callable[[], Any]]:
        """For each group the tokens that use it, gathered, multiplied, added. On a GPU it waits to count them."""
        return self.calls(self.by_group)

    def by_group(self, chosen: Tensor, x: Tensor, w: Tensor, gates: Tensor) -> Tensor:
        width = x.size(1) // GROUPS
        shared = slice(0, SHARED * width)
        factor = gates.to(x.dtype)
        lead = factor[:, :SHARED].repeat_interleave(width, 1)
        if self.routed_out:
            parts = [F.linear(x, w[shared]) * lead]
            for g in range(SHARED, GROUPS):
                rows = (chosen == g).any(1).nonzero().flatten()
                mine = F.linear(x[rows], w[g * width : (g + 1) * width]) * factor[rows, g, None]
                parts.append(x.new_zeros(x.size(0), width).index_add(0, rows, mine))
            return torch.cat(parts, 1)
        out = F.linear(x[:, shared] * lead, w[:, shared])
        for g in range(SHARED, GROUPS):
            rows = (chosen == g).any(1).nonzero().flatten()
            columns = slice(g * width, (g + 1) * width)
            out = out.index_add(0, rows, F.linear(x[rows, columns] * factor[rows, g, None], w[:, columns]))
        return out

    def with_grouped_mm(self) -> list[Callable[[], Any]]:
        """torch's grouped product over (token, chosen group) pairs by group, beside a dense one of the shared."""
        self.session.need_gpu()
        if self.routed_out or self.backward:
            raise Missing("timed for the layer that reads groups, forward")
        if self.spec.tokens < GROUPS:
            raise Missing("fewer tokens than groups")
        return self.calls(self.by_grouped_product)

    def by_grouped_product(self, chosen: Tensor, x: Tensor, w: Tensor, gates: Tensor) -> Tensor:
        width = x.size(1) // GROUPS
        flat = chosen.flatten() - SHARED
        order = flat.argsort(stable=True)
        ends = torch.bincount(flat, minlength=GROUPS - SHARED).cumsum(0).to(torch.int32)
        token = order // CHOSEN
        factor = gates.to(x.dtype)
        pieces = x.view(-1, GROUPS, width)[token, flat[order] + SHARED]
        pieces = pieces * factor[token, flat[order] + SHARED, None]
        weights = w[:, SHARED * width :].t().reshape(GROUPS - SHARED, width, -1)
        products = torch._grouped_mm(pieces, weights, offs=ends)
        lead = factor[:, :SHARED].repeat_interleave(width, 1)
        out = F.linear(x[:, : SHARED * width] * lead, w[:, : SHARED * width])
        return out.index_add(0, token, products)

    # ---- what has to come out ----

    @functools.cached_property
    def truth(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """In float64 and in the dtype itself."""
        chosen, tensors, dout = self.inputs[0]
        results = []
        for dtype in (torch.float64, self.session.dtype):
            leaves = [t.to(dtype).requires_grad_(self.backward) for t in tensors]
            out = self.masked(chosen, *leaves)
            grads = torch.autograd.grad(out, leaves, dout.to(dtype)) if self.backward else ()
            results.append((out.detach(), *grads))
        return results[0], results[1]

    def check(self, provider: str, output: Sequence[Tensor]) -> None:
        for tensor in output:
            assert tensor is None or torch.isfinite(tensor).all(), "not finite"
        if provider in ("dense", "warpform_all_on"):
            return  # other groups are on: another result, and the time is what is asked for
        for name, actual, wanted, eager in zip(("out", "dx", "dw", "dgates"), output, *self.truth, strict=False):
            if provider.startswith("warpform"):
                assert_close(name, actual, wanted, eager.to(actual.dtype), gradient=name != "out")
            else:
                harness.assert_near(name, actual, wanted, eager.to(actual.dtype))


def test_hidden(spec: Spec, provider: str, measure: Callable[[harness.Spec, str], None]) -> None:
    measure(spec, provider)
