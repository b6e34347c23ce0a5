"""Models by name, from a transformers model, and from a folder of weights, whatever the architecture.

This file is above the families. It imports one where it is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .common.convertible import ConvertibleModel
from .common.outputs import derive_from_model_output
from .common.pretrained import PretrainedModel, read_config
from .common.saving import teach_save_pretrained
from .families import COUNTERPARTS, FAMILIES, MODEL_TYPES, PLACES, is_model

__all__ = ["from_pretrained", "from_transformers", "list_models"]

# Families that transformers has too, each class under the same name.
_CONVERTIBLE = ("albert", "bert", "deberta", "distilbert", "hiera", "poolformer", "resnet", "segformer", "swin")


def from_transformers(hf_model: nn.Module, **overrides: Any) -> ConvertibleModel:
    """The padding-free counterpart of a transformers model: same call, same outputs at real tokens, 0 at padded ones.

    `LlamaForCausalLM`, `MistralForCausalLM` and `Qwen2ForCausalLM` become a `DecoderForCausalLM`, others the class of
    their name. Query, key and value weights are concatenated, as are gate and up, which copies them; other Parameter
    objects are shared, so training one model trains the other. `to_transformers()` on the result writes everything
    back and returns `hf_model`.

    Args:
        hf_model: a `transformers.BertModel`, or another that `warpform.models` has a counterpart of.
        **overrides: fields of the config to change, for instance attention_probs_dropout_prob=0.0 for training.

    Raises:
        TypeError: a class that warpform has no counterpart for, or an override that is no field of the config.
        ValueError: an option of the model's config that is not supported, by name; weights that differ from the
            architecture's (quantised or with adapters), by name; a norm that another module took the place of.
    """
    name = type(hf_model).__name__
    model_class = _convertible(name)
    if model_class is None or not type(hf_model).__module__.startswith("transformers."):
        inner = getattr(hf_model, getattr(hf_model, "base_model_prefix", "") or "_", None)
        hint = ""
        if isinstance(inner, nn.Module) and _convertible(type(inner).__name__) is not None:
            prefix = hf_model.base_model_prefix
            hint = f"; replace its encoder: model.{prefix} = warpform.models.from_transformers(model.{prefix})"
        ours = [other for family in _CONVERTIBLE for other in FAMILIES[family] if _convertible(other) is not None]
        known = [*ours, *COUNTERPARTS]
        raise TypeError(
            f"from_transformers: hf_model must be one of {', '.join(known)} of transformers, "
            f"got {type(hf_model).__module__}.{name}{hint}"
        )
    model = model_class.from_live(hf_model, overrides)
    teach_save_pretrained(hf_model)
    derive_from_model_output()
    return model


def from_pretrained(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    **overrides: Any,
) -> PretrainedModel:
    """Reads a model from a folder as transformers or `save_pretrained` saves it: `config.json` and safetensors.

    Nothing that is pickled is read. Of an architecture that transformers lacks it is the model that was saved. Of one
    that transformers has it is the encoder, the decoder with its head, or the backbone where one was saved. Weights of
    heads (`cls.`, `classifier.`, `qa_outputs.`, and where the encoder is under `bert.` whatever is not) are ignored:
    `BertForMaskedLM` and the like have a `from_pretrained` that reads them. A checkpoint without a pooler gives a model
    without one. The model comes in eval mode.

    Args:
        folder: with `config.json` and `model.safetensors`, or `model.safetensors.index.json` and its shards.
        dtype: None keeps the dtype of the file.
        device: None is the CPU.
        **overrides: fields of the config to change.

    Raises:
        FileNotFoundError: no such folder, no config.json, no weights, or only pickled ones (says how to convert them).
        ValueError: a file that cannot be read, a `model_type` or an option that is not supported, weights that are
            missing, unknown or of another shape.
    """
    folder = Path(folder)
    fields = read_config(folder)
    model_class = _class_for(fields)
    if model_class is None:
        raise ValueError(
            f"from_pretrained: model_type in {folder / 'config.json'} must be one of {', '.join(MODEL_TYPES)}, "
            f"got {fields.get('model_type')!r}"
        )
    return model_class.from_pretrained(folder, dtype=dtype, device=device, **overrides)


def list_models(family: str | None = None) -> list[str]:
    """The names of all model classes, in alphabetical order; each is an attribute of `warpform.models`.

    Args:
        family: only those of this family, which is a folder of `warpform.models`; None = all.

    Raises:
        ValueError: an unknown family.
    """
    if family is not None and family not in FAMILIES:
        raise ValueError(f"list_models: family must be one of {', '.join(FAMILIES)}, got {family!r}")
    families = FAMILIES if family is None else (family,)
    return sorted(name for one in families for name in FAMILIES[one] if is_model(name))


def _model_class(name: str) -> type[PretrainedModel]:
    found: type[PretrainedModel] = getattr(import_module(f"..{PLACES[name]}", __name__), name)
    return found


def _convertible(name: str) -> type[ConvertibleModel] | None:
    """The class that is the counterpart of transformers' class of this name, if any."""
    if name in COUNTERPARTS:
        counterpart = _model_class(COUNTERPARTS[name])
        return counterpart if issubclass(counterpart, ConvertibleModel) else None
    if PLACES.get(name) not in _CONVERTIBLE or not is_model(name):
        return None
    found = _model_class(name)
    return found if issubclass(found, ConvertibleModel) else None


def _class_for(fields: Mapping[str, Any]) -> type[PretrainedModel] | None:
    """The class that the fields of a config.json ask for."""
    default = MODEL_TYPES.get(str(fields.get("model_type")))
    if default is None:
        return None
    family = PLACES[default]
    named = (fields.get("architectures") or [""])[0]
    as_saved = family not in _CONVERTIBLE or named.endswith("Backbone")
    if as_saved and named in FAMILIES[family] and is_model(named):
        return _model_class(named)
    return _model_class(default)
