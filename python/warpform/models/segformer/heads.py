"""Heads on the Mix Transformer: a classifier of images, and SegFormer's all-MLP head for segmentation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn._product import apply_linear, apply_pointwise, is_plain, linear
from ...nn.grids import resize
from ..common.checks import refuse_arguments
from ..common.losses import segmentation_loss
from ..common.outputs import ImageModelOutput, SemanticSegmenterOutput
from ..common.vision_heads import ImageClassification, VisionHead
from .model import SegformerBase, SegformerModel


class SegformerForImageClassification(ImageClassification, SegformerBase):
    """The Mix Transformer with a classifier on the mean over tokens.

    Args:
        config, base: as of `VisionHead`.
    """

    base_class = SegformerModel
    ignored_weights = ("decode_head.",)

    def pooled(self, run: ImageModelOutput) -> Tensor:
        last = run.last_hidden_state
        return last.flatten(2).mean(2) if last.dim() == 4 else last.mean(1)


class SegformerDecodeHead(nn.Module):
    """The all-MLP head (section 3.2 of the paper): maps of all strides to classes at the finest.

    Each map -> Linear, resized to the finest map; all concatenated, the coarsest first -> 1x1 convolution, BatchNorm,
    ReLU -> 1x1 convolution to the classes.

    Resizing is linear over positions, and its weights add up to 1, so a product over channels may come before it. The
    product over concatenated channels is a sum of products over maps. So here each map takes one product at its own
    stride, with the product of both weights, and no concatenated map is made. Of the 80 GFLOP that these products take
    for an image of 512 x 512 in the head of B5, 4 are left.

    Args:
        channels: of each map.
        hidden_size: of the head.
        num_labels: classes.
        dropout: before the classes, in training only.
    """

    def __init__(self, channels: Sequence[int], hidden_size: int, num_labels: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear_projections = nn.ModuleList([nn.Linear(width, hidden_size) for width in channels])
        self.linear_fuse = nn.Conv2d(hidden_size * len(channels), hidden_size, 1, bias=False)
        self.batch_norm = nn.BatchNorm2d(hidden_size)
        self.dropout = dropout
        self.classifier = nn.Conv2d(hidden_size, num_labels, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """maps: [batch, H_i, W_i, C_i], the finest first; returns logits [batch, num_labels, H_0, W_0]."""
        plain = is_plain(self.linear_fuse, nn.Conv2d) and all(
            is_plain(module, nn.Linear) for module in self.linear_projections
        )
        fused = self.fuse(maps) if plain else self.fuse_by_modules(maps)
        normal = F.relu(self.batch_norm(fused.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        normal = F.dropout(normal, self.dropout, training=self.training)
        return apply_pointwise(normal, self.classifier).permute(0, 3, 1, 2)

    def fuse(self, maps: Sequence[Tensor]) -> Tensor:
        """What linear_fuse makes of the concatenated maps, [batch, H_0, W_0, hidden], without concatenating them."""
        parts = self.linear_fuse.weight.flatten(1).chunk(len(maps), 1)[::-1]  # the coarsest is the first
        total: Tensor | None = None
        for features, module, part in zip(maps, self.linear_projections, parts, strict=True):
            projection = cast("nn.Linear", module)
            weight, bias = part @ projection.weight, part @ projection.bias
            resized = resize(linear(features, weight, bias), maps[0].shape[1:3])
            total = resized if total is None else resized.add_(total)
        assert total is not None
        return total

    def fuse_by_modules(self, maps: Sequence[Tensor]) -> Tensor:
        """The same as the paper has it, where a module was replaced or has hooks."""
        size = maps[0].shape[1:3]
        resized = [
            resize(apply_linear(x, module), size) for x, module in zip(maps, self.linear_projections, strict=True)
        ]
        return apply_pointwise(torch.cat(resized[::-1], -1), self.linear_fuse)


class SegformerForSemanticSegmentation(VisionHead, SegformerBase):
    """The Mix Transformer with the all-MLP head, whose logits have the stride of the first stage.

    Args:
        config, base: as of `VisionHead`.
    """

    base_class = SegformerModel
    ignored_weights = ("classifier.",)

    def make_head(self) -> None:
        config = self.config
        self.decode_head = SegformerDecodeHead(
            config.hidden_sizes, config.decoder_hidden_size, config.num_labels, config.classifier_dropout_prob
        )

    def weight_names(self) -> dict[str, tuple[str, ...]]:
        names = super().weight_names()
        for stage in range(len(self.config.depths)):
            for leaf in ("weight", "bias"):
                ours = f"decode_head.linear_projections.{stage}.{leaf}"
                names[ours] = (f"decode_head.linear_c.{stage}.proj.{leaf}",)
        return names

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        *,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **unsupported: Any,
    ) -> SemanticSegmenterOutput | tuple[Any, ...]:
        """Gives each pixel a class.

        Args:
            pixel_values: [batch, channels, height, width], of any size.
            labels: integers [batch, height, width]; semantic_loss_ignore_index of the config is in no loss.
            output_hidden_states: also return the output of every stage. None = as the config says.
            return_dict: False returns a tuple. None = as the config says.
            **unsupported: other arguments of the transformers model, accepted when None or False.

        Returns:
            SemanticSegmenterOutput: loss, in float32 at least, of the logits resized to the labels; logits [batch,
            num_labels, ceil(height / 4), ceil(width / 4)] with the usual strides.

        Raises:
            ValueError: as `SegformerModel`; labels of another shape.
            NotImplementedError: training mode with attention dropout above 0.
        """
        name, config = type(self).__name__, self.config
        refuse_arguments(name, unsupported)
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        maps = self.base.feature_maps(pixel_values)
        logits = self.decode_head(maps)
        loss = None
        if labels is not None:
            loss = segmentation_loss(name, logits, labels, config.semantic_loss_ignore_index)
        states = self.base.as_output(maps, True).hidden_states if output_hidden_states else None
        output = SemanticSegmenterOutput(loss, logits, states)
        if return_dict is None:
            return_dict = config.return_dict
        return output if return_dict else output.to_tuple()
