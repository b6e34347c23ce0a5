"""Which rank holds which tokens of a sequence, and moving sequences to and from that order.

With N ranks, and c = L / N tokens on each:

    contiguous   rank r holds tokens r c to (r + 1) c. Under a causal mask the last rank works most.
    zigzag       2 N chunks; rank r holds chunks r and 2 N - 1 - r. All ranks work alike under a causal mask.
    striped      rank r holds tokens r, r + N, r + 2 N ... (arXiv 2311.09431). Alike too, but for one row in each step.

In all of them positions rise along the rows of a rank, and padding at the end is in the last of them.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import _check
from . import _collectives
from ._group import Group, LocalGroup, execute, name_of, rank_and_size, size_of
from ._register import register_op

LAYOUTS = ("contiguous", "zigzag", "striped")


def check_layout(op: str, layout: Any) -> None:
    """Raises ValueError for a layout that does not exist."""
    if layout not in LAYOUTS:
        raise ValueError(f"{op}: layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")


def multiple_of(size: int, layout: str) -> int:
    """Returns the number that must divide the length of a sequence."""
    return 2 * size if layout == "zigzag" else size


def positions_of(rank: int, size: int, length: int, layout: str, device: torch.device | str | None = None) -> Tensor:
    """The positions of a rank's tokens in a sequence of this length, int64 [length / size]."""
    rows = torch.arange(length // size, device=device)
    if layout == "striped":
        return rows * size + rank
    if layout == "contiguous":
        return rows + rank * (length // size)
    half = length // (2 * size)
    return torch.where(rows < half, rows + rank * half, rows + (2 * size - 2 - rank) * half)


def rows_below(limit: int, rank: int, size: int, length: int, layout: str) -> int:
    """Counts the tokens of a rank with positions below limit. They are its first tokens."""

    def overlap(start: int, count: int) -> int:
        return min(max(limit - start, 0), count)

    if layout == "striped":
        return min(max(-(-(limit - rank) // size), 0), length // size)
    if layout == "contiguous":
        return overlap(rank * (length // size), length // size)
    half = length // (2 * size)
    return overlap(rank * half, half) + overlap((2 * size - 1 - rank) * half, half)


def shard_positions(
    seqlen: int,
    *,
    group: Group,
    layout: str = "zigzag",
    device: torch.device | str | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The positions of this rank's tokens, for rotary embeddings, position embeddings and masks.

    Args:
        seqlen: tokens of the whole sequence; with cu_seqlens of all sequences together.
        group: as in `ring_attention`.
        cu_seqlens: [B + 1] on a CPU, offsets of whole sequences laid end to end: positions then begin anew in each.

    Returns:
        int64 [seqlen / N]; with a LocalGroup [N, seqlen / N].

    Raises:
        ValueError: a length that the layout cannot divide among the ranks.
    """
    index, starts = _index("shard_positions", seqlen, group, layout, cu_seqlens)
    return (index if starts is None else index - starts).to(device)


def shard_sequence(
    x: Tensor,
    *,
    group: Group,
    dim: int,
    layout: str = "zigzag",
    pad: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """This rank's tokens of a sequence that every rank has whole. Nothing is sent.

    Args:
        x: any dtype, [..., L, ...] with the sequence along dim. Token ids, labels and masks are sharded alike.
        group: as in `ring_attention`.
        pad: the value to lengthen the sequence with, at its end, to what the layout can divide; pass the length
            before as `seqlen` to `ring_attention`. None: such a length is an error.
        cu_seqlens: [B + 1], sequences laid end to end along dim: each is sharded by itself.

    Returns:
        [..., L / N, ...], a copy; with a LocalGroup [N, ..., L / N, ...]. The gradient of x is 0 at tokens of others.

    Raises:
        ValueError: a length that the layout cannot divide among the ranks; pad together with cu_seqlens.
    """
    op = "shard_sequence"
    _check.tensor(op, "x", x)
    _check.integer(op, "dim", dim)
    check_layout(op, layout)
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"{op}: dim must be a dimension of x, got {dim} for {_check.describe(x)}")
    dim %= x.dim()
    if pad is not None:
        if cu_seqlens is not None:
            raise ValueError(f"{op}: pad and cu_seqlens exclude each other: lengthen the sequences themselves")
        size = group.size if isinstance(group, LocalGroup) else rank_and_size(op, group)[1]
        missing = -x.size(dim) % multiple_of(size, layout)
        if missing:
            x = F.pad(x.movedim(dim, -1), (0, missing), value=pad).movedim(-1, dim)
    index, _ = _index(op, x.size(dim), group, layout, cu_seqlens)
    taken = x.index_select(dim, index.flatten().to(x.device))
    if isinstance(group, LocalGroup):
        taken = taken.unflatten(dim, (group.size, -1)).movedim(dim, 0).contiguous()
    return taken


def shard_cu_seqlens(cu_seqlens: Tensor, *, group: Group, layout: str = "zigzag") -> Tensor:
    """Offsets of whole sequences -> those of each rank's part of them, which are the same on all ranks.

    Args:
        cu_seqlens: int32 [B + 1], on any device; its values are read only on a CPU, where lengths are checked.

    Returns:
        int32 [B + 1]: cu_seqlens / N, as `ring_attention_varlen` takes it.
    """
    op = "shard_cu_seqlens"
    check_layout(op, layout)
    size = group.size if isinstance(group, LocalGroup) else rank_and_size(op, group)[1]
    if cu_seqlens.device.type == "cpu":
        _check_lengths(op, cu_seqlens.diff().tolist(), size, layout)
    return cu_seqlens // size


def unshard_sequence(
    x: Tensor,
    *,
    group: Group,
    dim: int,
    layout: str = "zigzag",
    seqlen: int | None = None,
    cu_seqlens: Tensor | None = None,
    timeout: float | None = None,
) -> Tensor:
    """The whole sequence, on every rank, from each rank's tokens. All ranks must call it.

    Args:
        x: [..., L / N, ...], contiguous or copied, alike on all ranks.
        seqlen: the length before padding; what was added is cut off.
        cu_seqlens: [B + 1], offsets of whole sequences, as `shard_sequence` took them.
        timeout: seconds that each message may take.

    Returns:
        [..., L, ...]. Its gradient sums over ranks: that of x is the derivative of the sum of all ranks' losses. Where
        every rank computes the same loss from the whole sequence, differentiate on one, or divide by N.

    Raises:
        RingError: a rank is gone, or too slow.
    """
    op = "unshard_sequence"
    _check.tensor(op, "x", x)
    _check.integer(op, "dim", dim)
    check_layout(op, layout)
    local = isinstance(group, LocalGroup)
    shards = _gather_shards(x, name_of(op, group), timeout)  # [N, ...]; with a LocalGroup [N, N, ...]
    if local:
        shards = shards[0]
        dim = dim % (x.dim() - 1)
    else:
        dim %= x.dim()
    size = shards.size(0)
    laid = shards.movedim(0, dim).flatten(dim, dim + 1)
    index = torch.cat(
        [_index_of(op, r, size, laid.size(dim), layout, cu_seqlens)[0] for r in range(size)]
    )  # where each row belongs
    whole = laid.index_select(dim, torch.argsort(index).to(x.device))
    return whole if seqlen is None else whole.narrow(dim, 0, seqlen)


def _index(op: str, length: int, group: Any, layout: str, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor | None]:
    check_layout(op, layout)
    if isinstance(group, LocalGroup):
        every = [_index_of(op, r, group.size, length, layout, cu_seqlens) for r in range(group.size)]
        starts = None if every[0][1] is None else torch.stack([s for _, s in every if s is not None])
        return torch.stack([i for i, _ in every]), starts
    return _index_of(op, *rank_and_size(op, group), length, layout, cu_seqlens)


def _index_of(
    op: str, rank: int, size: int, length: int, layout: str, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Rows of a rank's tokens, and the rows that their sequences begin at."""
    if cu_seqlens is None:
        _check_lengths(op, [length], size, layout)
        return positions_of(rank, size, length, layout), None
    offsets = cu_seqlens.tolist()
    if offsets[-1] != length:
        raise ValueError(f"{op}: cu_seqlens must end with the {length} rows there are, got {offsets[-1]}")
    lengths = [end - start for start, end in itertools.pairwise(offsets)]
    _check_lengths(op, lengths, size, layout)
    nothing = torch.empty(0, dtype=torch.int64)
    rows = [nothing, *(positions_of(rank, size, n, layout) + s for s, n in zip(offsets[:-1], lengths, strict=True))]
    starts = [nothing, *(torch.full((n // size,), s) for s, n in zip(offsets[:-1], lengths, strict=True))]
    return torch.cat(rows), torch.cat(starts)


def _check_lengths(op: str, lengths: list[int], size: int, layout: str) -> None:
    wanted = multiple_of(size, layout)
    for number, length in enumerate(lengths):
        if length % wanted != 0:
            which = "the sequence's length" if len(lengths) == 1 else f"the length of sequence {number}"
            raise ValueError(
                f'{op}: {which} must be a multiple of {wanted} for layout "{layout}" on {size} ranks, got {length}'
            )


# --- the op that gathers ---------------------------------------------------------------------------------------------


def _gathered(x: Tensor, group: str, timeout: float | None) -> Tensor:
    return execute("unshard_sequence", group, timeout, _collectives.gather, x.contiguous())


def _gathered_fake(x: Tensor, group: str, timeout: float | None) -> Tensor:
    return x.new_empty((*(x.shape[:1] if LocalGroup.named(group) else ()), size_of(group), *_own(x, group)))


def _own(x: Tensor, group: str) -> tuple[int, ...]:
    """The shape of one rank's tensor."""
    return tuple(x.shape[1:] if LocalGroup.named(group) else x.shape)


def _summed(x: Tensor, group: str, timeout: float | None) -> Tensor:
    return execute("unshard_sequence", group, timeout, _collectives.reduce_scatter, x.contiguous())


def _summed_fake(x: Tensor, group: str, timeout: float | None) -> Tensor:
    return x.new_empty((*(x.shape[:1] if LocalGroup.named(group) else ()), *_own(x, group)[1:]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.group, ctx.timeout = inputs


def _gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return _sum_shards(gradient, ctx.group, ctx.timeout), None, None


_sum_shards = register_op(
    "ring_reduce_scatter(Tensor x, str group, float? timeout) -> Tensor", _summed, fake=_summed_fake
)
_gather_shards = register_op(
    "ring_gather(Tensor x, str group, float? timeout) -> Tensor",
    _gathered,
    fake=_gathered_fake,
    backward=_gradient,
    setup_context=_setup,
)
