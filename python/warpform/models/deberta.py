"""DeBERTa (arXiv 2006.03654) and its versions 2 and 3 (arXiv 2111.09543), padding-free.

Attention looks at content and at relative positions apart. Version 3 is an architecture of version 2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import (
    ACTIVATIONS,
    AddBiasResidualLayerNorm,
    BiasActivation,
    DisentangledEncoder,
    DisentangledSelfAttention,
    Embeddings,
    EncoderLayer,
    FusedDisentangledSelfAttention,
    TokenConvolution,
    first_tokens,
)
from ._config import check_config, read_fields
from ._encoder_model import EncoderModel, PackedStates, check_shape
from ._heads import IGNORED, MaskedLM, SequenceClassification, TokenClassification, token_loss
from ._model import ModelConfig
from ._registry import register

Config = TypeVar("Config", bound="DebertaConfig")


@dataclasses.dataclass
class DebertaConfig(ModelConfig):
    """The options of a DeBERTa (v1) encoder and its heads, under the names of transformers' `DebertaConfig`.

    pos_att_type may be a sequence, None, or one string as in "c2p|p2c". embedding_size None is hidden_size.

    Raises:
        ValueError: an unknown activation or problem_type, sizes that do not fit, a dropout outside [0, 1].
    """

    vocab_size: int = 50265
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-7
    relative_attention: bool = False
    max_relative_positions: int = -1
    pad_token_id: int | None = 0
    position_biased_input: bool = True
    pos_att_type: tuple[str, ...] = ()
    embedding_size: int | None = None
    pooler_dropout: float = 0.0
    pooler_hidden_act: str = "gelu"
    legacy: bool = True
    output_hidden_states: bool = False
    return_dict: bool = True
    tie_word_embeddings: bool = True
    num_labels: int = 2
    cls_dropout: float | None = None
    problem_type: str | None = None

    def __post_init__(self) -> None:
        terms = self.pos_att_type or ()
        if isinstance(terms, str):
            terms = tuple(term.strip() for term in terms.lower().split("|"))
        self.pos_att_type = tuple(terms)
        if self.embedding_size is None:
            self.embedding_size = self.hidden_size
        check_config(
            self,
            activation="hidden_act",
            heads="num_attention_heads",
            width="hidden_size",
            probabilities=("hidden_dropout_prob", "attention_probs_dropout_prob", "pooler_dropout", "cls_dropout"),
        )
        _check_activation("pooler_hidden_act", self.pooler_hidden_act)

    @classmethod
    def from_transformers(cls: type[Config], fields: Mapping[str, Any], **overrides: Any) -> Config:
        """From the fields of a transformers config. Fields that change nothing in the encoder are ignored.

        Raises:
            ValueError: an option that is not supported: talking_head, a pooler_hidden_size other than hidden_size, an
                attention_head_size other than hidden_size / num_attention_heads, is_decoder, add_cross_attention,
                output_attentions, pruned_heads.
            TypeError: an override that is no field.
        """
        config = cls(**read_fields(cls, fields, overrides))
        if fields.get("talking_head"):
            raise ValueError(f"{cls.__name__}: talking_head={fields['talking_head']!r} is not supported")
        for name, only in (
            ("pooler_hidden_size", config.hidden_size),
            ("attention_head_size", config.hidden_size // config.num_attention_heads),
        ):
            if fields.get(name) not in (None, only):
                raise ValueError(f"{cls.__name__}: {name}={fields[name]!r} is not supported, only {only}")
        return config

    def to_transformers(self) -> dict[str, Any]:
        """The fields as keywords of the config class of transformers."""
        return {**dataclasses.asdict(self), "pos_att_type": list(self.pos_att_type)}

    @property
    def relative_positions(self) -> int:
        """Distances that have an embedding of their own, or with buckets the distance of the last bucket, plus 1."""
        return self.max_relative_positions if self.max_relative_positions > 0 else self.max_position_embeddings

    @property
    def buckets(self) -> int:
        """Buckets of distances on either side; 0: every distance is one."""
        return 0

    @property
    def score_terms(self) -> int:
        """What the scores are scaled for: 1 and the terms of positions, as transformers counts them."""
        return 1 + len(self.pos_att_type)


@dataclasses.dataclass
class DebertaV2Config(DebertaConfig):
    """The options of a DeBERTa-v2 or v3 encoder and its heads, under the names of transformers' `DebertaV2Config`.

    Raises:
        ValueError: as `DebertaConfig`; position_buckets that do not fit max_relative_positions, an even
            conv_kernel_size.
    """

    vocab_size: int = 128100
    hidden_size: int = 1536
    num_hidden_layers: int = 24
    num_attention_heads: int = 24
    intermediate_size: int = 6144
    position_buckets: int = -1
    share_att_key: bool = False
    norm_rel_ebd: str = "none"
    conv_kernel_size: int = 0
    conv_groups: int = 1
    conv_act: str = "tanh"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_activation("conv_act", self.conv_act)
        least = self.position_buckets // 2 + 2
        if self.relative_attention and self.position_buckets > 0:
            if self.position_buckets == 1:
                raise ValueError("position_buckets must be at least 2, or at most 0 for none, got 1")
            if self.relative_positions < least:
                raise ValueError(
                    f"max_relative_positions must be at least {least} with {self.position_buckets} position_buckets, "
                    f"got {self.relative_positions}"
                )
        if self.conv_kernel_size > 0 and self.conv_kernel_size % 2 == 0:
            raise ValueError(f"conv_kernel_size must be odd, or 0 for none, got {self.conv_kernel_size}")

    @property
    def buckets(self) -> int:
        return max(self.position_buckets, 0)

    @property
    def score_terms(self) -> int:
        return 1 + ("c2p" in self.pos_att_type) + ("p2c" in self.pos_att_type)

    @property
    def relative_norm(self) -> bool:
        """Whether the embeddings of relative positions are normalised."""
        return "layer_norm" in (part.strip() for part in self.norm_rel_ebd.lower().split("|"))


def _check_activation(name: str, value: str) -> None:
    if value not in ACTIVATIONS:
        raise ValueError(f"{name} must be one of {', '.join(ACTIVATIONS)}, got {value!r}")


@register
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
    model_type = "deberta"
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
        # What options leave out has no name.
        return {name: weights[name] for name, _ in self.named_parameters()}


@register
class DebertaV2Model(DebertaModel):
    """The encoder of DeBERTa-v2 and v3. Called as `transformers.DebertaV2Model`, and as `DebertaModel` otherwise.

    Args:
        config: its options.
    """

    config_class = DebertaV2Config
    transformers_class = "DebertaV2Model"
    transformers_config_class = "DebertaV2Config"
    model_type = "deberta-v2"
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


class _DebertaMaskedLM(MaskedLM):
    """Both forms of the head: the older one (legacy in the config) and that of pretraining, alike but in names."""

    head_modules = {"head.dense": "cls.predictions.transform.dense", "head.norm": "cls.predictions.transform.LayerNorm"}
    bias_name = "cls.predictions.bias"
    aliases = {
        "cls.predictions.decoder.weight": "deberta.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }
    head_ignored = ("mask_predictions.",)
    head_spare = ("cls.", "lm_predictions.")

    def make_head(self) -> None:
        if not self.config.legacy and self.config.embedding_size != self.config.hidden_size:
            raise ValueError(
                f"{type(self).__name__}: embedding_size must be hidden_size {self.config.hidden_size} where legacy is "
                f"False, got {self.config.embedding_size}"
            )
        super().make_head()

    def weight_names(self) -> dict[str, tuple[str, ...]]:
        names = super().weight_names()
        if self.config.legacy:
            return names
        return {
            name: tuple(
                part.replace("cls.predictions.transform.", "lm_predictions.lm_head.").replace(
                    "cls.predictions.", "lm_predictions.lm_head."
                )
                for part in parts
            )
            for name, parts in names.items()
        }


class _DebertaSequenceClassification(SequenceClassification):
    """A classifier on act(dense(first real token)), a pooler that belongs to the head."""

    uses_pooler = False
    head_modules = {"pooler": "pooler.dense", "classifier": "classifier"}
    dropout_fields = ("cls_dropout", "hidden_dropout_prob")

    def make_head(self) -> None:
        super().make_head()
        self.pooler = nn.Linear(self.config.hidden_size, self.config.hidden_size)
        self.pooler_activation = BiasActivation(self.config.pooler_hidden_act)

    def pool(self, run: PackedStates) -> Tensor:
        first = F.dropout(first_tokens(run.hidden, run.packing), self.config.pooler_dropout, training=self.training)
        return self.pooler_activation(self.pooler(first), None)

    def _loss(self, logits: Tensor, labels: Tensor, items: Tensor | int | None) -> Tensor:
        # Where no problem_type is given, transformers has rules of DeBERTa's own: one label a sequence is a class, and
        # none where it is negative; several are the probabilities of the classes.
        batch, classes = logits.shape
        if self.config.problem_type is not None or classes == 1:
            return super()._loss(logits, labels, items)
        if labels.dim() == 1 or labels.shape[-1] == 1:
            labels = labels.flatten().long()
            check_shape(type(self).__name__, "labels", labels, (batch,))
            return token_loss(logits, torch.where(labels < 0, IGNORED, labels), items)
        check_shape(type(self).__name__, "labels", labels, (batch, classes))
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = -(wide.log_softmax(-1) * labels).sum(-1)
        return losses.mean() if items is None else losses.sum() / items


@register
class DebertaForMaskedLM(_DebertaMaskedLM):
    """DeBERTa that predicts masked tokens."""

    base_class = DebertaModel


@register
class DebertaForSequenceClassification(_DebertaSequenceClassification):
    """DeBERTa with a classifier on the first real token."""

    base_class = DebertaModel


@register
class DebertaForTokenClassification(TokenClassification):
    """DeBERTa with a classifier on every token."""

    base_class = DebertaModel
    dropout_fields = ("hidden_dropout_prob",)


@register
class DebertaV2ForMaskedLM(_DebertaMaskedLM):
    """DeBERTa-v2 or v3 that predicts masked tokens."""

    base_class = DebertaV2Model


@register
class DebertaV2ForSequenceClassification(_DebertaSequenceClassification):
    """DeBERTa-v2 or v3 with a classifier on the first real token."""

    base_class = DebertaV2Model


@register
class DebertaV2ForTokenClassification(TokenClassification):
    """DeBERTa-v2 or v3 with a classifier on every token."""

    base_class = DebertaV2Model
    dropout_fields = ("hidden_dropout_prob",)
