"""Models that are written to a folder and read from one: config.json and safetensors, and never a pickle.

A model is made on the meta device, so that nothing is drawn and no memory is taken, and then gets the tensors of the
file: parameters and persistent buffers by name, tied ones once. Buffers that are in no file are made again by the
`restore_buffers` of their module.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from .init import init_normal
from .model import Model
from .weights import read_weights, write_weights

SomeModel = TypeVar("SomeModel", bound="PretrainedModel")


class PretrainedModel(Model):
    """A model with a config, which can be saved and loaded with it.

    Attributes:
        config_class: the class of its config, derived from `ModelConfig`.
        file_prefix: what files put before the names of this model's weights.
        file_reader: whom the names in files are for, in messages of errors.
        spare_weights: prefixes of weights that some checkpoints hold beside a config that has no use for them.
        optional_module: a module that a checkpoint may lack as a whole (the pooler).
        drawn_convolutions: classes of convolutions that `init_weights` draws, as it does linear layers and embeddings.
    """

    config_class: ClassVar[Any]
    file_prefix: ClassVar[str] = ""
    file_reader: ClassVar[str] = "from_pretrained"
    spare_weights: ClassVar[tuple[str, ...]] = ()
    optional_module: ClassVar[str | None] = None
    drawn_convolutions: ClassVar[tuple[type[nn.Module], ...]] = ()

    config: Any

    def init_weights(self, module: nn.Module) -> None:
        """For `apply`: `init_normal` with the config's initializer_range."""
        init_normal(module, self.config.initializer_range, self.drawn_convolutions)

    @classmethod
    def build(cls, config: Any, *, with_optional: bool = True) -> PretrainedModel:
        """A model with weights as yet unset or random; with_optional False leaves `optional_module` out."""
        return cls(config)

    @classmethod
    def from_pretrained(
        cls: type[SomeModel],
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **overrides: Any,
    ) -> SomeModel:
        """Reads a model of this class, with its head, from a folder as `save_pretrained` writes it, in eval mode.

        Args:
            folder: with `config.json` and `model.safetensors`, or `model.safetensors.index.json` and its shards.
            dtype: None keeps the dtype of the file.
            device: None is the CPU.
            **overrides: fields of the config to change.

        Raises:
            FileNotFoundError: no such folder, no config.json, no weights, or only pickled ones (says how to convert
                them).
            ValueError: a file that cannot be read, a `model_type` of another architecture, an option that is not
                supported, weights that are missing (those of a head too), unknown or of another shape.
            TypeError: an override that is no field of the config.
        """
        folder = Path(folder)
        fields = read_config(folder)
        wanted = cls.config_class.model_type
        if fields.get("model_type") not in (wanted, *cls.config_class.other_model_types):
            raise ValueError(
                f"from_pretrained: model_type in {folder / 'config.json'} must be {wanted} for a "
                f"{cls.__name__}, got {fields.get('model_type')!r}"
            )
        config = cls.config_class.from_fields(fields, **overrides)
        weights = read_weights(folder, device="cpu" if device is None else str(device))
        return load_weights(cls, config, weights, f"from_pretrained: the weights in {folder}", dtype).eval()

    def save_pretrained(
        self, folder: str | Path, *, state_dict: Mapping[str, Tensor] | None = None, **unused: Any
    ) -> None:
        """Writes `config.json` and `model.safetensors`, which `from_pretrained` reads.

        Where transformers has this architecture, transformers reads the folder too.

        Args:
            folder: is made where there is none.
            state_dict: the weights to write, under this model's names; None = its own.
            **unused: other arguments of transformers' method, such as safe_serialization; they change nothing.

        Raises:
            NotADirectoryError: folder is a file.
            ValueError: a state_dict that lacks a weight or has another, as with adapters that are not merged.
        """
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"save_pretrained: {folder} is not a folder")
        state = file_weights(self, self.state_dict() if state_dict is None else state_dict)
        folder.mkdir(parents=True, exist_ok=True)
        config = {**self.config.to_dict(), "architectures": [self.architecture_name()]}
        config["dtype"] = str(self.dtype).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        write_weights(folder, state)

    def architecture_name(self) -> str:
        """The class that config.json names."""
        return type(self).__name__

    def weight_names(self) -> dict[str, tuple[str, ...]]:
        """For each weight of this model the names in files whose tensors, joined on dim 0, it holds.

        Weights are the parameters, tied ones once, and the persistent buffers.
        """
        return {name: (name,) for name in named_weights(self)}

    def weight_rows(self, name: str) -> Sequence[int] | None:
        """The rows of each of the tensors in files that the weight `name` joins; None: the same number for all."""
        return None

    def split_weight(self, name: str, weight: Tensor, count: int | None = None) -> Sequence[Tensor]:
        """The parts of a weight that has `count` names in `weight_names`, views of it; None: count them."""
        count = len(self.weight_names()[name]) if count is None else count
        if count == 1:  # it may be a number, which has no rows
            return (weight,)
        rows = self.weight_rows(name)
        return weight.chunk(count, 0) if rows is None else weight.split(list(rows), 0)

    @classmethod
    def own_weights(cls, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of a file that are this model's, under the names that `weight_names` has."""
        return {name.removeprefix(cls.file_prefix): w for name, w in weights.items()}

    @classmethod
    def check_weights(cls, what: str, config: Any, weights: Mapping[str, Tensor]) -> None:
        """Raises ValueError where the weights of a file say that the config is not theirs, beyond names and shapes."""

    def restore_buffers(self) -> None:
        """Makes buffers again that are in no file: a model made on the meta device has no values for them.

        Each module that has such buffers does it in a method of this name.
        """
        for child in self.children():
            for module in child.modules():
                restore: Any = getattr(module, "restore_buffers", None)
                if restore is not None:
                    restore()


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and the persistent buffers of a model by their names, tied ones once, under their first name."""
    seen: set[int] = set()
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found


def tied_names(model: nn.Module) -> dict[str, str]:
    """For each further name of a tied weight its first name."""
    first: dict[int, str] = {}
    state = model.state_dict(keep_vars=True).items()
    return {name: first[id(w)] for name, w in state if first.setdefault(id(w), name) != name}


def file_weights(model: PretrainedModel, weights: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Those of the weights that are the model's, under the names that they have in files.

    A weight that joins several of a file is split into copies; others are the same tensors.

    Args:
        model: whose weights they are.
        weights: a state dict that holds the model's, perhaps among others.
        prefix: what comes before the model's names in it, and before the new ones.

    Raises:
        ValueError: a weight of the model that is missing, or one under the prefix that is none of its own.
    """
    names, spare = model.weight_names(), {prefix + name for name, _ in model.named_buffers()}
    spare |= {prefix + name for name in tied_names(model)}
    what = f"{type(model).__name__}: the state dict"
    missing = [name for name in names if prefix + name not in weights]
    if missing:
        raise ValueError(f"{what} lacks {', '.join(missing[:5])}, which {model.file_reader} needs")
    own = {prefix + name for name in names}
    unknown = [n for n in weights if n.startswith(prefix) and n not in own and n not in spare]
    if unknown:
        raise ValueError(
            f"{what} holds {', '.join(unknown[:5])}, which {model.file_reader} has no name for: merge adapters into "
            "the model before it is saved, or save torch's state_dict()"
        )
    renamed: dict[str, Tensor] = {}
    for name, parts in names.items():
        weight = weights[prefix + name]
        chunks = [weight] if len(parts) == 1 else [c.clone() for c in model.split_weight(name, weight, len(parts))]
        for part, chunk in zip(parts, chunks, strict=True):
            renamed[prefix + model.file_prefix + part] = chunk
    return renamed


def read_config(folder: Path, *, required: bool = True) -> dict[str, Any]:
    """The fields in config.json of a folder; none where there is no such file and it is not required.

    Raises:
        FileNotFoundError: no such folder, or no config.json where it is required.
        ValueError: a file that is no JSON object.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"from_pretrained: there is no folder {folder}")
    path = folder / "config.json"
    if not path.is_file():
        if not required:
            return {}
        raise FileNotFoundError(f"from_pretrained: {folder} has no config.json")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"from_pretrained: {path} is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"from_pretrained: {path} must hold a JSON object, got {type(fields).__name__}")
    return fields


def load_weights(
    model_class: type[SomeModel],
    config: Any,
    weights: Mapping[str, Tensor],
    what: str,
    dtype: torch.dtype | None = None,
) -> SomeModel:
    """A model of the class from weights under any of its names; `what` begins the messages of errors."""
    model_class.check_weights(what, config, weights)
    weights = model_class.own_weights(weights)
    with torch.device("meta"):
        model = model_class.build(config, with_optional=has_optional(model_class, weights))
    assert isinstance(model, model_class)
    fill(model, weights, what, dtype)
    return model


def published_weights(
    model: nn.Module, names: Mapping[str, tuple[str, ...]], weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Published weights under a model's own names and in its shapes, for `load_weights`, which names what is wrong.

    Args:
        model: the model, or one on the meta device.
        names: for each weight of the model the published names whose tensors, joined on dim 0, it holds. Of a
            convolution of one tap [out, in, 1, 1] the model may have the weight of a linear layer, [out, in].
        weights: by published names.

    Returns:
        What the model has, without what the weights lack; and what it does not have, under its published name.
    """
    state, own, unread = model.state_dict(), {}, {*weights}
    for name, parts in names.items():
        unread -= {*parts}
        if all(part in weights for part in parts):
            joined = weights[parts[0]] if len(parts) == 1 else torch.cat([weights[part] for part in parts])
            shape = state[name].shape
            own[name] = joined.view(shape) if joined.dim() == 4 and joined.numel() == shape.numel() else joined
    return {**own, **{name: weight for name, weight in weights.items() if name in unread}}


def has_optional(model_class: type[PretrainedModel], weights: Iterable[str]) -> bool:
    """Tells whether weights of these names include those of the optional module."""
    optional = model_class.optional_module
    return optional is None or any(name.startswith(f"{optional}.") for name in weights)


def fill(model: PretrainedModel, weights: Mapping[str, Tensor], what: str, dtype: torch.dtype | None = None) -> None:
    """Puts the weights of a file in the place of those of a model that was made on the meta device.

    Args:
        model: made on the meta device.
        weights: under the names that `weight_names` has. They are taken, not copied, where that is possible.
        what: begins the messages of errors.
        dtype: what floating-point weights are cast to; modules that keep a wider dtype do so. None keeps their own.

    Raises:
        ValueError: weights that are missing, unknown or of another shape.
        RuntimeError: a buffer that is in no file, and whose module has no `restore_buffers`.
    """
    names, tied = model.weight_names(), tied_names(model)
    used = {part for parts in names.values() for part in parts}
    unread = set(tied) - used
    weights = {n: w for n, w in weights.items() if n in used or not (n in unread or n.startswith(model.spare_weights))}
    check_names(names, weights, what)
    state = model.state_dict(keep_vars=True)
    for ours, parts in names.items():
        sources = [weights[part] for part in parts]
        check_weight(state[ours], parts, sources, what, model.weight_rows(ours) if len(parts) > 1 else None)
        joined = sources[0] if len(sources) == 1 else torch.cat(sources)
        own = state[ours]
        set_weight(model, ours, nn.Parameter(joined, own.requires_grad) if isinstance(own, nn.Parameter) else joined)
    for name, first in tied.items():
        set_weight(model, name, model.get_parameter(first))
    if dtype is not None:
        model.to(dtype)
    model.restore_buffers()
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            raise RuntimeError(f"{what}: buffer {name} is in no file, so its module needs a method restore_buffers")


def check_names(names: Mapping[str, tuple[str, ...]], given: Iterable[str], what: str) -> None:
    """Raises ValueError where the given names are not those that the weights of a model have in files."""
    given, expected = set(given), {part for parts in names.values() for part in parts}
    for problem, found in (("lack", sorted(expected - given)), ("have unknown", sorted(given - expected))):
        if found:
            more = f" and {len(found) - 5} more" if len(found) > 5 else ""
            raise ValueError(f"{what} {problem} {', '.join(found[:5])}{more}")


def check_weight(
    own: Tensor, parts: tuple[str, ...], sources: list[Any], what: str, rows: Sequence[int] | None = None
) -> None:
    """Raises ValueError where the tensors of a file do not make up the weight `own` of the model.

    rows: of each of the tensors, where there are several; None: the same number.
    """
    floating = own.is_floating_point()
    for i, (part, source) in enumerate(zip(parts, sources, strict=True)):
        shape = list(own.shape)
        if len(parts) > 1:
            shape[0] = shape[0] // len(parts) if rows is None else rows[i]
        if list(source.shape) != shape or source.is_floating_point() != floating:
            raise ValueError(
                f"{what}: {part} must be {'floating point' if floating else own.dtype} of shape {shape}, as the config "
                f"says, got {source.dtype} of shape {list(source.shape)}"
            )


def set_weight(model: nn.Module, name: str, weight: Tensor) -> None:
    """Replaces the parameter or buffer of that name."""
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, weight)
