"""Stage 4: every test marked gpu, a few files at a time, each file in as many processes as it takes."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gpu_check.events import Follower
from gpu_check.faults import POISONED
from gpu_check.op_processes import ending, tail
from gpu_check.processes import Done, edges
from gpu_check.pytest_plugin import claim_path
from gpu_check.run import Outcome, Run, count
from gpu_check.sanitizer import ENVIRONMENT, invocation
from gpu_check.sanitizer_report import PREFIX

STAGE = "tests"
# A file that keeps dying: a hang costs its whole limit, so it weighs more than a crash.
MOST_RESTARTS = 6
HANG_WEIGHT = 2
# A second process joins a file once so many of its tests are unclaimed: fewer end sooner than it starts.
JOIN = 12
FOREIGN = re.compile(r"/_pytest/|/pluggy/|/pytest/__main__|<frozen runpy>|/gpu_check/pytest_plugin")


def suites(run: Run) -> Outcome:
    """Cases are pytest's node ids; with --failed those that it names."""
    wanted = run.wanted(STAGE)
    files = [TestFile(run, path, wanted) for path in by_size(run.machine.test_files(run)) if _named(run, path, wanted)]
    _share(run, files)
    # Tests beside each other share the GPU's memory; those for which it did not suffice run again, one at a time.
    crowded = [TestFile(run, file.path, file.crowded, kind="again") for file in files if file.crowded]
    _share(run, crowded, jobs=1)
    poisoned = [(file, identifier) for file in files for identifier in file.poisoned]
    run.parallel(poisoned[: 2 * run.jobs], lambda one: _diagnose(run, *one), run.jobs)
    for file in files:
        huge = [test for test in file.huge if wanted is None or file.name in wanted or test in wanted]
        if huge:
            _share(run, [TestFile(run, file.path, huge, kind="huge")], jobs=1)
    run.describe(STAGE, table(run))
    return run.judge(STAGE)


def by_size(paths: Iterable[Path]) -> list[Path]:
    """Longer files first: they may be the last to end."""
    return sorted(paths, key=lambda path: -path.stat().st_size)


def _named(run: Run, path: Path, wanted: list[str] | None) -> bool:
    name = path.relative_to(run.machine.test_root(run)).as_posix()
    return wanted is None or any(identifier.partition("::")[0] == name for identifier in wanted)


class TestFile:
    """One file: what pytest collected in it, and what became of each test."""

    __test__ = False  # to pytest

    def __init__(self, run: Run, path: Path, wanted: list[str] | None, *, kind: str = "") -> None:
        self.run = run
        self.path = path
        self.name = path.relative_to(run.machine.test_root(run)).as_posix()
        self.kind = kind
        self.seconds = run.limits.huge_test if kind == "huge" else run.limits.test
        parts = [*self.name.removesuffix(".py").split("/"), *([kind] if kind else [])]
        self.folder = run.scratch / "tests" / "-".join(parts)
        self.claims = self.folder / "claims"
        self.claims.mkdir(parents=True, exist_ok=True)
        self.only: Path | None = None
        if wanted is not None and self.name not in wanted:
            self.only = self.folder / "only.txt"
            self.only.write_text("\n".join(wanted))
        # Known from the start where they are called by name, else from the first process.
        self.collected = list(wanted) if kind and wanted else None
        self.huge: list[str] = []
        self.ended: set[str] = set()
        self.poisoned: list[str] = []
        self.crowded: list[str] = []
        self.started = 0
        self.running = 0
        self.restarts = 0
        self.closed = False
        self.lock = threading.RLock()

    # ---- what may start next ----

    def unclaimed(self) -> int:
        """Counts the tests that no process has taken; 0 until they are collected."""
        return sum(not claim_path(self.claims, test).exists() for test in self.collected or ())

    def wants(self) -> tuple[int, int]:
        """Says how much it needs one more process; (0, 0) means not at all."""
        if self.closed:
            return 0, 0
        if not self.started:
            return 3, 0
        if not self.running:
            return 2, 0
        left = self.unclaimed()
        return (1, left) if left >= JOIN and not self.kind else (0, 0)

    # ---- one process ----

    def enter(self) -> str:
        """The name of a process that is about to start."""
        with self.lock:
            self.started += 1
            self.running += 1
            return f"{self.folder.name}-{self.started}"

    def process(self, name: str) -> None:
        """Runs pytest over what is unclaimed, and judges how it ended."""
        try:
            _Process(self, name).go()
        finally:
            with self.lock:
                self.running -= 1
            self.run.describe(STAGE, table(self.run))
            self.run.say(f"{name}: {self.counts()}")

    def counts(self) -> str:
        """Counts the outcomes of its tests so far, in words."""
        cases = [case for case in self.run.cases(STAGE).values() if case["group"] == self.name]
        return ", ".join(f"{number} {outcome}" for outcome, number in count(cases).items()) or "no tests"

    def close(self, why: str) -> None:
        """Gives up what is left."""
        with self.lock:
            self.closed = True
            known = self.run.cases(STAGE)
            for test in [self.name] if self.collected is None else self.collected:
                if test not in known:
                    self.run.not_run(STAGE, test, why, self.name)


