"""PoolFormer (arXiv 2111.11418): average pooling in the place of attention.

Inside, features are [batch, height, width, channels]; in outputs [batch, channels, height, width], as in transformers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn

from ..nn import ACTIVATIONS, FeedForward, MetaFormerBlock, OverlappingPatchEmbedding, PoolMixer, SampleNorm
from ..nn.metaformer import run_blocks
from ..nn.patch_embedding import least_size
from .common.checks import check_pixels
from .common.config import TransformersConfig, check_stages, drop_path_rates
from .common.outputs import ImageModelOutput
from .common.staged import StagedModel
from .common.vision_heads import ImageClassification

__all__ = ["PoolFormerConfig", "PoolFormerForImageClassification", "PoolFormerModel"]

_LISTS = ("depths", "hidden_sizes", "patch_sizes", "strides", "padding")
_SMALL, _MEDIUM = {"hidden_sizes": (64, 128, 320, 512)}, {"hidden_sizes": (96, 192, 384, 768)}


@dataclasses.dataclass
class PoolFormerConfig(TransformersConfig):
    """The options of PoolFormer, under the names of transformers' `PoolFormerConfig`.

    Presets are S12, S24, S36, M36 and M48 (table 1 of the paper).

    Attributes:
        num_channels: of an image.
        pool_size: the side of the neighbourhood that a token is pooled over.
        mlp_ratio: hidden channels of a feed-forward to channels of a token.
        depths, hidden_sizes: blocks and channels of each stage.
        patch_sizes, strides, padding: of the convolution before each stage.
        drop_path_rate: of the last block, from 0 in the first. Each half of a block is dropped once, as in the paper;
            transformers drops inside of the feed-forward too.
        use_layer_scale, layer_scale_init_value: whether what a half adds has a factor a channel, and its first value.

    Raises:
        ValueError: an unknown hidden_act or problem_type, lists of unequal lengths, a size below 1, an even pool_size,
            a probability outside of [0, 1].
    """

    model_type = "poolformer"
    positive = ("num_channels", "pool_size")
    choices = {"hidden_act": ACTIVATIONS}
    probabilities = ("drop_path_rate",)
    presets = {
        "S12": {"depths": (2, 2, 6, 2), **_SMALL},
        "S24": {"depths": (4, 4, 12, 4), **_SMALL},
        "S36": {"depths": (6, 6, 18, 6), **_SMALL, "layer_scale_init_value": 1e-6},
        "M36": {"depths": (6, 6, 18, 6), **_MEDIUM, "layer_scale_init_value": 1e-6},
        "M48": {"depths": (8, 8, 24, 8), **_MEDIUM, "layer_scale_init_value": 1e-6},
    }

    num_channels: int = 3
    pool_size: int = 3
    mlp_ratio: float = 4.0
    depths: tuple[int, ...] = (2, 2, 6, 2)
    hidden_sizes: tuple[int, ...] = (64, 128, 320, 512)
    patch_sizes: tuple[int, ...] = (7, 3, 3, 3)
    strides: tuple[int, ...] = (4, 2, 2, 2)
    padding: tuple[int, ...] = (2, 1, 1, 1)
    drop_path_rate: float = 0.0
    hidden_act: str = "gelu"
    use_layer_scale: bool = True
    layer_scale_init_value: float = 1e-5
    initializer_range: float = 0.02
    output_hidden_states: bool = False
    return_dict: bool = True
    num_labels: int = 2
    problem_type: str | None = None

    def __post_init__(self) -> None:
        check_stages(self, _LISTS, {"padding": 0})
        super().__post_init__()
        if self.pool_size % 2 == 0:
            raise self.error(f"pool_size must be odd, got {self.pool_size}")

    @property
    def hidden_size(self) -> int:
        """Channels of the last stage."""
        return self.hidden_sizes[-1]

    def to_transformers(self) -> dict[str, Any]:
        """The fields as keywords of transformers' config."""
        return {**super().to_transformers(), "num_encoder_blocks": len(self.depths)}


