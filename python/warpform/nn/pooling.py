"""From packed tokens to one vector per sequence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._dtypes import accumulation_dtype
from ..packing import Packing
from ._product import apply_linear


def _with_a_row(hidden: Tensor) -> Tensor:
    """hidden [total, hidden], and a row of zeros after it where total is 0 or known only when a traced program runs."""
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import guard_or_true

        empty = guard_or_true(hidden.shape[0] == 0)
    else:
        empty = hidden.shape[0] == 0
    return F.pad(hidden, (0, 0, 0, 1)) if empty else hidden


def first_tokens(hidden: Tensor, packing: Packing) -> Tensor:
    """The first real token of every sequence: [total, hidden] -> [batch, hidden]; zeros for empty sequences."""
    hidden = _with_a_row(hidden)
    rows = hidden[packing.cu_seqlens[:-1].long().clamp(max=hidden.shape[0] - 1)]
    return torch.where((packing.lengths > 0).unsqueeze(1), rows, rows.new_zeros(()))


def last_tokens(hidden: Tensor, packing: Packing) -> Tensor:
    """The last real token of every sequence: [total, hidden] -> [batch, hidden]; zeros for empty sequences."""
    hidden = _with_a_row(hidden)
    rows = hidden[(packing.cu_seqlens[1:].long() - 1).clamp(min=0, max=hidden.shape[0] - 1)]
    return torch.where((packing.lengths > 0).unsqueeze(1), rows, rows.new_zeros(()))


def max_pool(hidden: Tensor, packing: Packing) -> Tensor:
    """The largest of each column over a sequence: [total, hidden] -> [batch, hidden]; zeros for empty sequences."""
    lengths = packing.lengths.long()
    tail = hidden.shape[0] - lengths.sum(0, keepdim=True)
    largest = torch.segment_reduce(hidden, "max", lengths=torch.cat([lengths, tail]), axis=0, unsafe=True)[:-1]
    return torch.where((lengths > 0).unsqueeze(1), largest, largest.new_zeros(()))


def mean_pool(hidden: Tensor, packing: Packing) -> Tensor:
    """The mean over the tokens of every sequence: [total, hidden] -> [batch, hidden]; zeros for empty sequences.

    Sums are taken in float32 at least, and token after token, so that the result does not vary between runs.
    """
    wide = hidden.to(accumulation_dtype(hidden.dtype))
    # The rows past the last sequence, which a Packing with a capacity can have, belong to a segment of their own.
    lengths = packing.lengths.long()
    tail = hidden.shape[0] - lengths.sum(0, keepdim=True)
    sums = torch.segment_reduce(wide, "sum", lengths=torch.cat([lengths, tail]), axis=0, unsafe=True)[:-1]
    return (sums / lengths.clamp(min=1).unsqueeze(1)).to(hidden.dtype)


class FirstTokenPooler(nn.Module):
    """tanh(dense(first real token)), BERT's pooler: [total, hidden] -> [batch, hidden]; zeros for empty sequences."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden: Tensor, packing: Packing) -> Tensor:
        """hidden: [total, hidden]; returns [batch, hidden]."""
        pooled = torch.tanh(apply_linear(first_tokens(hidden, packing), self.dense))
        return torch.where((packing.lengths > 0).unsqueeze(1), pooled, pooled.new_zeros(()))
