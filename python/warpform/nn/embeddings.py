"""The sum of token, position and token type embeddings, normalised, on packed ids."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ._product import apply_linear, row
from .norm import AddBiasResidualLayerNorm


class Embeddings(nn.Module):
    """LayerNorm(tokens + token types + positions), BERT's (arXiv 1810.04805, figure 2), on packed ids.

    Args:
        vocab_size, hidden_size: sizes of the token table and of a row.
        max_position_embeddings: number of positions; 0 for models that have no absolute ones.
        type_vocab_size: number of token types; 0 for models that have none.
        embedding_size: width of the tables, None = hidden_size. Where it is another, the sum is projected to
            hidden_size before it is normalised.
        padding_idx: the row of the token table that gets no gradient, as in `torch.nn.Embedding`.
        eps, dropout: of the normalisation and after it.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        max_position_embeddings: int,
        type_vocab_size: int = 2,
        *,
        embedding_size: int | None = None,
        padding_idx: int | None = None,
        eps: float = 1e-12,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        width = hidden_size if embedding_size is None else embedding_size
        self.width = width
        self.tokens = nn.Embedding(vocab_size, width, padding_idx=padding_idx)
        self.positions = nn.Embedding(max_position_embeddings, width) if max_position_embeddings else None
        self.token_types = nn.Embedding(type_vocab_size, width) if type_vocab_size else None
        self.projection = nn.Linear(width, hidden_size, bias=False) if width != hidden_size else None
        self.norm = AddBiasResidualLayerNorm(hidden_size, eps)
        self.dropout = dropout

    def forward(
        self,
        input_ids: Tensor | None,
        position_ids: Tensor,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """input_ids, position_ids, token_type_ids: int64 [total]; inputs_embeds: [total, width] in place of input_ids.

        Returns [total, hidden]. token_type_ids None means type 0 everywhere.
        """
        x = self.tokens(input_ids) if inputs_embeds is None else inputs_embeds
        bias = None
        if self.token_types is not None:
            if token_type_ids is None:
                # One type for all tokens is one row for all tokens: the bias of the fused sum.
                bias = row(self.token_types, 0, x.device)
            else:
                x = x + self.token_types(token_type_ids)
        positions = None if self.positions is None else self.positions(position_ids)
        if self.projection is not None:
            for part in (bias, positions):
                x = x if part is None else x + part
            x, bias, positions = apply_linear(x, self.projection), None, None
        x = self.norm(x, bias, positions)
        return F.dropout(x, self.dropout, training=self.training)