class PoolFormerModel(StagedModel):
    """PoolFormer without a head. Called as `transformers.PoolFormerModel`, on images of any size.

    Args:
        config: its options.
    """

    config_class = PoolFormerConfig
    transformers_class = "PoolFormerModel"
    transformers_config_class = "PoolFormerConfig"
    weight_prefix = "poolformer."
    ignored_weights = ("norm.", "classifier.")
    drawn_convolutions = (nn.Conv2d,)

    def __init__(self, config: PoolFormerConfig) -> None:
        super().__init__()
        self.config = config
        rates = iter(drop_path_rates(config.drop_path_rate, sum(config.depths)))
        self.embeddings = nn.ModuleList()
        self.stages = nn.ModuleList()
        channels = config.num_channels
        convolutions = zip(config.hidden_sizes, config.patch_sizes, config.strides, config.padding, strict=True)
        for depth, (width, *convolution) in zip(config.depths, convolutions, strict=True):
            self.embeddings.append(OverlappingPatchEmbedding(channels, width, *convolution))
            self.stages.append(nn.ModuleList([self.make_block(width, next(rates)) for _ in range(depth)]))
            channels = width
        self.apply(self.init_weights)

    def make_block(self, channels: int, drop_path: float) -> MetaFormerBlock:
        config = self.config
        return MetaFormerBlock(
            PoolMixer(config.pool_size),
            FeedForward(channels, int(config.mlp_ratio * channels), config.hidden_act, pointwise=True),
            norm="group",
            hidden_size=channels,
            eps=1e-5,
            layer_scale=config.layer_scale_init_value if config.use_layer_scale else None,
            drop_path=drop_path,
        )

    def feature_maps(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """The output of each stage, channels last.

        Args:
            pixel_values: [batch, channels, height, width].

        Returns:
            [batch, H_i, W_i, C_i] of each stage, the finest first.

        Raises:
            ValueError: pixel_values of another shape, or smaller than a patch.
        """
        config = self.config
        convolutions = (config.patch_sizes, config.strides, config.padding)
        least = least_size(*convolutions, (1,) * len(config.depths))
        check_pixels(type(self).__name__, pixel_values, config.num_channels, least)
        hidden, maps = pixel_values.permute(0, 2, 3, 1), []
        for embedding, blocks in zip(self.embeddings, self.stages, strict=True):
            hidden = run_blocks(self, blocks, embedding(hidden))
            maps.append(hidden)
        return tuple(maps)

    def as_tuple(self, output: ImageModelOutput) -> tuple[Any, ...]:
        """With None in the second place, as in transformers."""
        last, *others = output.to_tuple()
        return (last, None, *others)

    def weight_names(self) -> dict[str, tuple[str, ...]]:
        both: dict[str, str] = {}
        names: dict[str, tuple[str, ...]] = {}
        for stage, depth in enumerate(self.config.depths):
            both[f"embeddings.{stage}.projection"] = f"encoder.patch_embeddings.{stage}.projection"
            for i in range(depth):
                ours, theirs = f"stages.{stage}.{i}", f"encoder.block.{stage}.{i}"
                both |= {
                    f"{ours}.mixer_norm": f"{theirs}.before_norm",
                    f"{ours}.channel_mixer_norm": f"{theirs}.after_norm",
                    f"{ours}.channel_mixer.up": f"{theirs}.output.conv1",
                    f"{ours}.channel_mixer.down": f"{theirs}.output.conv2",
                }
                if self.config.use_layer_scale:
                    names[f"{ours}.mixer_scale"] = (f"{theirs}.layer_scale_1",)
                    names[f"{ours}.channel_mixer_scale"] = (f"{theirs}.layer_scale_2",)
        for ours, theirs in both.items():
            for leaf in ("weight", "bias"):
                names[f"{ours}.{leaf}"] = (f"{theirs}.{leaf}",)
        return names


class PoolFormerForImageClassification(ImageClassification):
    """PoolFormer with a classifier on the mean over normalised tokens.

    Args:
        config, base: as of `VisionHead`.
    """

    base_class = PoolFormerModel
    drawn_convolutions = (nn.Conv2d,)

    def make_head(self) -> None:
        self.norm = SampleNorm(self.config.hidden_size)
        super().make_head()

    def pooled(self, run: ImageModelOutput) -> Tensor:
        normal: Tensor = self.norm(run.last_hidden_state.permute(0, 2, 3, 1))
        return normal.mean((1, 2))
