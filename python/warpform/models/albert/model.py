"""ALBERT (arXiv 1909.11942), padding-free: BERT with narrow embeddings and layers that share their weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...nn import Embeddings, Encoder, EncoderLayer, FirstTokenPooler
from ...nn._product import apply_linear
from ..common.encoder import EncoderModel
from ..common.heads import MaskedLM, SequenceClassification, TokenClassification
from .config import AlbertConfig


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
        return apply_linear(self.embeddings(input_ids, position_ids, token_type_ids, inputs_embeds), self.projection)

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


class AlbertForSequenceClassification(SequenceClassification):
    """ALBERT with a classifier on its pooler."""

    base_class = AlbertModel
    dropout_fields = ("classifier_dropout_prob", "hidden_dropout_prob")


class AlbertForTokenClassification(TokenClassification):
    """ALBERT with a classifier on every token."""

    base_class = AlbertModel
    dropout_fields = ("classifier_dropout_prob", "hidden_dropout_prob")
