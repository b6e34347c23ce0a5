"""Ring attention as one rank runs it (arXiv 2310.01889; masks balanced as in arXiv 2311.09431 and its descendants).

Forward: K and V go around in one message, N - 1 hops, each posted before the step that it hides behind. Backward: they
go around again, and their gradients follow one step behind in float32, N hops, so that the last brings them home; a
gradient is posted when its step is done and is awaited one step later. Queries and all that belongs to them stay.

A double ring turns an inner ring (within a node) once for each hop of the outer one. What an outer hop brings is sent
on when the inner ring begins to turn, so the slow hop hides behind a whole turn.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops import attention_step, attention_step_backward
from ..ops._dtypes import accumulation_dtype
from . import _agreement
from ._blocks import DenseRows, Rows, VarlenRows, block_of
from ._group import Ring
from ._transport import Pending, Steps
from .layouts import multiple_of


class _Buffers:
    """Buffers of one shape that take turns: two at a time in a ring, four in a double ring."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def take(self, like: Tensor) -> Tensor:
        return self._free.pop() if self._free else torch.empty_like(like)

    def give(self, buffer: Tensor) -> None:
        self._free.append(buffer)


class _Turn:
    """The place of a rank in its tour of all sources: `outer` turns done, `inner` steps of this turn."""

    def __init__(self, ring: Ring, outer: int, inner: int) -> None:
        outer_rank = 0 if ring.outer is None else ring.outer.rank
        outer_size = 1 if ring.outer is None else ring.outer.size
        self.source = (outer_rank - outer) % outer_size * ring.inner.size + (ring.inner.rank - inner) % ring.inner.size
        self.step = f"step {outer * ring.inner.size + inner + 1} of {ring.size}"


def _sizes(ring: Ring) -> tuple[int, int]:
    return (1 if ring.outer is None else ring.outer.size), ring.inner.size


def _rows(
    op: str, ring: Ring, q: Tensor, cu_seqlens: Tensor | None, layout: str, causal: bool, seqlen: int | None
) -> Rows:
    """Checks lengths too: ranks agree on them by now, so all of them raise."""
    wanted = multiple_of(ring.size, layout) // ring.size
    if cu_seqlens is not None:
        if cu_seqlens.device.type == "cpu":
            lengths = cu_seqlens.diff()
            if (lengths % wanted != 0).any() or (lengths < 0).any() or cu_seqlens[0] != 0 or cu_seqlens[-1] > len(q):
                raise ValueError(
                    f"{op}: cu_seqlens must rise from 0 to at most the {len(q)} rows of q in multiples of {wanted} for "
                    f'layout "{layout}", got lengths {lengths.tolist()[:16]} from {int(cu_seqlens[0])}'
                )
        return VarlenRows(cu_seqlens, q.size(0), causal and layout == "zigzag")
    if q.size(1) % wanted != 0:
        raise ValueError(
            f'{op}: the rows of each rank must be a multiple of {wanted} for layout "{layout}", got {q.size(1)}'
        )
    if seqlen is not None and not 0 <= seqlen <= q.size(1) * ring.size:
        raise ValueError(
            f"{op}: seqlen must be between 0 and the {q.size(1) * ring.size} rows of all ranks, got {seqlen}"
        )
    return DenseRows(q.size(1), layout, ring.rank, ring.size, seqlen)


