"""Prints pytest's options for tests in several processes: nothing where pytest-xdist is missing or one core is all.

    python -m pytest $(python tools/test_workers.py)

More than four workers would repeat imports and shared fixtures without being much quicker.
"""

from __future__ import annotations

import importlib.util
import os

MOST = 4


def options(cores: int, installed: bool) -> list[str]:
    workers = min(cores, MOST)
    return ["-n", str(workers)] if installed and workers > 1 else []


if __name__ == "__main__":
    print(*options(len(os.sched_getaffinity(0)), importlib.util.find_spec("xdist") is not None))
