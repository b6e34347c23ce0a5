"""`python -m warpform bench`: the benchmarks of a checkout, with a progress bar."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent.parent / "bench"
OUTCOME = re.compile(r"^(\S+::.+?) (PASSED|FAILED|SKIPPED|ERROR)\b")
COLLECTED = re.compile(r"^collected (\d+) items?(?:.* (\d+) selected)?")
HELP = """usage: python -m warpform bench [options of pytest and of the benchmarks]

  --tiny            every benchmark once, at a tiny size; nothing is recorded
  --everything      all sizes, not only those of the default run
  --device DEVICE   cpu or cuda
  --budget SECONDS  what the run may take, some 6 minutes by default; 0 is no limit
  --results FOLDER  where rows are appended, bench/results by default; --no-results appends none
  -k EXPRESSION     only benchmarks whose names match, for instance -k "attention and backward"
"""


def main(arguments: list[str]) -> int:
    """Runs bench/ under pytest; its exit status, or 2 where there is no checkout or no pytest-benchmark."""
    if any(argument in ("-h", "--help") for argument in arguments):
        print(HELP, end="")
        return 0
    if not (FOLDER / "harness.py").is_file():
        print(
            "warpform: the benchmarks are part of the repository and this is an installed package; run them from a "
            "checkout",
            file=sys.stderr,
        )
        return 2
    missing = [name for name in ("pytest", "pytest_benchmark") if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"warpform: the benchmarks need {' and '.join(missing)}; make bench installs what is needed",
            file=sys.stderr,
        )
        return 2
    package = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "pytest", "-v", "--color=no", ".", *arguments]
    # Paths given by the caller are relative to where the caller is.
    command = [_absolute(word, before) for word, before in zip(command, ["", *command], strict=False)]
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    if importlib.util.find_spec("rich") is None:
        return subprocess.call(command, cwd=FOLDER, env=environment)
    process = subprocess.Popen(
        command, cwd=FOLDER, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        rest = _follow(process)
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        print("warpform: interrupted; rows of the groups that were finished are kept", file=sys.stderr)
        return 130
    status = process.wait()
    start = next((i for i, line in enumerate(rest) if "warpform benchmarks" in line), 0)
    # Of a run that went well only its summary is shown, of another everything that pytest said.
    print("\n".join(rest[start:] if status == 0 else rest))
    return status


def _absolute(word: str, before: str) -> str:
    if before == "--results":
        return str(Path(word).absolute())
    name, sign, value = word.partition("=")
    return f"{name}={Path(value).absolute()}" if sign and name == "--results" else word


def _follow(process: subprocess.Popen[str]) -> list[str]:
    """Drives the bar from pytest's lines, one a benchmark, and returns the other lines."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    rest: list[str] = []
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    assert process.stdout is not None
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("collecting", total=None)
        for raw in process.stdout:
            line = raw.rstrip("\n")
            outcome = OUTCOME.match(line)
            if outcome is None:
                rest.append(line)
                collected = COLLECTED.match(line)
                if collected is not None:
                    progress.update(task, total=int(collected[2] or collected[1]), description="starting")
                continue
            name = outcome[1].partition("[")[2].rstrip("]")
            progress.update(task, advance=1, description=name[:70])
            if outcome[2] in ("FAILED", "ERROR"):
                progress.console.print(f"{outcome[2]}: {outcome[1]}", markup=False, highlight=False)
    return rest
