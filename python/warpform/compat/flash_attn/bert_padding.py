"""flash_attn.bert_padding as of flash-attn 2.7: a padded batch to its tokens laid end to end, and back.

`warpform.Packing` does the same with one read of the device for a whole model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops import _check

__all__ = ["index_first_axis", "pad_input", "unpad_input"]


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """input [N, ...], indices int64 [T] of distinct rows -> input[indices] [T, ...], any dtype, differentiable.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: input has fewer than 2 dimensions, or indices not one.
    """
    _check.tensor("index_first_axis", "input", input)
    _check.tensor("index_first_axis", "indices", indices)
    if input.dim() < 2:
        raise ValueError(
            f"index_first_axis: input must have at least 2 dimensions, [total, ...], got {_check.describe(input)}"
        )
    if indices.dim() != 1:
        raise ValueError(f"index_first_axis: indices must be of shape [total], got {_check.describe(indices)}")
    return input.index_select(0, indices)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Drops padding.

    Args:
        hidden_states: [B, S, ...] of any dtype.
        attention_mask: bool or int [B, S], 1 where there is a token.
        unused_mask: bool or int [B, S], 1 where a place is kept although it holds no token.

    Returns:
        hidden_states [total, ...], where total counts both masks; differentiable.
        indices int64 [total]: b * S + s of each row.
        cu_seqlens int32 [B + 1].
        max_seqlen_in_batch: an int, read from the device.
        seqused int32 [B]: how many places of each sequence attention_mask selects.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: masks that are not [B, S].
    """
    op = "unpad_input"
    _check.tensor(op, "hidden_states", hidden_states)
    masks = {"attention_mask": attention_mask}
    if unused_mask is not None:
        masks["unused_mask"] = unused_mask
    for name, mask in masks.items():
        _check.tensor(op, name, mask)
        if mask.dim() != 2 or mask.shape != hidden_states.shape[:2]:
            raise ValueError(
                f"{op}: {name} must be of shape {list(hidden_states.shape[:2])} as hidden_states begins, "
                f"got {_check.describe(mask)}"
            )
        _check.same_device(op, name, mask, "hidden_states", hidden_states)
    real = attention_mask != 0
    kept = real if unused_mask is None else real | (unused_mask != 0)
    lengths = kept.sum(dim=-1, dtype=torch.int32)
    used = real.sum(dim=-1, dtype=torch.int32)
    indices = torch.nonzero(kept.flatten(), as_tuple=False).flatten()
    longest = int(lengths.max()) if lengths.numel() else 0
    cu_seqlens = F.pad(torch.cumsum(lengths, dim=0, dtype=torch.int32), (1, 0))
    return hidden_states.flatten(0, 1).index_select(0, indices), indices, cu_seqlens, longest, used


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """hidden_states [total, ...], indices int64 [total] of `unpad_input` -> [batch, seqlen, ...], zeros elsewhere.

    Differentiable.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: indices are not [total].
    """
    _check.tensor("pad_input", "hidden_states", hidden_states)
    _check.tensor("pad_input", "indices", indices)
    if indices.dim() != 1 or hidden_states.dim() == 0 or indices.size(0) != hidden_states.size(0):
        raise ValueError(
            f"pad_input: indices must be of shape [total] with the rows of hidden_states "
            f"{_check.describe(hidden_states)}, got {_check.describe(indices)}"
        )
    padded = hidden_states.new_zeros((batch * seqlen, *hidden_states.shape[1:]))
    return padded.index_copy(0, indices, hidden_states).unflatten(0, (batch, seqlen))
