"""The options of DeBERTa and of its versions 2 and 3."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from ...nn import ACTIVATIONS
from ..common.config import TransformersConfig

Config = TypeVar("Config", bound="DebertaConfig")


@dataclasses.dataclass
class DebertaConfig(TransformersConfig):
    """The options of a DeBERTa (v1) encoder and its heads, under the names of transformers' `DebertaConfig`.

    pos_att_type may be a sequence, None, or one string as in "c2p|p2c". embedding_size None is hidden_size.

    Raises:
        ValueError: an unknown activation or problem_type, sizes that do not fit, a dropout outside [0, 1].
    """

    model_type = "deberta"
    divides = (("num_attention_heads", "hidden_size"),)
    choices = {"hidden_act": ACTIVATIONS, "pooler_hidden_act": ACTIVATIONS}
    probabilities = ("hidden_dropout_prob", "attention_probs_dropout_prob", "pooler_dropout", "cls_dropout")
    unsupported = (*TransformersConfig.unsupported, "talking_head")

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
        super().__post_init__()

    @classmethod
    def from_transformers(cls: type[Config], fields: Mapping[str, Any], **overrides: Any) -> Config:
        """Reads fields as `TransformersConfig` does, and checks two more.

        Raises:
            ValueError: also a pooler_hidden_size other than hidden_size, and an attention_head_size other than
                hidden_size / num_attention_heads.
        """
        config = super().from_transformers(fields, **overrides)
        for name, only in (
            ("pooler_hidden_size", config.hidden_size),
            ("attention_head_size", config.hidden_size // config.num_attention_heads),
        ):
            if fields.get(name) not in (None, only):
                raise cls.error(f"{name}={fields[name]!r} is not supported, only {only}")
        return config

    def to_transformers(self) -> dict[str, Any]:
        return {**super().to_transformers(), "pos_att_type": list(self.pos_att_type)}

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
        """The number of terms that scores are scaled for: content and positions, as transformers counts them."""
        return 1 + len(self.pos_att_type)


@dataclasses.dataclass
class DebertaV2Config(DebertaConfig):
    """The options of a DeBERTa-v2 or v3 encoder and its heads, under the names of transformers' `DebertaV2Config`.

    Raises:
        ValueError: as `DebertaConfig`; position_buckets that do not fit max_relative_positions, an even
            conv_kernel_size.
    """

    model_type = "deberta-v2"
    choices = {**DebertaConfig.choices, "conv_act": ACTIVATIONS}

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
        least = self.position_buckets // 2 + 2
        if self.relative_attention and self.position_buckets > 0:
            if self.position_buckets == 1:
                raise self.error("position_buckets must be at least 2, or at most 0 for none, got 1")
            if self.relative_positions < least:
                raise self.error(
                    f"max_relative_positions must be at least {least} with {self.position_buckets} position_buckets, "
                    f"got {self.relative_positions}"
                )
        if self.conv_kernel_size > 0 and self.conv_kernel_size % 2 == 0:
            raise self.error(f"conv_kernel_size must be odd, or 0 for none, got {self.conv_kernel_size}")

    @property
    def buckets(self) -> int:
        return max(self.position_buckets, 0)

    @property
    def score_terms(self) -> int:
        return 1 + ("c2p" in self.pos_att_type) + ("p2c" in self.pos_att_type)

    @property
    def relative_norm(self) -> bool:
        """True if the embeddings of relative positions are normalised."""
        return "layer_norm" in (part.strip() for part in self.norm_rel_ebd.lower().split("|"))
