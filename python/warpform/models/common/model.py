"""The base of every model. It has the names that trainers, pipelines and wrappers use of transformers' models."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ...nn._checkpoint import CheckpointedLayers


class Model(nn.Module):
    """A model with a config."""

    config: Any

    @property
    def supports_gradient_checkpointing(self) -> bool:
        """Tells whether the model has layers that can be computed again in backward."""
        return bool(self._checkpointed())

    def _checkpointed(self) -> list[CheckpointedLayers]:
        return [module for module in self.modules() if isinstance(module, CheckpointedLayers)]

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first parameter that is floating point, so not of one that was quantised."""
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.get_default_dtype())

    def can_generate(self) -> bool:
        """Returns False: no model has a `generate` with the interface of transformers."""
        return False

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """`gradient_checkpointing_enable`, under its newer name in transformers.

        Raises:
            ValueError: every_n_layers other than 1, or offload.
        """
        if every_n_layers != 1 or offload:
            raise ValueError(
                f"{type(self).__name__}: every layer is computed again, nothing is offloaded: every_n_layers must "
                f"be 1 and offload False, got {every_n_layers} and {offload}"
            )
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs)

    def activation_checkpointing_disable(self) -> None:
        """`gradient_checkpointing_disable`, under its newer name in transformers."""
        self.gradient_checkpointing_disable()

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """In training, computes each layer again in the backward pass instead of keeping what it needs.

        Args:
            gradient_checkpointing_kwargs: keywords of `torch.utils.checkpoint.checkpoint`; use_reentrant is False where
                they do not say.

        Raises:
            ValueError: the model does not support it.
        """
        if not self.supports_gradient_checkpointing:
            raise ValueError(f"{type(self).__name__} does not support gradient checkpointing")
        function = partial(checkpoint, **{"use_reentrant": False, **(gradient_checkpointing_kwargs or {})})
        for module in self._checkpointed():
            module._gradient_checkpointing_func = function
            module.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """The opposite of `gradient_checkpointing_enable`."""
        for module in self._checkpointed():
            module.gradient_checkpointing = False

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Tells whether any layer is computed again in backward."""
        return any(module.gradient_checkpointing for module in self._checkpointed())
