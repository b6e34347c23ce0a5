"""warpform.compat.flash_attn_interface: flash-attn 3's order of arguments and results, on flash-attn 2's functions."""

from __future__ import annotations

import pytest
import torch

from warpform.compat import flash_attn, flash_attn_interface


def test_dense_and_varlen() -> None:
    q = torch.randn(2, 5, 4, 8)
    k, v = torch.randn(2, 2, 5, 2, 8)
    how = {"softmax_scale": 0.3, "causal": True, "window_size": (2, 0), "softcap": 1.5}
    out, lse, _ = flash_attn.flash_attn_func(q, k, v, return_attn_probs=True, **how)
    assert torch.equal(flash_attn_interface.flash_attn_func(q, k, v, 0.3, True, window_size=(2, 0), softcap=1.5), out)
    found = flash_attn_interface.flash_attn_func(q, k, v, return_attn_probs=True, deterministic=True, **how)
    assert torch.equal(found[0], out) and torch.equal(found[1], lse) and len(found) == 2
    places = (torch.tensor([0, 5, 10], dtype=torch.int32),) * 2 + (5, 5)
    flat = [t.flatten(0, 1) for t in (q, k, v)]
    found = flash_attn_interface.flash_attn_varlen_func(*flat, *places, None, None, 0.3, True, window_size=[2, 0])
    assert torch.equal(found, flash_attn.flash_attn_varlen_func(*flat, *places, 0.0, 0.3, True, (2, 0)))
    _, lse = flash_attn_interface.flash_attn_varlen_func(*flat, *places, return_attn_probs=True)
    assert lse.shape == (4, 10)


def test_kvcache() -> None:
    q, (k, v) = torch.randn(2, 1, 4, 8), torch.randn(2, 2, 1, 2, 8)
    caches = [torch.randn(2, 2, 7, 2, 8) for _ in range(2)]
    caches[1].copy_(caches[0])
    how = {"cache_seqlens": torch.tensor([3, 5]), "causal": True, "return_softmax_lse": True}
    found = flash_attn_interface.flash_attn_with_kvcache(q, *caches[0], k, v, num_splits=1, **how)
    expected = flash_attn.flash_attn_with_kvcache(q, *caches[1], k, v, **how)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)) and torch.equal(*caches)


def test_what_is_unsupported_says_so() -> None:
    q, cu = torch.randn(2, 5, 4, 8), torch.tensor([0, 5, 10], dtype=torch.int32)
    for name in ("qv", "q_descale", "k_descale", "v_descale"):
        with pytest.raises(NotImplementedError, match=f"^flash_attn_func: {name} is not supported"):
            flash_attn_interface.flash_attn_func(q, q, q, **{name: q})
    with pytest.raises(NotImplementedError, match="^flash_attn_func: attention_chunk is not supported"):
        flash_attn_interface.flash_attn_func(q, q, q, attention_chunk=2)
    flat = q.flatten(0, 1)
    with pytest.raises(NotImplementedError, match="^flash_attn_varlen_func: seqused_k is not supported"):
        flash_attn_interface.flash_attn_varlen_func(flat, flat, flat, cu, cu, 5, 5, seqused_k=cu[1:])
    with pytest.raises(NotImplementedError, match="^flash_attn_with_kvcache: page_table is not supported"):
        flash_attn_interface.flash_attn_with_kvcache(q, q, q, page_table=cu)
