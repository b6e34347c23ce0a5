"""The benchmarks without pytest: one row after another, each written when it is done.

    python bench/rows.py --main --providers warpform --results FOLDER     warpform's own main workloads
    python bench/rows.py --main --providers peers --table FILE            beside peers that need no compiling
    python bench/rows.py --list --main --device cuda                      what a GPU would measure, without one

A process that a faulty kernel ends loses one row: with --journal FILE the same command goes on after it. Exit status:
0 where every row of warpform was timed, 1 where one was not (or the process was ended by --row-limit), 3 where the GPU
answers no more and the rest has to be measured by another process.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "python"), str(ROOT / "tests")]

import harness  # noqa: E402
import torch  # noqa: E402
from suites import FAMILIES  # noqa: E402

# Which providers each choice takes besides warpform's plain call, which is timed last, so that its ratios are complete.
CHOICES = {
    "warpform": lambda provider: False,
    "peers": lambda provider: not harness.needs_compiling(provider),
    "compiled": harness.needs_compiling,
    "all": lambda provider: True,
}
# Processes that a family may end before the rest of it is left out.
MOST_ENDED = 2
LOST = 3
# The columns of a row that the journal keeps.
KEPT = (
    "family",
    "kernel",
    "direction",
    "workload",
    "provider",
    "status",
    "p50_us",
    "tflops",
    "gbs",
    "roofline",
    "ratios",
)


@dataclass
class Journal:
    """Which rows were begun and which are done, over the processes of one command; a line of JSON for each."""

    path: Path | None
    done: set[tuple[str, str]] = field(default_factory=set)
    ended: dict[str, int] = field(default_factory=dict)  # by family: processes that a row of it ended
    open: dict[str, Any] | None = None  # the row that ended the last one

    @classmethod
    def read(cls, path: Path | None) -> Journal:
        journal = cls(path)
        lines = path.read_text().splitlines() if path is not None and path.exists() else []
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # cut off in the middle
            journal.open = entry if entry["event"] == "begun" else None
            journal.count(entry["event"], entry)
        return journal

    def count(self, event: str, row: dict[str, Any]) -> None:
        if event in ("done", "ended"):
            self.done.add((row["workload"], row["provider"]))
        if event == "ended":
            self.ended[row["family"]] = self.ended.get(row["family"], 0) + 1

    def write(self, event: str, row: dict[str, Any]) -> None:
        """event: "begun", "done", "ended": the process did, while it measured that row; or "late": no time was left."""
        self.count(event, row)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps({"event": event, **{name: row[name] for name in KEPT if name in row}}) + "\n")


def chosen(spec: harness.Spec, choice: str) -> list[str]:
    """The providers of a workload in the order in which they are timed."""
    others = [p for p in spec.providers if p != "warpform" and CHOICES[choice](p)]
    return [*others, "warpform"] if others or choice in ("warpform", "all") else []


def load(family: str, session: harness.Session) -> list[harness.Spec]:
    found: list[harness.Spec] = importlib.import_module(f"suites.{family}").specs(session)
    return found


def selected(given: argparse.Namespace, session: harness.Session) -> Iterator[tuple[str, list[harness.Spec] | str]]:
    """Yields each family with its workloads, or with the reason why there are none."""
    for family in given.family:
        try:
            specs = load(family, session)
        except Exception as error:
            yield family, f"failed: {type(error).__name__}: {error}"[:200]
            continue
        wanted = (spec for spec in specs if spec.main or not given.main)
        yield family, [spec for spec in wanted if not given.only or str(spec) in given.only]


class Runner:
    """Measures the chosen rows, and keeps each at once."""

    def __init__(self, given: argparse.Namespace, session: harness.Session) -> None:
        self.given, self.session = given, session
        self.journal = Journal.read(given.journal)
        self.failed = 0

    def keep(self, row: dict[str, Any], event: str = "done") -> None:
        harness.append(self.given.table or self.given.results / f"{row['family']}.csv", [row])
        self.journal.write(event, row)
        if row["provider"] == "warpform" and row["status"] != "ok":
            self.failed += 1
        units = {"p50_us": "us", "tflops": "TFLOP/s", "gbs": "GB/s"}
        rates = [f"{row[name]} {unit}" for name, unit in units.items() if name in row]
        print(row["workload"], row["provider"], row["status"], *rates, sep="  ", flush=True)

    def plain(self, family: str, spec: harness.Spec | None, provider: str, status: str) -> dict[str, Any]:
        """A row that was not measured by this process."""
        sizes = {} if spec is None else dict(spec.sizes)
        return {
            **self.session.facts,
            "family": family,
            "kernel": family if spec is None else spec.kernel,
            "direction": "" if spec is None else spec.direction,
            "workload": family if spec is None else str(spec),
            "provider": provider,
            "status": status,
            "dtype": str(self.session.dtype).removeprefix("torch."),
            **sizes,
        }

    def run(self) -> int:
        for family, specs in selected(self.given, self.session):
            if isinstance(specs, str):
                row = self.plain(family, None, "warpform", specs)
                if (row["workload"], row["provider"]) not in self.journal.done:
                    self.keep(row)
                continue
            for spec in specs:
                for provider in chosen(spec, self.given.providers):
                    if (str(spec), provider) not in self.journal.done:
                        status = self.one(family, spec, provider)
                        if status:
                            return status
        self.session.flush()
        return 1 if self.failed else 0

    def one(self, family: str, spec: harness.Spec, provider: str) -> int:
        """Measures a row; 0, or the status with which this process has to end."""
        journal, opened = self.journal, self.journal.open
        if opened is not None and (opened["workload"], opened["provider"]) == (str(spec), provider):
            self.keep(self.plain(family, spec, provider, "failed: it ended the process that measured it"), "ended")
            return 0
        if journal.ended.get(family, 0) >= MOST_ENDED:
            status = f"missing: {family} ended {MOST_ENDED} processes before it"
            self.keep(self.plain(family, spec, provider, status))
            return 0
        if self.session.over:
            # Not a row: nothing is known of it, and an earlier one may be.
            journal.write("late", self.plain(family, spec, provider, "no time left"))
            print(spec, provider, "no time left", sep="  ", flush=True)
            self.failed += 1
            return 0
        journal.write("begun", self.plain(family, spec, provider, ""))
        if self.given.row_limit:
            faulthandler.dump_traceback_later(self.given.row_limit, exit=True, file=sys.__stderr__)
        row, error = self.session.measure(spec, provider)
        faulthandler.cancel_dump_traceback_later()
        lost = error is not None and self.lost()
        self.keep(self.session.compared(row), "ended" if lost else "done")
        return LOST if lost else 0

    def lost(self) -> bool:
        """Tells whether the GPU refuses this process: after an illegal access every later call fails."""
        try:
            harness.synchronize(self.session.device)
        except Exception:
            return True
        return False


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rows.py", description="the benchmarks without pytest")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    parser.add_argument(
        "--family", type=lambda text: text.split(","), default=list(FAMILIES), help="these, with commas, in this order"
    )
    parser.add_argument(
        "--providers", choices=tuple(CHOICES), default="all", help="which others besides warpform's plain call"
    )
    parser.add_argument("--main", action="store_true", help="main workloads alone")
    parser.add_argument("--only", nargs="*", default=[], metavar="WORKLOAD", help="these workloads alone, by name")
    parser.add_argument("--tiny", action="store_true", help="sizes that say nothing")
    parser.add_argument("--results", type=Path, help="a folder: rows are appended to FAMILY.csv in it")
    parser.add_argument("--table", type=Path, help="a file that all rows are appended to instead")
    parser.add_argument("--seconds", type=float, default=0.0, help="after so many nothing is measured; 0 is no limit")
    parser.add_argument("--row-seconds", type=float, help="a row is timed for so many (default 0.1 on a GPU, else 0.4)")
    parser.add_argument("--row-limit", type=float, default=0.0, help="a row that takes longer ends the process")
    parser.add_argument("--date", default="", help="of the rows (default now)")
    parser.add_argument("--journal", type=Path, help="what was done so far; the same command goes on from there")
    parser.add_argument("--list", action="store_true", help="names the workloads and their providers, and ends")
    return parser


def main(words: list[str]) -> int:
    begin = time.monotonic()
    parser = arguments()
    given = parser.parse_args(words)
    unknown = sorted(set(given.family) - set(FAMILIES))
    if unknown:
        parser.error(f"no family {', '.join(unknown)}; there are {', '.join(FAMILIES)}")
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    session = harness.Session(
        device,
        tiny=given.tiny,
        seconds=given.row_seconds,
        stop_at=begin + given.seconds if given.seconds else float("inf"),
        date=given.date,
    )
    if given.list:
        for _, specs in selected(given, session):
            for spec in [] if isinstance(specs, str) else specs:
                print(spec, *chosen(spec, given.providers), sep="  ")
        return 0
    if given.results is None and given.table is None:
        parser.error("--results or --table says where the rows go")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    if given.tiny and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(2, torch.get_num_threads()))
    return Runner(given, session).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
