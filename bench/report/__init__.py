"""Tables (Markdown) and plots (SVG) of committed results.

    python bench/report                                 the tables, on standard output
    python bench/report --markdown FILE --plots FOLDER  written to files
    python bench/report --readme                        numbers and plots of README and docs/benchmarks.md
    python bench/report --device H200                   one device of several
    python bench/report --busy                          what was measured beside busy processes, else left out

Of each device, workload and provider the newest row counts. Nothing is computed here but ratios of what the rows say.
"""

from __future__ import annotations

import argparse
import csv
import html
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kinds import in_own_dtype, is_quiet
from suites import FAMILIES

from . import plots, readme

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
Row = dict[str, str]


def read(folder: Path, *, busy: bool = False, dtype: str = "") -> list[Row]:
    """All rows of a folder of results, oldest first.

    busy: those that were measured beside busy processes (`bench --busy`), instead of all others.
    dtype: those that were measured in this dtype (`bench --dtype`), instead of in their device's own.

    Raises:
        FileNotFoundError: there is no results file in it.
    """
    files = sorted(folder.glob("*.csv"))
    if not files:
        raise FileNotFoundError(f"{folder} has no results yet; make bench writes some")
    rows: list[Row] = []
    for path in files:
        with path.open(newline="", encoding="utf-8") as file:
            rows += csv.DictReader(file)
    rows = [row for row in rows if is_quiet(row["kind"]) != busy]
    return [row for row in rows if (row["dtype"] == dtype if dtype else in_own_dtype(row["kind"]))]


# The rows of a device: (family, kernel, direction) -> workload -> provider -> row.
Kernels = dict[tuple[str, str, str], dict[str, dict[str, Row]]]


def newest(rows: Iterable[Row]) -> dict[str, Kernels]:
    """device -> (family, kernel, direction) -> workload -> provider -> row.

    A device beside busy processes is one of its own. Of each workload the rows come from the run that measured warpform
    last. A peer that this run did not time comes from the last one that timed both: its row has `own_us`, warpform's
    time in that run, as ratios are only made within one run.
    """
    runs: dict[tuple[str, str], dict[str, dict[str, Row]]] = {}
    for row in rows:
        key = row["device"] + (f", {beside(row)}" if beside(row) else ""), row["workload"]
        run = runs.setdefault(key, {}).setdefault(row["date"], {})
        # A run may measure a workload several times, each time beside other peers.
        if row["p50_us"] or not run.get(row["provider"], {}).get("p50_us"):
            run[row["provider"]] = row
    found: dict[str, Kernels] = {}
    for (device, workload), dates in runs.items():
        timed = [date for date, providers in dates.items() if providers.get("warpform", {}).get("p50_us")]
        providers = dict(dates[max(timed or dates)])
        for date in sorted(timed, reverse=True)[1:]:
            for provider, row in dates[date].items():
                if row["p50_us"] and not providers.get(provider, {}).get("p50_us"):
                    providers[provider] = {**row, "own_us": dates[date]["warpform"]["p50_us"]}
        first = next(iter(providers.values()))
        key3 = first["family"], first["kernel"], first["direction"]
        found.setdefault(device, {}).setdefault(key3, {})[workload] = providers
    return found


def number(value: float) -> str:
    """Three digits that mean something, without exponents."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def sizes(row: Row) -> str:
    """The sizes that a row has, in words."""
    batch = f"{row['batch']} x " if row["batch"] else ""
    grid = row["grid"] or row["seqlen"]
    parts = [f"{batch}{grid}, {row['tokens']} tokens" if grid else f"{row['tokens']} tokens"]
    if row["window"]:
        shift = f" shifted {row['shift']}" if row["shift"].strip("0x") else ""
        parts.append(f"windows {row['window']}{shift}")
    if row["heads"]:
        kv = f"/{row['kv_heads']}" if row["kv_heads"] not in ("", row["heads"]) else ""
        parts.append(f"{row['heads']}{kv} heads of {row['head_dim']}")
    if row["hidden"] and row["family"] != "monarch":  # whose grid has the widths
        parts.append(f"hidden {row['hidden']}")
    if row["causal"] == "1":
        parts.append("causal")
    return ", ".join(parts)


def waves(row: Row) -> str:
    """The fewest waves of a row's ops, as ", 0.8 waves"; empty where they were not planned."""
    found = [float(op.rpartition("=")[2]) for op in (row.get("waves") or "").split()]
    return f", {min(found):g} waves" if found else ""


