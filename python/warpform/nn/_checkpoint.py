"""Gradient checkpointing of the layers of a stack."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


class CheckpointedLayers(nn.Module):
    """A module that runs layers, and in training can compute them again in the backward pass instead of keeping them.

    The two attributes have the names under which transformers looks for them, so that the
    `gradient_checkpointing_enable` of a transformers model reaches the stacks that were put into it.

    Attributes:
        gradient_checkpointing: whether layers are computed again.
    """

    gradient_checkpointing: bool = False
    _gradient_checkpointing_func: Callable[..., Any] = staticmethod(partial(checkpoint, use_reentrant=False))

    def run_layer(self, layer: nn.Module, *args: Any, **options: Any) -> Any:
        """layer(*args, **options)."""
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(partial(layer.__call__, **options), *args)
        return layer(*args, **options)
