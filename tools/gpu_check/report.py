"""The output folder: a handful of flat files that are complete after every stage, and every few seconds in between.

results.json  everything that is known, for programs (tools/adopt_gpu_results.py is one)
summary.txt   the one text to read
junit.xml     every case of every stage
failed.txt    what failed, then what was not run: the input of --failed
rows.csv      benchmark rows, written by their own stages
logs.tar.gz   the raw output of every command
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpu_check.processes import edges
from gpu_check.run import Run, count

FILES = ("results.json", "summary.txt", "junit.xml", "failed.txt", "rows.csv", "logs.tar.gz")
# Between two writings while a stage runs; packing the logs takes longer than all else.
SECONDS = 3.0
LOG_SECONDS = 15.0
LOG_BYTES = 15_000_000
# Of a failure in the summary: lines, and characters of a line.
LINES, WIDTH = 12, 200
# Facts that are for programs only.
LONG = ("families",)
# Failures that are printed at the end of the check.
MOST = 40
# Characters that XML cannot hold.
_UNPRINTABLE = {number: "?" for number in range(32) if chr(number) not in "\t\n\r"}


class Report:
    """Writes what a run has found."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._lock = threading.Lock()
        self._written = self._packed = 0.0
        run.output.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            (run.output / name).unlink(missing_ok=True)
        run.changed = self.changed

    def changed(self) -> None:
        """Writes, unless that was done within the last seconds or is being done now."""
        if time.monotonic() - self._written < SECONDS or not self._lock.acquire(blocking=False):
            return
        try:
            self._write(logs=time.monotonic() - self._packed > LOG_SECONDS)
        finally:
            self._lock.release()

    def write(self) -> None:
        """Writes everything now."""
        with self._lock:
            self._write(logs=True)

    def _write(self, *, logs: bool) -> None:
        results = self.run.snapshot()
        self._put("results.json", json.dumps(results, indent=1, default=str).encode())
        self._put("summary.txt", summary(results).encode())
        self._put("junit.xml", junit(results))
        self._put("failed.txt", failed(results).encode())
        if logs:
            self._put("logs.tar.gz", pack(self.run.logs))
            self._packed = time.monotonic()
        self._written = time.monotonic()

    def _put(self, name: str, content: bytes) -> None:
        """A reader sees the old file or the new one, never a part of one."""
        temporary = self.run.output / f".{name}.tmp"
        temporary.write_bytes(content)
        os.replace(temporary, self.run.output / name)


def pack(folder: Path) -> bytes:
    """All logs as one archive of less than LOG_BYTES; long ones lose their middle."""
    size = 200_000
    while True:
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w:gz", compresslevel=4) as tar:
            for path in sorted(path for path in folder.iterdir() if path.is_file()):
                content = edges(path, size).encode()
                entry = tarfile.TarInfo(path.name)
                entry.size, entry.mtime = len(content), int(path.stat().st_mtime)
                tar.addfile(entry, io.BytesIO(content))
        if archive.tell() < LOG_BYTES or size < 100:
            return archive.getvalue()
        size //= 2


