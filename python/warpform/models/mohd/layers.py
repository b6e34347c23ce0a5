"""The layers of MoHD: attention and feed-forward whose products read and write the dimensions that a router chose."""

from __future__ import annotations

import dataclasses
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import ops
from ...nn.hidden import GroupFusion, HiddenLinear, HiddenRouter, Routed
from ...nn.rotary import apply_rotary
from .config import MoHDConfig


class KeyValueCache:
    """Keys and values of all layers of B sequences, each at its own length, in one buffer allocated once.

    Args:
        config: of the model.
        batch_size: B.
        capacity: tokens that a sequence can come to.
        device, dtype: of the buffer.
    """

    def __init__(
        self, config: MoHDConfig, batch_size: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (config.num_hidden_layers, 2, batch_size, capacity, config.kv_heads, config.heads_dim)
        self.buffer = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = [0] * batch_size

    def append(self, layer: int, key: Tensor, value: Tensor, rows: Tensor) -> None:
        """Writes key and value [T, Hkv, D] to rows [T] of the buffer of a layer, counted over its [B, capacity]."""
        for kind, new in enumerate((key, value)):
            self.buffer[layer, kind].flatten(0, 1).index_copy_(0, rows, new)

    def read(self, layer: int, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys and values [total, Hkv, D] of a layer: those rows, or for None the rows of a single sequence."""
        key, value = self.buffer[layer].flatten(1, 2)
        if rows is None:
            return key[: self.lengths[0]], value[: self.lengths[0]]
        return key[rows], value[rows]


@dataclasses.dataclass
class Step:
    """What every layer of one call needs: where tokens stand, which sequences they are of, and the cache."""

    cos: Tensor
    sin: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    cache: KeyValueCache | None = None
    written: Tensor | None = None  # rows of the cache that this call writes
    kept: Tensor | None = None  # rows of the cache that queries read; None: those of one sequence, in place


class RoutedBlock(nn.Module):
    """What attention and feed-forward share: the norm, the router, the routed products, the fusion."""

    def __init__(self, config: MoHDConfig, sparse: bool, width_in: int, width_out: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        sparse = sparse and config.num_groups > 0
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
        self.inwards = HiddenLinear(config.hidden_size, width_in, route="in")
        self.outwards = HiddenLinear(width_out, config.hidden_size, route="out")
        self.fusion = GroupFusion(config.hidden_size, config.num_groups) if sparse and config.fusion else None
        self.route_in, self.route_out, self.gates = config.route_in, config.route_out, config.gates

    def enter(self, hidden: Tensor) -> tuple[Tensor, Routed | None]:
        """hidden [T, hidden] -> the product with what is read of it, and the choice."""
        x = self.norm(hidden)
        routed = None if self.router is None else self.router(x)
        if routed is None or not self.route_in:
            return self.inwards(x), routed
        gates = routed.gates if self.gates in ("in", "both") else None
        if not isinstance(self.inwards, HiddenLinear):  # an adapter, or another that takes the place of the layer
            return self.inwards(_gated(x, routed, gates)), routed
        return self.inwards(x, routed.plan, gates), routed

    def leave(self, x: Tensor, routed: Routed | None) -> Tensor:
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


class MoHDAttention(RoutedBlock):
    """Causal attention with rotary positions and grouped queries; queries, keys and values are one product."""

    def __init__(self, config: MoHDConfig) -> None:
        self.heads, self.kv_heads, self.head_dim = config.num_attention_heads, config.kv_heads, config.heads_dim
        width = self.heads * self.head_dim
        super().__init__(config, config.sparse_attention, width + 2 * self.kv_heads * self.head_dim, width)

    def forward(self, hidden: Tensor, step: Step, layer: int) -> tuple[Tensor, Routed | None]:
        """hidden: [T, hidden] -> what is added to it, and the choice."""
        product, routed = self.enter(hidden)
        heads = (self.heads, self.kv_heads, self.kv_heads)
        query, key, value = product.unflatten(1, (-1, self.head_dim)).split(heads, 1)
        query, key = (apply_rotary(t, step.cos, step.sin) for t in (query, key))
        if step.cache is not None:
            assert step.written is not None
            step.cache.append(layer, key, value, step.written)
            key, value = step.cache.read(layer, step.kept)
        context = ops.varlen_attention(
            query,
            key,
            value,
            step.cu_seqlens_q,
            step.cu_seqlens_k,
            step.max_seqlen_q,
            step.max_seqlen_k,
            causal=True,
        )
        return self.leave(cast("Tensor", context).flatten(1), routed), routed


class MoHDFeedForward(RoutedBlock):
    """SwiGLU (arXiv 2002.05202): the product's first half through SiLU gates the second."""

    def __init__(self, config: MoHDConfig) -> None:
        super().__init__(config, config.sparse_feed_forward, 2 * config.intermediate_size, config.intermediate_size)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Routed | None]:
        """hidden: [T, hidden] -> what is added to it, and the choice."""
        product, routed = self.enter(hidden)
        gate, up = product.chunk(2, 1)
        return self.leave(F.silu(gate) * up, routed), routed


class MoHDLayer(nn.Module):
    """hidden + attention(hidden), then hidden + feed_forward(hidden), each of which normalises first."""

    def __init__(self, config: MoHDConfig) -> None:
        super().__init__()
        self.attention = MoHDAttention(config)
        self.feed_forward = MoHDFeedForward(config)

    def forward(self, hidden: Tensor, step: Step, layer: int) -> tuple[Tensor, ...]:
        """hidden: [T, hidden] -> the same shape, and the balance losses of the routers.

        Tensors alone: the reentrant kind of checkpointing loses the gradients of what is within other things.
        """
        added, one = self.attention(hidden, step, layer)
        hidden = hidden + added
        added, other = self.feed_forward(hidden)
        return hidden + added, *(routed.balance_loss for routed in (one, other) if routed is not None)
