"""flash-attn's functions under the name of the module that defines them there; see `warpform.compat.flash_attn`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...ops import _check
from .. import _arguments
from .._attention import attention, contiguous_heads
from ._kvcache import flash_attn_with_kvcache
from ._scores import scores

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

Result = Tensor | tuple[Tensor, Tensor, None]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """q [B, Sq, H, D], k and v [B, Sk, Hkv, D] -> out [B, Sq, H, D]; softmax_lse [B, H, Sq] float32.

    The other arguments and the errors are described in `warpform.compat.flash_attn`.
    """
    how = _how("flash_attn_func", dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    return _dense("flash_attn_func", q, k, v, how, return_attn_probs)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """q [B, Sq, H, D], kv [B, Sk, 2, Hkv, D] -> out [B, Sq, H, D]; softmax_lse [B, H, Sq] float32.

    The other arguments and the errors are described in `warpform.compat.flash_attn`.
    """
    op = "flash_attn_kvpacked_func"
    how = _how(op, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    k, v = _unpacked(op, "kv", kv, ("batch", "seqlen"), 2)
    return _dense(op, q, k, v, how, return_attn_probs)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """qkv [B, S, 3, H, D] -> out [B, S, H, D]; softmax_lse [B, H, S] float32.

    The other arguments and the errors are described in `warpform.compat.flash_attn`.
    """
    op = "flash_attn_qkvpacked_func"
    how = _how(op, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    q, k, v = _unpacked(op, "qkv", qkv, ("batch", "seqlen"), 3)
    return _dense(op, q, k, v, how, return_attn_probs)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Result:
    """q [Tq, H, D], k and v [Tk, Hkv, D] of sequences laid end to end -> out [Tq, H, D]; softmax_lse [H, Tq] float32.

    cu_seqlens_q, cu_seqlens_k: int32 [B + 1], where each sequence begins and the last one ends. max_seqlen_q and
    max_seqlen_k: at least the longest. `warpform.compat.flash_attn` describes the other arguments and the errors.
    """
    op = "flash_attn_varlen_func"
    if block_table is not None:
        raise NotImplementedError(
            f"{op}: block_table (a paged KV cache) is not supported; gather the pages into k and v and pass None"
        )
    how = _how(op, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    return _varlen(op, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, how, return_attn_probs)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """q [Tq, H, D], kv [Tk, 2, Hkv, D] of sequences laid end to end -> out [Tq, H, D]; softmax_lse [H, Tq] float32.

    Otherwise as `flash_attn_varlen_func`.
    """
    op = "flash_attn_varlen_kvpacked_func"
    how = _how(op, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    k, v = _unpacked(op, "kv", kv, ("total_k",), 2)
    return _varlen(op, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, how, return_attn_probs)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """qkv [T, 3, H, D] of sequences laid end to end -> out [T, H, D]; softmax_lse [H, T] float32.

    Otherwise as `flash_attn_varlen_func`.
    """
    op = "flash_attn_varlen_qkvpacked_func"
    how = _how(op, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    q, k, v = _unpacked(op, "qkv", qkv, ("total",), 3)
    names = {f"{name}_{side}": name for name in ("cu_seqlens", "max_seqlen") for side in "qk"}
    return _varlen(op, q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, how, return_attn_probs, names)


def _how(
    op: str,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: Sequence[int] | Tensor,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
) -> dict[str, Any]:
    """The keyword arguments of `varlen_attention`."""
    dropout_p = _arguments.number(op, "dropout_p", dropout_p)
    if dropout_p != 0.0:
        raise NotImplementedError(f"{op}: dropout is not supported, dropout_p must be 0, got {dropout_p}")
    return {**scores(op, softmax_scale, causal, window_size, softcap, alibi_slopes),
            "deterministic": _arguments.flag(op, "deterministic", deterministic)}  # fmt: skip


def _unpacked(op: str, name: str, packed: Tensor, leading: tuple[str, ...], parts: int) -> tuple[Tensor, ...]:
    """Queries, keys and values, or keys and values, as views."""
    _check.tensor(op, name, packed)
    at = len(leading)
    if packed.dim() != at + 3 or packed.size(at) != parts:
        shape = ", ".join([*leading, str(parts), "heads", "head_dim"])
        raise ValueError(f"{op}: {name} must be of shape [{shape}], got {_check.describe(packed)}")
    return packed.unbind(at)


def _varlen(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    how: dict[str, Any],
    return_attn_probs: bool,
    names: Mapping[str, str] | None = None,
) -> Result:
    out, lse = attention(op, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, names=names, **how)
    return (out, lse, None) if return_attn_probs else out


def _dense(op: str, q: Tensor, k: Tensor, v: Tensor, how: dict[str, Any], return_attn_probs: bool) -> Result:
    """Sequences of equal lengths: rows of the batch laid end to end."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        _check.tensor(op, name, t)
        if t.dim() != 4:
            raise ValueError(
                f"{op}: {name} must be of shape [batch, seqlen, heads, head_dim], got {_check.describe(t)}"
            )
    batch, seqlen_q, seqlen_k = q.size(0), q.size(1), k.size(1)
    if k.size(0) != batch or v.shape != k.shape:
        raise ValueError(
            f"{op}: k and v must both be of shape [{batch}, seqlen_k, heads_k, {q.size(3)}], got k "
            f"{_check.describe(k)} and v {_check.describe(v)}"
        )
    steps = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
    q, k, v = (contiguous_heads(t).flatten(0, 1) for t in (q, k, v))
    out, lse = attention(op, q, k, v, steps * seqlen_q, steps * seqlen_k, seqlen_q, seqlen_k, **how)
    out = out.unflatten(0, (batch, seqlen_q))
    if not return_attn_probs:
        return out
    return out, lse.unflatten(1, (batch, seqlen_q)).transpose(0, 1).contiguous(), None
