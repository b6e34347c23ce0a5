"""warpform.Packing: the map between a padded batch and its tokens."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import strategies as st

import warpform
from helpers import cases, oracle
from helpers.drawn import drawn
from warpform import Packing
from warpform.ops import encoder


@pytest.mark.parametrize("case", [c for c in cases.MASK_CASES if c.capacity is None], ids=str)
@pytest.mark.parametrize("dtype", (torch.bool, torch.int64))
def test_from_mask(case: cases.MaskCase, dtype: torch.dtype) -> None:
    mask = case.mask().to(dtype)
    packing = Packing.from_mask(mask)
    total = int(mask.bool().sum())
    plan = oracle.packing_plan(mask.tolist(), total)
    for name in ("cu_seqlens", "lengths", "indices", "position_ids", "ranks"):
        assert getattr(packing, name).tolist() == plan[name], name
    assert (packing.total, packing.max_seqlen) == tuple(plan["summary"])
    assert (packing.batch_size, packing.seqlen) == tuple(mask.shape)
    assert packing.cu_seqlens.dtype == packing.lengths.dtype == packing.ranks.dtype == torch.int32
    assert packing.indices.dtype == packing.position_ids.dtype == torch.int64


@drawn(
    60,
    lengths=st.lists(st.integers(0, 9), max_size=6),
    extra=st.none() | st.integers(0, 3),
    spare=st.none() | st.integers(0, 5),
)
def test_from_lengths_is_from_a_mask_padded_on_the_right(
    lengths: list[int], extra: int | None, spare: int | None
) -> None:
    longest = max(lengths, default=0)
    seqlen = None if extra is None else longest + extra
    capacity = None if spare is None else sum(lengths) + spare
    width = longest if seqlen is None else seqlen
    mask = torch.tensor([[s < n for s in range(width)] for n in lengths]).view(len(lengths), width).bool()
    expected = Packing.from_mask(mask, capacity)
    for given_lengths in (lengths, torch.tensor(lengths, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int64)):
        packing = Packing.from_lengths(given_lengths, seqlen, capacity)
        for name in ("cu_seqlens", "lengths", "indices", "position_ids", "ranks"):
            assert torch.equal(getattr(packing, name), getattr(expected, name)), name
        assert (packing.max_seqlen, packing.total, packing.seqlen) == (
            expected.max_seqlen,
            expected.total,
            expected.seqlen,
        )


def test_round_trip_with_holes() -> None:
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 1]])
    packing = Packing.from_mask(mask)
    x = torch.randn(3, 4, 2, 5)
    x[mask == 0] = float("nan")
    t = packing.pack(x)
    assert torch.equal(t, x[mask.bool()])
    assert torch.equal(packing.unpack(t), torch.where(mask.bool()[:, :, None, None], x, 0.0))
    ids = torch.arange(12).view(3, 4)
    assert packing.pack(ids).tolist() == [0, 2, 3, 9, 11]
    assert packing.position_ids.tolist() == [0, 2, 3, 1, 3]


def test_with_a_capacity_sizes_do_not_depend_on_the_mask() -> None:
    for mask in (torch.ones(2, 4), torch.zeros(2, 4), torch.eye(2, 4)):
        packing = Packing.from_mask(mask.bool(), capacity=9)
        assert (packing.total, packing.max_seqlen, packing.seqlen) == (9, 4, 4)
        tokens = int(mask.sum())
        assert packing.cu_seqlens[-1] == tokens
        packed = packing.pack(torch.ones(2, 4, 3))
        assert packed.shape == (9, 3) and packed[:tokens].all() and not packed[tokens:].any()
        assert torch.equal(packing.unpack(packed)[..., 0], mask)


def test_one_read_of_the_device_and_none_with_a_capacity(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    tolist = torch.Tensor.tolist

    class Device(torch.Tensor):
        """Stands for a tensor whose values cost a synchronisation."""

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if function in (
                tolist,
                torch.Tensor.item,
                torch.Tensor.__int__,
                torch.Tensor.__bool__,
                torch.Tensor.__index__,
            ):
                reads.append(function.__name__)
            return super().__torch_function__(function, types, args, kwargs or {})

    plan = encoder._packing_plan
    monkeypatch.setattr(encoder, "_packing_plan", lambda *a: tuple(t.as_subclass(Device) for t in plan(*a)))
    Packing.from_mask(torch.ones(2, 3).bool())
    assert reads == ["tolist"]
    # A capacity costs a read on a CPU, where it is free and gives an error in time; elsewhere it costs none.
    reads.clear()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    Packing.from_mask(torch.ones(2, 3).bool(), capacity=4)
    Packing.from_lengths(torch.tensor([2, 3]).as_subclass(Device), seqlen=3, capacity=5)
    assert reads == []


@pytest.mark.parametrize("capacity", (None, 0, 5))
def test_nothing_to_pack(capacity: int | None) -> None:
    for packing in (
        Packing.from_mask(torch.zeros(0, 4).bool(), capacity),
        Packing.from_lengths([], capacity=capacity),
        Packing.from_mask(torch.zeros(2, 0).bool(), capacity),
        Packing.from_lengths([0, 0], capacity=capacity),
    ):
        rows = capacity or 0
        assert packing.total == rows and not packing.cu_seqlens.any()
        x = torch.randn(packing.batch_size, packing.seqlen, 3)
        assert packing.pack(x).shape == (rows, 3)
        assert packing.unpack(torch.randn(rows, 3)).shape == x.shape
        q = torch.randn(rows, 2, 8)
        out = warpform.ops.varlen_attention(
            q, q, q, packing.cu_seqlens, packing.cu_seqlens, packing.max_seqlen, packing.max_seqlen
        )
        assert out.shape == q.shape and not out.any()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    (
        (lambda: Packing.from_mask(torch.ones(3).bool()), ValueError, r"mask must be of shape \[batch, seqlen\]"),
        (
            lambda: Packing.from_mask(torch.ones(1, 1, 3).bool()),
            ValueError,
            r"mask must be .* got bool of shape \[1, 1, 3\]",
        ),
        (lambda: Packing.from_mask(torch.ones(2, 3)), TypeError, r"mask must be bool or integer, got float32"),
        (lambda: Packing.from_mask(torch.ones(2, 3), 6), TypeError, r"mask must be bool or integer, got float32"),
        (lambda: Packing.from_mask([[1, 1]]), TypeError, r"mask must be a tensor"),
        (
            lambda: Packing.from_mask(torch.ones(2, 3).bool(), 5),
            ValueError,
            r"capacity must be at least the 6 tokens, got 5",
        ),
        (lambda: Packing.from_mask(torch.ones(2, 3).bool(), -5), ValueError, r"capacity must not be negative, got -5"),
        (lambda: Packing.from_mask(torch.ones(2, 3).bool(), 6.0), TypeError, r"capacity must be an int, got 6.0"),
        (lambda: Packing.from_lengths([2, -1]), ValueError, r"lengths must not be negative, got -1"),
        (
            lambda: Packing.from_lengths(torch.tensor([2, -1]), 4, 9),
            ValueError,
            r"lengths must not be negative, got -1",
        ),
        (lambda: Packing.from_lengths([2, 5], seqlen=4), ValueError, r"lengths must be at most seqlen, 4, got 5"),
        (
            lambda: Packing.from_lengths([2, 5], capacity=6),
            ValueError,
            r"capacity must be at least the 7 tokens, got 6",
        ),
        (lambda: Packing.from_lengths([2, 5], seqlen=-1), ValueError, r"seqlen must not be negative, got -1"),
        (lambda: Packing.from_lengths([2, 5], seqlen=5.5), TypeError, r"seqlen must be an int, got 5.5"),
        (lambda: Packing.from_lengths([2, 5.5]), TypeError, r"each of lengths must be an int, got 5.5"),
        (lambda: Packing.from_lengths(torch.ones(2)), TypeError, r"lengths must be integers, got float32"),
        (lambda: Packing.from_lengths(torch.ones(2).bool()), TypeError, r"lengths must be integers, got bool"),
        (
            lambda: Packing.from_lengths(torch.ones(2, 2).int()),
            ValueError,
            r"lengths must be of shape \[batch\], got int32",
        ),
        (
            lambda: Packing.from_lengths([2]).pack(torch.ones(2, 2)),
            ValueError,
            r"pack: x must be of shape \[1, 2, '...'\]",
        ),
        (
            lambda: Packing.from_lengths([2]).unpack(torch.ones(3)),
            ValueError,
            r"unpack: t must be of shape \[2, '...'\]",
        ),
    ),
)
def test_bad_input(make, error: type[Exception], message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        make()


@pytest.mark.gpu
def test_a_captured_graph_serves_changing_batches() -> None:
    capacity, batch, seqlen = 64, 4, 16
    x = torch.randn(batch, seqlen, 2, 32, device="cuda", dtype=torch.float16)
    mask = torch.zeros(batch, seqlen, dtype=torch.bool, device="cuda")

    def run() -> torch.Tensor:
        packing = Packing.from_mask(mask, capacity)
        return packing.unpack(packing.pack(x) * 2)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for _ in range(3):
        mask.copy_(torch.rand(batch, seqlen, device="cuda") > 0.5)
        x.normal_()
        graph.replay()
        assert torch.equal(out, torch.where(mask[:, :, None, None], x * 2, 0))


def test_to_moves_every_tensor() -> None:
    packing = Packing.from_lengths([2, 0, 3])
    for given in (("meta",), (torch.device("meta"),), ("meta", True)):
        moved = packing.to(*given)
        assert all(leaf.is_meta for leaf in torch.utils._pytree.tree_leaves(moved) if isinstance(leaf, torch.Tensor))
        assert (moved.total, moved.max_seqlen, moved.seqlen) == (5, 3, 3)
    assert packing.to("cpu") is packing and packing.cpu() is packing and packing.to(device="cpu") is packing
    copied = packing.to("cpu", non_blocking=True, copy=True)
    assert copied is not packing and torch.equal(copied.ranks, packing.ranks)
    for bad in (torch.float16, packing.lengths, None):
        with pytest.raises(TypeError, match="Packing.to: device must be a device"):
            packing.to(bad)


def test_a_data_loader_pins_a_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU there is no page-locked memory: what is asked of each tensor is counted."""
    from torch.utils.data._utils.pin_memory import pin_memory

    asked: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t, *device: asked.append(t) or t.clone())
    packing = Packing.from_lengths([2, 0, 3])
    pinned = pin_memory({"packing": packing})["packing"]
    assert isinstance(pinned, Packing) and len(asked) == 5
    assert torch.equal(pinned.indices, packing.indices) and pinned.max_seqlen == 3


def test_a_packing_goes_through_workers() -> None:
    packing = Packing.from_lengths([2, 0, 3])
    for again in (pickle.loads(pickle.dumps(packing)), copy.deepcopy(packing)):
        assert torch.equal(again.ranks, packing.ranks) and again.max_seqlen == 3


def test_without_values_every_place_has_a_row() -> None:
    assert Packing.from_mask(torch.ones(2, 4, dtype=torch.bool, device="meta")).total == 8
    lengths = torch.ones(3, dtype=torch.int64, device="meta")
    assert Packing.from_lengths(lengths, seqlen=5).total == 15
    with pytest.raises(ValueError, match="seqlen must be given where lengths have no values"):
        Packing.from_lengths(lengths)
