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
