"""Convolution along the tokens of a sequence."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..packing import Packing
from .activations import BiasActivation
from .norm import AddBiasResidualLayerNorm


class TokenConvolution(nn.Module):
    """LayerNorm(act(dropout(conv(x))) + residual), DeBERTa-v2's convolution beside its first layer, on packed rows.

    Neighbours are those of the padded row, where masked places are 0; so this unpacks and packs once.

    Args:
        hidden_size: channels in and out.
        kernel_size: odd, so that a row keeps its length.
        groups: of channels, as of `torch.nn.Conv1d`.
        act: one of `ACTIVATIONS`.
        eps: of the normalisation.
        dropout: probability, in training only.

    Raises:
        ValueError: kernel_size is even, or an unknown activation.
    """

    def __init__(
        self,
        hidden_size: int,
        kernel_size: int,
        *,
        groups: int = 1,
        act: str = "tanh",
        eps: float = 1e-7,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"conv_kernel_size must be odd, got {kernel_size}")
        self.conv = nn.Conv1d(hidden_size, hidden_size, kernel_size, padding=kernel_size // 2, groups=groups)
        self.activation = BiasActivation(act)
        self.norm = AddBiasResidualLayerNorm(hidden_size, eps)
        self.dropout = dropout

    def forward(self, hidden: Tensor, residual: Tensor, packing: Packing) -> Tensor:
        """hidden, residual: [total, hidden]; returns [total, hidden]."""
        if packing.seqlen > 0:
            rows = packing.unpack(hidden).transpose(1, 2)  # [batch, hidden, seqlen]
            hidden = packing.pack(self.conv(rows).transpose(1, 2))
        hidden = F.dropout(hidden, self.dropout, training=self.training)
        return self.norm(self.activation(hidden, None), None, residual)
