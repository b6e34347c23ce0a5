"""The outputs of models, read like the outputs of transformers without needing transformers."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NoReturn

from torch import Tensor
from torch.utils import _pytree as pytree


class Output(OrderedDict):
    """Output by name (`out.logits`, `out["logits"]`) or by place (`out[0]`, `out[:2]`), for dataclasses to derive from.

    As in transformers, it is a dictionary of the fields that are not None, in their order. Each class derived from this
    one is a pytree node. So DistributedDataParallel, FSDP, accelerate and `torch.export` find the tensors in an output.
    Once a model of transformers was converted, outputs are instances of transformers' ModelOutput too: its pipelines
    turn any other dictionary into a plain one, which has no places. So nothing here relies on the next base class.
    They add items of their own too.

    Raises:
        TypeError: a field that is to be removed (set it to None).
    """

    def __init_subclass__(cls, **options: Any) -> None:
        # Not transformers' own method, which would register the class a second time.
        super(OrderedDict, cls).__init_subclass__(**options)

        def restore(values: Any, names: Any) -> Any:
            return cls(dict(zip(names, values, strict=True)))

        pytree.register_pytree_node(
            cls,
            lambda output: (list(output.values()), list(output.keys())),
            restore,
            serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
            flatten_with_keys_fn=lambda output: (
                [(pytree.MappingKey(name), value) for name, value in output.items()],
                list(output.keys()),
            ),
        )

    def __post_init__(self) -> None:
        names = self._names()
        first = getattr(self, names[0])
        if first is None or isinstance(first, Tensor) or len(self) > 1:
            return
        # Libraries that convert the tensors of a mapping make the new one from a mapping, or from its items.
        items = first if isinstance(first, Mapping) else _items(first)
        if items is not None:
            setattr(self, names[0], None)
            for name, value in items.items():
                self[name] = value

    def _names(self) -> tuple[str, ...]:
        return tuple(field.name for field in dataclasses.fields(self))  # type: ignore[arg-type]

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        if value is None:
            if name in self:
                OrderedDict.__delitem__(self, name)
        elif name in self:
            OrderedDict.__setitem__(self, name, value)
        else:
            names = self._names()
            if name in names:
                OrderedDict.__setitem__(self, name, value)
                for later in names[names.index(name) + 1 :]:
                    if later in self:
                        self.move_to_end(later)

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self, name, value)
        if value is not None and name not in self:
            OrderedDict.__setitem__(self, name, value)

    def __getitem__(self, key: Any) -> Any:
        """key: the name of a field, or its place among those that are not None, or a slice of places."""
        return OrderedDict.__getitem__(self, key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None, in order."""
        return tuple(self.values())

    def copy(self) -> Any:
        return type(self)(dict(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)

    def _keep(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(f"{type(self).__name__}: fields cannot be removed; set one to None instead")

    __delitem__ = pop = popitem = clear = setdefault = _keep


def derive_from_model_output() -> None:
    """Makes transformers' ModelOutput the base class of `Output`. Calling it again changes nothing."""
    from transformers.utils import ModelOutput

    if not issubclass(Output, ModelOutput):
        Output.__bases__ = (ModelOutput,)


def _items(value: Any) -> dict[str, Any] | None:
    """The pairs of (name, value) that an iterable holds, or None where it holds something else."""
    if not hasattr(value, "__iter__"):
        return None
    pairs = list(value)
    if not all(isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs):
        return None
    return dict(pairs)


@dataclasses.dataclass
class EncoderOutput(Output):
    """The output of an encoder.

    Attributes:
        last_hidden_state: [batch, seqlen, hidden], 0 at padded tokens; [total, hidden] when packed ids were given.
        pooler_output: [batch, hidden], or None for a model without a pooler.
        hidden_states: on request, the embeddings and the output of every layer, each shaped as last_hidden_state.
        attentions: always None, for callers that look.
    """

    last_hidden_state: Tensor
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: None = None


@dataclasses.dataclass
class HeadOutput(Output):
    """The output of a model with a head.

    Attributes:
        loss: a scalar, where labels were given.
        logits: per token [batch, seqlen, classes], 0 at padded tokens, or [total, classes] when packed ids were given;
            per sequence [batch, classes]. None where only the loss was asked for.
        hidden_states: on request, as in `EncoderOutput`.
        attentions: always None, for callers that look.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: None = None


@dataclasses.dataclass
class ImageClassifierOutput(Output):
    """The output of a classifier of images.

    Attributes:
        loss: a scalar, where labels were given.
        logits: [batch, num_labels].
        hidden_states, attentions, reshaped_hidden_states: as of the model below.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: None = None
    reshaped_hidden_states: tuple[Tensor, ...] | None = None


@dataclasses.dataclass
class ImageModelOutput(Output):
    """The output of a vision model without a head.

    Attributes:
        last_hidden_state: of the last stage, [batch, channels, height, width]; in memory channels are the last.
        hidden_states: on request, the output of every stage, [batch, channels, height, width].
        attentions: always None, for callers that look.
    """

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: None = None


@dataclasses.dataclass
class SemanticSegmenterOutput(Output):
    """The output of a model that gives each pixel a class.

    Attributes:
        loss: a scalar, where labels were given.
        logits: [batch, num_labels, height, width]; the model says at which stride.
        hidden_states, attentions: as of the model below.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: None = None
