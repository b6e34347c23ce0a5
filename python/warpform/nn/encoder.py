"""Encoder layers with the normalisation after each block (post-LN), on packed rows."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..packing import Packing
from ._checkpoint import CheckpointedLayers
from .attention import SelfAttention
from .feed_forward import FeedForward
from .norm import AddBiasResidualLayerNorm


class EncoderLayer(nn.Module):
    """One layer of the padding-free encoder (ByteTransformer, arXiv 2210.03052, section III).

    Args:
        hidden_size, num_heads, intermediate_size: sizes.
        hidden_act: one of `ACTIVATIONS`.
        eps: of both normalisations.
        hidden_dropout: in training only, on what each block adds to the residual: one probability, or one for the
            attention block and one for the feed-forward block.
        attention_dropout: see `SelfAttention`.
        attention: the module to use in place of a `SelfAttention` made from these.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        *,
        hidden_act: str = "gelu",
        eps: float = 1e-12,
        hidden_dropout: float | tuple[float, float] = 0.0,
        attention_dropout: float = 0.0,
        attention: SelfAttention | None = None,
    ) -> None:
        super().__init__()
        dropouts = hidden_dropout if isinstance(hidden_dropout, tuple) else (hidden_dropout, hidden_dropout)
        if attention is None:
            attention = SelfAttention(hidden_size, num_heads, attention_dropout=attention_dropout)
        self.attention = attention
        self.attention_norm = AddBiasResidualLayerNorm(hidden_size, eps, dropouts[0])
        self.feed_forward = FeedForward(hidden_size, intermediate_size, hidden_act)
        self.feed_forward_norm = AddBiasResidualLayerNorm(hidden_size, eps, dropouts[1])

    def forward(self, hidden: Tensor, packing: Packing, *attention_inputs: Tensor | None) -> Tensor:
        """hidden: [total, hidden], attention_inputs: what else the attention takes; returns [total, hidden]."""
        product, bias = self.attention(hidden, packing, *attention_inputs)
        hidden = self.attention_norm(product, bias, hidden)
        product, bias = self.feed_forward(hidden)
        return self.feed_forward_norm(product, bias, hidden)


class Encoder(CheckpointedLayers):
    """A stack of encoder layers on packed rows.

    Args:
        layers: modules called as `layer(hidden, packing)`.
        order: which layer runs when, by index; a layer may run many times (ALBERT shares its weights so). None: each
            once, in turn.
    """

    def __init__(self, layers: Sequence[nn.Module], order: Sequence[int] | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.order = tuple(range(len(layers)) if order is None else order)

    def forward(
        self, hidden: Tensor, packing: Packing, *, output_hidden_states: bool = False
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """hidden: [total, hidden]. Returns the last hidden state and, on request, the input and each layer's output."""
        states = [hidden]
        for index in self.order:
            hidden = self.run_layer(self.layers[index], hidden, packing)
            if output_hidden_states:
                states.append(hidden)
        return hidden, tuple(states) if output_hidden_states else None
