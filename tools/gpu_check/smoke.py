"""The child of the smoke stage: runs ops of the self-test and appends what they tell to a file, row by row.

A row is written before an op begins and after it ends, so that a hang or a crash names its op. After an error that
leaves the GPU unusable the process ends: the ops that follow need another one.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path
from typing import Any

from gpu_check.events import Writer
from gpu_check.faults import POISONED, Watchdog, context_is_dead, is_sticky


def library(name: str, path: str | None) -> Any:
    """torch.ops.NAME, after loading the file at `path`; None for the package's own ops."""
    if path is None:
        return None
    import torch

    torch.ops.load_library(path)
    return getattr(torch.ops, name)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m gpu_check.smoke", description=__doc__)
    parser.add_argument("names", nargs="+", help="ops")
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--stacks", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=40.0, help="that one row may take")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", action="append", default=[], help="default: all that an op has")
    parser.add_argument("--library", nargs=2, metavar=("NAME", "PATH"), help="instead of the package's own")
    parser.add_argument("--path", help="a folder to import from, too")
    parser.add_argument("--module", default="warpform.cli.self_test", help="where families() and run() are")
    options = parser.parse_args(argv)
    if options.path:
        sys.path.append(options.path)
    report = Writer(options.report)
    with options.stacks.open("w") as stacks:
        watchdog = Watchdog(options.seconds, stacks)
        self_test = importlib.import_module(options.module)
        settings: dict[str, Any] = {"device": options.device}
        if options.library:
            settings["library"] = library(*options.library)
        if options.dtype:
            settings["dtypes"] = tuple(options.dtype)
        watchdog.feed()
        for row in self_test.run(tuple(options.names), **settings):
            watchdog.feed()
            poisoned = row.get("ok") is False and (is_sticky(str(row.get("problem"))) or context_is_dead())
            report.write(**row, poisoned=poisoned)
            if poisoned:
                # Python's own exit would call the GPU again, and might not return.
                os._exit(POISONED)
        watchdog.rest()
    report.write(done=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
