"""DeBERTa's attention and encoder, where content and relative position meet in the scores, on packed rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..packing import Packing
from ._product import apply_linear, is_plain, linear, product, product_with_bias, table
from .attention import SelfAttention
from .convolution import TokenConvolution
from .encoder import Encoder
from .norm import AddBiasResidualLayerNorm


class DisentangledSelfAttention(SelfAttention):
    """Self-attention with relative positions as DeBERTa-v2 and v3 project them (arXiv 2006.03654, section 3.1).

    Args:
        hidden_size, num_heads, attention_dropout: see `SelfAttention`.
        terms: which terms there are beside content-to-content: "c2p", "p2c", both or none.
        softmax_scale: factor on the scores.
        position_buckets, max_relative_positions: see `ops.disentangled_attention`.
        share_projections: positions are projected by the weights that project content, not by weights of their own.
        position_dropout: in training only, on the embeddings of relative positions.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        terms: Sequence[str] = ("c2p", "p2c"),
        softmax_scale: float | None = None,
        position_buckets: int = 0,
        max_relative_positions: int = 512,
        share_projections: bool = False,
        position_dropout: float = 0.0,
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__(hidden_size, num_heads, attention_dropout=attention_dropout)
        self.terms = tuple(term for term in ("c2p", "p2c") if term in terms)
        self.softmax_scale = softmax_scale
        self.position_buckets = position_buckets
        self.max_relative_positions = max_relative_positions
        self.position_dropout = position_dropout
        own = not share_projections
        self.pos_key = nn.Linear(hidden_size, hidden_size) if own and "c2p" in self.terms else None
        self.pos_query = nn.Linear(hidden_size, hidden_size) if own and "p2c" in self.terms else None

    def forward(self, hidden: Tensor, packing: Packing, relative: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """hidden: [total, hidden]; relative: [2 * span, hidden], embeddings of relative positions, None without.

        Returns the product [total, hidden] and the bias [hidden] to be added, or None.

        Raises:
            NotImplementedError: training mode with attention dropout above 0.
        """
        self.refuse_dropout()
        pos_key = pos_query = None
        if relative is not None and self.terms:
            # Before the tokens, so that a hook that keeps what it sees has those of the tokens in the end.
            pos_key, pos_query = self.project_positions(
                F.dropout(relative, self.position_dropout, training=self.training)
            )
        query, key, value = self.project(hidden)
        offsets, longest = packing.cu_seqlens, packing.max_seqlen
        if relative is None or not self.terms:
            context = ops.varlen_attention(
                query, key, value, offsets, offsets, longest, longest, softmax_scale=self.softmax_scale
            )
        else:
            context = ops.disentangled_attention(
                query,
                key,
                value,
                pos_key,
                pos_query,
                offsets,
                longest,
                positions=packing.position_ids,  # whether the mask has holes only the device knows
                softmax_scale=self.softmax_scale,
                position_buckets=self.position_buckets,
                max_relative_positions=self.max_relative_positions,
            )
        return product(cast("Tensor", context).flatten(1), self.out)

    def project_positions(self, relative: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """relative [2 * span, hidden] as keys and as queries, [2 * span, H, D] each, None for a term that is absent."""
        shape = (relative.shape[0], self.num_heads, self.head_dim)
        projected: list[Tensor | None] = []
        for term, module, part in (("c2p", self.pos_key, 1), ("p2c", self.pos_query, 0)):
            if term not in self.terms:
                projected.append(None)
            elif module is not None:
                projected.append(apply_linear(relative, module).view(shape))
            elif is_plain(self.qkv, nn.Linear):
                weight, bias = self.qkv.weight.chunk(3)[part], self.qkv.bias.chunk(3)[part]
                projected.append(linear(relative, weight, bias).view(shape))
            else:
                projected.append(self.project(relative)[part])
        pos_key, pos_query = projected
        return pos_key, pos_query

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, terms={self.terms}, position_buckets={self.position_buckets}"


class FusedDisentangledSelfAttention(DisentangledSelfAttention):
    """The same as DeBERTa (v1) has it: query, key and value of a head side by side in one weight, and fewer biases.

    The rows of `qkv.weight` are [H, 3, D]. Queries and values have a bias, keys have none, and position keys neither.
    """

    def __init__(self, hidden_size: int, num_heads: int, **options: object) -> None:
        super().__init__(hidden_size, num_heads, **options)  # type: ignore[arg-type]
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(hidden_size))
        self.v_bias = nn.Parameter(torch.zeros(hidden_size))
        if self.pos_key is not None:
            self.pos_key = nn.Linear(hidden_size, hidden_size, bias=False)

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = (self.num_heads, self.head_dim)
        bias = torch.stack([self.q_bias.view(heads), self.q_bias.new_zeros(heads), self.v_bias.view(heads)], 1)
        qkv = product_with_bias(hidden, self.qkv, bias.flatten())
        query, key, value = qkv.view(hidden.shape[0], self.num_heads, 3, self.head_dim).unbind(2)
        return query, key, value


class DisentangledEncoder(Encoder):
    """A stack of layers that share the embeddings of relative positions.

    Args:
        layers: modules called as `layer(hidden, packing, relative)`.
        relative: the embeddings [2 * span, hidden]; None: the layers get None.
        relative_norm: their normalisation.
        position_buckets: distances up to half of it are their own bucket; 0: all are.
        convolution: what combines the input of the first layer with its output (DeBERTa-v2 xlarge).
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        relative: nn.Embedding | None,
        relative_norm: AddBiasResidualLayerNorm | None = None,
        *,
        position_buckets: int = 0,
        convolution: TokenConvolution | None = None,
    ) -> None:
        super().__init__(layers)
        self.relative = relative
        self.span = 0 if relative is None else relative.num_embeddings // 2
        self.relative_norm = relative_norm
        self.position_buckets = position_buckets
        self.convolution = convolution

    def relative_embeddings(self, packing: Packing) -> Tensor | None:
        """[2 * reach, hidden]: the rows that distances within the padded length can come to, normalised."""
        if self.relative is None:
            return None
        rows = table(self.relative, 2 * self.span, packing.cu_seqlens.device)
        longest, span = packing.seqlen, self.span
        # Buckets of more than one distance end wherever the whole table says; shapes must not depend on a batch's
        # length where they are traced.
        exact = self.position_buckets == 0 or longest - 1 <= self.position_buckets // 2
        if not torch.compiler.is_compiling() and exact and 1 <= longest < span:
            rows = rows[span - longest : span + longest]
        return rows if self.relative_norm is None else self.relative_norm(rows, None, None)

    def forward(
        self, hidden: Tensor, packing: Packing, *, output_hidden_states: bool = False
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """hidden: [total, hidden]. Returns the last hidden state and, on request, the input and each layer's output."""
        relative = self.relative_embeddings(packing)
        states = [hidden]
        for i, layer in enumerate(self.layers):
            out = self.run_layer(layer, hidden, packing, relative)
            if i == 0 and self.convolution is not None:
                out = self.convolution(hidden, out, packing)
            hidden = out
            if output_hidden_states:
                states.append(hidden)
        return hidden, tuple(states) if output_hidden_states else None
