"""Weights under the names that transformers reads: of a model, and of a transformers model that one was put into."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ._registry import ConvertibleModel


def transformers_weights(model: ConvertibleModel, weights: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Those of the weights that are the model's, under the names that they have in files of transformers.

    A parameter that joins several of transformers' is split into copies; others are the same tensors.

    Args:
        model: whose weights they are.
        weights: a state dict that holds the model's, perhaps among others.
        prefix: what comes before the model's names in it, and before the new ones.

    Raises:
        ValueError: a weight of the model that is missing, or one under the prefix that is none of its own.
    """
    names, constants = model.weight_names(), {prefix + name for name, _ in model.named_buffers()}
    what = f"{type(model).__name__}: the state dict"
    missing = [name for name in names if prefix + name not in weights]
    if missing:
        raise ValueError(f"{what} lacks {', '.join(missing[:5])}, which transformers needs")
    own = {prefix + name for name in names}
    unknown = [n for n in weights if n.startswith(prefix) and n not in own and n not in constants]
    if unknown:
        raise ValueError(
            f"{what} holds {', '.join(unknown[:5])}, which transformers has no name for: merge adapters into the model "
            "before it is saved, or save torch's state_dict()"
        )
    renamed: dict[str, Tensor] = {}
    for name, parts in names.items():
        weight = weights[prefix + name]
        chunks = [weight] if len(parts) == 1 else [chunk.clone() for chunk in weight.chunk(len(parts), dim=0)]
        for part, chunk in zip(parts, chunks, strict=True):
            renamed[prefix + part] = chunk
    return renamed


def own_weights(model: ConvertibleModel, weights: dict[str, Any], prefix: str) -> None:
    """Puts weights of the model that stand under transformers' names under its own, in place, before they are loaded.

    Names that are the model's own already stay as they are.
    """
    theirs = {}
    for name in weights:
        if name.startswith(prefix):
            inner = name.removeprefix(prefix)
            theirs[model.file_name(inner)] = name
    for name, parts in model.weight_names().items():
        if prefix + name in weights or not all(part in theirs for part in parts):
            continue
        found = [weights[theirs[part]] for part in parts]
        weights[prefix + name] = found[0] if len(found) == 1 else torch.cat(found)
        for part in parts:
            del weights[theirs[part]]


def save(model: ConvertibleModel, folder: str | Path, weights: Mapping[str, Tensor] | None) -> None:
    """Writes config.json and model.safetensors."""
    from safetensors.torch import save_file

    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"save_pretrained: {folder} is not a folder")
    state = transformers_weights(model, model.state_dict() if weights is None else weights)
    folder.mkdir(parents=True, exist_ok=True)
    config = {**model.config.to_dict(), "architectures": [model.transformers_class]}
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file({name: w.contiguous() for name, w in state.items()}, folder / "model.safetensors", {"format": "pt"})


def teach_save_pretrained(model: nn.Module, kind: type[ConvertibleModel]) -> None:
    """Has `save_pretrained` of transformers write what was put into a model under the names that it reads back.

    A class of transformers knows nothing about the parameters of a part that was replaced: it would write them under
    names that it takes for unknown weights when it reads them, and draw those that it misses at random.

    Args:
        model: of transformers; its base class learns it, once in a process.
        kind: the class of what may be put in.
    """
    base: Any = next((cls for cls in type(model).__mro__ if cls.__name__ == "PreTrainedModel"), None)
    if base is None or hasattr(base.save_pretrained, "_warpform"):
        return
    save_pretrained = base.save_pretrained

    @functools.wraps(save_pretrained)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        adapters_alone = getattr(self, "_hf_peft_config_loaded", False)
        parts = {} if adapters_alone else _replaced_parts(self, kind)
        if parts:
            state = kwargs.get("state_dict")
            state = dict(self.state_dict() if state is None else state)
            for prefix, part in parts.items():
                renamed = transformers_weights(part, state, prefix)
                state = {name: w for name, w in state.items() if not name.startswith(prefix)} | renamed
            kwargs["state_dict"] = state
        return save_pretrained(self, *args, **kwargs)

    wrapper._warpform = True  # type: ignore[attr-defined]
    base.save_pretrained = wrapper


def _replaced_parts(model: nn.Module, kind: type[ConvertibleModel]) -> dict[str, ConvertibleModel]:
    """The models of this package in a transformers model, by the beginning of their weights' names."""
    parts: dict[str, ConvertibleModel] = {}
    for name, module in model.named_modules():
        if isinstance(module, kind) and not any(f"{name}.".startswith(prefix) for prefix in parts):
            parts[f"{name}."] = module
    return parts
