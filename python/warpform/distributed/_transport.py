"""Sends messages around a ring of ranks, between processes or between ranks that live in one process.

An algorithm is a generator, written once for any transport. It posts a message and goes on computing; where it needs
what came, it yields the pending hop and gets the received tensor:

    def sum_of_all(ring, x):
        total = x.clone()
        for step in range(1, ring.size):
            pending = ring.post(x, step=f"step {step} of {ring.size - 1}")  # to the next rank, from the previous rank
            ...  # what is computed here hides the hop
            x = yield pending
            total += x
        return total

`run` waits for each yielded hop in turn. `run_in_lock_step` moves the generators of all ranks of one process from yield
to yield, so N ranks need neither N devices nor N threads, and what a rank does between two yields can be timed.

Between processes a hop is one `batch_isend_irecv`. On CUDA it is posted on a side stream that waits for the message,
and the stream that goes on with the result waits for the hop; the host waits for neither. That path was written
without a GPU at hand and has not run so far.
"""

from __future__ import annotations

import datetime
import time
import zlib
from collections.abc import Callable, Generator, Sequence
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ._errors import RingError, RingTimeoutError

T = TypeVar("T")


class Pending(Protocol):
    """A message on its way to this rank, and one from it."""

    def wait(self) -> Tensor:
        """Returns the received tensor. Until then neither buffer may be written to; afterwards both are free."""


Steps = Generator[Pending, Tensor, T]


class Transport(Protocol):
    """One ring, as one of its ranks sees it."""

    rank: int
    size: int

    def post(self, message: Tensor, *, step: str, into: Tensor | None = None, distance: int = 1) -> Pending:
        """Sends a message to rank + distance and receives one of its shape and dtype from rank - distance, modulo size.

        Args:
            message: contiguous; not to be written to before the hop was waited for.
            step: which hop this is, for errors.
            into: the buffer to receive into; None: a new one.
            distance: the same on all ranks.
        """


def run(steps: Steps[T]) -> T:
    """Runs an algorithm of this rank to its end."""
    try:
        pending = next(steps)
        while True:
            pending = steps.send(pending.wait())
    except StopIteration as stop:
        result: T = stop.value
        return result


# --- between processes -----------------------------------------------------------------------------------------------

# One stream for the hops of each device: hops of several rings are in the same order on every rank.
_side_streams: dict[torch.device, Any] = {}
# No message has it.
_UNUSED_TAG = 1 << 20


class ProcessGroupTransport:
    """A ring over a process group of torch.distributed.

    Args:
        group: its rank r sends to r + 1.
        op: who asks, for errors.
        timeout: seconds that one message may take before RingTimeoutError is raised; None: the group's own time-out.
            On CUDA the host waits for nothing, so the time-out is that of the group.
        on_failure: called once when a message failed, before the error is raised.
    """

    def __init__(
        self, group: dist.ProcessGroup, *, op: str, timeout: float | None, on_failure: Callable[[], None] | None = None
    ) -> None:
        self.group, self.op, self.timeout = group, op, timeout
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.on_failure = on_failure
        self._timeout = None if timeout is None else datetime.timedelta(seconds=timeout)

    def post(self, message: Tensor, *, step: str, into: Tensor | None = None, distance: int = 1) -> Pending:
        to, source = (self.rank + distance) % self.size, (self.rank - distance) % self.size
        into = torch.empty_like(message) if into is None else into
        if message.device.type == "cuda":
            return _StreamHop(self, message, into, to, source, step)
        return _Hop(self, message, into, to, source, step)

    def exchange(self, message: Tensor, into: Tensor, to: int, source: int, step: str) -> list[dist.Work]:
        """Works of the send and of the receive; one work for both where the backend joins them."""
        # Messages of other steps and sizes never meet where tags are looked at, as by gloo: it ends the process if a
        # message does not fit.
        tag = zlib.crc32(f"{step}, {message.nbytes} bytes".encode()) % _UNUSED_TAG
        try:
            return dist.batch_isend_irecv(
                [
                    dist.P2POp(dist.isend, message, group=self.group, group_peer=to, tag=tag),
                    dist.P2POp(dist.irecv, into, group=self.group, group_peer=source, tag=tag),
                ]
            )
        except RuntimeError as error:
            raise self.failed(error, to, step, "sent to") from error

    def wait(self, work: dist.Work, peer: int, step: str, what: str) -> None:
        """Waits on the host, at most as long as the time-out says."""
        try:
            if self._timeout is None:
                work.wait()
            else:
                work.wait(self._timeout)
        except RuntimeError as error:
            raise self.failed(error, peer, step, what) from error

    def failed(self, error: RuntimeError | None, peer: int, step: str, what: str) -> RingError:
        """The error to raise, after the other ranks were told."""
        self.close()
        me, other = (dist.get_global_rank(self.group, r) for r in (self.rank, peer))
        late = error is None or "timed out" in str(error).lower()
        limit = "its group's time-out" if self.timeout is None else f"{self.timeout:g} s"
        why = f"within {limit}" if late else f"as its connection is gone ({str(error).splitlines()[0]})"
        message = f"{self.op}: rank {me}: nothing could be {what} rank {other} at {step}, {why}"
        return (RingTimeoutError if late else RingError)(message, me, other, step)

    def close(self) -> None:
        """Closes the connections of this rank, so that ranks which wait for it need not wait for their time-out."""
        if dist.get_backend(self.group) == "gloo":
            _close_gloo(self.group)
        if self.on_failure is not None:
            on_failure, self.on_failure = self.on_failure, None
            on_failure()


