"""Names of P2AT's weights in the published code, and the options that they tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..common.weights import rename
from ..resnet import published_config
from ..system_backbone import backbone_choice

# Our names to those of the published code. Numbers follow the order of computation; it counts contexts and fusions from
# the coarse side, 4 and then 3, and refinements backwards.
_PUBLISHED = (
    (r"^backbone\.conv1\.", "conv1_x."),
    (r"^backbone\.", ""),
    (r"^reduce\.", "feature_reducer."),
    (r"^blocks\.(\d)\.", r"deep_feature_processor.transformer_layers.\1."),
    (r"\.feed_forward\.up\.", ".mlp.fc1.conv."),
    (r"\.feed_forward\.depthwise\.", ".mlp.dwconv."),
    (r"\.feed_forward\.down\.", ".mlp.fc2.conv."),
    (r"\.attention\.details\.residual\.conv\.", ".attn.details_enhancer.conv1.0.conv."),
    (r"\.attention\.details\.residual\.norm\.", ".attn.details_enhancer.conv1.1."),
    (r"\.attention\.details\.local\.conv\.", ".attn.details_enhancer.conv2.0.conv."),
    (r"\.attention\.details\.local\.norm\.", ".attn.details_enhancer.conv2.1."),
    (r"\.attention\.pyramid\.inwards\.", ".attn.pool_feats_processor.conv1."),
    (r"\.attention\.pyramid\.pooled\.", ".attn.pool_feats_processor.conv2."),
    (r"\.attention\.value\.", ".attn.to_v.conv."),
    (r"\.attention\.rows\.", ".attn.proj_encode_row."),
    (r"\.attention\.columns\.conv\.", ".attn.proj_encode_column.conv."),
    (r"\.attention\.out\.", ".attn.proj."),
    (r"^decoders\.0\.", "P1_decoder."),
    (r"^decoders\.1\.", "P2_decoder."),
    (r"^decoders\.2\.", "P3_decoder."),
    (r"_decoder\.depthwise\.", "_decoder.dwconv.0."),
    (r"_decoder\.norm\.", "_decoder.dwconv.1."),
    (r"_decoder\.up\.", "_decoder.pwconv1.0."),
    (r"_decoder\.down\.", "_decoder.pwconv2."),
    (r"^fusions\.0\.", "BiS4."),
    (r"^fusions\.1\.", "BiS3."),
    (r"^(BiS\d)\.fine\.", r"\1.down_feat.conv1."),
    (r"^(BiS\d)\.fine_mean\.", r"\1.down_feat.conv2.conv."),
    (r"^(BiS\d)\.fine_gate\.", r"\1.down_feat.conv3.conv."),
    (r"^(BiS\d)\.fine_out\.", r"\1.down_feat.fuse.conv."),
    (r"^(BiS\d)\.deep\.", r"\1.up_feat.conv1."),
    (r"^(BiS\d)\.deep_gate\.", r"\1.up_feat.conv2.conv."),
    (r"^(BiS\d)\.middle\.conv\.", r"\1.st_feat.0.conv."),
    (r"^(BiS\d)\.middle\.norm\.", r"\1.st_feat.1."),
    (r"^(BiS\d)\.out\.conv\.", r"\1.fuse.0.conv."),
    (r"^(BiS\d)\.out\.norm\.", r"\1.fuse.1."),
    (r"^contexts\.0\.", "pool_gce4."),
    (r"^contexts\.1\.", "pool_gce3."),
    (r"^(pool_gce\d)\.inwards\.", r"\1.conv1.conv."),
    (r"^(pool_gce\d)\.(weight|bias)$", r"\1.bn_scale.\2"),
    (r"^(pool_gce\d)\.out\.", r"\1.conv2."),
    (r"^refinements\.0\.", "refine3.c2_."),
    (r"^refinements\.1\.", "refine2.c2_."),
    (r"^refinements\.2\.", "refine1.c2_."),
    (r"^merges\.0\.", "fuse1."),
    (r"^merges\.1\.", "fuse2."),
    (r"^head\.", "final_seg_head."),
    (r"^auxiliary_heads\.0\.", "aux_seg_head1."),
    (r"^auxiliary_heads\.1\.", "aux_seg_head2."),
    (r"^(\w*seg_head\d?)\.inwards_norm\.", r"\1.bn1."),
    (r"^(\w*seg_head\d?)\.inwards\.conv\.", r"\1.conv1."),
    (r"^(\w*seg_head\d?)\.inwards\.norm\.", r"\1.bn2."),
    (r"^(\w*seg_head\d?)\.classifier\.", r"\1.conv2."),
    (r"\.norm\.", ".bn."),
    (r"\.activation\.", ".act."),
)
AUXILIARY_HEAD = "aux_seg_head"  # what the published names of auxiliary heads begin with
_POSITIONS = ("row_q", "row_k", "column_q", "column_k")


def published_names(name: str) -> tuple[str, ...]:
    """The names in the published code whose tensors, joined on dim 0, make up the weight of the given name."""
    block, kind = name.rpartition(".attention.")[0], name.rpartition(".attention.")[2]
    if kind == "query_key.weight":
        names = tuple(f"{block}.attn.{part}.conv.weight" for part in ("to_q", "to_k"))
    elif kind == "positions":
        names = tuple(f"{block}.attn.pos_emb_{part}.pos_embed" for part in _POSITIONS)
    else:
        names = (name,)
    if name.startswith("backbone."):  # BatchNorm and its kind have torchvision's names already
        return tuple(rename(n, _PUBLISHED[:2]) for n in names)
    return tuple(rename(n, _PUBLISHED) for n in names)


def published_fields(what: str, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of the config that published weights tell; `what` begins the messages of errors.

    Raises:
        ValueError: weights under other names.
    """
    layers = "deep_feature_processor.transformer_layers"
    positions, inside = f"{layers}.0.attn.pos_emb_row_q.pos_embed", f"{layers}.0.mlp.fc1.conv.weight"
    needed = ("feature_reducer.conv.weight", "final_seg_head.conv2.weight", "conv1_x.weight", positions, inside)
    missing = [name for name in needed if name not in weights]
    if missing:
        raise ValueError(f"{what}: weights must have the published names, and lack {missing[0]}")
    resnet = published_config(what, {name.replace("conv1_x.", "conv1."): w for name, w in weights.items()})
    hidden_size = weights["feature_reducer.conv.weight"].shape[0]
    return {
        "backbone": backbone_choice(resnet),
        "auxiliary_heads": any(name.startswith(AUXILIARY_HEAD) for name in weights),
        "hidden_size": hidden_size,
        "num_blocks": len({name.split(".")[2] for name in weights if name.startswith(f"{layers}.")}),
        "mlp_ratio": weights[inside].shape[0] // hidden_size,
        "num_positions": weights[positions].shape[2],
        "num_labels": weights["final_seg_head.conv2.weight"].shape[0],
        "released": True,
    }
