"""What the Config dataclasses of all architectures check and read alike."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, TypeVar

from ...nn import ACTIVATIONS

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
    return {**known_fields(config_class, fields), **config_overrides(config_class, overrides)}


def known_fields(config_class: type[Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the fields of a config.json that the config has, with the number of labels from their names."""
    names = [f.name for f in dataclasses.fields(config_class)]
    known = {name: fields[name] for name in names if name in fields}
    if known.get("return_dict") is None:
        known.pop("return_dict", None)
    if "num_labels" in names and "num_labels" not in known and fields.get("id2label"):
        # transformers keeps the number of labels as their names.
        known["num_labels"] = len(fields["id2label"])
    return known


SomeConfig = TypeVar("SomeConfig", bound="ModelConfig")


class ModelConfig:
    """What the Config dataclasses share.

    A model is made from its config; what is changed in the config later changes the model no more than in transformers.
    Names that are no fields can be set: trainers and pipelines leave notes of their own (`use_cache`).

    Attributes:
        model_type: as in config.json of transformers; empty for models that are not in it.
    """

    model_type: ClassVar[str] = ""
    _names_of_labels: dict[int, str] | None = None

    @property
    def id2label(self) -> dict[int, str]:
        """The names of the labels; LABEL_0 and so on where none were given, or another number of them."""
        number, names = getattr(self, "num_labels", 0), self._names_of_labels
        if names is not None and len(names) == number:
            return names
        return {i: f"LABEL_{i}" for i in range(number)}

    @id2label.setter
    def id2label(self, names: Mapping[Any, str] | None) -> None:
        # JSON makes strings of the keys.
        self._names_of_labels = None if names is None else {int(i): name for i, name in names.items()}

    @property
    def label2id(self) -> dict[str, int]:
        """The opposite of `id2label`."""
        return {name: i for i, name in self.id2label.items()}

    @classmethod
    def from_fields(cls: type[SomeConfig], fields: Mapping[str, Any], **overrides: Any) -> SomeConfig:
        """From the fields of a config.json, as `to_dict` has them. Unknown fields are ignored.

        Raises:
            ValueError: fields that do not fit, or an option that is not supported.
            TypeError: an override that is no field.
        """
        read: Any = getattr(cls, "from_transformers", None)
        if read is None:
            known = {name: tuple(v) if isinstance(v, list) else v for name, v in known_fields(cls, fields).items()}
            config = cls(**{**known, **config_overrides(cls, overrides)})
        else:
            config = read(fields, **overrides)
        config.id2label = fields.get("id2label")
        return config

    def to_dict(self) -> dict[str, Any]:
        """The fields as config.json has them: in transformers' names where the model is in transformers."""
        convert = getattr(self, "to_transformers", None)
        fields = dataclasses.asdict(self) if convert is None else convert()  # type: ignore[call-overload]
        if "num_labels" in fields:
            del fields["num_labels"]
            fields |= {"id2label": self.id2label, "label2id": self.label2id}
        return {**fields, **({"model_type": self.model_type} if self.model_type else {})}

    def to_json_string(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"


def config_overrides(config_class: type[Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """The overrides, checked to be fields of the config."""
    fields = [f.name for f in dataclasses.fields(config_class)]
    for name in overrides:
        if name not in fields:
            raise TypeError(f"{config_class.__name__} has no field {name!r}; fields: {', '.join(fields)}")
    return overrides
