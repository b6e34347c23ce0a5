"""Examples of a step of attention over a sequence that comes in blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .._example import Call, Draw, offsets
from ..reference import attention_step as reference


def attention_step(draw: Draw) -> Iterator[Call]:
    """The first step and a later one, dense and packed, in both buckets of head_dim."""
    q, k, v = draw(2, 70, 2, 64), draw(2, 75, 1, 64), draw(2, 75, 1, 64)
    yield Call("first", (q, k, v))
    state = reference.attention_step(q, k, v)
    k, v = draw(2, 81, 1, 64), draw(2, 81, 1, 64)
    where: dict[str, Any] = {"causal": True, "q_offset": 60, "k_offset": 3, "q_stride": 2, "k_stride": 2}
    yield Call("later, causal, striped", (q, k, v, *state), where)
    lengths_q, lengths_k = (5, 0, 66), (3, 2, 71)
    q, k, v = draw(sum(lengths_q), 2, 128), draw(sum(lengths_k), 2, 128), draw(sum(lengths_k), 2, 128)
    packed = {"cu_seqlens_q": offsets(lengths_q), "cu_seqlens_k": offsets(lengths_k)}
    yield Call("d128 packed, window", (q, k, v), {**packed, "window_size_left": 30, "window_size_right": 40})


def attention_step_backward(draw: Draw) -> Iterator[Call]:
    """Yields the backward of each example of `attention_step`; a later step adds to gradients of earlier ones."""
    for call in attention_step(draw):
        q, k, v = call.args[:3]
        out, lse = reference.attention_step(*call.args, **call.kwargs)
        dout = draw.like(q)
        delta = (dout.to(out.dtype) * out).sum(-1)
        delta = delta.transpose(-1, -2).contiguous()
        so_far = tuple(draw(*t.shape, dtype=draw.wide) for t in (q, k, v)) if len(call.args) > 3 else ()
        for deterministic in (False, True):
            label = f"{call.label}{', deterministic' if deterministic else ''}"
            yield Call(label, (dout, delta, q, k, v, lse, *so_far), {**call.kwargs, "deterministic": deterministic})
