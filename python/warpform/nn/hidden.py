"""Mixture of hidden dimensions (MoHD, arXiv 2412.05644): a router and the layers that use what it chose."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _autocast, ops
from ..ops import RoutingPlan
from ..ops._dtypes import accumulation_dtype
from ._product import linear

SCALE_MODES = ("sum", "groups", "active", "none")


@dataclass
class Routed:
    """The choices of a router for T tokens.

    Attributes:
        plan: the groups of each token.
        gates: float32 (float64 for float64 inputs) [T, num_groups], scale and all, 0 where a group is not used; None
            where gates are 1.
        balance_loss: a scalar, 1 where the tokens spread evenly over the specialised groups.
    """

    plan: RoutingPlan
    gates: Tensor | None
    balance_loss: Tensor


class HiddenRouter(nn.Module):
    """Chooses groups of hidden dimensions for each token: the shared ones, and the best top_k of the others.

    s = softmax(x C^T) with C [num_groups, hidden_size], in float32. The gate of a group that a token uses is s times
    the activation scale alpha:

    | scale_mode | alpha                         |                                                      |
    |------------|-------------------------------|------------------------------------------------------|
    | "sum"      | num_groups * (sum of used s)  | as the paper's scale was reported; not certain       |
    | "groups"   | num_groups                    | even scores give gates of 1: magnitudes are kept     |
    | "active"   | used groups / (sum of used s) | the gates of a token have mean 1, whatever the scores |
    | "none"     | 1                             | the scores themselves                                |

    The balance loss is Switch's (arXiv 2101.03961, equation 4) over the specialised groups: their number times the sum
    over them of (share of choices) * (mean probability among them).

    Args:
        hidden_size: of the tokens.
        num_groups: N, 1 to 64.
        num_shared: so many of the first are always used.
        top_k: specialised groups for each token.
        scale_mode: the table above.
        renormalise: divide the scores of a token's groups by their sum before they are scaled.
        gated: False: gates are 1 (None), and the balance loss alone trains the router.

    Raises:
        ValueError: sizes that do not fit, an unknown scale_mode.
    """

    def __init__(
        self,
        hidden_size: int,
        num_groups: int = 16,
        num_shared: int = 6,
        top_k: int = 2,
        *,
        scale_mode: str = "sum",
        renormalise: bool = False,
        gated: bool = True,
    ) -> None:
        super().__init__()
        if not 0 <= num_shared <= num_groups:
            raise ValueError(f"num_shared must be within 0 to num_groups, {num_groups}, got {num_shared}")
        if not 0 <= top_k <= num_groups - num_shared:
            raise ValueError(f"top_k must be within 0 to the {num_groups - num_shared} specialised groups, got {top_k}")
        if scale_mode not in SCALE_MODES:
            raise ValueError(f"scale_mode must be one of {', '.join(SCALE_MODES)}, got {scale_mode!r}")
        self.num_groups, self.num_shared, self.top_k = num_groups, num_shared, top_k
        self.scale_mode, self.renormalise, self.gated = scale_mode, renormalise, gated
        self.centroids = nn.Parameter(torch.empty(num_groups, hidden_size))
        nn.init.normal_(self.centroids, std=hidden_size**-0.5)

    def forward(self, x: Tensor) -> Routed:
        """x: [T, hidden_size]. Nothing is read from the device."""
        wide = accumulation_dtype(x.dtype)
        with _autocast.off(x.device):
            scores = linear(x.to(wide), self.centroids.to(wide)).softmax(1)
        specialised = scores[:, self.num_shared :]
        chosen = specialised.detach().topk(self.top_k, 1).indices
        plan = RoutingPlan.from_topk(chosen + self.num_shared, num_groups=self.num_groups, num_shared=self.num_shared)
        gates = self._gates(scores, plan.selected) if self.gated else None
        return Routed(plan, gates, self._balance_loss(specialised, chosen))

    def _gates(self, scores: Tensor, selected: Tensor) -> Tensor:
        used = scores * selected
        total = used.sum(1, keepdim=True)
        if self.renormalise:
            used = used / total
            total = torch.ones_like(total)
        active = self.num_shared + self.top_k
        if self.scale_mode == "sum":
            return used * total * self.num_groups
        if self.scale_mode == "groups":
            return used * self.num_groups
        return used * (active / total) if self.scale_mode == "active" else used

    def _balance_loss(self, specialised: Tensor, chosen: Tensor) -> Tensor:
        tokens, groups = specialised.shape
        if groups == 0 or self.top_k == 0:
            return specialised.new_zeros(())
        # Sums over at least one token, not means: no tokens give 0, which a traced program may find out when it runs.
        tokens = torch.sym_max(tokens, 1)
        share = F.one_hot(chosen, groups).to(specialised.dtype).sum((0, 1)) / (tokens * self.top_k)
        probability = (specialised / specialised.sum(1, keepdim=True)).sum(0) / tokens
        return groups * (share * probability).sum()

    def extra_repr(self) -> str:
        return (
            f"num_groups={self.num_groups}, num_shared={self.num_shared}, top_k={self.top_k}, "
            f"scale_mode={self.scale_mode!r}, renormalise={self.renormalise}, gated={self.gated}"
        )


class HiddenLinear(nn.Linear):
    """A linear layer whose input ("in") or output ("out") is routed; weights are named and shaped as nn.Linear's.

    Called without a plan it is nn.Linear.

    Args:
        in_features, out_features, bias: as in nn.Linear.
        route: "in" or "out"; those features come in groups.

    Raises:
        ValueError: another `route`.
    """

    def __init__(self, in_features: int, out_features: int, *, route: str, bias: bool = False) -> None:
        if route not in ("in", "out"):
            raise ValueError(f'route must be "in" or "out", got {route!r}')
        super().__init__(in_features, out_features, bias)
        self.route = route

    def forward(self, x: Tensor, plan: RoutingPlan | None = None, gates: Tensor | None = None) -> Tensor:
        """x: [T, in_features] -> [T, out_features]; of a routed output the groups that a token does not use are 0.

        plan and gates are as `Routed` has them, of T tokens.
        """
        if plan is None:
            return super().forward(x)
        product = ops.hidden_gather_linear if self.route == "in" else ops.hidden_scatter_linear
        return product(x, self.weight, plan, gates, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, route={self.route!r}"


class GroupFusion(nn.Module):
    """Lets groups that were computed apart see each other: a Monarch matrix over the hidden dimensions.

    hidden_size = N m costs N m^2 + m N^2 multiplications a token instead of (N m)^2: one product within each group,
    one across the groups at each place. It begins as the identity, so that a layer begins like a layer without it.

    Args:
        hidden_size: N * m.
        num_groups: N.

    Raises:
        ValueError: num_groups does not divide hidden_size.
    """

    def __init__(self, hidden_size: int, num_groups: int) -> None:
        super().__init__()
        if num_groups < 1 or hidden_size % num_groups:
            raise ValueError(f"num_groups must divide hidden_size {hidden_size}, got {num_groups}")
        width = hidden_size // num_groups
        self.within = nn.Parameter(torch.eye(width).repeat(num_groups, 1, 1))
        self.across = nn.Parameter(torch.eye(num_groups).repeat(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., hidden_size] -> the same shape."""
        return ops.monarch_multiply(x, self.within, self.across)

    def extra_repr(self) -> str:
        groups, width, _ = self.within.shape
        return f"hidden_size={groups * width}, num_groups={groups}"
