"""Weights of MAXIM's release, which is written in flax: their names, and where their axes go.

Modules without a name are counted by flax, each class by itself: Conv_0, Dense_1, UpSampleRatio_17.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...nn.window_mix import WindowMix
from ..common.pretrained import check_names
from .blocks import CrossGating, Level

# Checkpoints hold the weights among those of the optimiser.
PREFIX = "opt/target/"
Pairs = Iterator[tuple[str, str]]


def renamed(model: nn.Module, given: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """Copies of the weights under the names of the model and with its shapes.

    Args:
        model: a `MAXIMForImageRestoration`.
        given: weights of the release, as `flat` gives them.
        what: begins the messages of errors.

    Raises:
        ValueError: weights that are missing, unknown or of another shape, by their names in the release.
    """
    names = published_names(model)
    check_names({ours: (theirs,) for ours, theirs in names.items()}, given, f"{what}: the weights")
    found: dict[str, Tensor] = {}
    for ours, theirs in names.items():
        module, _, leaf = ours.rpartition(".")
        found[ours] = rearranged(given[theirs], model.get_submodule(module), leaf)
        wanted = list(model.get_parameter(ours).shape)
        if list(found[ours].shape) != wanted:
            raise ValueError(
                f"{what}: {theirs} must have a shape that gives {ours} the shape {wanted}, "
                f"got {list(given[theirs].shape)}"
            )
    return found


def flat(weights: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """Tensors by names with slashes. Of a checkpoint with an optimiser only the weights remain."""
    found: dict[str, Tensor] = {}
    for name, value in weights.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}/")
        else:
            found[f"{prefix}{name}"] = value.detach() if isinstance(value, Tensor) else torch.from_numpy(value)
    if prefix:
        return found
    own = {name.removeprefix(PREFIX): tensor for name, tensor in found.items() if name.startswith(PREFIX)}
    return own or found


def config_fields(weights: Mapping[str, Tensor], what: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The options that names and shapes tell.

    Raises:
        ValueError: weights that they do not follow from.
    """

    def count(pattern: str) -> int:
        numbers = [int(match[1]) for name in weights if (match := re.match(pattern, name))]
        return 1 + max(numbers, default=-1)

    def shape(name: str) -> list[int]:
        if name not in weights:
            raise ValueError(f"{what}: the weights lack {name}")
        return list(weights[name].shape)

    def window(level: str, axis: str, field: str) -> int | None:
        if field in overrides:
            return None
        name = f"{level}/SplitHeadMultiAxisGmlpLayer_0/{axis}GmlpLayer/{axis}GatingUnit/Dense_0/kernel"
        tokens = shape(name)[0]
        side = math.isqrt(tokens)
        if side * side != tokens:
            raise ValueError(f"{what}: {field} must be given where windows are not square, got {tokens} tokens")
        return side

    first, bottom = "stage_0_encoder_block_0", "stage_0_global_block_0"
    features, depth = shape("stage_0_input_conv_0/kernel")[-1], count(r"stage_0_encoder_block_(\d+)/")
    narrow = shape(f"{first}/channel_attention_block_10/channel_attention/Conv_0/kernel")[-1]
    windows = {
        "block_size_hr": window(first, "Block", "block_size_hr"),
        "grid_size_hr": window(first, "Grid", "grid_size_hr"),
        "block_size_lr": window(bottom, "Block", "block_size_lr"),
    }
    unit = "SplitHeadMultiAxisGmlpLayer_0/BlockGmlpLayer/BlockGatingUnit/Dense_0/kernel"
    tokens = [shape(f"stage_0_encoder_block_{i}/{unit}")[0] for i in range(depth)]
    return {
        "features": features,
        "depth": depth,
        "num_stages": count(r"stage_(\d+)_"),
        "num_groups": count(rf"{first}/SplitHeadMultiAxisGmlpLayer_(\d+)/"),
        "num_bottleneck_blocks": count(r"stage_0_global_block_(\d+)/"),
        "num_supervision_scales": count(r"stage_0_input_conv_(\d+)/"),
        "high_res_stages": sum(n == tokens[0] for n in tokens),
        "channels_reduction": features // narrow,
        "num_channels": shape("stage_0_input_conv_0/kernel")[-2],
        **{field: side for field, side in windows.items() if side is not None},
    }


def rearranged(tensor: Tensor, module: nn.Module, leaf: str) -> Tensor:
    """A copy of a weight of flax with the axes of the module's. A shape that does not fit is left as it is."""
    if leaf != "weight" or tensor.dim() == 1:
        return tensor.clone()
    if isinstance(module, (nn.Linear, WindowMix)):
        # A convolution of one tap is a product.
        tensor = tensor[0, 0] if tensor.dim() == 4 and tensor.shape[:2] == (1, 1) else tensor
        return tensor.transpose(-1, -2).clone(memory_format=torch.contiguous_format)
    if tensor.dim() != 4:
        return tensor.clone()
    if isinstance(module, nn.ConvTranspose2d):
        return tensor.flip(0, 1).permute(2, 3, 0, 1).contiguous()
    return tensor.permute(3, 2, 0, 1).clone(memory_format=torch.contiguous_format)


