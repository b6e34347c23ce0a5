#!/usr/bin/env python3
"""Replaces Nsight Compute in a dry run: runs the command that it is given, then prints a table as that does."""

from __future__ import annotations

import subprocess
import sys

_ABOUT = (
    "ID", "Process ID", "Process Name", "Host Name", "Kernel Name", "Context", "Stream", "Block Size", "Grid Size",
    "Device", "CC",
)  # fmt: skip
_METRICS = {
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": "%",
    "gpu__time_duration.sum": "us",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum": "",
    "l1tex__t_requests_pipe_lsu_mem_global_op_ld.sum": "",
    "l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum": "sector",
    "launch__registers_per_thread": "register/thread",
    "sm__inst_executed_pipe_tensor_op_hmma.avg.pct_of_peak_sustained_active": "%",
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio": "inst",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio": "inst",
}


def _line(*cells: str) -> str:
    return ",".join(f'"{cell}"' for cell in cells)


def _launch(number: int, name: str, *values: str) -> str:
    about = (str(number), "1", "python3", "127.0.0.1", name, "1", "7", "(128, 1, 1)", "(64, 1, 1)", "0", "9.0")
    return _line(*about, *values)


SAMPLE = "\n".join(
    [
        "==PROF== Connected to process 1 (/usr/bin/python3)",
        "profiled 0: monarch_multiply",
        '==PROF== Profiling "spin_kernel" - 0: 0%....50%....100% - 21 passes',
        "==PROF== Disconnected from process 1",
        _line(*_ABOUT, *_METRICS),
        _line(*[""] * len(_ABOUT), *_METRICS.values()),
        _launch(0, "at::cuda::<unnamed>::spin_kernel(long)", *["1"] * len(_METRICS)),
        _launch(
            1,
            "void warpform::monarch_forward<warpform::bf16_t, warpform::MonarchTile<(int)4>>(warpform::MonarchWork)",
            *("41.5", "1,250.5", "2,048", "1,000", "16,000", "168", "55.25", "0.75", "3.5"),
        ),
    ]
)


def main(words: list[str]) -> int:
    while words and words[0].startswith("--"):
        del words[0]
    status = subprocess.run(words).returncode
    print(SAMPLE)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
