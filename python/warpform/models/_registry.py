"""The table of architectures, and everything about conversion that does not depend on one.

An architecture is a file in this folder with a class derived from `ConvertibleModel` under `@register`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ._model import Model
from ._output import derive_from_model_output
from ._saving import own_weights, save, teach_save_pretrained
from ._weights import read_weights

_MODELS: list[type[ConvertibleModel]] = []

SomeModel = TypeVar("SomeModel", bound="ConvertibleModel")


class ConvertibleModel(Model):
    """A model that exists in transformers too. An architecture says how names and configs correspond; the rest is here.

    Attributes:
        config_class: its Config dataclass, with `from_transformers(mapping, **overrides)` and `to_transformers()`.
        transformers_class, transformers_config_class: names of the classes in `transformers`.
        model_type: `model_type` in config.json.
        weight_prefix: what checkpoints with a head put before the names of this model's weights.
        ignored_weights: prefixes of weights in checkpoints that are not this model's: those of (other) heads.
        constant_weights: prefixes of constant buffers that old checkpoints hold, ignored too.
        spare_weights: prefixes of weights that some checkpoints hold beside a config that has no use for them.
        aliases: other names in checkpoints of weights that are tied, with the names in `weight_names`.
        optional_module: a module that a checkpoint may lack as a whole (the pooler).
        is_encoder: whether `from_pretrained` of this package makes it for its model_type, as against a head on one.
    """

    config_class: ClassVar[Any]
    transformers_class: ClassVar[str]
    transformers_config_class: ClassVar[str]
    model_type: ClassVar[str]
    weight_prefix: ClassVar[str]
    ignored_weights: ClassVar[tuple[str, ...]] = ()
    constant_weights: ClassVar[tuple[str, ...]] = ()
    spare_weights: ClassVar[tuple[str, ...]] = ()
    aliases: ClassVar[Mapping[str, str]] = {}
    optional_module: ClassVar[str | None] = None
    is_encoder: ClassVar[bool] = True

    config: Any
    # The model this one was made from. In a list, so that its parameters are not registered a second time.
    _origin: list[nn.Module]

    def __init__(self) -> None:
        super().__init__()
        self._origin = []
        self._register_load_state_dict_pre_hook(_take_their_names, with_module=True)

    @classmethod
    def build(cls, config: Any, *, with_optional: bool = True) -> ConvertibleModel:
        """A model with weights as yet unset or random; with_optional False leaves `optional_module` out."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(
        cls: type[SomeModel],
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **overrides: Any,
    ) -> SomeModel:
        """As `warpform.models.from_pretrained`, for this class: so are models with a head read from a folder.

        Raises:
            FileNotFoundError, ValueError: as there; a head whose weights the folder lacks is an error too.
        """
        folder = Path(folder)
        fields = _read_config(folder)
        if fields.get("model_type") != cls.model_type:
            raise ValueError(
                f"from_pretrained: model_type in {folder / 'config.json'} must be {cls.model_type} for a "
                f"{cls.__name__}, got {fields.get('model_type')!r}"
            )
        return _load(cls, folder, fields, dtype, device, overrides)

    def save_pretrained(
        self, folder: str | Path, *, state_dict: Mapping[str, Tensor] | None = None, **unused: Any
    ) -> None:
        """Writes `config.json` and `model.safetensors`, which transformers reads, and `from_pretrained` here too.

        Args:
            folder: is made where there is none.
            state_dict: the weights to write, under this model's names; None = its own.
            **unused: other arguments of transformers' method, such as safe_serialization; they change nothing.

        Raises:
            NotADirectoryError: folder is a file.
            ValueError: a state_dict that lacks a weight or has another, as with adapters that are not merged.
        """
        save(self, folder, state_dict)

    def weight_names(self) -> dict[str, tuple[str, ...]]:
        """For each parameter of this model the names in transformers whose tensors, joined on dim 0, it holds."""
        raise NotImplementedError

    @classmethod
    def file_name(cls, name: str) -> str:
        """The name in files, which `weight_names` has, of a parameter of a live transformers model."""
        return name

    @classmethod
    def canonical_weights(cls, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of a file under the names that `weight_names` has, where files have others too."""
        return dict(weights)

    @classmethod
    def check_weights(cls, what: str, config: Any, weights: Mapping[str, Tensor]) -> None:
        """Raises ValueError where the weights of a file say that the config is not theirs, beyond names and shapes."""

    def adopt(self, hf_model: nn.Module) -> None:
        """Takes over what of a transformers model is in neither its config nor its weights."""

    def restore_buffers(self) -> None:
        """Makes buffers again, which have no values where the model was made on the meta device."""
        for child in self.children():
            for module in child.modules():
                restore: Any = getattr(module, "restore_buffers", None)
                if restore is not None:
                    restore()

    def to_transformers(self) -> nn.Module:
        """Writes the weights back and returns the transformers model: the one this was made from, else a new one.

        Parameters that both models share need no copy; concatenated ones are split into their parts.

        Raises:
            ImportError: transformers is not installed.
        """
        origin = self._origin[0] if self._origin else self._new_origin()
        theirs = {self.file_name(name): parameter for name, parameter in origin.named_parameters()}
        ours = dict(self.named_parameters())
        with torch.no_grad():
            for name, parts in self.weight_names().items():
                chunks = ours[name].chunk(len(parts), dim=0)
                for part, chunk in zip(parts, chunks, strict=True):
                    if theirs[part] is not ours[name]:
                        theirs[part].data = chunk.detach().clone(memory_format=torch.contiguous_format)
        device = next(iter(ours.values())).device
        origin.to(device)  # what is left are constant buffers
        return origin.train(self.training)

    def _new_origin(self) -> nn.Module:
        transformers = _import_transformers("to_transformers")
        config = getattr(transformers, self.transformers_config_class)(**self.config.to_transformers())
        return getattr(transformers, self.transformers_class)(config, **self.transformers_options())

    def transformers_options(self) -> dict[str, Any]:
        """Keywords of the transformers class beside its config."""
        return {}


def _take_their_names(model: Any, weights: dict[str, Any], prefix: str, *rest: Any) -> None:
    """The hook before `load_state_dict`: state dicts of the transformers model are taken too."""
    own_weights(model, weights, prefix)


ModelType = TypeVar("ModelType", bound=type[ConvertibleModel])


def register(cls: ModelType) -> ModelType:
    """Adds an architecture to the table that `from_transformers` and `from_pretrained` look in."""
    _MODELS.append(cls)
    cls.config_class.model_type = cls.model_type
    return cls


def from_transformers(hf_model: nn.Module, **overrides: Any) -> ConvertibleModel:
    """The padding-free counterpart of a transformers model: same call, same outputs at real tokens, 0 at padded ones.

    Query, key and value weights are concatenated, which copies them; other Parameter objects are shared, so training
    one model trains the other. `to_transformers()` on the result writes everything back and returns `hf_model`.

    Args:
        hf_model: a `transformers.BertModel`, or another that `warpform.models` has a class of the same name for.
        **overrides: fields of the config to change, for instance attention_probs_dropout_prob=0.0 for training.

    Raises:
        TypeError: a class that warpform has no counterpart for, or an override that is no field of the config.
        ValueError: an option of the model's config that is not supported, by name; weights that differ from the
            architecture's (quantised or with adapters), by name; a LayerNorm that another module took the place of.
    """
    name = type(hf_model).__name__
    model_class = next((m for m in _MODELS if m.transformers_class == name), None)
    if model_class is None or not type(hf_model).__module__.startswith("transformers."):
        inner = getattr(hf_model, getattr(hf_model, "base_model_prefix", "") or "_", None)
        hint = ""
        if isinstance(inner, nn.Module) and any(m.transformers_class == type(inner).__name__ for m in _MODELS):
            prefix = hf_model.base_model_prefix
            hint = f"; replace its encoder: model.{prefix} = warpform.models.from_transformers(model.{prefix})"
        raise TypeError(
            f"from_transformers: hf_model must be one of {_names('transformers_class')} of transformers, "
            f"got {type(hf_model).__module__}.{name}{hint}"
        )
    fields = _config_dict(hf_model)
    config = model_class.config_class.from_transformers(fields, **overrides)
    config.id2label = fields.get("id2label")
    theirs = {model_class.file_name(name): parameter for name, parameter in hf_model.named_parameters()}
    with torch.device("meta"):
        model = model_class.build(config, with_optional=_has_optional(model_class, theirs))
    names = model.weight_names()
    _check_names(names, theirs, f"from_transformers: the parameters of this {name}")
    for ours, parts in names.items():
        sources = [theirs[part] for part in parts]
        _check_shape(ours, model, parts, sources, "from_transformers")
        if len(sources) == 1:
            set_parameter(model, ours, sources[0])
            continue
        trained = {source.requires_grad for source in sources}
        if len(trained) > 1:
            raise ValueError(
                f"from_transformers: {', '.join(parts)} become one parameter, so requires_grad must be the same for all"
            )
        joined = torch.cat([source.detach() for source in sources])
        set_parameter(model, ours, nn.Parameter(joined, requires_grad=trained.pop()))
    teach_save_pretrained(hf_model, ConvertibleModel)
    derive_from_model_output()
    if "layer_norm_eps" not in overrides:
        _adopt_eps(model, names, hf_model)
    model.adopt(hf_model)
    model.restore_buffers()
    model._origin.append(hf_model)
    return model.train(hf_model.training)


def from_pretrained(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    **overrides: Any,
) -> ConvertibleModel:
    """Reads a model from a folder as transformers saves it: `config.json` and safetensors, nothing that is pickled.

    The model is the encoder. Weights of heads (`cls.`, `classifier.`, `qa_outputs.`, and where the encoder is under
    `bert.` whatever is not) are ignored: `BertForMaskedLM.from_pretrained` and the like read them. A checkpoint without
    a pooler gives a model without one. The model comes in eval mode.

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
    fields = _read_config(folder)
    model_class = next((m for m in _MODELS if m.is_encoder and m.model_type == fields.get("model_type")), None)
    if model_class is None:
        raise ValueError(
            f"from_pretrained: model_type in {folder / 'config.json'} must be one of {_names('model_type')}, "
            f"got {fields.get('model_type')!r}"
        )
    return _load(model_class, folder, fields, dtype, device, overrides)


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise FileNotFoundError(f"from_pretrained: there is no folder {folder}")
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"from_pretrained: {folder} has no config.json")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"from_pretrained: {path} is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"from_pretrained: {path} must hold a JSON object, got {type(fields).__name__}")
    return fields


