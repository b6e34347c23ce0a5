"""Attention over sequences of any lengths laid end to end, without padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _check
from ._dtypes import accumulation_dtype
from ._register import register_op
from .examples import attention as examples
from .reference import attention as reference


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    **how: Any,
) -> tuple[Tensor, Tensor]:
    lse_dtype = accumulation_dtype(q.dtype)
    return q.new_empty(q.shape), q.new_empty((q.size(1), q.size(0)), dtype=lse_dtype)


def _backward_fake(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **how: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, Tensor]
) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, ctx.max_seqlen_q, ctx.max_seqlen_k = inputs
    ctx.how = dict(keyword_only_inputs)
    ctx.set_materialize_grads(False)  # an lse without a gradient costs nothing
    ctx.save_for_backward(q, k, v, *output, cu_seqlens_q, cu_seqlens_k, ctx.how.pop("alibi_slopes"))


def _gradient(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, alibi_slopes = ctx.saved_tensors
    if dout is None:
        if dlse is None:
            return (None,) * 7
        dout = torch.zeros_like(out)
    how = {**ctx.how, "deterministic": ctx.how["deterministic"] or torch.are_deterministic_algorithms_enabled()}
    gradients = _varlen_attention_backward(
        dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, ctx.max_seqlen_q, ctx.max_seqlen_k,
        alibi_slopes=alibi_slopes, **how,
    )  # fmt: skip
    return (
        *(g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad[:3], strict=True)),
        *(None,) * 4,
    )


def _validate(q: Tensor, k: Tensor, v: Tensor, *sequences: Any, **how: Any) -> None:
    if q.device.type != "cpu":  # on a CPU the op checks them itself
        reference.check_offsets("varlen_attention", q, k, *sequences)


_varlen_attention_backward = register_op(
    "varlen_attention_backward",
    reference=reference.varlen_attention_backward,
    fake=_backward_fake,
    example=examples.varlen_attention_backward,
)
_varlen_attention = register_op(
    "varlen_attention",
    reference=reference.varlen_attention,
    fake=_fake,
    example=examples.varlen_attention,
    backward=_gradient,
    setup_context=_setup,
    autocast=("q", "k", "v"),
    validate=_validate,
)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(softmax_scale * q k^T) v for each of B sequences laid end to end (FlashAttention-2, arXiv 2307.08691).

    Sequence b has queries cu_seqlens_q[b] to cu_seqlens_q[b + 1] (sq of them) and keys cu_seqlens_k[b] to
    cu_seqlens_k[b + 1] (sk). Masks and ALiBi are aligned at the end: query i is at key i + sk - sq.

    Args:
        q: [Tq, Hq, D], float16, bfloat16, float32 or float64; the last dimension contiguous, others of any stride, so
            that slices of one QKV product need no copy.
        k, v: [Tk, Hkv, D] like q. Hq is a multiple of Hkv; query head h reads key head h // (Hq // Hkv).
        cu_seqlens_q, cu_seqlens_k: int32 [B + 1], from 0, not decreasing, within the rows of q and of k.
        max_seqlen_q, max_seqlen_k: at least the longest sequence.
        softmax_scale: D ** -0.5 by default. Any finite number, 0 and negative ones too, by which scores stay within
            float32; kernels take those from 1e-38 to 1e30.
        causal: query i sees keys up to i + sk - sq.
        window_size: (left, right): query i sees keys from i + sk - sq - left to i + sk - sq + right, both included;
            -1 is unbounded.
        softcap: above 0, scores become softcap * tanh(score / softcap), however small or large it is; 0: they do not.
        alibi_slopes: float32 [Hq] or [B, Hq], finite; -slope * |i + sk - sq - j| is added to the score of key j, after
            the softcap. It has no gradient.
        deterministic: the same gradients bit by bit in each run; `torch.use_deterministic_algorithms` turns it on too.
        return_lse: also return the log-sum-exp of each row's scores.

    Returns:
        out [Tq, Hq, D] like q, or (out, lse) with lse [Hq, Tq] float32 (float64 for float64); both differentiable. A
        query that sees no key, and a row past the last sequence, has out 0, lse -inf and gradient 0.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong shape, a last dimension that is not contiguous, tensors on different devices, a
            softmax_scale or softcap that is not finite, a negative softcap. Values of cu_seqlens that decrease, pass
            the end or exceed max_seqlen: on a CPU, or with WARPFORM_VALIDATE=1, which waits for the device; otherwise
            they are clamped and never lead outside of the tensors.
    """
    left, right = _check.window("varlen_attention", window_size)
    out, lse = _varlen_attention(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size_left=left,
        window_size_right=right,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        deterministic=deterministic or torch.are_deterministic_algorithms_enabled(),
    )
    return (out, lse) if return_lse else out
