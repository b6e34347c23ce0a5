"""The two-layer feed-forward block, and the one that mixes neighbours in between."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._product import CPU_ROWS, apply_linear, in_blocks, is_plain, product
from .activations import BiasActivation
from .grids import depthwise


class FeedForward(nn.Module):
    """down(act(up(x))); the bias of `down` may be left for the next normalisation to add.

    Args:
        hidden_size, intermediate_size: widths.
        hidden_act: one of `ACTIVATIONS`.
        dropout: in training only, behind the activation and behind `down`.
        pointwise: whether the weights are held by 1x1 convolutions, [out, in, 1, 1], as published weights have them.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        hidden_act: str = "gelu",
        *,
        dropout: float = 0.0,
        pointwise: bool = False,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.pointwise = pointwise
        self.up = self._linear(hidden_size, intermediate_size)
        self.activation = BiasActivation(hidden_act)
        self.down = self._linear(intermediate_size, hidden_size)

    def _linear(self, inputs: int, outputs: int) -> nn.Module:
        return nn.Conv2d(inputs, outputs, 1) if self.pointwise else nn.Linear(inputs, outputs)

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
        return all(
            is_plain(module, nn.Conv2d if self.pointwise else nn.Linear) for module in (self.up, self.down)
        ) and is_plain(self.activation, BiasActivation)

    def _block(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        pointwise = self.pointwise
        inner = self.activation(*product(hidden, self.up, pointwise=pointwise))
        if not self.training or self.dropout == 0.0:
            return product(inner, self.down, pointwise=pointwise)
        out, bias = product(F.dropout(inner, self.dropout), self.down, pointwise=pointwise)
        return F.dropout(out if bias is None else out + bias, self.dropout), None


class MixFeedForward(nn.Module):
    """down(act(depthwise(up(x)))), which tells tokens their places (SegFormer, arXiv 2105.15203, equation 3).

    The convolution has a kernel for each channel and zeros around the grid. Beside them tokens need no positions.

    Args:
        hidden_size, intermediate_size: widths.
        hidden_act: one of `ACTIVATIONS`; "gelu" and "relu" are made in the same pass as the convolution.
        kernel_size: odd.
        dropout: on what goes into the second product, in training only.

    Raises:
        ValueError: an unknown hidden_act, or a kernel_size that is even or below 1.
    """

    FUSED = ("gelu", "relu", "linear")

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        hidden_act: str = "gelu",
        *,
        kernel_size: int = 3,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"MixFeedForward: kernel_size must be an odd number of at least 1, got {kernel_size}")
        self.up = nn.Linear(hidden_size, intermediate_size)
        self.depthwise = nn.Conv2d(
            intermediate_size, intermediate_size, kernel_size, padding=kernel_size // 2, groups=intermediate_size
        )
        self.activation = BiasActivation(hidden_act)
        self.down = nn.Linear(intermediate_size, hidden_size)
        self.dropout = dropout

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """hidden: [batch, height, width, hidden]. Returns the product, of the same shape, and the bias [hidden] to be
        added, or None."""
        mixed = self._convolve(apply_linear(hidden, self.up))
        return product(F.dropout(mixed, self.dropout, training=self.training), self.down)

    def _convolve(self, x: Tensor) -> Tensor:
        """act(depthwise(x)), [batch, height, width, intermediate]."""
        fused = self.activation.name if is_plain(self.activation, BiasActivation) else ""
        if fused in self.FUSED:
            return depthwise(x, self.depthwise, fused)
        return self.activation(depthwise(x, self.depthwise), None)
