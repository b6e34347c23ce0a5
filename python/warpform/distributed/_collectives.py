"""Collectives made of hops, so that they have the time-outs, errors and local ranks of the rings they serve."""

from __future__ import annotations

import torch
from torch import Tensor

from ._group import Ring
from ._transport import Steps, Transport


def gather(ring: Ring, x: Tensor) -> Steps[Tensor]:
    """x [...] of every rank -> [size, ...] in the order of the sequence, on every rank."""
    parts = yield from _gather(ring.inner, x)
    if ring.outer is not None:
        parts = (yield from _gather(ring.outer, parts)).flatten(0, 1)
    return parts


def _gather(ring: Transport, x: Tensor) -> Steps[Tensor]:
    parts = x.new_empty((ring.size, *x.shape))
    parts[ring.rank] = x
    for step in range(1, ring.size):
        # Each step sends on the part that arrived last, and receives the next part into its place.
        sent, came = (ring.rank - step + 1) % ring.size, (ring.rank - step) % ring.size
        yield ring.post(parts[sent], into=parts[came], step=f"step {step} of {ring.size - 1} of the gather")
    return parts


def reduce_scatter(ring: Ring, x: Tensor) -> Steps[Tensor]:
    """x [size, ...] of every rank -> the sum over ranks of x[rank], [...]. Sums of 16-bit floats travel in float32."""
    dtype = x.dtype
    x = x.float() if dtype in (torch.float16, torch.bfloat16) else x
    if ring.outer is not None:
        x = yield from _reduce_scatter(ring.outer, x.unflatten(0, (ring.outer.size, ring.inner.size)))
    return (yield from _reduce_scatter(ring.inner, x)).to(dtype)


def _reduce_scatter(ring: Transport, x: Tensor) -> Steps[Tensor]:
    # The sum that ends here began at the next rank, and gains one part at each rank it passes.
    total = x[(ring.rank - 1) % ring.size].clone(memory_format=torch.contiguous_format)
    for step in range(1, ring.size):
        total = yield ring.post(total, step=f"step {step} of {ring.size - 1} of the reduce-scatter")
        total += x[(ring.rank - 1 - step) % ring.size]
    return total


def tell(ring: Ring, message: Tensor, what: str) -> Steps[Tensor]:
    """A small message of every rank -> [size, ...] in the order of the sequence, in log2(size) hops a ring.

    No rank gets past this before all ranks have come to it.
    """
    parts = yield from _tell(ring.inner, message, what)
    if ring.outer is not None:
        parts = (yield from _tell(ring.outer, parts, what)).flatten(0, 1)
    return parts


def _tell(ring: Transport, message: Tensor, what: str) -> Steps[Tensor]:
    """Bruck's all-gather: what is known doubles with each hop."""
    known = message.unsqueeze(0)  # of this rank, of the previous rank, and so on
    while len(known) < ring.size:
        distance = len(known)
        count = min(distance, ring.size - distance)
        came = yield ring.post(known[:count].contiguous(), distance=distance, step=what)
        known = torch.cat([known, came])
    order = (ring.rank - torch.arange(ring.size)) % ring.size  # whose message is in which place
    parts = torch.empty_like(known)
    parts[order.to(known.device)] = known
    return parts
