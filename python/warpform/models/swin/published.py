"""Published checkpoints of Swin: the fields that follow from the weights, and checks of a config against them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .config import Pair, SwinConfig, Swinv2Config

_FIRST = "layers.0.blocks.0"
# Fields that `check_constants` compares by what follows from them, as several values can mean the same.
_GEOMETRY = ("image_size", "window_size", "pretrained_window_sizes")


def check_version(what: str, config_class: type[SwinConfig], weights: Mapping[str, Tensor]) -> None:
    """Raises ValueError where the weights are of the other version of Swin."""
    version, own = ("Swin V2" if of else "Swin" for of in (_is_v2(weights), issubclass(config_class, Swinv2Config)))
    if version != own:
        raise ValueError(f"{what}: weights must be of {own}, got those of {version}")


def published_config(what: str, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Reads the fields of the config off published weights, under the names of transformers' fields.

    Most follows from shapes. Constants that the published files hold too tell the size of images and, in Swin V2, the
    window and the windows of pretraining; where those are missing, so are the fields.

    Raises:
        ValueError: coordinates that no window gives.
    """
    projection = weights["patch_embed.proj.weight"]  # [embed_dim, channels, patch, patch]
    depths: list[int] = []
    for name in weights:
        place = re.match(r"layers\.(\d+)\.blocks\.(\d+)\.", name)
        if place is not None:
            stage, block = int(place[1]), int(place[2])
            depths.extend([0] * (stage + 1 - len(depths)))
            depths[stage] = max(depths[stage], block + 1)
    cosine = _is_v2(weights)
    of_heads = "logit_scale" if cosine else "relative_position_bias_table"
    heads = [weights[f"layers.{i}.blocks.0.attn.{of_heads}"].shape[0 if cosine else 1] for i in range(len(depths))]
    fields: dict[str, Any] = {
        "embed_dim": projection.shape[0],
        "num_channels": projection.shape[1],
        "patch_size": _plain(projection.shape[2:]),
        "depths": tuple(depths),
        "num_heads": tuple(heads),
        "mlp_ratio": weights[f"{_FIRST}.mlp.fc1.weight"].shape[0] / projection.shape[0],
        "qkv_bias": f"{_FIRST}.attn.{'q_bias' if cosine else 'qkv.bias'}" in weights,
        "use_absolute_embeddings": "absolute_pos_embed" in weights,
    }
    if "head.weight" in weights:
        fields["num_labels"] = weights["head.weight"].shape[0]
    windows = [_window(weights, stage) for stage in range(len(depths))]
    if windows[0] is not None:
        fields["window_size"] = _plain(windows[0])
    trained = [_pretrained(what, weights, f"layers.{stage}.blocks.0") for stage in range(len(depths))]
    if None not in trained:
        fields["pretrained_window_sizes"] = tuple(trained)
    rows = _rows(weights, windows)
    if rows is not None:
        fields["image_size"] = _plain([rows * side for side in projection.shape[2:]])
    return fields


def check_told(what: str, told: Mapping[str, Any], given: Mapping[str, Any], ignored: Iterable[str] = ()) -> None:
    """Raises ValueError where a field that is given is not what the weights tell."""
    for name, value in given.items():
        if name in told and name not in _GEOMETRY and name not in ignored and _same(value) != _same(told[name]):
            raise ValueError(f"{what}: {name} must be {told[name]} as the weights tell, got {value}")


def check_needed(what: str, config_class: type[SwinConfig], fields: Mapping[str, Any]) -> None:
    """Raises ValueError where a field is missing that changes results and that the weights do not tell."""
    needed: tuple[str, ...]
    if issubclass(config_class, Swinv2Config):
        needed = _GEOMETRY
    else:  # there, image_size is that of absolute positions only
        needed = ("image_size", "window_size") if fields["use_absolute_embeddings"] else ("window_size",)
    for name in needed:
        if name not in fields:
            raise ValueError(f"{what}: {name} must be given, as the weights hold nothing that tells it")


