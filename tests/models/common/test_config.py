"""The rules that configs declare: each is checked, with an error that names class, field and value."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest

from warpform import models
from warpform.models.common.config import ModelConfig, TransformersConfig
from warpform.models.families import FAMILIES

CONFIGS = [getattr(models, name) for names in FAMILIES.values() for name in names if name.endswith("Config")]
CASES = [
    pytest.param(config, field, id=f"{config.__name__}-{field}")
    for config in CONFIGS
    for field in (*config.positive, *({"num_labels"} & config.__dataclass_fields__.keys()))
]


def refused(config: type[ModelConfig], field: str, value: Any, rule: str) -> None:
    with pytest.raises(ValueError, match=rf"^{config.__name__}: {field} {rule}, got {value!r}$"):
        config(**{field: value})


@pytest.mark.parametrize("config", CONFIGS)
def test_rules_are_about_fields(config: type[ModelConfig]) -> None:
    fields = {field.name for field in dataclasses.fields(config)}
    pairs = {name for pair in config.divides for name in pair}
    assert {*config.positive, *config.choices, *config.probabilities, *pairs} <= fields
    assert all(preset.keys() <= fields for preset in config.presets.values())


@pytest.mark.parametrize("config, field", CASES)
def test_positive(config: type[ModelConfig], field: str) -> None:
    refused(config, field, 0, "must be at least 1")


@pytest.mark.parametrize("config", CONFIGS)
def test_the_other_rules(config: type[ModelConfig]) -> None:
    default = config()
    for field, of in config.divides:
        refused(config, field, getattr(default, of) + 1, r"must divide \w+ \d+")
    for field, allowed in config.choices.items():
        named = ", ".join(choice for choice in allowed if choice is not None)
        refused(config, field, "other", f"must be {'None or ' if None in allowed else ''}one of {named}")
    for field in config.probabilities:
        refused(config, field, 1.5, "must be between 0 and 1")
    if hasattr(default, "problem_type"):
        refused(config, "problem_type", "other", "must be None or one of .*")
    sizes = re.escape(", ".join(config.presets))
    why = f"size must be one of {sizes}, got 'other'" if sizes else "there are no presets, got size 'other'"
    with pytest.raises(ValueError, match=f"^{config.__name__}: {why}$"):
        config.preset("other")


@pytest.mark.parametrize("config", CONFIGS)
def test_config_json_has_the_fields_and_is_read_back(config: type[ModelConfig]) -> None:
    for size in (None, *config.presets):
        made = config() if size is None else config.preset(size)
        read = config.from_fields(json.loads(made.to_json_string()))
        assert read == made and read.to_json_string() == made.to_json_string()


@pytest.mark.parametrize("config", [config for config in CONFIGS if issubclass(config, TransformersConfig)])
def test_options_of_transformers_that_are_not_supported(config: type[TransformersConfig]) -> None:
    for name in config.unsupported:
        with pytest.raises(ValueError, match=f"^{config.__name__}: {name}=True is not supported$"):
            config.from_transformers({name: True})
