"""varlen_attention's kernels for compute capability 9.0 in the emulator, and the choice between them and mma.sync's."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import checks, oracle
from helpers.backends import FEW_SMS, HALF, order_of
from helpers.cases import AttentionCase, attention_inputs, offsets, random
from helpers.compare import assert_close

HEAD_DIMS = (64, 128)
HOPPER = "varlen_attention_forward_hopper"
# Of head_dim 64 by its queries at a time, of 128 by its keys at a time.
LARGE = {64: "<64, 192, 128", 128: "<128, 128, 176"}
SMALL = {64: "<64, 128, 128", 128: "<128, 128, 128"}

# Below, at and past the ends of all blocks of 64, 128, 176 and 192.
LENGTHS = (0, 1, 63, 64, 65, 127, 128, 129, 175, 176, 177, 191, 192, 193, 300)


@pytest.fixture(autouse=True)
def machine(simt: Any, request: pytest.FixtureRequest) -> Iterator[None]:
    """A machine of compute capability 9.0, and again after the test."""
    simt.configure(order_of(request.node.name), FEW_SMS)  # of which few tiles are enough
    yield
    simt.claim()


def _kernel(simt: Any) -> str:
    """The kernel of the last launch."""
    return str(simt.launches()[-1]["kernel"])


def _check(simt: Any, case: AttentionCase, dtype: torch.dtype, tile: str = "") -> None:
    """The case on a Hopper kernel, of this tile."""
    checks.check_attention(simt, case, dtype, backward=False)
    assert HOPPER in _kernel(simt) and tile in _kernel(simt)


def _name(case: Any) -> str:
    return str(case).removeprefix("torch.")


# ---- results ----


@pytest.mark.parametrize("dtype", HALF, ids=_name)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_lengths(simt: Any, head_dim: int, dtype: torch.dtype) -> None:
    """All lengths in one call, where every sequence but the last is followed by another."""
    _check(simt, AttentionCase("", LENGTHS, heads=1, head_dim=head_dim), dtype, LARGE[head_dim])


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_causal_lengths(simt: Any, head_dim: int) -> None:
    case = AttentionCase("", LENGTHS[::-1], heads=1, head_dim=head_dim, causal=True)
    tile = LARGE[64] if head_dim == 64 else SMALL[128]
    _check(simt, case, HALF[head_dim // 64 % 2], tile)


# Of each case every head dimension takes one dtype.
CASES = (
    AttentionCase("small", (256, 65), heads=1),
    AttentionCase("gqa", (70, 130), (40, 200), heads=4, heads_k=2),
    AttentionCase("causal_more_keys", (65, 140), (300, 150), heads=2, heads_k=1, causal=True),
    AttentionCase("causal_fewer_keys", (300, 150), (65, 130), heads=1, causal=True),
    AttentionCase("window", (300, 65), heads=1, window=(40, 20)),
    AttentionCase("window_wide", (520,), heads=1, window=(320, 30)),
    AttentionCase("window_left", (200, 70), (330, 60), heads=1, window=(150, -1)),
    AttentionCase("window_right", (200, 70), (330, 60), heads=1, window=(-1, 90)),
    AttentionCase("window_causal", (400,), heads=1, causal=True, window=(200, 5)),
    AttentionCase("window_fewer_keys", (200, 100), (40, 5), heads=1, window=(3, 2)),
    AttentionCase("softcap", (140, 66), heads=1, softcap=3.0, score_spread=4.0),
    AttentionCase("softcap_large", (130,), heads=1, softcap=3000.0, score_spread=4.0),
    AttentionCase("alibi", (140, 66), heads=2, heads_k=1, slopes="heads"),
    AttentionCase("alibi_batch_causal", (40, 140), (150, 100), heads=2, slopes="batch", causal=True),
    AttentionCase("everything", (140, 0, 70), (200, 3, 20), heads=2, heads_k=1, softcap=5.0, slopes="batch",
                  causal=True, window=(150, -1), softmax_scale=0.3, rows_past_the_end=3),
    AttentionCase("rows_past_the_end", (130, 0, 70), (129, 7, 180), heads=1, rows_past_the_end=9),
    AttentionCase("no_keys", (70, 130), (0, 0), heads=1, rows_past_the_end=1),
    AttentionCase("qkv_slices", (66, 130), heads=3, layout="qkv"),
    AttentionCase("scale", (130,), heads=1, softmax_scale=0.37),
    AttentionCase("sharp", (130, 300), heads=1, score_spread=30.0),
)  # fmt: skip


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(simt: Any, case: AttentionCase, head_dim: int) -> None:
    dtype = HALF[(CASES.index(case) + head_dim // 64) % 2]
    _check(simt, dataclasses.replace(case, head_dim=head_dim), dtype)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_orders_of_threads(simt: Any, seed: int, head_dim: int) -> None:
    """The same bits in every order, with two and three consumers and several blocks of keys."""
    results = []
    for order in (seed, seed + 100):
        simt.configure(order)
        torch.manual_seed(0)
        x = attention_inputs(AttentionCase("", (200,), (400,), heads=1, head_dim=head_dim), torch.bfloat16)
        results.append(_call(simt, x.q, x.k, x.v, (200,), (400,))[0])
    assert torch.equal(*results)


# ---- what must not be read ----


def _call(
    simt: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths_q: tuple[int, ...],
    lengths_k: tuple[int, ...],
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """out and lse."""
    most = (
        max(lengths_q) if max_seqlen_q is None else max_seqlen_q,
        max(lengths_k) if max_seqlen_k is None else max_seqlen_k,
    )
    out, lse = simt.varlen_attention(q, k, v, offsets(lengths_q), offsets(lengths_k), *most, **options)
    return out, lse


@pytest.mark.parametrize("bad", (math.nan, math.inf), ids=("nan", "inf"))
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_neighbours_stay_apart(simt: Any, head_dim: int, bad: float) -> None:
    """Boxes read on into the next sequence; what it holds changes no bit, wherever the end lies in a block."""
    lengths = (70, 66, 129, 30, 177, 5)
    total = sum(lengths)
    q, k, v = (random(total, 1, head_dim, dtype=torch.float16) for _ in range(3))
    clean = _call(simt, q, k, v, lengths, lengths)
    sequence = torch.repeat_interleave(torch.tensor(lengths))
    rows = sequence % 2 == 0
    for t in (q, k, v):
        t[~rows] = bad
    dirty = _call(simt, q, k, v, lengths, lengths)
    assert HOPPER in _kernel(simt)
    assert torch.equal(clean[0][rows], dirty[0][rows]) and torch.equal(clean[1][:, rows], dirty[1][:, rows])


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rows_of_no_sequence(simt: Any, head_dim: int) -> None:
    """Before the first and after the last sequence, NaN in all of them."""
    q, k, v = (random(250, 1, head_dim, dtype=torch.bfloat16) for _ in range(3))
    for t in (q, k, v):
        t[:20] = math.nan
        t[200:] = math.nan
    cu_seqlens = torch.tensor([20, 90, 200], dtype=torch.int32)
    out, lse = simt.varlen_attention(q, k, v, cu_seqlens, cu_seqlens, 110, 110)
    assert HOPPER in _kernel(simt)
    inner = (t[20:200] for t in (q, k, v))
    expected = _call(simt, *(t.clone() for t in inner), (70, 110), (70, 110))
    assert torch.equal(out[20:200], expected[0]) and torch.equal(lse[:, 20:200], expected[1])
    for rows in (slice(0, 20), slice(200, 250)):
        assert (out[rows] == 0).all() and (lse[:, rows] == -math.inf).all()


@pytest.mark.parametrize("causal", (False, True), ids=("full", "causal"))
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_max_seqlen_cuts(simt: Any, head_dim: int, causal: bool) -> None:
    """Queries and keys past max_seqlen take no part, whatever the keys and values hold."""
    lengths_q, lengths_k, most_q, most_k = (150, 70), (200, 140), 100, 130
    q = random(sum(lengths_q), 1, head_dim, dtype=torch.bfloat16)
    k, v = (random(sum(lengths_k), 1, head_dim, dtype=torch.bfloat16) for _ in range(2))
    for begin, length in ((0, 200), (200, 140)):
        k[begin + most_k : begin + length] = math.nan
        v[begin + most_k : begin + length] = math.nan
    out, lse = _call(
        simt, q, k, v, lengths_q, lengths_k, max_seqlen_q=most_q, max_seqlen_k=most_k,
        window_size_right=0 if causal else -1,
    )  # fmt: skip
    assert HOPPER in _kernel(simt)

    begin_q = begin_k = 0
    for lq, lk in zip(lengths_q, lengths_k, strict=True):
        seen = oracle.visible(lq, lk, causal, (-1, -1), torch.device("cpu"))[:most_q, :most_k]
        live = min(lq, most_q)
        results = []
        for dtype in (torch.float64, torch.bfloat16):
            one_q = q[begin_q : begin_q + live, 0].to(dtype)
            one_k, one_v = (t[begin_k : begin_k + most_k, 0].to(dtype) for t in (k, v))
            score = (one_q @ one_k.T * head_dim**-0.5).masked_fill(~seen, -math.inf)
            results.append((torch.softmax(score, -1) @ one_v, torch.logsumexp(score, -1)))
        (expected, expected_lse), (eager, eager_lse) = results
        assert_close("out", out[begin_q : begin_q + live, 0], expected, eager)
        assert_close("lse", lse[0, begin_q : begin_q + live], expected_lse, eager_lse)
        assert (out[begin_q + live : begin_q + lq] == 0).all()
        assert (lse[:, begin_q + live : begin_q + lq] == -math.inf).all()
        begin_q, begin_k = begin_q + lq, begin_k + lk


@pytest.mark.parametrize("values", ([0, 1000, 20], [5, -7, 140], [2**31 - 1, -(2**31), 7], [3, 9, 20]))
def test_bad_offsets_stay_in_bounds(simt: Any, values: list[int]) -> None:
    """The emulator reports accesses outside of tensors."""
    q = random(140, 1, 64, dtype=torch.float16)
    bad = torch.tensor(values, dtype=torch.int32)
    good = torch.tensor([0, 70, 140], dtype=torch.int32)
    for cu_q, cu_k in ((bad, bad), (good, bad), (bad, good)):
        out, _ = simt.varlen_attention(q, q, q, cu_q, cu_k, 70, 70, window_size_right=0)
        assert out.shape == (140, 1, 64) and HOPPER in _kernel(simt)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_strided_inputs(simt: Any, head_dim: int) -> None:
    """Heads in front of tokens, and heads and columns that are parts of wider tensors."""
    heads, total = 2, 130
    expected = None
    q, k, v = (random(total, heads, head_dim, dtype=torch.float16) for _ in range(3))
    for layout in ("contiguous", "heads_first", "wide_heads"):
        changed = []
        for t in (q, k, v):
            if layout == "heads_first":
                t = t.transpose(0, 1).contiguous().transpose(0, 1)
            elif layout == "wide_heads":
                wide = torch.full((total, heads + 1, head_dim + 16), math.nan, dtype=torch.float16)
                wide[:, 1:, 8:-8] = t
                t = wide[:, 1:, 8:-8]
            changed.append(t)
        found = _call(simt, *changed, (100, 30), (100, 30))
        assert HOPPER in _kernel(simt)
        expected = expected or found
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1]), layout


# ---- the choice of kernels ----


def _small_call(simt: Any, head_dim: int = 64, length: int = 65, keys: int | None = None) -> str:
    q = random(length, 1, head_dim, dtype=torch.float16)
    k = random(length if keys is None else keys, 1, head_dim, dtype=torch.float16)
    simt.varlen_attention(q, k, k, offsets([length]), offsets([k.size(0)]), length, k.size(0))
    return _kernel(simt)


def test_hopper_is_chosen(simt: Any) -> None:
    assert all(HOPPER in _small_call(simt, head_dim) for head_dim in HEAD_DIMS)


@pytest.mark.parametrize(
    ("head_dim", "queries", "keys", "options", "tile"),
    [
        (64, 192, 70, {}, LARGE),
        (64, 300, 70, {"window_size_right": 0}, LARGE),
        (64, 128, 70, {}, SMALL),
        (64, 256, 70, {}, SMALL),  # 384 rows of the large tile, 256 of the small one
        (64, 192, 70, {"softcap": 2.0}, SMALL),
        (128, 70, 176, {}, LARGE),
        (128, 70, 300, {}, LARGE),
        (128, 70, 128, {}, SMALL),
        (128, 70, 256, {}, SMALL),
        (128, 70, 176, {"window_size_right": 0}, SMALL),
        (128, 70, 176, {"window_size_left": 100}, SMALL),
        (128, 70, 176, {"softcap": 2.0}, SMALL),
    ],
)
def test_choice_of_tiles(
    simt: Any, head_dim: int, queries: int, keys: int, options: dict[str, Any], tile: dict[int, str]
) -> None:
    q = random(queries, 1, head_dim, dtype=torch.float16)
    k = random(keys, 1, head_dim, dtype=torch.float16)
    _call(simt, q, k, k, (queries,), (keys,), **options)
    assert HOPPER in _kernel(simt) and tile[head_dim] in _kernel(simt)


@pytest.mark.parametrize("head_dim", (32, 56, 72, 96, 120, 136))
def test_other_head_dims_take_mma_sync(simt: Any, head_dim: int) -> None:
    assert HOPPER not in _small_call(simt, head_dim)


def test_few_queries_take_mma_sync(simt: Any) -> None:
    assert HOPPER not in _small_call(simt, length=64)


@pytest.mark.parametrize(("sm_count", "taken"), [(8, True), (9, False)])
def test_few_tiles_take_mma_sync(simt: Any, sm_count: int, taken: bool) -> None:
    """A sequence of 384 queries and one head has four places for tiles, one of which stays empty."""
    simt.configure(1, sm_count)
    assert (HOPPER in _small_call(simt, length=384)) == taken


def test_few_large_tiles_are_small_ones(simt: Any) -> None:
    """Tiles of 192 queries take longer each, so that there must be several for every multiprocessor."""
    q = random(192, 1, 64, dtype=torch.float16)
    for sm_count, tile in ((1, LARGE), (2, SMALL)):
        simt.configure(1, sm_count)
        _call(simt, q, q, q, (192,), (192,))
        assert tile[64] in _kernel(simt)


def test_no_keys_take_mma_sync(simt: Any) -> None:
    """No tensor map describes a tensor without tokens."""
    assert HOPPER not in _small_call(simt, keys=0)


@pytest.mark.parametrize("capability", (80, 89, 100, 120))
def test_other_gpus_take_mma_sync(simt: Any, capability: int) -> None:
    simt.claim(capability=capability)
    assert HOPPER not in _small_call(simt)


def test_switched_off(simt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WARPFORM_HOPPER", "0")
    assert HOPPER not in _small_call(simt)
    monkeypatch.setenv("WARPFORM_HOPPER", "1")
    assert HOPPER in _small_call(simt)


def test_without_tensor_maps(simt: Any) -> None:
    simt.claim(tensor_maps=False)
    assert HOPPER not in _small_call(simt)


def test_the_driver_is_blamed_once(simt: Any) -> None:
    """In a process of its own: others may have said it already."""
    program = """
        import torch
        from helpers.backends import simt_library

        simt = simt_library()
        simt.claim(tensor_maps=False)
        q, cu_seqlens = torch.zeros(65, 1, 64).half(), torch.tensor([0, 65], dtype=torch.int32)
        for _ in range(2):
            simt.varlen_attention(q, q, q, cu_seqlens, cu_seqlens, 65, 65)
    """
    paths = [str(Path(__file__).parents[1]), *filter(None, sys.path)]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "WARPFORM_SIMT_LIBRARY": str(simt.path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    lines = [line for line in done.stderr.splitlines() if "cuTensorMapEncodeTiled" in line]
    assert len(lines) == 1 and lines[0].startswith("warpform: the driver has no"), done.stderr
