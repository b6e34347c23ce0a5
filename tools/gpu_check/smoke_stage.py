"""Stage 2: single products by wgmma, then every op once, forward and backward, in every dtype that has kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gpu_check.op_processes import OpProcesses, chosen
from gpu_check.processes import Done
from gpu_check.run import Outcome, Run

STAGE = "smoke"


def smoke(run: Run) -> Outcome:
    """Runs the ops of all families, or those that --failed names. Cases are smoke::FAMILY::OP::DTYPE::DIRECTION.

    Single products come first: where the hardware reads their operands in another way, no op that uses them can be
    right, and they say which layout it is.
    """
    for families in (run.machine.products(run), run.machine.families(run)):
        kept = chosen(families, STAGE, run.wanted(STAGE))
        run.parallel(kept.items(), lambda item: _Family(run, *item).run_all(), 2 * run.jobs)
    return run.judge(STAGE)


class _Family(OpProcesses):
    def __init__(self, run: Run, family: str, ops: tuple[str, ...]) -> None:
        super().__init__(run, f"smoke-{family}", ops)
        self.family = family

    def row(self, row: dict[str, Any]) -> None:
        identifier = f"smoke::{self.family}::{row['op']}::{row['dtype']}::{row['direction']}"
        outcome, text = ("passed" if row["ok"] else "failed"), str(row.get("problem") or "")
        self.run.case(STAGE, identifier, outcome, seconds=row["ms"] / 1e3, text=text, group=self.family)

    def ended(self, done: Done) -> None:
        self.run.describe(STAGE, table(self.run.cases(STAGE)))

    def lost(self, op: str, dtype: str, text: str) -> None:
        self.run.failed(STAGE, f"smoke::{self.family}::{op}::{dtype}", text, self.family)

    def broken(self, text: str) -> None:
        self.run.failed(STAGE, f"smoke::{self.family}", text, self.family)

    def unreached(self, op: str) -> None:
        self.run.not_run(STAGE, f"smoke::{self.family}::{op}", "no time was left", self.family)


def table(cases: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line an op: its verdict, and what failed in which dtype and direction."""
    rows: dict[tuple[str, str], list[tuple[str, Mapping[str, Any]]]] = {}
    for identifier, case in cases.items():
        _, family, *rest = identifier.split("::")
        rows.setdefault((family, rest[0] if rest else "(process)"), []).append((" ".join(rest[1:]), case))
    lines = []
    for (family, op), found in sorted(rows.items()):
        bad = [f"{what}: {first_line(case['text'])}" for what, case in found if case["outcome"] == "failed"]
        ran = sum(case["outcome"] == "passed" for _, case in found)
        verdict = "FAILED " + "; ".join(bad) if bad else f"ok, {ran} rows" if ran else "not run"
        lines.append(f"{family:24} {op:36} {verdict}")
    return lines


def first_line(text: str) -> str:
    """The first line of a text, cut to a line of the summary."""
    return text.strip().partition("\n")[0][:160]
