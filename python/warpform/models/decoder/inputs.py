"""What a decoder is called with, packed: ids or embeddings, labels, and what else comes for each token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...packing import Packing
from ..common.checks import check_shape
from ..common.inputs import read_rows


@dataclass
class Inputs:
    """Attributes:
    packing: of the batch.
    padded: whether the caller's tensors are [B, S, ...], and the results are to be; else they are packed.
    ids: int64 [total], or None where embeddings were given.
    embeds: [total, hidden], or None.
    labels: int64 [total], or None.
    model: the name of the model, for errors.
    """

    packing: Packing
    padded: bool
    ids: Tensor | None
    embeds: Tensor | None
    labels: Tensor | None
    model: str

    def of_tokens(self, name: str, value: Tensor | None) -> Tensor | None:
        """An argument that has a number for each token, [B, S] or [total], packed.

        Raises:
            ValueError: another shape.
        """
        if value is None:
            return None
        shape = (self.packing.batch_size, self.packing.seqlen) if self.padded else (self.packing.total,)
        check_shape(self.model, name, value, shape)
        return self.packing.pack(value) if self.padded else value

    def restore(self, rows: Tensor) -> Tensor:
        """Results [total, ...] as the caller's tensors are: [B, S, ...], 0 where there is padding, or packed."""
        return self.packing.unpack(rows) if self.padded else rows


def read_inputs(
    model: str,
    config: Any,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    packing: Packing | None,
    inputs_embeds: Tensor | None,
) -> Inputs:
    """Checks the arguments of a decoder's forward, and packs them.

    Raises:
        ValueError: both or neither of input_ids and inputs_embeds, shapes that do not match, a mask with `packing`,
            more tokens than max_position_embeddings (a RuntimeError in a compiled or exported model, which learns it
            from the mask as it runs).
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError(f"{model}: exactly one of input_ids and inputs_embeds must be given")
    name, given = ("input_ids", input_ids) if input_ids is not None else ("inputs_embeds", inputs_embeds)
    assert given is not None
    more = () if input_ids is not None else (config.hidden_size,)
    packing, padded, rows = read_rows(model, name, given, more, attention_mask, packing, config.max_position_embeddings)
    check_shape(model, "labels", labels, (packing.batch_size, packing.seqlen) if padded else (packing.total,))
    if padded and labels is not None:
        labels = packing.pack(labels)
    ids, embeds = (rows, None) if input_ids is not None else (None, rows)
    return Inputs(packing, padded, ids, embeds, labels, model)
