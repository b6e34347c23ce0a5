"""The command line: `python -m warpform COMMAND`. Each command is a module here, imported when it is called."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """`module` has main(argv) -> exit status."""

    module: str
    help: str


COMMANDS = {
    "doctor": Command("doctor", "what this machine, this torch and this build can do, and a self-test of every op"),
    "demo": Command("demo", "encode real text with a BERT, padded and padding-free, and compare"),
    "bench": Command("bench", "benchmarks of the ops and models, from a checkout"),
    "ring-model": Command(
        "ring_model.command", "time, overlap and memory of ring attention over N ranks, modelled from measured numbers"
    ),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m warpform",
        usage="python -m warpform COMMAND [options]",
        description="COMMAND --help lists the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="commands:\n" + "\n".join(f"  {name:12} {command.help}" for name, command in COMMANDS.items()),
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of: " + ", ".join(COMMANDS))
    return parser


def main(argv: Sequence[str]) -> int:
    """Runs a command and returns its exit status; 2 where none was named.

    Raises SystemExit, as argparse does, for an unknown command and after --help.
    """
    parser = _parser()
    if not argv:
        parser.print_help()
        return 2
    command = COMMANDS[parser.parse_args(argv[:1]).command]
    module = importlib.import_module(f".{command.module}", __name__)
    status: int = module.main(list(argv[1:]))
    return status
