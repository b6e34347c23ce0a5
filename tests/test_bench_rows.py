"""The benchmarks without pytest: bench/rows.py and bench/profiled.py."""

from __future__ import annotations

import csv
import faulthandler
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "bench").is_dir():
    pytest.skip("needs a checkout", allow_module_level=True)
sys.path.insert(0, str(ROOT / "bench"))

import harness  # noqa: E402
import profiled  # noqa: E402
import rows  # noqa: E402

TINY = ["--tiny", "--device", "cpu", "--main"]
GATE = ("short_conv_gate-forward-batch2-seqlen20-tokens40-hidden8", "short_conv")
BOTH = ("short_conv_gate-forward+backward-batch2-seqlen20-tokens40-hidden8", "short_conv")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """rows.py, too, runs tiny sizes on the threads that it finds."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        found = list(reader)
    assert tuple(reader.fieldnames or ()) == harness.COLUMNS
    return found


def test_two_families(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers, then warpform's plain call, whose row has the ratios; rows of one date in one table."""
    limits: list[float] = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda limit, **how: limits.append(limit))
    table, journal = tmp_path / "rows.csv", tmp_path / "journal"
    words = ["--family", "short_conv,monarch", "--providers", "peers", "--table", str(table)]
    again = [*TINY, *words, "--journal", str(journal), "--date", "2026-11-27T10:00Z", "--row-limit", "60"]
    assert rows.main(again) == 0
    found = read(table)
    assert limits == [60.0] * len(found)
    assert {row["family"] for row in found} == {"short_conv", "monarch"}
    assert {row["date"] for row in found} == {"2026-11-27T10:00Z"}
    for row in found:
        assert row["status"] == ("missing: needs a GPU" if row["provider"] == "warpform_mma_sync" else "ok")
    assert not any(harness.needs_compiling(row["provider"]) for row in found)
    by_workload: dict[str, list[dict[str, str]]] = {}
    for row in found:
        by_workload.setdefault(row["workload"], []).append(row)
    for *peers, own in by_workload.values():
        assert (
            own["provider"] == "warpform"
            and own["backend"].startswith(("kernels", "reference"))
            and float(own["p50_us"]) > 0
        )
        timed = [peer["provider"] for peer in peers if peer["p50_us"]]
        assert [ratio.partition("=")[0] for ratio in own["ratios"].split()] == timed
    assert f"{GATE[0]}  warpform  ok" in capsys.readouterr().out
    # With its journal the same command has nothing left to do.
    assert rows.main(again) == 0
    assert read(table) == found


def test_goes_on_after_a_row_that_ended_its_process(tmp_path: Path) -> None:
    journal, words = tmp_path / "journal", [*TINY, "--family", "short_conv", "--providers", "warpform"]
    words += ["--results", str(tmp_path), "--journal", str(journal)]

    def begun(workload: str) -> None:
        entry = {"event": "begun", "family": "short_conv", "workload": workload, "provider": "warpform"}
        with journal.open("a") as file:
            file.write(json.dumps(entry) + "\n" + '{"event": "do')  # cut off in the middle, as the last line may be

    begun(GATE[0])
    assert rows.main(words) == 1
    found = read(tmp_path / "short_conv.csv")
    assert [row["status"] for row in found] == ["failed: it ended the process that measured it", "ok"]
    assert [row["workload"] for row in found] == [GATE[0], BOTH[0]] and found[0]["batch"] == "2"


def test_what_ends_processes_again_and_again_is_left_out(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    entries = [{"event": "ended", "family": "short_conv", "workload": f"w{i}", "provider": "warpform"} for i in (0, 1)]
    journal.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    words = ["--family", "short_conv", "--providers", "warpform", "--results", str(tmp_path), "--journal", str(journal)]
    assert rows.main([*TINY, *words]) == 1
    statuses = {row["status"] for row in read(tmp_path / "short_conv.csv")}
    assert statuses == {"missing: short_conv ended 2 processes before it"}


def test_a_gpu_that_answers_no_more_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row is kept, and the next process begins behind it."""

    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    journal, words = tmp_path / "journal", [*TINY, "--family", "short_conv", "--providers", "warpform"]
    words += ["--results", str(tmp_path), "--journal", str(journal)]
    with monkeypatch.context() as patch:
        patch.setattr(harness, "synchronize", fail)
        assert rows.main(words) == rows.LOST
    assert rows.main(words) == 0
    assert ["illegal memory access" in row["status"] for row in read(tmp_path / "short_conv.csv")] == [True, False]


def test_time_runs_out_and_a_family_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*TINY, "--providers", "warpform", "--results", str(tmp_path)]
    assert rows.main([*words, "--family", "short_conv", "--seconds", "1e-9"]) == 1
    assert not list(tmp_path.iterdir()), "nothing is known of what was not begun"
    monkeypatch.setitem(sys.modules, "suites.window", None)
    assert rows.main([*words, "--family", "window"]) == 1
    (row,) = read(tmp_path / "window.csv")
    assert row["status"].startswith("failed: ModuleNotFoundError") and row["provider"] == "warpform"


def test_main_workloads_of_a_gpu_are_listed_without_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        rows.main(["--list", "--main", "--device", "cuda", "--providers", "compiled", "--family", "attention,host"])
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert "varlen_attention-forward-B1-S16384-T16384-H16-16-D128  flex_compiled  eager_compiled  warpform" in lines
    assert any(line.startswith("bias_gelu-host call") for line in lines)


def test_profiled_runs_what_it_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert profiled.main(["--tiny", "--device", "cpu", "--family", "short_conv", BOTH[0], GATE[0]]) == 0
    assert capsys.readouterr().out.splitlines() == [f"profiled 0: {BOTH[0]}", f"profiled 1: {GATE[0]}"]
    with pytest.raises(ValueError, match="no workload nothing"):
        profiled.main(["--tiny", "--device", "cpu", "--family", "short_conv", "nothing"])


def test_only_plugins_need_pytest() -> None:
    needing = {path.name for path in (ROOT / "bench").glob("*.py") if "import pytest" in path.read_text()}
    assert needing == {"conftest.py", "progress.py"}
