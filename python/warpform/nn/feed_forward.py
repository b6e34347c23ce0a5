"""The two-layer feed-forward block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._product import CPU_ROWS, in_blocks, is_plain, product
from .activations import BiasActivation


class FeedForward(nn.Module):
    """down(act(up(x))); the bias of `down` may be left for the next normalisation to add.

    Args:
        hidden_size, intermediate_size: widths.
        hidden_act: one of `ACTIVATIONS`.
        dropout: in training only, behind the activation and behind `down`.
    """

    def __init__(
        self, hidden_size: int, intermediate_size: int, hidden_act: str = "gelu", dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.up = nn.Linear(hidden_size, intermediate_size)
        self.activation = BiasActivation(hidden_act)
        self.down = nn.Linear(intermediate_size, hidden_size)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """hidden: [..., hidden]. Returns the product, of the same shape, and the bias [hidden] to be added, or None."""
        if hidden.dim() > 2:
            rows, bias = self._rows(hidden.flatten(0, -2))
            return rows.view(hidden.shape), bias
        return self._rows(hidden)

    def _rows(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        if in_blocks(hidden) and self._is_plain():
            return torch.cat([self._block(rows)[0] for rows in hidden.split(CPU_ROWS)]), None
        return self._block(hidden)

    def _is_plain(self) -> bool:
        """Tells whether rows may be taken in blocks: with a hook they may not, as it is called once, with all rows."""
        return (
            is_plain(self.up, nn.Linear)
            and is_plain(self.down, nn.Linear)
            and is_plain(self.activation, BiasActivation)
        )

    def _block(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        inner = self.activation(*product(hidden, self.up))
        if not self.training or self.dropout == 0.0:
            return product(inner, self.down)
        out, bias = product(F.dropout(inner, self.dropout), self.down)
        return F.dropout(out if bias is None else out + bias, self.dropout), None
