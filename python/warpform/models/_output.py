"""The output of encoder models, read like the outputs of transformers without needing transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import Tensor


@dataclasses.dataclass
class EncoderOutput:
    """Output by name (`out.last_hidden_state`, `out["last_hidden_state"]`) or by place (`out[0]`, `out[:2]`).

    As in transformers, fields that are None do not count for indexing, and iteration goes over names.

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

    def keys(self) -> tuple[str, ...]:
        return tuple(f.name for f in dataclasses.fields(self) if getattr(self, f.name) is not None)

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
