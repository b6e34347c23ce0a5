"""flash-attn's attention over a cache of keys and values, into which it writes new ones first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import _env
from ...nn.rotary import apply_rotary
from ...ops import _check
from .. import _arguments
from .._attention import attention, contiguous_heads
from ._scores import scores

_OP = "flash_attn_with_kvcache"


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of q [B, Sq, H, D] to the used part of a cache, after k and v were written into it.

    Nothing is read from the device. The cache is read in place where its rows lie one after another, as in a slice
    k_cache[:batch]; a cache with gaps between rows, cache_batch_idx, and a D that the kernels do not take, copy it.

    Args:
        q: [B, Sq, H, D].
        k_cache, v_cache: [Bc, S, Hkv, D] like q, the last dimension contiguous. Bc is B without cache_batch_idx.
        k, v: [B, Snew, Hkv, D], new keys and values. They are written into the caches, in place, at cache_seqlens,
            cache_seqlens + 1 and so on, and attended to with what was there.
        rotary_cos, rotary_sin: [positions, R / 2], at least S positions. The first R of the D components of k are
            rotated by their places in the cache before they are written, and q's as if its tokens were at
            cache_seqlens, cache_seqlens + 1 and so on with causal or a window, all at cache_seqlens otherwise.
        cache_seqlens: how much of each sequence's cache is used, before k comes to it: an int, or an integer tensor
            [B]. None: all of it; k needs it.
        cache_batch_idx: integer [B], the row of the cache of each sequence. None: 0, 1, 2, ... With k they must be
            distinct.
        cache_leftpad: integer [B], where in the cache a sequence begins. None: 0.
        block_table: must be None.
        rotary_interleaved: components 0 and 1, 2 and 3, ... are rotated together; False: 0 and R / 2, 1 and R / 2 + 1.
        num_splits: an int, without effect: the kernels decide on it.
        return_softmax_lse: return (out, softmax_lse).
        softmax_scale, causal, window_size, softcap, alibi_slopes: as of all functions of `warpform.compat.flash_attn`,
            with as many keys as are used.

    Returns:
        out [B, Sq, H, D], and softmax_lse [B, H, Sq] in float32 (float64 for float64 q). They have no gradient.

    Raises:
        NotImplementedError: a block_table.
        TypeError, ValueError: a wrong dtype, shape or device, new keys without cache_seqlens, rotary tables without new
            keys. Values of cache_seqlens and cache_leftpad that do not fit the cache: on a CPU, or with
            WARPFORM_VALIDATE=1, which waits for the device; otherwise they are clamped.
    """
    how = scores(_OP, softmax_scale, causal, window_size, softcap, alibi_slopes)
    _arguments.integer(_OP, "num_splits", num_splits)
    if block_table is not None:
        raise NotImplementedError(
            f"{_OP}: block_table (a paged KV cache) is not supported; gather the pages into k_cache and v_cache and "
            "pass None"
        )
    _check_tensors(q, k_cache, v_cache, k, v, cache_batch_idx)
    batch, seqlen, capacity, added = q.size(0), q.size(1), k_cache.size(1), 0 if k is None else k.size(1)
    if k is not None and cache_seqlens is None:
        raise ValueError(f"{_OP}: cache_seqlens must be given where k is, got None")
    with torch.no_grad():
        used = _places("cache_seqlens", capacity if cache_seqlens is None else cache_seqlens, batch, q)
        first = None if cache_leftpad is None else _places("cache_leftpad", cache_leftpad, batch, q)
        _check_places(used, first, capacity, added)
        used = used.clamp(0, capacity - added)
        if rotary_cos is not None or rotary_sin is not None:
            moves = how["causal"] or how["window_size"] != (-1, -1)
            cos, sin = _check_rotary(rotary_cos, rotary_sin, q, k, capacity)
            q = _rotate(q, cos, sin, used, moves, rotary_interleaved)
            assert k is not None
            k = _rotate(k, cos, sin, used, True, rotary_interleaved)
        if k is not None and v is not None:
            rows = torch.arange(batch, device=q.device) if cache_batch_idx is None else cache_batch_idx.long()
            places = (rows.unsqueeze(1), used.unsqueeze(1) + torch.arange(added, device=q.device))
            k_cache.index_put_(places, k)
            v_cache.index_put_(places, v)
        if cache_batch_idx is not None:
            k_cache, v_cache = k_cache.index_select(0, cache_batch_idx), v_cache.index_select(0, cache_batch_idx)
        out, lse = _attend(q, k_cache, v_cache, first, used + added, how)
    out = out.unflatten(0, (batch, seqlen))
    return (out, lse.unflatten(1, (batch, seqlen)).transpose(0, 1).contiguous()) if return_softmax_lse else out


