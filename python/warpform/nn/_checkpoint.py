"""Gradient checkpointing of the layers of a stack."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
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
            call: Callable[..., Any] = partial(layer.__call__, **options)
            if any(isinstance(module, _BatchNorm) for module in layer.modules()):
                call = _CountedOnce(layer, call)
            return self._gradient_checkpointing_func(call, *args)
        return layer(*args, **options)


class _CountedOnce:
    """A call of a layer whose repetitions leave the running statistics of BatchNorm as they are.

    The layer is computed a second time in the backward pass, which must not count its batch a second time.
    """

    def __init__(self, layer: nn.Module, call: Callable[..., Any]) -> None:
        self.layer, self.call, self.done = layer, call, False

    def __call__(self, *args: Any) -> Any:
        if self.done:
            with _frozen_statistics(self.layer):
                return self.call(*args)
        self.done = True
        return self.call(*args)


@contextlib.contextmanager
def _frozen_statistics(layer: nn.Module) -> Iterator[None]:
    """Inside, BatchNorm updates copies of its statistics, which are thrown away."""
    norms = [module for module in layer.modules() if isinstance(module, _BatchNorm) and module.training]
    kept = [(norm, name, buffer) for norm in norms for name, buffer in norm.named_buffers(recurse=False)]
    for norm, name, buffer in kept:
        setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for norm, name, buffer in kept:
            setattr(norm, name, buffer)
