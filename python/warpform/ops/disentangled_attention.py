"""DeBERTa's attention, whose scores see content and relative position apart, over sequences laid end to end."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._dtypes import accumulation_dtype
from ._register import register_op
from .examples import disentangled_attention as examples
from .reference import attention as attention_reference
from .reference import disentangled_attention as reference


def _fake(
    q: Tensor, k: Tensor, v: Tensor, pos_key: Tensor | None, pos_query: Tensor | None, *rest: Any, **how: Any
) -> tuple[Tensor, Tensor]:
    lse_dtype = accumulation_dtype(q.dtype)
    return q.new_empty(q.shape), q.new_empty((q.size(1), q.size(0)), dtype=lse_dtype)


def _backward_fake(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_key: Tensor | None,
    pos_query: Tensor | None,
    *rest: Any,
    **how: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    dpos_key, dpos_query = (q.new_empty((0,) if t is None else t.shape) for t in (pos_key, pos_query))
    return dq, dk, dv, dpos_key, dpos_query


def _setup(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, Tensor]
) -> None:
    *tensors, ctx.max_seqlen = inputs
    ctx.how = dict(keyword_only_inputs)
    ctx.save_for_backward(*tensors, *output, ctx.how.pop("positions"))
    ctx.mark_non_differentiable(output[1])


def _gradient(ctx: Any, dout: Tensor, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, pos_key, pos_query, cu_seqlens, out, lse, positions = ctx.saved_tensors
    gradients = _disentangled_attention_backward(
        dout, q, k, v, pos_key, pos_query, out, lse, cu_seqlens, ctx.max_seqlen, positions=positions, **ctx.how
    )
    return (
        *(g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad[:5], strict=True)),
        None,
        None,
    )


def _validate(*inputs: Any, positions: Tensor | None, **how: Any) -> None:
    op = "disentangled_attention"
    q, *_, cu_seqlens, max_seqlen = inputs
    if q.device.type != "cpu":  # on a CPU the op checks them itself
        attention_reference.offsets_of(op, "cu_seqlens", cu_seqlens, q.size(0), max_seqlen)
    if positions is not None:
        _check_increasing(op, positions, cu_seqlens)


def _check_increasing(op: str, positions: Tensor, cu_seqlens: Tensor) -> None:
    """Reads both on the host."""
    starts = cu_seqlens.tolist()
    for row in ((positions[1:] <= positions[:-1]).nonzero().flatten() + 1).tolist():
        if starts[0] < row < starts[-1] and row not in starts:
            raise ValueError(
                f"{op}: positions must increase within a sequence, got {int(positions[row - 1])} and then "
                f"{int(positions[row])} at row {row}"
            )


_disentangled_attention_backward = register_op(
    "disentangled_attention_backward",
    reference=reference.disentangled_attention_backward,
    fake=_backward_fake,
    example=examples.disentangled_attention_backward,
)
_disentangled_attention = register_op(
    "disentangled_attention",
    reference=reference.disentangled_attention,
    fake=_fake,
    example=examples.disentangled_attention,
    backward=_gradient,
    setup_context=_setup,
    autocast=("q", "k", "v", "pos_key", "pos_query"),
    validate=_validate,
)


def disentangled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_key: Tensor | None,
    pos_query: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    positions: Tensor | None = None,
    softmax_scale: float | None = None,
    position_buckets: int = 0,
    max_relative_positions: int = 512,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Self-attention with content-to-position and position-to-content terms (DeBERTa, arXiv 2006.03654, equation 4).

    score(i, j) = softmax_scale * (q_i . k_j + q_i . pos_key[r] + k_j . pos_query[r]) for queries i and keys j of one
    sequence, with r = clamp(bucket(position_i - position_j) + span, 0, 2 * span - 1).

    Args:
        q, k, v: [T, H, D], float16, bfloat16, float32 or float64; the last dimension contiguous, others of any stride,
            so that slices of one product need no copy. Sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1].
        pos_key, pos_query: [2 * span, H, D] like q: the embeddings of relative positions, projected as keys and as
            queries are. Row span is distance 0. None: without that term.
        cu_seqlens: int32 [B + 1], from 0, not decreasing, within the rows of q.
        max_seqlen: at least the longest sequence.
        positions: int64 [T]: places that distances are taken between, increasing within a sequence, as
            `Packing.position_ids`. None: the rank in the sequence, which comes to the same where no mask has holes.
        softmax_scale: by default 1 / sqrt(D * (1 + number of tables)). Any finite number, as in `varlen_attention`. In
            float16 kernels products with the tables may be as large as 2^23 / softmax_scale (up to 2^28).
        position_buckets: 0: a distance is its own bucket. At least 2: distances up to half of it are; farther ones
            share buckets that grow with the logarithm of the distance (DeBERTa-v2 and v3).
        max_relative_positions: with buckets: the distance whose bucket is the last one, plus 1.
        return_lse: also return the log-sum-exp of each row's scores.

    Returns:
        out [T, H, D] like q, or (out, lse) with lse [H, T] float32 (float64 for float64), which has no gradient. A row
        past the last sequence has out 0, lse -inf and gradient 0. Gradients are the same bit by bit in each run.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong shape, a last dimension that is not contiguous, tensors on different devices, buckets that
            do not fit max_relative_positions, a softmax_scale that is not finite. Values of cu_seqlens that decrease,
            pass the end or exceed max_seqlen: on a CPU, or with WARPFORM_VALIDATE=1, which waits for the device;
            otherwise they are clamped and never lead outside of the tensors. Positions that do not increase within a
            sequence: with WARPFORM_VALIDATE=1; otherwise gradients are wrong.
    """
    out, lse = _disentangled_attention(
        q,
        k,
        v,
        pos_key,
        pos_query,
        cu_seqlens,
        max_seqlen,
        positions=positions,
        softmax_scale=softmax_scale,
        position_buckets=position_buckets,
        max_relative_positions=max_relative_positions,
    )
    return (out, lse) if return_lse else out
