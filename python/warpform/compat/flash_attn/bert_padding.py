"""flash_attn.bert_padding as of flash-attn 2.8: a padded batch to its tokens laid end to end, and back.

`warpform.Packing` does the same with one read of the device for a whole model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops import _check
from .. import _arguments

__all__ = [
    "IndexFirstAxis",
    "IndexFirstAxisResidual",
    "IndexPutFirstAxis",
    "index_first_axis",
    "index_first_axis_residual",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """Rows of input [N, ...] at indices, int64 [T] and distinct: [T, ...], any dtype, differentiable.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: input has fewer than 2 dimensions, or indices not one.
    """
    _check_rows("index_first_axis", "input", input, indices)
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """A tensor [first_axis_dim, ...] with values [T, ...] in its rows indices, int64 [T] and distinct, and 0 else.

    Any dtype, differentiable.

    Raises:
        TypeError: values or indices is not a tensor, or first_axis_dim not an int.
        ValueError: values has fewer than 2 dimensions, or indices are not [T].
    """
    op = "index_put_first_axis"
    _check_rows(op, "values", values, indices)
    return _put(op, "values", values, indices, _arguments.integer(op, "first_axis_dim", first_axis_dim))


def index_first_axis_residual(input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """`index_first_axis` and input itself, for a residual branch; gradients of both reach input.

    Raises:
        TypeError, ValueError: as `index_first_axis`.
    """
    _check_rows("index_first_axis_residual", "input", input, indices)
    return input.index_select(0, indices), input.view_as(input)


class IndexFirstAxis:
    """flash-attn's class of this name; `apply` is `index_first_axis`."""

    apply = staticmethod(index_first_axis)


class IndexPutFirstAxis:
    """flash-attn's class of this name; `apply` is `index_put_first_axis`."""

    apply = staticmethod(index_put_first_axis)


class IndexFirstAxisResidual:
    """flash-attn's class of this name; `apply` is `index_first_axis_residual`."""

    apply = staticmethod(index_first_axis_residual)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Drops padding.

    Args:
        hidden_states: [B, S, ...] of any dtype.
        attention_mask: bool or int [B, S], 1 where there is a token.
        unused_mask: bool or int [B, S], 1 where a place is kept although it holds no token.

    Returns:
        * hidden_states [total, ...], where total counts both masks; differentiable.
        * indices int64 [total]: b * S + s of each row.
        * cu_seqlens int32 [B + 1].
        * max_seqlen_in_batch: an int, read from the device.
        * seqused int32 [B]: how many places of each sequence attention_mask selects.

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


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Drops padding of a batch whose rows each hold several short sequences, one after another.

    Args:
        hidden_states: [B, S, ...] of any dtype.
        attention_mask_in_length: int [B, S]: each row begins with the lengths of its sequences, 0 after the last one.

    Returns:
        hidden_states [total, ...], differentiable; indices int64 [total], b * S + s of each row; cu_seqlens int32, one
        more than there are sequences; max_seqlen_in_batch, an int, read from the device.

    Raises:
        TypeError: an argument is not a tensor, or lengths are not integers.
        ValueError: lengths that are not [B, S].
    """
    op = "unpad_input_for_concatenated_sequences"
    _check.tensor(op, "hidden_states", hidden_states)
    lengths = attention_mask_in_length
    _check.tensor(op, "attention_mask_in_length", lengths)
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(f"{op}: attention_mask_in_length must be integers, got {_check.describe(lengths)}")
    if lengths.dim() != 2 or lengths.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"{op}: attention_mask_in_length must be of shape {list(hidden_states.shape[:2])} as hidden_states begins, "
            f"got {_check.describe(lengths)}"
        )
    _check.same_device(op, "attention_mask_in_length", lengths, "hidden_states", hidden_states)
    kept = torch.arange(lengths.size(1), device=lengths.device) < lengths.sum(dim=-1, keepdim=True)
    indices = torch.nonzero(kept.flatten(), as_tuple=False).flatten()
    each = lengths.flatten()
    each = each[each != 0]
    longest = int(each.max()) if each.numel() else 0
    cu_seqlens = F.pad(torch.cumsum(each, dim=0, dtype=torch.int32), (1, 0))
    return hidden_states.flatten(0, 1).index_select(0, indices), indices, cu_seqlens, longest


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """hidden_states [total, ...], indices int64 [total] of `unpad_input` -> [batch, seqlen, ...], zeros elsewhere.

    Differentiable.

    Raises:
        TypeError: hidden_states or indices is not a tensor, or batch or seqlen not an int.
        ValueError: indices are not [total].
    """
    op = "pad_input"
    batch, seqlen = _arguments.integer(op, "batch", batch), _arguments.integer(op, "seqlen", seqlen)
    return _put(op, "hidden_states", hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))


def _check_rows(op: str, name: str, rows: Tensor, indices: Tensor) -> None:
    _check.tensor(op, name, rows)
    _check.tensor(op, "indices", indices)
    if rows.dim() < 2:
        raise ValueError(f"{op}: {name} must have at least 2 dimensions, [total, ...], got {_check.describe(rows)}")
    if indices.dim() != 1:
        raise ValueError(f"{op}: indices must be of shape [total], got {_check.describe(indices)}")


def _put(op: str, name: str, rows: Tensor, indices: Tensor, total: int) -> Tensor:
    """[total, ...] with rows at indices, 0 elsewhere."""
    _check.tensor(op, name, rows)
    _check.tensor(op, "indices", indices)
    if indices.dim() != 1 or rows.dim() == 0 or indices.size(0) != rows.size(0):
        raise ValueError(
            f"{op}: indices must be of shape [total] with the rows of {name} {_check.describe(rows)}, "
            f"got {_check.describe(indices)}"
        )
    return rows.new_zeros((total, *rows.shape[1:])).index_copy(0, indices.long(), rows)
