"""The options of ALBERT."""

from __future__ import annotations

import dataclasses

from ...nn import ACTIVATIONS
from ..common.config import TransformersConfig


@dataclasses.dataclass
class AlbertConfig(TransformersConfig):
    """The options of an ALBERT encoder and its heads, under the names of transformers' `AlbertConfig`.

    Raises:
        ValueError: an unknown hidden_act or problem_type, sizes that do not fit, a dropout outside [0, 1].
    """

    model_type = "albert"
    positive = ("inner_group_num",)
    divides = (("num_attention_heads", "hidden_size"),)
    choices = {"hidden_act": ACTIVATIONS}
    probabilities = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout_prob")

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
        super().__post_init__()
        if not 1 <= self.num_hidden_groups <= max(self.num_hidden_layers, 1):
            raise self.error(
                f"num_hidden_groups must be between 1 and num_hidden_layers {self.num_hidden_layers}, "
                f"got {self.num_hidden_groups}"
            )