def _load(
    model_class: type[SomeModel],
    folder: Path,
    fields: dict[str, Any],
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    overrides: dict[str, Any],
) -> SomeModel:
    config = model_class.config_class.from_transformers(fields, **overrides)
    config.id2label = fields.get("id2label")
    weights = read_weights(folder, device="cpu" if device is None else str(device))
    return load_weights(model_class, config, weights, f"from_pretrained: the weights in {folder}", dtype).eval()


def load_weights(
    model_class: type[SomeModel],
    config: Any,
    weights: Mapping[str, Tensor],
    what: str,
    dtype: torch.dtype | None = None,
) -> SomeModel:
    """A model of the class from weights under any of its names; `what` begins the messages of errors."""
    model_class.check_weights(what, config, weights)
    weights = _own_weights(model_class, model_class.canonical_weights(weights))
    with torch.device("meta"):
        model = model_class.build(config, with_optional=_has_optional(model_class, weights))
    assert isinstance(model, model_class)
    names = model.weight_names()
    used = {part for parts in names.values() for part in parts}
    weights = {n: w for n, w in weights.items() if n in used or not n.startswith(model_class.spare_weights)}
    _check_names(names, weights, what)
    for ours, parts in names.items():
        sources = [weights[part] for part in parts]
        _check_shape(ours, model, parts, sources, what)
        joined = sources[0] if len(sources) == 1 else torch.cat(sources)
        set_parameter(model, ours, nn.Parameter(joined if dtype is None else joined.to(dtype)))
    model.restore_buffers()
    return model


