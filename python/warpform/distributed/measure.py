"""What the cost model needs, measured: the time of a step of attention, and of a hop between ranks."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops import attention_step, attention_step_backward
from ._transport import ProcessGroupTransport
from .cost_model import Cluster, Link, StepTime, Workload

SIZES = (1 << 10, 1 << 16, 1 << 18, 1 << 20, 1 << 22)  # bytes of the messages that a hop is measured with


def median_seconds(call: Callable[[], Any], repeats: int, device: torch.device | str = "cpu") -> float:
    """The median of `repeats` calls, after one that does not count."""
    call()
    cuda = torch.device(device).type == "cuda"
    found = []
    for _ in range(repeats):
        if cuda:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def measure_link(group: dist.ProcessGroup, *, sizes: Sequence[int] = SIZES, repeats: int = 15) -> Link:
    """alpha and beta of a hop of a ring over this group: all ranks send to the next one at once. All must call it.

    Args:
        group: on CUDA its tensors are there, and each hop is waited for.
        sizes: bytes.

    Returns:
        The same on all ranks: of each size the slowest rank's median counts.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else "cpu"
    ring = ProcessGroupTransport(group, op="measure_link", timeout=None)
    medians = []
    for size in sizes:
        message = torch.zeros(max(1, size), dtype=torch.uint8, device=device)
        into = torch.empty_like(message)

        def hop(message: Tensor = message, into: Tensor = into) -> None:
            ring.post(message, into=into, step="a hop that is measured").wait()

        medians.append(median_seconds(hop, repeats, device))
    slowest = torch.tensor(medians, dtype=torch.float64, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group=group)
    return Link.fit(list(zip(map(float, sizes), slowest.tolist(), strict=True)))


def measure_steps(
    work: Workload,
    chunks: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    backward: bool = False,
    repeats: int = 3,
) -> StepTime:
    """Times the steps that a ring of this workload takes, with a state carried in, for ranks of `chunks` rows each.

    Where it is causal: the diagonal block; and, as zigzag has them, all queries with half of the keys and half of the
    queries with all keys. Else all with all.

    Raises:
        ValueError: no chunks.
    """
    heads, d, b = work.heads, work.head_dim, work.batch
    samples = []
    for c in chunks:
        shapes = [(c, c, True), (c, c // 2, False), (c // 2, c, False)] if work.causal else [(c, c, False)]
        for rows, keys, causal in shapes:
            q, dout = (torch.randn(b, rows, heads, d, device=device).to(dtype) for _ in range(2))
            k, v = (torch.randn(b, keys, work.hkv, d, device=device).to(dtype) for _ in range(2))
            out, lse = attention_step(q, k, v, causal=causal)
            if backward:
                delta = (dout.to(lse.dtype) * out).sum(-1).transpose(1, 2).contiguous()
                dq = torch.zeros_like(out)

                def call(args: tuple[Any, ...] = (dout, delta, q, k, v, lse, dq), causal: bool = causal) -> None:
                    attention_step_backward(*args, causal=causal)
            else:

                def call(args: tuple[Any, ...] = (q, k, v, out, lse), causal: bool = causal) -> None:
                    attention_step(*args, causal=causal)

            pairs = rows * (rows + 1) / 2 if causal else float(rows * keys)
            each = b * heads
            samples.append((float(rows * each), pairs * each, median_seconds(call, repeats, device)))
    return StepTime.fit(samples)


def measure_here(work: Workload, dtype: str = "float32", *, chunks: Sequence[int] = (256, 512, 1024)) -> Cluster:
    """This machine's CPU: steps on one thread, and a hop between two processes over gloo.

    Raises:
        RuntimeError: the processes could not be started.
    """
    kind = getattr(torch, dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        steps = [measure_steps(work, chunks, dtype=kind, backward=backward) for backward in (False, True)]
    finally:
        torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        started = [context.Process(target=_measure_rank, args=(r, f"{folder}/store", theirs)) for r in range(2)]
        for process in started:
            process.start()
        theirs.close()
        try:
            alpha, beta = ours.recv()
        except EOFError:
            raise RuntimeError("measure_here: the two processes that measure a hop ended without a result") from None
        finally:
            for process in started:
                process.join()
    return Cluster(steps[0], steps[1], Link(alpha, beta), processors=len(os.sched_getaffinity(0)), checked=True)


def _measure_rank(rank: int, store: str, connection: Any) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", rank=rank, world_size=2, store=dist.FileStore(store, 2))
    assert dist.group.WORLD is not None
    link = measure_link(dist.group.WORLD)
    if rank == 0:
        connection.send((link.alpha, link.beta))
    dist.destroy_process_group()
