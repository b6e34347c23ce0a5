"""Names of Swin's weights: in transformers' files, in its live modules, and in the published checkpoints."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ..common.weights import rename

# transformers 5 renames Swin's weights when it reads and writes files; the names of files are used here.
_LIVE = (
    (r"\.attention\.q_proj\.", ".attention.self.query."),
    (r"\.attention\.k_proj\.", ".attention.self.key."),
    (r"\.attention\.v_proj\.", ".attention.self.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.attention\.relative_position_bias\.", ".attention.self."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)

_PUBLISHED = (
    (r"^head\.", "classifier."),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^patch_embed\.norm\.", "embeddings.norm."),
    (r"^absolute_pos_embed$", "embeddings.position_embeddings"),
    (r"^norm\.", "layernorm."),
    (r"^layers\.", "encoder.layers."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.attn\.q_bias$", ".attention.self.query.bias"),
    (r"\.attn\.v_bias$", ".attention.self.value.bias"),
    (r"\.attn\.cpb_mlp\.", ".attention.self.continuous_position_bias_mlp."),
    (r"\.attn\.(relative_position_bias_table|logit_scale)$", r".attention.self.\1"),
)
_CONSTANTS = re.compile(r"(^|\.)(relative_position_index|relative_coords_table|attn_mask)$")


def file_name(name: str) -> str:
    """The name in transformers' files of a parameter of a live model."""
    return rename(name, _LIVE)


def is_published(names: Iterable[str]) -> bool:
    """Tells whether names are those of the published code."""
    return any(name.startswith("patch_embed.") for name in names)


def from_published(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Weights under the names of transformers' files, `prefix` before those that are not the head's."""
    renamed: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if _CONSTANTS.search(name):
            continue
        name = rename(name, _PUBLISHED)
        if not name.startswith("classifier."):
            name = prefix + name
        fused = re.fullmatch(r"(.*)\.attn\.qkv\.(weight|bias)", name)
        if fused is None:
            renamed[name] = weight
            continue
        for part, chunk in zip(("query", "key", "value"), weight.chunk(3), strict=True):
            renamed[f"{fused[1]}.attention.self.{part}.{fused[2]}"] = chunk
    return renamed


def without_constants(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Weights without the buffers that old files hold."""
    return {name: weight for name, weight in weights.items() if not _CONSTANTS.search(name)}
