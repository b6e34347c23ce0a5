"""Predicts the time and the memory of ring attention from three measured numbers, and labels them as predictions.

A rank's time is a schedule of steps. Step s takes the block of keys that started s ranks away; the block of step s + 1
travels meanwhile:

    T = t_0 + sum over s = 1 .. N - 1 of max(t_s, alpha + bytes / beta)

where every rank has the same work (zigzag, striped, not causal). Where not, ranks wait for each other, so the schedule
is played through rank by rank. In the backward float32 gradients of keys and values travel too, one hop more.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

LAYOUTS = ("contiguous", "zigzag", "striped")
DIRECTIONS = ("forward", "backward", "forward+backward")
FORWARD_FLOPS = 4  # of a pair of query and key, times head_dim: two products
BACKWARD_FLOPS = 10  # five

Array = Any  # numpy.ndarray of float64, one value a rank


@dataclasses.dataclass(frozen=True)
class Workload:
    """Attention over one long sequence.

    Attributes:
        seqlen: L, all ranks together.
        heads, kv_heads, head_dim: H, Hkv (None: H) and D.
        batch: B.
        itemsize: bytes of an element of q, k and v.
        causal: a query sees keys up to its own position.
        layout: which rows a rank holds; matters where causal.

    Raises:
        ValueError: a size below 1, kv_heads that do not divide heads, an unknown layout.
    """

    seqlen: int
    heads: int
    head_dim: int
    kv_heads: int | None = None
    batch: int = 1
    itemsize: int = 2
    causal: bool = True
    layout: str = "zigzag"

    def __post_init__(self) -> None:
        for name in ("seqlen", "heads", "head_dim", "batch", "itemsize"):
            if getattr(self, name) < 1:
                raise ValueError(f"Workload: {name} must be at least 1, got {getattr(self, name)}")
        if self.hkv < 1 or self.heads % self.hkv:
            raise ValueError(f"Workload: kv_heads must divide heads {self.heads}, got {self.kv_heads}")
        if self.layout not in LAYOUTS:
            raise ValueError(f"Workload: layout must be one of {', '.join(LAYOUTS)}, got {self.layout!r}")

    @property
    def hkv(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    def chunk(self, ranks: int) -> int:
        """c, the rows of a rank.

        Raises:
            ValueError: the layout cannot divide the sequence among so many ranks.
        """
        parts = 2 * ranks if self.causal and self.layout == "zigzag" else ranks
        if ranks < 1 or self.seqlen % parts:
            raise ValueError(
                f"Workload: seqlen must be a multiple of {parts} for {ranks} ranks ({self.layout}), got {self.seqlen}"
            )
        return self.seqlen // ranks

    def flops(self, direction: str) -> float:
        """Least floating-point operations of all ranks together."""
        each = {"forward": FORWARD_FLOPS, "backward": BACKWARD_FLOPS}
        total = each.get(direction) or sum(each.values())
        pairs = self.seqlen * (self.seqlen + 1) / 2 if self.causal else float(self.seqlen) ** 2
        return total * self.head_dim * self.batch * self.heads * pairs

    def step(self, ranks: int, s: int) -> tuple[Array, Array]:
        """(query rows, pairs of query and key) of step s, one value a rank; both for one head of one sequence."""
        c = float(self.chunk(ranks))
        rank = np.arange(ranks)
        full = np.full(ranks, c)
        if not self.causal:
            return full, full * c
        if s == 0:
            return full, full * (c + 1) / 2
        earlier = rank >= s  # where the block of this step comes from an earlier rank
        if self.layout == "contiguous":
            return np.where(earlier, c, 0.0), np.where(earlier, c * c, 0.0)
        if self.layout == "zigzag":  # all queries with half of the keys, or half of the queries with all keys
            return np.where(earlier, c, c / 2), np.full(ranks, c * c / 2)
        return full, np.where(earlier, c * (c + 1) / 2, c * (c - 1) / 2)


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of one step on one device: overhead + per_row * rows + per_pair * pairs; and of what is done once.

    Attributes:
        overhead: of a call, whatever its size.
        per_row: of a row of queries of one head: what carrying `out` and `lse` in and out costs.
        per_pair: of a pair of query and key of one head, at the head_dim that was measured.
        setup: of a row of a rank and one head, once a pass: making the message of k and v, casting the result.
    """

    overhead: float
    per_row: float
    per_pair: float
    setup: float = 0.0

    @classmethod
    def from_flops(
        cls, flops: float, head_dim: int, *, backward: bool = False, overhead: float = 0.0, memory: float = math.inf
    ) -> StepTime:
        """From a rate.

        Args:
            flops: FLOP/s that the kernel reaches.
            head_dim: D.
            backward: five products rather than two.
            overhead: seconds of a call.
            memory: bytes/s; the float32 state of a row is read and written at this rate.
        """
        state = 2 * 4 * (head_dim + 1)
        work = (BACKWARD_FLOPS if backward else FORWARD_FLOPS) * head_dim
        return cls(overhead, state / memory, work / flops)

    @classmethod
    def fit(cls, samples: Sequence[tuple[float, float, float, float, float]]) -> StepTime:
        """The least squares of relative errors over samples (calls, rows, pairs, rows of ranks, seconds).

        A sample is of all the steps of some passes; no term comes out negative.

        Raises:
            ValueError: no samples, or a time that is not positive.
        """
        if not samples or min(sample[-1] for sample in samples) <= 0:
            raise ValueError("StepTime.fit: samples must have at least one, all of positive seconds")
        table = np.asarray(samples, dtype=np.float64)
        terms = table[:, :4] / table[:, 4:]
        # Four unknowns: of all subsets the best whose solution is not negative.
        best, least = np.zeros(4), math.inf
        for mask in range(1, 16):
            columns = [i for i in range(4) if mask >> i & 1 and terms[:, i].any()]
            if not columns:
                continue
            scale = terms[:, columns].max(axis=0)
            found = np.linalg.lstsq(terms[:, columns] / scale, np.ones(len(terms)), rcond=None)[0] / scale
            error = float(((terms[:, columns] @ found - 1) ** 2).sum())
            if (found >= 0).all() and error < least * (1 - 1e-9):
                best, least = np.zeros(4), error
                best[columns] = found
        return cls(*(float(value) for value in best))

    def __call__(self, rows: Array, pairs: Array) -> Array:
        """Nothing is called where there are no rows, and nothing is taken."""
        return np.where(rows > 0, self.overhead + self.per_row * rows + self.per_pair * pairs, 0.0)


