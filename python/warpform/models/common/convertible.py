"""Models that transformers has too: how their weights and configs become transformers', and back.

An architecture says how names correspond; the rest is here. Nothing here knows an architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from .pretrained import (
    PretrainedModel,
    check_names,
    check_weight,
    has_optional,
    named_weights,
    set_weight,
    tied_names,
)
from .weights import rename

Self = TypeVar("Self", bound="ConvertibleModel")

# Norms by the name that transformers' classes end with, the class of torch, and what stands for it here.
_NORMS: tuple[tuple[str, type[nn.Module], type[nn.Module]], ...] = (
    ("RMSNorm", nn.RMSNorm, nn.RMSNorm),
    ("GroupNorm", nn.GroupNorm, nn.GroupNorm),
    ("BatchNorm2d", nn.BatchNorm2d, nn.BatchNorm2d),
    ("LayerNorm", nn.LayerNorm, nn.Module),
)

# Old checkpoints, converted from TensorFlow, have its names of the parameters of a LayerNorm.
_TENSORFLOW = ((r"LayerNorm\.gamma", "LayerNorm.weight"), (r"LayerNorm\.beta", "LayerNorm.bias"))


class ConvertibleModel(PretrainedModel):
    """A model that exists in transformers too. An architecture says how names and configs correspond; the rest is here.

    Attributes:
        config_class: its Config dataclass, with `from_transformers(mapping, **overrides)` and `to_transformers()`.
        transformers_class, transformers_config_class: names of the classes in `transformers`.
        weight_prefix: what checkpoints with a head put before the names of this model's weights.
        ignored_weights: prefixes of weights in checkpoints that are not this model's: those of (other) heads.
        constant_weights: prefixes of constant buffers that old checkpoints hold, ignored too.
        aliases: other names in checkpoints of weights that are tied, with the names in `weight_names`.
        is_encoder: whether it is a model without a head, which `warpform.models.from_pretrained` makes.
    """

    transformers_class: ClassVar[str]
    transformers_config_class: ClassVar[str]
    weight_prefix: ClassVar[str]
    ignored_weights: ClassVar[tuple[str, ...]] = ()
    constant_weights: ClassVar[tuple[str, ...]] = ()
    aliases: ClassVar[Mapping[str, str]] = {}
    is_encoder: ClassVar[bool] = True

    file_reader = "transformers"
    # The model this one was made from. In a list, so that its parameters are not registered a second time.
    _origin: list[nn.Module]

    def __init__(self) -> None:
        super().__init__()
        self._origin = []
        self._register_load_state_dict_pre_hook(_take_their_names, with_module=True)

    def architecture_name(self) -> str:
        return self.transformers_class

    @classmethod
    def build(cls, config: Any, *, with_optional: bool = True) -> ConvertibleModel:
        raise NotImplementedError

    def weight_names(self) -> dict[str, tuple[str, ...]]:
        """For each weight of this model the names in transformers whose tensors, joined on dim 0, it holds.

        Weights are the parameters, and the buffers that transformers' files hold too.
        """
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
    def own_weights(cls, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        weights, prefix = cls.canonical_weights(weights), cls.weight_prefix
        if any(name.startswith(prefix) for name in weights):
            # A checkpoint with a head: what is outside the encoder is the head's.
            weights = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        renamed = {rename(name, _TENSORFLOW): w for name, w in weights.items()}
        for alias, name in cls.aliases.items():
            if alias in renamed:
                renamed.setdefault(name, renamed.pop(alias))
        ignored = (*cls.ignored_weights, *cls.constant_weights)
        return {name: w for name, w in renamed.items() if not name.startswith(ignored)}

    @classmethod
    def from_live(cls: type[Self], hf_model: nn.Module, overrides: dict[str, Any]) -> Self:
        """The counterpart of a model of `transformers_class`, as `warpform.models.from_transformers` says."""
        fields, live = _config_dict(hf_model), _live_weights(hf_model)
        config = cls.config_class.from_transformers(fields, **overrides)
        config.id2label = fields.get("id2label")
        theirs = {cls.file_name(name): weight for name, weight in live.items()}
        with torch.device("meta"):
            model = cls.build(config, with_optional=has_optional(cls, theirs))
        assert isinstance(model, cls)
        names, state, tied = model.weight_names(), model.state_dict(keep_vars=True), tied_names(model)
        used = {part for parts in names.values() for part in parts}
        given = [n for n, weight in theirs.items() if n in used or isinstance(weight, nn.Parameter)]
        check_names(names, given, f"from_transformers: the parameters of this {type(hf_model).__name__}")
        for ours, parts in names.items():
            sources = [theirs[part] for part in parts]
            rows = model.weight_rows(ours) if len(parts) > 1 else None
            check_weight(state[ours], parts, sources, "from_transformers", rows)
            if len(sources) == 1:
                set_weight(model, ours, sources[0])
                continue
            trained = {source.requires_grad for source in sources}
            if len(trained) > 1:
                raise ValueError(
                    f"from_transformers: {', '.join(parts)} become one parameter, so requires_grad must be the same "
                    "for all"
                )
            joined = torch.cat([source.detach() for source in sources])
            set_weight(model, ours, nn.Parameter(joined, requires_grad=trained.pop()))
        for name, first in tied.items():
            set_weight(model, name, model.get_parameter(first))
        if not {"layer_norm_eps", "rms_norm_eps"} & set(overrides):
            _adopt_eps(model, names, hf_model)
        model.adopt(hf_model)
        model.restore_buffers()
        model._origin.append(hf_model)
        return model.train(hf_model.training)

    def adopt(self, hf_model: nn.Module) -> None:
        """Takes over what of a transformers model is in neither its config nor its weights."""

    def to_transformers(self) -> nn.Module:
        """Writes the weights back and returns the transformers model that this was made from, else a new model.

        Parameters that both models share need no copy; concatenated ones are split into their parts.

        Raises:
            ImportError: transformers is not installed.
            ValueError: weights that the architecture has not, as of a branch that was put in, or of other shapes.
        """
        ours, names = named_weights(self), self.weight_names()
        other = sorted(set(ours) ^ set(names))
        if other:
            raise ValueError(
                f"{type(self).__name__}.to_transformers: the weights must be those of the architecture, which "
                f"transformers has; others, or missing: {', '.join(other[:5])}"
            )
        origin = self._origin[0] if self._origin else self._new_origin()
        theirs = {self.file_name(name): weight for name, weight in _live_weights(origin).items()}
        for name, parts in names.items():
            rows = self.weight_rows(name) if len(parts) > 1 else None
            what = f"{type(self).__name__}.to_transformers"
            check_weight(ours[name], parts, [theirs[part] for part in parts], what, rows)
        with torch.no_grad():
            for name, parts in names.items():
                chunks = self.split_weight(name, ours[name], len(parts)) if len(parts) > 1 else (ours[name],)
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
    """The hook before `load_state_dict`: puts weights under transformers' names under the model's own, in place.

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
    for name, first in tied_names(model).items():  # their files may hold a tied weight twice, or once
        if prefix + first in weights:
            weights.setdefault(prefix + name, weights[prefix + first])
            for spare in model.spare_weights:
                for unread in [n for n in weights if n.startswith(prefix + spare)]:
                    del weights[unread]


