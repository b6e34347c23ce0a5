"""The options of DistilBERT."""

from __future__ import annotations

import dataclasses

from ...nn import ACTIVATIONS
from ..common.config import TransformersConfig


@dataclasses.dataclass
class DistilBertConfig(TransformersConfig):
    """The options of a DistilBERT encoder and its heads, under the names of transformers' `DistilBertConfig`.

    Raises:
        ValueError: an unknown activation or problem_type, sizes that do not fit, a dropout outside [0, 1].
    """

    model_type = "distilbert"
    divides = (("n_heads", "dim"),)
    choices = {"activation": ACTIVATIONS}
    probabilities = ("dropout", "attention_dropout", "seq_classif_dropout")

    vocab_size: int = 30522
    max_position_embeddings: int = 512
    sinusoidal_pos_embds: bool = False
    n_layers: int = 6
    n_heads: int = 12
    dim: int = 768
    hidden_dim: int = 4 * 768
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation: str = "gelu"
    initializer_range: float = 0.02
    pad_token_id: int | None = 0
    output_hidden_states: bool = False
    return_dict: bool = True
    tie_word_embeddings: bool = True
    num_labels: int = 2
    seq_classif_dropout: float = 0.2
    problem_type: str | None = None

    @property
    def hidden_size(self) -> int:
        """`dim`, under the name that other configs have for it."""
        return self.dim