def check_constants(what: str, config: SwinConfig, weights: Mapping[str, Tensor]) -> None:
    """Raises ValueError where the windows, the images or the windows of pretraining are not those of the weights."""
    advice = "; load it so, and then call resized for another size"
    trained = config.pretrained_window_sizes if isinstance(config, Swinv2Config) else None
    for stage, window in enumerate(config.windows()):
        grid = tuple(side >> stage for side in config.patch_grid)
        for block in range(config.depths[stage]):
            place = f"layers.{stage}.blocks.{block}"
            index = weights.get(f"{place}.attn.relative_position_index")
            coordinates = weights.get(f"{place}.attn.relative_coords_table")
            table = weights.get(f"{place}.attn.relative_position_bias_table")
            tokens = None if index is None else index.shape[0]
            if (
                (coordinates is not None and _own(coordinates) != window)
                or (table is not None and table.shape[0] != math.prod(2 * side - 1 for side in window))
                or (tokens is not None and tokens != math.prod(window))
            ):
                raise ValueError(
                    f"{what}: window_size {config.window_size} and image_size {config.image_size} give stage {stage} "
                    f"windows of {window}, and the weights of {place} are for others{advice}"
                )
            mask = weights.get(f"{place}.attn_mask")
            if mask is not None and mask.shape[0] != math.prod(g // w for g, w in zip(grid, window, strict=True)):
                raise ValueError(
                    f"{what}: image_size {config.image_size} gives stage {stage} a grid of {grid}, and the mask of "
                    f"{place} is for {mask.shape[0]} windows of {window}{advice}"
                )
            before = _pretrained(what, weights, place)
            if trained is not None and before and before != (trained[stage] or window[0]):
                raise ValueError(
                    f"{what}: pretrained_window_sizes[{stage}] must be {before} as the coordinates of {place} tell, "
                    f"got {trained[stage]}"
                )
    positions = weights.get("absolute_pos_embed")
    if positions is not None and positions.shape[1] != math.prod(config.patch_grid):
        raise ValueError(
            f"{what}: image_size {config.image_size} gives a grid of {config.patch_grid}, and absolute_pos_embed is "
            f"for {positions.shape[1]} patches{advice}"
        )


def _is_v2(weights: Mapping[str, Tensor]) -> bool:
    return f"{_FIRST}.attn.logit_scale" in weights


def _window(weights: Mapping[str, Tensor], stage: int) -> Pair | None:
    """The window of a stage, where the weights tell it."""
    place = f"layers.{stage}.blocks.0.attn"
    coordinates = weights.get(f"{place}.relative_coords_table")
    if coordinates is not None:
        return _own(coordinates)
    table = weights.get(f"{place}.relative_position_bias_table")
    tokens = weights.get(f"{place}.relative_position_index")
    side = None
    if table is not None:
        longest = math.isqrt(table.shape[0])
        side = (longest + 1) // 2 if longest % 2 and longest**2 == table.shape[0] else None
    elif tokens is not None:
        side = math.isqrt(tokens.shape[0])
        side = side if side**2 == tokens.shape[0] else None
    return None if side is None else (side, side)


def _own(coordinates: Tensor) -> Pair:
    """The window of coordinates [1, 2 h - 1, 2 w - 1, 2]."""
    return (coordinates.shape[1] + 1) // 2, (coordinates.shape[2] + 1) // 2


def _pretrained(what: str, weights: Mapping[str, Tensor], place: str) -> int | None:
    """The window of pretraining that the coordinates of a block tell; 0 where they tell none, None without them.

    The last one is t = log2(1 + x) / log2(8) of x = 8 (window - 1) / (pretrained - 1).
    """
    coordinates = weights.get(f"{place}.attn.relative_coords_table")
    if coordinates is None:
        return None
    found = set()
    for axis, own in enumerate(_own(coordinates)):
        last = float(coordinates[0, -1, -1, axis])
        if own < 2 or last == 0:  # a single place, at distance 0
            continue
        longest = 8 * (own - 1) / (8**last - 1) if 0 < last < 100 else 0.0
        before = round(longest) + 1
        expected = math.log2(1 + 8 * (own - 1) / max(before - 1, 1)) / 3
        # The five roundings that made it; 1 + x and its logarithm can double those before them.
        if before < 2 or abs(expected - last) > 16 * torch.finfo(coordinates.dtype).eps * last:
            raise ValueError(f"{what}: {place}.attn.relative_coords_table is of no window of pretraining")
        found.add(before)
    if len(found) > 1:
        raise ValueError(f"{what}: {place}.attn.relative_coords_table is of a window that is not square")
    return found.pop() if found else 0


def _rows(weights: Mapping[str, Tensor], windows: list[Pair | None]) -> int | None:
    """Patches along a side of a square image, where the weights tell them."""
    positions = weights.get("absolute_pos_embed")
    if positions is not None:
        rows = math.isqrt(positions.shape[1])
        return rows if rows**2 == positions.shape[1] else None
    for stage, window in enumerate(windows):
        mask = weights.get(f"layers.{stage}.blocks.1.attn_mask")
        if mask is not None and window is not None and window[0] == window[1]:  # [windows, N, N]
            side = math.isqrt(mask.shape[0])
            return (side * window[0]) << stage if side**2 == mask.shape[0] else None
    # A window that is smaller than the first is as large as its grid.
    for stage, window in enumerate(windows):
        if window is not None and windows[0] is not None and window[0] < windows[0][0]:
            return window[0] << stage
    return None


def _plain(sides: Iterable[int]) -> int | Pair:
    """One number where both are equal, as configs have it."""
    height, width = sides
    return height if height == width else (height, width)


def _same(value: Any) -> tuple[Any, ...]:
    """Returns a field's value as a tuple, so that one number equals the pair of it."""
    return tuple(value) if isinstance(value, (list, tuple)) else (value, value)