class _Process:
    """One process of a file."""

    def __init__(self, file: TestFile, name: str) -> None:
        self.file = file
        self.run = file.run
        self.name = name
        self.current: str | None = None
        self.done = False
        self.begun: set[str] = set()
        self.broken = False

    def go(self) -> None:
        file, run = self.file, self.run
        events, stacks = file.folder / f"{self.name}.jsonl", file.folder / f"{self.name}.stacks"
        follower = Follower(events, self._event, startup=run.limits.startup, step=file.seconds)
        done = run.command(
            self.name,
            pytest_command(run, [str(file.path)], huge=file.kind == "huge"),
            seconds=run.left(),
            env=self._environment(events, stacks),
            stalled=follower.stalled,
        )
        follower.read()
        self._release()
        with file.lock:
            self._judge(done, edges(stacks))

    def _environment(self, events: Path, stacks: Path) -> dict[str, str]:
        settings = {
            "GPU_CHECK_EVENTS": str(events),
            "GPU_CHECK_STACKS": str(stacks),
            "GPU_CHECK_CLAIMS": str(self.file.claims),
            "GPU_CHECK_NAME": self.name,
            "GPU_CHECK_SECONDS": str(self.file.seconds),
        }
        if self.file.only is not None:
            settings["GPU_CHECK_ONLY"] = str(self.file.only)
        return {**environment(self.run), **settings}

    def _event(self, event: dict[str, Any]) -> None:
        file, kind = self.file, event["event"]
        if kind == "collected":
            with file.lock:
                file.collected = event["ids"]
                file.huge = event["huge"]
        elif kind == "broken":
            self.broken = True
            self.run.failed(STAGE, file.name, f"not collected\n{event['text']}", file.name)
        elif kind == "start":
            self.current = event["id"]
            self.begun.add(event["id"])
        elif kind == "end":
            self.current = None
            file.ended.add(event["id"])
            text = event["text"]
            if event["outcome"] == "failed" and "out of memory" in text:
                file.crowded.append(event["id"])
            if event["poisoned"]:
                file.poisoned.append(event["id"])
                text = f"{text}\n(the GPU refused the process everything after this test)"
            self.run.case(STAGE, event["id"], event["outcome"], seconds=event["seconds"], text=text, group=file.name)
        elif kind == "done":
            self.done = True

    def _release(self) -> None:
        """Tests that the process took and did not begin are free again."""
        for test in self.file.collected or ():
            path = claim_path(self.file.claims, test)
            try:
                taken = test not in self.begun and path.read_text() == self.name
            except OSError:
                continue
            if taken:
                path.unlink()

    def _judge(self, done: Done, stacks: str) -> None:
        file, run = self.file, self.run
        if self.done:
            # Status 1 is pytest's for failed tests, 5 for none; without time left the process was stopped by us.
            if done.status not in (0, 1, 5) and not self.broken and run.left() > 0:
                run.failed(STAGE, file.name, f"after its last test: {done.how()}\n{tail(done.text)}", file.name)
            if not file.unclaimed():
                file.closed = True
            return
        if run.left() <= 0:
            file.close("no time was left")
            return
        if self.current is None and done.status != POISONED:
            if not self.broken:
                run.failed(STAGE, file.name, f"between tests: {done.how()}\n{tail(done.text)}", file.name)
            file.close("the file's process ended before")
            return
        hung = ending(done, stacks) == "hung"
        if self.current is not None:
            file.ended.add(self.current)
            how = f"hung: no end after {file.seconds:.0f} s" if hung else f"crashed: {done.how()}"
            text = f"{how}\n{own_frames(stacks)}\n{tail(own_frames(done.text))}"
            run.case(STAGE, self.current, "failed", seconds=file.seconds if hung else 0.0, text=text, group=file.name)
            if not hung:
                file.poisoned.append(self.current)
        file.restarts += HANG_WEIGHT if hung else 1
        if file.restarts > MOST_RESTARTS:
            file.close("the file's processes died too often")
        elif not file.unclaimed():
            file.closed = True


