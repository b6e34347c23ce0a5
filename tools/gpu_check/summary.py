"""The texts for people: summary.txt, and what is printed last."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from gpu_check.run import count

# Lines of a failure that are shown from its beginning and from its end, and characters of a line.
LINES, WIDTH = 12, 200
# Facts that are for programs only.
LONG = ("families",)
# Kinds of failures that are printed last.
MOST = 40

Case = Mapping[str, Any]


def all_cases(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The cases of all stages by identifier."""
    return {name: case for stage in results["stages"].values() for name, case in stage.get("cases", {}).items()}


def summary(results: Mapping[str, Any]) -> str:
    """The verdict, the stages, each stage's own lines, the failures, and what was not run."""
    lines = overview(results)
    for name, stage in results["stages"].items():
        if stage.get("summary"):
            lines += ["", f"== {name} ==", *stage["summary"]]
    cases = all_cases(results)
    bad = {name: case for name, case in cases.items() if case["outcome"] == "failed"}
    if bad:
        lines += ["", f"== {len(bad)} failed =="]
        for (first, case), *others in alike(bad):
            lines += [first, *(f"    {line[:WIDTH]}" for line in excerpt(case["text"]))]
            lines += [f"{name}: {headline(other['text'])[:WIDTH]}" for name, other in others]
    left = {name: case for name, case in cases.items() if case["outcome"] == "not run"}
    if left:
        lines += [
            "",
            f"== {len(left)} not run ==",
            *(f"{name}: {headline(case['text'])}" for name, case in left.items()),
        ]
    return "\n".join(lines) + "\n"


def brief(results: Mapping[str, Any]) -> str:
    """The verdict, the stages, and one line for each kind of failure."""
    bad = {name: case for name, case in all_cases(results).items() if case["outcome"] == "failed"}
    lines = []
    for (name, case), *others in alike(bad):
        more = f" (and {len(others)} like it)" if others else ""
        lines.append(f"FAILED {name}: {headline(case['text'])[:WIDTH]}{more}")
    rest = [f"... and {len(lines) - MOST} kinds more"] if len(lines) > MOST else []
    return "\n".join([*overview(results), *lines[:MOST], *rest])


def overview(results: Mapping[str, Any]) -> list[str]:
    """The verdict, the machine, and one line a stage."""
    counts = ", ".join(f"{number} {outcome}" for outcome, number in count(all_cases(results).values()).items())
    lines = [f"gpu-check: {results['verdict']}; {counts or 'nothing ran'}; {results['seconds']:.0f} s"]
    lines += [*facts(results["facts"]), "", f"{'stage':18} {'verdict':10} {'seconds':>7}"]
    for name, stage in results["stages"].items():
        seconds = f"{stage.get('seconds', 0):7.0f}"
        lines.append(f"{name:18} {stage.get('status', 'running'):10} {seconds}  {stage.get('text', '')}".rstrip())
    return lines


def alike(cases: Mapping[str, Case]) -> Iterable[list[tuple[str, Case]]]:
    """Failures of one group that say the same but for numbers are shown together, in the order of their first."""
    kinds: dict[tuple[str, str], list[tuple[str, Case]]] = {}
    for name, case in cases.items():
        kind = re.sub(r"\d[\w.+-]*", "#", headline(case["text"]))
        kinds.setdefault((case["group"], kind), []).append((name, case))
    return kinds.values()


def headline(text: str) -> str:
    """The line of a failure that says most: pytest's first error line, or the first of all."""
    lines = text.strip().splitlines() or [""]
    return next((line.removeprefix("E").strip() for line in lines if line.startswith("E  ")), lines[0])


def excerpt(text: str) -> list[str]:
    """The first lines of a failure and its last ones: what was done, and the error."""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines if len(lines) <= 2 * LINES else [*lines[:LINES], "...", *lines[-LINES:]]


def facts(found: Mapping[str, Any]) -> list[str]:
    """The machine in a few lines."""
    plain = {name: value for name, value in found.items() if isinstance(value, (str, int, float, bool))}
    parts = {
        "": plain,
        **{name: value for name, value in found.items() if isinstance(value, dict) and name not in LONG},
    }
    return [
        (f"{name}: " if name else "") + ", ".join(f"{key} {_short(value)}" for key, value in values.items())
        for name, values in parts.items()
        if values
    ]


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
