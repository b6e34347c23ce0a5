"""SegFormer (arXiv 2105.15203): the Mix Transformer (MiT), with a classifier and with an all-MLP head for segmentation.

Features are [batch, height, width, channels] inside, and [batch, channels, height, width] in outputs, as in transformers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import (
    ACTIVATIONS,
    AddBiasResidualLayerNorm,
    MetaFormerBlock,
    MixFeedForward,
    OverlappingPatchEmbedding,
    StridedAttention,
)
from ..nn._checkpoint import CheckpointedLayers
from ..nn._product import apply_linear, apply_pointwise, is_plain, linear
from ..nn.metaformer import run_blocks
from ..nn.patch_embedding import least_size
from .common.checks import check_pixels, refuse_arguments
from .common.config import TransformersConfig, check_stages
from .common.convertible import ConvertibleModel
from .common.losses import segmentation_loss
from .common.outputs import ImageModelOutput, SemanticSegmenterOutput
from .common.vision_heads import ImageClassification, VisionHead
from .common.weights import rename

__all__ = [
    "SegformerConfig",
    "SegformerForImageClassification",
    "SegformerForSemanticSegmentation",
    "SegformerModel",
]

_LISTS = ("depths", "hidden_sizes", "num_attention_heads", "sr_ratios", "patch_sizes", "strides", "mlp_ratios")
_WIDE = {"hidden_sizes": (64, 128, 320, 512), "decoder_hidden_size": 768}

# transformers 5 renames SegFormer's weights when it reads and writes files; the names of files are used here.
_LIVE = (
    (r"\bstages\.(\d+)\.patch_embeddings\.", r"encoder.patch_embeddings.\1."),
    (r"\bstages\.(\d+)\.blocks\.", r"encoder.block.\1."),
    (r"\bstages\.(\d+)\.layer_norm\.", r"encoder.layer_norm.\1."),
    (r"\.attention\.q_proj\.", ".attention.self.query."),
    (r"\.attention\.k_proj\.", ".attention.self.key."),
    (r"\.attention\.v_proj\.", ".attention.self.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.attention\.sequence_reduction\.sequence_reduction\.", ".attention.self.sr."),
    (r"\.attention\.sequence_reduction\.layer_norm\.", ".attention.self.layer_norm."),
    (r"\.mlp\.fc1\.", ".mlp.dense1."),
    (r"\.mlp\.fc2\.", ".mlp.dense2."),
    (r"\.layernorm_before\.", ".layer_norm_1."),
    (r"\.layernorm_after\.", ".layer_norm_2."),
    (r"^decode_head\.linear_projections\.", "decode_head.linear_c."),
)


@dataclasses.dataclass
class SegformerConfig(TransformersConfig):
    """The options of SegFormer, under the names of transformers' `SegformerConfig`.

    Presets are B0 to B5 (table 6 of the paper): the encoder's sizes, and the width of the head.

    Attributes:
        num_channels: of an image.
        depths, hidden_sizes, num_attention_heads, mlp_ratios: of each stage.
        sr_ratios: of each stage the tokens along an axis to one key of attention.
        patch_sizes, strides: of the convolution before each stage, whose padding is patch_size // 2.
        hidden_dropout_prob, attention_probs_dropout_prob: in training; that of attention has to be 0 there.
        classifier_dropout_prob: before the classifier of pixels.
        drop_path_rate: of the last block, from 0 in the first.
        block_norm_eps: of the LayerNorms in blocks and after stages; others have 1e-5. transformers has 1e-5 everywhere
            (its layer_norm_eps changes nothing), the published code 1e-6 here.
        decoder_hidden_size: channels of the head for segmentation.
        semantic_loss_ignore_index: the label of pixels that the loss does not look at.
        reshape_last_stage: whether the last output is [batch, channels, height, width] as all others, rather than
            [batch, tokens, channels].

    Raises:
        ValueError: an unknown hidden_act or problem_type, lists of unequal lengths, a size below 1, heads that do not
            divide the channels, a probability outside of [0, 1].
    """

    model_type = "segformer"
    positive = ("num_channels", "decoder_hidden_size")
    choices = {"hidden_act": ACTIVATIONS}
    probabilities = (
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "classifier_dropout_prob",
        "drop_path_rate",
    )
    presets = {
        "B0": {"depths": (2, 2, 2, 2), "hidden_sizes": (32, 64, 160, 256), "decoder_hidden_size": 256},
        "B1": {"depths": (2, 2, 2, 2), "hidden_sizes": (64, 128, 320, 512), "decoder_hidden_size": 256},
        "B2": {"depths": (3, 4, 6, 3), **_WIDE},
        "B3": {"depths": (3, 4, 18, 3), **_WIDE},
        "B4": {"depths": (3, 8, 27, 3), **_WIDE},
        "B5": {"depths": (3, 6, 40, 3), **_WIDE},
    }

    num_channels: int = 3
    depths: tuple[int, ...] = (2, 2, 2, 2)
    sr_ratios: tuple[int, ...] = (8, 4, 2, 1)
    hidden_sizes: tuple[int, ...] = (32, 64, 160, 256)
    patch_sizes: tuple[int, ...] = (7, 3, 3, 3)
    strides: tuple[int, ...] = (4, 2, 2, 2)
    num_attention_heads: tuple[int, ...] = (1, 2, 5, 8)
    mlp_ratios: tuple[float, ...] = (4, 4, 4, 4)
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    classifier_dropout_prob: float = 0.1
    initializer_range: float = 0.02
    drop_path_rate: float = 0.1
    block_norm_eps: float = 1e-5
    decoder_hidden_size: int = 256
    semantic_loss_ignore_index: int = 255
    reshape_last_stage: bool = True
    output_hidden_states: bool = False
    return_dict: bool = True
    num_labels: int = 2
    problem_type: str | None = None

    def __post_init__(self) -> None:
        check_stages(self, _LISTS)
        super().__post_init__()
        for stage, (width, heads) in enumerate(zip(self.hidden_sizes, self.num_attention_heads, strict=True)):
            if width % heads:
                raise self.error(f"num_attention_heads must divide the {width} channels of stage {stage}, got {heads}")

    @property
    def hidden_size(self) -> int:
        """Channels of the last stage."""
        return self.hidden_sizes[-1]

    def to_transformers(self) -> dict[str, Any]:
        """The fields as keywords of transformers' config."""
        return {**super().to_transformers(), "num_encoder_blocks": len(self.depths)}


