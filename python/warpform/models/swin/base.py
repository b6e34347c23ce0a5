"""What Swin and Swin V2, with a head and without, do alike: conversion, other sizes, classification."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..common.config import config_overrides
from ..common.convertible import ConvertibleModel
from ..common.outputs import Output
from ..common.positions import resize_grid
from ..common.pretrained import load_weights, set_weight
from . import weights as names_of
from .config import Pair, SwinConfig, Swinv2Config, pair
from .published import check_constants, check_needed, check_told, check_version, published_config

Self = TypeVar("Self", bound="SwinBase")


@dataclasses.dataclass
class SwinOutput(Output):
    """The output of Swin without a head.

    Attributes:
        last_hidden_state: [batch, tokens, hidden], normalised.
        pooler_output: [batch, hidden], the mean over tokens, or None for a model without a pooler.
        hidden_states: on request, the embeddings and the output of every stage, [batch, tokens, channels].
        attentions: always None, for callers that look.
        reshaped_hidden_states: on request, the same as [batch, channels, height, width].
    """

    last_hidden_state: Tensor
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: None = None
    reshaped_hidden_states: tuple[Tensor, ...] | None = None


def share_weights(model: SwinBase, other: SwinBase) -> None:
    """Gives `other`, of the same class and made on the meta device, the parameters of `model`."""
    for name, parameter in model.named_parameters():
        set_weight(other, name, parameter)
    adopt_modules(model, other)


def adopt_modules(model: SwinBase, other: SwinBase) -> None:
    """Gives `other` what is in no parameter of `model`: buffers, the mode, and eps of norms.

    The eps of a model made from one of transformers may differ from the config's.
    """
    for name, module in model.named_modules():
        if hasattr(module, "eps"):
            other.get_submodule(name).eps = module.eps
    other.restore_buffers()
    other.train(model.training)


class SwinBase(ConvertibleModel):
    """What Swin and Swin V2, with a head and without, do alike about conversion."""

    config: SwinConfig
    has_pooler: bool  # of a model without a head
    weight_prefix = "swin."
    drawn_convolutions = (nn.Conv2d,)

    @classmethod
    def file_name(cls, name: str) -> str:
        return names_of.file_name(name)

    @classmethod
    def canonical_weights(cls, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if names_of.is_published(weights):
            return names_of.from_published(weights, cls.published_prefix())
        return {names_of.file_name(name): w for name, w in names_of.without_constants(weights).items()}

    @classmethod
    def check_weights(cls, what: str, config: SwinConfig, weights: Mapping[str, Tensor]) -> None:
        if names_of.is_published(weights):
            check_constants(what, config, weights)

    @classmethod
    def published_prefix(cls) -> str:
        return cls.weight_prefix

    @classmethod
    def from_published(cls: type[Self], weights: Mapping[str, Tensor], **overrides: Any) -> Self:
        """A model from weights under the names of the published code, such as its checkpoints hold under "model".

        The config follows from the shapes of the weights, and from the constants that the published files hold beside
        them: masks tell image_size, and coordinates the window_size and pretrained_window_sizes of Swin V2. The weights
        are not copied where that is not necessary.

        Args:
            weights: for instance `torch.load(path, weights_only=True)["model"]`, or what safetensors reads.
            **overrides: fields of the config that the weights do not tell. Without the constants Swin V2 needs
                image_size, window_size and pretrained_window_sizes, and absolute positions for images that are not
                square need image_size. `resized` makes a model for other sizes.

        Raises:
            ValueError: weights under other names, of the other version of Swin, missing, unknown or of another shape; a
                field that is needed, by name; an override that the weights contradict, by name.
            TypeError: an override that is no field.
        """
        what = f"{cls.__name__}.from_published"
        if not names_of.is_published(weights):
            raise ValueError(f"{what}: weights must have the published names, such as patch_embed.proj.weight")
        check_version(what, cls.config_class, weights)
        fields = published_config(what, weights)
        config_overrides(cls.config_class, overrides)
        check_told(what, fields, overrides, ignored=("num_labels",) if cls.is_encoder else ())
        fields |= overrides
        check_needed(what, cls.config_class, fields)
        if cls.config_class is Swinv2Config:
            fields.setdefault("mask_value", -100.0)
        config = cls.config_class(**fields)
        return load_weights(cls, config, weights, what).eval()

    def backbone(self) -> SwinBase:
        """The model without its head."""
        raise NotImplementedError

    def resized(self: Self, *, window_size: int | Pair | None = None, image_size: int | Pair | None = None) -> Self:
        """This model for another window or image size, to go on training or to use it as it is.

        Swin's tables of relative positions, and absolute position embeddings, are resized by bicubic interpolation.
        Swin V2 goes on measuring distances in the windows that it was trained with. Other parameters are shared.

        Raises:
            ValueError: a size below 1.
        """
        changes: dict[str, Any] = {}
        if window_size is not None:
            changes["window_size"] = window_size
        if image_size is not None:
            changes["image_size"] = image_size
        if isinstance(self.config, Swinv2Config):
            trained = zip(self.config.pretrained_window_sizes or (), self.config.windows(), strict=True)
            changes["pretrained_window_sizes"] = tuple(before or own[0] for before, own in trained)
        config = dataclasses.replace(self.config, **changes)
        with torch.device("meta"):
            model = type(self).build(config, with_optional=self.backbone().has_pooler)
        assert isinstance(model, type(self))
        for name, parameter in self.named_parameters():
            shape = model.get_parameter(name).shape
            if shape != parameter.shape:
                if name.endswith("relative_position_bias_table"):
                    own, other = (pair(c.window_size) for c in (self.config, config))
                    before, after = ((2 * h - 1, 2 * w - 1) for h, w in (own, other))
                    rows = resize_grid(parameter.detach(), before, after)
                else:  # position embeddings
                    rows = resize_grid(parameter.detach()[0], self.config.patch_grid, config.patch_grid).unsqueeze(0)
                parameter = nn.Parameter(rows, requires_grad=parameter.requires_grad)
            set_weight(model, name, parameter)
        adopt_modules(self, model)
        return model
