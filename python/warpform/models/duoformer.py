"""DuoFormer (arXiv 2506.12982): attention over the scales of a patch, then over patches, on the maps of a ResNet.

A patch is one place of the coarsest map. It has that place's token, the 4 of the same part of the image on the next
finer map, 16 on the next and 64 on the finest, and a scale token in front. Blocks of ViT mix the tokens inside of each
patch. Then the first token of every patch, and a class token in front, pass attentions that have neither norm nor
residual nor feed-forward, and the class token is classified.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import FeedForward
from ..nn._checkpoint import CheckpointedLayers
from ..nn._product import apply_linear
from ..nn.conv_norm import ConvNorm
from ..nn.grids import channels_first, channels_last
from ..nn.metaformer import MetaFormerBlock, add_terms, run_blocks
from ..nn.mixers import GroupedAttention
from .common.config import ModelConfig, config_overrides
from .common.init import linear_std
from .common.losses import classification_loss
from .common.outputs import ImageClassifierOutput
from .common.pretrained import PretrainedModel, load_weights, named_weights, published_weights
from .common.weights import rename
from .resnet import ResNetConfig, published_config
from .system_backbone import backbone_choice, backbone_config, checked_backbone, make_backbone

__all__ = ["DuoFormerConfig", "DuoFormerForImageClassification"]

SCALE_TOKENS = ("learned", "features")
POSITION_STD = 0.036  # of new positions, class token and scale token
MIXING_CONVOLUTIONS = 4  # 3x3, which make the scale token of features

_PUBLISHED = (
    (r"^backbone\.conv1\.", "resnet_projector.0."),
    (r"^backbone\.bn1\.", "resnet_projector.1."),
    (r"^projections\.(\d)\.", r"projection.proj_heads\1."),
    (r"^scale_token$", "channel_token"),
    (r"^scale_features\.strided\.0\.(\d)\.", r"chann_proj1.conv\1."),
    (r"^scale_features\.strided\.1\.(\d)\.", r"chann_proj2.conv\1."),
    (r"^scale_features\.mixing\.(\d)\.", r"chann_proj_all.nConvs.\1."),
    (r"^scale_positions$", "vision_transformer.pos_embed_for_scale"),
    (r"^class_token$", "vision_transformer.cls_token"),
    (r"^positions$", "vision_transformer.pos_embed"),
    (r"^norm\.", "vision_transformer.fc_norm."),
    (r"^classifier\.", "vision_transformer.head."),
    (r"^scale_blocks\.(\d+)\.", r"vision_transformer.scaleBlocks.\1."),
    (r"^patch_attentions\.(\d+)\.", r"vision_transformer.blocks.\1.attn."),
    (r"\.mixer\.", ".attn."),
    (r"\.attn\.out\.", ".attn.proj."),
    (r"\.mixer_norm\.", ".norm1."),
    (r"\.channel_mixer_norm\.", ".norm2."),
    (r"\.channel_mixer\.up\.", ".mlp.fc1."),
    (r"\.channel_mixer\.down\.", ".mlp.fc2."),
)


@dataclasses.dataclass
class DuoFormerConfig(ModelConfig):
    """The options of DuoFormer. With the defaults it is the published one of two scales.

    Attributes:
        num_scales: how many maps of the backbone have tokens in a patch, the coarsest ones.
        scale_token: what stands in front of the tokens of a patch: a vector that is "learned", the same for all
            patches, or one that convolutions make of all "features" at its place.
        backbone: a preset of `ResNetConfig`, or a `ResNetConfig`; None: the model is given a backbone of another kind.
        image_size: pixels of a side, a multiple of the stride of the coarsest map. It fixes the positions of patches.
        hidden_size: channels of a token.
        scale_layers, patch_layers: blocks over the tokens of a patch, and attentions over patches.
        num_attention_heads, intermediate_size: of both, and of the blocks.
        hidden_dropout_prob: in training, on what attention and feed-forward give.
        initializer_range: the standard deviation of new weights of products; None: that of `torch.nn.Linear`, which is
            0.02 for the published width. Attentions without a residual hardly hand anything on where it is smaller.
        num_labels, problem_type: of the classifier.

    Raises:
        ValueError: sizes that do not fit, an unknown scale_token, or no such backbone.
    """

    model_type = "duoformer"
    positive = ("num_scales", "image_size", "hidden_size", "scale_layers", "patch_layers", "intermediate_size")
    divides = (("num_attention_heads", "hidden_size"),)
    choices = {"scale_token": SCALE_TOKENS}
    probabilities = ("hidden_dropout_prob",)

    num_scales: int = 2
    scale_token: str = "learned"
    backbone: str | ResNetConfig | None = "50"
    image_size: int = 224
    hidden_size: int = 768
    scale_layers: int = 12
    patch_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    layer_norm_eps: float = 1e-6
    hidden_dropout_prob: float = 0.0
    initializer_range: float | None = None
    num_labels: int = 2
    problem_type: str | None = None

    def __post_init__(self) -> None:
        self.backbone = checked_backbone(self, self.backbone)
        super().__post_init__()
        if self.initializer_range is None:
            self.initializer_range = linear_std(self.hidden_size)

    @property
    def patch_tokens(self) -> int:
        """Tokens of a patch, with the scale token: 2, 6, 22 and 86 for 1 to 4 scales."""
        return 1 + sum(4**scale for scale in range(self.num_scales))


def cut_patches(x: Tensor, sides: int) -> Tensor:
    """x [batch, rows * sides, columns * sides, channels] -> [batch, rows * columns, sides^2, channels].

    The tokens of a patch come row by row, but those of 2 x 2 column by column, as in the published code.
    """
    parts = x.unflatten(2, (-1, sides)).unflatten(1, (-1, sides))  # [batch, rows, y, columns, x, channels]
    order = (0, 1, 3, 4, 2, 5) if sides == 2 else (0, 1, 3, 2, 4, 5)
    return parts.permute(order).flatten(3, 4).flatten(1, 2)


class ScaleFeatures(nn.Module):
    """The scale tokens that are made of features: all maps shrunk to the coarsest, joined and mixed by convolutions.

    Args:
        channels: of the maps, the finest first; each has twice the sides of the next.
        hidden_size: channels of a token.

    Attributes:
        strided: for each map but the two coarsest 3x3 convolutions of stride 2; a max-pooling 2x2 follows. They begin
            with number 1, as in the published code.
        mixing: 3x3 convolutions with bias, BatchNorm and ReLU.
    """

    def __init__(self, channels: tuple[int, ...], hidden_size: int) -> None:
        super().__init__()
        self.strided = nn.ModuleList(
            nn.ModuleDict({str(i + 1): nn.Conv2d(size, size, 3, 2, 1) for i in range(len(channels) - 2 - place)})
            for place, size in enumerate(channels[:-2])
        )
        sizes = [sum(channels), *[hidden_size] * MIXING_CONVOLUTIONS]
        self.mixing = nn.ModuleList(
            ConvNorm(first, second, 3, bias=True, activation="relu") for first, second in itertools.pairwise(sizes)
        )

    def forward(self, maps: tuple[Tensor, ...]) -> Tensor:
        """maps: [batch, H_i, W_i, C_i], the finest first; returns [batch, patches, hidden_size]."""
        shrunk = []
        for place, x in enumerate(maps[:-1]):
            x = channels_first(x)
            if place < len(self.strided):
                for conv in self.strided[place].values():  # type: ignore[operator]
                    x = conv(x)
            shrunk.append(channels_last(F.max_pool2d(x, 2)))
        x = torch.cat([*shrunk, maps[-1]], -1)
        for layer in self.mixing:
            x = layer(x)
        return x.flatten(1, 2)


Self = TypeVar("Self", bound="DuoFormerForImageClassification")


class DuoFormerForImageClassification(PretrainedModel, CheckpointedLayers):
    """Classifies images by patches that have tokens of several scales.

    Images must have the size that the config says. The published code does not run with two scales, as its table of
    positions has 21 rows then, where a patch has 6 tokens; here it has 6. The final norm is computed there and thrown
    away. So `norm` is not called here; its parameters count and are in files, and requires_grad is False for them.

    Args:
        config: its options.
        backbone: a module with channels, strides and feature_maps (`models.common.backbone.Backbone`), each map of
            twice the stride of the map before. None: a ResNet, as the config says. Where one is given, the config's
            backbone is None, or its config. A model with a backbone that is no ResNet is loaded by `load_state_dict`,
            not by `from_pretrained`.

    Attributes:
        projections: for each of the maps that have tokens, by its place from the finest, a product to hidden_size.
        scale_positions: [1, 1, patch_tokens, hidden_size], the same for all patches.
        positions: [1, 1 + patches, hidden_size].

    Raises:
        ValueError: fewer maps than scales, strides that do not double, an image_size that they do not divide, or a
            backbone other than the config's.
        TypeError: a backbone that is none.
    """

    config_class = DuoFormerConfig
    config: DuoFormerConfig

    def __init__(self, config: DuoFormerConfig, backbone: nn.Module | None = None) -> None:
        super().__init__()
        self.config = config
        self.backbone = make_backbone(type(self).__name__, config.backbone, backbone)
        channels, width = self._check_backbone(), config.hidden_size
        self.patch_grid = config.image_size // self.backbone.strides[-1]
        patches = self.patch_grid**2
        chosen = range(len(channels) - 1, len(channels) - 1 - config.num_scales, -1)
        self.projections = nn.ModuleDict({str(i): nn.Linear(channels[i], width) for i in chosen})
        self.scale_token: nn.Parameter | None = None
        self.scale_features: ScaleFeatures | None = None
        if config.scale_token == "learned":
            self.scale_token = nn.Parameter(torch.empty(1, 1, 1, width))
        else:
            self.scale_features = ScaleFeatures(channels, width)
        self.scale_positions = nn.Parameter(torch.empty(1, 1, config.patch_tokens, width))
        heads = config.num_attention_heads
        self.scale_blocks = nn.ModuleList(
            MetaFormerBlock(
                GroupedAttention(width, heads, patches),
                FeedForward(width, config.intermediate_size),
                norm="layer",
                eps=config.layer_norm_eps,
                dropout=config.hidden_dropout_prob,
            )
            for _ in range(config.scale_layers)
        )
        self.class_token = nn.Parameter(torch.empty(1, 1, width))
        self.positions = nn.Parameter(torch.empty(1, 1 + patches, width))
        self.patch_attentions = nn.ModuleList(GroupedAttention(width, heads, 1) for _ in range(config.patch_layers))
        self.norm = nn.LayerNorm(width, config.layer_norm_eps).requires_grad_(False)
        self.classifier = nn.Linear(width, config.num_labels)
        self.reset_parameters()

    def _check_backbone(self) -> tuple[int, ...]:
        """The channels of the backbone's maps."""
        name, config = type(self).__name__, self.config
        channels, strides = tuple(self.backbone.channels), tuple(self.backbone.strides)
        if len(channels) < config.num_scales:
            raise ValueError(f"{name}: backbone must have {config.num_scales} feature maps, got {len(channels)}")
        if any(2 * first != second for first, second in itertools.pairwise(strides)):
            raise ValueError(f"{name}: backbone must have maps of which each has twice the stride of the one before, "
                             f"got strides {strides}")  # fmt: skip
        if config.image_size % strides[-1]:
            raise ValueError(f"{name}: image_size must be a multiple of {strides[-1]}, got {config.image_size}")
        return channels

    def reset_parameters(self) -> None:
        """Draws all weights but the backbone's."""
        for child in self.children():
            if child is not self.backbone:
                child.apply(self.init_weights)
        convolutions = [] if self.scale_features is None else list(self.scale_features.strided.modules())
        for module in (*self.projections.values(), *convolutions):
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
                nn.init.normal_(module.bias, std=1e-6)  # type: ignore[arg-type]
        for tokens in (self.scale_token, self.class_token):
            if tokens is not None:
                nn.init.normal_(tokens, std=POSITION_STD)
        for positions in (self.scale_positions, self.positions):
            nn.init.trunc_normal_(positions, std=POSITION_STD)

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, *, return_dict: bool | None = None
    ) -> ImageClassifierOutput | tuple[Any, ...]:
        """Classifies images.

        Args:
            pixel_values: [batch, num_channels, image_size, image_size].
            labels: [batch] integers (classes) or [batch] numbers (regression with one label), else [batch, num_labels].
            return_dict: False returns a tuple.

        Returns:
            ImageClassifierOutput: loss, in float32 at least; logits [batch, num_labels].

        Raises:
            ValueError: pixel_values or labels of another shape.
        """
        name, size = type(self).__name__, self.config.image_size
        if pixel_values.dim() != 4 or list(pixel_values.shape[2:]) != [size, size]:
            raise ValueError(
                f"{name}: pixel_values must be of shape [batch, num_channels, {size}, {size}], "
                f"got {list(pixel_values.shape)}"
            )
        maps = self.backbone.feature_maps(pixel_values)
        hidden = run_blocks(self, self.scale_blocks, self.scale_tokens(maps))
        class_token = self.class_token.expand(len(hidden), -1, -1)
        x = torch.cat([class_token.to(hidden.dtype), hidden[:, :, 0]], 1) + self.positions
        for attention in self.patch_attentions:
            added, bias = self.run_layer(attention, x)
            x = F.dropout(add_terms(added, None, bias), self.config.hidden_dropout_prob, self.training)
        logits = self.classifier(x[:, 0])
        loss = None
        if labels is not None:
            loss = classification_loss(name, self.config.problem_type, logits, labels)
        output = ImageClassifierOutput(loss, logits)
        return output.to_tuple() if return_dict is False else output

    def scale_tokens(self, maps: tuple[Tensor, ...]) -> Tensor:
        """The tokens of all patches, with positions: [batch, patches, patch_tokens, hidden_size].

        Args:
            maps: [batch, H_i, W_i, C_i], the finest first.
        """
        if self.scale_features is not None:
            first = self.scale_features(maps).unsqueeze(2)
        else:
            assert self.scale_token is not None
            first = self.scale_token.expand(len(maps[-1]), self.patch_grid**2, -1, -1)
        tokens = [first]
        for place, projection in self.projections.items():
            sides = 2 ** (len(maps) - 1 - int(place))
            tokens.append(cut_patches(apply_linear(maps[int(place)], projection), sides))
        return torch.cat([t.to(tokens[-1].dtype) for t in tokens], 2) + self.scale_positions

    def published_names(self) -> dict[str, tuple[str, ...]]:
        """For each weight its name in the published code."""
        return {name: (_published_name(name),) for name in named_weights(self)}

    @classmethod
    def from_published(cls: type[Self], weights: Mapping[str, Tensor], **overrides: Any) -> Self:
        """A model in eval mode from a state dict of the published code's model without extra parameters.

        The config follows from names and shapes; the number of heads does not, and is 12 unless it is given.

        Args:
            weights: by the names of that code, such as `vision_transformer.pos_embed_for_scale`.
            **overrides: fields of the config.

        Raises:
            ValueError: weights under other names, missing, unknown or of another shape.
            TypeError: an override that is no field.
        """
        what = f"{cls.__name__}.from_published"
        config_overrides(cls.config_class, overrides)
        config = cls.config_class(**{**_config_of(what, weights), **overrides})
        with torch.device("meta"):
            model = cls(config)
        own = published_weights(model, model.published_names(), weights)
        return load_weights(cls, config, own, what).eval()


