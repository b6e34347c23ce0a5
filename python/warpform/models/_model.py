"""What every model has, under the names that trainers, pipelines and wrappers ask transformers' models for."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..nn._checkpoint import CheckpointedLayers

# What heads hand on to the model below them, where it has no effect.
_FOR_HEADS = ("num_items_in_batch",)


def refuse_arguments(model: str, arguments: Mapping[str, Any]) -> None:
    """Raises ValueError for an argument that is neither None nor False, unless only a head has a use for it."""
    for name, value in arguments.items():
        if value is not None and value is not False and name not in _FOR_HEADS:
            raise ValueError(f"{model}: {name} is not supported")


class ModelConfig:
    """What the Config dataclasses share.

    A model is made from its config; what is changed in the config later changes the model no more than in transformers.
    Names that are no fields can be set: trainers and pipelines leave notes of their own (`use_cache`).

    Attributes:
        model_type: as in config.json of transformers; empty for models that are not in it.
    """

    model_type: ClassVar[str] = ""
    _names_of_labels: dict[int, str] | None = None

    @property
    def id2label(self) -> dict[int, str]:
        """The names of the labels; LABEL_0 and so on where none were given, or another number of them."""
        number, names = getattr(self, "num_labels", 0), self._names_of_labels
        if names is not None and len(names) == number:
            return names
        return {i: f"LABEL_{i}" for i in range(number)}

    @id2label.setter
    def id2label(self, names: Mapping[Any, str] | None) -> None:
        # JSON makes strings of the keys.
        self._names_of_labels = None if names is None else {int(i): name for i, name in names.items()}

    @property
    def label2id(self) -> dict[str, int]:
        """The opposite of `id2label`."""
        return {name: i for i, name in self.id2label.items()}

    def to_dict(self) -> dict[str, Any]:
        """The fields as config.json has them: in transformers' names where the model is in transformers."""
        convert = getattr(self, "to_transformers", None)
        fields = dataclasses.asdict(self) if convert is None else convert()  # type: ignore[call-overload]
        if "num_labels" in fields:
            del fields["num_labels"]
            fields |= {"id2label": self.id2label, "label2id": self.label2id}
        return {**fields, **({"model_type": self.model_type} if self.model_type else {})}

    def to_json_string(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"


class Model(nn.Module):
    """A model with a config."""

    config: Any

    @property
    def supports_gradient_checkpointing(self) -> bool:
        """Whether there are layers that can be computed again."""
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
        """Whether there is a `generate` that follows transformers': no."""
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
        """Whether any layer is computed again."""
        return any(module.gradient_checkpointing for module in self._checkpointed())