def table(workloads: dict[str, dict[str, Row]]) -> list[str]:
    """One Markdown table: a line for each workload, a column for each provider that was timed; below, what was not."""
    order = list(dict.fromkeys(p for providers in workloads.values() for p in providers))
    timed = [p for p in order if any(w.get(p, {}).get("p50_us") for w in workloads.values())]
    images = any(row.get("images_s") for providers in workloads.values() for row in providers.values())
    models = any(row["family"] == "m2" for providers in workloads.values() for row in providers.values())
    rates = ["images/s, warpform"] if images else ["tokens/ms, warpform"] if models else []
    columns = [*timed, *rates, "share of roofline"]
    lines = [f"| workload | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for providers in workloads.values():
        first = next(iter(providers.values()))
        own = providers.get("warpform", {}).get("p50_us")
        ratios = readme.ratios(providers)
        cells = []
        for provider in timed:
            row = providers.get(provider, {})
            value = row.get("p50_us")
            if not value:
                cells.append("-")
            elif provider == "warpform" or not own:
                cells.append(f"{number(float(value))} ({number(float(row['p20_us']))}..{number(float(row['p80_us']))})")
            else:
                cells.append(f"{number(float(value))} ({ratios[provider]:.2f}x)")
        ours = providers.get("warpform", {})
        if images:
            cells.append(number(float(ours["images_s"])) if ours.get("images_s") else "-")
        elif models:
            cells.append(number(1e3 * int(ours["tokens"]) / float(own)) if own else "-")
        cells.append(f"{float(ours['roofline']):.0%}{waves(ours)}" if ours.get("roofline") else "-")
        lines.append(f"| {sizes(first)} | {' | '.join(cells)} |")
    reasons: dict[tuple[str, str], int] = {}
    for providers in workloads.values():
        for provider, row in providers.items():
            if row["status"] != "ok":
                key = provider, row["status"]
                reasons[key] = reasons.get(key, 0) + 1
    if reasons:
        lines += ["", "Not timed:", ""]
        lines += [
            f"* {provider}, {count} of {len(workloads)} workloads: {html.escape(status, quote=False)}"
            for (provider, status), count in reasons.items()
        ]
    return lines


def markdown(found: dict[str, Kernels]) -> str:
    """Every table, under a heading for each device and kernel."""
    lines = []
    for device, kernels in found.items():
        lines += [f"# {device}", ""]
        for (family, kernel, direction), workloads in kernels.items():
            rows = [row for providers in workloads.values() for row in providers.values()]
            one = next((row for row in rows if row["p50_us"]), rows[0])
            dates = sorted({row["date"] for row in rows})
            when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
            backends = sorted({row["backend"] for row in rows if row["backend"]})
            where = f"{beside(one)}, " if beside(one) else ""
            lines += [f"## {kernel}, {direction}", ""]
            lines += [
                f"Microseconds, median (warpform: 20th to 80th percentile; peers: times warpform's). {one['dtype']}, "
                f"{one['threads']} host threads, {where}warpform {one['warpform']} at {one['commit']} "
                f"({', '.join(backends) or 'not timed'}), torch {one['torch']}, "
                f"transformers {one['transformers'] or 'absent'}, {when}; {family}.csv."
            ]
            if one["ceiling_tflops"]:
                lines[-1] += f" Ceilings in the same run: {one['ceiling_tflops']} TFLOP/s, {one['ceiling_gbs']} GB/s."
            lines += ["", *table(workloads), ""]
    return "\n".join(lines)


def beside(row: Row) -> str:
    """Says where a row was measured beside busy processes, empty elsewhere."""
    count = row["kind"].partition(" beside ")[2].partition(" ")[0]
    return f"beside {count} busy {'process' if count == '1' else 'processes'}" if count else ""


def figures(device: str, kernels: Kernels) -> dict[str, plots.Figure]:
    """A figure for each family of a device."""
    found: dict[str, plots.Figure] = {}
    for (family, kernel, direction), workloads in kernels.items():
        title = FAMILIES[family].title if family in FAMILIES else ""
        if not title:
            continue
        several = len({k for f, k, _ in kernels if f == family}) > 1
        for providers in workloads.values():
            row = providers.get("warpform", {})
            if not row.get("p50_us"):
                continue
            own = float(row["p50_us"])
            times = {p: own * ratio for p, ratio in readme.ratios(providers).items()}
            figure = found.setdefault(family, plots.Figure(f"{title} on {machine(row)}", source(row)))
            label = sizes(row).replace(" x ", " × ").replace(" tokens, ", " tokens,\n", 1)
            if several:
                label = f"{kernel}, {label}"
            figure.rows.setdefault(label, {})[direction] = plots.Cell(own, times)
    return found


def machine(row: Row) -> str:
    """The device, by name and kind."""
    if row["kind"].startswith("cuda"):
        return f"{row['device']} ({beside(row)})" if beside(row) else row["device"]
    facts = ("CPU", beside(row), f"{row['threads']} threads")
    return f"{row['device']} ({', '.join(filter(None, facts))})"


def source(row: Row) -> str:
    """Names the dtype, versions, commit and date of a row."""
    return (
        f"{row['dtype']}, torch {row['torch']}, transformers {row['transformers'] or 'absent'}, warpform "
        f"{row['warpform']} at {row['commit']} ({row['backend']}), {row['date']}"
    )


def file_name(*words: Any) -> str:
    text = "-".join(str(word) for word in words).lower()
    return "-".join("".join(c if c.isalnum() else " " for c in text).split()) + ".svg"


def draw(folder: Path, found: dict[str, Kernels]) -> dict[tuple[str, str], Path]:
    """The plots of all devices, by device and family."""
    written = {}
    for device, kernels in found.items():
        for family, figure in figures(device, kernels).items():
            path = folder / file_name(device, family)
            if plots.draw(path, figure):
                written[device, family] = path
                print(f"report: wrote {path}", file=sys.stderr)
    return written


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="report", description="tables and plots of benchmark results")
    parser.add_argument("--results", type=Path, default=RESULTS, help="a folder of results (default bench/results)")
    parser.add_argument("--device", default="", help="only devices whose name has this in it")
    parser.add_argument("--busy", action="store_true", help="the rows of bench --busy alone")
    parser.add_argument("--dtype", default="", help="the rows of bench --dtype in this one alone")
    parser.add_argument("--markdown", type=Path, help="write the tables there; default: standard output")
    parser.add_argument("--plots", type=Path, help="write a plot for each device and family into this folder")
    parser.add_argument(
        "--readme",
        type=Path,
        nargs="?",
        const=ROOT / "README.md",
        help="write numbers into it and into docs/benchmarks.md, and plots (docs/plots)",
    )
    given = parser.parse_args(arguments)
    if (given.busy or given.dtype) and given.readme is not None:
        parser.error("--readme writes what was measured on a quiet machine, in each device's own dtype")
    try:
        rows = read(given.results, busy=given.busy, dtype=given.dtype)
        found = newest(rows if given.readme is None else filter(readme.quotable, rows))
        found = {device: kernels for device, kernels in found.items() if given.device.lower() in device.lower()}
        if not found:
            which = "" if given.readme is None else ", and measured at a commit,"
            print(f"report: no device in {given.results}{which} has {given.device!r} in its name", file=sys.stderr)
            return 2
        if given.readme is not None:
            drawn = draw(given.readme.parent / "docs" / "plots", found)
            readme.write(given.readme, given.results, found, drawn)
            return 0
    except (FileNotFoundError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    text = markdown(found)
    if given.markdown is None:
        print(text)
    else:
        given.markdown.write_text(text + "\n", encoding="utf-8")
    if given.plots is not None:
        draw(given.plots, found)
    return 0
