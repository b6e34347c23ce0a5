"""The initial weights of all models whose config has an initializer_range."""

from __future__ import annotations

import torch
from torch import nn

from ...nn import AddBiasResidualLayerNorm

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm2d, AddBiasResidualLayerNorm)


def linear_std(inputs: int) -> float:
    """The standard deviation with which `torch.nn.Linear` draws weights for so many inputs: 1 / sqrt(3 inputs)."""
    return (3 * inputs) ** -0.5


def init_normal(module: nn.Module, std: float, also: tuple[type[nn.Module], ...] = ()) -> None:
    """Draws the own weights of a module, as BERT does (arXiv 1810.04805); for `apply`.

    Weights of linear layers and of embeddings are normal with standard deviation std, their biases and the row of a
    padding token 0. Of normalisations weights are 1 and biases 0. Other modules keep what they began with.

    Args:
        module: one module; its children are not looked at.
        std: the standard deviation.
        also: classes of convolutions to treat as linear layers.
    """
    if isinstance(module, (nn.Linear, nn.Embedding, *also)):
        nn.init.normal_(module.weight, std=std)  # type: ignore[arg-type]
        bias = getattr(module, "bias", None)
        if bias is not None:
            nn.init.zeros_(bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()
    elif isinstance(module, NORMS):
        for parameter, value in ((module.weight, 1.0), (getattr(module, "bias", None), 0.0)):
            if parameter is not None:
                nn.init.constant_(parameter, value)