def _close_gloo(group: dist.ProcessGroup) -> None:
    """Closes all connections of a gloo group, as gloo does when a receive times out: here one without a sender."""
    nothing = torch.empty(1, dtype=torch.uint8)
    for peer in range(group.size()):
        if peer != group.rank():
            try:
                group.recv([nothing], peer, _UNUSED_TAG).wait(datetime.timedelta(milliseconds=1))
            except RuntimeError as error:
                if "timed out" in str(error).lower():
                    return


class _Hop:
    """A hop that the host waits for."""

    def __init__(
        self, ring: ProcessGroupTransport, message: Tensor, into: Tensor, to: int, source: int, step: str
    ) -> None:
        self._ring, self._message, self._into = ring, message, into
        self._to, self._source, self._step = to, source, step
        self._works = ring.exchange(message, into, to, source, step)

    def wait(self) -> Tensor:
        *sends, receive = self._works
        self._ring.wait(receive, self._source, self._step, "received from")
        for send in sends:
            self._ring.wait(send, self._to, self._step, "sent to")
        return self._into


class _StreamHop:
    """A hop on a side stream; events order it after what made the message and before what uses the result."""

    def __init__(
        self, ring: ProcessGroupTransport, message: Tensor, into: Tensor, to: int, source: int, step: str
    ) -> None:
        self._into, self.source, self.step = into, source, step
        current = torch.cuda.current_stream(message.device)
        side = _side_streams.get(message.device)
        if side is None:
            side = _side_streams[message.device] = torch.cuda.Stream(message.device)
        side.wait_event(current.record_event())
        with torch.cuda.stream(side):
            for work in ring.exchange(message, into, to, source, step):
                work.wait()  # on the stream
            self.done = side.record_event()
        # Should an error drop this hop before it was waited for, its memory is not given away while it is in use.
        message.record_stream(side)
        into.record_stream(side)

    def wait(self) -> Tensor:
        torch.cuda.current_stream(self._into.device).wait_event(self.done)
        return self._into


# --- within one process ----------------------------------------------------------------------------------------------


class LocalTransport:
    """A ring of ranks in one process: a message is handed over when its receiver waits for it.

    mailbox: one for all ranks of the ring.
    """

    def __init__(self, rank: int, size: int, mailbox: dict[tuple[int, int], Tensor]) -> None:
        self.rank, self.size = rank, size
        self._mailbox, self._posted = mailbox, 0

    def post(self, message: Tensor, *, step: str, into: Tensor | None = None, distance: int = 1) -> Pending:
        # Ranks run one algorithm: the n-th hop of one is the n-th of all.
        self._mailbox[self.rank, self._posted] = message
        hop = _LocalHop(
            self._mailbox,
            ((self.rank - distance) % self.size, self._posted),
            torch.empty_like(message) if into is None else into,
        )
        self._posted += 1
        return hop


class _LocalHop:
    def __init__(self, mailbox: dict[tuple[int, int], Tensor], key: tuple[int, int], into: Tensor) -> None:
        self._mailbox, self._key, self._into = mailbox, key, into

    def wait(self) -> Tensor:
        return self._into.copy_(self._mailbox.pop(self._key))


def run_in_lock_step(
    all_steps: Sequence[Steps[T]], on_segment: Callable[[int, int, float], None] | None = None
) -> list[T]:
    """Runs the ranks of one process: each to its next yield, then all hops, and so on.

    on_segment: called with rank, number of the yield and seconds, for everything that a rank does between two yields.
    """
    pending: list[Pending | None] = [None] * len(all_steps)
    results: list[Any] = [None] * len(all_steps)
    running, segment = list(range(len(all_steps))), 0
    while running:
        # A rank that goes on may write to what it sent: all hops of a round come before any computing.
        received = {r: None if (hop := pending[r]) is None else hop.wait() for r in running}
        still = []
        for r in running:
            began = time.perf_counter()
            try:
                pending[r] = all_steps[r].send(received[r])  # type: ignore[arg-type]
                still.append(r)
            except StopIteration as stop:
                results[r] = stop.value
            if on_segment is not None:
                on_segment(r, segment, time.perf_counter() - began)
        running, segment = still, segment + 1
    return results