class SegformerModel(ConvertibleModel, CheckpointedLayers):
    """The Mix Transformer. Called as `transformers.SegformerModel`, on images of any size.

    Where a stage's sr_ratio does not divide its grid, the last rows and columns are in no key, as in transformers.

    Args:
        config: its options.
    """

    config_class = SegformerConfig
    transformers_class = "SegformerModel"
    transformers_config_class = "SegformerConfig"
    weight_prefix = "segformer."
    ignored_weights = ("classifier.", "decode_head.")
    drawn_convolutions = (nn.Conv2d,)

    def __init__(self, config: SegformerConfig) -> None:
        super().__init__()
        self.config = config
        total = sum(config.depths)
        rates = iter(config.drop_path_rate * i / max(total - 1, 1) for i in range(total))
        self.embeddings = nn.ModuleList()
        self.embedding_norms = nn.ModuleList()
        self.stages = nn.ModuleList()
        self.norms = nn.ModuleList()
        channels = config.num_channels
        for stage, width in enumerate(config.hidden_sizes):
            patch, stride = config.patch_sizes[stage], config.strides[stage]
            self.embeddings.append(OverlappingPatchEmbedding(channels, width, patch, stride, patch // 2))
            self.embedding_norms.append(AddBiasResidualLayerNorm(width, 1e-5))
            blocks = [self.make_block(stage, next(rates)) for _ in range(config.depths[stage])]
            self.stages.append(nn.ModuleList(blocks))
            self.norms.append(AddBiasResidualLayerNorm(width, config.block_norm_eps))
            channels = width
        self.apply(self.init_weights)

    def make_block(self, stage: int, drop_path: float) -> MetaFormerBlock:
        config = self.config
        width, dropout = config.hidden_sizes[stage], config.hidden_dropout_prob
        attention = StridedAttention(
            width,
            config.num_attention_heads[stage],
            config.sr_ratios[stage],
            attention_dropout=config.attention_probs_dropout_prob,
        )
        hidden = int(width * config.mlp_ratios[stage])
        return MetaFormerBlock(
            attention,
            MixFeedForward(width, hidden, config.hidden_act, dropout=dropout),
            norm="layer",
            hidden_size=width,
            eps=config.block_norm_eps,
            drop_path=drop_path,
            dropout=dropout,
        )

    @classmethod
    def build(cls, config: SegformerConfig, *, with_optional: bool = True) -> SegformerModel:
        return cls(config)

    @classmethod
    def file_name(cls, name: str) -> str:
        return rename(name, _LIVE)

    @property
    def channels(self) -> tuple[int, ...]:
        """Of each feature map."""
        return self.config.hidden_sizes

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels of the image to one step of each feature map."""
        return tuple(accumulate(self.config.strides, mul))

    def feature_maps(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """The normalised output of each stage, channels last.

        Args:
            pixel_values: [batch, channels, height, width].

        Returns:
            [batch, H_i, W_i, C_i] of each stage, the finest first.

        Raises:
            ValueError: pixel_values of another shape, or so small that a stage has no key.
            NotImplementedError: training mode with attention dropout above 0.
        """
        config = self.config
        padding = tuple(patch // 2 for patch in config.patch_sizes)
        least = least_size(config.patch_sizes, config.strides, padding, config.sr_ratios)
        check_pixels(type(self).__name__, pixel_values, config.num_channels, least)
        hidden, maps = pixel_values.permute(0, 2, 3, 1), []
        for embedding, norm, blocks, last in zip(
            self.embeddings, self.embedding_norms, self.stages, self.norms, strict=True
        ):
            hidden = run_blocks(self, blocks, norm(embedding(hidden), None, None))
            hidden = last(hidden, None, None)
            maps.append(hidden)
        return tuple(maps)

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
            return_dict: False returns a tuple. None = as the config says.
            **unsupported: other arguments of the transformers model, accepted when None or False.

        Raises:
            ValueError: pixel_values of another shape, or so small that a stage has no key; an argument that is not
                supported, by name.
            NotImplementedError: training mode with attention dropout above 0.
        """
        refuse_arguments(type(self).__name__, unsupported)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        output = self.as_output(self.feature_maps(pixel_values), output_hidden_states)
        if return_dict is None:
            return_dict = self.config.return_dict
        return output if return_dict else output.to_tuple()

    def as_output(self, maps: Sequence[Tensor], with_hidden_states: bool) -> ImageModelOutput:
        """What `forward` returns, from the feature maps."""
        states = [x.permute(0, 3, 1, 2) for x in maps]
        if not self.config.reshape_last_stage:
            states[-1] = maps[-1].flatten(1, 2)
        return ImageModelOutput(states[-1], tuple(states) if with_hidden_states else None)

    def weight_names(self) -> dict[str, tuple[str, ...]]:
        both: dict[str, str] = {}
        names: dict[str, tuple[str, ...]] = {}
        for stage, depth in enumerate(self.config.depths):
            both |= {
                f"embeddings.{stage}.projection": f"encoder.patch_embeddings.{stage}.proj",
                f"embedding_norms.{stage}": f"encoder.patch_embeddings.{stage}.layer_norm",
                f"norms.{stage}": f"encoder.layer_norm.{stage}",
            }
            for i in range(depth):
                ours, theirs = f"stages.{stage}.{i}", f"encoder.block.{stage}.{i}"
                attention = f"{theirs}.attention.self"
                both |= {
                    f"{ours}.mixer_norm": f"{theirs}.layer_norm_1",
                    f"{ours}.mixer.query": f"{attention}.query",
                    f"{ours}.mixer.out": f"{theirs}.attention.output.dense",
                    f"{ours}.channel_mixer_norm": f"{theirs}.layer_norm_2",
                    f"{ours}.channel_mixer.up": f"{theirs}.mlp.dense1",
                    f"{ours}.channel_mixer.depthwise": f"{theirs}.mlp.dwconv.dwconv",
                    f"{ours}.channel_mixer.down": f"{theirs}.mlp.dense2",
                }
                if self.config.sr_ratios[stage] > 1:
                    both[f"{ours}.mixer.reduction"] = f"{attention}.sr"
                    both[f"{ours}.mixer.reduction_norm"] = f"{attention}.layer_norm"
                for leaf in ("weight", "bias"):
                    names[f"{ours}.mixer.key_value.{leaf}"] = (f"{attention}.key.{leaf}", f"{attention}.value.{leaf}")
        for ours, theirs in both.items():
            for leaf in ("weight", "bias"):
                names[f"{ours}.{leaf}"] = (f"{theirs}.{leaf}",)
        return names


class SegformerForImageClassification(ImageClassification):
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

    Resizing is linear over positions, and its weights add up to 1, so it may as well come after a product over channels.
    The product over concatenated channels is a sum of products over maps. So here each map takes one product at its own
    stride, with the product of both weights, and no concatenated map is made. Of the 80 GFLOP that the two take for an
    image of 512 x 512 in the head of B5, 4 are left.

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
        normal = F.relu(self.batch_norm(fused.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        normal = F.dropout(normal, self.dropout, training=self.training)
        return apply_pointwise(normal, self.classifier).permute(0, 3, 1, 2)

    def fuse(self, maps: Sequence[Tensor]) -> Tensor:
        """What linear_fuse makes of the concatenated maps, [batch, H_0, W_0, hidden], without concatenating them."""
        parts = self.linear_fuse.weight.flatten(1).chunk(len(maps), 1)[::-1]  # the coarsest is the first
        total: Tensor | None = None
        for features, module, part in zip(maps, self.linear_projections, parts, strict=True):
            weight, bias = part @ module.weight, part @ module.bias
            resized = resize(linear(features, weight, bias), maps[0].shape[1:3])
            total = resized if total is None else total + resized
        assert total is not None
        return total

    def fuse_by_modules(self, maps: Sequence[Tensor]) -> Tensor:
        """The same as the paper has it, where a module was replaced or has hooks."""
        size = maps[0].shape[1:3]
        resized = [
            resize(apply_linear(x, module), size) for x, module in zip(maps, self.linear_projections, strict=True)
        ]
        return apply_pointwise(torch.cat(resized[::-1], -1), self.linear_fuse)


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """x: [batch, height, width, channels]; returns [batch, *size, channels], bilinearly, corners not aligned."""
    if tuple(x.shape[1:3]) == tuple(size):
        return x
    return F.interpolate(x.permute(0, 3, 1, 2), size=tuple(size), mode="bilinear").permute(0, 2, 3, 1)


class SegformerForSemanticSegmentation(VisionHead):
    """The Mix Transformer with the all-MLP head, whose logits have the stride of the first stage.

    Args:
        config, base: as of `VisionHead`.
    """

    base_class = SegformerModel
    ignored_weights = ("classifier.",)
    drawn_convolutions = (nn.Conv2d,)

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
