"""flash-attn 2's functions (arXiv 2307.08691), argument for argument, on `warpform.ops.varlen_attention`.

Change `from flash_attn import ...` to `from warpform.compat.flash_attn import ...`. Shapes: batch B, sequences of Sq
queries and Sk keys, H query heads, Hkv key heads (H a multiple of Hkv), head size D. dtypes: float16, bfloat16, and
float32 and float64 too, which flash-attn does not take.

Every function shares these arguments:
    dropout_p: must be 0.
    softmax_scale: D ** -0.5 by default.
    causal: query i sees keys up to i + Sk - Sq (aligned at the end, as in flash-attn 2.1 and later).
    window_size: (left, right), both inclusive and aligned as causal is; negative is unbounded.
    softcap: above 0, scores become softcap * tanh(score / softcap).
    alibi_slopes: float32 [H] or [B, H]; -slope * |i + Sk - Sq - j| is added. No gradient.
    deterministic: the same gradients bit by bit in each run.
    return_attn_probs: return (out, softmax_lse, S_dmask) instead of out. S_dmask is None, as there is no dropout.

and raise:
    NotImplementedError: dropout_p above 0, a block_table.
    TypeError, ValueError: a wrong dtype, shape or device; `warpform.ops.varlen_attention` says which.

Three things differ from flash-attn, on purpose: a query that sees no key has softmax_lse -inf (flash-attn: +inf),
softmax_lse is of the scores as defined above also under causal ALiBi (flash-attn drops a constant per row), and it is
differentiable.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...ops import _check, varlen_attention
from . import bert_padding

__all__ = [
    "bert_padding",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
]

Result = Tensor | tuple[Tensor, Tensor, None]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """q [B, Sq, H, D], k and v [B, Sk, Hkv, D] -> out [B, Sq, H, D]; softmax_lse [B, H, Sq] float32.

    The other arguments and the errors are described at the top of this module.
    """
    how = _how("flash_attn_func", dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    return _dense("flash_attn_func", q, k, v, how, return_attn_probs)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """q [B, Sq, H, D], kv [B, Sk, 2, Hkv, D] -> out [B, Sq, H, D]; softmax_lse [B, H, Sq] float32.

    The other arguments and the errors are described at the top of this module.
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
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """qkv [B, S, 3, H, D] -> out [B, S, H, D]; softmax_lse [B, H, S] float32.

    The other arguments and the errors are described at the top of this module.
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
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Result:
    """q [Tq, H, D], k and v [Tk, Hkv, D] of sequences laid end to end -> out [Tq, H, D]; softmax_lse [H, Tq] float32.

    cu_seqlens_q, cu_seqlens_k: int32 [B + 1], where each sequence begins and the last one ends. max_seqlen_q and
    max_seqlen_k: at least the longest. The other arguments and the errors are described at the top of this module.
    """
    op = "flash_attn_varlen_func"
    if block_table is not None:
        raise NotImplementedError(
            f"{op}: block_table (a paged KV cache) is not supported; gather the pages into k and v and pass None"
        )
    how = _how(op, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    return _varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, how, return_attn_probs)


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
    window_size: tuple[int, int] = (-1, -1),
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
    return _varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, how, return_attn_probs)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
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
    return _varlen(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, how, return_attn_probs)


def _how(
    op: str,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
) -> dict[str, Any]:
    """The keyword arguments of `varlen_attention`."""
    if dropout_p != 0.0:
        raise NotImplementedError(f"{op}: dropout is not supported, dropout_p must be 0, got {dropout_p}")
    if (
        isinstance(window_size, (tuple, list)) and len(window_size) == 2
    ):  # otherwise varlen_attention says what is wrong
        window_size = (_bound(window_size[0]), _bound(window_size[1]))
    return {
        "softmax_scale": softmax_scale,
        "causal": causal,
        "window_size": window_size,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "deterministic": deterministic,
    }


def _bound(side: int) -> int:
    return -1 if side < 0 else side  # to flash-attn every negative number is unbounded


def _unpacked(op: str, name: str, packed: Tensor, leading: tuple[str, ...], parts: int) -> tuple[Tensor, ...]:
    """Queries, keys and values, or keys and values, as views."""
    _check.tensor(op, name, packed)
    at = len(leading)
    if packed.dim() != at + 3 or packed.size(at) != parts:
        shape = ", ".join([*leading, str(parts), "heads", "head_dim"])
        raise ValueError(f"{op}: {name} must be of shape [{shape}], got {_check.describe(packed)}")
    return packed.unbind(at)


def _contiguous(t: Tensor) -> Tensor:
    return t if not isinstance(t, Tensor) or t.dim() == 0 or t.stride(-1) == 1 else t.contiguous()


def _varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    how: dict[str, Any],
    return_attn_probs: bool,
) -> Result:
    out, lse = varlen_attention(
        _contiguous(q), _contiguous(k), _contiguous(v), cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        **how, return_lse=True,
    )  # fmt: skip
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
    q, k, v = (_contiguous(t).flatten(0, 1) for t in (q, k, v))
    out, lse = varlen_attention(q, k, v, steps * seqlen_q, steps * seqlen_k, seqlen_q, seqlen_k, **how, return_lse=True)
    out = out.unflatten(0, (batch, seqlen_q))
    if not return_attn_probs:
        return out
    return out, lse.unflatten(1, (batch, seqlen_q)).transpose(0, 1).contiguous(), None