def forward(
    ring: Ring,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    op: str,
    cu_seqlens: Tensor | None,
    group: str,
    causal: bool,
    layout: str,
    softmax_scale: float | None,
    seqlen: int | None,
    check: str,
) -> Steps[tuple[Tensor, Tensor]]:
    """q [B, L / N, H, D], k, v [B, L / N, Hkv, D] -> out like q, lse [B, H, L / N]; varlen q [T, H, D], lse [H, T]."""
    facts = {
        "q": list(q.shape), "k": list(k.shape), "dtype": str(q.dtype), "layout": layout, "causal": causal,
        "softmax_scale": softmax_scale, "seqlen": seqlen, "ring": _sizes(ring),
        "cu_seqlens": None if cu_seqlens is None else _agreement.digest(cu_seqlens),
    }  # fmt: skip
    yield from _agreement.agree(ring, op, facts, group=group, check=check, device=q.device)
    rows = _rows(op, ring, q, cu_seqlens, layout, causal, seqlen)
    state = accumulation_dtype(q.dtype)
    out = lse = None
    if not rows.covers_all("all"):
        out = torch.zeros(q.shape, dtype=state, device=q.device)
        lse = torch.full(_lse_shape(q), -math.inf, dtype=state, device=q.device)

    def step(source: int, kv: Tensor) -> None:
        nonlocal out, lse
        block = block_of(layout, causal, ring.rank, source, ring.size)
        if block is None:
            return
        key, value = (rows.keys(t, block.k_rows, source) for t in kv.unbind(0))
        carried: tuple[Tensor | None, Tensor | None] = None, None
        if out is not None and lse is not None:
            carried = rows.queries(out, block.q_rows), rows.of_queries(lse, block.q_rows)
        new_out, new_lse = attention_step(
            rows.queries(q, block.q_rows), key, value, *carried, softmax_scale=softmax_scale, **block.mask,
            cu_seqlens_q=rows.cu_seqlens_of[block.q_rows], cu_seqlens_k=rows.cu_seqlens_of[block.k_rows],
        )  # fmt: skip
        if rows.covers_all(block.q_rows):
            out, lse = new_out, new_lse
        else:
            assert out is not None and lse is not None  # the first step has all rows
            rows.put_queries(out, block.q_rows, new_out)
            rows.put_of_queries(lse, block.q_rows, new_lse)

    yield from _tour(ring, torch.stack((k, v)), step)
    yield from _agreement.finish(ring, check=check, device=q.device)
    assert out is not None and lse is not None
    return out.to(q.dtype), lse


def _lse_shape(q: Tensor) -> tuple[int, ...]:
    return (*q.shape[:-3], q.size(-2), q.size(-3))


def _tour(ring: Ring, kv: Tensor, step: Callable[[int, Tensor], None]) -> Steps[None]:
    """Calls step(source, kv) with the keys and values of every rank. kv is overwritten."""
    outer_size, inner_size = _sizes(ring)
    buffers = _Buffers()
    for outer in range(outer_size):
        entered, next_turn = kv, None
        if ring.outer is not None and outer + 1 < outer_size:
            label = f"outer step {outer + 1} of {outer_size - 1}"
            next_turn = ring.outer.post(kv, into=buffers.take(kv), step=label)
        for inner in range(inner_size):
            turn = _Turn(ring, outer, inner)
            pending = None
            if inner + 1 < inner_size:
                pending = ring.inner.post(kv, into=buffers.take(kv), step=turn.step)
            step(turn.source, kv)
            if pending is not None:
                used, kv = kv, (yield pending)
                if used is not entered or next_turn is None:
                    buffers.give(used)
        if next_turn is not None:
            used, kv = kv, (yield next_turn)
            buffers.give(used)
            if used is not entered:
                buffers.give(entered)


