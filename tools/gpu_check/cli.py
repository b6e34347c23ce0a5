"""The options, the order of the stages, and the end: by itself, by a signal, or because the time is over."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from gpu_check import ROOT
from gpu_check.emulated import EmulatedMachine
from gpu_check.machine import Machine, Unfit
from gpu_check.report import Report
from gpu_check.run import Outcome, Run, identifiers_of
from gpu_check.stages import STAGES, Stage
from gpu_check.summary import all_cases, brief

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Without --budget a stage may take so many times its limit.
PATIENCE = 4.0


class Interrupted(BaseException):
    """A signal asked the check to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(
        prog="python tools/gpu_check",
        description="Checks and measures warpform on a machine with a GPU, from a built tree and without a network.",
        epilog="stages: " + ", ".join(f"{stage.number} {stage.name}" for stage in STAGES),
    )
    made.add_argument("--output", type=Path, help="folder for the results (default: $OUT, else build/gpu-check)")
    made.add_argument("--stages", type=_stages, help="numbers or names, with commas between (default: all)")
    made.add_argument("--budget", type=float, help="seconds for all of it; what does not fit is skipped, and listed")
    made.add_argument("--failed", type=Path, help="failed.txt or results.json: run only what failed or was not run")
    made.add_argument("--dry-run", action="store_true", help="without a GPU: every stage, small, with planted faults")
    made.add_argument("--jobs", type=int, help="test processes at once (default: a quarter of the cores, at least 2)")
    return made


def _stages(text: str) -> tuple[Stage, ...]:
    names = {**{str(stage.number): stage for stage in STAGES}, **{stage.name: stage for stage in STAGES}}
    unknown = [name for name in text.split(",") if name not in names]
    if unknown:
        raise argparse.ArgumentTypeError(f"no stage is called {' or '.join(unknown)}")
    chosen = [names[name] for name in text.split(",")]
    return tuple(stage for stage in STAGES if stage in chosen)


def read_failed(path: Path) -> list[str]:
    """The identifiers in failed.txt, or in results.json."""
    text = path.read_text()
    if text.lstrip().startswith("{"):
        cases = all_cases(json.loads(text))
        return [name for name, case in cases.items() if case["outcome"] in ("failed", "not run")]
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]


def main(argv: Sequence[str]) -> NoReturn:
    """Runs the check and exits: 0 where all that ran passed, 1 where something failed, 2 where it could not run."""
    options = parser().parse_args(argv)
    output = options.output or Path(os.environ.get("OUT") or ROOT / "build" / "gpu-check")
    try:
        only = read_failed(options.failed) if options.failed else None
    except OSError as error:
        parser().error(f"--failed: {error}")
    stages = options.stages or STAGES
    if only is not None and options.stages is None:
        stages = tuple(s for s in STAGES if s.number == 1 or identifiers_of(s.name, only) or f"stage::{s.name}" in only)
    machine = EmulatedMachine() if options.dry_run else Machine()
    jobs = options.jobs or max(2, len(os.sched_getaffinity(0)) // 4)
    run = Run(machine, output.resolve(), budget=options.budget, jobs=jobs, only=only, limits=machine.limits)
    status = check(run, stages)
    shutil.rmtree(run.scratch, ignore_errors=True)
    sys.stdout.flush()
    # Threads that wait for a process which nothing ends must not keep this one.
    os._exit(status)


def check(run: Run, stages: Sequence[Stage]) -> int:
    """Runs the stages, whatever happens in them; returns the exit status."""
    report = Report(run)
    before = {number: signal.signal(number, _interrupt) for number in SIGNALS}
    status = 1
    try:
        run.machine.require(run)
        for index, stage in enumerate(stages):
            _stage(run, stage, stages[index + 1 :])
            report.write()
        status = _verdict(run)
    except Unfit as why:
        run.results["verdict"] = f"did not run: {why}"
        status = 2
    except Exception as error:
        run.failed("machine", "stage::machine", traceback.format_exc())
        run.results["verdict"] = f"ERROR: {type(error).__name__}: {error}"
    except Interrupted as interrupted:
        run.live.stop()
        run.results["verdict"] = f"interrupted by {signal.Signals(interrupted.number).name}"
        run.settle(3.0)
        status = 128 + interrupted.number
    finally:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        run.live.stop()
        _name_the_rest(run, stages)
        report.write()
        for number, handler in before.items():
            signal.signal(number, handler)
    if status == 2:
        print(f"gpu-check: {run.results['verdict'].removeprefix('did not run: ')}", file=sys.stderr)
    else:
        print(f"\n{brief(run.snapshot())}\n\nall of it: {run.output / 'summary.txt'}", flush=True)
    return status


def _interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)
    raise Interrupted(number)


def share(run: Run, stage: Stage, later: Sequence[Stage]) -> float:
    """Seconds for a stage: of what is left, a part by its own limit beside the later ones', at least what it needs.

    Without a budget there is no hurry, and the limits only end what hangs.
    """
    if run.budget_left() == float("inf"):
        return PATIENCE * stage.seconds
    part = stage.seconds / (stage.seconds + sum(other.seconds for other in later))
    return min(stage.seconds, max(stage.needs, part * run.budget_left()))


def _stage(run: Run, stage: Stage, later: Sequence[Stage]) -> None:
    begin = run.seconds()
    run.record(stage.name, "number", stage.number)
    if run.budget_left() < stage.needs:
        outcome, status = Outcome(None, f"no time: needs {stage.needs:.0f} s"), "skipped"
        run.not_run(stage.name, f"stage::{stage.name}", outcome.text)
    else:
        run.begin(stage, share(run, stage, later))
        try:
            outcome = stage.function(run)
            status = {True: "ok", False: "FAILED", None: "-"}[outcome.ok]
        except Exception as error:
            outcome, status = Outcome(False, f"{type(error).__name__}: {error}"), "ERROR"
            run.failed(stage.name, f"stage::{stage.name}", traceback.format_exc())
    ended: dict[str, Any] = {"status": status, "text": outcome.text, "seconds": round(run.seconds() - begin, 1)}
    for key, value in ended.items():
        run.record(stage.name, key, value)
    run.say(f"{stage.number} {stage.name}: {status}, {outcome.text}")


def _name_the_rest(run: Run, stages: Sequence[Stage]) -> None:
    """Stages that did not end say so."""
    for stage in stages:
        found = run.results["stages"].setdefault(stage.name, {"number": stage.number})
        if "status" not in found:
            found["status"] = "stopped" if found.get("cases") else "not run"
            run.not_run(stage.name, f"stage::{stage.name}", "the check ended before")


def _verdict(run: Run) -> int:
    stages = run.results["stages"]
    bad = [name for name, stage in stages.items() if stage["status"] in ("FAILED", "ERROR")]
    left = [name for name, stage in stages.items() if stage["status"] in ("skipped", "-")]
    text = f"FAILED in {', '.join(bad)}" if bad else "passed"
    run.results["verdict"] = text + (f"; without a verdict: {', '.join(left)}" if left else "")
    return 1 if bad else 0
