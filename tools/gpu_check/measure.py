"""Stages 5 to 8: rows of bench/ at their main sizes, alone and beside peers, and what a profiler reads of kernels.

Rows come from bench/rows.py, which appends each to rows.csv of the output folder when it is done. One process measures
all families, as importing torch costs seconds; a kernel that ends it loses its row, and another process goes on.
"""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Sequence
from typing import Any

from gpu_check import ROOT, ncu
from gpu_check.events import Reader
from gpu_check.run import Outcome, Run

sys.path.insert(0, str(ROOT / "bench"))
import suites

# These come first; what time runs out for is asked last.
FIRST = ("attention", "window", "monarch", "fft_conv", "hidden", "encoder")
LAST = ("swin", "models", "m2", "host")
FAMILIES = (*FIRST, *(name for name in suites.FAMILIES if name not in FIRST + LAST), *LAST)
DRY_FAMILIES = ("monarch", "short_conv")
# Seconds that a row may take, the building of its inputs and its check among them; a compilation takes longer.
ROW_LIMIT, COMPILED_ROW_LIMIT = 40.0, 120.0
# With less left no process starts, and before the end so much is left to write what there is.
LEAST, MARGIN = 8.0, 2.0

# Workloads that the profiler looks at, by family, the most important first.
PROFILED: dict[str, tuple[str, ...]] = {
    "attention": (
        "varlen_attention-forward-B1-S16384-T16384-H16-16-D128",
        "varlen_attention-forward-B8-S2048-T16384-H32-32-D64",
        "varlen_attention-backward-B1-S16384-T16384-H16-16-D128",
        "varlen_attention-backward-B8-S2048-T16384-H32-32-D64",
    ),
    "window": (
        "window_attention-forward-B128-56x56-W7x7-S3x3-H3-D32",
        "window_attention-forward+backward-B128-56x56-W7x7-S3x3-H3-D32",
    ),
    "monarch": (
        "monarch_multiply-forward-T16384-4x192x192-4x768x192",
        "blockdiag_multiply-forward+backward-T16384-4x1024x1024",
        "blockdiag_glu-forward+backward-T16384-4x1536x192-4x192x768",
    ),
    "fft_conv": (
        "gated_fft_conv-forward-batch64-seqlen4096-tokens262144-hidden768",
        "gated_fft_conv-forward+backward-batch64-seqlen4096-tokens262144-hidden768",
    ),
    "hidden": (
        "hidden_gather_linear-forward-T8192-d2048",
        "hidden_scatter_linear-forward-T8192-d2048",
        "hidden_weight_grad-forward-T8192-d2048",
        "hidden_gather_linear-forward-T4-d2048",
    ),
    "encoder": (
        "add_bias_residual_layer_norm-forward-batch16-seqlen1024-tokens9531-hidden768",
        "add_bias_residual_layer_norm-backward-batch16-seqlen1024-tokens9531-hidden768",
        "bias_gelu-forward-batch16-seqlen1024-tokens9531-hidden3072",
        "bias_gelu-backward-batch16-seqlen1024-tokens9531-hidden3072",
        "unpack-forward-batch16-seqlen1024-tokens9531-hidden768",
    ),
    "norm": (
        "add_residual_rms_norm-forward-tokens9531-hidden768",
        "add_residual_rms_norm-backward-tokens9531-hidden768",
        "rms_norm_gelu-forward-tokens9531-hidden3072",
        "rms_norm_gelu-backward-tokens9531-hidden3072",
    ),
    "ring": (
        "attention_step-forward-batch1-seqlen8192-tokens8192-heads16-kv_heads4-head_dim128",
        "attention_step_backward-backward-batch1-seqlen8192-tokens8192-heads16-kv_heads4-head_dim128",
    ),
    "disentangled_attention": (
        "disentangled_attention-forward-B32-S512-T16384-H12-D64-equal",
        "disentangled_attention-backward-B32-S512-T16384-H12-D64-equal",
    ),
    "short_conv": ("short_conv_gate-forward+backward-batch32-seqlen1024-tokens32768-hidden768",),
}
DRY_PROFILED = {"monarch": ("monarch_multiply-forward-T5-4x4x4-4x8x4",)}
PROFILE_LIMIT = 70.0  # seconds of a family


