#!/usr/bin/env python3
"""Stands in for Nsight Compute in a dry run: runs the command that it is given and writes a table as that tool does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FLAGS = ("--csv",)  # no value follows these
NAMES = (
    "ID", "Process ID", "Process Name", "Host Name", "Kernel Name", "Context", "Stream", "Block Size", "Grid Size",
    "Device", "CC", "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed", "gpu__time_duration.sum",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum", "l1tex__t_requests_pipe_lsu_mem_global_op_ld.sum",
    "l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum", "launch__registers_per_thread",
    "sm__inst_executed_pipe_tensor_op_hmma.avg.pct_of_peak_sustained_active",
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",
)  # fmt: skip
UNITS = ("",) * 11 + ("%", "us", "", "", "sector", "register/thread", "%", "inst", "inst")


def row(number: int, name: str, *values: str) -> tuple[str, ...]:
    return (str(number), "1", "python3", "127.0.0.1", name, "1", "7", "(128, 1, 1)", "(64, 1, 1)", "0", "9.0", *values)


def main(words: list[str]) -> int:
    log = Path()
    while words and words[0].startswith("--"):
        option = words.pop(0)
        value = "" if option in FLAGS else words.pop(0)
        if option == "--log-file":
            log = Path(value)
    done = subprocess.run(words)
    kernel = "void warpform::pretended<warpform::bf16_t, (int)128>(warpform::Params)"
    rows = [
        NAMES,
        UNITS,
        row(0, "at::cuda::<unnamed>::spin_kernel(long)", *("1",) * 9),
        row(1, kernel, "41.5", "1,250.5", "2,048", "1,000", "16,000", "168", "55.25", "0.75", "3.5"),
    ]
    lines = [",".join(f'"{cell}"' for cell in cells) for cells in rows]
    log.write_text("\n".join(["==PROF== Connected to process 1 (python3)", *lines, "==PROF== Disconnected"]) + "\n")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
