"""Swin (arXiv 2103.14030) and Swin V2 (arXiv 2111.09883); their windows are cut by indices inside of attention."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn import AddBiasResidualLayerNorm, PatchEmbedding, PatchMerging, SwinBlock, SwinV2Block
from ...nn._checkpoint import CheckpointedLayers
from ...nn.metaformer import run_blocks
from ..common.checks import check_pixels, refuse_arguments
from ..common.config import drop_path_rates
from ..common.positions import resize_grid
from .base import SwinBase, SwinOutput
from .config import Pair, SwinConfig, Swinv2Config, pair


class SwinEmbeddings(PatchEmbedding):
    """Images to a grid of tokens: one product a patch, normalised, and absolute positions where the config says so."""

    def __init__(self, config: SwinConfig) -> None:
        super().__init__(config.num_channels, config.embed_dim, pair(config.patch_size), pad=True)
        self.norm = AddBiasResidualLayerNorm(config.embed_dim, 1e-5)
        self.patch_grid = config.patch_grid
        self.position_embeddings = None
        if config.use_absolute_embeddings:
            self.position_embeddings = nn.Parameter(torch.zeros(1, math.prod(config.patch_grid), config.embed_dim))
        self.dropout = config.hidden_dropout_prob

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """pixel_values: [batch, channels, height, width]; returns [batch, rows, columns, embed_dim]."""
        tokens = self.norm(super().forward(pixel_values), None, None)
        if self.position_embeddings is not None:
            grid = (tokens.shape[1], tokens.shape[2])
            if grid != self.patch_grid and not interpolate_pos_encoding:
                raise ValueError(
                    f"pixel_values must give {self.patch_grid} patches, as image_size does, where there are absolute "
                    f"position embeddings, or interpolate_pos_encoding must be True; got {grid}"
                )
            tokens = tokens + resize_grid(self.position_embeddings[0], self.patch_grid, grid).unflatten(0, grid)
        return F.dropout(tokens, self.dropout, training=self.training)


class SwinModel(SwinBase, CheckpointedLayers):
    """Swin without a head. Called as `transformers.SwinModel`, on images of any size.

    Stages whose grid is no larger than the window attend as a whole, with the middle of their table.

    Args:
        config: its options.
        add_pooling_layer: whether there is a pooler; without one `pooler_output` is None.
    """

    config_class = SwinConfig
    transformers_class = "SwinModel"
    transformers_config_class = "SwinConfig"
    weight_prefix = "swin."
    ignored_weights = ("classifier.", "decoder.", "embeddings.mask_token", "hidden_states_norms.")
    block_class: ClassVar[type[SwinBlock]] = SwinBlock
    post_norm: ClassVar[bool] = False

    def __init__(self, config: SwinConfig, add_pooling_layer: bool = True) -> None:
        super().__init__()
        self.config = config
        self.has_pooler = add_pooling_layer
        self.embeddings = SwinEmbeddings(config)
        rates = iter(drop_path_rates(config.drop_path_rate, sum(config.depths)))
        self.stages = nn.ModuleList()
        self.merges = nn.ModuleList()
        for stage, depth in enumerate(config.depths):
            channels = config.embed_dim << stage
            self.stages.append(nn.ModuleList([self.make_block(stage, i, next(rates)) for i in range(depth)]))
            if stage + 1 < len(config.depths):
                self.merges.append(PatchMerging(channels, post_norm=self.post_norm))
        # None in the model below `Swinv2Backbone`, which has no norm in transformers.
        self.norm: AddBiasResidualLayerNorm | None
        self.norm = AddBiasResidualLayerNorm(config.hidden_size, config.layer_norm_eps)
        self.apply(self.init_weights)

    def make_block(self, stage: int, index: int, drop_path: float) -> SwinBlock:
        config, window = self.config, self.config.windows()[stage]
        return self.block_class(
            config.embed_dim << stage,
            config.num_heads[stage],
            window,
            shift_size=self.shift(stage) if index % 2 else None,
            mlp_ratio=config.mlp_ratio,
            hidden_act=config.hidden_act,
            eps=config.layer_norm_eps,
            hidden_dropout=config.hidden_dropout_prob,
            drop_path=drop_path,
            qkv_bias=config.qkv_bias,
            attention_dropout=config.attention_probs_dropout_prob,
            **self.attention_options(stage),
        )

    def shift(self, stage: int) -> Pair:
        """The shift of every second block of a stage."""
        height, width = pair(self.config.window_size)
        return height // 2, width // 2

    def attention_options(self, stage: int) -> dict[str, Any]:
        return {}

    @classmethod
    def build(cls, config: SwinConfig, *, with_optional: bool = True) -> SwinModel:
        return cls(config, add_pooling_layer=with_optional)

    def backbone(self) -> SwinModel:
        return self

    def adopt(self, hf_model: nn.Module) -> None:
        self.has_pooler = getattr(hf_model, "pooler", None) is not None

    def transformers_options(self) -> dict[str, Any]:
        return {"add_pooling_layer": self.has_pooler}

    def forward(
        self,
        pixel_values: Tensor,
        *,
        output_hidden_states: bool | None = None,
        output_hidden_states_before_downsampling: bool = False,
        interpolate_pos_encoding: bool = False,
        return_dict: bool | None = None,
        **unsupported: Any,
    ) -> SwinOutput | tuple[Any, ...]:
        """Images of any size; they are padded with zeros to whole patches.

        Args:
            pixel_values: [batch, channels, height, width].
            output_hidden_states: also return the embeddings and the output of every stage. None = as the config says.
            output_hidden_states_before_downsampling: of each stage what enters its patch merging, which is what
                detection builds on, rather than what leaves it.
            interpolate_pos_encoding: lets absolute position embeddings serve images of another size.
            return_dict: False returns a tuple. None = as the config says.
            **unsupported: other arguments of the transformers model, accepted when None or False.

        Raises:
            ValueError: pixel_values of another shape; an argument that is not supported, by name.
            NotImplementedError: training mode with attention dropout above 0.
        """
        name = type(self).__name__
        refuse_arguments(name, unsupported)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        before, after = self.stage_states(pixel_values, interpolate_pos_encoding)
        states = before if output_hidden_states_before_downsampling else after
        normal = after[-1] if self.norm is None else self.norm(after[-1], None, None)
        normal = normal.flatten(1, 2)
        output = SwinOutput(normal, normal.mean(1) if self.has_pooler else None)
        if output_hidden_states:
            output.hidden_states = tuple(state.flatten(1, 2) for state in states)
            output.reshaped_hidden_states = tuple(state.permute(0, 3, 1, 2).contiguous() for state in states)
        if return_dict is None:
            return_dict = self.config.return_dict
        return output if return_dict else output.to_tuple()

    def stage_states(
        self, pixel_values: Tensor, interpolate_pos_encoding: bool = False
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The embeddings and what leaves each stage before patch merging, and the same after it.

        Args:
            pixel_values, interpolate_pos_encoding: as of `forward`.

        Returns:
            Each [batch, height, width, channels].

        Raises:
            ValueError: pixel_values of another shape.
        """
        check_pixels(type(self).__name__, pixel_values, self.config.num_channels)
        hidden = self.embeddings(pixel_values, interpolate_pos_encoding)
        before, after = [hidden], [hidden]
        for stage, blocks in enumerate(self.stages):
            hidden = run_blocks(self, blocks, hidden)
            before.append(hidden)
            if stage < len(self.merges):
                hidden = self.merges[stage](hidden)
            after.append(hidden)
        return before, after

    def weight_names(self) -> dict[str, tuple[str, ...]]:
        both: dict[str, str] = {
            "embeddings.projection": "embeddings.patch_embeddings.projection",
            "embeddings.norm": "embeddings.norm",
        }
        if self.norm is not None:
            both["norm"] = "layernorm"
        names: dict[str, tuple[str, ...]] = {}
        if self.embeddings.position_embeddings is not None:
            names["embeddings.position_embeddings"] = ("embeddings.position_embeddings",)
        for stage, depth in enumerate(self.config.depths):
            if stage < len(self.merges):
                both[f"merges.{stage}.norm"] = f"encoder.layers.{stage}.downsample.norm"
                reduction = f"encoder.layers.{stage}.downsample.reduction.weight"
                names[f"merges.{stage}.reduction.weight"] = (reduction,)
            for i in range(depth):
                ours, theirs = f"stages.{stage}.{i}", f"encoder.layers.{stage}.blocks.{i}"
                names |= self.attention_names(f"{ours}.attention", f"{theirs}.attention.self")
                both |= {
                    f"{ours}.attention.out": f"{theirs}.attention.output.dense",
                    f"{ours}.attention_norm": f"{theirs}.layernorm_before",
                    f"{ours}.feed_forward.up": f"{theirs}.intermediate.dense",
                    f"{ours}.feed_forward.down": f"{theirs}.output.dense",
                    f"{ours}.feed_forward_norm": f"{theirs}.layernorm_after",
                }
        for ours, theirs in both.items():
            for leaf in ("weight", "bias"):
                names[f"{ours}.{leaf}"] = (f"{theirs}.{leaf}",)
        return names

    def attention_names(self, ours: str, theirs: str) -> dict[str, tuple[str, ...]]:
        """The parameters before attention, as `weight_names`."""
        leaves = ("weight", "bias") if self.config.qkv_bias else ("weight",)
        names = {
            f"{ours}.qkv.{leaf}": tuple(f"{theirs}.{part}.{leaf}" for part in ("query", "key", "value"))
            for leaf in leaves
        }
        table = "relative_position_bias_table"
        return {**names, f"{ours}.{table}": (f"{theirs}.{table}",)}


