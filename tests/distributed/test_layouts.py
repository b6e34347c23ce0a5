"""Which rank holds which tokens, and the way there and back."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from warpform.distributed import LocalGroup, shard_cu_seqlens, shard_positions, shard_sequence, unshard_sequence
from warpform.distributed.layouts import positions_of, rows_below

LAYOUTS = ("contiguous", "zigzag", "striped")


def test_positions_as_they_are_written_down() -> None:
    assert [positions_of(r, 2, 8, "contiguous").tolist() for r in (0, 1)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [positions_of(r, 2, 8, "striped").tolist() for r in (0, 1)] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert [positions_of(r, 2, 8, "zigzag").tolist() for r in (0, 1)] == [[0, 1, 6, 7], [2, 3, 4, 5]]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("size", "inner"), [(1, None), (2, None), (5, None), (8, 2), (6, 3)])
def test_there_and_back(layout: str, size: int, inner: int | None) -> None:
    group, length = LocalGroup(size, inner), 4 * size
    x = torch.randn(2, length, 3, dtype=torch.float64, requires_grad=True)
    shards = shard_sequence(x, group=group, dim=1, layout=layout)
    positions = shard_positions(length, group=group, layout=layout)
    assert shards.shape == (size, 2, 4, 3) and positions.shape == (size, 4)
    assert (positions.diff() > 0).all(), "positions rise, so padding is last"
    assert torch.equal(x[0][positions], shards[:, 0])
    whole = unshard_sequence(shards, group=group, dim=1, layout=layout)
    assert torch.equal(whole, x)
    weight = torch.randn_like(x)
    (whole * weight).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, weight)
    for rank, limit in itertools.product(range(size), range(-1, length + 2)):
        assert rows_below(limit, rank, size, length, layout) == (positions[rank] < limit).sum()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_all_ranks_are_summed(layout: str) -> None:
    """On every rank the whole is used; a rank's part gets what all of them found, undivided."""
    group = LocalGroup(3)
    x = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    whole = torch.ops.warpform.ring_gather(x, group.name, None)  # [rank, part, 2, 5]
    weight = torch.randn_like(whole)
    (whole * weight).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, weight.sum(0), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_and_sequences_end_to_end(layout: str) -> None:
    group = LocalGroup(3)
    ids = torch.arange(19)
    shards = shard_sequence(ids, group=group, dim=0, layout=layout, pad=-1)
    assert int((shards == -1).sum()) == 24 - 19 if layout == "zigzag" else 21 - 19
    assert torch.equal(unshard_sequence(shards, group=group, dim=0, layout=layout, seqlen=19), ids)
    cu_seqlens = torch.tensor([0, 12, 12, 18], dtype=torch.int32)
    rows = torch.randn(18, 2)
    shards = shard_sequence(rows, group=group, dim=0, layout=layout, cu_seqlens=cu_seqlens)
    own = shard_cu_seqlens(cu_seqlens, group=group, layout=layout)
    assert own.dtype == torch.int32 and own.tolist() == [0, 4, 4, 6]
    positions = shard_positions(18, group=group, layout=layout, cu_seqlens=cu_seqlens)
    assert torch.equal(rows[:12][positions[:, :4]], shards[:, :4])
    assert torch.equal(rows[12:][positions[:, 4:]], shards[:, 4:])
    back = unshard_sequence(shards, group=group, dim=0, layout=layout, cu_seqlens=cu_seqlens)
    assert torch.equal(back, rows)


def test_bad_input() -> None:
    group, x = LocalGroup(2), torch.randn(6, 3)
    with pytest.raises(ValueError, match='must be a multiple of 4 for layout "zigzag" on 2 ranks, got 6'):
        shard_sequence(x, group=group, dim=0)
    with pytest.raises(ValueError, match="length of sequence 1 must be a multiple of 2"):
        shard_cu_seqlens(torch.tensor([0, 2, 5], dtype=torch.int32), group=group, layout="striped")
    with pytest.raises(ValueError, match="layout must be one of"):
        shard_positions(6, group=group, layout="diagonal")
    with pytest.raises(ValueError, match="dim must be a dimension of x"):
        shard_sequence(x, group=group, dim=2, layout="striped")
    with pytest.raises(ValueError, match="exclude each other"):
        shard_sequence(x, group=group, dim=0, pad=0.0, cu_seqlens=torch.tensor([0, 6]))
    with pytest.raises(ValueError, match="cu_seqlens must end with the 6 rows"):
        shard_sequence(x, group=group, dim=0, layout="striped", cu_seqlens=torch.tensor([0, 4]))
    with pytest.raises(TypeError, match="group must be a ProcessGroup"):
        shard_sequence(x, group="world", dim=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="multiple of inner_size"):
        LocalGroup(6, 4)
    assert math.prod(shard_sequence(x[:0], group=group, dim=0).shape) == 0
