"""Does the emulator find faults in kernels for compute capability 9.0? Those of csrc/simt/broken_copies.cpp and
broken_products.cpp have one each; the report must name it and where, or the result is NaN."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.wgmma_product import check

BY_WGMMA, BY_TMA = r"the read by wgmma of warpgroup \d+", r"the asynchronous copy by TMA"
EARLY = r"shared memory read before its asynchronous copy was waited for"


def race(now: str, then: str) -> str:
    return rf"shared-memory race: this {now} of address \d+ is not ordered by a barrier after {then} at "


READ_OF_A_COPY = rf"{EARLY}|{race('read by wgmma', BY_TMA)}"
DEADLOCK = r"deadlock, no thread can go on: "
UNFENCED = (
    r"{} of address \d+ after the write by thread \d+ at .*, which has no fence_proxy_async between it and the "
    r"barrier that orders them"
)
READ_UNFENCED, COPY_UNFENCED = UNFENCED.format("a read by wgmma"), UNFENCED.format("a bulk copy")

# What the report says after the thread.
FAULTS = {
    # Rings of buffers. Where a phase may be missed, another order of threads waits for ever.
    "missing_empty_wait": rf"{READ_OF_A_COPY}|{race('write', BY_WGMMA)}",
    "missing_empty_wait_of_threads": rf"{EARLY}|{race('write', r'the read by thread [0-9]+')}|{race('read', BY_TMA)}",
    "early_release": race("write", BY_WGMMA),
    "missing_full_wait": READ_OF_A_COPY,
    "wait_of_another_warp": READ_OF_A_COPY,
    "parity_not_flipped": rf"{READ_OF_A_COPY}|{DEADLOCK}.*mbarrier_wait at address 32768 \(phase 2: ",
    "announces_too_few_bytes": rf"{READ_OF_A_COPY}|more bytes have landed on the mbarrier at address 32768 than ",
    "announces_too_many_bytes": DEADLOCK
    + r".*mbarrier_wait at address 32768 \(phase 0: 1 of 1 arrivals came, 8192 bytes did not land\)",
    "too_many_releases": r"more arrivals at the mbarrier at address 32768 than the 1 of its phase"
    rf"|{DEADLOCK}.*mbarrier_wait at address 32768|the mbarrier at address 327(68|76) went \d phases ahead"
    rf"|{READ_OF_A_COPY}|{race('write', BY_WGMMA)}|{race('write', BY_TMA)}",
    # mbarriers
    "too_many_arrivals": r"more arrivals at the mbarrier at address 32768 than the 1 of its phase",
    "never_initialised": r"mbarrier_arrive on address 32768, where no mbarrier was initialised",
    "initialised_without_barrier": r"mbarrier_(arrive|wait) on (address 32768, where no mbarrier was initialised"
    r"|the mbarrier at address 32768 is not ordered by a barrier after its initialisation by thread 0)",
    **dict.fromkeys(
        ("initialised_without_fence", "fenced_after_the_barrier"),
        r"a bulk copy completes on the mbarrier at address 32768, and its initialisation has no fence_mbarrier_init "
        r"before the barrier that orders them",
    ),
    "initialised_twice": r"mbarrier_init to address 32784, where an mbarrier lies",
    "store_over_an_mbarrier": r"store to address 32796, where an mbarrier lies",
    "misaligned_mbarrier": r"misaligned shared mbarrier of 8 bytes at address 32772",
    "two_phases_ahead": r"the mbarrier at address 32768 went 2 phases ahead while this thread waited for one"
    rf"|{DEADLOCK}thread 40 in mbarrier_wait at address 32768 \(phase 2: ",
    # TMA
    "misaligned_destination": r"tma_load: the destination must be 128-byte aligned, got address 64",
    "box_outside_of_memory": r"out-of-bounds global load of 128 bytes \(0 bytes past the end of the nearest tensor, ",
    "every_lane_issues": r"shared-memory race: a bulk copy to address 0 while an asynchronous copy into it is "
    rf"under way|{race('write', BY_TMA)}",
    "coordinates_of_another_rank": r"tma_load: 3 coordinates for a tensor of 2 dimensions",
    "unencoded_map": r"a bulk copy reads a description that was not encoded",
    "never_waited_copy": r"the block ended and no thread had waited for a bulk copy, issued",
    # proxies
    "missing_proxy_fence": READ_UNFENCED,
    "proxy_fence_before_the_store": READ_UNFENCED,
    "proxy_fence_of_another_thread": READ_UNFENCED,
    "proxy_fence_after_the_barrier": READ_UNFENCED,
    "missing_proxy_fence_after_stmatrix": READ_UNFENCED,
    "missing_proxy_fence_after_zeroing": READ_UNFENCED,
    "missing_proxy_fence_after_cp_async": READ_UNFENCED,
    "missing_warp_sync_before_an_arrival": race("read by wgmma", r"the write by thread \d+"),
    "missing_proxy_fence_before_tma": COPY_UNFENCED,
    # descriptions of operands
    "wrong_stride": r"shared memory read that was never written, address 8192",
    "wrong_swizzle": r"shared memory read that was never written, address 64",
    "operand_out_of_bounds": r"out-of-bounds shared wgmma operand of 16 bytes at address 40960 of 32832 bytes",
    "tile_inside_of_a_pattern": r"wgmma: the left operand begins in the middle of its swizzle's pattern of 1024 bytes, "
    r"at address 512",
    **dict.fromkeys(
        ("another_description_in_one_warp", "another_left_description_in_one_warp", "one_warp_accumulates"),
        r"wgmma: this thread has another description of an operand, or accumulates otherwise, than thread 0",
    ),
    # products and their registers
    "missing_wgmma_fence": r"wgmma: no wgmma_fence names the accumulators",
    "missing_second_wgmma_fence": r"wgmma: no wgmma_fence names the accumulators",
    "left_operand_not_fenced": r"wgmma: no wgmma_fence names the registers of the left operand",
    "written_after_the_fence": r"wgmma: the registers of the left operand were written after the wgmma_fence that ",
    "left_operand_overwritten": r"register hazard: the left operand of the wgmma at .* was written before the wait ",
    "accumulators_written": r"register hazard: accumulators were written before the wait that covers their products",
    "missing_wgmma_commit": r"wgmma_wait: it names accumulators that products in flight still write",
    "wait_for_too_few_groups": r"wgmma_wait: it names accumulators that products in flight still write",
    "wait_that_names_others": r"wgmma_wait: accumulators come back that it does not name",
    "never_waited_product": r"the thread ended while a wgmma was in flight, issued",
    "store_under_a_product": race("write", BY_WGMMA),
    "three_warps_multiply": DEADLOCK + r"32 threads of 0 to 31 in wgmma \(3 of 4 warps came\) at ",
    "half_a_warp_multiplies": r"divergent wgmma(_commit)?: .* of the warp in wgmma(_commit)? at ",
    "warps_multiply_in_two_places": r"divergent wgmma: warp \d of the warpgroup is in wgmma at .*, this warp",
    # warpgroups
    "missing_first_turn": DEADLOCK + r".*named_barrier_sync 1 \(128 of 256 threads came\) at ",
    "registers_of_three_consumers": DEADLOCK
    + r".*take_registers \(wants 240 registers a thread, has 128, and \d+ are free for its 128 threads\)",
    "registers_of_a_pool_too_small": DEADLOCK
    + r".*take_registers \(wants 240 registers a thread, has 168, and \d+ are free for its 128 threads\)",
    "three_warps_take_registers": DEADLOCK + r".*take_registers \(3 of 4 warps came\) at ",
    "takes_fewer_registers": r"take_registers: the warpgroup has 168 registers a thread and cannot come up to 160",
}

# Where only one thread is at fault, it is the one that is named.
THREADS = {
    **dict.fromkeys(("initialised_without_fence", "misaligned_mbarrier", "misaligned_destination", "unencoded_map"), 0),
    **dict.fromkeys(("box_outside_of_memory", "coordinates_of_another_rank", "missing_proxy_fence_before_tma"), 0),
    **dict.fromkeys(("store_over_an_mbarrier", "written_after_the_fence", "left_operand_overwritten"), 77),
    **dict.fromkeys(("accumulators_written", "store_under_a_product"), 77),
    "too_many_arrivals": 0,
    "never_waited_copy": 0,
    "initialised_twice": 70,
    "two_phases_ahead": 40,
    **dict.fromkeys(("another_description_in_one_warp", "another_left_description_in_one_warp"), 64),
    "one_warp_accumulates": 64,
}

# A read of accumulators leaves no trace but what was read.
NAN = ("accumulators_read",)


def run(simt: Any, name: str) -> Tensor:
    out = torch.zeros(64, 64)
    simt._broken_hopper(name, torch.ones(256, 64, dtype=torch.bfloat16), out)
    return out


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_reported(simt: Any, seed: int, name: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        run(simt, name)
    text = str(caught.value).splitlines()[0]
    place = rf"_broken_hopper: kernel {name}, block \([01], 0, 0\), thread \((\d+), 0, 0\): "
    matched = re.match(place + rf"(?:{FAULTS[name]}).* at (simt/broken_\w+\.(cpp|h)|kernels/device/\w+\.cuh):\d+", text)
    assert matched, text
    if name in THREADS:
        assert int(matched[1]) == THREADS[name]


@pytest.mark.parametrize("name", NAN)
def test_accumulators_in_flight_read_as_nan(simt: Any, seed: int, name: str) -> None:
    assert run(simt, name).isnan().all()


def test_a_waiter_that_misses_a_phase_is_told(simt: Any) -> None:
    """In the plain order of threads the report is not a deadlock."""
    simt.configure(0)
    with pytest.raises(RuntimeError, match="went 2 phases ahead while this thread waited for one"):
        run(simt, "two_phases_ahead")


def test_the_machine_survives_a_fault(simt: Any) -> None:
    """A report ends one launch; what runs next is not touched by it."""
    for name in FAULTS:
        with pytest.raises(RuntimeError):
            run(simt, name)
        check(simt, "a_shared_b_depth_k128", 16, torch.bfloat16, "cpu", ulps=0.5)


def test_unknown_name(simt: Any) -> None:
    with pytest.raises(ValueError, match="no kernel is called nonsense"):
        run(simt, "nonsense")
