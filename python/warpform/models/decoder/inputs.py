"""What a decoder is called with, packed: ids or embeddings, labels, and what else comes for each token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...nn.stack import Step
from ...ops import _check
from ...packing import Packing
from ..common.checks import check_shape
from ..common.inputs import check_longest, read_rows
from ..common.losses import IGNORED, next_tokens


@dataclass
class Inputs:
    """Attributes:
    packing: of the batch.
    padded: whether the caller's tensors are [B, S, ...], and the results are to be; else they are packed.
    shape: [B, S] of a batch without padding, whose rows may hold several sequences; None: the packing says it.
    ids: int64 [total], or None where embeddings were given.
    embeds: [total, hidden], or None.
    labels: int64 [total], or None.
    positions: int64 [total], or None for a token's place in its padded row.
    items: what the sum of the losses is divided by; None: the number of labels.
    model: the name of the model, for errors.
    """

    packing: Packing
    padded: bool
    shape: tuple[int, int] | None
    ids: Tensor | None
    embeds: Tensor | None
    labels: Tensor | None
    positions: Tensor | None
    items: Tensor | int | None
    model: str

    def step(self, **options: Any) -> Step:
        """The step of these tokens; options are other attributes of it."""
        if self.positions is None:
            return Step.of(self.packing, **options)
        return Step(self.positions, self.packing.cu_seqlens, self.packing.max_seqlen, **options)

    def of_tokens(self, name: str, value: Tensor | None) -> Tensor | None:
        """An argument that has a number for each token, [B, S] or [total], packed.

        Raises:
            ValueError: another shape.
        """
        if value is None:
            return None
        shape: tuple[int, ...] = (self.packing.total,)
        if self.padded:
            shape = self.shape or (self.packing.batch_size, self.packing.seqlen)
        check_shape(self.model, name, value, shape)
        if self.shape is not None:
            return value.flatten()
        return self.packing.pack(value) if self.padded else value

    @property
    def share(self) -> Tensor | float:
        """The part of a step's labels that this batch has, for losses that are not a sum over labels; 1 by default.

        A Trainer that adds gradients up over several batches gives the number of items of all of them.
        """
        if self.items is None or self.labels is None:
            return 1.0
        return (next_tokens(self.labels, self.packing.cu_seqlens) != IGNORED).sum() / self.items

    def restore(self, rows: Tensor) -> Tensor:
        """Results [total, ...] as the caller's tensors are: [B, S, ...], 0 where there is padding, or packed."""
        if self.shape is not None:
            return rows.unflatten(0, self.shape)
        return self.packing.unpack(rows) if self.padded else rows


def read_inputs(
    model: str,
    config: Any,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    packing: Packing | None,
    inputs_embeds: Tensor | None = None,
    position_ids: Tensor | None = None,
    items: Tensor | int | None = None,
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
    packing, padded, rows = read_rows(model, name, given, more, attention_mask, packing, None)
    whole = (packing.batch_size, packing.seqlen) if padded and attention_mask is None else None
    shape: tuple[int, ...] = (packing.batch_size, packing.seqlen) if padded else (packing.total,)
    check_shape(model, "labels", labels, shape)
    if position_ids is not None and padded and position_ids.dim() == 2 and position_ids.shape[0] == 1:
        position_ids = position_ids.expand(shape)
    check_shape(model, "position_ids", position_ids, shape)
    if padded:
        labels = None if labels is None else packing.pack(labels)
    if padded and position_ids is not None:
        restarting = position_ids
        position_ids = packing.pack(position_ids)
        if whole is not None and whole[1] > 1:
            packing = _restarting(restarting, packing)
    check_longest(model, packing, config.max_position_embeddings)
    ids, embeds = (rows, None) if input_ids is not None else (None, rows)
    return Inputs(packing, padded, whole, ids, embeds, labels, position_ids, items, model)


def _restarting(position_ids: Tensor, packing: Packing) -> Packing:
    """The packing of rows [B, S] without padding in which several texts stand, each with positions that go up by one.

    As in transformers, a position that is not the next one begins another text, where there is no mask. It reads the
    positions from the device.
    """
    if torch.compiler.is_compiling() or not _check.has_values(position_ids):
        return packing
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids.diff(dim=1) != 1
    starts = begins.flatten().nonzero().flatten()
    if len(starts) == len(position_ids):
        return packing
    ends = torch.cat([starts[1:], starts.new_tensor([begins.numel()])])
    return Packing.from_lengths(ends - starts)
