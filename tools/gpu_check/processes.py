"""Commands that are stopped for certain: a process group each, output in a file, and no wait without a limit."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

POLL_SECONDS = 0.1
# Between TERM and KILL, and after KILL: a process that is stuck in the driver ends at neither, and is left behind.
TERM_SECONDS = 2.0
KILL_SECONDS = 3.0
# Bytes that are read at most of the beginning and of the end of each log; the middle is rarely worth its room.
EDGE_BYTES = 200_000


@dataclass(frozen=True)
class Done:
    """A command that ended or was stopped. `status` is negative for a signal, None where it never ended or began."""

    status: int | None
    seconds: float
    timed_out: bool
    text: str

    @property
    def ok(self) -> bool:
        return self.status == 0 and not self.timed_out

    def how(self) -> str:
        """Says in words how the process ended."""
        if self.timed_out:
            return f"stopped after {self.seconds:.0f} s"
        if self.status is None:
            return "did not start"
        if self.status < 0:
            try:
                return f"killed by {signal.Signals(-self.status).name}"
            except ValueError:
                return f"killed by signal {-self.status}"
        return f"exit status {self.status}"


class Live:
    """The process groups that run now, so that an interrupted check leaves none behind."""

    def __init__(self) -> None:
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self.stopped = False

    def start(
        self, argv: Sequence[str], log: Path, env: Mapping[str, str], cwd: Path
    ) -> subprocess.Popen[bytes] | None:
        """None once `stop` was called. Raises OSError where the command does not exist."""
        with self._lock, log.open("wb") as file:
            if self.stopped:
                return None
            process = subprocess.Popen(
                list(argv),
                cwd=cwd,
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self._processes.add(process)
        return process

    def forget(self, process: subprocess.Popen[bytes]) -> None:
        with self._lock:
            self._processes.discard(process)

    def stop(self) -> None:
        """Kills every group at once; nothing starts afterwards."""
        self.stopped = True
        with self._lock:
            processes = list(self._processes)
        for process in processes:
            _signal(process, signal.SIGKILL)


def execute(
    live: Live,
    argv: Sequence[str],
    log: Path,
    *,
    seconds: float,
    env: Mapping[str, str],
    cwd: Path,
    stalled: Callable[[], bool] | None = None,
) -> Done:
    """Runs a command, its output in `log`; stops it and its children after `seconds`, or where `stalled()` holds."""
    begin = time.monotonic()
    try:
        process = live.start(argv, log, env, cwd)
    except OSError as error:
        return Done(None, 0.0, False, f"{argv[0]}: {error}")
    if process is None:
        return Done(None, 0.0, True, "the check was interrupted")
    timed_out = False
    try:
        while process.poll() is None:
            if time.monotonic() - begin > seconds or (stalled is not None and stalled()):
                timed_out = True
                _end(process)
                break
            time.sleep(POLL_SECONDS)
    finally:
        # Children of a command that ended by itself may run on; they belong to its group.
        _signal(process, signal.SIGKILL)
        live.forget(process)
    return Done(process.poll(), time.monotonic() - begin, timed_out, edges(log))


def _end(process: subprocess.Popen[bytes]) -> None:
    for number, seconds in ((signal.SIGTERM, TERM_SECONDS), (signal.SIGKILL, KILL_SECONDS)):
        _signal(process, number)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if process.poll() is not None:
                return
            time.sleep(POLL_SECONDS / 2)


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def edges(path: Path, size: int = EDGE_BYTES) -> str:
    """The text of a file, without its middle where it is longer than twice `size` bytes; "" where there is none."""
    try:
        with path.open("rb") as file:
            length = os.fstat(file.fileno()).st_size
            if length <= 2 * size:
                return file.read().decode(errors="replace")
            head = file.read(size)
            file.seek(length - size)
            tail = file.read(size)
    except OSError:
        return ""
    left_out = f"\n[... {length - 2 * size} bytes left out ...]\n"
    return head.decode(errors="replace") + left_out + tail.decode(errors="replace")
