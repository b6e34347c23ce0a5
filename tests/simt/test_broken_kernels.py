"""Does the emulator find faults? Kernels of csrc/simt/broken.cpp have one each; the report must name it and where."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

RACE = r"shared-memory race: this (read|write) of address \d+ is not ordered by a barrier after the "

# What the report says after the thread.
FAULTS = {
    "missing_barrier": RACE + r"(read|write) by thread \d+",
    "missing_second_barrier": RACE + r"read by thread \d+",
    "missing_warp_sync": RACE + r"(read|write) by thread \d+",
    "shared_race": RACE + r"write by thread \d+",
    "deadlock": r"deadlock, no thread can go on: .*block_sync at .*named_barrier_sync 1 \(32 of 64 threads came\) at ",
    "missing_arrival": r"deadlock, .*threads of 0 to 31 in named_barrier_sync 2 \(96 of 128 threads came\)",
    "divergent_barrier": r"divergent block_sync: .* of the warp in block_sync at ",
    "early_read": r"shared memory read before its asynchronous copy was waited for",
    "wait_for_too_few": r"shared memory read before its asynchronous copy was waited for",
    "missing_commit": r"shared memory read before its asynchronous copy was waited for",
    "wait_without_barrier": r"shared memory read (that was never written|before its asynchronous copy)|"
    + RACE
    + r"asynchronous copy by thread \d+",
    "copy_into_use": RACE + r"(read|asynchronous copy) by thread \d+|shared memory read before its asynchronous copy",
    "never_written": r"shared memory read that was never written, address 308",
    "wrong_swizzle": r"shared memory read that was never written",
    "shared_out_of_bounds": r"out-of-bounds shared store of 4 bytes at address \d+ of 4096 bytes",
    "shared_misaligned": r"misaligned shared store of 16 bytes at address 1444",
    "one_past_the_end": r"out-of-bounds global load of 4 bytes \(0 bytes past the end of the nearest tensor, of 1024 ",
    "out_of_bounds_store": r"out-of-bounds global store of 4 bytes \(\d+ bytes past the end of the nearest tensor",
    "store_before_the_start": r"out-of-bounds global store of 4 bytes \(4 bytes before the nearest tensor",
    "store_to_input": r"global store of 4 bytes in a read-only tensor",
    "misaligned_vector": r"misaligned global load of 16 bytes \(byte 4 of a tensor of 1024 bytes\)",
    "atomic_out_of_bounds": r"out-of-bounds global atomic on 4 bytes",
    "divergent_shuffle": r"divergent shuffle_xor: .* of the warp in shuffle_xor at ",
    "shuffle_after_exit": r"divergent shuffle_xor: all 32 lanes must take part, but ",
    "shuffle_against_barrier": r"divergent (ballot|block_sync): ",
}

# Where only one thread of the block is at fault, it is the one that is named.
THREADS = {"shared_misaligned": 90, "misaligned_vector": 33, "one_past_the_end": 127, "store_before_the_start": 0}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_reported(simt: Any, seed: int, name: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        simt._broken(name)
    text = str(caught.value).splitlines()[0]
    place = rf"_broken: kernel {name}, block \([01], 0, 0\), thread \((\d+), 0, 0\): "
    matched = re.match(place + rf"(?:{FAULTS[name]}).* at simt/broken\.cpp:\d+", text)
    assert matched, text
    if name in THREADS:
        assert int(matched[1]) == THREADS[name]
    if name == "one_past_the_end":
        assert "block (1, 0, 0)" in text


def test_the_machine_survives_a_fault(simt: Any) -> None:
    """A report ends one launch; what runs next is not touched by it."""
    x = torch.randn(128)
    for name in FAULTS:
        with pytest.raises(RuntimeError):
            simt._broken(name)
        assert torch.equal(simt._instruction("chain", x, torch.zeros(1, dtype=torch.int32)), x)


def test_shared_memory_beyond_the_device(simt: Any) -> None:
    x, n = torch.zeros(128), torch.zeros(1, dtype=torch.int32)
    simt.configure(1, 4, 6144)
    try:
        simt._instruction("chain", x, n)
        simt.configure(1, 4, 6143)
        with pytest.raises(RuntimeError, match=r"6144 bytes of shared memory a block; the device has 6143"):
            simt._instruction("chain", x, n)
    finally:
        simt.configure(1)


def test_bad_settings(simt: Any) -> None:
    with pytest.raises(ValueError, match="sm_count must be 1 to 1024, got 0"):
        simt.configure(1, 0)
    with pytest.raises(ValueError, match="seed must not be negative"):
        simt.configure(-1)
    with pytest.raises(ValueError, match="no kernel is called nonsense"):
        simt._broken("nonsense")
