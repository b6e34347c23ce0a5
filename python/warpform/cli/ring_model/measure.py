"""Measures the inputs of the cost model: the time of a step of attention, and of a hop between ranks."""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ...distributed._group import LocalGroup
from ...distributed._transport import Pending, ProcessGroupTransport
from ...distributed.ring_attention import ring_attention
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
        post = functools.partial(ring.post, message, into=torch.empty_like(message), step="a hop that is measured")
        medians.append(median_seconds(functools.partial(_wait_for, post), repeats, device))
    slowest = torch.tensor(medians, dtype=torch.float64, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group=group)
    return Link.fit(list(zip(map(float, sizes), slowest.tolist(), strict=True)))


def _wait_for(post: Callable[[], Pending]) -> None:
    post().wait()


def measure_steps(
    work: Workload,
    chunks: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    backward: bool = False,
    repeats: int = 5,
) -> StepTime:
    """Times ring attention over 1 and 2 ranks in this process, and tells apart what steps, rows and pairs cost.

    Ranks in one process take turns, so their time is the sum of their steps. Messages are copies, counted as rows.

    Args:
        work: its seqlen does not matter.
        chunks: rows of a rank; at least two numbers, for one cannot tell rows from pairs.

    Raises:
        ValueError: a layout that cannot divide a chunk.
    """
    samples = []
    for c in chunks:
        for ranks in (1, 2):
            one = dataclasses.replace(work, seqlen=c * ranks)
            group = LocalGroup(ranks)
            shapes = [(ranks, work.batch, one.chunk(ranks), heads, work.head_dim) for heads in (work.heads, work.hkv)]
            q, dout = (torch.randn(shapes[0], device=device).to(dtype) for _ in range(2))
            k, v = (torch.randn(shapes[1], device=device).to(dtype) for _ in range(2))
            inputs = [t.requires_grad_(backward) for t in (q, k, v)]
            call: Callable[[], Any]
            # No agreement: a hop of a small message costs nothing here.
            how: dict[str, Any] = {"causal": work.causal, "layout": work.layout, "check": "first"}
            if backward:
                out = ring_attention(*inputs, group=group, **how)
                call = functools.partial(torch.autograd.grad, out, inputs, dout, retain_graph=True)
            else:
                call = functools.partial(ring_attention, *inputs, group=group, **how)
            steps = [one.step(ranks, s) for s in range(ranks)]
            each = work.batch * work.heads
            calls = sum(float((rows > 0).sum()) for rows, _ in steps)
            rows, pairs = (each * sum(float(counts[i].sum()) for counts in steps) for i in range(2))
            samples.append((calls, rows, pairs, float(each * c * ranks), median_seconds(call, repeats, device)))
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