def backward(
    ring: Ring,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    op: str,
    cu_seqlens: Tensor | None,
    causal: bool,
    layout: str,
    softmax_scale: float | None,
    seqlen: int | None,
    check: str,
) -> Steps[tuple[Tensor, Tensor, Tensor]]:
    """Gradients of q, k and v from that of out, with what `forward` returned."""
    rows = _rows(op, ring, q, cu_seqlens, layout, causal, seqlen)
    state = lse.dtype
    dout = dout.to(q.dtype).contiguous()
    delta = (dout.to(state) * out.to(state)).sum(-1).transpose(-1, -2).contiguous()  # like lse
    dq = torch.zeros(q.shape, dtype=state, device=q.device)

    def step(source: int, kv: Tensor) -> tuple[str, Tensor, Tensor] | None:
        nonlocal dq
        block = block_of(layout, causal, ring.rank, source, ring.size)
        if block is None:
            return None
        key, value = (rows.keys(t, block.k_rows, source) for t in kv.unbind(0))
        new_dq, dk, dv = attention_step_backward(
            rows.queries(dout, block.q_rows), rows.of_queries(delta, block.q_rows), rows.queries(q, block.q_rows),
            key, value, rows.of_queries(lse, block.q_rows), rows.queries(dq, block.q_rows),
            softmax_scale=softmax_scale, **block.mask, cu_seqlens_q=rows.cu_seqlens_of[block.q_rows],
            cu_seqlens_k=rows.cu_seqlens_of[block.k_rows],
        )  # fmt: skip
        if rows.covers_all(block.q_rows):
            dq = new_dq
        else:
            rows.put_queries(dq, block.q_rows, new_dq)
        return block.k_rows, dk, dv

    def add(dkv: Tensor, source: int, part: tuple[str, Tensor, Tensor] | None) -> None:
        if part is not None:
            which, *gradients = part
            for total, new in zip(dkv.unbind(0), gradients, strict=True):
                rows.add_keys(total, which, source, new)

    dkv = yield from _tour_with_gradients(ring, torch.stack((k, v)), state, step, add)
    yield from _agreement.finish(ring, check=check, device=q.device)
    return dq.to(q.dtype), dkv[0].to(k.dtype), dkv[1].to(v.dtype)


def _tour_with_gradients(
    ring: Ring, kv: Tensor, state: torch.dtype, step: Callable[[int, Tensor], Any], add: Callable[..., None]
) -> Steps[Tensor]:
    """`_tour`; what step(source, kv) returns, add(dkv, source, it) adds to the source's gradient. Returns this rank's.

    kv [2, rows...] -> [2, rows...] in the dtype of sums.
    """
    outer_size, inner_size = _sizes(ring)
    buffers, gradient_buffers = _Buffers(), _Buffers()
    gradients = torch.zeros(kv.shape, dtype=state, device=kv.device)
    from_outer: Pending | None = None  # gradients of an earlier turn, on their way home through the outer ring
    sent_home = gradients
    for outer in range(outer_size):
        entered, next_turn = kv, None
        if ring.outer is not None and outer + 1 < outer_size:
            label = f"outer step {outer + 1} of {outer_size - 1}, backward"
            next_turn = ring.outer.post(kv, into=buffers.take(kv), step=label)
        following: Pending | None = None  # the gradients of the keys of this step, one step behind them
        if outer > 0:
            gradients = gradient_buffers.take(gradients).zero_()
        for inner in range(inner_size):
            turn = _Turn(ring, outer, inner)
            pending = None
            if inner + 1 < inner_size:
                pending = ring.inner.post(kv, into=buffers.take(kv), step=f"{turn.step}, backward")
            part = step(turn.source, kv)
            if following is not None:
                sent, gradients = gradients, (yield following)
                gradient_buffers.give(sent)
            add(gradients, turn.source, part)
            if inner_size > 1:
                following = ring.inner.post(
                    gradients, into=gradient_buffers.take(gradients), step=f"{turn.step}, gradients"
                )
            if pending is not None:
                used, kv = kv, (yield pending)
                if used is not entered or next_turn is None:
                    buffers.give(used)
        if following is not None:
            sent, gradients = gradients, (yield following)
            gradient_buffers.give(sent)
        # Gradients of what entered this turn are where it entered. Add what earlier turns found, and on to its home.
        if from_outer is not None:
            earlier = yield from_outer
            gradients += earlier
            gradient_buffers.give(earlier)
            gradient_buffers.give(sent_home)
        if ring.outer is not None and outer_size > 1:
            sent_home, label = gradients, f"outer step {outer + 1} of {outer_size}, gradients"
            from_outer = ring.outer.post(sent_home, into=gradient_buffers.take(gradients), step=label)
        if next_turn is not None:
            used, kv = kv, (yield next_turn)
            buffers.give(used)
            if used is not entered:
                buffers.give(entered)
    return gradients if from_outer is None else (yield from_outer)