def own_rows(run: Run) -> Outcome:
    """warpform alone."""
    return _Rows(run, "own_rows", "warpform", ROW_LIMIT).measure()


def peers(run: Run) -> Outcome:
    """warpform beside the peers that need no compiling."""
    return _Rows(run, "peers", "peers", ROW_LIMIT).measure()


def compiled_peers(run: Run) -> Outcome:
    """warpform beside those that do."""
    return _Rows(run, "compiled_peers", "compiled", COMPILED_ROW_LIMIT).measure()


def _wanted(run: Run, stage: str, families: Sequence[str]) -> list[str]:
    """The families to do: those of --failed, or all."""
    wanted = run.wanted(stage)
    return [family for family in families if wanted is None or f"{stage}::{family}" in wanted]


def _environment(run: Run) -> dict[str, str]:
    """With the commit, which a child finds no better than this process did."""
    commit = run.results["facts"].get("commit")
    return {**run.environment(), **({"WARPFORM_COMMIT": str(commit)} if commit else {})}


def _date(run: Run) -> str:
    """The same in all rows of a run, so that the report sets them beside each other."""
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ")
    date: str = run.results.setdefault("rows_date", now)
    return date


class _Rows:
    """One stage of rows."""

    def __init__(self, run: Run, stage: str, providers: str, row_limit: float) -> None:
        self.run, self.stage, self.providers, self.row_limit = run, stage, providers, row_limit
        self.families = _wanted(run, stage, DRY_FAMILIES if run.dry else FAMILIES)
        self.journal = run.scratch / f"{stage}.jsonl"
        self.events = Reader(self.journal)
        self.rows: list[dict[str, Any]] = []
        self.late: dict[str, int] = {}  # rows of a family for which no time was left
        self.begun: dict[str, Any] | None = None  # the row that is measured now
        self.heard = 0.0  # when the last event came

    def command(self, seconds: float) -> list[str]:
        run = self.run
        return [
            run.python,
            str(ROOT / "bench" / "rows.py"),
            "--main",
            f"--providers={self.providers}",
            f"--family={','.join(self.families)}",
            f"--table={run.output / 'rows.csv'}",
            f"--journal={self.journal}",
            f"--date={_date(run)}",
            f"--seconds={seconds:.0f}",
            f"--row-limit={self.row_limit}",
            *(("--device=cpu", "--tiny") if run.dry else ("--device=cuda",)),
        ]

    def poll(self) -> bool:
        """Takes what the process told; True where it has not even begun after so long."""
        for event in self.events.read():
            self.heard = time.monotonic()
            kind = event.pop("event")
            self.begun = event if kind == "begun" else None
            if kind == "late":
                self.late[event["family"]] = self.late.get(event["family"], 0) + 1
            elif kind != "begun":
                self.rows.append(event)
                self.run.record(self.stage, "rows", [event])
        return self.begun is None and time.monotonic() - self.heard > self.run.limits.startup

    def measure(self) -> Outcome:
        """Processes, one after another, until no row is left; a case for each family."""
        problem, number = "", 0
        while self.families and self.run.left() > LEAST:
            seconds, before = self.run.left() - MARGIN, len(self.rows)
            self.heard, self.begun, number = time.monotonic(), None, number + 1
            done = self.run.command(
                f"{self.stage}-{number}",
                self.command(seconds),
                seconds=seconds + MARGIN,
                env=_environment(self.run),
                stalled=self.poll,
            )
            self.poll()
            if done.status in (0, 1) and self.begun is None:
                break
            problem = f"{done.how()}\n{done.text[-1500:]}"
            if self.begun is None and len(self.rows) == before:
                break  # it came to no row: the next one would not either
        self.judge(problem)
        self.run.describe(self.stage, self.summary())
        outcome = self.run.judge(self.stage)
        counts = [sum(row["status"].startswith(word) for row in self.rows) for word in ("ok", "missing", "")]
        text = f"{counts[0]} rows timed, {counts[1]} missing, {counts[2] - counts[0] - counts[1]} failed"
        return Outcome(outcome.ok, text if self.families else "nothing to run")

    def judge(self, problem: str) -> None:
        """A family fails by warpform's rows, and by a provider that computes something else; peers may fail."""
        for family in self.families:
            name = f"{self.stage}::{family}"
            rows = [row for row in self.rows if row["family"] == family]
            bad = [
                f"{row['workload']} {row['provider']}: {row['status']}"
                for row in rows
                if row["status"].startswith("disagrees")
                or (row["provider"] == "warpform" and row["status"].startswith("failed"))
            ]
            late = self.late.get(family, 0)
            if bad:
                ended = any("ended the process" in line for line in bad)
                self.run.failed(self.stage, name, "\n".join([*bad, *([problem] if ended else [])]))
            elif late or not rows:
                left = f"no time left for {late} rows" if late else "no time left"
                self.run.not_run(self.stage, name, problem or left)
            else:
                self.run.case(self.stage, name, "passed", text=f"{len(rows)} rows")

    def summary(self) -> list[str]:
        """A line for each of warpform's rows, with the peers' times over its own; then what failed."""
        lines = []
        for row in self.rows:
            if row["provider"] == "warpform" and row["status"] == "ok":
                share = f"{100 * float(row['roofline']):4.0f} %" if "roofline" in row else "     -"
                rates = f"{row.get('tflops', '-'):>8} TFLOP/s {row.get('gbs', '-'):>8} GB/s {share}"
                line = f"{row['workload']:84} {row.get('p50_us', '-'):>9} us {rates}"
                lines.append(f"{line}  {row.get('ratios', '')}".rstrip())
        for row in self.rows:
            if row["status"] != "ok" and not row["status"].startswith("missing"):
                lines.append(f"{row['workload']} {row['provider']}: {row['status']}")
        return lines


