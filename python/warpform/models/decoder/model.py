"""LLaMA, Mistral and Qwen2 as a stack of branches (arXiv 2302.13971, 2310.06825, 2407.10671), padding-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..common.convertible import ConvertibleModel
from .base import CausalLM
from .config import DecoderConfig

_CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}


class DecoderForCausalLM(CausalLM, ConvertibleModel):
    """A LLaMA-style decoder with its language-model head. It computes no padding, and prompts need not be equally long.

    `warpform.models.from_transformers` makes one of `LlamaForCausalLM`, `MistralForCausalLM` or `Qwen2ForCausalLM`, and
    `to_transformers()` makes one of these of it. With a sliding window and a mask that has holes, the window counts the
    tokens that are there; transformers counts the holes too.
    """

    config_class = DecoderConfig
    weight_prefix = ""
    spare_weights = ("lm_head.",)

    @classmethod
    def build(cls, config: Any, *, with_optional: bool = True) -> DecoderForCausalLM:
        return cls(config)

    @property
    def transformers_class(self) -> str:  # type: ignore[override]
        return f"{_CLASSES[self.config.architecture]}ForCausalLM"

    @property
    def transformers_config_class(self) -> str:  # type: ignore[override]
        return f"{_CLASSES[self.config.architecture]}Config"

    @classmethod
    def canonical_weights(cls, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # Old checkpoints hold the frequencies of rotary positions.
        return {name: w for name, w in weights.items() if not name.endswith("rotary_emb.inv_freq")}

    def to_transformers(self) -> nn.Module:
        """As of all models that transformers has; a stack with lags is another model.

        Raises:
            ImportError: transformers is not installed.
            ValueError: the stack has lags, or branches that the architecture has not.
        """
        self._check_lags("to_transformers")
        return super().to_transformers()

    def save_pretrained(
        self, folder: str | Path, *, state_dict: Mapping[str, Tensor] | None = None, **unused: Any
    ) -> None:
        """As of all models; lags of the stack, which the files do not tell, are refused by ValueError."""
        self._check_lags("save_pretrained")
        super().save_pretrained(folder, state_dict=state_dict, **unused)

    def _check_lags(self, method: str) -> None:
        if any(self.stack.lags):
            raise ValueError(
                f"DecoderForCausalLM.{method}: the lags of the stack must be 0, as transformers has no others, got "
                f"{self.stack.lags}; a LadderForCausalLM keeps them"
            )

    def weight_names(self) -> dict[str, tuple[str, ...]]:
        names: dict[str, tuple[str, ...]] = {"tokens.weight": ("model.embed_tokens.weight",)}
        config = self.config
        for layer in range(config.num_hidden_layers):
            theirs = f"model.layers.{layer}"
            for place, norm, parts, out, biases in (
                (
                    2 * layer,
                    "input_layernorm",
                    [f"self_attn.{kind}_proj" for kind in "qkv"],
                    "self_attn.o_proj",
                    (config.has_qkv_bias, config.attention_bias),
                ),
                (
                    2 * layer + 1,
                    "post_attention_layernorm",
                    ["mlp.gate_proj", "mlp.up_proj"],
                    "mlp.down_proj",
                    (config.mlp_bias, config.mlp_bias),
                ),
            ):
                ours = f"stack.branches.{place}"
                names[f"{ours}.norm.weight"] = (f"{theirs}.{norm}.weight",)
                for module, found, bias in (("inwards", parts, biases[0]), ("outwards", [out], biases[1])):
                    for leaf in ("weight", "bias") if bias else ("weight",):
                        names[f"{ours}.{module}.{leaf}"] = tuple(f"{theirs}.{part}.{leaf}" for part in found)
        names["norm.weight"] = ("model.norm.weight",)
        if not config.tie_word_embeddings:
            names["head.weight"] = ("lm_head.weight",)
        return names

    def weight_rows(self, name: str) -> Sequence[int] | None:
        parts = name.split(".")  # stack.branches.PLACE.inwards.weight
        if parts[0] != "stack" or parts[-2] != "inwards" or int(parts[2]) % 2:
            return None
        config = self.config
        keys = config.kv_heads * config.heads_dim
        return (config.num_attention_heads * config.heads_dim, keys, keys)
