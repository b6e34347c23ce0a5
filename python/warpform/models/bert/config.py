"""The options of BERT."""

from __future__ import annotations

import dataclasses

from ...nn import ACTIVATIONS
from ..common.config import TransformersConfig


@dataclasses.dataclass
class BertConfig(TransformersConfig):
    """The options of a BERT encoder and its heads, under the names of transformers' `BertConfig`.

    Raises:
        ValueError: an unknown hidden_act, sizes that do not fit, a dropout outside [0, 1].
    """

    model_type = "bert"
    divides = (("num_attention_heads", "hidden_size"),)
    choices = {"hidden_act": ACTIVATIONS}
    probabilities = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")

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
