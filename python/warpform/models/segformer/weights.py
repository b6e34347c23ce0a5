"""Names of SegFormer's weights: in transformers' files, in its live modules, and in the published checkpoints."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ..common.weights import rename

# transformers 5 renames SegFormer's weights when it reads and writes files; the names of files are used here.
_LIVE = (
    (r"\bstages\.(\d+)\.patch_embeddings\.", r"encoder.patch_embeddings.\1."),
    (r"\bstages\.(\d+)\.blocks\.", r"encoder.block.\1."),
    (r"\bstages\.(\d+)\.layer_norm\.", r"encoder.layer_norm.\1."),
    (r"\.attention\.q_proj\.", ".attention.self.query."),
    (r"\.attention\.k_proj\.", ".attention.self.key."),
    (r"\.attention\.v_proj\.", ".attention.self.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.attention\.sequence_reduction\.sequence_reduction\.", ".attention.self.sr."),
    (r"\.attention\.sequence_reduction\.layer_norm\.", ".attention.self.layer_norm."),
    (r"\.mlp\.fc1\.", ".mlp.dense1."),
    (r"\.mlp\.fc2\.", ".mlp.dense2."),
    (r"\.layernorm_before\.", ".layer_norm_1."),
    (r"\.layernorm_after\.", ".layer_norm_2."),
    (r"^decode_head\.linear_projections\.", "decode_head.linear_c."),
)

# The published code numbers stages from 1. In a whole segmenter the encoder is under "backbone.".
_PUBLISHED = (
    (r"^head\.", "classifier."),
    (r"^decode_head\.linear_c(\d+)\.", r"decode_head.linear_c.\1."),
    (r"^decode_head\.linear_fuse\.conv\.", "decode_head.linear_fuse."),
    (r"^decode_head\.linear_fuse\.bn\.", "decode_head.batch_norm."),
    (r"^decode_head\.linear_pred\.", "decode_head.classifier."),
    (r"^patch_embed(\d+)\.proj\.", r"segformer.encoder.patch_embeddings.\1.proj."),
    (r"^patch_embed(\d+)\.norm\.", r"segformer.encoder.patch_embeddings.\1.layer_norm."),
    (r"^norm(\d+)\.", r"segformer.encoder.layer_norm.\1."),
    (r"^block(\d+)\.", r"segformer.encoder.block.\1."),
    (r"\.norm([12])\.", r".layer_norm_\1."),
    (r"\.attn\.q\.", ".attention.self.query."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.attn\.sr\.", ".attention.self.sr."),
    (r"\.attn\.norm\.", ".attention.self.layer_norm."),
    (r"\.mlp\.fc([12])\.", r".mlp.dense\1."),
)
_STAGE = re.compile(
    r"(?<=encoder\.patch_embeddings\.)\d+|(?<=encoder\.layer_norm\.)\d+|(?<=encoder\.block\.)\d+|(?<=linear_c\.)\d+"
)
# A layer of the base class of mmsegmentation's heads that this head does not use.
_UNUSED = "decode_head.conv_seg."


def file_name(name: str) -> str:
    """The name in transformers' files of a parameter of a live model."""
    return rename(name, _LIVE)


def is_published(names: Iterable[str]) -> bool:
    """Tells whether names are those of the published code."""
    return any(name.removeprefix("backbone.").startswith("patch_embed1.") for name in names)


def from_published(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names that transformers' files of a model with a head have."""
    renamed: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if name.startswith(_UNUSED):
            continue
        name = rename(name.removeprefix("backbone."), _PUBLISHED)
        name = _STAGE.sub(lambda found: str(int(found[0]) - 1), name)
        both = re.fullmatch(r"(.*)\.attn\.kv\.(weight|bias)", name)
        if both is None:
            renamed[name] = weight
            continue
        for part, chunk in zip(("key", "value"), weight.chunk(2), strict=True):
            renamed[f"{both[1]}.attention.self.{part}.{both[2]}"] = chunk
    return renamed


def published_fields(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of the config that the shapes of published weights tell, and the eps of the published code."""
    weights = {name.removeprefix("backbone."): weight for name, weight in weights.items()}
    stages = sum(re.fullmatch(r"patch_embed\d+\.proj\.weight", name) is not None for name in weights)
    blocks = {found.groups() for name in weights if (found := re.match(r"block(\d+)\.(\d+)\.", name)) is not None}
    embeddings = [weights[f"patch_embed{i + 1}.proj.weight"] for i in range(stages)]  # [out, in, side, side]
    widths = tuple(weight.shape[0] for weight in embeddings)
    reductions = [weights.get(f"block{i + 1}.0.attn.sr.weight") for i in range(stages)]
    fields: dict[str, Any] = {
        "num_channels": embeddings[0].shape[1],
        "hidden_sizes": widths,
        "patch_sizes": tuple(weight.shape[2] for weight in embeddings),
        "depths": tuple(sum(stage == str(i + 1) for stage, _ in blocks) for i in range(stages)),
        "sr_ratios": tuple(1 if weight is None else weight.shape[2] for weight in reductions),
        "mlp_ratios": tuple(
            weights[f"block{i + 1}.0.mlp.fc1.weight"].shape[0] / width for i, width in enumerate(widths)
        ),
        "block_norm_eps": 1e-6,
    }
    for name in ("head.weight", "decode_head.linear_pred.weight"):
        if name in weights:
            fields["num_labels"] = weights[name].shape[0]
    if "decode_head.linear_fuse.conv.weight" in weights:
        fields["decoder_hidden_size"] = weights["decode_head.linear_fuse.conv.weight"].shape[0]
    return fields