class Swinv2Model(SwinModel):
    """Swin V2 without a head. Called as `transformers.Swinv2Model`, on images of any size.

    The window of each stage follows from the config's image_size, whatever the size of an image.

    Args:
        config, add_pooling_layer: as of `SwinModel`.
    """

    config_class = Swinv2Config
    transformers_class = "Swinv2Model"
    transformers_config_class = "Swinv2Config"
    weight_prefix = "swinv2."
    block_class = SwinV2Block
    post_norm = True
    config: Swinv2Config

    def shift(self, stage: int) -> Pair:
        """Half a window, 0 where the window holds the whole grid at image_size."""
        rows, columns = self.config.patch_grid
        height, width = pair(self.config.window_size)
        columns = rows if height == width else columns
        own = self.config.windows()[stage]
        return (0 if rows >> stage <= own[0] else height // 2), (0 if columns >> stage <= own[1] else width // 2)

    def attention_options(self, stage: int) -> dict[str, Any]:
        pretrained = (self.config.pretrained_window_sizes or ())[stage]
        return {"pretrained_window_size": (pretrained, pretrained), "mask_value": self.config.mask_value}

    def adopt(self, hf_model: nn.Module) -> None:
        super().adopt(hf_model)
        # Windows are fixed when a model is made, and may have been changed in it since.
        for stage, blocks in enumerate(self.stages):
            for index, block in enumerate(blocks.children()):
                assert isinstance(block, SwinV2Block)
                theirs: Any = hf_model.get_submodule(f"encoder.layers.{stage}.blocks.{index}")
                block.attention.window_size = (theirs.window_size,) * 2
                block.attention.shift_size = (theirs.shift_size,) * 2

    def attention_names(self, ours: str, theirs: str) -> dict[str, tuple[str, ...]]:
        names: dict[str, tuple[str, ...]] = {
            f"{ours}.qkv.weight": tuple(f"{theirs}.{part}.weight" for part in ("query", "key", "value")),
            f"{ours}.logit_scale": (f"{theirs}.logit_scale",),
        }
        mlp = f"{theirs}.continuous_position_bias_mlp"
        for own, other in (("up.weight", "0.weight"), ("up.bias", "0.bias"), ("down.weight", "2.weight")):
            names[f"{ours}.position_{own}"] = (f"{mlp}.{other}",)
        if self.config.qkv_bias:
            names |= {f"{ours}.q_bias": (f"{theirs}.query.bias",), f"{ours}.v_bias": (f"{theirs}.value.bias",)}
        return names
