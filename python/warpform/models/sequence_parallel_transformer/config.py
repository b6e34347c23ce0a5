"""The options of a transformer whose sequences are held by many ranks."""

from __future__ import annotations

import dataclasses
from typing import Any

from ...distributed.sequence_parallel import ATTENTIONS
from ...nn import ACTIVATIONS
from ..common.config import ModelConfig

POSITIONS = ("rotary", "learned")


@dataclasses.dataclass
class SequenceParallelTransformerConfig(ModelConfig):
    """Sizes by default are those of BERT-base, which the paper measures.

    Attributes:
        vocab_size, hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, hidden_act: as in BERT.
        num_key_value_heads: fewer heads of keys and values (arXiv 2305.13245); None: as many as of queries.
        max_position_embeddings: the longest sequence; with attention "linformer" the only one.
        position_embedding: "rotary" (arXiv 2104.09864) or "learned".
        rope_theta: the base of rotary frequencies.
        layer_norm_eps, initializer_range: as in BERT.
        causal: a decoder, where a token sees itself and those before it. Else an encoder.
        attention: "ring" keeps no scores, "rsa" is the paper's and keeps L / N rows of them, "linformer" projects the
            keys and values of the sequence to linformer_rank rows (arXiv 2006.04768), which a decoder cannot.
        linformer_rank: K.
        tie_word_embeddings: logits are products with the embeddings of tokens.

    Raises:
        ValueError: an unknown choice, sizes that do not fit, a Linformer that is causal.
    """

    model_type = "sequence_parallel_transformer"
    positive = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
        "max_position_embeddings", "linformer_rank",
    )  # fmt: skip
    divides = (("num_attention_heads", "hidden_size"), ("num_key_value_heads", "num_attention_heads"))
    choices = {"hidden_act": ACTIVATIONS, "position_embedding": POSITIONS, "attention": ATTENTIONS}

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    max_position_embeddings: int = 32768
    position_embedding: str = "rotary"
    rope_theta: float = 10_000.0
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    causal: bool = False
    attention: str = "ring"
    linformer_rank: int = 256
    tie_word_embeddings: bool = True

    @classmethod
    def encoder(cls, **fields: Any) -> SequenceParallelTransformerConfig:
        """Every token sees every other, with learned positions, as in BERT; then any field."""
        return cls(**{"causal": False, "position_embedding": "learned", **fields})

    @classmethod
    def decoder(cls, **fields: Any) -> SequenceParallelTransformerConfig:
        """A token sees itself and those before it, with rotary positions; then any field."""
        return cls(**{"causal": True, **fields})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.position_embedding == "rotary" and self.head_dim % 2:
            raise self.error(f"rotary positions need an even head_dim, got {self.head_dim}")
        if self.attention == "linformer" and self.causal:
            raise self.error("attention must not be linformer where causal: its projections mix all positions")

    @property
    def kv_heads(self) -> int:
        return self.num_attention_heads if self.num_key_value_heads is None else self.num_key_value_heads

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads
