"""The base of the Config dataclasses: rules that their fields follow, presets, and config.json both ways."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


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
    """The base of every Config dataclass. An architecture adds fields, and declares the rules that they follow.

    A model is made from its config; what is changed in the config later changes the model no more than in transformers.
    Names that are no fields can be set: trainers and pipelines leave notes of their own (`use_cache`).

    The rules are checked when a config is made. `num_labels` and `problem_type` have theirs wherever they are fields.
    What no rule can say, `__post_init__` checks after `super().__post_init__()`, and raises `self.error(text)`.

    Attributes:
        model_type: as in config.json of transformers, or a name of our own for a model that transformers lacks.
        other_model_types: what model_type may be in a config.json beside it.
        positive: fields that are at least 1.
        divides: pairs (a, b) of fields: a is at least 1 and divides b. None for a is allowed.
        choices: for each of some fields the values that it may have, None among them where it is allowed.
        probabilities: fields from 0 to 1. None is allowed.
        presets: for each size that `preset` takes, its fields.
    """

    model_type: ClassVar[str] = ""
    other_model_types: ClassVar[tuple[str, ...]] = ()
    positive: ClassVar[tuple[str, ...]] = ()
    divides: ClassVar[tuple[tuple[str, str], ...]] = ()
    choices: ClassVar[Mapping[str, Collection[str | None]]] = {}
    probabilities: ClassVar[tuple[str, ...]] = ()
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    _names_of_labels: dict[int, str] | None = None

    def __post_init__(self) -> None:
        labels = ("num_labels",) if hasattr(self, "num_labels") else ()
        for name in (*self.positive, *labels):
            if getattr(self, name) < 1:
                raise self.error(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, of in self.divides:
            divisor, size = getattr(self, name), getattr(self, of)
            if divisor is not None and (divisor < 1 or size % divisor):
                raise self.error(f"{name} must divide {of} {size}, got {divisor}")
        choices = dict(self.choices)
        if hasattr(self, "problem_type"):
            choices["problem_type"] = (None, *PROBLEM_TYPES)
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                named = ", ".join(choice for choice in allowed if choice is not None)
                either = "None or one of" if None in allowed else "one of"
                raise self.error(f"{name} must be {either} {named}, got {getattr(self, name)!r}")
        for name in self.probabilities:
            value = getattr(self, name)
            if value is not None and not 0.0 <= value <= 1.0:
                raise self.error(f"{name} must be between 0 and 1, got {value}")

    @classmethod
    def error(cls, text: str) -> ValueError:
        """The error of a field that breaks a rule, which names the class."""
        return ValueError(f"{cls.__name__}: {text}")

    @classmethod
    def preset(cls: type[SomeConfig], size: str, **overrides: Any) -> SomeConfig:
        """A size of `presets`, with the overrides on top.

        Raises:
            ValueError: another size.
        """
        if not cls.presets:
            raise cls.error(f"there are no presets, got size {size!r}")
        if size not in cls.presets:
            raise cls.error(f"size must be one of {', '.join(cls.presets)}, got {size!r}")
        return cls(**{**cls.presets[size], **overrides})

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
        config = cls._from_own_fields(fields, overrides)
        config.id2label = fields.get("id2label")
        return config

    @classmethod
    def _from_own_fields(cls: type[SomeConfig], fields: Mapping[str, Any], overrides: dict[str, Any]) -> SomeConfig:
        known = {name: tuple(v) if isinstance(v, list) else v for name, v in known_fields(cls, fields).items()}
        return cls(**{**known, **config_overrides(cls, overrides)})

    def _own_fields(self) -> dict[str, Any]:
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    def to_dict(self) -> dict[str, Any]:
        """The fields as config.json has them: in transformers' names where the model is in transformers."""
        fields = self._own_fields()
        if "num_labels" in fields:
            del fields["num_labels"]
            fields |= {"id2label": self.id2label, "label2id": self.label2id}
        return {**fields, **({"model_type": self.model_type} if self.model_type else {})}

    def to_json_string(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"


class TransformersConfig(ModelConfig):
    """The base of configs that transformers has too: their fields have transformers' names.

    Attributes:
        unsupported: fields of transformers' config that must be false or absent, since no field here says the same.
    """

    unsupported: ClassVar[tuple[str, ...]] = ("is_decoder", "add_cross_attention", "output_attentions", "pruned_heads")

    @classmethod
    def from_transformers(cls: type[Converted], fields: Mapping[str, Any], **overrides: Any) -> Converted:
        """From the fields of a transformers config. Fields that change nothing in the model are ignored.

        Raises:
            ValueError: an option that is not supported: one of `unsupported`, or a position_embedding_type other than
                "absolute"; fields that break a rule.
            TypeError: an override that is no field.
        """
        for name in cls.unsupported:
            if fields.get(name):
                raise cls.error(f"{name}={fields[name]!r} is not supported")
        position = fields.get("position_embedding_type")
        if position not in (None, "absolute"):
            raise cls.error(f"position_embedding_type={position!r} is not supported, only 'absolute'")
        return cls(**{**known_fields(cls, fields), **config_overrides(cls, overrides)})

    def to_transformers(self) -> dict[str, Any]:
        """The fields as keywords of the config class of transformers."""
        return super()._own_fields()

    @classmethod
    def _from_own_fields(cls: type[Converted], fields: Mapping[str, Any], overrides: dict[str, Any]) -> Converted:
        return cls.from_transformers(fields, **overrides)

    def _own_fields(self) -> dict[str, Any]:
        return self.to_transformers()


Converted = TypeVar("Converted", bound=TransformersConfig)


def check_stages(config: ModelConfig, names: Sequence[str], least: Mapping[str, float] | None = None) -> None:
    """For the `__post_init__` of models in stages: makes tuples of lists with an entry a stage, and checks them.

    Args:
        config: whose fields they are.
        names: of the fields; the first says how many stages there are.
        least: of some of them the least entry; of others it is above 0.

    Raises:
        ValueError: no stage, fields of unequal lengths, an entry that is too small.
    """
    least = {} if least is None else least
    for name in names:
        setattr(config, name, tuple(getattr(config, name)))  # config.json has lists
    lengths = [len(getattr(config, name)) for name in names]
    if min(lengths) < 1 or len(set(lengths)) > 1:
        raise config.error(f"{', '.join(names)} must be of equal lengths of at least 1, got {lengths}")
    for name in names:
        entries = getattr(config, name)
        if name in least and min(entries) < least[name]:
            raise config.error(f"{name} must be at least {least[name]}, got {entries}")
        if name not in least and min(entries) <= 0:
            raise config.error(f"{name} must be above 0, got {entries}")


def drop_path_rates(last: float, total: int) -> tuple[float, ...]:
    """The drop path rates of `total` blocks, from 0 in the first in equal steps up to `last` in the last one."""
    return tuple(last * i / max(total - 1, 1) for i in range(total))


def config_overrides(config_class: type[Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """The overrides, checked to be fields of the config."""
    fields = [f.name for f in dataclasses.fields(config_class)]
    for name in overrides:
        if name not in fields:
            raise TypeError(f"{config_class.__name__} has no field {name!r}; fields: {', '.join(fields)}")
    return overrides