def own_frames(stacks: str) -> str:
    """Stacks without the frames of pytest and of Python's start."""
    return "\n".join(line for line in stacks.splitlines() if not FOREIGN.search(line))


def pytest_command(run: Run, arguments: list[str], *, huge: bool = False) -> list[str]:
    """pytest with the check's plugin, over tests of one size."""
    markers = "gpu and huge" if huge else "gpu and not huge"
    options = ["-q", "-p", "gpu_check.pytest_plugin", "-p", "no:cacheprovider", "--tb=short", "-m", markers]
    return [run.python, "-m", "pytest", *options, *run.machine.pytest_arguments(run), *arguments]


def environment(run: Run) -> dict[str, str]:
    """For pytest: plugins that happen to be installed are left out."""
    return {**run.environment(), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def _share(run: Run, files: list[TestFile], jobs: int | None = None) -> None:
    """Runs the files' processes, `jobs` at a time, each time the process that is needed most."""
    lock = threading.Lock()

    def worker(_: int) -> None:
        while True:
            with lock:
                file = max(files, key=TestFile.wants)
                urgent = file.wants() > (0, 0)
                if not urgent and not any(one.running for one in files):
                    return
                name = file.enter() if urgent and run.left() >= run.limits.least else None
            if name is not None:
                file.process(name)
            elif urgent:
                file.close("no time was left")
            else:
                time.sleep(0.2)

    if files:
        workers = run.jobs if jobs is None else jobs
        run.parallel(range(workers), worker, workers)


def _diagnose(run: Run, file: TestFile, identifier: str) -> None:
    """A test that broke its process, once more alone with blocking launches, and once under memcheck."""
    name = f"alone-{claim_path(file.claims, identifier).name}"
    alone = [*pytest_command(run, ["--tb=long", str(run.machine.test_root(run) / identifier)])]
    found = {}
    blocking = {**environment(run), "CUDA_LAUNCH_BLOCKING": "1"}
    if run.left() > run.limits.least:
        done = run.command(f"{name}-blocking", alone, seconds=min(60.0, run.left()), env=blocking)
        found["blocking"] = f"{done.how()}\n{tail(done.text)}"
    program = run.machine.sanitizer()
    if program is not None and run.left() > run.limits.least:
        command = [*invocation(program, "memcheck"), *alone]
        done = run.command(f"{name}-memcheck", command, seconds=min(90.0, run.left()), env={**blocking, **ENVIRONMENT})
        found["memcheck"] = "\n".join(line for line in done.text.splitlines() if line.startswith(PREFIX + " "))[:4000]
    if found:
        run.record(STAGE, "diagnoses", {identifier: found})


def table(run: Run) -> list[str]:
    """One line a file, the slowest tests, and what the broken ones said when run alone."""
    cases = run.cases(STAGE)
    groups: dict[str, list[dict[str, Any]]] = {}
    for case in cases.values():
        groups.setdefault(case["group"], []).append(case)
    lines = []
    for name, found in sorted(groups.items()):
        counts = ", ".join(f"{number} {outcome}" for outcome, number in count(found).items())
        seconds = sum(case["seconds"] for case in found)
        verdict = "FAILED" if any(case["outcome"] == "failed" for case in found) else "ok"
        lines.append(f"{name:44} {verdict:7} {seconds:6.1f} s  {counts}")
    slowest = sorted(cases.items(), key=lambda item: -item[1]["seconds"])[:10]
    lines += ["", "slowest:", *(f"  {case['seconds']:6.1f} s  {name}" for name, case in slowest)]
    for identifier, found in run.found(STAGE, "diagnoses").items():
        lines += ["", f"alone: {identifier}"]
        lines += [f"  {how}: {line}" for how, text in found.items() for line in text.splitlines()[-15:]]
    return lines
