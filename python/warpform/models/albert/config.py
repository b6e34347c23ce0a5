"""The options of ALBERT."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..common.config import ModelConfig, check_config, read_fields


@dataclasses.dataclass
class AlbertConfig(ModelConfig):
    """The options of an ALBERT encoder and its heads, under the names of transformers' `AlbertConfig`.

    Raises:
        ValueError: an unknown hidden_act or problem_type, sizes that do not fit, a dropout outside [0, 1].
    """

    model_type = "albert"

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
