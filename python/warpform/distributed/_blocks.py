"""Which queries of a rank meet which keys of another, by layout, and how to take and put back those rows.

Under a causal mask, for a rank and the source of the keys that it holds in this step:

    contiguous   source = rank: causal; before it: everything; after it: nothing
    zigzag       source = rank: causal; before it: all queries x the first half of the keys; after it: the second half
                 of the queries x all keys. Positions rise along both chunks, so the first step's mask goes by rows
    striped      causal by positions rank + i N and source + j N, in every step
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .layouts import rows_below


@dataclass(frozen=True)
class Block:
    """Rows are "all", "first" half or "last" half of a rank's; positions are those of `warpform.ops.attention_step`."""

    q_rows: str = "all"
    k_rows: str = "all"
    causal: bool = False
    q_offset: int = 0
    k_offset: int = 0
    stride: int = 1

    @property
    def mask(self) -> dict[str, Any]:
        """The keywords of a step."""
        return {
            "causal": self.causal, "q_offset": self.q_offset, "k_offset": self.k_offset, "q_stride": self.stride,
            "k_stride": self.stride,
        }  # fmt: skip


def block_of(layout: str, causal: bool, rank: int, source: int, size: int) -> Block | None:
    """Returns the block that rank computes while it holds the keys of source; None if it computes none."""
    if not causal:
        return Block()
    if layout == "striped":
        return Block(causal=True, q_offset=rank, k_offset=source, stride=size)
    if source == rank:
        return Block(causal=True)
    if layout == "contiguous":
        return Block() if source < rank else None
    return Block(k_rows="first") if source < rank else Block(q_rows="last")


class DenseRows:
    """Rows of tensors [B, L, ...] of one rank: ranges. Rows of padding, which are its last, are in none of them.

    seqlen: tokens of the whole sequence before padding; None: all.
    """

    cu_seqlens_of: dict[str, Tensor | None] = {"all": None, "first": None, "last": None}

    def __init__(self, length: int, layout: str, rank: int, size: int, seqlen: int | None) -> None:
        self._length = length
        limit = length * size if seqlen is None else seqlen
        self._real = [rows_below(limit, r, size, length * size, layout) for r in range(size)]
        self._rank = rank

    def _range(self, rows: str, rank: int) -> tuple[int, int]:
        real, half = self._real[rank], self._length // 2
        start = min(half, real) if rows == "last" else 0
        return start, (min(half, real) if rows == "first" else real) - start

    def covers_all(self, rows: str) -> bool:
        """Tells whether these are all rows of this rank."""
        return rows == "all" and self._real[self._rank] == self._length

    def queries(self, t: Tensor, rows: str) -> Tensor:
        """t [B, L, ...]."""
        return t.narrow(1, *self._range(rows, self._rank))

    def of_queries(self, t: Tensor, rows: str) -> Tensor:
        """t [B, H, L], such as lse."""
        return t.narrow(2, *self._range(rows, self._rank))

    def put_queries(self, t: Tensor, rows: str, new: Tensor) -> None:
        """t [B, L, ...]."""
        self.queries(t, rows).copy_(new)

    def put_of_queries(self, t: Tensor, rows: str, new: Tensor) -> None:
        """t [B, H, L]."""
        self.of_queries(t, rows).copy_(new)

    def keys(self, t: Tensor, rows: str, source: int) -> Tensor:
        """t [B, L, ...], which rank source brought."""
        return t.narrow(1, *self._range(rows, source))

    def add_keys(self, t: Tensor, rows: str, source: int, new: Tensor) -> None:
        """t [B, L, ...], of rank source."""
        self.keys(t, rows, source).add_(new)


class VarlenRows:
    """Rows of tensors [T, ...] of one rank, B sequences laid end to end; halves are of each sequence.

    cu_seqlens: int32 [B + 1], of this rank's parts. Its values stay on the device.
    """

    def __init__(self, cu_seqlens: Tensor, total: int, with_halves: bool) -> None:
        self.cu_seqlens_of: dict[str, Tensor | None] = {"all": cu_seqlens}
        self._index: dict[str, Tensor] = {}
        if with_halves:
            half = cu_seqlens // 2
            rows = torch.arange(total // 2, dtype=half.dtype, device=half.device)
            sequence = torch.searchsorted(half[1:].contiguous(), rows, right=True)
            # Row j of all first halves is row j - half[b] of its sequence, which begins at 2 half[b]. Rows past the
            # last sequence hold nothing; they follow it in both.
            last = half.numel() - 1
            self._index["first"] = rows + half[sequence]
            self._index["last"] = rows + half[(sequence + 1).clamp(max=last)]
            self.cu_seqlens_of["first"] = self.cu_seqlens_of["last"] = half

    def covers_all(self, rows: str) -> bool:
        """Tells whether these are all rows of this rank."""
        return rows == "all"

    def queries(self, t: Tensor, rows: str) -> Tensor:
        """t [T, ...]."""
        return t if rows == "all" else t.index_select(0, self._index[rows])

    def of_queries(self, t: Tensor, rows: str) -> Tensor:
        """t [H, T], such as lse."""
        return t if rows == "all" else t.index_select(1, self._index[rows])

    def put_queries(self, t: Tensor, rows: str, new: Tensor) -> None:
        """t [T, ...]."""
        t.index_copy_(0, self._index[rows].long(), new)

    def put_of_queries(self, t: Tensor, rows: str, new: Tensor) -> None:
        """t [H, T]."""
        t.index_copy_(1, self._index[rows].long(), new)

    def keys(self, t: Tensor, rows: str, source: int) -> Tensor:
        """t [T, ...], which rank source brought."""
        return self.queries(t, rows)

    def add_keys(self, t: Tensor, rows: str, source: int, new: Tensor) -> None:
        """t [T, ...]."""
        if rows == "all":
            t.add_(new)
        else:
            t.index_add_(0, self._index[rows], new)


Rows = DenseRows | VarlenRows
