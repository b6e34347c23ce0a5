"""What ranks do in tests of faults: one of them dies, stops or calls something else, the others tell what they saw."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from warpform.distributed import RingError, _ring_steps, ring_attention, ring_attention_varlen

from .ring_attention import ring_of

# For the first call, in which connections are made and modules imported.
_START_S = 60.0


@dataclass
class Seen:
    """How a call ended for a rank."""

    outcome: str  # the error's class; or "returned"
    seconds: float
    text: str = ""
    rank: int = -1
    peer: int = -1
    step: str = ""


def _inputs(rows: int = 8, requires_grad: bool = False) -> list[torch.Tensor]:
    return [torch.randn(1, rows, 2, 16, requires_grad=requires_grad) for _ in range(3)]


def _observe(call: Any) -> Seen:
    began = time.monotonic()
    try:
        call()
    except RingError as error:
        return Seen(
            type(error).__name__, time.monotonic() - began, str(error), error.rank, error.peer, error.step
        )  # fmt: skip
    except Exception as error:
        return Seen(type(error).__name__, time.monotonic() - began, str(error))
    return Seen("returned", time.monotonic() - began)


def lose_a_rank(shape: tuple[int, ...], victim: int, how: str, phase: str, at_step: int, timeout_s: float) -> Seen:
    """All ranks compute; at its at_step-th step of the phase the victim gets SIGKILL or SIGSTOP."""
    name = "attention_step" if phase == "forward" else "attention_step_backward"
    step, taken = getattr(_ring_steps, name), 0

    def step_or_end(*args: Any, **kwargs: Any) -> Any:
        nonlocal taken
        taken += 1
        if dist.get_rank() == victim and taken == at_step:
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[how])
        return step(*args, **kwargs)

    q, k, v = _inputs(requires_grad=True)
    ring = ring_of(shape)
    ring_attention(q, k, v, group=ring, timeout=_START_S)  # connections are made, imports done
    setattr(_ring_steps, name, step_or_end)

    def call() -> None:
        out = ring_attention(q, k, v, group=ring, timeout=timeout_s)
        if phase == "backward":
            out.sum().backward()

    seen = _observe(call)
    assert q.grad is None or seen.outcome == "returned"
    return seen


def disagree(deviation: str, rank: int) -> tuple[Seen, Seen]:
    """One rank calls something else than the others; then all call the same again."""
    q, k, v = _inputs()
    how: dict[str, Any] = {"group": dist.group.WORLD, "timeout": 20.0}
    call: Any = ring_attention
    cu_seqlens: list[torch.Tensor] = []
    if deviation == "cu_seqlens":
        call, (q, k, v) = ring_attention_varlen, (t[0] for t in (q, k, v))
        cu_seqlens = [torch.tensor([0, 4, 8], dtype=torch.int32)]
    right = dict(how), (q, k, v, *cu_seqlens), call
    if dist.get_rank() == rank:
        if deviation == "rows":
            q, k, v = _inputs(10)
        elif deviation == "batch":
            q, k, v = (t.expand(2, -1, -1, -1) for t in (q, k, v))
        elif deviation == "kv_heads":
            k, v = k[:, :, :1], v[:, :, :1]
        elif deviation == "dtype":
            q, k, v = (t.double() for t in (q, k, v))
        elif deviation == "layout":
            how["layout"] = "striped"
        elif deviation == "causal":
            how["causal"] = True
        elif deviation == "scale":
            how["softmax_scale"] = 0.5
        elif deviation == "seqlen":
            how["seqlen"] = 9
        elif deviation == "cu_seqlens":
            cu_seqlens = [torch.tensor([0, 2, 8], dtype=torch.int32)]
        elif deviation == "op":
            call, (q, k, v) = ring_attention_varlen, (t[0] for t in (q, k, v))
            cu_seqlens = [torch.tensor([0, 8], dtype=torch.int32)]
        elif deviation == "refused":
            k = k[..., :3]
    seen = _observe(lambda: call(q, k, v, *cu_seqlens, **how))
    how, arguments, call = right
    return seen, _observe(lambda: call(*arguments, **how))


def deviate_unchecked(rank: int, timeout_s: float) -> Seen:
    """With check="first" a rank that deviates after the first call, alone, is not told so."""
    q, k, v = _inputs()
    how: dict[str, Any] = {"group": dist.group.WORLD, "check": "first", "timeout": _START_S}
    ring_attention(q, k, v, **how)
    how["timeout"] = timeout_s
    return _observe(lambda: ring_attention(q, k, v, causal=dist.get_rank() == rank, **how))
