"""Heads on Hiera: classification of images, and feature maps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..common.backbone import NormedBackboneModel
from ..common.pretrained import named_weights, read_config
from ..common.vision_heads import ImageClassification, VisionHead
from .config import HieraConfig
from .model import HieraModel, HieraWeights
from .units import Units

Self = TypeVar("Self", bound="HieraBackbone")


class HieraForImageClassification(ImageClassification, HieraWeights):
    """Hiera with a classifier on the normalised mean over tokens.

    Logits are what transformers' class gives. The published head also applies a softmax to them in eval mode.

    Args:
        config: of the model below; it holds the options of the head too.
        base: the `HieraModel` to put the head on, whose parameters are shared; None makes a new one.

    Raises:
        TypeError: base is of another class.
        ValueError: base has no pooler, or is not of the config.
    """

    base_class = HieraModel
    ignored_weights = ("decoder.", "encoder_norm.", "multiscale_fusion.")

    def __init__(self, config: HieraConfig, base: HieraModel | None = None) -> None:
        if isinstance(base, HieraModel) and base.norm is None:
            raise ValueError(f"{type(self).__name__}: base must have a pooler, got one without")
        super().__init__(config, base)


class HieraBackbone(NormedBackboneModel, VisionHead, HieraWeights):
    """Hiera as a backbone: the maps of the stages in `out_features`, each with its own LayerNorm.

    Images whose sides patch_stride * masked_unit_size divides; positions are resized where they are not of image_size.

    transformers' class of this name has the same weights but another order of tokens (`HieraConfig.token_order`). A
    model made from it, or read from a folder that it saved, has that order, "rows", and the same outputs. Weights that
    were trained as `HieraModel` are at home in the order "units", which is the default, and which transformers' class
    does not compute. It reads a folder that such a model saved, as the weights are the same, but gives other maps. Only
    folders of the order "rows" are for transformers' class.

    Args:
        config: its options.
        base: the `HieraModel` to take the stages of, whose parameters are shared; None makes new ones.

    Raises:
        TypeError: base is of another class.
        ValueError: base is not of the config.
    """

    base_class = HieraModel
    ignored_weights = ("classifier.", "decoder.", "encoder_norm.", "multiscale_fusion.", "pooler.")

    def __init__(self, config: HieraConfig, base: HieraModel | None = None) -> None:
        if base is None:
            base = HieraModel(config, add_pooling_layer=False)
        super().__init__(config, base)
        if base.norm is not None:  # transformers' class has no pooler
            with torch.device("meta"):
                self.base = HieraModel(config, add_pooling_layer=False)
            self.base.trunk = base.trunk
            self.base.train(base.training)

    @property
    def stage_channels(self) -> tuple[int, ...]:
        """Channels of the stem and of all stages."""
        widths = self.config.widths
        return (widths[0], *widths)

    @property
    def stage_strides(self) -> tuple[int, ...]:
        """Strides of the stem and of all stages, down an image."""
        stride, step = self.config.patch_stride[0], self.config.query_stride[0]
        return tuple(stride * step**pooled for pooled in self.base.state_poolings())

    def stage_maps(self, pixel_values: Tensor) -> Sequence[Tensor]:
        trunk = self.base.trunk
        units: Units = trunk.order(type(self).__name__, pixel_values)
        by_rows = self.config.token_order == "rows"
        run = trunk(pixel_values, units, interpolate_pos_encoding=True, by_rows=by_rows)
        return [units.join(state, n) for state, n in zip(run.states, self.base.state_poolings(), strict=True)]

    def returned_states(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Of each map its tokens [batch, tokens, channels] in the order of transformers."""
        states = []
        whole = self.config.units((maps[0].shape[1], maps[0].shape[2]))
        for x, pooled in zip(maps, self.base.state_poolings(), strict=True):
            units = whole.after(pooled)
            states.append(units.reversed(units.split(x), 0))
        return tuple(states)

    def adopt(self, hf_model: nn.Module) -> None:
        """There is nothing to take over."""

    def weight_names(self) -> dict[str, tuple[str, ...]]:
        names = {f"base.{ours}": parts for ours, parts in self.base.weight_names().items()}
        return {**names, **{name: (name,) for name in named_weights(self) if not name.startswith("base.")}}

    @classmethod
    def from_live(cls: type[Self], hf_model: nn.Module, overrides: dict[str, Any]) -> Self:
        return super().from_live(hf_model, {"token_order": "rows", **overrides})

    @classmethod
    def from_pretrained(cls: type[Self], folder: str | Path, **options: Any) -> Self:
        """As of `PretrainedModel`. A folder that transformers' `HieraBackbone` saved gives token_order="rows"."""
        fields = read_config(Path(folder))
        if "token_order" not in fields and cls.transformers_class in (fields.get("architectures") or []):
            options.setdefault("token_order", "rows")
        return super().from_pretrained(folder, **options)

    def _new_origin(self) -> nn.Module:
        if self.config.token_order != "rows":
            raise ValueError(
                f"{type(self).__name__}.to_transformers: token_order must be 'rows', as transformers' class computes "
                f"nothing else, got {self.config.token_order!r}"
            )
        return super()._new_origin()
