"""ALBERT (arXiv 1909.11942), padding-free: BERT with narrow embeddings and layers that share their weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..nn import Embeddings, Encoder, EncoderLayer, FirstTokenPooler
from ._config import check_config, read_fields
from ._encoder_model import EncoderModel
from ._heads import MaskedLM, SequenceClassification, TokenClassification
from ._model import ModelConfig
from ._registry import register


@dataclasses.dataclass
class AlbertConfig(ModelConfig):
    """The options of an ALBERT encoder and its heads, under the names of transformers' `AlbertConfig`.

    Raises:
        ValueError: an unknown hidden_act or problem_type, sizes that do not fit, a dropout outside [0, 1].
    """

    vocab_size: int = 30000
    embedding_size: int = 128
    hidden_size: int = 4096
    num_hidden_layers: int = 12
    num_hidden_groups: int = 1
    num_attention_heads: int = 64
    intermediate_size: int = 16384
    inner_group_num: int = 1
    hidden_act: str = "gelu_new"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    output_hidden_states: bool = False
    return_dict: bool = True
    tie_word_embeddings: bool = True
    num_labels: int = 2
    classifier_dropout_prob: float | None = 0.1
    problem_type: str | None = None

    def __post_init__(self) -> None:
        check_config(
            self,
            activation="hidden_act",
            heads="num_attention_heads",
            width="hidden_size",
            probabilities=("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout_prob"),
        )
        if not 1 <= self.num_hidden_groups <= max(self.num_hidden_layers, 1):
            raise ValueError(
                f"num_hidden_groups must be between 1 and num_hidden_layers {self.num_hidden_layers}, "
                f"got {self.num_hidden_groups}"
            )
        if self.inner_group_num < 1:
            raise ValueError(f"inner_group_num must be at least 1, got {self.inner_group_num}")

    @classmethod
    def from_transformers(cls, fields: Mapping[str, Any], **overrides: Any) -> AlbertConfig:
        """From the fields of a transformers config. Fields that change nothing in the encoder are ignored.

        Raises:
            ValueError: an option that is not supported: is_decoder, add_cross_attention, output_attentions,
                pruned_heads, a position_embedding_type other than "absolute".
            TypeError: an override that is no field.
        """
        return cls(**read_fields(cls, fields, overrides))

    def to_transformers(self) -> dict[str, Any]:
        """The fields as keywords of transformers' `AlbertConfig`."""
        return dataclasses.asdict(self)


@register
class AlbertModel(EncoderModel):
    """ALBERT's encoder. Called as `transformers.AlbertModel`: same outputs at real tokens, 0 at padded ones.

    hidden_states are the projected embeddings and the output of every layer, inner ones too, as in transformers 5.

    Args:
        config: its options.
        add_pooling_layer: whether there is a pooler; without one `pooler_output` is None.
    """

    config_class = AlbertConfig
    transformers_class = "AlbertModel"
    transformers_config_class = "AlbertConfig"
    model_type = "albert"
    weight_prefix = "albert."
    ignored_weights = ("predictions.", "sop_classifier.", "classifier.", "qa_outputs.")
    constant_weights = ("embeddings.position_ids", "embeddings.token_type_ids")
    optional_module = "pooler"

    def __init__(self, config: AlbertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(
            config.vocab_size,
            config.embedding_size,
            config.max_position_embeddings,
            config.type_vocab_size,
            padding_idx=config.pad_token_id,
            eps=config.layer_norm_eps,
            dropout=config.hidden_dropout_prob,
        )
        self.projection = nn.Linear(config.embedding_size, config.hidden_size)
        groups, inner, layers = config.num_hidden_groups, config.inner_group_num, config.num_hidden_layers
        self.encoder = Encoder(
            [
                EncoderLayer(
                    config.hidden_size,
                    config.num_attention_heads,
                    config.intermediate_size,
                    hidden_act=config.hidden_act,
                    eps=config.layer_norm_eps,
                    hidden_dropout=(config.hidden_dropout_prob, 0.0),  # as transformers has it
                    attention_dropout=config.attention_probs_dropout_prob,
                )
                for _ in range(groups * inner)
            ],
            # Layer i takes the weights of group i * groups / layers, rounded down: division as transformers does it.
            order=[int(i / (layers / groups)) * inner + j for i in range(layers) for j in range(inner)],
        )
        self.pooler = FirstTokenPooler(config.hidden_size) if add_pooling_layer else None
        self.apply(self.init_weights)

    @classmethod
    def build(cls, config: AlbertConfig, *, with_optional: bool = True) -> AlbertModel:
        return cls(config, add_pooling_layer=with_optional)

    def embed(
        self,
        input_ids: Tensor | None,
        position_ids: Tensor,
        token_type_ids: Tensor | None,
        inputs_embeds: Tensor | None,
    ) -> Tensor:
        return self.projection(self.embeddings(input_ids, position_ids, token_type_ids, inputs_embeds))

    def weight_names(self) -> dict[str, tuple[str, ...]]:
        names: dict[str, tuple[str, ...]] = {
            "embeddings.tokens.weight": ("embeddings.word_embeddings.weight",),
            "embeddings.positions.weight": ("embeddings.position_embeddings.weight",),
            "embeddings.token_types.weight": ("embeddings.token_type_embeddings.weight",),
        }
        both: dict[str, tuple[str, ...]] = {
            "embeddings.norm": ("embeddings.LayerNorm",),
            "projection": ("encoder.embedding_hidden_mapping_in",),
        }
        for i in range(len(self.encoder.layers)):
            group, j = divmod(i, self.config.inner_group_num)
            ours, theirs = f"encoder.layers.{i}", f"encoder.albert_layer_groups.{group}.albert_layers.{j}"
            both |= {
                f"{ours}.attention.qkv": tuple(f"{theirs}.attention.{x}" for x in ("query", "key", "value")),
                f"{ours}.attention.out": (f"{theirs}.attention.dense",),
                f"{ours}.attention_norm": (f"{theirs}.attention.LayerNorm",),
                f"{ours}.feed_forward.up": (f"{theirs}.ffn",),
                f"{ours}.feed_forward.down": (f"{theirs}.ffn_output",),
                f"{ours}.feed_forward_norm": (f"{theirs}.full_layer_layer_norm",),
            }
        if self.pooler is not None:
            both["pooler.dense"] = ("pooler",)
        for name, parts in both.items():
            for leaf in ("weight", "bias"):
                names[f"{name}.{leaf}"] = tuple(f"{part}.{leaf}" for part in parts)
        return names

    def transformers_options(self) -> dict[str, Any]:
        return {"add_pooling_layer": self.pooler is not None}


@register
class AlbertForMaskedLM(MaskedLM):
    """ALBERT that predicts masked tokens."""

    base_class = AlbertModel
    head_modules = {"head.dense": "predictions.dense", "head.norm": "predictions.LayerNorm"}
    bias_name = "predictions.bias"
    aliases = {
        "predictions.decoder.weight": "albert.embeddings.word_embeddings.weight",
        "predictions.decoder.bias": "predictions.bias",
    }
    head_ignored = ("sop_classifier.",)


@register
class AlbertForSequenceClassification(SequenceClassification):
    """ALBERT with a classifier on its pooler."""

    base_class = AlbertModel
    dropout_fields = ("classifier_dropout_prob", "hidden_dropout_prob")


@register
class AlbertForTokenClassification(TokenClassification):
    """ALBERT with a classifier on every token."""

    base_class = AlbertModel
    dropout_fields = ("classifier_dropout_prob", "hidden_dropout_prob")
