"""The numbers of README.md, written between its markers from committed results, so that none is typed by hand."""

from __future__ import annotations

import html
import json
import os
import statistics
import textwrap
from pathlib import Path
from typing import Any

Row = dict[str, str]
Kernels = dict[tuple[str, str, str], dict[str, dict[str, Row]]]

# The plots that README shows; the others are linked to.
SHOWN = ("attention", "models")


def quotable(row: Row) -> bool:
    """Tells whether a row names the code that it belongs to."""
    return row["commit"] not in ("", "unknown") and not row["commit"].endswith("(changed)")


def replace(text: str, name: str, lines: list[str]) -> str:
    """text with the lines between <!-- NAME:begin --> and <!-- NAME:end --> replaced.

    Raises:
        ValueError: the markers are not there.
    """
    begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->\n"
    before, first, rest = text.partition(begin)
    _, last, after = rest.partition(end)
    if not first or not last:
        raise ValueError(f"the page has no {begin.strip()} and {end.strip()}")
    return f"{before}{begin}{''.join(line + chr(10) for line in lines)}{end}{after}"


def write(page: Path, results: Path, found: dict[str, Kernels], drawn: dict[tuple[str, str], Path]) -> None:
    """Both blocks of the page: the demo's, if its results are there, and that of the benchmarks."""
    text = page.read_text(encoding="utf-8")
    demos = sorted(results.glob("demo-*.json"), key=lambda path: (json.loads(path.read_text())["date"], path.name))
    if demos:
        text = replace(text, "demo", demo(demos[-1], link(page, demos[-1])))
    lines: list[str] = []
    for device, kernels in found.items():
        plots = {family: link(page, path) for (name, family), path in drawn.items() if name == device}
        lines += [*benchmarks(device, kernels, plots, link(page, results)), ""]
    page.write_text(replace(text, "bench", lines[:-1]), encoding="utf-8")


def link(page: Path, target: Path) -> str:
    """The target as the page, in its folder, refers to it."""
    return os.path.relpath(target.resolve(), page.resolve().parent)


def demo(path: Path, where: str) -> list[str]:
    """Writes the lines on a result of `python -m warpform demo --json`, with the commit it was run at."""
    facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if not facts.get("commit"):
        raise ValueError(f"{path} does not say at which commit it was measured")
    orders = {"arrival": "in order of arrival", "sorted": "sorted by length"}
    runs = facts["results"]
    rows = {
        "padded / real tokens": [f"{run['padding_ratio']:.2f}" for run in runs],
        "transformers, seconds": [f"{run['transformers_seconds']:.3g}" for run in runs],
        "warpform, seconds": [f"{run['warpform_seconds']:.3g}" for run in runs],
        "speed-up": [f"{run['speedup']:.2f}x" for run in runs],
        "largest difference of embeddings": [f"{run['max_difference']:.1e}" for run in runs],
    }
    earlier = facts.get("earlier_speedups", [])
    if earlier:
        rows["speed-up in earlier runs"] = [", ".join(f"{e[run['order']]:.2f}x" for e in earlier) for run in runs]
    text = (
        f"`make demo`: {runs[0]['texts']} paragraphs of CPython's help topics through {facts['model']}, batches of "
        f"{facts['batch_size']}, texts cut at {facts['max_length']} tokens, seconds from token ids to normalised "
        f"embeddings, medians of {facts['repeats']}. {facts['device']}, {facts['dtype']}, torch {facts['torch']}, "
        f"transformers {facts['transformers']}, {facts['date']}, commit {facts['commit']} ([results]({where}))."
    )
    return [
        *wrapped(text),
        "",
        "| | " + " | ".join(orders.get(run["order"], run["order"]) for run in runs) + " |",
        "|---|" + "---:|" * len(runs),
        *(f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows.items()),
    ]


def benchmarks(device: str, kernels: Kernels, plots: dict[str, str], results: str) -> list[str]:
    """Writes the lines on the rows' source, the plots, and each kernel and direction."""
    rows = [row for workloads in kernels.values() for providers in workloads.values() for row in providers.values()]
    timed = [row for row in rows if row["p50_us"]]
    one = timed[0]
    kind = f"{device}, CPU, {one['threads']} threads" if one["kind"] == "cpu" else device
    # The text after a comma is about single rows: the number of processes, the ops that went to the reference.
    backends = " and ".join(sorted({row["backend"].partition(",")[0] for row in timed if row["backend"]}))
    files = ", ".join(f"[{family}.csv]({results}/{family}.csv)" for family in dict.fromkeys(f for f, _, _ in kernels))
    text = (
        f"`make bench` on **{kind}** ({backends}), {one['dtype']}, torch {one['torch']}, transformers "
        f"{one['transformers'] or 'absent'}, {span(row['date'][:10] for row in timed)}, commit "
        f"{span(row['commit'] for row in timed)}: {files}."
    )
    lines = [*wrapped(text), ""]
    for family in SHOWN:
        if family in plots:
            name = html.escape(f"{family.replace('_', ' ')} on {device}: times of peers over those of warpform")
            lines += [f"![{name}]({plots[family]})", ""]
    others = [f"[{family.replace('_', ' ')}]({path})" for family, path in plots.items() if family not in SHOWN]
    if others:
        lines += [f"More plots: {', '.join(others)}.", ""]
    lines += [
        "| | workloads | warpform ahead in | fastest peer's time / warpform's: least, median, most |",
        "|---|---:|---:|---:|",
    ]
    for (family, kernel, direction), workloads in kernels.items():
        ratios = [] if family == "host" else [r for r in map(ratio, workloads.values()) if r is not None]
        if ratios:
            spread = f"{min(ratios):.2f}, {statistics.median(ratios):.2f}, {max(ratios):.2f}"
            ahead = sum(r > 1 for r in ratios)
            lines.append(f"| `{kernel}`, {direction} | {len(ratios)} | {ahead} | {spread} |")
    return lines


def ratios(providers: dict[str, Row]) -> dict[str, float]:
    """The time of each other provider over that of warpform in the same run; {} where warpform was not timed."""
    own = providers.get("warpform", {}).get("p50_us")
    if not own:
        return {}
    others = {p: row for p, row in providers.items() if p != "warpform" and row["p50_us"]}
    return {p: float(row["p50_us"]) / float(row.get("own_us") or own) for p, row in others.items()}


def ratio(providers: dict[str, Row]) -> float | None:
    """The fastest peer over warpform in its fastest mode; None where there is no peer."""
    found = ratios(providers)
    own = [1.0, *(ratio for p, ratio in found.items() if p.startswith("warpform"))]
    peers = [ratio for p, ratio in found.items() if not p.startswith("warpform")]
    return min(peers) / min(own) if peers else None


def wrapped(text: str) -> list[str]:
    """A paragraph in the page's width, links whole."""
    return textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False)


def span(values: Any) -> str:
    """One value, or the first and the last of several, in the order in which they came."""
    several = list(dict.fromkeys(values))
    return several[0] if len(several) == 1 else f"{several[0]} to {several[-1]}"
