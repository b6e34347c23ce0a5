"""Ranks that die, stop or disagree: every other rank raises, soon, and says where it was."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from helpers import ring_faults
from helpers.processes import Failed, Processes

pytestmark = pytest.mark.distributed

# What a rank waits for one that is stopped; and for one that is killed, which it need not wait for.
TIMEOUT_S = {"stop": 1.0, "kill": 20.0}
# What else the machine does may cost.
SLACK_S = 4.0


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("shape", "victim", "how", "phase", "at_step"),
    [
        ((4,), 1, "kill", "forward", 2),
        ((4,), 0, "kill", "backward", 3),
        ((4,), 2, "stop", "forward", 1),
        # By its last step all others have what they need for their outputs.
        ((4,), 1, "stop", "forward", 4),
        ((4,), 3, "stop", "backward", 2),
        ((2, 4), 5, "kill", "forward", 6),
        ((2, 4), 2, "stop", "backward", 3),
    ],
)
def test_a_lost_rank_is_noticed_by_all(shape: tuple[int, ...], victim: int, how: str, phase: str, at_step: int) -> None:
    size, timeout_s = math.prod(shape), TIMEOUT_S[how]
    processes = Processes(size)
    try:
        results = processes.try_run(
            ring_faults.lose_a_rank, shape, victim, how, phase, at_step, timeout_s, without=(victim,)
        )
    finally:
        processes.close()
    for rank, seen in enumerate(results):
        if rank == victim:
            continue
        assert not isinstance(seen, Failed), seen.text
        assert seen.outcome in ("RingError", "RingTimeoutError"), f"rank {rank}: {seen}"
        assert seen.seconds < 2 * timeout_s + SLACK_S, f"rank {rank}: {seen}"
        assert seen.rank == rank and 0 <= seen.peer < size and seen.peer != rank
        for said in ("ring_attention", f"rank {rank}", f"rank {seen.peer}", seen.step):
            assert said in seen.text
        if phase == "backward" and "end" not in seen.step:
            assert "backward" in seen.step or "gradients" in seen.step
    others = [seen for rank, seen in enumerate(results) if rank != victim]
    assert any(seen.peer == victim for seen in others)
    if how == "kill":
        assert all(seen.seconds < timeout_s for seen in others), "a connection that is gone ends its receives at once"
    else:
        assert any(seen.outcome == "RingTimeoutError" for seen in others)


@pytest.mark.parametrize(
    ("deviation", "said"),
    [
        ("rows", "q is [1, 8, 2, 16] on ranks 0, 2, 3, [1, 10, 2, 16] on rank 1"),
        ("batch", "q is "),
        ("kv_heads", "k is [1, 8, 2, 16] on ranks 0, 2, 3, [1, 8, 1, 16] on rank 1"),
        ("dtype", 'dtype is "torch.float32" on ranks 0, 2, 3, "torch.float64" on rank 1'),
        ("layout", 'layout is "zigzag" on ranks 0, 2, 3, "striped" on rank 1'),
        ("causal", "causal is false on ranks 0, 2, 3, true on rank 1"),
        ("scale", "softmax_scale is null on ranks 0, 2, 3, 0.5 on rank 1"),
        ("seqlen", "seqlen is null on ranks 0, 2, 3, 9 on rank 1"),
        ("cu_seqlens", "cu_seqlens is "),
        ("op", 'op is "ring_attention" on ranks 0, 2, 3, "ring_attention_varlen" on rank 1'),
    ],
)
def test_disagreement_is_told_to_all(processes: Callable[[int], Processes], deviation: str, said: str) -> None:
    for seen, after in processes(4).run(ring_faults.disagree, deviation, 1):
        assert seen.outcome == "RingMismatchError", seen
        assert said in seen.text, seen
        assert seen.seconds < 10, "nobody waits for the time-out"
        assert after.outcome == "returned", after


def test_arguments_that_one_rank_refuses(processes: Callable[[int], Processes]) -> None:
    """The rank says what is wrong with them, and the others what it said."""
    for rank, (seen, after) in enumerate(processes(4).run(ring_faults.disagree, "refused", 2)):
        assert seen.outcome == ("ValueError" if rank == 2 else "RingMismatchError"), seen
        assert "k and v must be of q's shape" in seen.text, seen
        assert rank == 2 or "rank 2 of the ring refused" in seen.text
        assert after.outcome == "returned", after


def test_deviation_after_the_first_check_does_not_hang() -> None:
    processes = Processes(3)
    try:
        results = processes.try_run(ring_faults.deviate_unchecked, 1, TIMEOUT_S["stop"])
    finally:
        processes.close()
    for seen in results:
        assert not isinstance(seen, Failed), seen.text
        assert seen.outcome in ("RingError", "RingTimeoutError"), seen
        assert seen.seconds < 2 * TIMEOUT_S["stop"] + SLACK_S, seen
