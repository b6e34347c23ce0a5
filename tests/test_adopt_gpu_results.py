"""What a run of gpu-check on a GPU becomes in the repository: rows, the record, the tables of docs/hardware.md."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from warpform import _library

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "tools").is_dir():
    pytest.skip("needs a checkout", allow_module_level=True)
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "bench")]

import harness  # noqa: E402
import report  # noqa: E402
from report import predictions  # noqa: E402

import adopt_gpu_results  # noqa: E402
import hardware_page  # noqa: E402

FORWARD = "varlen_attention-forward-B1-S16384-T16384-H16-16-D128"
CONVOLUTION = "gated_fft_conv-forward-batch64-seqlen4096-tokens262144-hidden768"
WINDOW = "window_attention-forward-B128-56x56-W7x7-S3x3-H3-D32"
GPU = "NVIDIA H100 80GB HBM3"
FLOPS = 4 * 16384**2 * 16 * 128


def row(workload: str, us: float | None = None, **changed: str) -> dict[str, str]:
    family = {"v": "attention", "g": "fft_conv", "w": "window"}[workload[0]]
    made = dict.fromkeys(harness.COLUMNS, "") | {
        "date": "2026-11-27T10:00Z", "commit": "0123456789ab", "device": GPU, "kind": "cuda", "family": family,
        "kernel": workload.partition("-")[0], "direction": "forward", "workload": workload, "provider": "warpform",
        "status": "ok" if us else "failed: RuntimeError: no", "backend": "kernels", "dtype": "bfloat16",
    }  # fmt: skip
    if us:
        made |= {"p50_us": f"{us:.4g}", "ceiling_tflops": "800", "ceiling_gbs": "3000"}
    return made | changed


@pytest.fixture
def brought(tmp_path: Path) -> Path:
    """A folder as gpu-check leaves it."""
    folder = tmp_path / "out"
    folder.mkdir()
    cases = {f"tests/a.py::t{i}": {"outcome": o} for i, o in enumerate(["passed", "passed", "failed", "skipped"])}
    results = {
        "facts": {"commit": "0123456789ab", "gpu": GPU, "torch": "2.11", "nvidia_smi": {"driver_version": "580.1"}},
        "stages": {
            "smoke": {"cases": {"smoke::a": {"outcome": "passed"}}},
            "tests": {"cases": cases},
            "sanitizer": {"text": "compute-sanitizer is not installed"},
            "profile": {"kernels": [{"name": "monarch_forward<4>", "workload": "w", "us": "41.5"}]},
        },
    }
    (folder / "results.json").write_text(json.dumps(results))
    # 366 TFLOP/s, as predicted; five times too slow; half of the copy's bandwidth; a failure; a peer.
    rows = [
        row(FORWARD, FLOPS / 366e6),
        row(CONVOLUTION, 6500),
        row(WINDOW, 205),
        row(FORWARD.replace("forward", "backward"), direction="backward"),
        row(WINDOW, 400, provider="sdpa"),
    ]
    with (folder / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, harness.COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return folder


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "hardware.md"
    blocks = [f"<!-- {name}:begin -->\nold\n<!-- {name}:end -->\n" for name in hardware_page.BLOCKS]
    path.write_text("# Page\n" + "\nwords\n".join(blocks))
    return path


def adopt(folder: Path, page: Path) -> int:
    return adopt_gpu_results.main([str(folder), "--results", str(page.parent / "results"), "--page", str(page)])


def lines_of(page: Path, workload: str) -> list[list[str]]:
    """The cells of a workload's lines."""
    found = [line for line in page.read_text().splitlines() if line.startswith(f"| `{workload}`")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in found]