def profile(run: Run) -> Outcome:
    """A table of kernels from Nsight Compute, one process a family; its long tables are in the logs."""
    stage, program = "profile", run.machine.ncu()
    if program is None:
        return Outcome(None, "ncu is not installed")
    workloads = DRY_PROFILED if run.dry else PROFILED
    kernels: list[ncu.Kernel] = []
    sections: Sequence[str] = ncu.SECTIONS
    for family in _wanted(run, stage, tuple(workloads)):
        name = f"{stage}::{family}"
        if run.left() < LEAST:
            run.not_run(stage, name, "no time left")
            continue
        found, problem = _profiled(run, program, family, workloads[family], sections)
        if not found and "ERROR" in problem and sections and run.left() > LEAST:
            # A version that lacks one of the sections refuses all; what it reads by default has to do.
            sections = ()
            found, problem = _profiled(run, program, family, workloads[family], sections)
        if found:
            run.case(stage, name, "passed", text=f"{len(found)} kernels")
        else:
            run.failed(stage, name, problem)
        kernels += found
        run.record(stage, "kernels", [{"name": k.name, "workload": k.workload, **k.values} for k in found])
        run.describe(stage, ncu.table(kernels))
    return Outcome(run.judge(stage).ok, f"{len(kernels)} kernels")


def _profiled(
    run: Run, program: str, family: str, workloads: Sequence[str], sections: Sequence[str]
) -> tuple[list[ncu.Kernel], str]:
    """The kernels of a family's workloads, and what the tool said."""
    device = ("--device=cpu", "--tiny") if run.dry else ("--device=cuda",)
    driver = [run.python, str(ROOT / "bench" / "profiled.py"), f"--family={family}", *device, *workloads]
    argv = ncu.command(program, driver, sections)
    done = run.command(f"profile-{family}", argv, seconds=PROFILE_LIMIT, env=_environment(run))
    return ncu.parse(done.text, workloads), f"{done.how()}, no kernel in its table\n{done.text[-1500:]}"