def all_cases(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The cases of all stages by identifier."""
    return {name: case for stage in results["stages"].values() for name, case in stage.get("cases", {}).items()}


def failed(results: Mapping[str, Any]) -> str:
    """One identifier a line; lines that begin with # are remarks."""
    cases = all_cases(results)
    bad = [name for name, case in cases.items() if case["outcome"] == "failed"]
    left = [name for name, case in cases.items() if case["outcome"] == "not run"]
    lines = [*bad, *(["# not run", *left] if left else [])]
    return "".join(f"{line}\n" for line in lines)


def junit(results: Mapping[str, Any]) -> bytes:
    """One suite a stage; its test cases are named after their identifiers."""
    root = ET.Element("testsuites")
    for stage, found in results["stages"].items():
        cases = found.get("cases", {})
        counts = count(cases.values())
        suite = ET.SubElement(root, "testsuite", name=stage, tests=str(len(cases)), errors="0")
        suite.set("failures", str(counts.get("failed", 0)))
        suite.set("skipped", str(counts.get("skipped", 0) + counts.get("not run", 0)))
        suite.set("time", str(found.get("seconds", 0)))
        for name, case in cases.items():
            element = ET.SubElement(suite, "testcase", classname=case["group"], name=name, time=str(case["seconds"]))
            text = case["text"].translate(_UNPRINTABLE)
            if case["outcome"] == "failed":
                ET.SubElement(element, "failure", message=headline(text)[:WIDTH]).text = text
            elif case["outcome"] != "passed":
                ET.SubElement(element, "skipped", message=f"{case['outcome']}: {text}"[:WIDTH])
    return b'<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(root)


def summary(results: Mapping[str, Any]) -> str:
    """For people: the verdict, the stages, each stage's own lines, the failures, and what was not run."""
    cases = all_cases(results)
    counts = ", ".join(f"{number} {outcome}" for outcome, number in count(cases.values()).items()) or "nothing ran"
    lines = [f"gpu-check: {results['verdict']}; {counts}; {results['seconds']:.0f} s", *facts(results["facts"]), ""]
    lines.append(f"{'stage':18} {'verdict':10} {'seconds':>7}")
    for name, stage in results["stages"].items():
        seconds = f"{stage.get('seconds', 0):7.0f}"
        lines.append(f"{name:18} {stage.get('status', 'running'):10} {seconds}  {stage.get('text', '')}")
    for name, stage in results["stages"].items():
        if stage.get("summary"):
            lines += ["", f"== {name} ==", *stage["summary"]]
    bad = {name: case for name, case in cases.items() if case["outcome"] == "failed"}
    if bad:
        lines += ["", f"== {len(bad)} failed =="]
        for name, case in bad.items():
            lines += [name, *(f"    {line[:WIDTH]}" for line in excerpt(case["text"]))]
    left = {name: case for name, case in cases.items() if case["outcome"] == "not run"}
    if left:
        lines += ["", f"== {len(left)} not run =="]
        lines += [f"{name}: {case['text'].partition(chr(10))[0]}" for name, case in left.items()]
    return "\n".join(lines) + "\n"


def brief(results: Mapping[str, Any]) -> str:
    """What is printed last: the summary without the stages' own lines, and one line a failure."""
    text = summary({**results, "stages": {name: {**stage, "summary": []} for name, stage in results["stages"].items()}})
    lines = text.partition("\n== ")[0].splitlines()
    bad = {name: case for name, case in all_cases(results).items() if case["outcome"] == "failed"}
    lines += [f"FAILED {name}: {headline(case['text'])[:WIDTH]}" for name, case in bad.items()][:MOST]
    return "\n".join([*lines, *([f"... and {len(bad) - MOST} more"] if len(bad) > MOST else [])])


def headline(text: str) -> str:
    """The line of a failure that says most: pytest's first error line, or the first of all."""
    lines = text.strip().splitlines() or [""]
    return next((line.removeprefix("E").strip() for line in lines if line.startswith("E  ")), lines[0])


def excerpt(text: str) -> list[str]:
    """The first lines of a failure and its last ones: what was done, and the error."""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines if len(lines) <= 2 * LINES else [*lines[:LINES], "...", *lines[-LINES:]]


def facts(found: Mapping[str, Any]) -> list[str]:
    """The machine in a few lines."""
    plain = {name: value for name, value in found.items() if isinstance(value, (str, int, float, bool))}
    parts = {
        "": plain,
        **{name: value for name, value in found.items() if isinstance(value, dict) and name not in LONG},
    }
    return [
        (f"{name}: " if name else "") + ", ".join(f"{key} {_short(value)}" for key, value in values.items())
        for name, values in parts.items()
        if values
    ]


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
