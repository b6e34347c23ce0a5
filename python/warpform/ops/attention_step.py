"""One step of attention over a sequence that comes in blocks: its softmax is carried from step to step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _check
from ._dtypes import accumulation_dtype
from ._register import register_op
from .examples import attention_step as examples
from .reference import attention as attention_reference
from .reference import attention_step as reference


def _rows_shape(q: Tensor) -> tuple[int, ...]:
    """One number for each query and head: [H, Tq], dense [B, H, Lq]."""
    return (q.size(1), q.size(0)) if q.dim() == 3 else (q.size(0), q.size(2), q.size(1))


def _fake(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor | None = None, lse: Tensor | None = None, **how: Any
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(q.dtype)
    return q.new_empty(q.shape, dtype=dtype), q.new_empty(_rows_shape(q), dtype=dtype)


def _backward_fake(
    dout: Tensor, delta: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **how: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (t.new_empty(t.shape, dtype=accumulation_dtype(q.dtype)) for t in (q, k, v))
    return dq, dk, dv


def _validate_step(
    q: Tensor, k: Tensor, *rest: Any, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, **how: Any
) -> None:
    _validate("attention_step", q, k, cu_seqlens_q, cu_seqlens_k)


def _validate_backward(
    dout: Tensor,
    delta: Tensor,
    q: Tensor,
    k: Tensor,
    *rest: Any,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    **how: Any,
) -> None:
    _validate("attention_step_backward", q, k, cu_seqlens_q, cu_seqlens_k)


def _validate(op: str, q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None) -> None:
    # On a CPU the reference checks.
    if cu_seqlens_q is not None and cu_seqlens_k is not None and q.device.type != "cpu":
        attention_reference.check_offsets(op, q, k, cu_seqlens_q, cu_seqlens_k, q.size(0), k.size(0))


# Neither op is differentiable. Only the result of all steps is; code that takes steps calls the second op in backward.
_attention_step = register_op(
    "attention_step",
    reference=reference.attention_step,
    fake=_fake,
    example=examples.attention_step,
    validate=_validate_step,
)
_attention_step_backward = register_op(
    "attention_step_backward",
    reference=reference.attention_step_backward,
    fake=_backward_fake,
    example=examples.attention_step_backward,
    validate=_validate_backward,
)


def attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    q_offset: int = 0,
    k_offset: int = 0,
    q_stride: int = 1,
    k_stride: int = 1,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of a block of queries to a block of keys, added to that to the blocks before (arXiv 2310.01889).

    (out, lse) hold the softmax over all keys so far; steps over disjoint blocks, in any order, give attention to their
    union. Row i of q has position q_offset + i * q_stride of the whole sequence, row j of k at
    k_offset + j * k_stride; masks go by positions.

    Args:
        q: [B, Lq, H, D], float16, bfloat16, float32 or float64; the last dimension contiguous, others of any stride, so
            that slices need no copy. With cu_seqlens [Tq, H, D], sequences laid end to end.
        k, v: [B, Lk, Hkv, D] or [Tk, Hkv, D] like q. H is a multiple of Hkv; query head h reads key head
            h // (H // Hkv).
        out: what is carried, [B, Lq, H, D] or [Tq, H, D], float32 (float64 for float64 q). None: nothing was seen yet.
        lse: its log-sum-exp, [B, H, Lq] or [H, Tq] in out's dtype, -inf for rows that saw nothing. None as out is.
        softmax_scale: D ** -0.5 by default. Any finite number, as in `varlen_attention`.
        causal: a query sees keys at positions up to its own.
        window_size: (left, right): keys from the query's position - left to that + right, both included; -1 is
            unbounded. With causal, right counts as 0.
        q_offset, k_offset: positions of the first rows; with cu_seqlens of the first rows of every sequence.
        q_stride, k_stride: from a row's position to the next row's, at least 1.
        cu_seqlens_q, cu_seqlens_k: both or neither, int32 [B + 1], from 0, not decreasing, within the rows of q and k.

    Returns:
        out and lse after this step, new tensors; the caller rounds out when the last step is done. Rows that have seen
        no key have out 0 and lse -inf; rows past the last sequence are carried through.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong shape, a last dimension that is not contiguous, a stride below 1, tensors on different
            devices, a softmax_scale that is not finite. Values of cu_seqlens that decrease or pass the end: on a CPU,
            or with WARPFORM_VALIDATE=1, which waits for the device; otherwise they are clamped and never lead outside
            of the tensors.
        RuntimeError: on differentiating through it.
    """
    op = "attention_step"
    left, right = _check.window(op, window_size)
    _check_integers(op, q_offset=q_offset, k_offset=k_offset, q_stride=q_stride, k_stride=k_stride)
    new_out, new_lse = _attention_step(
        q,
        k,
        v,
        out,
        lse,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size_left=left,
        window_size_right=right,
        q_offset=q_offset,
        k_offset=k_offset,
        q_stride=q_stride,
        k_stride=k_stride,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
    )
    return new_out, new_lse


def attention_step_backward(
    dout: Tensor,
    delta: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    q_offset: int = 0,
    k_offset: int = 0,
    q_stride: int = 1,
    k_stride: int = 1,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The part of the gradients that passes between one block of queries and one of keys, added to what is there.

    Args:
        dout: the gradient of the whole attention's output, of q's shape; rounded to q's dtype where it has another.
        delta: sum(dout * out, -1) with the output after the last step; [B, H, Lq] or [H, Tq], float32 (float64 for
            float64 q).
        q, k, v: as in the step.
        lse: after the last step, like delta.
        dq, dk, dv: gradients so far, of the shapes of q, k and v, float32 (float64 for float64 q). None counts as 0.
        deterministic: the same sums bit by bit in each run; `torch.use_deterministic_algorithms` turns it on too.
        All others: those of the step.

    Returns:
        dq, dk and dv with this block's part added, new tensors.

    Raises:
        TypeError, ValueError, RuntimeError: as `attention_step`.
    """
    op = "attention_step_backward"
    left, right = _check.window(op, window_size)
    _check_integers(op, q_offset=q_offset, k_offset=k_offset, q_stride=q_stride, k_stride=k_stride)
    if isinstance(dout, Tensor) and isinstance(q, Tensor) and dout.dtype != q.dtype and dout.dtype in _check.FLOATS:
        dout = dout.to(q.dtype)
    new_dq, new_dk, new_dv = _attention_step_backward(
        dout,
        delta,
        q,
        k,
        v,
        lse,
        dq,
        dk,
        dv,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size_left=left,
        window_size_right=right,
        q_offset=q_offset,
        k_offset=k_offset,
        q_stride=q_stride,
        k_stride=k_stride,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        deterministic=deterministic or torch.are_deterministic_algorithms_enabled(),
    )
    return new_dq, new_dk, new_dv


def _check_integers(op: str, **values: int) -> None:
    """Torch takes a bool for an int."""
    for name, value in values.items():
        _check.integer(op, name, value)
