"""flash_attn_with_kvcache: what it writes into the cache, and attention to what is used of it, by the oracle."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers import oracle
from helpers.compare import assert_close
from helpers.compilations import Compilations
from warpform.compat.flash_attn import flash_attn_with_kvcache

BATCH, SEQLEN, CAPACITY, HEADS, HEADS_K, HEAD_DIM = 3, 4, 11, 4, 2, 16
USED = [5, 0, 7]  # with 4 new ones: 9, 4, 11, the last fills its cache
SLOPES = torch.tensor([[0.5, 0.25, 0.1, 0.05], [0.3, 0.2, 0.4, 0.6], [0.1, 0.7, 0.2, 0.3]])
MODES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "causal": ({"causal": True}, {"causal": True}),
    "scale": ({"softmax_scale": 0.3}, {"softmax_scale": 0.3}),
    "window": ({"window_size": torch.tensor([3, 1])}, {"window": (3, 1)}),
    "softcap": ({"softcap": 1.5, "causal": True}, {"softcap": 1.5, "causal": True}),
    "alibi": ({"alibi_slopes": SLOPES[0], "causal": True}, {"slopes": SLOPES[0], "causal": True}),
    "alibi of each sequence": ({"alibi_slopes": SLOPES}, {"slopes": SLOPES}),
}


def make(seed: int, *, batch_cache: int = BATCH, new: int = SEQLEN, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k_cache, v_cache, k, v; what is not used of the caches is NaN."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(BATCH, SEQLEN, HEADS, HEAD_DIM), *[(batch_cache, CAPACITY, HEADS_K, HEAD_DIM)] * 2]
    shapes += [(BATCH, new, HEADS_K, HEAD_DIM)] * 2
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def turn(x: Tensor, cos: Tensor, sin: Tensor, places: list[list[int]], interleaved: bool) -> Tensor:
    """x [B, L, H, D] rotated pair by pair: pairs of the first 2 * cos.size(1) components, token i at places[b][i]."""
    out, half = x.clone(), cos.size(1)
    for b, of_row in enumerate(places):
        for i, place in enumerate(of_row):
            for j in range(half):
                one, two = (2 * j, 2 * j + 1) if interleaved else (j, j + half)
                c, s = cos[place, j].to(x.dtype), sin[place, j].to(x.dtype)
                out[b, i, :, one] = x[b, i, :, one] * c - x[b, i, :, two] * s
                out[b, i, :, two] = x[b, i, :, one] * s + x[b, i, :, two] * c
    return out


def check(
    found: tuple[Tensor, Tensor],
    q: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    how: dict[str, Any],
) -> None:
    """found is attention of q[b] to keys[b], values[b], each [sk, Hkv, D]."""
    inputs = [q.flatten(0, 1), torch.cat(keys), torch.cat(values)]
    lengths = [SEQLEN] * len(keys), [len(key) for key in keys]
    out64, lse64 = oracle.varlen_attention(*(t.double() for t in inputs), *lengths, **how)
    eager, eager_lse = oracle.varlen_attention(*inputs, *lengths, **how)
    out, lse = found
    assert out.shape == q.shape and lse.shape == (len(keys), HEADS, SEQLEN)
    assert_close("out", out.flatten(0, 1), out64, eager)
    assert_close("lse", lse.transpose(0, 1).flatten(1), lse64, eager_lse.float())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("new", [0, 4, 2])
def test_append_and_attend(mode: str, new: int) -> None:
    """New keys and values go behind the used ones; nothing else of the cache changes or is looked at."""
    how, oracle_how = MODES[mode]
    q, k_cache, v_cache, k, v = make(1, new=max(new, 1))
    for cache in (k_cache, v_cache):
        for b, used in enumerate(USED):
            cache[b, used:] = math.nan
    expected_k, expected_v = k_cache.clone(), v_cache.clone()
    if new:
        for b, used in enumerate(USED):
            expected_k[b, used : used + new], expected_v[b, used : used + new] = k[b], v[b]
    lengths = torch.tensor(USED, dtype=torch.int32)
    found = flash_attn_with_kvcache(
        q, k_cache, v_cache, *((k, v) if new else ()), cache_seqlens=lengths, return_softmax_lse=True, **how
    )
    assert torch.equal(k_cache.nan_to_num(9.0), expected_k.nan_to_num(9.0))
    assert torch.equal(v_cache.nan_to_num(9.0), expected_v.nan_to_num(9.0))
    assert lengths.tolist() == USED
    keys, values = ([cache[b, : used + new] for b, used in enumerate(USED)] for cache in (expected_k, expected_v))
    check(found, q, keys, values, oracle_how)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("mode", ["plain", "causal", "window"])
@pytest.mark.parametrize("rotary_dim", [16, 8])
def test_rotary(interleaved: bool, mode: str, rotary_dim: int) -> None:
    how, oracle_how = MODES[mode]
    q, k_cache, v_cache, k, v = make(2)
    angles = torch.rand(CAPACITY + 3, rotary_dim // 2, generator=torch.Generator().manual_seed(3)) * 2 * math.pi
    cos, sin = angles.cos(), angles.sin()
    each = [[used + i for i in range(SEQLEN)] for used in USED]
    turned_q = turn(q, cos, sin, [[used] * SEQLEN for used in USED] if mode == "plain" else each, interleaved)
    turned_k = turn(k, cos, sin, each, interleaved)
    found = flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cos, sin, torch.tensor(USED), rotary_interleaved=interleaved,
        return_softmax_lse=True, **how,
    )  # fmt: skip
    for b, used in enumerate(USED):
        assert_close("k_cache", k_cache[b, used : used + SEQLEN], turned_k[b].double(), turned_k[b])
    keys, values = ([cache[b, : used + SEQLEN] for b, used in enumerate(USED)] for cache in (k_cache, v_cache))
    check(found, turned_q, keys, values, oracle_how)


def test_rows_of_the_cache_by_index() -> None:
    q, k_cache, v_cache, k, v = make(4, batch_cache=5)
    before = k_cache.clone()
    rows = torch.tensor([4, 1, 2], dtype=torch.int32)
    found = flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=torch.tensor(USED), cache_batch_idx=rows, causal=True,
        return_softmax_lse=True,
    )  # fmt: skip
    for b, row in enumerate(rows.tolist()):
        assert torch.equal(k_cache[row, USED[b] : USED[b] + SEQLEN], k[b])
        assert torch.equal(v_cache[row, USED[b] : USED[b] + SEQLEN], v[b])
        before[row, USED[b] : USED[b] + SEQLEN] = k[b]
    assert torch.equal(k_cache, before)
    places = [(row, USED[b] + SEQLEN) for b, row in enumerate(rows.tolist())]
    keys, values = ([cache[row, :end] for row, end in places] for cache in (k_cache, v_cache))
    check(found, q, keys, values, {"causal": True})


@pytest.mark.parametrize("slopes", [None, SLOPES])
def test_padding_on_the_left(slopes: Tensor | None) -> None:
    q, k_cache, v_cache, k, v = make(5)
    k_cache[0, :3] = v_cache[0, :3] = math.nan
    found = flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=torch.tensor(USED), cache_leftpad=torch.tensor([3, 0, 2]).int(),
        window_size=(4, 0), alibi_slopes=slopes, return_softmax_lse=True,
    )  # fmt: skip
    places = [(0, 3, 9), (1, 0, 4), (2, 2, 11)]
    keys, values = ([cache[b, first:end] for b, first, end in places] for cache in (k_cache, v_cache))
    check(found, q, keys, values, {"window": (4, 0), "slopes": slopes})


@pytest.mark.parametrize(
    "used", [6, np.int64(6), torch.tensor(6), torch.full((BATCH,), 6, dtype=torch.int32)], ids=repr
)
def test_one_length_for_all(used: Any) -> None:
    """The whole cache without cache_seqlens; out alone unless the log-sum-exp is asked for; any num_splits."""
    q, k_cache, v_cache, _, _ = make(6)
    expected = flash_attn_with_kvcache(q, k_cache[:, :6], v_cache[:, :6])  # rows with gaps between them
    assert isinstance(expected, Tensor)
    assert torch.equal(flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=used, num_splits=2), expected)


@pytest.mark.parametrize("head_dim", [16, 12])
def test_sixteen_bits(head_dim: int) -> None:
    """A head size that kernels do not take is filled up on the way to them, not in the cache."""
    q, k_cache, v_cache, k, v = (t[..., :head_dim].contiguous() for t in make(7, dtype=torch.bfloat16))
    found = flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=torch.tensor(USED), causal=True, return_softmax_lse=True
    )
    keys, values = ([cache[b, : used + SEQLEN] for b, used in enumerate(USED)] for cache in (k_cache, v_cache))
    assert torch.equal(keys[0][5:], k[0])
    check(found, q, keys, values, {"causal": True})


def test_no_gradient() -> None:
    q, k_cache, v_cache, k, v = (t.requires_grad_() for t in make(8))
    out = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=2)
    assert not out.requires_grad


def test_compiled_whole() -> None:
    """A step of generation is one graph, and lengths are values in it."""
    q, k_cache, v_cache, k, v = make(9)
    lengths = torch.tensor(USED)
    caches = k_cache.clone(), v_cache.clone()
    expected = flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=lengths, causal=True)
    counter = Compilations()
    torch.compiler.reset()
    compiled = torch.compile(flash_attn_with_kvcache, fullgraph=True, backend=counter)
    assert torch.equal(compiled(q, k_cache, v_cache, k, v, cache_seqlens=lengths, causal=True), expected)
    assert torch.equal(k_cache, caches[0]) and torch.equal(v_cache, caches[1])
    compiled(q, k_cache, v_cache, k, v, cache_seqlens=lengths - lengths, causal=True)
    assert counter.count == 1


def test_what_is_unsupported_or_wrong_says_so() -> None:
    q, k_cache, v_cache, k, v = make(10)
    lengths, table = torch.tensor(USED), torch.ones(CAPACITY, 4)
    name = "^flash_attn_with_kvcache: "
    with pytest.raises(NotImplementedError, match=name + "block_table .a paged KV cache. is not supported"):
        flash_attn_with_kvcache(q, k_cache, v_cache, block_table=lengths)
    for bad in ([7, 7, 8], [-1, 0, 0], 8):
        with pytest.raises(ValueError, match=name + "cache_seqlens must be from 0 to 7"):
            bad = torch.tensor(bad) if isinstance(bad, list) else bad
            flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=bad)
    with pytest.raises(ValueError, match=name + "cache_leftpad must be from 0"):
        flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=lengths, cache_leftpad=torch.tensor([6, 0, 0]))
    with pytest.raises(TypeError, match=name + "cache_seqlens must be an int or integers"):
        flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=lengths.float())
    with pytest.raises(ValueError, match=name + r"cache_seqlens must be an int or integers of shape \[3\]"):
        flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=lengths[:2])
    with pytest.raises(ValueError, match=name + "cache_seqlens must be given where k is"):
        flash_attn_with_kvcache(q, k_cache, v_cache, k, v)
    with pytest.raises(ValueError, match=name + "k and v must both be given, or neither"):
        flash_attn_with_kvcache(q, k_cache, v_cache, k, cache_seqlens=1)
    with pytest.raises(ValueError, match=name + "k and v must be given where rotary_cos is"):
        flash_attn_with_kvcache(q, k_cache, v_cache, rotary_cos=table, rotary_sin=table, cache_seqlens=1)
    with pytest.raises(TypeError, match=name + "rotary_sin must be a tensor, got None"):
        flash_attn_with_kvcache(q, k_cache, v_cache, k, v, rotary_cos=table, cache_seqlens=1)
    with pytest.raises(ValueError, match=name + "rotary_cos and rotary_sin must both be of shape"):
        flash_attn_with_kvcache(q, k_cache, v_cache, k, v, table[:5], table[:5], cache_seqlens=1)
    with pytest.raises(ValueError, match=name + r"k_cache and v_cache must both be of shape \[3, seqlen_cache"):
        flash_attn_with_kvcache(q, k_cache[:2], v_cache[:2])
    with pytest.raises(TypeError, match=name + "k must be float32 as k_cache is"):
        flash_attn_with_kvcache(q, k_cache, v_cache, k.half(), v.half(), cache_seqlens=1)
    with pytest.raises(TypeError, match=name + "k_cache and v_cache must be float32 as q is"):
        flash_attn_with_kvcache(q, k_cache.half(), v_cache.half())
    with pytest.raises(TypeError, match=name + "num_splits must be an int"):
        flash_attn_with_kvcache(q, k_cache, v_cache, num_splits=1.5)
    with pytest.raises(ValueError, match=name + "the 4 heads of q must be a multiple"):
        flash_attn_with_kvcache(q, k_cache.repeat(1, 1, 2, 1)[:, :, :3], v_cache.repeat(1, 1, 2, 1)[:, :, :3])
    with pytest.raises(ValueError, match=name + r"alibi_slopes must be of shape \[4\] or \[3, 4\]"):
        flash_attn_with_kvcache(q, k_cache, v_cache, alibi_slopes=SLOPES[:2])
