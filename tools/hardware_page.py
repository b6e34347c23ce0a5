"""The parts of docs/hardware.md that scripts write: the record of runs, the table of kernels, the profiler's table.

Each is between markers, <!-- NAME:begin --> and <!-- NAME:end -->. Only the last column of the table of kernels,
why a prediction was missed, is written by hand; it is kept.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "hardware.md"
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "python"), str(ROOT / "tests"), str(ROOT / "tools")]

import harness  # noqa: E402
import report  # noqa: E402
from report import predictions, readme  # noqa: E402

from gpu_check import ncu  # noqa: E402

Row = dict[str, str]
# Families of kernels; those of models and of the host's calls have no floor of one kernel.
FAMILIES = (
    "attention", "disentangled_attention", "encoder", "fft_conv", "hidden", "monarch", "norm", "ring", "short_conv",
    "spatial", "window", "window_mix",
)  # fmt: skip
# The ops behind what bench/ calls a kernel, where the name is another one.
OPS = {
    "fft_conv": ("spectral_conv",),
    "gated_fft_conv": ("spectral_conv",),
    "RoutingPlan": ("routing_mask", "routing_plan"),
    "window_mix_dilated": ("window_mix",),
}
# The ops of a backward pass, where they are not NAME_backward.
BACKWARD = {
    "pack": ("unpack",),
    "unpack": ("pack",),
    "hidden_gather_linear": ("hidden_gather_linear_backward", "hidden_weight_grad"),
    "hidden_scatter_linear": ("hidden_scatter_linear_backward", "hidden_weight_grad"),
}
# Cards that the predictions, made for an H100, are held against.
PREDICTED = ("H100", "H200")

NOTHING_YET = "Nothing has run on hardware so far."
RECORD = (
    "date", "commit", "GPU", "driver", "torch", "ops: passed / failed", "gpu tests: passed / failed / skipped",
    "compute-sanitizer", "benchmarks: timed / failed / missing", "ncu",
)  # fmt: skip
COLUMNS = (
    "workload", "ops", "counted", "floor", "predicted", "measured", "share of the limit", "finding", "why",
)  # fmt: skip
FINDING = "FINDING"
BLOCKS = ("record", "kernels", "profile")


# ---- the record ----


def record_row(results: Mapping[str, Any], rows: Sequence[Row], date: str) -> str:
    """One line of the record, from results.json and rows.csv of a run."""
    facts, stages = results["facts"], results["stages"]
    counts = [sum(test(row["status"]) for row in rows) for test in (_timed, _bad, _missing)]
    kernels = stages.get("profile", {}).get("kernels", [])
    cells = (
        date,
        str(facts.get("commit") or "unknown"),
        str(facts["gpu"]),
        str(facts.get("nvidia_smi", {}).get("driver_version", "unknown")),
        str(facts.get("torch", "unknown")),
        _verdicts(stages.get("smoke"), ("passed", "failed")),
        _verdicts(stages.get("tests"), ("passed", "failed", "skipped")),
        _verdicts(stages.get("sanitizer"), ("passed", "failed")),
        " / ".join(map(str, counts)) if rows else "-",
        f"{len(kernels)} kernels" if kernels else "-",
    )
    return _line(cells)


def _timed(status: str) -> bool:
    return status == "ok"


def _missing(status: str) -> bool:
    return status.startswith("missing")


def _bad(status: str) -> bool:
    return not _timed(status) and not _missing(status)


def _verdicts(stage: Mapping[str, Any] | None, outcomes: Sequence[str]) -> str:
    """Counts the cases of a stage by outcome; "-" where it did not run."""
    if stage is None:
        return "-"
    found = [case["outcome"] for case in stage.get("cases", {}).values()]
    left = found.count("not run")
    if len(found) == left:
        return str(stage.get("text") or "-") if not left else "not run"
    counts = " / ".join(str(found.count(outcome)) for outcome in outcomes)
    return counts + (f", {left} not run" if left else "")


def add_record(text: str, line: str) -> str:
    """The page with one more line in its record, unless it is there already."""
    old = block(text, "record")
    lines = [each for each in old if each.startswith("|")] or [_line(RECORD), "|---" * len(RECORD) + "|"]
    return text if line in lines else readme.replace(text, "record", [*lines, line])


# ---- the kernels ----


@dataclass(frozen=True)
class Workload:
    """A main workload of bench/: its name, the ops behind it, and the work that any implementation has to do."""

    name: str
    ops: tuple[str, ...]
    flops: float
    bytes: float

    def floor_us(self, tflops: float, gbs: float) -> tuple[float, str]:
        """Microseconds that these ceilings leave, and which of the two sets them."""
        product, copy = self.flops / (tflops * 1e6), self.bytes / (gbs * 1e3)
        return (product, "FLOPs") if product > copy else (copy, "bytes")


def ops_of(kernel: str, direction: str) -> tuple[str, ...]:
    forward = OPS.get(kernel, (kernel,))
    backward = BACKWARD.get(kernel, tuple(f"{op}_backward" for op in forward))
    if direction == "forward" or kernel.endswith("_backward"):
        return forward
    return backward if direction == "backward" else forward + backward


def workloads() -> list[Workload]:
    """Every main workload of kernels on a GPU, in bfloat16."""
    session = harness.Session("cuda")
    found = []
    for family in FAMILIES:
        for spec in importlib.import_module(f"suites.{family}").specs(session):
            # A ring over several ranks is many steps and no kernel.
            if spec.main and not spec.kernel.startswith("ring_attention"):
                work = spec.work(session.dtype.itemsize)
                found.append(Workload(str(spec), ops_of(spec.kernel, spec.direction), *work))
    return found


def newest(rows: Iterable[Row]) -> dict[str, dict[str, Row]]:
    """device -> workload -> warpform's last row on a GPU, of one run the last that was timed."""
    found: dict[str, dict[str, Row]] = {}
    for row in sorted(rows, key=lambda row: row["date"]):
        if row["kind"] == "cuda" and row["provider"] == "warpform":
            last = found.setdefault(row["device"], {})
            old = last.get(row["workload"])
            if row["p50_us"] or old is None or old["date"] != row["date"] or not old["p50_us"]:
                last[row["workload"]] = row
    return found


