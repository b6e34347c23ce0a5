"""The numbers of README.md and docs/benchmarks.md, written between their markers from committed results.

README has a plot and a few workloads, docs/benchmarks.md all of them and the demo. No number is typed by hand.
"""

from __future__ import annotations

import html
import json
import os
import statistics
import textwrap
from pathlib import Path
from typing import Any

from kinds import in_own_dtype, is_mode, is_quiet

from .plots import duration

Row = dict[str, str]
Kernels = dict[tuple[str, str, str], dict[str, dict[str, Row]]]

# The plots that docs/benchmarks.md shows; it links to the others.
SHOWN = ("attention", "models")
# The plot that README shows.
QUOTED_PLOT = "models"
# README's rows, all of them forward passes: where warpform is ahead, and where it is behind.
QUOTED = {
    "bert_base-forward-batch16-seqlen1024-tokens9531-heads12-head_dim64-hidden768": (
        "BERT-base, 16 texts padded to 1,024, of 9,531 tokens"
    ),
    "swin_t-forward-B128-224x224": "Swin-T, 128 images of 224 x 224",
    "fft_conv-forward-batch64-seqlen4096-tokens262144-hidden768": "long convolution, 64 x 768 rows of 4,096",
    "varlen_attention-forward-B8-S2048-T16384-H32-32-D64": "attention alone, 8 x 2,048 tokens, no padding",
    "hidden_gather_linear-forward-T8192-d2048": "routed layer, 8 of 16 groups of 2,048 columns",
}
PEERS = {
    "transformers_sdpa": "transformers, fused attention",
    "transformers_eager": "transformers, eager attention",
    "torch_fft": "`torch.fft`",
    "sdpa_cudnn_padded": "cuDNN",
    "dense": "cuBLAS, all groups",
}
# The orders in which the demo takes its texts.
ORDERS = {"arrival": "in order of arrival", "sorted": "sorted by length"}


def quotable(row: Row) -> bool:
    """Tells whether a row names the code that it belongs to, and was measured as pages quote it (kinds.py)."""
    named = row["commit"] not in ("", "unknown") and not row["commit"].endswith("(changed)")
    return named and is_quiet(row["kind"]) and in_own_dtype(row["kind"])


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
    """Writes README, which is `page`, and docs/benchmarks.md beside it; neither where a marker is missing.

    Raises:
        ValueError: a page lacks a marker, or the demo's results name no commit.
        FileNotFoundError: there is no docs/benchmarks.md.
    """
    long = page.parent / "docs" / "benchmarks.md"
    text, long_text = filled(page, long, results, found, drawn)
    page.write_text(text, encoding="utf-8")
    long.write_text(long_text, encoding="utf-8")


def filled(
    page: Path, long: Path, results: Path, found: dict[str, Kernels], drawn: dict[tuple[str, str], Path]
) -> tuple[str, str]:
    """The texts of README and of docs/benchmarks.md with what the results say between their markers."""
    text, long_text = page.read_text(encoding="utf-8"), long.read_text(encoding="utf-8")
    demos = sorted(results.glob("demo-*.json"), key=lambda path: (json.loads(path.read_text())["date"], path.name))
    if demos:
        long_text = replace(long_text, "demo", demo(demos[-1], link(long, demos[-1])))
    lines: list[str] = []
    for device, kernels in sorted(found.items(), key=lambda item: kind(item[1]) == "cpu"):  # GPUs first
        plots = {family: link(long, path) for (name, family), path in drawn.items() if name == device}
        lines += [*benchmarks(device, kernels, plots, link(long, results)), ""]
    long_text = replace(long_text, "bench", lines[:-1])
    device = quoted_device(found)
    if device is not None:
        plot = drawn.get((device, QUOTED_PLOT))
        words = shortly(demos[-1]) if demos else ""
        text = replace(text, "numbers", numbers(device, found[device], plot and link(page, plot), words))
    return text, long_text


def kind(kernels: Kernels) -> str:
    """What a device is, as its rows say: "cuda" or "cpu"."""
    workloads = next(iter(kernels.values()))
    return next(row["kind"] for providers in workloads.values() for row in providers.values())


def quoted_device(found: dict[str, Kernels]) -> str | None:
    """The GPU that most of README's workloads were measured on, of several the first; None where there is none."""
    counts = {device: len(quoted(kernels)) for device, kernels in found.items()}
    device = max(counts, key=lambda name: counts[name], default=None)
    return device if device is not None and counts[device] else None


def quoted(kernels: Kernels) -> dict[str, tuple[Row, Row]]:
    """README's workloads that a GPU has rows of: warpform's row and that of the fastest peer."""
    found: dict[str, tuple[Row, Row]] = {}
    for workloads in kernels.values():
        for workload, providers in workloads.items():
            own = providers.get("warpform", {})
            peers = {p: ratio for p, ratio in ratios(providers).items() if not p.startswith("warpform")}
            if workload in QUOTED and own.get("kind") == "cuda" and peers:
                found[workload] = own, providers[min(peers, key=lambda p: peers[p])]
    return found


