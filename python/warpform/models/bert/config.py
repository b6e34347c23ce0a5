"""The options of BERT."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..common.config import ModelConfig, check_config, read_fields


@dataclasses.dataclass
class BertConfig(ModelConfig):
    """The options of a BERT encoder and its heads, under the names of transformers' `BertConfig`.

    Raises:
        ValueError: an unknown hidden_act, sizes that do not fit, a dropout outside [0, 1].
    """

    model_type = "bert"

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    output_hidden_states: bool = False
    return_dict: bool = True
    tie_word_embeddings: bool = True
    num_labels: int = 2
    classifier_dropout: float | None = None
    problem_type: str | None = None

    def __post_init__(self) -> None:
        check_config(
            self,
            activation="hidden_act",
            heads="num_attention_heads",
            width="hidden_size",
            probabilities=("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"),
        )

    @classmethod
    def from_transformers(cls, fields: Mapping[str, Any], **overrides: Any) -> BertConfig:
        """From the fields of a transformers config. Fields that change nothing in the encoder are ignored.

        Raises:
            ValueError: an option that is not supported: is_decoder, add_cross_attention, output_attentions,
                pruned_heads, a position_embedding_type other than "absolute".
            TypeError: an override that is no field.
        """
        return cls(**read_fields(cls, fields, overrides))

    def to_transformers(self) -> dict[str, Any]:
        """The fields as keywords of transformers' `BertConfig`."""
        return dataclasses.asdict(self)
