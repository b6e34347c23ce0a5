"""The two ways in which the attention of arXiv 2105.13120 uses a ring: blocks that go round, and sums that come home.

Algorithms are generators, as `_transport` describes.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ._transport import Pending, Steps, Transport


def rotate(ring: Transport, block: Tensor, use: Callable[[int, Tensor], None]) -> Steps[None]:
    """Calls use(source, block) with the block of every rank, from this rank's own backwards: N - 1 hops.

    The next block is on its way while one is used.
    """
    block = block.contiguous()
    for s in range(ring.size):
        source = (ring.rank - s) % ring.size
        if s + 1 == ring.size:
            use(source, block)
            return
        pending = ring.post(block, step=f"step {s + 1} of {ring.size - 1}")
        use(source, block)
        block = yield pending


def rotate_and_reduce(
    ring: Transport, block: Tensor, use: Callable[[int, Tensor], None], part: Callable[[int], Tensor]
) -> Steps[Tensor]:
    """`rotate`, and at once the sum over all ranks of part(home), to be had by rank `home`: 2 (N - 1) hops.

    It is a reduce-scatter: the sum for a rank starts at the next rank and is passed on, each rank adds its part,
    until it is at home. An all-reduce of the parts for all ranks would send twice as much.

    Args:
        part: this rank's part of the sum for a rank, in the dtype to sum in; a new tensor in each call.

    Returns:
        The sum for this rank.
    """
    block = block.contiguous()
    summing: Pending | None = None
    for s in range(ring.size):
        hop = f"step {s + 1} of {ring.size - 1}"
        last = s + 1 == ring.size
        next_block = None if last else ring.post(block, step=hop)
        own = part((ring.rank - 1 - s) % ring.size)
        use((ring.rank - s) % ring.size, block)
        if summing is None:
            total = own
        else:
            total = yield summing
            total += own
        if next_block is None:
            return total
        # After the block's message on every rank: messages between two ranks arrive in the order they were posted.
        summing = ring.post(total, step=f"{hop}, gradients")
        block = yield next_block
    raise AssertionError("a ring has at least one rank")
