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
from gpu_check.summary import WIDTH, all_cases, headline, summary

FILES = ("results.json", "summary.txt", "junit.xml", "failed.txt", "rows.csv", "logs.tar.gz")
# Between two writings while a stage runs; packing the logs takes longer than all else.
SECONDS = 3.0
LOG_SECONDS = 15.0
LOG_BYTES = 15_000_000
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
