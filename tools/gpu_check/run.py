"""One invocation of the check: its time, its commands, and everything it found."""

from __future__ import annotations

import copy
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from gpu_check import ROOT, processes
from gpu_check.processes import Done

if TYPE_CHECKING:
    from gpu_check.machine import Machine
    from gpu_check.stages import Stage

Item = TypeVar("Item")

OUTCOMES = ("passed", "failed", "skipped", "not run")


@dataclass(frozen=True)
class Outcome:
    """The end of a stage. `ok` is None where nothing could be judged; `text` is one sentence."""

    ok: bool | None
    text: str


@dataclass(frozen=True)
class Limits:
    """Seconds that pieces of the work may take."""

    test: float = 60.0
    huge_test: float = 100.0
    smoke_op: float = 40.0
    # From the start of a process to its first sign of life: importing torch, making a CUDA context.
    startup: float = 90.0
    # With less left no further process starts: torch alone takes some seconds, and far more under a sanitizer.
    least: float = 12.0
    least_sanitized: float = 25.0


class Run:
    """One invocation of the check.

    Attributes:
        output: the folder that comes back. Only report.py writes there, and rows.csv by its own stage.
        scratch: everything else: raw logs in scratch/logs, reports of children.
        python: the interpreter of every child.
        dry: whether this is a dry run without a GPU.
        jobs: how many test processes run at once.
        results: what results.json will hold.
    """

    def __init__(
        self,
        machine: Machine,
        output: Path,
        *,
        budget: float | None = None,
        jobs: int = 4,
        only: Sequence[str] | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.machine = machine
        self.output = output
        self.dry = machine.dry
        self.jobs = jobs
        self.limits = limits or Limits()
        self.python = sys.executable
        self.scratch = Path(tempfile.mkdtemp(prefix="gpu-check-"))
        self.logs = self.scratch / "logs"
        self.logs.mkdir()
        self.live = processes.Live()
        self.results: dict[str, Any] = {"verdict": "running", "seconds": 0.0, "facts": {}, "stages": {}}
        self.changed: Callable[[], None] = lambda: None
        self._only = None if only is None else list(only)
        self._lock = threading.RLock()
        self._threads: list[threading.Thread] = []
        self._begin = time.monotonic()
        self._budget = float("inf") if budget is None else budget
        self._deadline = self._begin + self._budget

    # ---- time ----

    def seconds(self) -> float:
        """Since the check began."""
        return time.monotonic() - self._begin

    def budget_left(self) -> float:
        """Seconds left of --budget."""
        return self._begin + self._budget - time.monotonic()

    def left(self) -> float:
        """Seconds left of --budget, within the limit of the stage that has begun; 0 once the check is interrupted."""
        if self.live.stopped:
            return 0.0
        return min(self.budget_left(), self._deadline - time.monotonic())

    def begin(self, stage: Stage, seconds: float | None = None) -> None:
        """Starts a stage that may take `seconds` (default: its own limit)."""
        self._deadline = time.monotonic() + (stage.seconds if seconds is None else seconds)
        self.say(f"{stage.number} {stage.name}: at most {self.left():.0f} s")

    # ---- work ----

    def environment(self) -> dict[str, str]:
        """For every child: this tree's package, nothing written into the tree, nothing from the network."""
        paths = [str(ROOT / "python"), str(ROOT / "tools"), os.environ.get("PYTHONPATH", "")]
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONFAULTHANDLER": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "HYPOTHESIS_STORAGE_DIRECTORY": str(self.scratch / "hypothesis"),
        }

    def command(
        self,
        name: str,
        argv: Sequence[str],
        *,
        seconds: float,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        stalled: Callable[[], bool] | None = None,
    ) -> Done:
        """Runs a command in a process group of its own, its output in scratch/logs/NAME.txt.

        It is stopped after `seconds`, or when the stage's time is over. env: the whole environment (default:
        `environment()`). stalled: asked ten times a second; where it says True the command is stopped too.
        """
        limit = min(seconds, self.left())
        if limit <= 0:
            return Done(None, 0.0, True, "no time was left")
        environment = self.environment() if env is None else env
        log = self.logs / f"{name}.txt"
        return processes.execute(self.live, argv, log, seconds=limit, env=environment, cwd=cwd or ROOT, stalled=stalled)

    def parallel(self, items: Iterable[Item], work: Callable[[Item], None], jobs: int | None = None) -> None:
        """Calls work(item) for all items, `jobs` at a time (default: self.jobs); raises the first exception last."""
        waiting = list(items)
        errors: list[BaseException] = []

        def worker() -> None:
            while True:
                with self._lock:
                    if not waiting:
                        return
                    item = waiting.pop(0)
                try:
                    work(item)
                except BaseException as error:
                    errors.append(error)

        threads = [threading.Thread(target=worker, daemon=True) for _ in range(min(jobs or self.jobs, len(waiting)))]
        self._threads += threads
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)  # with a limit, so that a signal is handled
        if errors:
            raise errors[0]

    def settle(self, seconds: float) -> None:
        """Gives threads whose commands were stopped a moment to record how those ended."""
        until = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    # ---- what was found ----

    def record(self, stage: str, key: str, data: Any) -> None:
        """Merges JSON-able data into results.json's stages[stage][key]; dicts are updated and lists extended.

        The output folder is rewritten, at most every few seconds.
        """
        with self._lock:
            found = self.results["stages"].setdefault(stage, {})
            old = found.get(key)
            if isinstance(old, dict) and isinstance(data, dict):
                old.update(data)
            elif isinstance(old, list) and isinstance(data, list):
                old.extend(data)
            else:
                found[key] = data
        self.changed()

    def snapshot(self) -> dict[str, Any]:
        """A copy of the results that no other thread changes."""
        with self._lock:
            self.results["seconds"] = round(self.seconds(), 1)
            copied: dict[str, Any] = copy.deepcopy(self.results)
        return copied

    def case(
        self, stage: str, identifier: str, outcome: str, *, seconds: float = 0.0, text: str = "", group: str = ""
    ) -> None:
        """Records the verdict on one piece of work; a later verdict on the same identifier replaces it.

        identifier: a line of failed.txt, so that --failed can name it: a pytest node id, or STAGE::PART.
        outcome: passed, failed, skipped, or "not run".
        group: what the summary counts together, a test file for one.
        """
        verdict = {"outcome": outcome, "seconds": round(seconds, 3), "text": text, "group": group or stage}
        self.record(stage, "cases", {identifier: verdict})

    def failed(self, stage: str, identifier: str, text: str, group: str = "") -> None:
        """Records one failure."""
        self.case(stage, identifier, "failed", text=text, group=group)

    def not_run(self, stage: str, identifier: str, why: str, group: str = "") -> None:
        """Records work that was not reached. --failed runs it, too."""
        self.case(stage, identifier, "not run", text=why, group=group)

    def cases(self, stage: str) -> dict[str, dict[str, Any]]:
        """The verdicts of a stage so far, by identifier."""
        return self.found(stage, "cases")

    def found(self, stage: str, key: str) -> dict[str, Any]:
        """A copy of a dict that `record` made; {} where there is none."""
        with self._lock:
            return dict(self.results["stages"].get(stage, {}).get(key, {}))

    def judge(self, stage: str) -> Outcome:
        """A stage's outcome by its cases: False where one failed, None where none was reached."""
        counts = count(self.cases(stage).values())
        text = ", ".join(f"{number} {outcome}" for outcome, number in counts.items()) or "nothing to run"
        return Outcome(False if counts.get("failed") else True if counts.get("passed") else None, text)

    def describe(self, stage: str, lines: Sequence[str]) -> None:
        """The stage's part of summary.txt; replaces what an earlier call gave."""
        with self._lock:
            self.results["stages"].setdefault(stage, {})["summary"] = list(lines)
        self.changed()

    def wanted(self, stage: str) -> list[str] | None:
        """The identifiers of --failed that belong to a stage; None where all of the stage is to run.

        Stages 1 to 4 run only what failed; a later one that is asked for without a failure of its own runs whole.
        """
        if self._only is None or f"stage::{stage}" in self._only:
            return None
        found = identifiers_of(stage, self._only)
        return found if found or stage in RESTRICTED else None

    def say(self, line: str) -> None:
        """Prints one line of progress."""
        print(f"[{self.seconds():5.0f} s] {line}", flush=True)


def count(cases: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Counts the cases of each outcome, in the order of OUTCOMES."""
    found = Counter(case["outcome"] for case in cases)
    return {outcome: found[outcome] for outcome in OUTCOMES if found[outcome]}


# With --failed these run nothing but what failed.
RESTRICTED = ("smoke", "sanitizer", "tests")


def identifiers_of(stage: str, identifiers: Iterable[str]) -> list[str]:
    """Those that belong to a stage: node ids to the tests, STAGE::PART to any other."""
    prefix = "tests/" if stage == "tests" else f"{stage}::"
    return [identifier for identifier in identifiers if identifier.startswith(prefix)]
