"""Vision models whose stages each give a map of their own stride: what such models do alike around their stages."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from typing import Any, TypeVar

from torch import Tensor

from ...nn._checkpoint import CheckpointedLayers
from .checks import refuse_arguments
from .convertible import ConvertibleModel
from .outputs import ImageModelOutput

Self = TypeVar("Self", bound="StagedModel")


class StagedModel(ConvertibleModel, CheckpointedLayers):
    """The base of models that give the map of each stage, for images of any size.

    The config has hidden_sizes and strides of each stage. A model says what its maps are (`feature_maps`).
    """

    @classmethod
    def build(cls: type[Self], config: Any, *, with_optional: bool = True) -> Self:
        return cls(config)

    @property
    def channels(self) -> tuple[int, ...]:
        """Of each feature map."""
        channels: tuple[int, ...] = self.config.hidden_sizes
        return channels

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels of the image to one step of each feature map."""
        return tuple(accumulate(self.config.strides, mul))

    def feature_maps(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """pixel_values [batch, channels, height, width] -> the map of each stage [batch, H_i, W_i, C_i]."""
        raise NotImplementedError

    def forward(
        self,
        pixel_values: Tensor,
        *,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **unsupported: Any,
    ) -> ImageModelOutput | tuple[Any, ...]:
        """Images of any size.

        Args:
            pixel_values: [batch, channels, height, width].
            output_hidden_states: also return the output of every stage. None = as the config says.
            return_dict: False returns a tuple, with the places of transformers' class. None = as the config says.
            **unsupported: other arguments of the transformers model, accepted when None or False.

        Raises:
            ValueError: as `feature_maps`; an argument that is not supported, by name.
            NotImplementedError: as `feature_maps`.
        """
        refuse_arguments(type(self).__name__, unsupported)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        output = self.as_output(self.feature_maps(pixel_values), output_hidden_states)
        if return_dict is None:
            return_dict = self.config.return_dict
        return output if return_dict else self.as_tuple(output)

    def as_output(self, maps: Sequence[Tensor], with_hidden_states: bool) -> ImageModelOutput:
        """What `forward` returns, from the feature maps."""
        states = tuple(x.permute(0, 3, 1, 2) for x in maps)
        return ImageModelOutput(states[-1], states if with_hidden_states else None)

    def as_tuple(self, output: ImageModelOutput) -> tuple[Any, ...]:
        """What `forward` returns with return_dict=False."""
        return output.to_tuple()
