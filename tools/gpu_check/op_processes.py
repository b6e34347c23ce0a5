"""Ops of the self-test in as many processes as it takes: after a hang or a crash another one goes on with the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_check.events import Follower
from gpu_check.faults import POISONED
from gpu_check.processes import Done, edges
from gpu_check.run import Run

# Lines of a process's output, and of its stacks, that a failure carries.
LINES = 30


class OpProcesses:
    """Runs ops in children (smoke.py). Subclasses say what becomes of what they find."""

    dtypes: Sequence[str] = ()

    def __init__(self, run: Run, name: str, ops: Sequence[str]) -> None:
        self.run = run
        self.name = name
        self.remaining = list(ops)
        self.seconds = run.limits.smoke_op
        # The op and dtype that the process runs now.
        self._current: tuple[str, str] | None = None
        self._finished = False

    # ---- for subclasses ----

    def wrap(self, command: list[str]) -> list[str]:
        """The command line that is started instead."""
        return command

    def environment(self) -> Mapping[str, str]:
        """For the children."""
        return {**self.run.environment(), "OMP_NUM_THREADS": "2"}

    def row(self, row: dict[str, Any]) -> None:
        """An op's verdict in one dtype and direction."""

    def ended(self, done: Done) -> None:
        """A process ended; its verdicts were handed on before."""

    def lost(self, op: str, dtype: str, text: str) -> None:
        """A process hung or crashed in this op."""

    def broken(self, text: str) -> None:
        """A process failed before its first op or after its last."""

    def unreached(self, op: str) -> None:
        """No time was left for this op."""

    # ---- the work ----

    def run_all(self) -> None:
        attempt = 0
        while self.remaining:
            attempt += 1
            self._current, self._finished = None, False
            self._process(f"{self.name}-{attempt}")

    def _process(self, name: str) -> None:
        run = self.run
        report, stacks = run.scratch / f"{name}.jsonl", run.scratch / f"{name}.stacks"
        follower = Follower(report, self._event, startup=run.limits.startup, step=self.seconds)
        command = run.machine.smoke_command(
            run, self.remaining, report, stacks=stacks, seconds=self.seconds, dtypes=self.dtypes
        )
        limit = run.left()
        done = run.command(name, self.wrap(command), seconds=limit, env=self.environment(), stalled=follower.stalled)
        follower.read()
        self.ended(done)
        run.say(f"{name}: {done.how()}")
        self._go_on(done, stacks)

    def _go_on(self, done: Done, stacks: Path) -> None:
        """Judges how the process ended, and leaves in `remaining` what the next one is for."""
        remaining, self.remaining = self.remaining, []
        if self._finished:
            if done.status and self.run.left() > 0:
                self.broken(f"after its last op: {done.how()}\n{tail(done.text)}")
        elif self.run.left() <= 0:
            first = self._current[0] if self._current else remaining[0]
            for op in remaining[remaining.index(first) :]:
                self.unreached(op)
        elif self._current is None:
            self.broken(f"before its first op: {done.how()}\n{tail(done.text)}")
        else:
            op, dtype = self._current
            if done.status != POISONED:
                where = edges(stacks)
                self.lost(op, dtype, f"{ending(done, where)} in {op}, {dtype}\n{tail(where)}\n{tail(done.text)}")
            self.remaining = remaining[remaining.index(op) + 1 :]

    def _event(self, row: dict[str, Any]) -> None:
        if row.get("done"):
            self._finished = True
        elif row.get("starting"):
            self._current = (row["op"], row["dtype"])
        elif "op" in row:
            self.row(row)


def ending(done: Done, stacks: str) -> str:
    """Says how a process ended; its watchdog writes to `stacks`."""
    return "hung" if "Timeout (" in stacks or done.timed_out else done.how()


def tail(text: str) -> str:
    """The last lines of a text."""
    return "\n".join(text.strip().splitlines()[-LINES:])


def chosen(
    families: Mapping[str, tuple[str, ...]], prefix: str, wanted: Sequence[str] | None
) -> dict[str, tuple[str, ...]]:
    """The ops that `wanted` names as PREFIX::FAMILY or PREFIX::FAMILY::OP and more; all where it is None."""
    if wanted is None:
        return dict(families)
    parts = [name.removeprefix(f"{prefix}::").split("::") for name in wanted if name.startswith(f"{prefix}::")]
    found = {}
    for family, ops in families.items():
        of_family = [part for part in parts if part[0] == family]
        whole = any(len(part) == 1 for part in of_family)
        kept = tuple(op for op in ops if whole or any(part[1] == op for part in of_family))
        if kept:
            found[family] = kept
    return found
