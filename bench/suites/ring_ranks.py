"""The processes of the ring benchmarks and the pool of them, in a module that those processes can import."""

from __future__ import annotations

import atexit
import functools
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from helpers.processes import Failed, Processes
from warpform.cli.ring_model.measure import measure_link
from warpform.distributed import SequenceParallel, SequenceParallelAttention, ring_attention, shard_sequence

# The call that this process times, made by `prepare`.
_prepared: Callable[[], tuple[Tensor, ...]] | None = None


def draw(seqlen: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """q, k, v and the gradient of the output, [1, L, H, D], the same in every process; drawn on the device."""
    made = torch.Generator(device).manual_seed(seqlen + heads)
    shapes = [(1, seqlen, h, head_dim) for h in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(shape, generator=made, device=device).to(dtype) for shape in shapes]


def step(attention: Callable[..., Tensor], inputs: list[Tensor], dout: Tensor, backward: bool) -> tuple[Tensor, ...]:
    """(out,) or (out, dq, dk, dv)."""
    if not backward:
        with torch.no_grad():
            return (attention(*inputs),)
    out = attention(*inputs)
    return (out.detach(), *torch.autograd.grad(out, inputs, dout))


def prepare(provider: str, layout: str, sizes: tuple[int, int, int, int], backward: bool) -> None:
    """Makes this rank's part of the inputs, and what is to be timed on them."""
    global _prepared
    q, k, v, dout = draw(*sizes, torch.float32, "cpu")
    group = dist.group.WORLD
    assert group is not None
    if provider == "torch_context_parallel":
        _prepared = _context_parallel(q, k, v, dout, backward)
        return
    *inputs, dout = (shard_sequence(t, group=group, dim=1, layout=layout) for t in (q, k, v, dout))
    if backward:
        inputs = [t.requires_grad_() for t in inputs]
    _prepared = functools.partial(
        step, lambda *t: ring_attention(*t, group=group, causal=True, layout=layout), inputs, dout, backward
    )


def _context_parallel(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, backward: bool) -> Callable[[], Any]:
    """torch's own: fused attention patched to go around a ring, zigzag where it balances the load."""
    from torch.distributed.tensor.experimental import context_parallel

    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    buffers = [t.transpose(1, 2).contiguous() for t in (q, k, v, dout)]

    def attention(*inputs: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True)

    def run() -> tuple[Tensor, ...]:
        with context_parallel(mesh, buffers=buffers, buffer_seq_dims=[2] * 4):
            *inputs, own_dout = (t.detach().clone() for t in buffers)
            inputs = [t.requires_grad_(backward) for t in inputs]
            return tuple(t.transpose(1, 2) for t in step(attention, inputs, own_dout, backward))

    return run


def call(fetch: bool) -> list[np.ndarray] | None:
    """Runs it once; with fetch, what came out on this rank."""
    assert _prepared is not None
    found = _prepared()
    return [t.detach().contiguous().numpy() for t in found] if fetch else None


def measured_link() -> tuple[float, float]:
    """On every rank of a pool."""
    assert dist.group.WORLD is not None
    link = measure_link(dist.group.WORLD)
    return link.alpha, link.beta


def attempt(attention: str, layer_sizes: tuple[int, int, int], length: int, allowance: int) -> bool:
    """On every rank: one layer forward and backward, in no more memory than an idle process has and `allowance` bytes.

    What counts is memory that can be written, as the kernel counts it (RLIMIT_DATA).
    """
    ranks = dist.get_world_size()
    # Threads, connections and buffers that every process has are made first.
    _layer_step(attention, layer_sizes, 8)
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    idle = int(Path("/proc/self/statm").read_text().split()[5]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_DATA, (idle + allowance, hard))
    try:
        _layer_step(attention, layer_sizes, length // ranks)
        return True
    except (MemoryError, RuntimeError) as error:
        if "allocate" in str(error) or isinstance(error, MemoryError):
            return False
        raise
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _layer_step(attention: str, layer_sizes: tuple[int, int, int], rows: int) -> None:
    """Runs forward and backward of a layer on a rank with so many rows."""
    hidden, heads, projected = layer_sizes
    # Linformer's projections are made as this rank's columns of them.
    layer = SequenceParallelAttention(hidden, heads, attention=attention, linformer_rank=projected, max_seqlen=rows)
    layer.plan = SequenceParallel(dist.group.WORLD, layout="contiguous", timeout=60)
    x = torch.randn(1, rows, hidden).requires_grad_()
    layer(x)[0].sum().backward()


_pools: dict[tuple[int, str], Processes] = {}


def run(ranks: int, purpose: str, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """On all processes, of one thread each, joined by gloo; those of one purpose stay until one of them fails.

    Raises:
        RuntimeError: the first error of a rank, as one line.
    """
    key = ranks, purpose
    if key not in _pools:
        _pools[key] = Processes(ranks)
        atexit.register(_pools[key].close)
    results = _pools[key].try_run(function, *arguments)
    for result in results:
        if isinstance(result, Failed):
            drop(ranks, purpose)
            raise RuntimeError(result.text.strip().splitlines()[-1].removeprefix("RuntimeError: "))
    return results


def drop(ranks: int, purpose: str) -> None:
    """Ends these processes, if there are any."""
    processes = _pools.pop((ranks, purpose), None)
    if processes is not None:
        atexit.unregister(processes.close)
        processes.close()