def _own_weights(model_class: type[ConvertibleModel], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = model_class.weight_prefix
    if any(name.startswith(prefix) for name in weights):
        # A checkpoint with a head: what is outside the encoder is the head's.
        weights = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
    # Names of TensorFlow days, still found in old checkpoints.
    renamed = {
        name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias"): w
        for name, w in weights.items()
    }
    for alias, name in model_class.aliases.items():
        if alias in renamed:
            renamed.setdefault(name, renamed.pop(alias))
    ignored = (*model_class.ignored_weights, *model_class.constant_weights)
    return {name: w for name, w in renamed.items() if not name.startswith(ignored)}


def _adopt_eps(model: ConvertibleModel, names: dict[str, tuple[str, ...]], hf_model: nn.Module) -> None:
    """Gives each LayerNorm the eps of the live module that its weight is of: it may differ from the config's."""
    live = {model.file_name(name): name for name, _ in hf_model.named_parameters()}
    for ours, module in model.named_modules():
        if getattr(module, "eps", None) is None or f"{ours}.weight" not in names:
            continue
        place = live[names[f"{ours}.weight"][0]].removesuffix(".weight")
        theirs: Any = hf_model.get_submodule(place)
        kind = type(theirs)
        plain = isinstance(theirs, nn.LayerNorm) and kind.forward is nn.LayerNorm.forward
        if not plain and not (kind.__module__.startswith("transformers.") and kind.__name__.endswith("LayerNorm")):
            raise ValueError(
                f"from_transformers: {place} must be a LayerNorm, got {kind.__module__}.{kind.__qualname__}"
            )
        module.eps = float(theirs.eps if hasattr(theirs, "eps") else theirs.variance_epsilon)


def _has_optional(model_class: type[ConvertibleModel], weights: Mapping[str, Any]) -> bool:
    optional = model_class.optional_module
    return optional is None or any(name.startswith(f"{optional}.") for name in weights)


def _config_dict(hf_model: nn.Module) -> dict[str, Any]:
    config: Any = hf_model.config
    # Before transformers 5 an attribute of the config could be set without being in its dictionary.
    return {**config.to_dict(), **{k: v for k, v in vars(config).items() if not k.startswith("_")}}


def _check_names(names: dict[str, tuple[str, ...]], given: Mapping[str, Any], what: str) -> None:
    expected = {part for parts in names.values() for part in parts}
    for problem, found in (("lack", sorted(expected - set(given))), ("have unknown", sorted(set(given) - expected))):
        if found:
            more = f" and {len(found) - 5} more" if len(found) > 5 else ""
            raise ValueError(f"{what} {problem} {', '.join(found[:5])}{more}")


def _check_shape(ours: str, model: nn.Module, parts: tuple[str, ...], sources: list[Any], what: str) -> None:
    shape = list(model.get_parameter(ours).shape)
    shape[0] //= len(parts)
    for part, source in zip(parts, sources, strict=True):
        if list(source.shape) != shape or not source.is_floating_point():
            raise ValueError(
                f"{what}: {part} must be floating point of shape {shape}, as the config says, "
                f"got {source.dtype} of shape {list(source.shape)}"
            )


def set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Puts a parameter in the place of the one of that name."""
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, parameter)


def _names(attribute: str) -> str:
    return ", ".join(dict.fromkeys(getattr(m, attribute) for m in _MODELS))


def _import_transformers(what: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"{what} needs transformers: pip install transformers") from error
    return transformers


def config_overrides(config_class: type[Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """The overrides, checked to be fields of the config."""
    fields = [f.name for f in dataclasses.fields(config_class)]
    for name in overrides:
        if name not in fields:
            raise TypeError(f"{config_class.__name__} has no field {name!r}; fields: {', '.join(fields)}")
    return overrides
