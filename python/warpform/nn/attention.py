"""Self-attention over packed sequences: no padded token is ever multiplied."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from .. import ops
from ..packing import Packing
from ._product import apply_linear, product


class SelfAttention(nn.Module):
    """Multi-head self-attention on packed rows; the last bias may be left for the next normalisation to add.

    Query, key and value come from one product; its slices go to `varlen_attention` as they are.

    Args:
        hidden_size: width of a row; num_heads must divide it.
        num_heads: H; each head has D = hidden_size / H.
        attention_dropout: dropout on the probabilities, `attention_probs_dropout_prob` in configs. The fused attention
            keeps no probabilities, so a value above 0 raises in training mode.

    Raises:
        ValueError: num_heads does not divide hidden_size.
    """

    def __init__(self, hidden_size: int, num_heads: int, *, attention_dropout: float = 0.0) -> None:
        super().__init__()
        if num_heads <= 0 or hidden_size % num_heads != 0:
            raise ValueError(f"num_attention_heads must divide hidden_size {hidden_size}, got {num_heads}")
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.attention_dropout = attention_dropout
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.out = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden: Tensor, packing: Packing) -> tuple[Tensor, Tensor | None]:
        """hidden: [total, hidden]. Returns the product [total, hidden] and the bias [hidden] to be added, or None.

        Raises:
            NotImplementedError: training mode with attention dropout above 0.
        """
        self.refuse_dropout()
        query, key, value = self.project(hidden)
        offsets, longest = packing.cu_seqlens, packing.max_seqlen
        context = ops.varlen_attention(query, key, value, offsets, offsets, longest, longest)  # [total, H, D]
        return product(cast("Tensor", context).flatten(1), self.out)

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """hidden: [total, hidden]; returns query, key and value, slices [total, H, D] of one product."""
        qkv = apply_linear(hidden, self.qkv)
        query, key, value = qkv.view(hidden.shape[0], 3, self.num_heads, self.head_dim).unbind(1)
        return query, key, value

    def refuse_dropout(self) -> None:
        """Raises NotImplementedError in training mode with attention dropout above 0."""
        if self.training and self.attention_dropout > 0.0:
            raise NotImplementedError(
                f"attention_probs_dropout_prob is {self.attention_dropout}, and attention dropout is not supported in "
                "training mode: set attention_probs_dropout_prob=0.0 in the config, or call eval(). In DistilBERT the "
                "field is attention_dropout"
            )

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}"
