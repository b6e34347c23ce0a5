"""Definitions of the padding-free encoder's ops, but for attention.

A tensor on a CPU is read by the host where that saves work; on another device nothing here reads device memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._dtypes import accumulation_dtype


def packing_plan(mask: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Computes the packed places of the tokens of mask [B, S]; see `warpform.ops.packing_plan`."""
    batch, seqlen = mask.shape
    tokens = mask != 0
    full_lengths = tokens.sum(1)
    full_ends = full_lengths.cumsum(0)

    ends = full_ends.clamp(max=capacity)
    cu_seqlens = mask.new_zeros(batch + 1, dtype=torch.int32)
    cu_seqlens[1:] = ends
    lengths = cu_seqlens.diff()
    nothing = full_lengths.new_zeros(1)
    summary = torch.stack((full_lengths.sum(), torch.cat((full_lengths, nothing)).amax()))

    flat = tokens.flatten()
    rank = flat.cumsum(0) - 1
    kept = flat & (rank < capacity)
    ranks = torch.where(kept, rank, -1).to(torch.int32).view(batch, seqlen)

    # Masked tokens and those past the capacity all write to one more slot, which is then left out.
    positions = torch.arange(flat.numel(), device=mask.device)
    slots = torch.where(kept, rank, capacity)
    indices = positions.new_full((capacity + 1,), -1).scatter_(0, slots, positions)[:capacity].clone()
    position_ids = torch.where(indices >= 0, indices % max(seqlen, 1), 0)
    return cu_seqlens, lengths, indices, position_ids, ranks, summary


def _gather_rows(rows: Tensor, index: Tensor) -> Tensor:
    """rows[index] with zeros where index lies outside: rows [N, ...], index [M] -> [M, ...]."""
    count = rows.size(0)
    shape = (index.size(0), *rows.shape[1:])
    if count == 0 or 0 in shape:
        return rows.new_zeros(shape)
    if index.device.type == "cpu":
        smallest, largest = (int(bound) for bound in torch.aminmax(index))
        if smallest >= 0 and largest < count:
            return rows.index_select(0, index)
        # Most of a padded batch may be padding, so only the rows that hold something are moved.
        places = ((index >= 0) & (index < count)).nonzero().squeeze(1)
        return rows.new_zeros(shape).index_copy_(0, places, rows.index_select(0, index[places]))
    valid = (index >= 0) & (index < count)
    out = rows.index_select(0, torch.where(valid, index, 0))
    return out.masked_fill_(~valid.view(-1, *[1] * (rows.dim() - 1)), 0)


def pack(x: Tensor, indices: Tensor, ranks: Tensor) -> Tensor:
    """x [B, S, ...] -> [N, ...]: row r is token indices[r] of the flattened batch, or 0 where there is none."""
    return _gather_rows(x.flatten(0, 1), indices)


def unpack(t: Tensor, indices: Tensor, ranks: Tensor) -> Tensor:
    """t [N, ...] -> [B, S, ...]: token (b, s) is row ranks[b, s], or 0 where there is none."""
    return _gather_rows(t, ranks.flatten()).unflatten(0, tuple(ranks.shape))


def _wide(t: Tensor) -> Tensor:
    """t in the dtype that sums are made in: float32, or float64 for float64."""
    return t.to(accumulation_dtype(t.dtype))


def _wide_sum(x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """x + bias + residual, unrounded. May be x itself."""
    total = _wide(x)
    owned = total is not x  # what this function allocated, it may write to
    for term in (residual, bias):
        if term is not None:
            # Mixed dtypes add without a converted copy, and the wider one decides.
            total = total.add_(term) if owned else total + term
            owned = True
    return total


def add_bias_residual_layer_norm(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    ln_bias: Tensor,
    eps: float = 1e-5,
    *,
    return_sum: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sum = x + bias + residual; out = (sum - mean) * rstd * weight + ln_bias, statistics over the last dimension."""
    total = _wide_sum(x, bias, residual)
    width = x.size(-1)
    rows = x.numel() // max(width, 1)
    if x.numel() == 0:
        out, mean, rstd = torch.empty_like(total), total.new_zeros(rows), total.new_zeros(rows)
    else:
        wide_weight, wide_bias = weight.to(total.dtype), ln_bias.to(total.dtype)
        out, mean, rstd = torch.native_layer_norm(total, (width,), wide_weight, wide_bias, eps)
    kept = total.to(x.dtype, copy=total is x) if return_sum else x.new_empty(0)
    return (
        out.to(x.dtype).contiguous(),
        kept.contiguous(),
        mean.reshape(rows).to(total.dtype),
        rstd.reshape(rows).to(total.dtype),
    )


def add_bias_residual_layer_norm_backward(
    dout: Tensor, dsum: Tensor | None, sum: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """xhat = (sum - mean) * rstd and g = dout * weight give dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dsum.

    dbias is the column sums of dx, dweight those of dout * xhat, dln_bias those of dout.
    """
    width = sum.size(-1)
    if sum.numel() == 0:
        empty = torch.empty_like(sum, memory_format=torch.contiguous_format)
        return empty, torch.zeros_like(weight), torch.zeros_like(weight), torch.zeros_like(weight)
    wide = _wide(sum)
    wide_weight = weight.to(wide.dtype)
    statistics = (*sum.shape[:-1], 1)
    dx, dweight, dln_bias = torch.ops.aten.native_layer_norm_backward(
        dout.to(wide.dtype),
        wide,
        (width,),
        mean.view(statistics),
        rstd.view(statistics),
        wide_weight,
        wide_weight,  # in place of ln_bias, on whose values the gradient does not depend
        (True, True, True),
    )
    if dsum is not None:
        dx += dsum
    dbias = dx.reshape(-1, width).sum(0)
    dx = dx.to(sum.dtype).contiguous()
    return dx, dbias.to(weight.dtype), dweight.to(weight.dtype), dln_bias.to(weight.dtype)


def bias_gelu(x: Tensor, bias: Tensor | None, approximate: str = "none") -> Tensor:
    """With s = x + bias, "none": s * (1 + erf(s / sqrt 2)) / 2,
    "tanh": s * (1 + tanh(sqrt(2 / pi) * (s + 0.044715 s^3))) / 2.
    """
    total = _wide_sum(x, bias, None)
    if total is x:
        return torch.ops.aten.gelu(x, approximate=approximate).contiguous()
    return torch.ops.aten.gelu_(total, approximate=approximate).to(x.dtype).contiguous()


def bias_gelu_backward(
    dout: Tensor, x: Tensor, bias: Tensor | None, approximate: str = "none"
) -> tuple[Tensor, Tensor]:
    """dx = dout * gelu'(x + bias); dbias = the column sums of dx."""
    total = _wide_sum(x, bias, None)
    dx = torch.ops.aten.gelu_backward(dout.to(total.dtype), total, approximate=approximate)
    if bias is None:
        dbias = x.new_empty(0)
    else:
        dbias = dx.reshape(-1, x.size(-1)).sum(0).to(bias.dtype) if dx.numel() else torch.zeros_like(bias)
    return dx.to(x.dtype).contiguous(), dbias
