"""Nsight Compute's command line, and a short table from the long one that it prints."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

# Whole sections: the names of single metrics differ from version to version, and an unknown one ends the run.
SECTIONS = (
    "SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "MemoryWorkloadAnalysis_Tables",
    "LaunchStats", "Occupancy", "WarpStateStats",
)  # fmt: skip
# bench/profiled.py launches it in front of every workload.
MARKER = "spin_kernel"
COLUMNS = (
    "us", "tensor pipe %", "DRAM %", "L2 %", "SM %", "occupancy %", "registers", "stalls", "bank conflicts",
    "sectors a load", "sectors a store",
)  # fmt: skip
_MICROSECONDS = {"n": 1e-3, "u": 1.0, "m": 1e3, "s": 1e6}
_PERCENT = r"\.(avg|max)\.pct_of_peak_sustained_(active|elapsed)"


@dataclass
class Kernel:
    """One launch: what it is called, which workload it belongs to, and what was read, as text by column of COLUMNS."""

    name: str
    workload: str = "-"
    values: dict[str, str] = field(default_factory=dict)


def command(program: str, argv: Sequence[str], sections: Sequence[str] = SECTIONS) -> list[str]:
    """Profiles this library's kernels, and the marker, between the profiler's start and stop; a table is printed."""
    return [
        program,
        "--csv",
        "--page=raw",
        "--clock-control=none",  # the card's clocks stay as they are
        "--profile-from-start=off",
        "--target-processes=all",
        "--kernel-name-base=demangled",
        f"--kernel-name=regex:warpform|{MARKER}",
        *(f"--section={section}" for section in sections),
        *argv,
    ]


def parse(text: str, workloads: Sequence[str]) -> list[Kernel]:
    """The launches of a raw table, whose second row holds units; whatever is before it is passed over.

    workloads: those that were profiled, in their order; the marker says where each begins.
    """
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    table = list(csv.reader(line for line in lines[start:] if line.startswith('"')))
    names, found, place = table[0], [], -1
    units: dict[str, str] = {}
    for values in table[1:]:
        row = dict(zip(names, values, strict=False))
        if not row.get("ID"):
            units = row
        elif MARKER in row.get("Kernel Name", ""):
            place += 1
        else:
            workload = workloads[place] if 0 <= place < len(workloads) else "-"
            found.append(Kernel(_short(row.get("Kernel Name", "-")), workload, _values(row, units)))
    return found


def table(kernels: Sequence[Kernel]) -> list[str]:
    """Markdown."""
    head = ("workload", "kernel", *COLUMNS)
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * len(COLUMNS)]
    for kernel in kernels:
        cells = (kernel.workload, kernel.name, *(kernel.values.get(column, "-") for column in COLUMNS))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _short(name: str) -> str:
    """A demangled name without its return type, namespaces and arguments; template arguments stay."""
    name = re.sub(r"\((anonymous namespace|unnamed)\)::|<unnamed>::", "", name)
    name = re.sub(r"\((int|bool|unsigned int|long|warpform::\w+)\)", "", name)  # casts in front of template arguments
    depth = 0
    for i, letter in enumerate(name):
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0:
            name = name[:i]
            break
    name = re.sub(r"\b\w+::", "", name.removeprefix("void ").removeprefix("static "))
    return name.replace("|", "/").strip() or "-"


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def _all(row: dict[str, str], pattern: str) -> dict[str, float]:
    """The numbers of the columns whose whole name fits."""
    read = ((name, _number(value or "")) for name, value in row.items() if name and re.fullmatch(pattern, name))
    return {name: value for name, value in read if value is not None}


def _values(row: dict[str, str], units: dict[str, str]) -> dict[str, str]:
    found: dict[str, str] = {}

    def put(column: str, values: dict[str, float]) -> None:
        if values:
            found[column] = f"{max(values.values()):.4g}"

    durations = _all(row, r"gpu__time_duration\.(sum|avg|max)")
    put("us", {name: value * _MICROSECONDS.get((units.get(name) or "n")[0], 1.0) for name, value in durations.items()})
    put("tensor pipe %", _all(row, r"sm__(inst_executed_)?pipe_tensor\w*" + _PERCENT))
    put("DRAM %", _all(row, r"(gpu__)?dram_{1,2}throughput" + _PERCENT))
    put("L2 %", _all(row, r"lts__throughput" + _PERCENT))
    put("SM %", _all(row, r"sm__throughput" + _PERCENT))
    put("occupancy %", _all(row, r"sm__warps_active" + _PERCENT))
    put("registers", _all(row, r"launch__registers_per_thread"))
    # Warps that waited for each reason, on average, whenever one issued.
    stalls = _all(row, r"smsp__average_warps_issue_stalled_\w+_per_issue_active\.ratio")
    worst = sorted(stalls.items(), key=lambda item: -item[1])[:3]
    if worst:
        names = (re.sub(r"smsp__average_warps_issue_stalled_|_per_issue_active\.ratio", "", n) for n, _ in worst)
        found["stalls"] = ", ".join(f"{name} {value:.2g}" for name, (_, value) in zip(names, worst, strict=True))
    conflicts = "l1tex__data_bank_conflicts_pipe_lsu_mem_shared"
    put("bank conflicts", _all(row, conflicts + r"\.sum"))
    parts = _all(row, conflicts + r"_op_(ld|st)\.sum")
    if parts and "bank conflicts" not in found:
        found["bank conflicts"] = f"{sum(parts.values()):.4g}"
    for column, kind in (("sectors a load", "ld"), ("sectors a store", "st")):
        suffix = rf"_pipe_lsu_mem_global_op_{kind}"
        put(column, _all(row, rf"l1tex__average_t_sectors_per_request{suffix}\.ratio"))
        sectors, requests = (_all(row, rf"l1tex__t_{what}{suffix}\.sum") for what in ("sectors", "requests"))
        if column not in found and sectors and any(requests.values()):
            found[column] = f"{max(sectors.values()) / max(requests.values()):.4g}"
    return found