def test_adopted_once(brought: Path, page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert adopt(brought, page) == 0
    assert "5 rows are new" in capsys.readouterr().err
    text, folder = page.read_text(), page.parent / "results"
    record = next(line for line in text.splitlines() if line.startswith("| 2026"))
    assert record == (
        f"| 2026-11-27T10:00Z | 0123456789ab | {GPU} | 580.1 | 2.11 | 1 / 0 | 2 / 1 / 1 | "
        "compute-sanitizer is not installed | 4 / 1 / 0 | 1 kernels |"
    )
    assert "old" not in text and text.count("words") == 2 and "monarch_forward<4>" in text
    rows = report.read(folder)
    assert len(rows) == 5 and {path.stem for path in folder.glob("*.csv")} == {"attention", "fft_conv", "window"}
    assert adopt(brought, page) == 0
    assert "0 rows are new" in capsys.readouterr().err
    assert page.read_text() == text and report.read(folder) == rows


def test_findings_and_their_reasons(brought: Path, page: Path) -> None:
    assert adopt(brought, page) == 0
    (forward,), (convolution,), (window,) = (lines_of(page, name) for name in (FORWARD, CONVOLUTION, WINDOW))
    assert forward[4:] == ["340 to 380 TFLOP/s", f"{FLOPS / 366e6:,.0f} us, 366 TFLOP/s", "46%", "", ""]
    assert convolution[4] == "1 to 1.3 ms" and convolution[7:] == ["FINDING: say why", ""]
    assert window[4] == "50% to 60% of the copy bandwidth" and window[6:] == ["50%", "", ""]
    (failed,) = lines_of(page, FORWARD.replace("forward", "backward"))
    assert failed[5] == "failed: RuntimeError: no"
    (unmeasured,) = lines_of(page, "bias_gelu-forward-batch16-seqlen1024-tokens9531-hidden3072")
    assert unmeasured[5] == "not measured yet"
    # What a person writes stays, and is no longer asked for.
    page.write_text(page.read_text().replace("FINDING: say why |  |", "FINDING: say why | its gates are read twice |"))
    assert adopt(brought, page) == 0
    assert adopt(brought, page) == 0
    assert lines_of(page, CONVOLUTION)[0][7:] == ["FINDING", "its gates are read twice"]


def test_of_one_run_the_row_that_was_timed_counts(tmp_path: Path) -> None:
    """A run measures a workload several times; that one of them fails does not hide the others."""
    rows = [row(FORWARD, 7000), row(FORWARD), row(WINDOW), row(FORWARD, date="2026-11-26T10:00Z")]
    found = hardware_page.newest(rows)[GPU]
    assert found[FORWARD]["p50_us"] == "7000" and found[WINDOW]["status"].startswith("failed")
    assert report.newest(rows)[GPU]["attention", "varlen_attention", "forward"][FORWARD]["warpform"]["p50_us"] == "7000"


@pytest.mark.parametrize(
    ("low", "high", "value", "missed"),
    [(100, 200, 71, False), (100, 200, 69, True), (100, 200, 259, False), (100, 200, 261, True)],
)
def test_a_miss_is_more_than_thirty_percent(low: float, high: float, value: float, missed: bool) -> None:
    assert predictions.Prediction(low, high, predictions.RATE).missed(value) == missed


def broken(folder: Path, how: str) -> None:
    path, table = folder / "results.json", folder / "rows.csv"
    results: dict[str, Any] = json.loads(path.read_text())
    if how == "no results.json":
        path.unlink()
    elif how == "not what gpu-check writes":
        path.write_text(path.read_text()[:-40])
    elif how == "names no GPU":
        path.write_text(json.dumps({**results, "facts": {"gpu": None}}))
    elif how == "other columns":
        table.write_text("a,b\n1,2\n")
    else:
        table.write_text(table.read_text().replace(f"{GPU},cuda,", f"{GPU},cpu,"))


@pytest.mark.parametrize(
    "how", ["no results.json", "not what gpu-check writes", "names no GPU", "other columns", "only a GPU's"]
)
def test_what_is_not_whole_is_refused(brought: Path, page: Path, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = page.read_text()
    broken(brought, how)
    assert adopt(brought, page) == 2
    assert how in capsys.readouterr().err
    assert page.read_text() == before and not (page.parent / "results").exists()


def test_a_row_that_was_cut_off_is_left_out(brought: Path, page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = brought / "rows.csv"
    table.write_text(table.read_text()[:-60])
    assert adopt(brought, page) == 0
    error = capsys.readouterr().err
    assert "is not whole" in error and "4 rows are new" in error


def test_no_folder_and_no_markers(brought: Path, page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert adopt(brought / "nowhere", page) == 2
    page.write_text("no markers\n")
    assert adopt(brought, page) == 2
    assert "record:begin" in capsys.readouterr().err and not (page.parent / "results").exists()


# ---- the page in the repository ----


def test_page_is_what_the_script_writes() -> None:
    text = hardware_page.PAGE.read_text(encoding="utf-8")
    assert hardware_page.update(text, hardware_page.RESULTS) == text
    record = hardware_page.block(text, "record")
    assert record == [hardware_page.NOTHING_YET] or record[0].startswith("| date | commit |")


def test_every_kernel_is_listed() -> None:
    """An op that has a kernel has a main workload, and each prediction is of one."""
    listed = hardware_page.workloads()
    assert set(predictions.PREDICTIONS) <= {workload.name for workload in listed}
    assert all(workload.bytes > 0 for workload in listed)
    kernels = {entry["op"] for entry in _library.kernel_table()}
    assert kernels <= {op for workload in listed for op in workload.ops}
