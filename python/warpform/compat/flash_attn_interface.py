"""flash-attn 3's module of this name: its functions, argument for argument, as `warpform.compat.flash_attn` computes.

Change `from flash_attn_interface import ...` to `from warpform.compat.flash_attn_interface import ...`. Shapes, masks
and the arguments of both versions are described in `warpform.compat.flash_attn`; here softmax_scale takes the place of
dropout_p, and the result with return_attn_probs is (out, softmax_lse). pack_gqa, sm_margin, num_splits and
scheduler_metadata say how flash-attn's kernels run and have no effect. These raise NotImplementedError unless they are
None (0 for attention_chunk): qv, q_descale, k_descale, v_descale, attention_chunk, seqused_q, seqused_k, page_table,
rotary_seqlens, and of a cache cu_seqlens_q and cu_seqlens_k_new.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from . import _arguments, flash_attn

__all__ = ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Sequence[int] | Tensor = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """q [B, Sq, H, D], k and v [B, Sk, Hkv, D] -> out [B, Sq, H, D]; softmax_lse [B, H, Sq] float32."""
    _refuse("flash_attn_func", attention_chunk, qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    found = flash_attn.flash_attn_func(
        q, k, v, 0.0, softmax_scale, causal, window_size, softcap, None, deterministic, return_attn_probs
    )
    return found if isinstance(found, Tensor) else found[:2]


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Sequence[int] | Tensor = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """q [Tq, H, D], k and v [Tk, Hkv, D], sequences laid end to end -> out [Tq, H, D]; softmax_lse [H, Tq] float32."""
    _refuse(
        "flash_attn_varlen_func", attention_chunk, seqused_q=seqused_q, seqused_k=seqused_k, qv=qv,
        q_descale=q_descale, k_descale=k_descale, v_descale=v_descale,
    )  # fmt: skip
    found = flash_attn.flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, softmax_scale, causal, window_size,
        softcap, None, deterministic, return_attn_probs,
    )  # fmt: skip
    return found if isinstance(found, Tensor) else found[:2]


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | Tensor = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Calls `warpform.compat.flash_attn.flash_attn_with_kvcache`, in the interface of FlashAttention 3."""
    _refuse(
        "flash_attn_with_kvcache", attention_chunk, qv=qv, page_table=page_table, cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k_new=cu_seqlens_k_new, rotary_seqlens=rotary_seqlens, q_descale=q_descale, k_descale=k_descale,
        v_descale=v_descale,
    )  # fmt: skip
    return flash_attn.flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, cache_leftpad, None,
        softmax_scale, causal, window_size, softcap, rotary_interleaved, None, num_splits, return_softmax_lse,
    )  # fmt: skip


def _refuse(op: str, attention_chunk: int, **unsupported: Any) -> None:
    """Raises NotImplementedError for what is given and has no counterpart."""
    for name, value in unsupported.items():
        if value is not None:
            raise NotImplementedError(f"{op}: {name} is not supported, pass None")
    if _arguments.integer(op, "attention_chunk", attention_chunk) != 0:
        raise NotImplementedError(f"{op}: attention_chunk is not supported, pass 0")