def _published_name(name: str) -> str:
    if name.startswith("backbone.layer"):
        stage, _, rest = name.removeprefix("backbone.layer").partition(".")
        return f"resnet_projector.{int(stage) + 3}.{rest}"
    return rename(name, _PUBLISHED)


def _config_of(what: str, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields that published weights tell."""
    transformer = "vision_transformer."
    needed = [f"{transformer}{name}" for name in ("pos_embed", "head.weight", "scaleBlocks.0.mlp.fc1.weight")]
    missing = [name for name in needed if name not in weights]
    if missing:
        raise ValueError(f"{what}: weights must have the published names, and lack {missing[0]}")
    sequence = {"0": "conv1", "1": "bn1", **{str(stage + 3): f"layer{stage}" for stage in range(1, 5)}}
    resnet_weights = {}
    for name, weight in weights.items():
        if name.startswith("resnet_projector."):
            _, place, rest = name.split(".", 2)
            resnet_weights[f"{sequence.get(place, place)}.{rest}"] = weight
    resnet = published_config(what, resnet_weights)
    layers = {kind: {name.split(".")[2] for name in weights if name.startswith(f"{transformer}{kind}.")}
              for kind in ("scaleBlocks", "blocks")}  # fmt: skip
    positions, head, inside = (weights[name].shape for name in needed)
    found = backbone_config(resnet)
    stride = 4 << (len(found.depths) - 1) if found is not None else 32
    return {
        "num_scales": sum(name.startswith("projection.") and name.endswith(".weight") for name in weights),
        "scale_token": "learned" if "channel_token" in weights else "features",
        "backbone": backbone_choice(resnet),
        "image_size": stride * math.isqrt(positions[1] - 1),
        "hidden_size": positions[2],
        "scale_layers": len(layers["scaleBlocks"]),
        "patch_layers": len(layers["blocks"]),
        "intermediate_size": inside[0],
        "num_labels": head[0],
    }
