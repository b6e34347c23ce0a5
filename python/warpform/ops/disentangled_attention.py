"""DeBERTa's attention, whose scores see content and relative position apart, over sequences laid end to end."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _autocast, _env
from . import _check
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
    op = "disentangled_attention"
    _check_tensors(op, q, k, v, pos_key, pos_query)
    _check.cu_seqlens(op, "cu_seqlens", cu_seqlens, q)
    _check.integer(op, "max_seqlen", max_seqlen)
    _check_positions(op, positions, q)
    _check_buckets(op, position_buckets, max_relative_positions)
    _check.finite(op, "softmax_scale", softmax_scale)
    if not torch.compiler.is_compiling():
        if max_seqlen < 0:
            raise ValueError(f"{op}: max_seqlen must not be negative, got {max_seqlen}")
        if q.device.type != "cpu" and _env.validate():  # on a CPU the reference checks
            attention_reference.offsets_of(op, "cu_seqlens", cu_seqlens, q.size(0), max_seqlen)
        if positions is not None and _env.validate():
            _check_increasing(op, positions, cu_seqlens)
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


def _check_tensors(op: str, q: Tensor, k: Tensor, v: Tensor, pos_key: Tensor | None, pos_query: Tensor | None) -> None:
    tables = [(name, t) for name, t in (("pos_key", pos_key), ("pos_query", pos_query)) if t is not None]
    for name, t in (("q", q), ("k", k), ("v", v), *tables):
        _check.tensor(op, name, t)
        if t.dim() != 3:
            rows = "2 * span" if name.startswith("pos_") else "total"
            raise ValueError(f"{op}: {name} must be of shape [{rows}, heads, head_dim], got {_check.describe(t)}")
        if t.stride(2) != 1 and t.size(2) != 1:
            raise ValueError(
                f"{op}: the last dimension of {name} must be contiguous, got stride {t.stride(2)}; "
                f"call {name}.contiguous()"
            )
    _check.floating(op, "q", q)
    if q.size(2) == 0:
        raise ValueError(f"{op}: head_dim must be at least 1, got q {_check.describe(q)}")
    for name, t in (("k", k), ("v", v)):
        if t.shape != q.shape:
            raise ValueError(f"{op}: {name} must be of shape {list(q.shape)} as q is, got {_check.describe(t)}")
    for name, t in tables:
        if t.size(0) < 2 or t.size(0) % 2 != 0 or t.shape[1:] != q.shape[1:]:
            expected = f"[2 * span, {q.size(1)}, {q.size(2)}]"
            raise ValueError(f"{op}: {name} must be of shape {expected} with span at least 1, got {_check.describe(t)}")
    if len(tables) == 2 and tables[0][1].size(0) != tables[1][1].size(0):
        raise ValueError(
            f"{op}: pos_query must be of shape {list(tables[0][1].shape)} as pos_key is, "
            f"got {_check.describe(tables[1][1])}"
        )
    for name, t in (("k", k), ("v", v), *tables):
        if t.dtype != q.dtype and not _autocast.enabled(q.device):
            raise TypeError(f"{op}: {name} must be {_check.dtype_name(q.dtype)} as q is, got {_check.describe(t)}")
        _check.same_device(op, name, t, "q", q)


def _check_positions(op: str, positions: Tensor | None, q: Tensor) -> None:
    if positions is None:
        return
    _check.tensor(op, "positions", positions)
    if positions.dtype != torch.int64:
        raise TypeError(f"{op}: positions must be int64, got {_check.describe(positions)}")
    if positions.dim() != 1 or positions.size(0) != q.size(0):
        raise ValueError(
            f"{op}: positions must be of shape [{q.size(0)}], the rows of q, got {_check.describe(positions)}"
        )
    _check.same_device(op, "positions", positions, "q", q)


def _check_increasing(op: str, positions: Tensor, cu_seqlens: Tensor) -> None:
    """Reads both on the host."""
    starts = cu_seqlens.tolist()
    for row in ((positions[1:] <= positions[:-1]).nonzero().flatten() + 1).tolist():
        if starts[0] < row < starts[-1] and row not in starts:
            raise ValueError(
                f"{op}: positions must increase within a sequence, got {int(positions[row - 1])} and then "
                f"{int(positions[row])} at row {row}"
            )


def _check_buckets(op: str, position_buckets: int, max_relative_positions: int) -> None:
    _check.integer(op, "position_buckets", position_buckets)
    _check.integer(op, "max_relative_positions", max_relative_positions)
    if position_buckets < 0 or position_buckets == 1:
        raise ValueError(f"{op}: position_buckets must be 0 or at least 2, got {position_buckets}")
    if position_buckets > 0 and max_relative_positions - 1 <= position_buckets // 2:
        raise ValueError(
            f"{op}: max_relative_positions must be at least {position_buckets // 2 + 2} with {position_buckets} "
            f"position_buckets, got {max_relative_positions}"
        )
