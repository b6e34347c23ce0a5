"""The emulated instructions one by one (csrc/simt/instructions.cpp), against what the PTX manual says of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

EPS = torch.finfo(torch.float32).eps


def number(n: int) -> Tensor:
    return torch.tensor([n], dtype=torch.int32)


def product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """1 + a b in float64, and how far from it float32 may be: products are exact there, each of k additions rounds."""
    a, b = a.double(), b.double()
    return 1 + a @ b, a.size(1) * EPS / 2 * (1 + a.abs() @ b.abs())


def check_last_place(got: Tensor, expected: Tensor) -> None:
    """expected in float64. A unit in the last place is at most eps of the value."""
    finite = expected.isfinite()
    assert torch.equal(got[~finite].double(), expected[~finite])
    assert ((got.double() - expected).abs() <= EPS * expected.abs())[finite].all()


# ---- tensor cores ----


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_mma_16_bit(simt: Any, seed: int, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    got = simt._instruction("mma_half" if dtype == torch.float16 else "mma_bfloat16", a, b)
    expected, bound = product(a, b)
    assert ((got - expected).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_mma_puts_each_element_in_its_place(simt: Any, dtype: torch.dtype) -> None:
    """Products of unit matrices: a wrong layout cannot cancel out."""
    name = "mma_half" if dtype == torch.float16 else "mma_bfloat16"
    for k in range(16):
        a = torch.zeros(16, 16, dtype=dtype)
        b = torch.zeros(16, 8, dtype=dtype)
        a[(3 * k) % 16, k] = 2
        b[k, (5 * k) % 8] = 3
        assert torch.equal(simt._instruction(name, a, b), 1 + a.float() @ b.float())


def test_mma_tf32(simt: Any, seed: int) -> None:
    torch.manual_seed(seed)
    a, b = torch.randn(16, 8), torch.randn(8, 8)

    def tf32(t: Tensor) -> Tensor:
        return (t.view(torch.int32) & ~0x1FFF).view(torch.float32).double()

    got = simt._instruction("mma_tf32", a, b)
    expected, bound = product(tf32(a), tf32(b))
    assert ((got - expected).abs() <= bound).all()
    unrounded, _ = product(a, b)
    assert ((got - unrounded).abs() > bound).any()


def test_mma_keeps_infinity_and_nan(simt: Any) -> None:
    for name, dtype in (("mma_half", torch.float16), ("mma_bfloat16", torch.bfloat16)):
        a, b = torch.ones(16, 16, dtype=dtype), torch.ones(16, 8, dtype=dtype)
        a[2, 3] = float("inf")
        a[5, 1] = float("nan")
        got = simt._instruction(name, a, b)
        assert got[2].isposinf().all() and got[5].isnan().all()
        assert got[[0, 1, 3, 4, 6, 7]].eq(17).all()


def test_subnormal_operands_count(simt: Any) -> None:
    for name, dtype in (("mma_half", torch.float16), ("mma_bfloat16", torch.bfloat16)):
        tiny = torch.finfo(dtype).smallest_normal / 4
        a = torch.full((16, 16), tiny, dtype=dtype)
        b = torch.full((16, 8), 2.0**14, dtype=dtype)
        got = simt._instruction(name, a, b)
        assert torch.equal(got, 1 + a.float() @ b.float())


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(simt: Any, seed: int, transposed: bool) -> None:
    tiles = torch.randint(-30000, 30000, (4, 8, 8), dtype=torch.int16)
    got = simt._instruction("ldmatrix_trans" if transposed else "ldmatrix", tiles, number(0))
    for lane in range(32):
        row, column = lane // 4, lane % 4 * 2
        for tile in range(4):
            t = tiles[tile].T if transposed else tiles[tile]
            assert got[lane, tile].tolist() == [int(t[row, column]), int(t[row, column + 1])]


# ---- lanes ----


def lanes_of(x: Tensor) -> Tensor:
    return x.view(-1, 32)


@pytest.mark.parametrize("n", [0, 1, 2, 7, 16, 31])
def test_shuffles(simt: Any, seed: int, n: int) -> None:
    x = torch.randn(128)
    lane = torch.arange(32)
    source = {
        "shuffle_xor": lane ^ n,
        "shuffle_up": torch.where(lane >= n, lane - n, lane),
        "shuffle_down": torch.where(lane + n < 32, lane + n, lane),
        "shuffle": torch.full((32,), n),
    }
    for name, lanes in source.items():
        assert torch.equal(lanes_of(simt._instruction(name, x, number(n))), lanes_of(x)[:, lanes]), name


def test_ballot(simt: Any, seed: int) -> None:
    votes = torch.rand(128) < 0.5
    got = simt._instruction("ballot", votes.int(), number(0)).long() & 0xFFFFFFFF
    expected = (lanes_of(votes).long() << torch.arange(32)).sum(1, keepdim=True)
    assert torch.equal(lanes_of(got), expected.expand(4, 32))


def test_reductions(simt: Any, seed: int) -> None:
    x = torch.randint(-100, 100, (128,)).float()
    assert torch.equal(
        lanes_of(simt._instruction("warp_sum", x, number(0))), lanes_of(x).sum(1, keepdim=True).expand(4, 32)
    )
    assert simt._instruction("block_sum", x, number(0)).eq(x.sum()).all()
    assert simt._instruction("block_max", x, number(0)).eq(x.max()).all()


def test_lanes_that_run_ahead(simt: Any, seed: int) -> None:
    """Two hundred collectives in a row: no lane ever sees a value of another round."""
    x = torch.randn(128)
    expected = lanes_of(x).clone()
    for i in range(200):
        positive = (expected > 0).sum(1, keepdim=True).float()
        expected = expected[:, torch.arange(32) ^ (1 << i % 5)] + positive
    assert torch.equal(lanes_of(simt._instruction("chain", x, number(200))), expected)


# ---- barriers, copies, atomics ----


@pytest.mark.parametrize("tiles", [1, 2, 3, 10])
def test_named_barriers(simt: Any, seed: int, tiles: int) -> None:
    x = torch.randn(tiles, 96)
    got = simt._instruction("producer_consumer", x, number(0))
    assert torch.equal(got.view(tiles, 96), 2 * x.flip(1))


@pytest.mark.parametrize("n", [512, 516, 3000, 4096])
def test_copy_pipeline(simt: Any, seed: int, n: int) -> None:
    x = torch.randn(n)
    tiles = -(-n // 512)
    padded = torch.cat([x, torch.zeros(tiles * 512 - n)]).view(tiles, 512)
    assert torch.equal(simt._instruction("copy_pipeline", x, number(0)), padded.flip(1).flatten()[:n])


def test_atomics(simt: Any, seed: int) -> None:
    x = torch.randint(-50, 50, (500,)).float()
    got = simt._instruction("atomics", x, number(0))
    assert got[0] == x.sum() and got.view(torch.int32)[1] == 8 * 64


@pytest.mark.parametrize("name", ["add_accumulators", "add_accumulators_paired"])
@pytest.mark.parametrize("rows", [-3, 0, 1, 4, 7, 8, 11, 16, 40])
@pytest.mark.parametrize("cols", [-8, 0, 8, 16, 64])
def test_accumulators_are_added_as_far_as_the_rows_and_columns_reach(
    simt: Any, name: str, rows: int, cols: int
) -> None:
    torch.manual_seed(rows)
    x = torch.randint(-50, 50, (16, 16)).float()  # sums of three warps are exact
    expected = torch.ones(18, 24)
    reached = x[: max(rows, 0), : max(cols, 0)]
    expected[1 : 1 + reached.size(0), 2 : 2 + reached.size(1)] += 3 * 2 * reached
    assert torch.equal(simt._instruction(name, x, torch.tensor([rows, cols], dtype=torch.int32)), expected)


def test_threads_that_ended_count_at_the_barrier(simt: Any, seed: int) -> None:
    x = torch.randn(128)
    got = simt._instruction("exit_before_barrier", x, number(0))
    assert torch.equal(got[:50], x.flip(0)[:50]) and got[50:].eq(-1).all()


def test_halves_of_a_word_are_no_race(simt: Any, seed: int) -> None:
    x = torch.randint(-30000, 30000, (128,), dtype=torch.int16)
    got = simt._instruction("half_words", x, number(0))
    assert torch.equal(got[::2], x.view(torch.int32)) and torch.equal(got[1::2], got[::2])


def test_seed_decides_the_order(simt: Any) -> None:
    def order(seed: int) -> list[int]:
        simt.configure(seed)
        return simt._instruction("order", torch.zeros(1), number(0))[1:].tolist()

    assert order(0) == list(range(512))
    assert order(5) == order(5) != order(6)
    assert sorted(order(5)) == list(range(512))


# ---- special functions ----


def test_special_functions(simt: Any) -> None:
    x = torch.cat(
        [torch.linspace(-140, 120, 120), torch.tensor([0.0, 1.0, float("inf"), -float("inf"), 1e-20, 3.0, 2.0, 0.5])]
    )
    got = simt._instruction("exp2", x, number(0))
    expected = torch.exp2(x.double())
    expected[expected < torch.finfo(torch.float32).smallest_normal] = 0
    check_last_place(got, expected)
    positive = x.abs()
    check_last_place(simt._instruction("log2", positive, number(0)), positive.double().log2())
    check_last_place(simt._instruction("reciprocal", x, number(0)), 1 / x.double())
    check_last_place(simt._instruction("rsqrt", positive, number(0)), positive.double().rsqrt())
    assert simt._instruction("exp2", torch.full((128,), float("nan")), number(0)).isnan().all()
