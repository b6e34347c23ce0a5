"""The outputs of models, read like the outputs of transformers without needing transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import Tensor


class Output:
    """Output by name (`out.logits`, `out["logits"]`) or by place (`out[0]`, `out[:2]`), for dataclasses to derive from.

    As in transformers, fields that are None do not count for indexing, and iteration goes over names.
    """

    def keys(self) -> tuple[str, ...]:
        names = (f.name for f in dataclasses.fields(self))  # type: ignore[arg-type]
        return tuple(name for name in names if getattr(self, name) is not None)

    def values(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self.keys())

    def items(self) -> tuple[tuple[str, Any], ...]:
        return tuple((name, getattr(self, name)) for name in self.keys())

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None, in order."""
        return self.values()

    def get(self, name: str, default: Any = None) -> Any:
        value = getattr(self, name) if name in self.keys() else None
        return default if value is None else value

    def __getitem__(self, key: int | slice | str) -> Any:
        if isinstance(key, str):
            if key not in self.keys():
                raise KeyError(key)
            return getattr(self, key)
        return self.to_tuple()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __contains__(self, name: object) -> bool:
        return name in self.keys()

    def __len__(self) -> int:
        return len(self.keys())


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
