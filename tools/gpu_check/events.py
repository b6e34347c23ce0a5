"""Events of child processes: one JSON object a line, written at once, so that a process which dies loses none."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Writer:
    """Appends events to a file."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, **event: Any) -> None:
        os.write(self._file, (json.dumps(event, default=str) + "\n").encode())


class Reader:
    """Reads a file of events that is still being written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rest = b""
        self._offset = 0

    def read(self) -> list[dict[str, Any]]:
        """The events since the last call. A line that was not finished waits for the next call."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                new = file.read()
        except OSError:
            return []
        self._offset += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        return [json.loads(line) for line in lines if line.strip()]


class Follower:
    """Hands on a child's events while it runs, and knows when the child has been silent for too long.

    The child ends itself where one step takes too long; this is for one that cannot even do that.
    """

    GRACE = 15.0

    def __init__(self, path: Path, each: Callable[[dict[str, Any]], None], *, startup: float, step: float) -> None:
        self._reader = Reader(path)
        self._each = each
        self._limit = startup
        self._step = step
        self._last = time.monotonic()

    def read(self) -> None:
        """Hands on what is new."""
        for event in self._reader.read():
            self._last, self._limit = time.monotonic(), self._step + self.GRACE
            self._each(event)

    def stalled(self) -> bool:
        """Reads, and says whether the child has been silent for too long."""
        self.read()
        return time.monotonic() - self._last > self._limit
