"""The model of P2AT."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...nn._checkpoint import CheckpointedLayers
from ...nn.conv_norm import ConvNorm, needs_places
from ...nn.grids import resize
from ..common.config import config_overrides
from ..common.losses import segmentation_loss
from ..common.outputs import SemanticSegmenterOutput
from ..common.pretrained import PretrainedModel, load_weights, named_weights, published_weights
from ..system_backbone import make_backbone
from .blocks import P2ATBlock, P2ATContext, P2ATDecoder, P2ATFusion, P2ATHead
from .config import MAPS, P2ATConfig
from .weights import AUXILIARY_HEAD, published_fields, published_names


@dataclasses.dataclass
class P2ATOutput(SemanticSegmenterOutput):
    """The output of P2AT.

    Attributes:
        logits: [batch, num_labels, height, width], of the size of the image.
        auxiliary: where there are auxiliary heads, the logits of both, of the same shape: on the fusion at stride 8 and
            on that at stride 4.
    """

    auxiliary: tuple[Tensor, ...] | None = None


Self = TypeVar("Self", bound="P2ATForSemanticSegmentation")


class P2ATForSemanticSegmentation(PretrainedModel, CheckpointedLayers):
    """P2AT: gives each pixel of an image a class.

    Images may have any size, also one that strides do not divide: maps are resized to each other. In training mode it
    needs two images or more, as BatchNorm normalises what is left of each whole image (`contexts`). With
    `nn.SyncBatchNorm` these are of all processes.

    Args:
        config: its options.
        backbone: a module with channels, strides and feature_maps, of four maps (`models.common.backbone.Backbone`).
            None: a ResNet, as the config says. Where one is given, the config's backbone is None, or its config. A
            model with a backbone that is no ResNet is loaded by `load_state_dict`, not by `from_pretrained`.

    Raises:
        ValueError: a backbone with another number of maps, or another than the config has.
        TypeError: a backbone that is none.
    """

    config_class = P2ATConfig
    spare_weights = ("auxiliary_heads.",)
    config: P2ATConfig

    def __init__(self, config: P2ATConfig, backbone: nn.Module | None = None) -> None:
        super().__init__()
        name, channels = type(self).__name__, config.hidden_size
        self.config = config
        self.backbone = make_backbone(name, config.backbone, backbone)
        found: tuple[int, ...] = self.backbone.channels
        if len(found) != MAPS:
            raise ValueError(f"{name}: backbone must have {MAPS} feature maps, got {len(found)}")
        self.reduce = ConvNorm(found[3], channels, activation="prelu")
        self.blocks = nn.ModuleList(P2ATBlock(config) for _ in range(config.num_blocks))
        self.decoders = nn.ModuleList(P2ATDecoder(config, size) for size in (3, 5, 7))
        self.fusions = nn.ModuleList(P2ATFusion(found[i], found[i + 1], channels) for i in (1, 0))
        self.contexts = nn.ModuleList(P2ATContext(channels) for _ in range(2))
        self.refinements = nn.ModuleList(ConvNorm(channels, channels, 3, activation="prelu") for _ in range(3))
        self.merges = nn.ModuleList(ConvNorm(2 * channels, channels, 3, activation="prelu") for _ in range(2))
        self.head = P2ATHead(channels, config.num_labels)
        heads = 2 if config.auxiliary_heads else 0
        self.auxiliary_heads = nn.ModuleList(P2ATHead(channels, config.num_labels) for _ in range(heads))

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, *, return_dict: bool | None = None
    ) -> P2ATOutput | tuple[Any, ...]:
        """Gives each pixel a class.

        Args:
            pixel_values: [batch, num_channels, height, width].
            labels: integers [batch, height, width]; `semantic_loss_ignore_index` is ignored.
            return_dict: False returns a tuple.

        Returns:
            P2ATOutput: loss, in float32 at least: the mean cross-entropy over labelled pixels, and
            `auxiliary_loss_weight` times that of each auxiliary head; logits [batch, num_labels, height, width];
            auxiliary, the logits of the auxiliary heads.

        Raises:
            ValueError: pixel_values or labels of another shape; fewer than two images in training mode.
        """
        name = type(self).__name__
        if pixel_values.dim() == 4 and len(pixel_values) < 2 and self._normalises_contexts():
            raise ValueError(
                f"{name}: pixel_values must be two images or more in training mode, where BatchNorm normalises the "
                f"context of whole images, got {list(pixel_values.shape)}"
            )
        finest, fine, middle, deep = self.backbone.feature_maps(pixel_values)
        height, width = pixel_values.shape[2:]
        size = (height, width)
        x = self.reduce(deep)
        for block in self.blocks:
            x = self.run_layer(block, x)
        coarse = self.decoders[0](x)
        x = first = self.fusions[0](fine, middle, coarse)
        halfway = self.decoders[1](self.contexts[0](x))
        x = second = self.fusions[1](finest, fine, halfway)
        x = self.refinements[0](self.decoders[2](self.contexts[1](x)))
        x = self.refinements[1](self.merges[0](torch.cat([resize(halfway, x.shape[1:3]), x], -1)))
        x = self.refinements[2](self.merges[1](torch.cat([resize(coarse, x.shape[1:3]), x], -1)))
        logits = self.head(x, size)
        output = P2ATOutput(logits=logits)
        if self.config.auxiliary_heads:
            maps = zip(self.auxiliary_heads, (first, second), strict=True)
            output.auxiliary = tuple(head(x, size) for head, x in maps)
        if labels is not None:
            output.loss = self.loss(labels, logits, *(output.auxiliary or ()))
        return output.to_tuple() if return_dict is False else output

    def _normalises_contexts(self) -> bool:
        """Tells whether contexts are normalised over a batch: not in eval mode, nor where their BatchNorm is in it."""
        contexts = [context for context in self.contexts.children() if isinstance(context, P2ATContext)]
        return any(needs_places(context.out.norm) for context in contexts)

    def loss(self, labels: Tensor, logits: Tensor, *auxiliary: Tensor) -> Tensor:
        """The loss of logits and of those of auxiliary heads, each [batch, num_labels, height, width]."""
        config = self.config
        losses = [
            segmentation_loss(type(self).__name__, x, labels, config.semantic_loss_ignore_index, align_corners=True)
            for x in (logits, *auxiliary)
        ]
        total = losses[0]
        for other in losses[1:]:
            total = total + config.auxiliary_loss_weight * other
        return total

    def published_names(self) -> dict[str, tuple[str, ...]]:
        """For each weight the names in the published code whose tensors, joined on dim 0, it holds."""
        return {name: published_names(name) for name in named_weights(self)}

    @classmethod
    def from_published(cls: type[Self], weights: Mapping[str, Tensor], **overrides: Any) -> Self:
        """A model in eval mode from a state dict of the published code (github.com/mohamedac29/P2AT).

        The config follows from names and shapes, and `released` is True unless it is given.

        Args:
            weights: by the names of that code, such as `feature_reducer.conv.weight`.
            **overrides: fields of the config.

        Raises:
            ValueError: weights under other names, missing, unknown or of another shape.
            TypeError: an override that is no field.
        """
        what = f"{cls.__name__}.from_published"
        config_overrides(cls.config_class, overrides)
        config = cls.config_class(**{**published_fields(what, weights), **overrides})
        with torch.device("meta"):
            model = cls(config)
        if not config.auxiliary_heads:
            weights = {name: weight for name, weight in weights.items() if not name.startswith(AUXILIARY_HEAD)}
        own = published_weights(model, model.published_names(), weights)
        return load_weights(cls, config, own, what).eval()
