"""Activator (arXiv 2405.15953): gated units in the place of attention. What tokens have in common is their mean.

No token sees another one before the mean over all of them, and there are no positions. So a permutation of the patches
of an image changes nothing, and the patches must be large enough to show what is to be told apart.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..nn import AddBiasResidualLayerNorm, FeedForward, GatedUnit, MetaFormerBlock, PatchEmbedding
from ..nn._checkpoint import CheckpointedLayers
from ..nn._product import apply_linear
from ..nn.metaformer import run_blocks
from .common.checks import check_pixels
from .common.config import ModelConfig
from .common.losses import classification_loss
from .common.outputs import ImageClassifierOutput
from .common.pretrained import PretrainedModel, load_weights, named_weights

__all__ = ["ActivatorConfig", "ActivatorForImageClassification"]


@dataclasses.dataclass
class ActivatorConfig(ModelConfig):
    """The options of Activator; the defaults are those of the published model of CIFAR-10.

    Attributes:
        feed_forward: whether a feed-forward follows each gated unit.
        image_size: pixels of a side of the images that the model is meant for. Others of whole patches are taken too.
        patch_size: pixels of a side of a patch.
        num_channels: of an image.
        hidden_size: channels of a token.
        intermediate_size: channels inside of the gated unit and of the feed-forward.
        num_hidden_layers: blocks.
        dropout: in training only, in the feed-forward, behind its activation and behind its second product.
        layer_norm_eps: of every LayerNorm.
        num_labels, problem_type: of the classifier.

    Raises:
        ValueError: sizes that do not fit, a dropout outside of [0, 1].
    """

    model_type = "activator"
    positive = ("image_size", "num_channels", "hidden_size", "intermediate_size", "num_hidden_layers")
    divides = (("patch_size", "image_size"),)
    probabilities = ("dropout",)

    feed_forward: bool = True
    image_size: int = 32
    patch_size: int = 4
    num_channels: int = 3
    hidden_size: int = 256
    intermediate_size: int = 512
    num_hidden_layers: int = 4
    dropout: float = 0.5
    layer_norm_eps: float = 1e-5
    num_labels: int = 10
    problem_type: str | None = None


class ActivatorForImageClassification(PretrainedModel, CheckpointedLayers):
    """Patches, blocks of a gated unit and a feed-forward, and a classifier on the mean over patches.

    A block has one LayerNorm for both of its halves.

    Args:
        config: its options.
    """

    config_class = ActivatorConfig

    def __init__(self, config: ActivatorConfig) -> None:
        super().__init__()
        self.config = config
        self.patcher = PatchEmbedding(config.num_channels, config.hidden_size, (config.patch_size, config.patch_size))
        self.blocks = nn.ModuleList([self.make_block() for _ in range(config.num_hidden_layers)])
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def make_block(self) -> MetaFormerBlock:
        """A gated unit and, where there is one, a feed-forward."""
        config, width, inner = self.config, self.config.hidden_size, self.config.intermediate_size
        norm = AddBiasResidualLayerNorm(width, config.layer_norm_eps)
        feed_forward = FeedForward(width, inner, dropout=config.dropout) if config.feed_forward else None
        return MetaFormerBlock(GatedUnit(width, inner, config.layer_norm_eps), feed_forward, norm=lambda: norm)

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, *, return_dict: bool | None = None
    ) -> ImageClassifierOutput | tuple[Any, ...]:
        """Classifies images.

        Args:
            pixel_values: [batch, num_channels, height, width], of sizes that patch_size divides.
            labels: [batch] integers (classes) or [batch] numbers (regression with one label), else [batch, num_labels].
            return_dict: False returns a tuple.

        Returns:
            ImageClassifierOutput: loss, in float32 at least; logits [batch, num_labels].

        Raises:
            ValueError: pixel_values or labels of another shape, sizes that patches do not divide among them. The
                published convolution leaves out what is behind the last whole patch; here such images are refused.
        """
        name, config = type(self).__name__, self.config
        check_pixels(name, pixel_values, config.num_channels, config.patch_size)
        if any(size % config.patch_size for size in pixel_values.shape[2:]):
            raise ValueError(
                f"{name}: pixel_values must have sizes that patches of {config.patch_size} divide, "
                f"got {list(pixel_values.shape)}"
            )
        hidden = run_blocks(self, self.blocks, self.patcher(pixel_values))
        logits = apply_linear(hidden.flatten(1, 2).mean(1), self.classifier)
        loss = None if labels is None else classification_loss(name, config.problem_type, logits, labels)
        output = ImageClassifierOutput(loss, logits)
        return output.to_tuple() if return_dict is False else output

    def weight_names(self) -> dict[str, tuple[str, ...]]:
        return {name: published_names(name) for name in named_weights(self)}

    @classmethod
    def from_published(cls, weights: Mapping[str, Tensor], **fields: Any) -> ActivatorForImageClassification:
        """A model, in eval mode, from weights under the names of the published code.

        Sizes follow from the shapes of the weights, and whether there is a feed-forward from their names.

        Args:
            weights: for instance `torch.load(path, weights_only=True)`, or what safetensors reads.
            **fields: of the config, which no shape tells: image_size, dropout.

        Raises:
            ValueError: weights under other names, missing, unknown or of another shape; fields that do not fit.
            TypeError: a field that the config does not have.
        """
        what = f"{cls.__name__}.from_published"
        config = ActivatorConfig.from_fields(published_fields(what, weights), **fields)
        return load_weights(cls, config, weights, f"{what}: weights").eval()


# A part of a block here, and the same in the published code.
_PARTS = {
    "mixer_norm": ("norm",),
    "mixer.up": ("actgu.proj_1", "actgu.proj_2"),
    "mixer.norm": ("actgu.norm",),
    "mixer.down": ("actgu.proj_3",),
    "channel_mixer.up": ("ffn.net.0",),
    "channel_mixer.down": ("ffn.net.3",),
}


def published_names(name: str) -> tuple[str, ...]:
    """The names in the published code of what makes up the weight of this name."""
    place = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name)
    if place is None:
        return (name.replace("patcher.projection.", "patcher."),)
    return tuple(f"model.{place[1]}.{part}.{place[3]}" for part in _PARTS[place[2]])


def published_fields(what: str, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of the config that published weights tell.

    Raises:
        ValueError: weights under other names.
    """
    layers = {int(place[1]) for name in weights if (place := re.match(r"model\.(\d+)\.", name)) is not None}
    try:
        patches = weights["patcher.weight"]  # [hidden_size, channels, patch, patch]
        inner = weights["model.0.actgu.proj_1.weight"].shape[0]
        labels = weights["classifier.weight"].shape[0]
    except KeyError as error:
        raise ValueError(f"{what}: weights must have the published names; they lack {error.args[0]}") from None
    return {
        "feed_forward": any(".ffn." in name for name in weights),
        "image_size": 8 * patches.shape[2],
        "patch_size": patches.shape[2],
        "num_channels": patches.shape[1],
        "hidden_size": patches.shape[0],
        "intermediate_size": inner,
        "num_hidden_layers": max(layers) + 1,
        "num_labels": labels,
    }
