"""Which backbone a system has: a ResNet that its config describes, or a module that it is given."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from .common.backbone import Backbone, stage_names
from .common.config import ModelConfig
from .resnet import ResNetBackbone, ResNetConfig

# What the backbone of a system may be in its config: a preset, options, these as config.json has them, or another's.
BackboneChoice = str | ResNetConfig | Mapping[str, Any] | None


def checked_backbone(config: ModelConfig, choice: BackboneChoice) -> str | ResNetConfig | None:
    """The field `backbone` of a system's config, for its `__post_init__`.

    Raises:
        ValueError: no preset of this name, or options that do not fit.
        TypeError: another type.
    """
    if isinstance(choice, Mapping):
        return ResNetConfig.from_fields(choice)
    if isinstance(choice, str) and choice not in ResNetConfig.presets:
        raise config.error(f"backbone must be one of {', '.join(ResNetConfig.presets)}, or options, got {choice!r}")
    if choice is not None and not isinstance(choice, str | ResNetConfig):
        raise TypeError(
            f"{type(config).__name__}: backbone must be a name, a ResNetConfig or None, got {type(choice).__name__}"
        )
    return choice


def backbone_choice(config: ResNetConfig) -> str | ResNetConfig:
    """What the field `backbone` has for these options: the name of the preset that they are, or themselves."""
    return next((size for size in ResNetConfig.presets if ResNetConfig.preset(size) == config), config)


def backbone_config(choice: str | ResNetConfig | None) -> ResNetConfig | None:
    """The options that the field `backbone` stands for, with every stage returned; None: it is of another kind."""
    if choice is None:
        return None
    config = ResNetConfig.preset(choice) if isinstance(choice, str) else choice
    return dataclasses.replace(config, out_features=stage_names(len(config.depths))[1:])


def make_backbone(name: str, choice: str | ResNetConfig | None, given: Any) -> Any:
    """The backbone of a system: the given one, or a new ResNet.

    Args:
        name: of the system's class, for errors.
        choice: the field `backbone` of its config.
        given: a module that is a `Backbone`, or None.

    Raises:
        ValueError: neither a choice nor a module, or a module that the choice does not describe.
        TypeError: a module that is no `Backbone`.
    """
    config = backbone_config(choice)
    if given is None:
        if config is None:
            raise ValueError(f"{name}: backbone must be given where the config's backbone is None")
        return ResNetBackbone(config)
    if not isinstance(given, nn.Module) or not isinstance(given, Backbone):
        raise TypeError(f"{name}: backbone must be a module with channels, strides and feature_maps, "
                        f"got {type(given).__name__}")  # fmt: skip
    if config is not None and getattr(given, "config", None) != config:
        raise ValueError(f"{name}: the config's backbone must be None, or what the given backbone has as config")
    return given
