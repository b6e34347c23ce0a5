"""flash_attn_with_kvcache on the attention kernels: what is not used of a cache is a sequence without queries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import oracle
from helpers.compare import assert_close
from warpform.compat import _attention
from warpform.compat.flash_attn import flash_attn_with_kvcache


@pytest.mark.parametrize(("seqlen", "head_dim", "leftpad"), [(1, 32, None), (3, 12, [4, 0, 70])])
def test_unused_places_are_not_seen(
    simt: Any, monkeypatch: pytest.MonkeyPatch, seqlen: int, head_dim: int, leftpad: list[int] | None
) -> None:
    """They hold NaN, in a cache of more than one tile; also with a head size that is filled up for the kernels."""

    def run(q: Tensor, k: Tensor, v: Tensor, *places: Any, **how: Any) -> Any:
        left, right = how.pop("window_size")
        how = {name: how[name] for name in ("softmax_scale", "causal")}
        return simt.varlen_attention(q, k, v, *places, window_size_left=left, window_size_right=right, **how)

    monkeypatch.setattr(_attention, "varlen_attention", run)
    torch.manual_seed(0)
    used, first = [130, 5, 74], leftpad or [0, 0, 0]
    q = torch.randn(3, seqlen, 4, head_dim).half()
    caches = [torch.full((3, 150, 2, head_dim), torch.nan).half() for _ in "kv"]
    for cache in caches:
        for b in range(3):
            cache[b, first[b] : used[b]].normal_()
    k, v = torch.randn(2, 3, seqlen, 2, head_dim).half()
    out, lse = flash_attn_with_kvcache(
        q, *caches, k, v, cache_seqlens=torch.tensor(used), causal=True, return_softmax_lse=True,
        cache_leftpad=None if leftpad is None else torch.tensor(leftpad),
    )  # fmt: skip
    keys = [torch.cat([cache[b, first[b] : used[b] + seqlen] for b in range(3)]) for cache in caches]
    lengths = [seqlen] * 3, [used[b] + seqlen - first[b] for b in range(3)]
    truth, lse64 = oracle.varlen_attention(*(t.double() for t in (q.flatten(0, 1), *keys)), *lengths, causal=True)
    eager, eager_lse = oracle.varlen_attention(q.flatten(0, 1), *keys, *lengths, causal=True)
    assert_close("out", out.flatten(0, 1), truth, eager)
    assert_close("lse", lse.transpose(0, 1).flatten(1), lse64, eager_lse.float())
