"""Packing: the places of the tokens of a padded batch once its padding is dropped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops import _check, encoder


@dataclass(frozen=True, eq=False)
class Packing:
    """The map between a padded batch [batch_size, seqlen, ...] and its tokens laid end to end [total, ...].

    A pytree of its tensors and max_seqlen, so torch.compile and torch.export take it as an argument. Made by
    `from_mask` or `from_lengths`; a batch is packed once, and every layer reads the same offsets.

    Attributes:
        cu_seqlens: int32 [B + 1]: sequence b has rows cu_seqlens[b] to cu_seqlens[b + 1].
        lengths: int32 [B].
        indices: int64 [total]: position b * seqlen + s of each row, -1 where a row holds no token (with a capacity).
        position_ids: int64 [total]: s of each row, a token's place in its padded row; 0 where it holds none.
        ranks: int32 [B, seqlen]: the row of each token, -1 where masked.
        max_seqlen: at least the longest of lengths; with a capacity it is seqlen, which needs no read of the device.
    """

    cu_seqlens: Tensor
    lengths: Tensor
    indices: Tensor
    position_ids: Tensor
    ranks: Tensor
    max_seqlen: int

    @property
    def total(self) -> int:
        """Rows of a packed tensor: the number of tokens, or the capacity."""
        return self.indices.size(0)

    @property
    def batch_size(self) -> int:
        """Sequences."""
        return self.ranks.size(0)

    @property
    def seqlen(self) -> int:
        """The padded length of a sequence."""
        return self.ranks.size(1)

    @classmethod
    def from_mask(cls, mask: Tensor, capacity: int | None = None) -> Packing:
        """The packing of a padded batch whose tokens are where mask is not zero.

        Args:
            mask: bool or integer [B, S], any pattern: padding on the right, on the left, holes.
            capacity: rows to pack into, whatever the number of tokens. Then nothing is read from the device, and a
                captured CUDA graph or a compiled function serves batches of any lengths. None: one read of the device
                gives total and max_seqlen; torch.compile(fullgraph=True) and torch.export make symbols of them. On the
                meta device, and for fake tensors, there is nothing to read, and it is batch * seqlen.

        Raises:
            TypeError: mask is not a bool or integer tensor, or capacity is not an int.
            ValueError: mask is not two-dimensional, or capacity is negative or below the number of tokens. The last is
                seen on a CPU and with WARPFORM_VALIDATE=1; otherwise, and under tracing, tokens past the capacity are
                dropped.
        """
        if capacity is None:
            if not isinstance(mask, Tensor) or mask.dim() != 2:
                encoder.packing_plan(mask, 0)  # raises, and says why
            if not _check.has_values(mask):
                capacity = mask.numel()
            else:
                *plan, summary = encoder.packing_plan(mask, mask.numel())
                total, max_seqlen = _read(summary, mask.size(0), mask.size(1))
                return cls._of_plan(plan, max_seqlen, total)
        *plan, summary = encoder.packing_plan(mask, capacity)
        if _check.cheap_to_read(mask):
            total = int(summary[0])
            if total > capacity:
                raise ValueError(f"Packing.from_mask: capacity must be at least the {total} tokens, got {capacity}")
        return cls._of_plan(plan, mask.size(1))

    @classmethod
    def from_lengths(
        cls,
        lengths: Sequence[int] | Tensor,
        seqlen: int | None = None,
        capacity: int | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> Packing:
        """The packing of a batch padded on the right, from the lengths of its sequences.

        Args:
            lengths: B integers, or an integer tensor [B], whose device the packing is on.
            seqlen: the padded length, by default the longest.
            capacity: as in `from_mask`; with a tensor on a GPU it needs seqlen too, for nothing to be read.
            device: where the packing goes, for lengths that are not a tensor.

        Raises:
            TypeError: lengths are not integers, or seqlen or capacity is not an int.
            ValueError: lengths are not one-dimensional or negative, or longer than seqlen, or more than the capacity in
                sum. Of a tensor on a GPU, with seqlen and a capacity, this is seen with WARPFORM_VALIDATE=1 only;
                otherwise lengths are clamped to [0, seqlen] and tokens past the capacity dropped.
        """
        op = "Packing.from_lengths"
        for name, size in (("seqlen", seqlen), ("capacity", capacity)):
            if size is not None:
                _check.integer(op, name, size)
                if size < 0:
                    raise ValueError(f"{op}: {name} must not be negative, got {size}")
        if not isinstance(lengths, Tensor):
            lengths = list(lengths)
            for length in lengths:
                _check.integer(op, "each of lengths", length)
            lengths = torch.tensor(lengths, dtype=torch.int64)
        elif lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
            raise TypeError(f"{op}: lengths must be integers, got {_check.describe(lengths)}")
        elif device is None:
            device = lengths.device
        if lengths.dim() != 1:
            raise ValueError(f"{op}: lengths must be of shape [batch], got {_check.describe(lengths)}")

        to_find = seqlen is None or capacity is None
        if to_find and not _check.has_values(lengths):
            if seqlen is None:
                raise ValueError(f"{op}: seqlen must be given where lengths have no values, got a meta or fake tensor")
            capacity = lengths.size(0) * seqlen
        elif to_find and torch.compiler.is_compiling():
            found = lengths.clamp(0, seqlen).to(torch.int64)
            total, longest = _read(torch.stack([found.sum(), F.pad(found, (0, 1)).amax()]), lengths.size(0), seqlen)
            seqlen = longest if seqlen is None else seqlen
        elif to_find or _check.cheap_to_read(lengths):
            host: list[int] = lengths.tolist()
            longest, total = max(host, default=0), sum(host)
            if min(host, default=0) < 0:
                raise ValueError(f"{op}: lengths must not be negative, got {min(host)}")
            if seqlen is not None and longest > seqlen:
                raise ValueError(f"{op}: lengths must be at most seqlen, {seqlen}, got {longest}")
            if capacity is not None and total > capacity:
                raise ValueError(f"{op}: capacity must be at least the {total} tokens, got {capacity}")
            seqlen = longest if seqlen is None else seqlen
        assert seqlen is not None
        lengths = lengths.to(device)
        mask = torch.arange(seqlen, device=lengths.device) < lengths.unsqueeze(1)
        if capacity is not None:
            *plan, _ = encoder.packing_plan(mask, capacity)
            return cls._of_plan(plan, seqlen)
        *plan, _ = encoder.packing_plan(mask, total)
        return cls._of_plan(plan, longest, total)

    @classmethod
    def _of_plan(cls, plan: Sequence[Tensor], max_seqlen: int, total: int | None = None) -> Packing:
        cu_seqlens, lengths, indices, position_ids, ranks = plan
        if total is not None:
            # A slice would give each a size of its own where total is known only when a traced program runs.
            indices, position_ids = indices.narrow(0, 0, total), position_ids.narrow(0, 0, total)
        return cls(cu_seqlens, lengths, indices, position_ids, ranks, max_seqlen)

    def to(self, device: torch.device | str | int, non_blocking: bool = False, copy: bool = False) -> Packing:
        """The same packing with its tensors on `device`; itself where they are there already and copy is False.

        A batch of tensors is moved with the same arguments. Index tensors have one dtype, so none may be given.

        Args:
            device: as of `torch.Tensor.to`.
            non_blocking: as of `torch.Tensor.to`: from pinned memory, without waiting.
            copy: new tensors in any case.

        Raises:
            TypeError: a dtype, or a tensor, in place of the device.
        """
        if not isinstance(device, (torch.device, str, int)) or isinstance(device, bool):
            raise TypeError(f"Packing.to: device must be a device, got {device!r}; its tensors keep their dtypes")
        return self._each(lambda t: t.to(device=device, non_blocking=non_blocking, copy=copy))

    def cpu(self) -> Packing:
        """The same packing with its tensors on the CPU."""
        return self.to("cpu")

    def cuda(self, device: torch.device | str | int | None = None, non_blocking: bool = False) -> Packing:
        """The same packing with its tensors on a GPU, by default the current one."""
        return self.to("cuda" if device is None else device, non_blocking=non_blocking)

    def pin_memory(self, device: torch.device | str | None = None) -> Packing:
        """The same packing with its tensors in page-locked memory; a DataLoader with pin_memory=True calls it."""
        return self._each(lambda t: t.pin_memory() if device is None else t.pin_memory(device))

    def _each(self, function: Callable[[Tensor], Tensor]) -> Packing:
        tensors = (self.cu_seqlens, self.lengths, self.indices, self.position_ids, self.ranks)
        cu_seqlens, lengths, indices, position_ids, ranks = moved = tuple(map(function, tensors))
        if all(new is old for new, old in zip(moved, tensors, strict=True)):
            return self
        return Packing(cu_seqlens, lengths, indices, position_ids, ranks, self.max_seqlen)

    def pack(self, x: Tensor) -> Tensor:
        """x [batch_size, seqlen, ...] -> its tokens [total, ...], any dtype; rows with no token are 0. Differentiable.

        Raises:
            ValueError: x has other leading sizes or is on another device.
        """
        return encoder.pack(x, self.indices, self.ranks)

    def unpack(self, t: Tensor) -> Tensor:
        """t [total, ...] -> [batch_size, seqlen, ...], 0 where masked. Differentiable.

        Raises:
            ValueError: t has another leading size or is on another device.
        """
        return encoder.unpack(t, self.indices, self.ranks)


def _read(summary: Tensor, batch: int, seqlen: int | None) -> tuple[int, int]:
    """The number of tokens and the longest sequence. To a compiler they are symbols, whose bounds it is told."""
    total, longest = summary.tolist()
    if torch.compiler.is_compiling():
        torch._check(longest >= 0)
        torch._check(total >= 0)
        if seqlen is not None:
            torch._check(longest <= seqlen)
            torch._check(total <= batch * seqlen)
    return total, longest


# torch.export.save keeps the example inputs, and torch.export.load reads back classes that it was told are safe.
torch.serialization.add_safe_globals([Packing])
torch.export.register_dataclass(Packing, serialized_type_name="warpform.Packing")
