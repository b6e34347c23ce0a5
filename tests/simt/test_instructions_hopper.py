"""The emulated instructions of compute capability 9.0 one by one (csrc/simt/instructions_hopper.cpp): mbarriers, TMA,
stores of matrices, warpgroups and their products, against what the PTX manual says of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

EPS = torch.finfo(torch.float32).eps
NOTHING = torch.zeros(1)


def shorts(*sizes: int) -> Tensor:
    return torch.randint(-30000, 30000, sizes, dtype=torch.int16)


def run(simt: Any, name: str, a: Tensor, b: Tensor = NOTHING, settings: Sequence[int] = ()) -> Tensor:
    out: Tensor = simt._hopper_instruction(name, a, b, list(settings))
    return out


# ---- mbarriers ----


@pytest.mark.parametrize("rounds", [1, 2, 7])
def test_phases(simt: Any, seed: int, rounds: int) -> None:
    x = torch.randn(128)
    expected = x
    for _ in range(rounds):
        expected = expected.roll(-37) + 1
    assert torch.equal(run(simt, "mbarrier_rounds", x, settings=[rounds]), expected)


def test_waits_of_single_threads(simt: Any, seed: int) -> None:
    x = torch.randn(128)
    assert torch.equal(run(simt, "mbarrier_single_waits", x), x.flip(0))


def test_arrivals_and_bytes(simt: Any, seed: int) -> None:
    x = shorts(128)
    assert torch.equal(run(simt, "mbarrier_counts", x), x + 1)


@pytest.mark.parametrize("name", [f"ring_of_copies_{n}" for n in (2, 3, 4)] + [f"ring_of_stores_{n}" for n in (2, 3)])
@pytest.mark.parametrize("n", [96, 97, 1000])
def test_rings(simt: Any, seed: int, name: str, n: int) -> None:
    x = shorts(n)
    tiles = -(-n // 96)
    padded = torch.cat([x, x.new_zeros(tiles * 96 - n)]).view(tiles, 96)
    assert torch.equal(run(simt, name, x), padded.flip(1))


# ---- TMA ----

NONE, K32, K64, K128 = range(4)
SPANS = {NONE: 16, K32: 32, K64: 64, K128: 128}


@dataclass(frozen=True)
class Box:
    """A tensor of int16 in a buffer, and the box of it that one copy brings; dimension 0 is the contiguous one."""

    sizes: tuple[int, ...]
    box: tuple[int, ...]
    at: tuple[int, ...]
    swizzle: int = NONE
    strides: tuple[int, ...] | None = None  # of the dimensions from 1 on, in elements; None: one behind the other
    first: int = 0

    def all_strides(self) -> tuple[int, ...]:
        if self.strides is not None:
            return (1, *self.strides)
        return tuple(itertools.accumulate((1, *self.sizes[:-1]), int.__mul__))

    def settings(self) -> list[int]:
        def three(values: Sequence[int], fill: int) -> list[int]:
            return [*values, *[fill] * (3 - len(values))]

        strides = three(self.all_strides(), 0)[1:]
        return [
            *(len(self.sizes), self.swizzle, *three(self.sizes, 1), *strides),
            *(*three(self.box, 1), *three(self.at, 0), self.first),
        ]

    def buffer(self) -> Tensor:
        """Long enough for the tensor, and not a byte longer; gaps between its rows hold other numbers."""
        last = sum((size - 1) * stride for size, stride in zip(self.sizes, self.all_strides(), strict=True))
        return shorts(self.first + last + 1)

    def expected(self, buffer: Tensor) -> Tensor:
        """The box as it lies in shared memory."""
        out = torch.zeros(*reversed(self.box), dtype=torch.int16)
        for index in itertools.product(*map(range, self.box)):
            place = [at + i for at, i in zip(self.at, index, strict=True)]
            if all(0 <= i < size for i, size in zip(place, self.sizes, strict=True)):
                element = self.first + sum(i * s for i, s in zip(place, self.all_strides(), strict=True))
                out[tuple(reversed(index))] = buffer[element]
        return swizzled(out.flatten(), self.swizzle)


def swizzled(linear: Tensor, swizzle: int) -> Tensor:
    """Exchanges chunks of 16 bytes: bits 4 to 6 of an address by bits 7 to 9, as many of them as the swizzle has."""
    out = torch.empty_like(linear)
    mask = SPANS[swizzle] - 16
    for chunk in range(linear.numel() // 8):
        byte = chunk * 16
        to = (byte ^ (byte >> 3 & mask)) // 2
        out[to : to + 8] = linear[chunk * 8 : chunk * 8 + 8]
    return out


BOXES = {
    "line": Box((200,), (64,), (32,)),
    "line, past its end": Box((200,), (64,), (160,)),
    "line, before its beginning": Box((200,), (64,), (-24,)),
    "line, not in it at all": Box((200,), (64,), (300,)),
    "line, longer than the tensor": Box((20,), (64,), (0,)),
    "line from inside of the buffer": Box((100,), (256,), (7,), first=48),
    "rows": Box((64, 20), (64, 8), (0, 4), K128),
    "rows, some of their columns": Box((192, 20), (64, 16), (128, 2), K128),
    "rows, past both ends": Box((100, 20), (64, 16), (64, 12), K128, strides=(104,)),
    "rows, before both beginnings": Box((100, 20), (64, 16), (-16, -5), K128, strides=(104,)),
    "rows, around the tensor": Box((24, 5), (64, 24), (-8, -9), K128),
    "rows of 64 bytes": Box((96, 40), (32, 32), (32, 3), K64),
    "rows of 64 bytes, past both ends": Box((40, 10), (32, 32), (16, 3), K64),
    "rows of 32 bytes": Box((48, 40), (16, 64), (16, -3), K32),
    "rows of 16 bytes": Box((48, 70), (8, 64), (24, 3), NONE),
    "rows without a swizzle": Box((100, 20), (40, 9), (64, 14), NONE, strides=(112,)),
    "rows with gaps": Box((72, 10), (64, 8), (8, 4), K128, strides=(104,)),
    "heads": Box((64, 3, 30), (64, 1, 24), (0, 2, 10), K128, strides=(64, 192)),
    "heads, second dimension outermost": Box((64, 3, 30), (64, 1, 24), (0, 1, 3), K128, strides=(64 * 30, 64)),
    "heads, one of no tensor": Box((64, 3, 30), (64, 1, 8), (0, 3, 10), K128),
    "several of each dimension": Box((40, 5, 7), (32, 3, 4), (16, 3, -2), K64, strides=(48, 256), first=8),
    "256 rows": Box((8, 300), (8, 256), (0, 44), NONE),
}


@pytest.mark.parametrize("name", BOXES)
def test_boxes(simt: Any, seed: int, name: str) -> None:
    box = BOXES[name]
    buffer = box.buffer()
    assert torch.equal(run(simt, "tma", buffer, settings=box.settings()), box.expected(buffer))


# ---- warps ----


@pytest.mark.parametrize("transposed", [False, True])
def test_stmatrix(simt: Any, seed: int, transposed: bool) -> None:
    registers = shorts(32, 4, 2)
    got = run(simt, "stmatrix_trans" if transposed else "stmatrix", registers)
    for lane in range(32):
        row, column = lane // 4, lane % 4 * 2
        for tile in range(4):
            t = got[tile].T if transposed else got[tile]
            assert registers[lane, tile].tolist() == [int(t[row, column]), int(t[row, column + 1])]


@pytest.mark.parametrize("name", ["stmatrix_ldmatrix", "stmatrix_ldmatrix_trans"])
def test_ldmatrix_is_the_inverse(simt: Any, seed: int, name: str) -> None:
    registers = shorts(32, 4, 2)
    assert torch.equal(run(simt, name, registers), registers)


def test_one_lane_is_elected(simt: Any, seed: int) -> None:
    calls = run(simt, "elect", NOTHING, settings=[5]).view(5, 4, 32)
    assert calls.sum(2).eq(1).all()
    assert torch.equal(calls, calls[:1].expand(5, 4, 32)), "the same lane at each call"


def test_the_seed_draws_the_elected_lane(simt: Any) -> None:
    lanes = set()
    for seed in range(1, 6):
        simt.configure(seed)
        lanes |= set(run(simt, "elect", NOTHING, settings=[1]).view(4, 32).argmax(1).tolist())
    assert len(lanes) > 1


@pytest.mark.parametrize("threads", [384, 512])
def test_registers_that_fit(simt: Any, seed: int, threads: int) -> None:
    x = torch.randn(threads)
    assert torch.equal(run(simt, f"registers_{threads}", x), 2 * x)


@pytest.mark.parametrize("warpgroups", [2, 3])
def test_warpgroups_take_turns(simt: Any, seed: int, warpgroups: int) -> None:
    got = run(simt, f"turns_{warpgroups}", NOTHING, settings=[4])
    assert torch.equal(got, torch.arange(warpgroups, dtype=torch.int32).expand(4, warpgroups))


# ---- products ----

DTYPES = (torch.float16, torch.bfloat16)
COLUMNS = (64, 96, 128, 176, 192, 256)
LAYOUTS = tuple(f"{a}_{b}" for a in ("shared", "transposed", "registers") for b in ("depth", "outer"))


def multiply(simt: Any, layout: str, a: Tensor, b: Tensor) -> Tensor:
    """1 + a [64, 64] times b [64, columns], laid out as the layout says."""
    name = f"wgmma_{str(a.dtype).removeprefix('torch.')}_{b.size(1)}_{layout}"
    left = a.T if layout.startswith("transposed") else a
    right = b if layout.endswith("outer") else b.T
    return run(simt, name, left.contiguous(), right.contiguous())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("columns", COLUMNS)
def test_wgmma(simt: Any, columns: int, layout: str) -> None:
    for dtype in DTYPES:
        a, b = torch.randn(64, 64).to(dtype), torch.randn(64, columns).to(dtype)
        exact, sizes = 1 + a.double() @ b.double(), 1 + a.double().abs() @ b.double().abs()
        apart = (multiply(simt, layout, a, b) - exact).abs()
        assert (apart <= 64 * EPS / 2 * sizes).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_wgmma_puts_each_element_in_its_place(simt: Any, layout: str) -> None:
    """One term in each row and column at most: what is read from a wrong place cannot cancel out."""
    columns, dtype = (176, torch.bfloat16) if layout.startswith("shared") else (96, torch.float16)
    a, b = torch.zeros(64, 64, dtype=dtype), torch.zeros(64, columns, dtype=dtype)
    depth = torch.arange(64)
    a[torch.randperm(64), depth] = (1 + depth).to(dtype)
    b[depth, torch.randperm(columns)[:64]] = 2
    assert torch.equal(multiply(simt, layout, a, b).double(), 1 + a.double() @ b.double())


def test_wgmma_in_orders_of_threads(simt: Any, seed: int) -> None:
    for layout in ("shared_depth", "registers_outer"):
        a, b = torch.randint(-8, 9, (64, 64)).bfloat16(), torch.randint(-8, 9, (64, 128)).bfloat16()
        assert torch.equal(multiply(simt, layout, a, b).double(), 1 + a.double() @ b.double())


@pytest.mark.parametrize("layout", ["shared_depth", "registers_outer"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wgmma_keeps_infinity_and_nan_and_counts_subnormals(simt: Any, layout: str, dtype: torch.dtype) -> None:
    a, b = torch.ones(64, 64, dtype=dtype), torch.ones(64, 64, dtype=dtype)
    a[2, 3], a[50, 41] = torch.inf, torch.nan
    got = multiply(simt, layout, a, b)
    rest = [row for row in range(64) if row not in (2, 50)]
    assert got[2].isposinf().all() and got[50].isnan().all() and got[rest].eq(65).all()
    tiny = torch.finfo(dtype).smallest_normal / 4
    a, b = torch.full_like(a, tiny), torch.full_like(b, 2.0**14)
    assert torch.equal(multiply(simt, layout, a, b), 1 + a.float() @ b.float())


def test_two_groups_under_way(simt: Any, seed: int) -> None:
    a, b = torch.randint(-8, 9, (64, 64)).bfloat16(), torch.randint(-8, 9, (128, 64)).bfloat16()
    got = run(simt, "wgmma_two_groups", a, b)
    assert torch.equal(got.double(), (a.double() @ b.double().T).view(64, 2, 64).transpose(0, 1))


@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_pipeline_of_two_products(simt: Any, seed: int, blocks: int) -> None:
    """Sums of whole numbers: all steps are exact, in float32 and in what is rounded to 16 bit."""
    q = torch.randint(-1, 2, (64, 64)).bfloat16()
    kv = torch.randint(-2, 3, (blocks, 64, 192)).bfloat16()
    got = run(simt, "wgmma_pipeline", q, kv, [blocks])
    k, v = kv.double().split([64, 128], 2)
    assert torch.equal(got.double(), sum(q.double() @ k[j].T @ v[j] for j in range(blocks)))


def test_gathered_operand_and_epilogue(simt: Any, seed: int) -> None:
    x, index = torch.randint(-1, 2, (100, 64)).bfloat16(), torch.randint(0, 100, (64,), dtype=torch.int32)
    rows = x[index.long()].double()
    assert torch.equal(run(simt, "wgmma_gathered", x, index).double(), rows @ rows.T)


@pytest.mark.parametrize("length", [0, 1, 40, 63, 64])
def test_tail_is_zeroed_between_tma_and_product(simt: Any, seed: int, length: int) -> None:
    p, v = torch.zeros(64, 64), torch.randint(-8, 9, (64, 64)).bfloat16()
    p[:, :length] = torch.randint(-8, 9, (64, length)).float()
    v[length:] = torch.nan
    got = run(simt, "wgmma_tail", p.bfloat16(), v, [length, 1])
    assert torch.equal(got.double(), p.double() @ v.nan_to_num().double())


def test_a_tail_that_is_not_zeroed_makes_nan(simt: Any, seed: int) -> None:
    p, v = torch.zeros(64, 64), torch.ones(64, 64)
    p[:, :40], v[40:] = 1, torch.nan
    assert run(simt, "wgmma_tail", p.bfloat16(), v.bfloat16(), [40, 0]).isnan().all()
