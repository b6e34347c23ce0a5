"""What the Config dataclasses of all architectures check and read alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from ..nn import ACTIVATIONS
from ._registry import config_overrides

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


def check_config(config: Any, *, activation: str, heads: str, width: str, probabilities: Iterable[str]) -> None:
    """Raises ValueError for the fields that every architecture has; the arguments are their names in this config."""
    if getattr(config, activation) not in ACTIVATIONS:
        raise ValueError(f"{activation} must be one of {', '.join(ACTIVATIONS)}, got {getattr(config, activation)!r}")
    size, number = getattr(config, width), getattr(config, heads)
    if number <= 0 or size % number != 0:
        raise ValueError(f"{heads} must divide {width} {size}, got {number}")
    for name in probabilities:
        value = getattr(config, name)
        if value is not None and not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} must be between 0 and 1, got {value}")
    if config.num_labels < 1:
        raise ValueError(f"num_labels must be at least 1, got {config.num_labels}")
    if config.problem_type not in (None, *PROBLEM_TYPES):
        raise ValueError(f"problem_type must be None or one of {', '.join(PROBLEM_TYPES)}, got {config.problem_type!r}")


def read_fields(config_class: type[Any], fields: Mapping[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """The keywords of `config_class` in the fields of a transformers config, with the overrides on top.

    Raises:
        ValueError: an option that no encoder here supports: is_decoder, add_cross_attention, output_attentions,
            pruned_heads, a position_embedding_type other than "absolute".
        TypeError: an override that is no field.
    """
    what = config_class.__name__
    for name in ("is_decoder", "add_cross_attention", "output_attentions", "pruned_heads"):
        if fields.get(name):
            raise ValueError(f"{what}: {name}={fields[name]!r} is not supported")
    position = fields.get("position_embedding_type")
    if position not in (None, "absolute"):
        raise ValueError(f"{what}: position_embedding_type={position!r} is not supported, only 'absolute'")
    names = [f.name for f in dataclasses.fields(config_class)]
    known = {name: fields[name] for name in names if name in fields}
    if known.get("return_dict") is None:
        known.pop("return_dict", None)
    if "num_labels" not in known and fields.get("id2label"):
        # transformers keeps the number of labels as their names.
        known["num_labels"] = len(fields["id2label"])
    return {**known, **config_overrides(config_class, overrides)}
