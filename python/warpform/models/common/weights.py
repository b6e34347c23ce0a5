"""Files of weights (safetensors, whole or in shards), and renames between their names and those of models.

Pickled weights are never opened, as unpickling runs what the file says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")

# Pairs of a regular expression and what replaces it wherever it is found.
Renames = tuple[tuple[str, str], ...]


def rename(name: str, renames: Renames) -> str:
    """The name of a weight after every rename of a table, one after the other."""
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


def read_weights(folder: Path, *, device: str = "cpu") -> dict[str, Tensor]:
    """All tensors of `model.safetensors`, else of the shards named in `model.safetensors.index.json`.

    Raises:
        FileNotFoundError: no weights, only pickled weights, or a shard that is missing.
        ValueError: a file that is not valid safetensors, an index that is not valid, a tensor that its shard lacks.
    """
    if (folder / _SINGLE).is_file():
        return _read_file(folder / _SINGLE, device)
    if (folder / _INDEX).is_file():
        return _read_shards(folder, device)
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLED)
    if pickled:
        raise FileNotFoundError(
            f"{folder} holds pickled weights only ({', '.join(pickled)}), which are never loaded, as unpickling can "
            "run any code; if you trust them, convert them: "
            "transformers.AutoModel.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER, safe_serialization=True)"
        )
    raise FileNotFoundError(f"{folder} has no weights: neither {_SINGLE} nor {_INDEX}")


def _read_shards(folder: Path, device: str) -> dict[str, Tensor]:
    path = folder / _INDEX
    try:
        index: Any = json.loads(path.read_text(encoding="utf-8"))
        weight_map = dict(index["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a valid index of shards: {error}") from None
    weights: dict[str, Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        # An index comes with the weights, from anywhere: it must not lead out of the folder.
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(f"{path} names a shard that is not a file of the folder: {shard!r}")
        if not (folder / shard).is_file():
            raise FileNotFoundError(f"{path} names {shard}, which is missing")
        weights.update(_read_file(folder / shard, device))
    missing = sorted(set(weight_map) - set(weights))
    if missing:
        raise ValueError(f"{path} lists {missing[0]}, which its shard does not hold")
    return weights


def _read_file(path: Path, device: str) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError("reading weights needs safetensors: pip install safetensors") from error
    try:
        return load_file(path, device=device)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a valid safetensors file: {error}") from None


def write_weights(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Writes `model.safetensors`. No two of the weights may share memory.

    Raises:
        ImportError: safetensors is not installed.
    """
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError("writing weights needs safetensors: pip install safetensors") from error
    save_file({name: w.contiguous() for name, w in weights.items()}, folder / _SINGLE, {"format": "pt"})