def _live_weights(hf_model: nn.Module) -> dict[str, Tensor]:
    """The parameters and the persistent buffers of a transformers model, tied parameters once."""
    parameters = dict(hf_model.named_parameters())
    buffers = {name: b for name, b in hf_model.state_dict(keep_vars=True).items() if not isinstance(b, nn.Parameter)}
    return {**parameters, **buffers}


def _adopt_eps(model: ConvertibleModel, names: dict[str, tuple[str, ...]], hf_model: nn.Module) -> None:
    """Gives each norm the eps of the live module that its weight is of: it may differ from the config's."""
    live = {model.file_name(name): name for name, _ in hf_model.named_parameters()}
    for ours, module in model.named_modules():
        if getattr(module, "eps", None) is None or f"{ours}.weight" not in names:
            continue
        place = live[names[f"{ours}.weight"][0]].removesuffix(".weight")
        theirs: Any = hf_model.get_submodule(place)
        kind = type(theirs)
        wanted, plain = next((n, p) for n, p, own in _NORMS if isinstance(module, own))
        is_plain = isinstance(theirs, plain) and kind.forward is plain.forward
        is_plain = is_plain and getattr(theirs, "num_groups", None) == getattr(module, "num_groups", None)
        if not is_plain and not (kind.__module__.startswith("transformers.") and kind.__name__.endswith(wanted)):
            raise ValueError(
                f"from_transformers: {place} must be a {wanted}, got {kind.__module__}.{kind.__qualname__}"
            )
        module.eps = float(theirs.eps if hasattr(theirs, "eps") else theirs.variance_epsilon)
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = theirs.momentum


def _config_dict(hf_model: nn.Module) -> dict[str, Any]:
    config: Any = hf_model.config
    # Before transformers 5 an attribute of the config could be set without being in its dictionary.
    return {**config.to_dict(), **{k: v for k, v in vars(config).items() if not k.startswith("_")}}


def _import_transformers(what: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"{what} needs transformers: pip install transformers") from error
    return transformers
