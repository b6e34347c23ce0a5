"""The branches of MoHD, whose products read and write the dimensions that a router chose, and their stack."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ...nn._checkpoint import CheckpointedLayers
from ...nn.cores import GatedActivation
from ...nn.hidden import GroupFusion, HiddenLinear, HiddenRouter, Routed
from ...nn.stack import Branch, Stack, Step
from ..decoder.branches import attention_core
from .config import MoHDConfig


class RoutedBranch(Branch):
    """A branch with a router behind its norm; it reads and writes the dimensions that the router chose.

    Args:
        config: of the model.
        sparse: whether there is a router, which needs groups too.
        core: between the products.
        width_in, width_out: what the core reads, and what it gives.
        biases: whether the products inwards and outwards have biases.
    """

    def __init__(
        self,
        config: MoHDConfig,
        sparse: bool,
        core: nn.Module,
        width_in: int,
        width_out: int,
        biases: tuple[bool, bool] = (False, False),
    ) -> None:
        sparse = sparse and config.num_groups > 0
        super().__init__(
            nn.RMSNorm(config.hidden_size, config.rms_norm_eps),
            HiddenLinear(config.hidden_size, width_in, route="in", bias=biases[0]),
            core,
            HiddenLinear(width_out, config.hidden_size, route="out", bias=biases[1]),
        )
        self.router: HiddenRouter | None = None
        if sparse:
            self.router = HiddenRouter(
                config.hidden_size,
                config.num_groups,
                config.num_shared,
                config.top_k,
                scale_mode=config.scale_mode,
                renormalise=config.renormalise,
                gated=config.gates != "none",
            )
        self.fusion = GroupFusion(config.hidden_size, config.num_groups) if sparse and config.fusion else None
        self.route_in, self.route_out, self.gates = config.route_in, config.route_out, config.gates

    def body(self, x: Tensor, step: Step, cache: Any = None) -> Any:
        """x [T, hidden], normalised -> what is added to the stream, and the balance loss of the router."""
        routed = None if self.router is None else self.router(x)
        out = self._leave(self.core(self._enter(x, routed), step, cache), routed)
        return out if routed is None else (out, routed.balance_loss)

    def _enter(self, x: Tensor, routed: Routed | None) -> Tensor:
        """x [T, hidden] -> the product with what is read of it."""
        if routed is None or not self.route_in:
            return self.inwards(x)
        gates = routed.gates if self.gates in ("in", "both") else None
        if not isinstance(self.inwards, HiddenLinear):  # an adapter, or another that takes the place of the layer
            return self.inwards(_gated(x, routed, gates))
        return self.inwards(x, routed.plan, gates)

    def _leave(self, x: Tensor, routed: Routed | None) -> Tensor:
        """x [T, ...] -> [T, hidden], what is added to the stream."""
        if routed is None or not self.route_out:
            out = self.outwards(x)
        else:
            gates = routed.gates if self.gates in ("out", "both") else None
            if isinstance(self.outwards, HiddenLinear):
                out = self.outwards(x, routed.plan, gates)
            else:
                out = _gated(self.outwards(x), routed, gates)
        return out if self.fusion is None else self.fusion(out)


def _gated(x: Tensor, routed: Routed, gates: Tensor | None) -> Tensor:
    """x [T, hidden], each group times its gate, 0 where the token does not use it: a routed product made of a dense."""
    factors = routed.plan.selected if gates is None else gates
    groups = x.unflatten(1, (factors.shape[1], -1))
    return (groups * factors.to(x.dtype).unsqueeze(2)).flatten(1)


def mohd_layer(config: MoHDConfig, layer: int) -> dict[str, RoutedBranch]:
    """The branches of a layer by their names: causal attention with rotary positions, and SwiGLU (arXiv 2002.05202)."""
    core = attention_core(config, layer)
    width = core.num_heads * core.head_dim
    wide = config.intermediate_size
    return {
        "attention": RoutedBranch(
            config, config.sparse_attention, core, core.width, width, (config.has_qkv_bias, config.attention_bias)
        ),
        "feed_forward": RoutedBranch(
            config,
            config.sparse_feed_forward,
            GatedActivation(config.hidden_act),
            2 * wide,
            wide,
            (config.mlp_bias, config.mlp_bias),
        ),
    }


class LayeredStack(Stack):
    """A stack whose branches have names in layers, as `0.attention`.

    Args:
        layers: the branches of each layer, by name, in order.
    """

    def __init__(self, layers: Iterable[Mapping[str, nn.Module]]) -> None:
        CheckpointedLayers.__init__(self)
        for i, layer in enumerate(layers):
            self.add_module(str(i), nn.ModuleDict(dict(layer)))
        self.lags = [0] * len(self.branches)

    @property
    def branches(self) -> list[nn.Module]:  # type: ignore[override]
        """All branches, in order."""
        return [branch for layer in self for branch in layer.values()]

    def insert(self, place: int, branch: nn.Module, lag: int = 0) -> None:
        raise ValueError("LayeredStack: branches have the names of their layers, so none can be inserted")

    def __iter__(self) -> Iterator[Any]:
        return iter(self.children())

    def __len__(self) -> int:
        return len(self._modules)

    def __getitem__(self, layer: int) -> Any:
        return list(self.children())[layer]
