"""Swin and Swin V2 as backbones: the feature maps of their stages, before patch merging."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ...nn import WindowAttention
from ..common.backbone import BackboneModel, NormedBackboneModel
from ..common.vision_heads import VisionHead
from ..common.weights import rename
from .base import SwinBase, share_weights
from .config import SwinConfig, pair
from .model import SwinModel, Swinv2Model

# transformers' files of a SwinBackbone put no prefix before the names of embeddings and encoder. Its live modules do.
_FILES = ((r"^swin\.(embeddings|encoder)\.", r"\1."),)
_NORM = "swin.layernorm"


class SwinMaps(BackboneModel, VisionHead, SwinBase):
    """What the backbones of Swin and Swin V2 do alike."""

    def __init__(self, config: SwinConfig, base: SwinModel | None = None) -> None:
        own = base is None
        super().__init__(config, self.base_class(config, add_pooling_layer=False) if own else base)  # type: ignore[call-arg]
        if base is not None:
            # The modules below are this model's own, as it changes them.
            with torch.device("meta"):
                self.base = self.base_class(config, add_pooling_layer=False)  # type: ignore[call-arg]
            share_weights(base, self.base)

    @property
    def stage_channels(self) -> tuple[int, ...]:
        """Channels of the stem and of all stages."""
        width = self.config.embed_dim
        return (width, *(width << stage for stage in range(len(self.config.depths))))

    @property
    def stage_strides(self) -> tuple[int, ...]:
        """Strides of the stem and of all stages, down an image."""
        patch = pair(self.config.patch_size)[0]
        return (patch, *(patch << stage for stage in range(len(self.config.depths))))

    def stage_maps(self, pixel_values: Tensor) -> Sequence[Tensor]:
        return cast("SwinModel", self.base).stage_states(pixel_values, interpolate_pos_encoding=True)[0]

    def backbone(self) -> SwinModel:
        base: SwinModel = self.base
        return base


class SwinBackbone(NormedBackboneModel, SwinMaps):
    """Swin as a backbone: what leaves the stages in `out_features` before patch merging, each with its own LayerNorm.

    Images of any size; they are padded with zeros to whole patches. As in transformers' class, a grid that is smaller
    than the window is padded to it, and not attended to as a whole as in `SwinModel`.

    Args:
        config: its options.
        base: the `SwinModel` to take the stages of, whose parameters are shared; None makes new ones.

    Raises:
        TypeError: base is of another class.
        ValueError: base is not of the config.
    """

    base_class = SwinModel
    ignored_weights = ("classifier.", "decoder.", "embeddings.mask_token")

    def __init__(self, config: SwinConfig, base: SwinModel | None = None) -> None:
        super().__init__(config, base)
        for module in self.base.modules():
            if isinstance(module, WindowAttention):
                module.clamp = False

    @classmethod
    def file_name(cls, name: str) -> str:
        return rename(super().file_name(name), _FILES)

    @classmethod
    def canonical_weights(cls, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {rename(name, _FILES): w for name, w in super().canonical_weights(weights).items()}
        # No map goes through the norm after the last stage, and files of transformers 4 lack it.
        ends = [name for name in found if name.endswith("layernorm_after.weight")]
        if ends and f"{_NORM}.weight" not in found:
            last = found[max(ends, key=lambda name: int(name.split(".")[2]))]  # encoder.layers.STAGE.
            found |= {f"{_NORM}.weight": torch.ones_like(last), f"{_NORM}.bias": torch.zeros_like(last)}
        return found

    def weight_names(self) -> dict[str, tuple[str, ...]]:
        names = super().weight_names()
        return {ours: tuple(rename(part, _FILES) for part in parts) for ours, parts in names.items()}

    @classmethod
    def published_prefix(cls) -> str:
        return cls.base_class.weight_prefix


class Swinv2Backbone(SwinMaps):
    """Swin V2 as a backbone: what leaves the stages in `out_features` before patch merging, as in transformers' class.

    There are no norms on the maps. Images of any size; they are padded with zeros to whole patches.

    Args:
        config: its options.
        base: the `Swinv2Model` to take the stages of, whose parameters are shared; None makes new ones.

    Raises:
        TypeError: base is of another class.
        ValueError: base is not of the config.
    """

    base_class = Swinv2Model
    # Weights have no prefix in transformers' class of this name. Those of the others do.
    weight_prefix = "swinv2."
    ignored_weights = ("classifier.", "decoder.", "embeddings.mask_token", "layernorm.")

    def __init__(self, config: SwinConfig, base: SwinModel | None = None) -> None:
        super().__init__(config, base)
        self.base.norm = None  # transformers' class has none

    def make_head(self) -> None:
        """There is nothing to make."""

    def returned_states(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Of each map its tokens, [batch, tokens, channels]."""
        return tuple(x.flatten(1, 2) for x in maps)

    def adopt(self, hf_model: nn.Module) -> None:
        self.base.adopt(hf_model)

    def weight_names(self) -> dict[str, tuple[str, ...]]:
        return {f"base.{ours}": parts for ours, parts in self.base.weight_names().items()}

    @classmethod
    def published_prefix(cls) -> str:
        return ""