@dataclasses.dataclass(frozen=True)
class Link:
    """A hop takes alpha + bytes / beta seconds, in each direction at once.

    Attributes:
        alpha: seconds of a message of no bytes.
        beta: bytes a second.
    """

    alpha: float
    beta: float

    @classmethod
    def fit(cls, samples: Sequence[tuple[float, float]]) -> Link:
        """The least squares of relative errors over samples (bytes, seconds).

        Raises:
            ValueError: fewer than two sizes.
        """
        if len({size for size, _ in samples}) < 2:
            raise ValueError(f"Link.fit: samples must have at least two sizes, got {len(samples)} samples")
        size, seconds = np.asarray(samples, dtype=np.float64).T
        terms = np.stack([np.ones_like(size), size], axis=1) / seconds[:, None]
        scale = terms.max(axis=0)
        alpha, slope = np.linalg.lstsq(terms / scale, np.ones(len(size)), rcond=None)[0] / scale
        if slope <= 0:
            return cls(float(seconds.mean()), math.inf)
        if alpha < 0:
            return cls(0.0, float((size / seconds).mean()))
        return cls(float(alpha), float(1 / slope))

    def __call__(self, size: float) -> float:
        return self.alpha + size / self.beta


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The hardware that the ranks run on.

    Attributes:
        forward, backward: the time of a step.
        link: hops within a node.
        between: hops between nodes; None: as within.
        ranks_per_node: None: all on one node.
        processors: how many devices there are, where several ranks share one (N processes on 2 cores, or N ranks in
            one process): those then take turns, and moving bytes takes the processor's time too. None: one a rank, and
            messages travel while it computes.
        checked: whether ranks agree before the first step and wait for each other after the last, as they do on a CPU:
            log2(N) small messages each.
    """

    forward: StepTime
    backward: StepTime
    link: Link
    between: Link | None = None
    ranks_per_node: int | None = None
    processors: int | None = None
    checked: bool = False

    def hop(self, ranks: int, size: float) -> Array:
        """Seconds that a message of `size` bytes takes from each rank to the next."""
        seconds = np.full(ranks, self.link(size))
        if self.ranks_per_node is not None and self.ranks_per_node < ranks:
            seconds[np.arange(ranks) % self.ranks_per_node == 0] = (self.between or self.link)(size)
        return seconds


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Modelled, not measured.

    Attributes:
        ranks, chunk: N and c.
        seconds: until the last rank is done.
        ideal_seconds: the same attention on one device, divided by N.
        compute_seconds: of steps, of the rank that computes longest.
        transfer_seconds: of messages to a rank.
        hidden: which share of transfer_seconds passes while the rank computes.
        bytes_sent: by a rank.
        saved_bytes: what a rank keeps for the backward: q, k, v, out and lse.
        working_bytes: beside that while it runs, at the most: blocks and gradients that travel, and the float32 state.
    """

    ranks: int
    chunk: int
    seconds: float
    ideal_seconds: float
    compute_seconds: float
    transfer_seconds: float
    hidden: float
    bytes_sent: float
    saved_bytes: float
    working_bytes: float

    @property
    def efficiency(self) -> float:
        """The share of one device's throughput that each rank keeps."""
        return self.ideal_seconds / self.seconds


