"""Attention over a sequence that is spread over ranks, exact, without any rank holding it whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import _check
from ..ops._dtypes import accumulation_dtype
from . import _agreement, _ring_steps
from ._group import Group, LocalGroup, _ring, execute, name_of
from ._register import register_op
from ._transport import run
from .layouts import check_layout

# The arguments of both ops after their tensors. Tensors of a LocalGroup have one dimension more, except cu_seqlens.
_HOW = (
    "str group, *, Tensor? cu_seqlens, bool causal, str layout, float? softmax_scale, SymInt? seqlen, float? timeout, "
    "str check"
)


def _name(how: dict[str, Any]) -> str:
    return "ring_attention" if how["cu_seqlens"] is None else "ring_attention_varlen"


def _forward(
    q: Tensor, k: Tensor, v: Tensor, group: str, *, timeout: float | None, **how: Any
) -> tuple[Tensor, Tensor]:
    op = _name(how)
    out, lse = execute(op, group, timeout, _ring_steps.forward, q, k, v, op=op, group=group, **how)
    return out, lse


def _fake(q: Tensor, k: Tensor, v: Tensor, group: str, **how: Any) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(q.dtype)
    return q.new_empty(q.shape), q.new_empty((*q.shape[:-3], q.size(-2), q.size(-3)), dtype=dtype)


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    group: str,
    *,
    timeout: float | None,
    **how: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    op = _name(how)
    dq, dk, dv = execute(op, group, timeout, _ring_steps.backward, dout, q, k, v, out, lse, op=op, **how)
    return dq, dk, dv


def _backward_fake(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **how: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, Tensor]
) -> None:
    q, k, v, ctx.group = inputs
    ctx.how = dict(keyword_only_inputs)
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    # All of it is this rank's: what is saved shrinks with the number of ranks.
    ctx.save_for_backward(q, k, v, out, lse, ctx.how.pop("cu_seqlens"))


def _gradient(ctx: Any, dout: Tensor | None, dlse: None) -> tuple[Tensor | None, ...]:
    *saved, cu_seqlens = ctx.saved_tensors
    if dout is None:  # other ranks wait for the gradients that pass through this one
        dout = torch.zeros_like(saved[3])
    gradients = _ring_attention_backward(dout, *saved, ctx.group, cu_seqlens=cu_seqlens, **ctx.how)
    return (*(g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad[:3], strict=True)), None)


_ring_attention_backward = register_op(
    f"ring_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_HOW})"
    " -> (Tensor dq, Tensor dk, Tensor dv)",
    _backward,
    fake=_backward_fake,
)
_ring_attention = register_op(
    f"ring_attention(Tensor q, Tensor k, Tensor v, {_HOW}) -> (Tensor out, Tensor lse)",
    _forward,
    fake=_fake,
    backward=_gradient,
    setup_context=_setup,
    autocast=("q", "k", "v"),
)


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Group,
    causal: bool = False,
    layout: str = "zigzag",
    softmax_scale: float | None = None,
    seqlen: int | None = None,
    timeout: float | None = None,
    check: str | None = None,
) -> Tensor:
    """softmax(softmax_scale * q k^T) v over a sequence of which each of N ranks holds L / N tokens (arXiv 2310.01889).

    Keys and values go around the ring in N - 1 hops, each hidden behind the attention to those that came before; the
    softmax is carried along in float32 (float64 for float64). All ranks of the group must call it, and its backward.

    Args:
        q: [B, L / N, H, D], float16, bfloat16, float32 or float64: this rank's tokens, as `shard_sequence` lays them.
        k, v: [B, L / N, Hkv, D] like q. H is a multiple of Hkv; query head h reads key head h // (H // Hkv).
        group: a process group or a mesh of one dimension. A mesh of two dimensions, (outer, inner), or a pair of
            process groups is a double ring: rank = outer rank * inner size + inner rank. A LocalGroup is N
            ranks in this process; q, k, v and the result then have one dimension more, the first, of size N.
        causal: a query sees keys at positions up to its own, in the order of the whole sequence.
        layout: "zigzag" (L divisible by 2 N; the even load under causal masks), "striped" or "contiguous" (by N).
        softmax_scale: D ** -0.5 by default.
        seqlen: tokens of the whole sequence without padding at its end. Rows of padding are not read; they have
            output 0, and k and v have gradient 0 there.
        timeout: seconds that one message may take; None: the group's own time-out. CUDA tensors: see docs/ring.md.
        check: "always": in each call the ranks compare what they were called with before the first step, and none
            returns before all are done. "first": only when this rank has not called it like this before, and with
            nothing at the end; a rank that deviates later ends in the time-out. None: "always" on a CPU, else "first".

    Returns:
        [B, L / N, H, D] like q: this rank's part of the attention to the whole sequence. Gradients are those of the sum
        of all ranks' losses: nothing is divided by N.

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype or shape.
        RingMismatchError: on all ranks, where they disagree about shapes, dtypes, layouts, flags or which op this is.
        RingError, RingTimeoutError: a rank is gone or too slow. Nothing is returned; the group cannot be used again.
    """
    op = "ring_attention"
    return _call(op, q, k, v, None, group, causal, layout, softmax_scale, seqlen, timeout, check)


def ring_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    group: Group,
    causal: bool = False,
    layout: str = "zigzag",
    softmax_scale: float | None = None,
    timeout: float | None = None,
    check: str | None = None,
) -> Tensor:
    """`ring_attention` for several sequences laid end to end, each of them spread over all ranks.

    Args:
        q: [T / N, H, D]: this rank's tokens of every sequence, as `shard_sequence(..., cu_seqlens=...)` lays them.
        k, v: [T / N, Hkv, D].
        cu_seqlens: int32 [B + 1], from 0: where each sequence's part begins among this rank's rows, the same on all
            ranks (`shard_cu_seqlens`). For zigzag lengths are even. It has no dimension for a LocalGroup's ranks.
        All others: as in `ring_attention`.

    Returns:
        [T / N, H, D] like q; rows past the last sequence are 0.

    Raises:
        TypeError, ValueError, RingMismatchError, RingError, RingTimeoutError: as `ring_attention`. Values of cu_seqlens
            are read on a CPU only.
    """
    op = "ring_attention_varlen"
    return _call(op, q, k, v, cu_seqlens, group, causal, layout, softmax_scale, None, timeout, check)


def _call(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    group: Group,
    causal: bool,
    layout: str,
    softmax_scale: float | None,
    seqlen: int | None,
    timeout: float | None,
    check: str | None,
) -> Tensor:
    name = name_of(op, group)
    if timeout is not None and not timeout > 0:
        raise ValueError(f"{op}: timeout must be above 0 seconds, or None, got {timeout!r}")
    device = q.device if isinstance(q, Tensor) else torch.device("cpu")
    check = _agreement.choose(op, check, device)
    try:
        _check_arguments(op, q, k, v, cu_seqlens, isinstance(group, LocalGroup), layout, seqlen)
    except (TypeError, ValueError) as error:
        if check == "always" and not isinstance(group, LocalGroup) and not torch.compiler.is_compiling():
            run(_agreement.refuse(_ring(op, name, timeout), op, error, device=device))
        raise
    _check.log(op, q=q, k=k, cu_seqlens=cu_seqlens, group=name, causal=causal, layout=layout, seqlen=seqlen)
    out, _ = _ring_attention(
        q, k, v, name, cu_seqlens=cu_seqlens, causal=causal, layout=layout, softmax_scale=softmax_scale, seqlen=seqlen,
        timeout=timeout, check=check,
    )  # fmt: skip
    return out


def _check_arguments(
    op: str, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, local: bool, layout: str, seqlen: int | None
) -> None:
    shape = "[rows, heads, head_dim]" if op == "ring_attention_varlen" else "[batch, rows, heads, head_dim]"
    dims = (3 if op == "ring_attention_varlen" else 4) + local
    for name, t in (("q", q), ("k", k), ("v", v)):
        _check.tensor(op, name, t)
        if t.dim() != dims:
            raise ValueError(
                f"{op}: {name} must be of shape {shape}{', after the ranks of a LocalGroup' if local else ''}, "
                f"got {_check.describe(t)}"
            )
    _check.floating(op, "q", q)
    check_layout(op, layout)
    if k.shape != v.shape or k.shape[:-2] != q.shape[:-2] or k.size(-1) != q.size(-1):
        raise ValueError(
            f"{op}: k and v must be of q's shape but for the heads, got q {_check.describe(q)}, k {_check.describe(k)} "
            f"and v {_check.describe(v)}; keys of another sequence are not supported"
        )
    if k.size(-2) == 0 or q.size(-2) % k.size(-2) != 0:
        raise ValueError(
            f"{op}: the {q.size(-2)} heads of q must be a multiple of the heads of k and v, got {k.size(-2)}"
        )
    for name, t in (("k", k), ("v", v)):
        if t.dtype != q.dtype and not torch.is_autocast_enabled(q.device.type):
            raise TypeError(f"{op}: {name} must be {_check.dtype_name(q.dtype)} as q is, got {_check.describe(t)}")
        _check.same_device(op, name, t, "q", q)
    if op == "ring_attention_varlen":
        _check.cu_seqlens(op, "cu_seqlens", cu_seqlens, q)
    if seqlen is not None:
        _check.integer(op, "seqlen", seqlen)
