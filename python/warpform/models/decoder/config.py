"""The options of a decoder: LLaMA's, by transformers' names, and what Mistral and Qwen2 have beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from ...nn.activations import ACTIVATIONS
from ...nn.rotary import Rotary
from ..common.config import TransformersConfig, config_overrides, known_fields

# What transformers takes where a file of an architecture does not say.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131_072},
    "qwen2": {"max_window_layers": 28, "num_key_value_heads": 32, "max_position_embeddings": 32_768},
}
LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclasses.dataclass
class DecoderConfig(TransformersConfig):
    """The options of a LLaMA-style decoder. Systems on the same structure add fields of their own.

    Defaults are those of transformers' LlamaConfig.

    Attributes:
        vocab_size, hidden_size, intermediate_size, num_hidden_layers: as in LLaMA.
        num_attention_heads, num_key_value_heads: as in LLaMA; None: as many heads of keys as of queries.
        head_dim: None: hidden_size / num_attention_heads.
        hidden_act: what gates the feed-forward, one of `nn.ACTIVATIONS`.
        max_position_embeddings: the longest sequence.
        rms_norm_eps, initializer_range, tie_word_embeddings: as in LLaMA.
        rope_theta, rope_scaling: as of `nn.rotary.Rotary`.
        attention_bias: whether the products of attention have biases.
        qkv_bias: whether those of queries, keys and values have, as in Qwen2; None: as attention_bias.
        mlp_bias: whether the products of the feed-forward have.
        sliding_window: a token sees at most so many keys, itself included, as in Mistral; None: all before it.
        layer_types: for each layer "full_attention" or "sliding_attention"; None: the window is in every layer.
        architecture: what transformers calls it: "llama", "mistral" or "qwen2".
        bos_token_id, eos_token_id, pad_token_id: are kept for transformers, which generates by them; nothing here reads
            them.

    Raises:
        ValueError: sizes that do not fit, an unknown choice, a rope_scaling that is not supported.
    """

    model_type = "llama"
    positive: ClassVar[tuple[str, ...]] = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "max_position_embeddings",
    )  # fmt: skip
    divides = (("num_key_value_heads", "num_attention_heads"),)
    choices = {"hidden_act": ACTIVATIONS, "architecture": ("llama", "mistral", "qwen2")}
    # What model_type may be in files beside it.
    other_model_types: ClassVar[tuple[str, ...]] = ("mistral", "qwen2")

    vocab_size: int = 32_000
    hidden_size: int = 4096
    intermediate_size: int = 11_008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: dict[str, Any] | None = None
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    qkv_bias: bool | None = None
    mlp_bias: bool = False
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None
    architecture: str = "llama"
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_dim is not None and self.head_dim < 1:
            raise self.error(f"head_dim must be None or at least 1, got {self.head_dim}")
        if self.rope_theta <= 0:
            raise self.error(f"rope_theta must be above 0, got {self.rope_theta}")
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise self.error(
                f"num_attention_heads must divide hidden_size {self.hidden_size} where head_dim is None, "
                f"got {self.num_attention_heads}"
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise self.error(f"sliding_window must be at least 1, the token itself, got {self.sliding_window}")
        if self.layer_types is not None and (
            len(self.layer_types) != self.num_hidden_layers or not set(self.layer_types) <= set(LAYER_TYPES)
        ):
            raise self.error(
                f"layer_types must be {self.num_hidden_layers} of {', '.join(LAYER_TYPES)}, "
                f"got {', '.join(map(str, self.layer_types))}"
            )
        self.check_rotary()

    def check_rotary(self) -> None:
        """Raises ValueError where heads cannot have the rotary positions that the config asks for."""
        if self.heads_dim % 2:
            raise self.error(f"rotary positions need an even head_dim, got {self.heads_dim}")
        try:
            Rotary(self.heads_dim, self.rope_theta, self.rope_scaling)
        except ValueError as error:
            raise self.error(str(error)) from None

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_attention_heads if self.num_key_value_heads is None else self.num_key_value_heads

    @property
    def heads_dim(self) -> int:
        """Dimensions of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def has_qkv_bias(self) -> bool:
        """Whether the product of queries, keys and values has a bias."""
        return self.attention_bias if self.qkv_bias is None else self.qkv_bias

    def window(self, layer: int) -> int | None:
        """The sliding window of a layer; None where it sees everything before."""
        slides = self.layer_types is None or self.layer_types[layer] == "sliding_attention"
        return self.sliding_window if slides else None

    def dense_fields(self) -> dict[str, Any]:
        """The fields that a `DecoderConfig` has too, for the dense decoder that a system holds or becomes."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(DecoderConfig)}

    @property
    def _is_theirs(self) -> bool:
        """Whether transformers has the architecture, and not only its decoder's fields."""
        return self.model_type == DecoderConfig.model_type

    @classmethod
    def from_transformers(cls, fields: Mapping[str, Any], **overrides: Any) -> DecoderConfig:
        """From the fields of a transformers config of Llama, Mistral or Qwen2. Others that change nothing are ignored.

        Raises:
            ValueError: an option that is not supported, such as attention_dropout above 0; fields that break a rule.
            TypeError: an override that is no field.
        """
        kind = fields.get("model_type", "llama")
        fields = {**_DEFAULTS.get(kind, {}), **fields}
        for name in (*cls.unsupported, "attention_dropout"):
            if fields.get(name):
                raise cls.error(f"{name}={fields[name]!r} is not supported")
        known = {name: tuple(v) if isinstance(v, list) else v for name, v in known_fields(cls, fields).items()}
        # transformers 5 keeps all about rotary positions in one field.
        rope = {**(fields.get("rope_scaling") or {}), **(fields.get("rope_parameters") or {})}
        known["rope_theta"] = float(rope.pop("rope_theta", fields.get("rope_theta", cls.rope_theta)))
        share = rope.pop("partial_rotary_factor", fields.get("partial_rotary_factor"))
        if share not in (None, 1.0):
            raise cls.error(f"partial_rotary_factor={share!r} is not supported")
        plain = rope.get("rope_type", rope.get("type", "default")) == "default"
        known["rope_scaling"] = None if plain else rope
        known["architecture"] = kind
        if kind == "qwen2":
            known["qkv_bias"] = True
            if not fields.get("use_sliding_window"):
                known["sliding_window"] = known["layer_types"] = None
            elif known.get("layer_types") is None:
                full = int(fields["max_window_layers"])
                layers = int(fields["num_hidden_layers"])
                known["layer_types"] = tuple(LAYER_TYPES[layer >= full] for layer in range(layers))
        else:
            known["layer_types"] = known.get("layer_types") if kind == "mistral" else None
            if kind == "llama":
                known["sliding_window"] = None
        return cls(**{**known, **config_overrides(cls, overrides)})

    def to_transformers(self) -> dict[str, Any]:
        """The fields as keywords of the config class of transformers.

        Raises:
            ValueError: options that no one architecture of transformers has together.
        """
        fields = {name: value for name, value in self.dense_fields().items() if name != "architecture"}
        if isinstance(self.eos_token_id, tuple):
            fields["eos_token_id"] = list(self.eos_token_id)
        qkv_bias = fields.pop("qkv_bias")
        rope = {"rope_type": "default", **(self.rope_scaling or {})}
        rope.setdefault("rope_theta", self.rope_theta)
        fields["rope_parameters"] = rope
        # A copy, as transformers adds to it.
        fields["rope_scaling"] = None if self.rope_scaling is None else dict(self.rope_scaling)
        if self.head_dim is None:  # some classes take None for a number
            del fields["head_dim"]
        window, types = fields.pop("sliding_window"), fields.pop("layer_types")
        wrong = ""
        if self.architecture == "llama":
            wrong = "" if window is None else "a sliding_window"
            wrong = wrong or ("" if qkv_bias in (None, self.attention_bias) else "a qkv_bias of its own")
        else:
            del fields["attention_bias"], fields["mlp_bias"]
            if self.mlp_bias or self.attention_bias:
                wrong = "biases of the feed-forward or of the output of attention"
            if self.architecture == "mistral":
                wrong = wrong or ("a qkv_bias" if self.has_qkv_bias else "")
                wrong = wrong or ("layer_types" if types is not None else "")
                fields["sliding_window"] = window
            else:
                wrong = wrong or ("" if self.has_qkv_bias else "no qkv_bias")
                fields |= {"use_sliding_window": window is not None, "sliding_window": window}
                fields["layer_types"] = None if types is None else list(types)
                if window is not None and types is None:
                    fields["layer_types"] = ["sliding_attention"] * self.num_hidden_layers
        if wrong:
            raise self.error(f"{self.architecture} of transformers has no config with {wrong}")
        return fields

    @classmethod
    def _from_own_fields(cls, fields: Mapping[str, Any], overrides: dict[str, Any]) -> DecoderConfig:
        if cls.model_type == DecoderConfig.model_type:
            return cls.from_transformers(fields, **overrides)
        known = {name: tuple(v) if isinstance(v, list) else v for name, v in known_fields(cls, fields).items()}
        return cls(**{**known, **config_overrides(cls, overrides)})

    def _own_fields(self) -> dict[str, Any]:
        if not self._is_theirs:
            return dataclasses.asdict(self)
        # Older versions of transformers read these two.
        return {**self.to_transformers(), "rope_theta": self.rope_theta, "rope_scaling": self.rope_scaling}

    def to_dict(self) -> dict[str, Any]:
        """The fields as config.json has them: transformers' own where it has the architecture."""
        return {**super().to_dict(), **({"model_type": self.architecture} if self._is_theirs else {})}