def predict(work: Workload, cluster: Cluster, ranks: int, direction: str = "forward") -> Prediction:
    """The time of ring attention over `ranks` ranks, and what each holds.

    Args:
        direction: "forward", "backward" or "forward+backward".

    Raises:
        ValueError: a sequence that does not divide, an unknown direction.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"predict: direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}")
    chunk = work.chunk(ranks)
    parts = [_pass(work, cluster, ranks, one) for one in ("forward", "backward") if one in direction]
    seconds, ideal, compute, transfer, exposed, sent = (sum(values) for values in zip(*parts, strict=True))
    rows = float(work.batch * chunk)
    q, kv = rows * work.heads * work.head_dim, 2 * rows * work.hkv * work.head_dim
    lse = 4 * rows * work.heads
    saved = (2 * q + kv) * work.itemsize + lse
    arriving = 0 if ranks == 1 else kv * work.itemsize * (1 if ranks == 2 else 2)
    state = 4 * q + lse  # of the forward: out and lse
    if "backward" in direction:  # dq, and dk and dv twice: what is summed and what arrives
        state = max(state, 4 * q + 4 * kv * (1 if ranks == 1 else 2))
    hidden = 1.0 - exposed / transfer if transfer > 0 else 1.0
    return Prediction(ranks, chunk, seconds, ideal, compute, transfer, hidden, sent, saved, arriving + state)


def _pass(work: Workload, cluster: Cluster, ranks: int, direction: str) -> tuple[float, ...]:
    """(seconds, ideal, compute, transfer, transfer not hidden, bytes sent) of a forward or a backward."""
    backward = direction == "backward"
    step = cluster.backward if backward else cluster.forward
    each = work.batch * work.heads
    rows = float(work.batch * work.chunk(ranks))
    block = 2.0 * rows * work.hkv * work.head_dim  # elements of k and v
    sizes = [block * work.itemsize] * (ranks - 1)
    hop, hop_gradient = cluster.hop(ranks, sizes[0] if sizes else 0.0), cluster.hop(ranks, block * 4)

    done = np.full(ranks, step.setup * rows * work.heads)  # when each rank has computed its last step
    compute, moved = done.copy(), np.zeros(ranks)
    arrived = np.zeros(ranks)  # when the block of this step is there
    gradient = np.zeros(ranks)  # when the gradients of this step's block are there
    link_free = np.zeros(ranks)  # of the link into each rank
    for s in range(ranks):
        start = np.maximum(done, arrived)
        counts = work.step(ranks, s)
        taken = step(counts[0] * each, counts[1] * each)
        if s + 1 < ranks:
            # Both ends post the next block when they begin this step.
            posted = np.maximum(np.maximum(np.roll(start, 1), start), link_free)
            arrived = link_free = posted + hop
            moved += hop
        done = start + taken
        compute += taken
        if backward and ranks > 1:
            # Gradients go on when this rank's part is in them: after its step, and after those before it arrived.
            ready = np.maximum(done, gradient)
            gradient = link_free = np.maximum(np.roll(ready, 1), link_free) + hop_gradient
            moved += hop_gradient
    if cluster.checked:  # a backward only waits at its end
        small = (1 if backward else 2) * (ranks - 1).bit_length() * (cluster.between or cluster.link).alpha
        done, gradient, moved = done + small, gradient + small, moved + small
    seconds = float(np.maximum(done, gradient).max())
    if cluster.processors is not None and ranks >= cluster.processors:
        seconds = max(seconds, float((compute + moved).sum()) / cluster.processors)
    whole = work.seqlen * (work.seqlen + 1) / 2 if work.causal else float(work.seqlen) ** 2
    ideal = float(step(np.array(float(work.seqlen * each)), np.array(whole * each))) / ranks
    if cluster.processors is not None and ranks > cluster.processors:
        ideal *= ranks / cluster.processors
    last = int(np.argmax(np.maximum(done, gradient)))
    exposed = min(float(moved[last]), max(0.0, seconds - float(compute.max())))
    sent = sum(sizes) + (ranks * block * 4 if backward and ranks > 1 else 0.0)
    return seconds, ideal, float(compute.max()), float(moved[last]), exposed, sent


def overlap_chunk(work: Workload, cluster: Cluster, direction: str = "forward") -> int:
    """The least rows of a rank at which a step takes as long as its messages: about F / B tokens in the forward.

    It counts steps whose pairs are all seen, or half of them where causal (zigzag and striped), and the slowest link.

    Raises:
        ValueError: an unknown direction; "forward+backward" is not one here, for each has its own.
    """
    if direction not in DIRECTIONS[:2]:
        raise ValueError(f"overlap_chunk: direction must be forward or backward, got {direction!r}")
    step = cluster.forward if direction == "forward" else cluster.backward
    link = cluster.between or cluster.link
    size = 2.0 * work.batch * work.hkv * work.head_dim * (work.itemsize + (4 if direction == "backward" else 0))
    each, share = work.batch * work.heads, 0.5 if work.causal else 1.0
    low, high = 0, 1 << 40
    while high - low > 1:
        c = (low + high) // 2
        if float(step(np.array(float(c * each)), np.array(share * c * c * each))) >= link(size * c):
            high = c
        else:
            low = c
    return high


# ---- memory of the paper's attention layers, in elements ----


def rsa_saved_elements(batch: int, seqlen: int, ranks: int, hidden: int, heads: int, head_dim: int) -> float:
    """(4 B L Z A + B Z L^2 + B L H) / N: what a rank keeps for the backward of an attention layer (arXiv 2105.13120,
    table 2 of the memory of attention blocks, without the weights). Z heads of A, H the hidden size.
    """
    b, length, z, a = batch, seqlen, heads, head_dim
    return (4 * b * length * z * a + b * z * length**2 + b * length * hidden) / ranks


def linformer_saved_elements(
    batch: int, seqlen: int, ranks: int, hidden: int, heads: int, head_dim: int, rank: int
) -> float:
    """2 B Z L A / N + B Z L K / N + B L H / N + 2 B Z K A, the paper's count for Linformer's attention with a
    projection to K rows, without the weights.
    """
    b, length, z, a = batch, seqlen, heads, head_dim
    return (2 * b * z * length * a + b * z * length * rank + b * length * hidden) / ranks + 2 * b * z * rank * a
