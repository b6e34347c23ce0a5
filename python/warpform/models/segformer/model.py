"""The Mix Transformer (MiT), SegFormer's encoder (arXiv 2105.15203, section 3.1).

Inside, features are [batch, height, width, channels]; in outputs [batch, channels, height, width], as in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from ...nn import (
    AddBiasResidualLayerNorm,
    MetaFormerBlock,
    MixFeedForward,
    OverlappingPatchEmbedding,
    StridedAttention,
)
from ...nn.metaformer import run_blocks
from ...nn.patch_embedding import least_size
from ..common.checks import check_pixels
from ..common.config import config_overrides, drop_path_rates
from ..common.convertible import ConvertibleModel
from ..common.outputs import ImageModelOutput
from ..common.pretrained import load_weights
from ..common.staged import StagedModel
from . import weights as names_of
from .config import SegformerConfig

Self = TypeVar("Self", bound="SegformerBase")


class SegformerBase(ConvertibleModel):
    """What the encoder and the models with a head do alike about names of weights."""

    config: SegformerConfig
    drawn_convolutions = (nn.Conv2d,)

    @classmethod
    def file_name(cls, name: str) -> str:
        return names_of.file_name(name)

    @classmethod
    def canonical_weights(cls, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return names_of.from_published(weights) if names_of.is_published(weights) else dict(weights)

    @classmethod
    def from_published(cls: type[Self], weights: Mapping[str, Tensor], **overrides: Any) -> Self:
        """A model in eval mode from weights under the names of the published code.

        The config follows from the shapes of the weights, but for the heads of attention and the strides, which the
        weights do not tell and which all published models have alike. Norms have the published code's eps.

        Args:
            weights: of the encoder, as the checkpoints mit_b0 to mit_b5 hold them, or of a whole segmenter, as
                checkpoints of mmsegmentation hold them under "state_dict".
            **overrides: fields of the config that the weights do not tell.

        Raises:
            ValueError: weights under other names, missing, unknown or of another shape; an override that the weights
                contradict, by name.
            TypeError: an override that is no field.
        """
        what = f"{cls.__name__}.from_published"
        if not names_of.is_published(weights):
            raise ValueError(f"{what}: weights must have the published names, such as patch_embed1.proj.weight")
        fields = names_of.published_fields(weights)
        for name, value in config_overrides(cls.config_class, overrides).items():
            told = fields.get(name, value)
            same = tuple(value) == told if isinstance(told, tuple) else value == told
            if not same and name != "block_norm_eps":
                raise ValueError(f"{what}: {name} must be {told} as the weights tell, got {value}")
        return load_weights(cls, cls.config_class(**{**fields, **overrides}), weights, what).eval()

    def _new_origin(self) -> nn.Module:
        """A new model of transformers, whose norms get the eps that these have: its config does not say them."""
        origin = super()._new_origin()
        live = {self.file_name(name): name for name, _ in origin.named_parameters()}
        names = self.weight_names()
        for ours, module in self.named_modules():
            if hasattr(module, "eps") and f"{ours}.weight" in names:
                place = live[names[f"{ours}.weight"][0]].removesuffix(".weight")
                origin.get_submodule(place).eps = module.eps
        return origin


class SegformerModel(SegformerBase, StagedModel):
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

    def __init__(self, config: SegformerConfig) -> None:
        super().__init__()
        self.config = config
        rates = iter(drop_path_rates(config.drop_path_rate, sum(config.depths)))
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

    def adopt(self, hf_model: nn.Module) -> None:
        """Says in the config which eps the norms in blocks and after stages have, where all have the same."""
        found = {
            module.eps
            for name, module in self.named_modules()
            if isinstance(module, AddBiasResidualLayerNorm)
            and not name.startswith("embedding_norms.")
            and not name.endswith(".reduction_norm")
        }
        if len(found) == 1:
            self.config.block_norm_eps = found.pop()

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

    def as_output(self, maps: Sequence[Tensor], with_hidden_states: bool) -> ImageModelOutput:
        """As of the base; the last output is [batch, tokens, channels] where the config says so."""
        output = super().as_output(maps, with_hidden_states)
        if not self.config.reshape_last_stage:
            output.last_hidden_state = tokens = maps[-1].flatten(1, 2)
            if output.hidden_states is not None:
                output.hidden_states = (*output.hidden_states[:-1], tokens)
        return output

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
