"""`make gpu-check`: on a machine with a GPU, from a built tree and without a network.

Runs the gpu tests, doctor's self-test of every op (again under compute-sanitizer where that tool exists), and the
benchmarks; appends the record to docs/hardware.md; prints a short table last and exits 0 only if
everything passed.
WARPFORM_COMMIT names the commit where git cannot.
"""

from __future__ import annotations

import datetime
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "docs" / "hardware.md"
NOTHING_YET = "Nothing has run on hardware so far."
HEADER = (
    "| date | commit | GPU | driver | torch | gpu tests: passed / failed / skipped | compute-sanitizer | benchmarks |\n"
    "|---|---|---|---|---|---|---|---|\n"
)
SANITIZER_TOOLS = ("memcheck", "racecheck", "synccheck")


@dataclass(frozen=True)
class Result:
    """One part of the check. `ok` is None where the part does not apply here."""

    name: str
    ok: bool | None
    text: str


def fail(sentence: str) -> NoReturn:
    raise SystemExit(f"gpu-check: {sentence}")


def environment() -> dict[str, str]:
    # The package folder with its library is all that is needed; nothing has to be installed.
    path = os.pathsep.join(filter(None, [str(ROOT / "python"), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"}


def output(*command: str) -> str:
    """What a command prints, "" where it fails."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def require_gpu() -> dict[str, str]:
    """Facts about the GPU; ends with one sentence where something is missing."""
    try:
        import torch
    except Exception as error:
        fail(f"importing torch failed in {sys.executable} ({error}); choose another: make gpu-check PYTHON=...")
    if not torch.cuda.is_available():
        seen = "is built without CUDA" if torch.version.cuda is None else "sees no GPU"
        fail(f"needs a machine with a CUDA GPU; torch {torch.__version__} of {sys.executable} {seen}.")
    try:
        import pytest  # noqa: F401
    except ImportError:
        fail(f"pytest is missing in {sys.executable}; install it, or choose another Python: make gpu-check PYTHON=...")
    sys.path.insert(0, str(ROOT / "python"))
    from warpform import _library

    if not _library.loaded():
        fail(f"the library does not load ({_library.load_error()}).")
    if not _library.build_info().get("cuda"):
        fail("the library was built without CUDA kernels; build it where nvcc is (make build).")
    driver = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    return {
        "gpu": torch.cuda.get_device_name(0),
        "driver": driver[0] if driver else "unknown",
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def commit() -> str:
    named = os.environ.get("WARPFORM_COMMIT")
    if named:
        return named
    head = output("git", "rev-parse", "--short=12", "HEAD")
    # The record itself may be uncommitted from an earlier run.
    dirty = [line for line in output("git", "status", "--porcelain").splitlines() if "docs/hardware.md" not in line]
    return (head + (" (changed)" if dirty else "")) if head else "unknown"


def pytest_run(*arguments: str) -> tuple[int, dict[str, int]]:
    """Runs pytest, showing its output; returns its status and the counts of its report."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *arguments]
        status = subprocess.run(command, cwd=ROOT, env=environment()).returncode
        counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
        if report.exists():
            for suite in ET.parse(report).getroot().iter("testsuite"):
                for key in counts:
                    counts[key] += int(suite.get(key, 0))
    counts["failed"] = counts["failures"] + counts["errors"]
    counts["passed"] = counts["tests"] - counts["failed"] - counts["skipped"]
    return status, counts


def gpu_tests() -> Result:
    status, counts = pytest_run("tests", "-m", "gpu")
    text = f"{counts['passed']} / {counts['failed']} / {counts['skipped']}"
    return Result("gpu tests", status == 0 and counts["passed"] > 0, text)


def self_test() -> Result:
    status = subprocess.run([sys.executable, "-m", "warpform", "doctor"], cwd=ROOT, env=environment()).returncode
    return Result("doctor", status == 0, "passed" if status == 0 else "failed")


def find_sanitizer() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [os.path.join(home, part) for home in homes if home for part in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def sanitizer() -> Result:
    """memcheck, racecheck and synccheck over the self-test: every op, forward and backward, at small sizes."""
    tool = find_sanitizer()
    if tool is None:
        return Result("compute-sanitizer", None, "not installed")
    # Without a caching allocator every tensor is an allocation of its own, and memcheck sees reads past its end.
    env = {**environment(), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    failed = []
    for name in SANITIZER_TOOLS:
        print(f"compute-sanitizer {name}", flush=True)
        command = [tool, "--tool", name, "--error-exitcode", "9", sys.executable, "-m", "warpform", "doctor"]
        done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            failed.append(name)
            print("\n".join(done.stdout.splitlines()[-60:]), flush=True)
    return Result(
        "compute-sanitizer", not failed, f"failed: {', '.join(failed)}" if failed else ", ".join(SANITIZER_TOOLS)
    )


def benchmarks() -> Result:
    """bench/ within some 6 minutes, so that tests and benchmarks fit ten; its rows are appended to bench/results."""
    if not (ROOT / "bench" / "harness.py").exists():
        return Result("benchmarks", None, "none yet")
    if importlib.util.find_spec("pytest_benchmark") is None:
        return Result("benchmarks", None, "pytest-benchmark is not installed")
    status, counts = pytest_run("bench", "--budget", "340")
    text = f"{counts['passed']} run, {counts['failed']} failed, {counts['skipped']} missing"
    return Result("benchmarks", status == 0 and counts["passed"] > 0, text)


def record(facts: dict[str, str], revision: str, results: dict[str, Result]) -> None:
    """Appends one row; the first one replaces the sentence that there is none."""
    text = RECORD.read_text()
    if NOTHING_YET in text:
        text = text.replace(NOTHING_YET, HEADER.rstrip("\n"))
    row = [
        datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        revision,
        facts["gpu"],
        facts["driver"],
        facts["torch"],
        *(results[name].text for name in ("gpu tests", "compute-sanitizer", "benchmarks")),
    ]
    RECORD.write_text(text.rstrip("\n") + "\n| " + " | ".join(row) + " |\n")


def main() -> int:
    facts = require_gpu()
    revision = commit()
    found = [gpu_tests(), self_test(), sanitizer(), benchmarks()]
    record(facts, revision, {result.name: result for result in found})
    print(f"\n{facts['gpu']}, driver {facts['driver']}, torch {facts['torch']}, commit {revision}")
    for result in found:
        print(f"{result.name:18} {'-' if result.ok is None else 'ok' if result.ok else 'FAILED':7} {result.text}")
    return 0 if all(result.ok is not False for result in found) else 1


if __name__ == "__main__":
    sys.exit(main())
