"""Processes that keep cores busy while benchmarks run, as those of another program would."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator

# It ends when its standard input does: with the process that started it, however that ends.
LOOP = """
import os, sys, threading
def wait():
    sys.stdin.buffer.read()
    os._exit(0)
threading.Thread(target=wait, daemon=True).start()
while True:
    pass
"""


@contextlib.contextmanager
def busy(count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Runs `count` processes inside, each of which takes all the time of one core that it is given.

    They have the priority of this process. They are ended on the way out, and end by themselves if this process dies.
    """
    started: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(count):
            # Isolated, so that neither the user's site packages nor the folder of bench/ slow its start down.
            started.append(subprocess.Popen([sys.executable, "-I", "-S", "-c", LOOP], stdin=subprocess.PIPE))
        yield started
    finally:
        for process in started:
            process.kill()
        for process in started:
            process.wait()
            if process.stdin is not None:
                process.stdin.close()


def kind(device: str, count: int, dtype: str = "") -> str:
    """The column `kind` of rows: "cpu", and "cpu beside 1 busy" beside `count` such processes.

    dtype: that of the inputs, if it is not the device's own: "cpu in bfloat16".
    """
    return device + (f" in {dtype}" if dtype else "") + (f" beside {count} busy" if count else "")


def is_quiet(kind: str) -> bool:
    """Tells by the column `kind` whether a row was measured beside no such process."""
    return not kind.endswith(" busy")


def in_own_dtype(kind: str) -> bool:
    """Tells by the column `kind` whether a row was measured in the dtype that its device has by default."""
    return " in " not in kind
