"""What children tell: one JSON object a line, written at once, so that a process which dies has lost nothing."""

from __future__ import annotations

import json
import os
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
