"""Reads what compute-sanitizer prints."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

PREFIX = "========="
# "warpform::varlen_attention_forward<...>(...)+0x1f0": the name, without what follows it.
KERNEL = re.compile(r"\b(warpform::(?:[\w:]|\(anonymous namespace\)::)+)")
# In place of the name, where an error names no kernel of this library.
NO_KERNEL = "(no kernel of warpform)"
INTERNAL = "Internal Sanitizer Error"
# Lines of an error's block that are kept: what happened, where, by which thread, at which address.
BLOCK_LINES = 8
ERRORS = re.compile(r"ERROR SUMMARY: (\d+) errors?")
RACES = re.compile(r"RACECHECK SUMMARY: (\d+) hazards? displayed \((\d+) errors?, (\d+) warnings?\)")
# Lines of its own that are no finding.
CHATTER = ("COMPUTE-SANITIZER", "ERROR SUMMARY", "RACECHECK SUMMARY", "LEAK SUMMARY", "This report")


@dataclass
class Report:
    """`errors` is None where the tool did not come to its summary. `kernels` holds each one's first error."""

    errors: int | None = None
    warnings: int = 0
    kernels: dict[str, str] = field(default_factory=dict)

    @property
    def gave_up(self) -> bool:
        """Tells whether the only error is an internal error of the tool."""
        return set(self.kernels) == {NO_KERNEL} and self.kernels[NO_KERNEL].startswith(INTERNAL)

    def add(self, other: Report) -> None:
        """Takes in the report of one more process."""
        self.errors = other.errors if self.errors is None else self.errors + (other.errors or 0)
        self.warnings += other.warnings
        self.kernels = {**other.kernels, **self.kernels}


def parse(text: str) -> Report:
    """Reads the output of one tool over one process, with the program's own output in between."""
    report = Report()
    block: list[str] = []
    for line in [*text.splitlines(), PREFIX]:
        # Others (pytest for one) draw lines of the same sign.
        if line.rstrip() != PREFIX and not line.startswith(PREFIX + " "):
            continue
        content = line.removeprefix(PREFIX)
        if errors := ERRORS.search(content):
            report.errors = int(errors[1])
        elif races := RACES.search(content):
            report.errors, report.warnings = int(races[2]), int(races[3])
        # A block begins at the left and goes on indented; an empty line ends it.
        begins = bool(content.strip()) and not content.startswith("  ")
        if (begins and not content.startswith(" and ")) or not content.strip():
            _close(block, report)
            block = []
        if content.strip():
            block.append(content.strip())
    return report


def _close(block: list[str], report: Report) -> None:
    if not block or block[0].startswith(CHATTER):
        return
    kernel = KERNEL.search(" ".join(block))
    name = kernel[1] if kernel else NO_KERNEL
    report.kernels.setdefault(name, "\n".join(block[:BLOCK_LINES]))