def kernel_lines(rows: Iterable[Row], old: Sequence[str]) -> list[str]:
    """A table for each GPU that was measured, or one by nominal ceilings. old: the previous lines, for reasons."""
    reasons, listed = read_reasons(old), workloads()
    devices = newest(rows)
    lines: list[str] = []
    for device, found in devices.items() or {"": {}}.items():
        lines += ["", *_heading(device, found), "", _line(COLUMNS), "|---" * len(COLUMNS) + "|"]
        for workload in listed:
            why = reasons.get((device, workload.name), "")
            lines.append(_line(cells(workload, device, found.get(workload.name), why)))
    return lines[1:]


def _heading(device: str, found: Mapping[str, Row]) -> list[str]:
    if not device:
        return [
            "### Not measured yet",
            "",
            f"Floors by nominal ceilings, {predictions.NOMINAL}: {predictions.NOMINAL_TFLOPS:g} TFLOP/s of dense "
            f"bfloat16, {predictions.NOMINAL_GBS:g} GB/s.",
        ]
    dates = sorted({row["date"][:10] for row in found.values()})
    commits = sorted({row["commit"] for row in found.values()})
    return [
        f"### {device}",
        "",
        f"{' and '.join(dates)}, commit {', '.join(commits)}. Floors by the ceilings that the same run measured; by "
        f"nominal ones ({predictions.NOMINAL}) where a workload was not measured.",
    ]


