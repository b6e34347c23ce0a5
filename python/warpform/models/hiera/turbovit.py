"""A hierarchical transformer whose stages are free, with windowed and global blocks mixed (TurboViT, 2308.11421)."""

from __future__ import annotations

from torch import Tensor, nn

from ...nn import AddBiasResidualLayerNorm
from ..common.losses import classification_loss
from ..common.outputs import ImageClassifierOutput
from .config import TurboViTConfig
from .model import HieraWeights
from .trunk import HieraTrunk, checked_units


class TurboViTForImageClassification(HieraWeights):
    """The stages of `TurboViTConfig`, with a classifier on the normalised mean over tokens.

    Images whose sides patch_stride * masked_unit_size divides; others are refused.

    Args:
        config: its options.
    """

    config_class = TurboViTConfig

    def __init__(self, config: TurboViTConfig) -> None:
        super().__init__()
        self.config = config
        self.trunk = HieraTrunk(config)
        self.norm = AddBiasResidualLayerNorm(config.hidden_size, config.layer_norm_eps)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.apply(self.init_weights)

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        *,
        bool_masked_pos: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
    ) -> ImageClassifierOutput | tuple[Tensor, ...]:
        """Classifies images.

        Args:
            pixel_values: [batch, channels, height, width], of image_size.
            labels: [batch] integers (classes) or [batch] numbers (regression with one label), else [batch, num_labels].
            bool_masked_pos: bool or integers [batch, units], units row by row: 1 for those that are kept, any number
                an image. None keeps all.
            interpolate_pos_encoding: resizes positions for images of another size.
            num_items_in_batch: what the sum of the losses is divided by, in place of the number of labels.
            return_dict: False returns a tuple. None = as the config says.

        Returns:
            ImageClassifierOutput: loss, in float32 at least; logits [batch, num_labels].

        Raises:
            TypeError: bool_masked_pos of another dtype.
            ValueError: pixel_values, labels or bool_masked_pos of another shape.
        """
        name = type(self).__name__
        units = self.trunk.order(name, pixel_values, interpolate_pos_encoding)
        kept = checked_units(name, bool_masked_pos, pixel_values.shape[0], units)
        run = self.trunk(pixel_values, units, kept, interpolate_pos_encoding=interpolate_pos_encoding)
        logits = self.classifier(self.norm(run.mean(), None, None))
        loss = None
        if labels is not None:
            loss = classification_loss(name, self.config.problem_type, logits, labels, num_items_in_batch)
        output = ImageClassifierOutput(loss, logits)
        if return_dict is None:
            return_dict = self.config.return_dict
        return output if return_dict else output.to_tuple()