def numbers(device: str, kernels: Kernels, plot: str | None, words: str) -> list[str]:
    """Writes README's lines: the plot, a row for each quoted workload, where they come from, and `words`."""
    rows = quoted(kernels)
    one, _ = next(iter(rows.values()))
    lines = []
    if plot is not None:
        name = html.escape(f"{QUOTED_PLOT} on {device}: times of peers over those of warpform")
        lines += [f"![{name}]({plot})", ""]
    lines += ["| forward | fastest peer | its time | warpform | |", "|---|---|---:|---:|---:|"]
    for workload, label in QUOTED.items():
        if workload in rows:
            own, peer = rows[workload]
            # A peer that the newest run left out has a time of warpform's own from the run that timed both.
            ours, theirs = float(peer.get("own_us") or own["p50_us"]), float(peer["p50_us"])
            name = PEERS.get(peer["provider"], peer["provider"].replace("_", " "))
            lines.append(f"| {label} | {name} | {duration(theirs)} | {duration(ours)} | {theirs / ours:.2f}x |")
    runs = sorted((peer["date"], peer["commit"]) for _, peer in rows.values())
    dates, commits = span(date[:10] for date, _ in runs), span(commit for _, commit in runs)
    text = (
        f"Medians on **{device}**, {one['dtype']}, torch {one['torch']}, {dates}, commit {commits}. Above 1x warpform "
        f"is faster. {words}"
    )
    return [*lines, "", *wrapped(text)]


def shortly(demo: Path) -> str:
    """Writes a sentence on a result of `python -m warpform demo --json`."""
    facts: dict[str, Any] = json.loads(demo.read_text(encoding="utf-8"))
    times = [
        f"{run['warpform_seconds']:.3g} s {ORDERS.get(run['order'], run['order'])} (transformers: "
        f"{run['transformers_seconds']:.3g} s)"
        for run in facts["results"]
    ]
    return f"On a CPU ({facts['device']}) `make demo` takes {' and '.join(times)}."


def link(page: Path, target: Path) -> str:
    """The target as the page, in its folder, refers to it."""
    return os.path.relpath(target.resolve(), page.resolve().parent)


def demo(path: Path, where: str) -> list[str]:
    """Writes the lines on a result of `python -m warpform demo --json`, with the commit it was run at."""
    facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if not facts.get("commit"):
        raise ValueError(f"{path} does not say at which commit it was measured")
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
        "| | " + " | ".join(ORDERS.get(run["order"], run["order"]) for run in runs) + " |",
        "|---|" + "---:|" * len(runs),
        *(f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows.items()),
    ]


def benchmarks(device: str, kernels: Kernels, plots: dict[str, str], results: str) -> list[str]:
    """Writes the lines on the rows' source, the plots, and each kernel and direction."""
    rows = [row for workloads in kernels.values() for providers in workloads.values() for row in providers.values()]
    timed = sorted((row for row in rows if row["p50_us"]), key=lambda row: row["date"])
    one = timed[-1]
    kind = f"{device}, CPU, {one['threads']} threads" if one["kind"] == "cpu" else device
    # The text after a comma is about single rows: the number of processes, the ops that went to the reference.
    backends = " and ".join(sorted({row["backend"].partition(",")[0] for row in timed if row["backend"]}))
    files = ", ".join(f"[{family}.csv]({results}/{family}.csv)" for family in dict.fromkeys(f for f, _, _ in kernels))
    text = (
        f"`make bench` on **{kind}** ({backends}), {one['dtype']}, torch {one['torch']}, transformers "
        f"{one['transformers'] or 'absent'}, {span(row['date'][:10] for row in timed)}, commit "
        f"{span(row['commit'] for row in timed)}: {files}."
    )
    lines = [f"### {device}", "", *wrapped(text), ""]
    for family in SHOWN:
        if family in plots:
            name = html.escape(f"{family.replace('_', ' ')} on {device}: times of peers over those of warpform")
            lines += [f"![{name}]({plots[family]})", ""]
    others = [f"[{family.replace('_', ' ')}]({path})" for family, path in plots.items() if family not in SHOWN]
    if others:
        lines += [*wrapped(f"More plots: {', '.join(others)}."), ""]
    lines += [
        "| | workloads | warpform ahead in | fastest peer's time / warpform's: least, median, most |",
        "|---|---:|---:|---:|",
    ]
    for (family, kernel, direction), workloads in kernels.items():
        ratios = [] if family == "host" else [r for r in map(ratio, workloads.values()) if r is not None]
        if ratios:
            spread = f"{min(ratios):.2f}, {statistics.median(ratios):.2f}, {max(ratios):.2f}"
            spread = spread if len(ratios) > 1 else f"{ratios[0]:.2f}"
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
    own = [1.0, *(ratio for p, ratio in found.items() if is_mode(p))]
    peers = [ratio for p, ratio in found.items() if not p.startswith("warpform")]
    return min(peers) / min(own) if peers else None


def wrapped(text: str) -> list[str]:
    """A paragraph in the page's width, links whole."""
    return textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False)


def span(values: Any) -> str:
    """One value, or the first and the last of several, in the order in which they came."""
    several = list(dict.fromkeys(values))
    return several[0] if len(several) == 1 else f"{several[0]} to {several[-1]}"
