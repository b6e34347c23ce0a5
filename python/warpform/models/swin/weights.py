"""Names of Swin's weights: in transformers' files, in its live modules, and in the published checkpoints."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

# transformers 5 renames Swin's weights when it reads and writes files; the names of files are used here.
_PARTS = {"q": "query", "k": "key", "v": "value"}
_LIVE: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    (re.compile(r"\.attention\.(q|k|v)_proj\."), lambda m: f".attention.self.{_PARTS[m[1]]}."),
    (re.compile(r"\.attention\.o_proj\."), ".attention.output.dense."),
    (re.compile(r"\.attention\.relative_position_bias\."), ".attention.self."),
    (re.compile(r"\.mlp\.fc1\."), ".intermediate.dense."),
    (re.compile(r"\.mlp\.fc2\."), ".output.dense."),
)

_PUBLISHED = (
    (re.compile(r"^patch_embed\.proj\."), "embeddings.patch_embeddings.projection."),
    (re.compile(r"^patch_embed\.norm\."), "embeddings.norm."),
    (re.compile(r"^absolute_pos_embed$"), "embeddings.position_embeddings"),
    (re.compile(r"^norm\."), "layernorm."),
    (re.compile(r"^layers\."), "encoder.layers."),
    (re.compile(r"\.norm1\."), ".layernorm_before."),
    (re.compile(r"\.norm2\."), ".layernorm_after."),
    (re.compile(r"\.mlp\.fc1\."), ".intermediate.dense."),
    (re.compile(r"\.mlp\.fc2\."), ".output.dense."),
    (re.compile(r"\.attn\.proj\."), ".attention.output.dense."),
    (re.compile(r"\.attn\.q_bias$"), ".attention.self.query.bias"),
    (re.compile(r"\.attn\.v_bias$"), ".attention.self.value.bias"),
    (re.compile(r"\.attn\.cpb_mlp\."), ".attention.self.continuous_position_bias_mlp."),
    (re.compile(r"\.attn\.(relative_position_bias_table|logit_scale)$"), r".attention.self.\1"),
)
_CONSTANTS = re.compile(r"(^|\.)(relative_position_index|relative_coords_table|attn_mask)$")


def file_name(name: str) -> str:
    """The name in transformers' files of a parameter of a live model."""
    for pattern, replacement in _LIVE:
        name = pattern.sub(replacement, name)
    return name


def is_published(names: Iterable[str]) -> bool:
    """Whether names are those of the published code."""
    return any(name.startswith("patch_embed.") for name in names)


def from_published(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Weights under the names of transformers' files, `prefix` before those that are not the head's."""
    renamed: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if _CONSTANTS.search(name):
            continue
        if name.startswith("head."):
            renamed[f"classifier.{name.removeprefix('head.')}"] = weight
            continue
        for pattern, replacement in _PUBLISHED:
            name = pattern.sub(replacement, name)
        fused = re.fullmatch(r"(.*)\.attn\.qkv\.(weight|bias)", name)
        if fused is None:
            renamed[f"{prefix}{name}"] = weight
            continue
        for part, chunk in zip(_PARTS.values(), weight.chunk(3), strict=True):
            renamed[f"{prefix}{fused[1]}.attention.self.{part}.{fused[2]}"] = chunk
    return renamed


def without_constants(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Weights without the buffers that old files hold."""
    return {name: weight for name, weight in weights.items() if not _CONSTANTS.search(name)}