def _attend(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, first: Tensor | None, end: Tensor, how: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Attention of each q[b] to cache rows first[b] to end[b]: out [B * Sq, H, D], lse [H, B * Sq].

    The rows of the caches, laid end to end, are cut into what is used and what is not. What is not used is a sequence
    too, one without queries, so that nothing needs to be moved.
    """
    (batch, seqlen), capacity = q.shape[:2], k_cache.size(1)
    index = torch.arange(batch, device=q.device)
    keys, queries = [index * capacity + end, (index + 1) * capacity], [(index + 1) * seqlen] * 2
    if first is not None:
        keys.insert(0, index * capacity + torch.minimum(first.clamp(min=0), end))
        queries.insert(0, index * seqlen)
    # From 0 on, each number ends a sequence: the gap before (with first), the keys of q[b], the gap after.
    cu_seqlens_q, cu_seqlens_k = (
        torch.nn.functional.pad(torch.stack(ends, 1).flatten(), (1, 0)).to(torch.int32) for ends in (queries, keys)
    )
    slopes = how["alibi_slopes"]
    if isinstance(slopes, Tensor) and slopes.dim() == 2:
        if slopes.size(0) != batch:
            raise ValueError(
                f"{_OP}: alibi_slopes must be of shape [{q.size(2)}] or [{batch}, {q.size(2)}], "
                f"got {_check.describe(slopes)}"
            )
        how = {**how, "alibi_slopes": slopes.repeat_interleave(len(keys), 0)}
    q, k_cache, v_cache = (contiguous_heads(t).flatten(0, 1) for t in (q, k_cache, v_cache))
    names = {"k": "k_cache", "v": "v_cache"}
    return attention(_OP, q, k_cache, v_cache, cu_seqlens_q, cu_seqlens_k, seqlen, capacity, names=names, **how)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, start: Tensor, moves: bool, interleaved: bool) -> Tensor:
    """x [B, L, H, D] with the first components rotated; token i is at start + i, or all are at start."""
    places = start.unsqueeze(1) + torch.arange(x.size(1), device=x.device) * int(moves)
    places = places.clamp(max=cos.size(0) - 1)
    cos, sin = cos[places], sin[places]  # [B, L, R / 2]
    width = 2 * cos.size(-1)
    turned = x[..., :width]
    if interleaved:
        turned = turned.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    turned = apply_rotary(turned, cos, sin)
    if interleaved:
        turned = turned.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    return torch.cat((turned, x[..., width:]), -1)


def _places(name: str, value: Any, batch: int, q: Tensor) -> Tensor:
    """int64 [B] on q's device."""
    if not isinstance(value, Tensor):
        return torch.full((batch,), _arguments.integer(_OP, name, value), dtype=torch.int64, device=q.device)
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{_OP}: {name} must be an int or integers of shape [batch], got {_check.describe(value)}")
    if value.dim() > 1 or (value.dim() == 1 and value.size(0) != batch):
        raise ValueError(f"{_OP}: {name} must be an int or integers of shape [{batch}], got {_check.describe(value)}")
    if value.dim() == 1:
        _check.same_device(_OP, name, value, "q", q)
    return value.to(q.device, torch.int64).expand(batch)


def _check_places(used: Tensor, first: Tensor | None, capacity: int, added: int) -> None:
    if added > capacity:
        raise ValueError(f"{_OP}: k must have at most the {capacity} places of k_cache, got {added}")
    if torch.compiler.is_compiling() or used.numel() == 0 or not (used.device.type == "cpu" or _env.validate()):
        return
    least, most = used.aminmax()
    if least < 0 or most + added > capacity:
        raise ValueError(
            f"{_OP}: cache_seqlens must be from 0 to {capacity - added}, as k_cache has {capacity} places and k brings "
            f"{added}, got {int(least)} to {int(most)}"
        )
    if first is not None and bool(((first < 0) | (first > used + added)).any()):
        raise ValueError(f"{_OP}: cache_leftpad must be from 0 to what is used of the cache, got {first.tolist()}")


def _check_rotary(
    cos: Tensor | None, sin: Tensor | None, q: Tensor, k: Tensor | None, capacity: int
) -> tuple[Tensor, Tensor]:
    for name, table in (("rotary_cos", cos), ("rotary_sin", sin)):
        _check.tensor(_OP, name, table)
    assert cos is not None and sin is not None
    if k is None:
        raise ValueError(f"{_OP}: k and v must be given where rotary_cos is, got None")
    head_dim = q.size(3)
    if cos.dim() != 2 or cos.shape != sin.shape or cos.size(0) < capacity or 2 * cos.size(1) > head_dim:
        raise ValueError(
            f"{_OP}: rotary_cos and rotary_sin must both be of shape [positions, rotary_dim / 2] with at least the "
            f"{capacity} positions of k_cache and rotary_dim at most {head_dim}, got {_check.describe(cos)} and "
            f"{_check.describe(sin)}"
        )
    for name, table in (("rotary_cos", cos), ("rotary_sin", sin)):
        _check.floating(_OP, name, table)
        _check.same_device(_OP, name, table, "q", q)
    return cos, sin


def _check_tensors(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None, v: Tensor | None, rows: Tensor | None
) -> None:
    for name, t in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        _check.tensor(_OP, name, t)
        if t.dim() != 4:
            raise ValueError(
                f"{_OP}: {name} must be of shape [batch, seqlen, heads, head_dim], got {_check.describe(t)}"
            )
        _check.same_device(_OP, name, t, "q", q)
    if (k is None) != (v is None):
        raise ValueError(f"{_OP}: k and v must both be given, or neither")
    batch, heads, head_dim = q.size(0), k_cache.size(2), q.size(3)
    if rows is not None:
        _check.tensor(_OP, "cache_batch_idx", rows)
        if rows.dtype not in (torch.int32, torch.int64) or rows.dim() != 1 or rows.size(0) != batch:
            raise (TypeError if rows.dtype not in (torch.int32, torch.int64) else ValueError)(
                f"{_OP}: cache_batch_idx must be int32 of shape [{batch}], got {_check.describe(rows)}"
            )
        _check.same_device(_OP, "cache_batch_idx", rows, "q", q)
    if v_cache.shape != k_cache.shape or k_cache.size(3) != head_dim or (rows is None and k_cache.size(0) != batch):
        shape = f"[{'batch_cache' if rows is not None else batch}, seqlen_cache, heads_k, {head_dim}]"
        raise ValueError(
            f"{_OP}: k_cache and v_cache must both be of shape {shape}, got k_cache {_check.describe(k_cache)} and "
            f"v_cache {_check.describe(v_cache)}"
        )
    if k is None or v is None:
        return
    for name, t in (("k", k), ("v", v)):
        _check.tensor(_OP, name, t)
        if t.dim() != 4 or (t.size(0), t.size(2), t.size(3)) != (batch, heads, head_dim) or t.size(1) != k.size(1):
            raise ValueError(
                f"{_OP}: {name} must be of shape [{batch}, seqlen_new, {heads}, {head_dim}], the same for k and v, "
                f"got {_check.describe(t)}"
            )
        if t.dtype != k_cache.dtype:
            raise TypeError(
                f"{_OP}: {name} must be {_check.dtype_name(k_cache.dtype)} as k_cache is, got {_check.describe(t)}"
            )
        _check.same_device(_OP, name, t, "q", q)
