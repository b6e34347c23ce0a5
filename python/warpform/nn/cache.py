"""What the branches of a stack keep of the tokens that they have seen, for generation.

Each core makes the part that it needs and alone reads it; here are the places of tokens in all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class KeyValueCache:
    """The keys and values of B sequences at one attention, in buffers that are allocated once.

    Args:
        batch: B.
        capacity: tokens that a sequence can come to.
        heads, head_dim: of keys and values.
        device, dtype: of the buffers.
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        heads: int,
        head_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = (batch, capacity, heads, head_dim)
        self.keys, self.values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))

    def append(self, key: Tensor, value: Tensor, places: CachePlaces) -> tuple[Tensor, Tensor]:
        """Writes key and value [T, H, D] to their places.

        Returns:
            All rows of the buffers, [rows, H, D], in the order that `places.cu_seqlens_k` counts.

        Raises:
            RuntimeError: key or value needs a gradient, which does not go through a cache.
        """
        if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
            raise RuntimeError("KeyValueCache: gradients do not go through a cache; decode under torch.no_grad()")
        for buffer, new in ((self.keys, key), (self.values, value)):
            buffer.flatten(0, 1).index_copy_(0, places.written, new.to(buffer.dtype))
        keys, values = self.keys.flatten(0, 1), self.values.flatten(0, 1)
        return keys[: places.used], values[: places.used]


@dataclass
class CachePlaces:
    """Where in every buffer of [B, capacity] rows the tokens of one call go, and which rows their queries see.

    The rows of a buffer that are not in use are sequences of keys too, which have no queries: nothing is moved or
    gathered.

    Attributes:
        written: int64 [T]: the row of each new token.
        used: so many of the first rows hold all keys.
        cu_seqlens_q, cu_seqlens_k: int32 offsets of queries and keys, of all sequences and of what is not in use.
        max_seqlen_k: at least the longest of those.
        lengths: of each sequence with the new tokens.
    """

    written: Tensor
    used: int
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_k: int
    lengths: list[int]


class Caches:
    """The caches of all branches of a stack, for B sequences, each at its own length.

    Args:
        parts: for each branch what its core keeps, or None where it keeps nothing.
        batch: B.
        capacity: tokens that a sequence can come to.
        device: of the buffers.

    Attributes:
        lengths: the number of tokens of each sequence so far.
    """

    def __init__(self, parts: Sequence[Any], batch: int, capacity: int, device: torch.device) -> None:
        self.parts = list(parts)
        self.capacity = capacity
        self.device = device
        self.lengths = [0] * batch

    def place(self, counts: Sequence[int], rows: Sequence[int]) -> tuple[Tensor, Tensor, CachePlaces]:
        """Where new tokens go: counts[i] of them, at least 1, in sequence rows[i]; rows increase.

        Returns:
            int64 [T], the place of each new token in its sequence; int32 [len(rows) + 1], the offsets of the new
            tokens; and their places in the buffers.

        Raises:
            ValueError: rows that do not increase or that there are not, another number of counts, a count below 1, or a
                sequence that would come to more tokens than the capacity.
        """
        rows, counts = list(rows), list(counts)
        batch = len(self.lengths)
        if not rows or rows != sorted(set(rows)) or rows[0] < 0 or rows[-1] >= batch:
            raise ValueError(f"Caches: rows must be some of 0 to {batch - 1}, increasing, got {rows}")
        if len(counts) != len(rows) or min(counts) < 1:
            raise ValueError(f"Caches: each of the {len(rows)} rows must get at least one token, got {counts}")
        capacity, before = self.capacity, [self.lengths[row] for row in rows]
        after = [have + count for have, count in zip(before, counts, strict=True)]
        if max(after) > capacity:
            raise ValueError(f"Caches: a sequence may have at most {capacity} tokens, got {max(after)}")
        lengths = list(self.lengths)
        for row, length in zip(rows, after, strict=True):
            lengths[row] = length
        positions = torch.cat([torch.arange(one, other) for one, other in zip(before, after, strict=True)])
        starts = torch.tensor([row * capacity for row in rows]).repeat_interleave(torch.tensor(counts))
        offsets = _offsets(counts)
        if batch == 1:
            keys, queries, used, longest = [after[0]], [counts[0]], after[0], after[0]
        else:
            new = dict(zip(rows, counts, strict=True))
            keys = [part for length in lengths for part in (length, capacity - length)]
            queries = [part for row in range(batch) for part in (new.get(row, 0), 0)]
            used, longest = batch * capacity, capacity
        places = CachePlaces(
            (positions + starts).to(self.device),
            used,
            _offsets(queries).to(self.device),
            _offsets(keys).to(self.device),
            longest,
            lengths,
        )
        return positions.to(self.device), offsets.to(self.device), places

    def rewind(self, row: int, length: int) -> None:
        """Forgets what sequence `row` has past its first `length` tokens, so that other tokens can take their places.

        Raises:
            ValueError: a length that the sequence does not have, or a branch that keeps a state in place of tokens.
        """
        if not 0 <= length <= self.lengths[row]:
            raise ValueError(f"Caches: length must be from 0 to the {self.lengths[row]} tokens there are, got {length}")
        for part in self.parts:
            if part is not None and not isinstance(part, KeyValueCache):
                raise ValueError(f"Caches: a {type(part).__name__} cannot be taken back to an earlier token")
        self.lengths[row] = length


def _offsets(lengths: list[int]) -> Tensor:
    return F.pad(torch.tensor(lengths, dtype=torch.int64).cumsum(0), (1, 0)).to(torch.int32)
