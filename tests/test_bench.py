"""Every benchmark once at a tiny size, the rows it would record, and the report on them."""

from __future__ import annotations

import csv
import importlib.util
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch

from warpform import bench

BENCH = Path(__file__).resolve().parent.parent / "bench"
if not BENCH.is_dir():
    pytest.skip("needs a checkout", allow_module_level=True)
pytest.importorskip("pytest_benchmark")
pytest.importorskip("transformers")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


harness, report = load("harness"), load("report")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows of a tiny run, made as a user makes them."""
    folder = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-m", "warpform", "bench", "--tiny", "--results", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(BENCH.parent / "python")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder, env=environment)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "best peer / warpform" in done.stdout
    return folder


def test_every_benchmark_runs(results: Path) -> None:
    rows = report.read(results)
    assert {row["family"] for row in rows} == {"attention", "encoder", "host"}
    for row in rows:
        assert None not in row and row["commit"] and row["date"] and row["device"] and row["torch"]
        timed = bool(row["p50_us"])
        assert timed == (row["status"] == "ok"), row
        if row["provider"] == "warpform":
            assert timed and float(row["p20_us"]) <= float(row["p50_us"]) <= float(row["p80_us"])
        # What is not timed says why.
        assert timed or row["status"].startswith(("missing: ", "failed: ")), row
        if timed and row["family"] != "host":
            assert float(row["gbs"]) > 0 and float(row["roofline"]) > 0
    # One row for each provider of a workload, and ratios to each that was timed.
    assert max(Counter((row["workload"], row["provider"]) for row in rows).values()) == 1
    for row in rows:
        if row["provider"] == "warpform":
            peers = {r["provider"] for r in rows if r["workload"] == row["workload"] and r["p50_us"]} - {"warpform"}
            assert {part.partition("=")[0] for part in row["ratios"].split()} == peers


def test_report(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    page, plots = tmp_path / "report.md", tmp_path / "plots"
    assert report.main(["--results", str(results), "--markdown", str(page), "--plots", str(plots)]) == 0
    text = page.read_text()
    for words in ("## varlen_attention, backward", "## bert_base, training step", "Not timed:", "share of roofline"):
        assert words in text
    for line in text.splitlines():
        if line.startswith("| "):
            assert line.endswith(" |")
    drawn = list(plots.glob("*.svg"))
    assert any("bert_base-forward" in path.name for path in drawn)
    assert all(path.read_text().startswith("<?xml") for path in drawn)
    capsys.readouterr()
    assert report.main(["--results", str(tmp_path)]) == 2
    assert "no results yet" in capsys.readouterr().err
    assert report.main(["--results", str(results), "--device", "no such device"]) == 2


def test_rows_of_one_run_are_compared(tmp_path: Path) -> None:
    """A newer run of a peer alone, on another day, must not be set against an older time of warpform."""
    row = dict.fromkeys(harness.COLUMNS, "")
    row |= {"device": "a", "family": "f", "kernel": "k", "direction": "d", "workload": "w", "status": "ok"}
    rows = [
        row | {"date": "2026-01-01", "provider": "warpform", "p50_us": "10"},
        row | {"date": "2026-01-01", "provider": "peer", "p50_us": "20"},
        row | {"date": "2026-01-02", "provider": "peer", "p50_us": "99"},
    ]
    harness.append(tmp_path / "f.csv", rows[:2])
    harness.append(tmp_path / "f.csv", rows[2:])
    read = report.read(tmp_path)
    assert len(read) == 3
    workloads = report.newest(read)["a"]["f", "k", "d"]
    assert {provider: r["p50_us"] for provider, r in workloads["w"].items()} == {"warpform": "10", "peer": "20"}


def test_results_are_only_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "old.csv"
    path.write_text("other,columns\n1,2\n")
    with pytest.raises(ValueError, match="other columns"):
        harness.append(path, [])
    assert path.read_text() == "other,columns\n1,2\n"


class _Case:
    """Four providers: one is right, one computes something else, one is not there, one breaks."""

    flops, bytes, end_to_end = 1e3, 1e3, False

    def prepare(self, provider: str) -> list:
        if provider == "absent":
            raise harness.Missing("needs a GPU")
        if provider == "broken":
            raise RuntimeError("no kernel\nand more")
        value = 2.0 if provider == "wrong" else 1.0
        return [lambda: torch.tensor(value)]

    def check(self, provider: str, output: torch.Tensor) -> None:
        assert output == 1, f"got {output}"


class _Benchmark:
    group, stats = None, None

    def __init__(self) -> None:
        self.extra_info: dict = {}

    def pedantic(self, call, **how) -> None:
        call()


def test_only_what_agrees_is_timed() -> None:
    session = harness.Session("cpu", tiny=True)
    session.facts = {"device": "a"}
    spec = harness.Spec("k", "forward", (), ("warpform", "wrong", "absent", "broken"))
    session._spec, session._case = spec, _Case()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(harness.DEADLINES, "", 1.0)
        session.measure(spec, "warpform", _Benchmark())
        with pytest.raises(AssertionError, match="got 2"):
            session.measure(spec, "wrong", _Benchmark())
        for provider in ("absent", "broken"):
            with pytest.raises(pytest.skip.Exception):
                session.measure(spec, provider, _Benchmark())
    session.flush()
    states = {row["provider"]: row["status"] for row in session.rows}
    assert states["warpform"] == "ok" and states["wrong"].startswith("disagrees: got 2")
    assert states["absent"] == "missing: needs a GPU" and states["broken"] == "failed: RuntimeError: no kernel"


def test_committed_results_can_be_read() -> None:
    for path in sorted((BENCH / "results").glob("*.csv")):
        with path.open(newline="") as file:
            assert tuple(next(csv.reader(file))) == harness.COLUMNS


def test_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--help"]) == 0
    assert "--tiny" in capsys.readouterr().out
    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    assert bench.main([]) == 2
    assert "run them from a checkout" in capsys.readouterr().err
