"""Vision models as backbones: feature maps of several strides, which heads for segmentation and detection take."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ...nn import AddBiasResidualLayerNorm
from .config import ModelConfig
from .convertible import ConvertibleModel
from .outputs import Output


@runtime_checkable
class Backbone(Protocol):
    """What a head for dense prediction needs of a vision model.

    Attributes:
        channels: of each feature map.
        strides: pixels of the image to one step of each feature map.
    """

    @property
    def channels(self) -> tuple[int, ...]: ...

    @property
    def strides(self) -> tuple[int, ...]: ...

    def feature_maps(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """pixel_values [batch, channels, height, width] -> maps [batch, H_i, W_i, C_i], the finest first."""
        ...


@dataclasses.dataclass
class BackboneOutput(Output):
    """The output of a backbone.

    Attributes:
        feature_maps: of each stage in `out_features`, [batch, channels, height, width].
        hidden_states: on request, the embeddings and the output of every stage, [batch, channels, height, width], or
            [batch, tokens, channels] where transformers' class has that.
        attentions: always None, for callers that look.
    """

    feature_maps: tuple[Tensor, ...] = ()
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: None = None


def stage_names(stages: int) -> tuple[str, ...]:
    """The names of what a backbone may return: the stem, and its stages from 1 on."""
    return ("stem", *(f"stage{i + 1}" for i in range(stages)))


def checked_out_features(config: ModelConfig, names: Sequence[str] | None, stages: int) -> tuple[str, ...] | None:
    """`out_features` of a config, for its `__post_init__`: None, which is the last stage, or names in their order.

    Raises:
        ValueError: names that are not those of stages, twice, or in another order.
    """
    if names is None:
        return None
    known = stage_names(stages)
    if not names or [name for name in known if name in names] != list(names):
        raise config.error(f"out_features must be some of {', '.join(known)}, in this order, got {list(names)}")
    return tuple(names)


def without_default(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config of transformers, with out_features None where it names the last stage alone.

    transformers writes what None means. Then the config does not change with the number of stages.
    """
    names, depths = fields.get("out_features"), fields.get("depths")
    default = depths is not None and names is not None and list(names) == [f"stage{len(depths)}"]
    return {**fields, "out_features": None} if default else dict(fields)


class BackboneModel(ConvertibleModel):
    """The base of backbones that transformers has too. `out_features` of the config names the stages that it returns.

    A model says what its stages are: `stage_channels`, `stage_strides` and `stage_maps`, of the stem and all stages.
    """

    is_encoder = True  # a folder of a backbone gives the backbone

    @property
    def stage_channels(self) -> tuple[int, ...]:
        """Channels of the stem and of all stages."""
        raise NotImplementedError

    @property
    def stage_strides(self) -> tuple[int, ...]:
        """Strides of the stem and of all stages."""
        raise NotImplementedError

    def stage_maps(self, pixel_values: Tensor) -> Sequence[Tensor]:
        """pixel_values [batch, channels, height, width] -> stem and stages, each [batch, H_i, W_i, C_i]."""
        raise NotImplementedError

    def finish_map(self, name: str, hidden: Tensor) -> Tensor:
        """The feature map that the stage `name` gives, [batch, H_i, W_i, C_i], from its output."""
        return hidden

    def returned_states(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """`hidden_states` of the output, from the stem and all stages, each [batch, H_i, W_i, C_i]."""
        return _channels_first(maps)

    @property
    def out_features(self) -> tuple[str, ...]:
        """The names of the stages that it returns."""
        names: tuple[str, ...] | None = self.config.out_features
        return stage_names(len(self.stage_channels) - 1)[-1:] if names is None else names

    def _chosen(self) -> list[int]:
        names = stage_names(len(self.stage_channels) - 1)
        return [names.index(name) for name in self.out_features]

    @property
    def channels(self) -> tuple[int, ...]:
        """Of each feature map."""
        return tuple(self.stage_channels[i] for i in self._chosen())

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels of the image to one step of each feature map."""
        return tuple(self.stage_strides[i] for i in self._chosen())

    def feature_maps(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """The maps of the stages in `out_features`, channels last.

        Args:
            pixel_values: [batch, channels, height, width].

        Returns:
            For each stage [batch, H_i, W_i, C_i], the finest first.

        Raises:
            ValueError: pixel_values of another shape.
        """
        return self._finish(self.stage_maps(pixel_values))

    def _finish(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(self.finish_map(name, maps[i]) for i, name in zip(self._chosen(), self.out_features, strict=True))

    def forward(
        self, pixel_values: Tensor, *, output_hidden_states: bool | None = None, return_dict: bool | None = None
    ) -> BackboneOutput | tuple[Any, ...]:
        """Called as the class of this name in transformers.

        Args:
            pixel_values: [batch, channels, height, width].
            output_hidden_states: also return the stem and the output of every stage. None = as the config says.
            return_dict: False returns a tuple. None = as the config says.

        Raises:
            ValueError: pixel_values of another shape.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        maps = self.stage_maps(pixel_values)
        output = BackboneOutput(_channels_first(self._finish(maps)))
        if output_hidden_states:
            output.hidden_states = self.returned_states(maps)
        if return_dict is None:
            return_dict = self.config.return_dict
        return output if return_dict else output.to_tuple()


class NormedBackboneModel(BackboneModel):
    """The base of backbones that normalise each map that they return by a LayerNorm of its own, `hidden_states_norms`.

    It comes before `VisionHead` among the bases, whose `make_head` it fills in.
    """

    def make_head(self) -> None:
        """Sets the norms."""
        channels = dict(zip(self.out_features, self.channels, strict=True))
        self.hidden_states_norms = nn.ModuleDict(
            {name: AddBiasResidualLayerNorm(width, 1e-5) for name, width in channels.items()}
        )

    def finish_map(self, name: str, hidden: Tensor) -> Tensor:
        out: Tensor = self.hidden_states_norms[name](hidden, None, None)
        return out


def _channels_first(maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(x.permute(0, 3, 1, 2).contiguous(memory_format=torch.contiguous_format) for x in maps)