def published_names(model: nn.Module) -> dict[str, str]:
    """For each parameter its name in the release."""
    modules: dict[str, str] = {}
    for index, stage in enumerate(model.get_submodule("stages").children()):
        for ours, theirs in _of_stage(stage, index):
            modules[f"stages.{index}.{ours}"] = theirs
    norms = {"norm_weight": "scale", "norm_bias": "bias"}
    found = {}
    for name, _ in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        if leaf in norms:  # a norm of its own in the release, beside the product over tokens
            found[name] = modules[module].rpartition("/")[0] + f"/intermediate_layernorm/{norms[leaf]}"
        else:
            named = {"weight": "scale" if "norm" in module.rpartition(".")[2] else "kernel"}.get(leaf, leaf)
            found[name] = f"{modules[module]}/{named}"
    return found


def _of_stage(stage: Any, index: int) -> Pairs:
    """The names of the modules of a stage, here and in the release."""
    depth, here = len(stage.encoder), f"stage_{index}"
    for i in range(len(stage.inputs)):
        yield f"inputs.{i}", f"{here}_input_conv_{i}"
    for i in range(len(stage.fusions)):
        yield from _joined(f"fusions.{i}", f"{here}_input_fuse_sam_{i}", _of_cross_gating(stage.fusions[i]))
    for i, level in enumerate(stage.encoder):
        yield from _joined(f"encoder.{i}", f"{here}_encoder_block_{i}", _of_level(level))
    for i, level in enumerate(stage.bottlenecks):
        yield from _joined(f"bottlenecks.{i}", f"{here}_global_block_{i}", _of_level(level, bottom=True))
    for i in range(depth):
        yield from _joined(f"gatings.{i}", f"{here}_cross_gating_block_{i}", _of_cross_gating(stage.gatings[i]))
        block = f"{here}_decoder_block_{i}"
        yield f"ups.{i}", f"{block}/ConvTranspose_0"
        yield from _joined(f"decoder.{i}", f"{block}/UNetEncoderBlock_0", _of_level(stage.decoder[i]))
        for j in range(depth):
            # Both loops begin with the last level. The first lists encoders the finest first, the second what came of
            # cross-gating the coarsest first.
            first = 2 * depth * depth * index + (depth - 1 - i) * depth
            yield f"encoder_resizes.{i}.{j}.linear", f"UpSampleRatio_{first + j}/Conv_0"
            yield f"skip_resizes.{i}.{j}.linear", f"UpSampleRatio_{first + depth * depth + depth - 1 - j}/Conv_0"
    for i in range(len(stage.supervisions)):
        for number, part in enumerate(("features", "image", "attention")):
            yield f"supervisions.{i}.{part}", f"{here}_supervised_attention_module_{i}/Conv_{number}"
    for i in range(len(stage.outputs)):
        yield f"outputs.{i}", f"{here}_output_conv_{i}"


def _joined(ours: str, theirs: str, pairs: Pairs) -> Pairs:
    for inner, published in pairs:
        yield f"{ours}.{inner}", f"{theirs}/{published}"


def _of_level(level: nn.Module, *, bottom: bool = False) -> Pairs:
    assert isinstance(level, Level)
    yield "enter", "input_proj" if bottom else "Conv_0"
    if level.down is not None:
        yield "down", "Conv_1"
    if level.cross_gating is not None:
        yield from _joined("cross_gating", "cross_gating_block", _of_cross_gating(level.cross_gating))
    for group in range(len(level.blocks)):
        ours = f"blocks.{group}"
        gating = f"SplitHeadMultiAxisGmlpLayer_{group}"
        yield f"{ours}.mixer_norm", f"{gating}/LayerNorm_in"
        for part, theirs in (("inwards", "in_project"), ("outwards", "out_project")):
            yield f"{ours}.mixer.{part}", f"{gating}/{theirs}"
            for axis, layer in (("grid", "GridGmlpLayer"), ("block", "BlockGmlpLayer")):
                yield f"{ours}.mixer.{axis}.{part}", f"{gating}/{layer}/{theirs}"
        for axis, kind in (("grid", "Grid"), ("block", "Block")):
            yield f"{ours}.mixer.{axis}.norm", f"{gating}/{kind}GmlpLayer/LayerNorm"
            yield f"{ours}.mixer.{axis}.mix", f"{gating}/{kind}GmlpLayer/{kind}GatingUnit/Dense_0"
        block = f"channel_attention_block_1{'_' if bottom else ''}{group}"
        yield f"{ours}.channel_mixer_norm", f"{block}/LayerNorm"
        for number, part in enumerate(("squeeze", "excite")):
            yield f"{ours}.channel_mixer.attention.{part}", f"{block}/channel_attention/Conv_{number}"
        inner = {"up": "channel_mixing/Dense_0", "down": "channel_mixing/Dense_1"}
        for part, theirs in (inner if bottom else {"conv1": "conv1", "conv2": "conv2"}).items():
            yield f"{ours}.channel_mixer.{part}", f"{block}/{theirs}"


def _of_cross_gating(module: nn.Module) -> Pairs:
    assert isinstance(module, CrossGating)
    if module.up is not None:
        yield "up", "ConvTranspose_0"
    for number, stream in enumerate(("x", "y")):
        gates = f"SplitHeadMultiAxisGating_{stream}"
        yield f"{stream}.enter", f"Conv_{number}"
        yield f"{stream}.norm", f"LayerNorm_{stream}"
        yield f"{stream}.inwards", f"in_project_{stream}"
        yield f"{stream}.outwards", f"out_project_{stream}"
        yield f"{stream}.gates.norm", f"{gates}/LayerNorm_in"
        yield f"{stream}.gates.inwards", f"{gates}/in_project"
        yield f"{stream}.gates.outwards", f"{gates}/out_project"
        yield f"{stream}.gates.grid", f"{gates}/Dense_0"
        yield f"{stream}.gates.block", f"{gates}/Dense_1"
