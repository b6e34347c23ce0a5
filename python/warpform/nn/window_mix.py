"""Mixing of the tokens of windows by a learned matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops import window_mix


class WindowMix(nn.Module):
    """A matrix over the tokens of each window, on every channel: `ops.window_mix` with its parameters.

    With a norm and a gate it is the spatial gating unit of gMLP (arXiv 2105.08050, section 2.1) in windows, as MAXIM
    has it (arXiv 2201.02973): gate * (W LayerNorm(x) + b + 1).

    Args:
        window_size: (wh, ww), the tokens along each axis of a window.
        dilated: False: windows are blocks of adjacent tokens. True: a window has one token of each cell of a grid.
        channels: C, for the LayerNorm before the product; None: there is none.
        eps: of the LayerNorm.

    Attributes:
        weight, bias: [n, n] and [n], n = wh * ww. They begin with normal numbers of standard deviation 0.02, and 0.
        norm_weight, norm_bias: [C], or None.
    """

    norm_weight: nn.Parameter | None
    norm_bias: nn.Parameter | None

    def __init__(
        self, window_size: Sequence[int], *, dilated: bool = False, channels: int | None = None, eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.window_size, self.dilated, self.eps = tuple(window_size), dilated, eps
        tokens = math.prod(self.window_size)
        self.weight, self.bias = nn.Parameter(torch.empty(tokens, tokens)), nn.Parameter(torch.empty(tokens))
        for name, value in (("norm_weight", 1.0), ("norm_bias", 0.0)):
            parameter = None if channels is None else nn.Parameter(torch.full((channels,), value))
            self.register_parameter(name, parameter)
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02, bias: float = 0.0) -> None:
        """Draws the matrix from a normal distribution and sets its bias. On the meta device there is nothing to do."""
        if not self.weight.is_meta:
            nn.init.normal_(self.weight, std=std)
            nn.init.constant_(self.bias, bias)

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """x, gate: [batch, height, width, channels], of which windows divide height and width; returns the same."""
        return window_mix(
            x,
            self.weight,
            self.bias,
            window_size=self.window_size,
            dilated=self.dilated,
            norm_weight=self.norm_weight,
            norm_bias=self.norm_bias,
            eps=self.eps,
            gate=gate,
        )

    def extra_repr(self) -> str:
        return f"{self.window_size}, dilated={self.dilated}"
