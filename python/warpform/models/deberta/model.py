"""DeBERTa (arXiv 2006.03654) and its versions 2 and 3 (arXiv 2111.09543), padding-free.

Attention looks at content and at relative positions apart. Version 3 is an architecture of version 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from ...nn import (
    AddBiasResidualLayerNorm,
    DisentangledEncoder,
    DisentangledSelfAttention,
    Embeddings,
    EncoderLayer,
    FusedDisentangledSelfAttention,
    TokenConvolution,
)
from ..common.encoder import EncoderModel, PackedStates
from .config import DebertaConfig, DebertaV2Config


class DebertaModel(EncoderModel):
    """DeBERTa's encoder. Called as `transformers.DebertaModel`: same outputs at real tokens, 0 at padded ones.

    Relative positions are those of the padded row, also where its mask has holes. There is no pooler. Where the model
    has no token types, token_type_ids are ignored, as transformers does: its tokenizers give them.

    Args:
        config: its options.
    """

    config_class: ClassVar[Any] = DebertaConfig
    transformers_class = "DebertaModel"
    transformers_config_class = "DebertaConfig"
    weight_prefix = "deberta."
    ignored_weights = ("cls.", "lm_predictions.", "mask_predictions.", "pooler.", "classifier.", "qa_outputs.")
    constant_weights = ("embeddings.position_ids",)
    spare_weights = ("embeddings.position_embeddings.",)
    # Under `attention.self` in transformers, for each weight of the attention here.
    attention_weights: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "qkv.weight": ("in_proj.weight",),
        "q_bias": ("q_bias",),
        "v_bias": ("v_bias",),
        "pos_key.weight": ("pos_proj.weight",),
        "pos_query.weight": ("pos_q_proj.weight",),
        "pos_query.bias": ("pos_q_proj.bias",),
    }

    def __init__(self, config: DebertaConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(
            config.vocab_size,
            config.hidden_size,
            config.max_position_embeddings if config.position_biased_input else 0,
            config.type_vocab_size,
            embedding_size=config.embedding_size,
            padding_idx=config.pad_token_id,
            eps=config.layer_norm_eps,
            dropout=config.hidden_dropout_prob,
        )
        layers = [
            EncoderLayer(
                config.hidden_size,
                config.num_attention_heads,
                config.intermediate_size,
                hidden_act=config.hidden_act,
                eps=config.layer_norm_eps,
                hidden_dropout=config.hidden_dropout_prob,
                attention=self.make_attention(config),
            )
            for _ in range(config.num_hidden_layers)
        ]
        self.encoder = self.make_encoder(config, layers)
        self.pooler = None
        self.apply(self.init_weights)

    @classmethod
    def build(cls, config: DebertaConfig, *, with_optional: bool = True) -> DebertaModel:
        return cls(config)

    def make_attention(self, config: Any) -> DisentangledSelfAttention:
        """The attention of one layer."""
        return FusedDisentangledSelfAttention(
            config.hidden_size, config.num_attention_heads, **self.attention_options(config)
        )

    def attention_options(self, config: Any) -> dict[str, Any]:
        """The keywords of the attention that all versions have."""
        return {
            "terms": config.pos_att_type if config.relative_attention else (),
            "softmax_scale": (config.hidden_size // config.num_attention_heads * config.score_terms) ** -0.5,
            "position_buckets": config.buckets,
            "max_relative_positions": config.relative_positions,
            "position_dropout": config.hidden_dropout_prob,
            "attention_dropout": config.attention_probs_dropout_prob,
        }

    def make_encoder(self, config: Any, layers: Sequence[nn.Module]) -> DisentangledEncoder:
        """The stack of layers and the embeddings of relative positions that they share."""
        return DisentangledEncoder(layers, self.make_relative(config))

    def make_relative(self, config: Any) -> nn.Embedding | None:
        """[2 * span, hidden]; None without relative attention."""
        span = config.buckets or config.relative_positions
        return nn.Embedding(2 * span, config.hidden_size) if config.relative_attention else None

    def run_packed(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        token_type_ids: Tensor | None = None,
        **inputs: Any,
    ) -> PackedStates:
        if self.embeddings.token_types is None:
            token_type_ids = None
        return super().run_packed(input_ids, attention_mask, token_type_ids=token_type_ids, **inputs)

    def weight_names(self) -> dict[str, tuple[str, ...]]:
        modules = {
            "embeddings.tokens": "embeddings.word_embeddings",
            "embeddings.positions": "embeddings.position_embeddings",
            "embeddings.token_types": "embeddings.token_type_embeddings",
            "embeddings.projection": "embeddings.embed_proj",
            "embeddings.norm": "embeddings.LayerNorm",
            "encoder.relative": "encoder.rel_embeddings",
            "encoder.relative_norm": "encoder.LayerNorm",
            "encoder.convolution.conv": "encoder.conv.conv",
            "encoder.convolution.norm": "encoder.conv.LayerNorm",
        }
        weights: dict[str, tuple[str, ...]] = {}
        for i in range(self.config.num_hidden_layers):
            ours, theirs = f"encoder.layers.{i}", f"encoder.layer.{i}"
            modules |= {
                f"{ours}.attention.out": f"{theirs}.attention.output.dense",
                f"{ours}.attention_norm": f"{theirs}.attention.output.LayerNorm",
                f"{ours}.feed_forward.up": f"{theirs}.intermediate.dense",
                f"{ours}.feed_forward.down": f"{theirs}.output.dense",
                f"{ours}.feed_forward_norm": f"{theirs}.output.LayerNorm",
            }
            for name, parts in self.attention_weights.items():
                weights[f"{ours}.attention.{name}"] = tuple(f"{theirs}.attention.self.{part}" for part in parts)
        for name, theirs in modules.items():
            weights |= {f"{name}.{leaf}": (f"{theirs}.{leaf}",) for leaf in ("weight", "bias")}
        # Options may leave parameters out; those have no names.
        return {name: weights[name] for name, _ in self.named_parameters()}


class DebertaV2Model(DebertaModel):
    """The encoder of DeBERTa-v2 and v3. Called as `transformers.DebertaV2Model`, and as `DebertaModel` otherwise.

    Args:
        config: its options.
    """

    config_class = DebertaV2Config
    transformers_class = "DebertaV2Model"
    transformers_config_class = "DebertaV2Config"
    attention_weights = {
        f"{ours}.{leaf}": tuple(f"{part}.{leaf}" for part in parts)
        for ours, parts in (
            ("qkv", ("query_proj", "key_proj", "value_proj")),
            ("pos_key", ("pos_key_proj",)),
            ("pos_query", ("pos_query_proj",)),
        )
        for leaf in ("weight", "bias")
    }

    def make_attention(self, config: Any) -> DisentangledSelfAttention:
        return DisentangledSelfAttention(
            config.hidden_size,
            config.num_attention_heads,
            share_projections=config.share_att_key,
            **self.attention_options(config),
        )

    def make_encoder(self, config: Any, layers: Sequence[nn.Module]) -> DisentangledEncoder:
        convolution = None
        if config.conv_kernel_size > 0:
            convolution = TokenConvolution(
                config.hidden_size,
                config.conv_kernel_size,
                groups=config.conv_groups,
                act=config.conv_act,
                eps=config.layer_norm_eps,
                dropout=config.hidden_dropout_prob,
            )
        return DisentangledEncoder(
            layers,
            self.make_relative(config),
            AddBiasResidualLayerNorm(config.hidden_size, config.layer_norm_eps) if config.relative_norm else None,
            position_buckets=config.buckets,
            convolution=convolution,
        )
