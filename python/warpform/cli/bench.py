"""`python -m warpform bench`: the benchmarks of a checkout, with a progress bar."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[3] / "bench"
HELP = """usage: python -m warpform bench [options of pytest and of the benchmarks]

  --tiny            every benchmark once, at a tiny size; nothing is recorded
  --everything      all sizes, not only those of the default run
  --device DEVICE   cpu or cuda
  --dtype DTYPE     of the inputs, bfloat16 on a GPU and float32 on a CPU by default; reports set other rows apart
  --budget SECONDS  what the run may take, some 6 minutes by default; 0 is no limit
  --results FOLDER  where rows are appended, bench/results by default; --no-results appends none
  --busy [N]        beside N processes, 1 by default, that keep a core busy each; reports set such rows apart
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
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    # pytest-benchmark times nothing in a worker of pytest-xdist, and a test in one may have called this.
    environment.pop("PYTEST_XDIST_WORKER", None)
    words = [_absolute(word, before) for word, before in zip(arguments, ["", *arguments], strict=False)]
    command = [sys.executable, "-m", "pytest", "--progress", ".", *words]
    try:
        return subprocess.call(command, cwd=FOLDER, env=environment)
    except KeyboardInterrupt:
        print("warpform: interrupted; rows of the groups that were finished are kept", file=sys.stderr)
        return 130


def _absolute(word: str, before: str) -> str:
    # Paths given by the caller are relative to where the caller is.
    if before == "--results":
        return str(Path(word).absolute())
    name, sign, value = word.partition("=")
    return f"{name}={Path(value).absolute()}" if sign and name == "--results" else word
