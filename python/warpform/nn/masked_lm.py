"""The head that predicts tokens, on packed rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._product import linear, product
from .activations import BiasActivation
from .norm import AddBiasResidualLayerNorm


class MaskedLMHead(nn.Module):
    """table @ LayerNorm(act(dense(x))) + bias, with the token table as the decoder (BERT, arXiv 1810.04805).

    Args:
        hidden_size, embedding_size, vocab_size: widths of the rows, of the token table, and its number of rows.
        hidden_act: one of `ACTIVATIONS`.
        eps: of the normalisation.
    """

    def __init__(
        self, hidden_size: int, embedding_size: int, vocab_size: int, *, hidden_act: str = "gelu", eps: float = 1e-12
    ) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, embedding_size)
        self.activation = BiasActivation(hidden_act)
        self.norm = AddBiasResidualLayerNorm(embedding_size, eps)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, hidden: Tensor, table: Tensor) -> Tensor:
        """hidden: [total, hidden], table: [vocab, embedding]; returns logits [total, vocab]."""
        x = self.activation(*product(hidden, self.dense))
        return linear(self.norm(x, None, None), table, self.bias)
