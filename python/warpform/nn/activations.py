"""Activations of feed-forward blocks, together with the bias of the product before them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops

# Names are those of transformers' configs. Several of its names are one function written in different ways.
_GELU_FORMS = {
    "gelu": "none",
    "gelu_python": "none",
    "gelu_new": "tanh",
    "gelu_fast": "tanh",
    "gelu_pytorch_tanh": "tanh",
    "gelu_python_tanh": "tanh",
    "gelu_accurate": "tanh",
}

_ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "relu6": F.relu6,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "leaky_relu": F.leaky_relu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "linear": lambda x: x,
}

ACTIVATIONS: tuple[str, ...] = (*_GELU_FORMS, *_ELEMENTWISE)


class BiasActivation(nn.Module):
    """act(x + bias), for GELU in one pass.

    Args:
        name: one of `ACTIVATIONS`, the names that `hidden_act` takes in transformers' configs.

    Raises:
        ValueError: an unknown name.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        if name not in ACTIVATIONS:
            raise ValueError(f"hidden_act must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
        self.name = name

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """act(x + bias): x [..., N], bias [N] or None; returns [..., N]."""
        approximate = _GELU_FORMS.get(self.name)
        if approximate is not None:
            return ops.bias_gelu(x, bias, approximate)
        return _ELEMENTWISE[self.name](x if bias is None else x + bias)

    def extra_repr(self) -> str:
        return self.name
