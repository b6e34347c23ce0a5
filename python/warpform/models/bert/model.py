"""BERT (arXiv 1810.04805), padding-free (ByteTransformer, arXiv 2210.03052): packs once, unpacks once."""

from __future__ import annotations

from typing import Any

from ...nn import Embeddings, Encoder, EncoderLayer, FirstTokenPooler
from ..common.encoder import EncoderModel
from ..common.heads import MaskedLM, SequenceClassification, TokenClassification
from .config import BertConfig


class BertModel(EncoderModel):
    """BERT's encoder. Called as `transformers.BertModel`: same outputs at real tokens, 0 at padded ones.

    Args:
        config: its options.
        add_pooling_layer: whether there is a pooler; without one `pooler_output` is None.
    """

    config_class = BertConfig
    transformers_class = "BertModel"
    transformers_config_class = "BertConfig"
    weight_prefix = "bert."
    ignored_weights = ("cls.", "classifier.", "qa_outputs.")
    constant_weights = ("embeddings.position_ids", "embeddings.token_type_ids")
    optional_module = "pooler"

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(
            config.vocab_size,
            config.hidden_size,
            config.max_position_embeddings,
            config.type_vocab_size,
            padding_idx=config.pad_token_id,
            eps=config.layer_norm_eps,
            dropout=config.hidden_dropout_prob,
        )
        self.encoder = Encoder(
            [
                EncoderLayer(
                    config.hidden_size,
                    config.num_attention_heads,
                    config.intermediate_size,
                    hidden_act=config.hidden_act,
                    eps=config.layer_norm_eps,
                    hidden_dropout=config.hidden_dropout_prob,
                    attention_dropout=config.attention_probs_dropout_prob,
                )
                for _ in range(config.num_hidden_layers)
            ]
        )
        self.pooler = FirstTokenPooler(config.hidden_size) if add_pooling_layer else None
        self.apply(self.init_weights)

    @classmethod
    def build(cls, config: BertConfig, *, with_optional: bool = True) -> BertModel:
        return cls(config, add_pooling_layer=with_optional)

    def weight_names(self) -> dict[str, tuple[str, ...]]:
        names: dict[str, tuple[str, ...]] = {
            "embeddings.tokens.weight": ("embeddings.word_embeddings.weight",),
            "embeddings.positions.weight": ("embeddings.position_embeddings.weight",),
            "embeddings.token_types.weight": ("embeddings.token_type_embeddings.weight",),
        }
        both: dict[str, tuple[str, ...]] = {"embeddings.norm": ("embeddings.LayerNorm",)}
        for i in range(self.config.num_hidden_layers):
            ours, theirs = f"encoder.layers.{i}", f"encoder.layer.{i}"
            both |= {
                f"{ours}.attention.qkv": tuple(f"{theirs}.attention.self.{x}" for x in ("query", "key", "value")),
                f"{ours}.attention.out": (f"{theirs}.attention.output.dense",),
                f"{ours}.attention_norm": (f"{theirs}.attention.output.LayerNorm",),
                f"{ours}.feed_forward.up": (f"{theirs}.intermediate.dense",),
                f"{ours}.feed_forward.down": (f"{theirs}.output.dense",),
                f"{ours}.feed_forward_norm": (f"{theirs}.output.LayerNorm",),
            }
        if self.pooler is not None:
            both["pooler.dense"] = ("pooler.dense",)
        for name, parts in both.items():
            for leaf in ("weight", "bias"):
                names[f"{name}.{leaf}"] = tuple(f"{part}.{leaf}" for part in parts)
        return names

    def transformers_options(self) -> dict[str, Any]:
        return {"add_pooling_layer": self.pooler is not None}


class BertForMaskedLM(MaskedLM):
    """BERT that predicts masked tokens."""

    base_class = BertModel
    head_modules = {"head.dense": "cls.predictions.transform.dense", "head.norm": "cls.predictions.transform.LayerNorm"}
    bias_name = "cls.predictions.bias"
    aliases = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }
    head_ignored = ("cls.seq_relationship.",)


class BertForSequenceClassification(SequenceClassification):
    """BERT with a classifier on its pooler."""

    base_class = BertModel
    dropout_fields = ("classifier_dropout", "hidden_dropout_prob")


class BertForTokenClassification(TokenClassification):
    """BERT with a classifier on every token."""

    base_class = BertModel
    dropout_fields = ("classifier_dropout", "hidden_dropout_prob")