def cells(workload: Workload, device: str, row: Row | None, why: str) -> tuple[str, ...]:
    """A line of the table. row: warpform's, where there is one."""
    timed = row is not None and bool(row["p50_us"])
    tflops, gbs = predictions.NOMINAL_TFLOPS, predictions.NOMINAL_GBS
    if row is not None and timed:
        tflops, gbs = float(row["ceiling_tflops"]), float(row["ceiling_gbs"])
    floor, bound = workload.floor_us(tflops, gbs)
    prediction = predictions.PREDICTIONS.get(workload.name)
    if device and not any(name in device for name in PREDICTED):
        prediction = None
    measured, share, finding = "not measured yet", "", ""
    if row is not None and not timed:
        measured = row["status"].replace("|", "/")
    elif row is not None:
        us = float(row["p50_us"])
        rate = f"{report.number(workload.flops / us / 1e6)} TFLOP/s"
        if bound == "bytes":
            rate = f"{report.number(workload.bytes / us / 1e3)} GB/s"
        measured, share = f"{report.number(us)} us, {rate}", f"{floor / us:.0%}"
        if prediction is not None and prediction.missed(value_of(prediction.unit, workload, us, gbs)):
            finding = FINDING if why else f"{FINDING}: say why"
    counted = [f"{_scaled(workload.flops)}FLOP"] if workload.flops else []
    return (
        f"`{workload.name}`",
        ", ".join(f"`{op}`" for op in workload.ops),
        ", ".join([*counted, f"{_scaled(workload.bytes)}B"]),
        f"{report.number(floor)} us, {bound}",
        "" if prediction is None else str(prediction),
        measured,
        share,
        finding,
        why,
    )


def value_of(unit: str, workload: Workload, us: float, gbs: float) -> float:
    """Converts a measured time into a prediction's unit; gbs: of a large copy."""
    if unit == predictions.RATE:
        return workload.flops / us / 1e6
    return us / 1e3 if unit == predictions.TIME else workload.bytes / us / 1e3 / gbs


def read_reasons(lines: Iterable[str]) -> dict[tuple[str, str], str]:
    """(device, workload) -> what a person wrote in the last column."""
    found, device = {}, ""
    for line in lines:
        if line.startswith("### "):
            device = line.removeprefix("### ").strip()
        elif line.startswith("| `"):
            parts = [part.strip() for part in re.split(r"(?<!\\)\|", line)[1:-1]]
            if len(parts) == len(COLUMNS) and parts[-1]:
                found[device, parts[0].strip("`")] = parts[-1]
    return found


def _scaled(value: float) -> str:
    """Three digits and a prefix."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g} "


# ---- the profiler ----


def profile_lines(profiles: Iterable[Mapping[str, Any]]) -> list[str]:
    """The newest one that each GPU has."""
    last = {str(found["device"]): found for found in sorted(profiles, key=lambda found: str(found["date"]))}
    lines: list[str] = []
    for device, found in last.items():
        kernels = [ncu.Kernel(k.pop("name"), k.pop("workload"), k) for k in map(dict, found["kernels"])]
        lines += ["", f"### {device}, {found['date']}, commit {found['commit']}", "", *ncu.table(kernels)]
    return lines[1:] or ["No kernel was profiled yet."]


def read_profiles(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("ncu-*.json"))]


# ---- the page ----


def block(text: str, name: str) -> list[str]:
    """The lines between a block's markers. Raises ValueError where they are not there."""
    readme.replace(text, name, [])
    return text.partition(f"<!-- {name}:begin -->\n")[2].partition(f"<!-- {name}:end -->\n")[0].splitlines()


def update(text: str, results: Path) -> str:
    """The page with its tables of kernels made anew from a folder of results.

    Raises:
        ValueError: its markers are not there.
        FileNotFoundError: the folder has no results.
    """
    text = readme.replace(text, "kernels", kernel_lines(report.read(results), block(text, "kernels")))
    return readme.replace(text, "profile", profile_lines(read_profiles(results)))


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
