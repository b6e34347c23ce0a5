"""The stages in their order."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from gpu_check.run import Outcome, Run


@dataclass(frozen=True)
class Stage:
    """`seconds` is its limit; with less than `needs` seconds left it is skipped."""

    number: int
    name: str
    seconds: float
    function: Callable[[Run], Outcome]
    needs: float


def _from(module: str, function: str) -> Callable[[Run], Outcome]:
    """The function, imported when the stage runs, so that a broken module ends one stage only."""

    def call(run: Run) -> Outcome:
        try:
            found = importlib.import_module(f"gpu_check.{module}")
        except ModuleNotFoundError as error:
            if error.name != f"gpu_check.{module}":
                raise
            return Outcome(None, "not available")
        outcome: Outcome = getattr(found, function)(run)
        return outcome

    return call


STAGES = (
    Stage(1, "machine", 60, _from("facts", "machine"), needs=8),
    Stage(2, "smoke", 120, _from("smoke_stage", "smoke"), needs=20),
    Stage(3, "sanitizer", 150, _from("sanitizer", "sanitizer"), needs=40),
    Stage(4, "tests", 300, _from("suites", "suites"), needs=60),
    Stage(5, "own_rows", 150, _from("measure", "own_rows"), needs=20),
    Stage(6, "peers", 150, _from("measure", "peers"), needs=20),
    Stage(7, "profile", 150, _from("measure", "profile"), needs=30),
    Stage(8, "compiled_peers", 240, _from("measure", "compiled_peers"), needs=60),
)
