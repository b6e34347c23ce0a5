"""Takes what `make gpu-check` brought back from a machine with a GPU into the repository.

    python tools/adopt_gpu_results.py FOLDER     rows to bench/results, a line and tables to docs/hardware.md
    python tools/adopt_gpu_results.py --table    the tables of docs/hardware.md anew, from bench/results alone

The second time a folder changes nothing. Nothing is measured here, and no GPU is needed.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent / "bench")]

import harness  # noqa: E402
from report import readme  # noqa: E402
from suites import FAMILIES  # noqa: E402

import hardware_page  # noqa: E402


class Unusable(Exception):
    """The folder, or the page; the text is one sentence that says why."""


def read_results(folder: Path) -> dict[str, Any]:
    """results.json of a run on a GPU."""
    path = folder / "results.json"
    if not folder.is_dir():
        raise Unusable(f"{folder} is no folder")
    if not path.exists():
        raise Unusable(f"{folder} has no results.json; is it the folder that --output named?")
    try:
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        facts, stages = results["facts"], results["stages"]
        gpu = facts.get("gpu")
        assert isinstance(stages, dict)
    except (ValueError, KeyError, AttributeError, AssertionError) as error:
        raise Unusable(f"{path} is not what gpu-check writes ({type(error).__name__}: {error})") from None
    if not gpu:
        raise Unusable(f"{path} names no GPU: a dry run, or a check that could not begin")
    return results


def read_rows(folder: Path) -> list[dict[str, str]]:
    """rows.csv; none where no benchmark ran. A last row that was cut off in the middle is left out."""
    path = folder / "rows.csv"
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != harness.COLUMNS:
            raise Unusable(f"{path} has other columns than bench/results")
        found = list(reader)
    rows = [row for row in found if None not in row and None not in row.values()]
    if len(rows) < len(found):
        say(f"{len(found) - len(rows)} row of {path} is not whole and is left out")
    for row in rows:
        if row["kind"] != "cuda":
            raise Unusable(f"{path} holds rows of a {row['kind'] or 'nameless device'}; only a GPU's are adopted")
        if row["family"] not in FAMILIES:
            raise Unusable(f"{path} holds rows of {row['family']!r}, which is no family of bench/")
    return rows


def append_rows(rows: list[dict[str, str]], results: Path) -> int:
    """Adds those that are not there, each to its family's file; how many."""
    added = 0
    for family in dict.fromkeys(row["family"] for row in rows):
        path = results / f"{family}.csv"
        known: set[tuple[str, ...]] = set()
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                known = {tuple(line) for line in csv.reader(file)}
        mine = (row for row in rows if row["family"] == family)
        new = [row for row in mine if tuple(row[column] for column in harness.COLUMNS) not in known]
        if new:
            harness.append(path, new)
        added += len(new)
    return added


def keep_profile(results: dict[str, Any], date: str, folder: Path) -> None:
    """The profiler's table beside the rows, for the page."""
    kernels = results["stages"].get("profile", {}).get("kernels", [])
    if not kernels:
        return
    facts = results["facts"]
    found = {"device": facts["gpu"], "date": date, "commit": facts.get("commit"), "kernels": kernels}
    name = f"ncu-{''.join(c if c.isalnum() else '-' for c in date)}.json"
    (folder / name).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def date_of(results: dict[str, Any], rows: list[dict[str, str]], folder: Path) -> str:
    """When the run was, to the minute."""
    if rows:
        return rows[0]["date"]
    if results.get("date"):
        return str(results["date"])
    changed = (folder / "results.json").stat().st_mtime
    return datetime.datetime.fromtimestamp(changed, datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ")


def adopt(folder: Path, results: Path, page: Path) -> None:
    """Everything of one folder."""
    text = page.read_text(encoding="utf-8")
    for name in hardware_page.BLOCKS:
        hardware_page.block(text, name)  # before anything is written
    found, rows = read_results(folder), read_rows(folder)
    date = date_of(found, rows, folder)
    text = hardware_page.add_record(text, hardware_page.record_row(found, rows, date))
    added = append_rows(rows, results)
    keep_profile(found, date, results)
    page.write_text(hardware_page.update(text, results), encoding="utf-8")
    say(f"{added} rows are new in {results}, {len(rows) - added} were there; {page} is up to date")
    if any(not readme.quotable(row) for row in rows):
        say("rows name no commit, or a changed tree: README quotes none of those")
    findings = [line for line in hardware_page.block(page.read_text(encoding="utf-8"), "kernels") if "say why" in line]
    if findings:
        say(f"{len(findings)} predictions are off by more than 30 %: write why into the last column of {page}")


def say(text: str) -> None:
    print(f"adopt: {text}", file=sys.stderr)


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="adopt_gpu_results.py", description="takes a run of gpu-check into the repository"
    )
    parser.add_argument("folder", type=Path, nargs="?", help="what gpu-check wrote: --output, or $OUT")
    parser.add_argument("--table", action="store_true", help="only the page's tables, from the results")
    parser.add_argument("--results", type=Path, default=hardware_page.RESULTS, help="default: bench/results")
    parser.add_argument("--page", type=Path, default=hardware_page.PAGE, help="default: docs/hardware.md")
    given = parser.parse_args(words)
    if (given.folder is None) != given.table:
        parser.error("either a folder or --table")
    try:
        if given.table:
            text = hardware_page.update(given.page.read_text(encoding="utf-8"), given.results)
            given.page.write_text(text, encoding="utf-8")
        else:
            adopt(given.folder, given.results, given.page)
    except (Unusable, ValueError, OSError) as error:
        say(str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
