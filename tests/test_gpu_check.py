"""`make gpu-check` without the GPU: its record, its table and its exit status."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parent.parent / "tools"
if not TOOLS.is_dir():
    pytest.skip("needs a checkout", allow_module_level=True)
sys.path.insert(0, str(TOOLS))

import gpu_check  # noqa: E402
from gpu_check import Result  # noqa: E402

FACTS = {"gpu": "Some GPU", "driver": "580.1", "torch": "2.13.0+cu130", "python": "3.12.3"}


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "hardware.md"
    path.write_text(f"# What ran\n\nWhy.\n\n{gpu_check.NOTHING_YET}\n")
    monkeypatch.setattr(gpu_check, "RECORD", path)
    monkeypatch.setattr(gpu_check, "require_gpu", lambda: FACTS)
    monkeypatch.setenv("WARPFORM_COMMIT", "abc123")
    return path


def outcome(monkeypatch: pytest.MonkeyPatch, **changed: Result) -> int:
    parts = {
        "gpu_tests": Result("gpu tests", True, "12 / 0 / 1"),
        "self_test": Result("doctor", True, "passed"),
        "sanitizer": Result("compute-sanitizer", None, "not installed"),
        "benchmarks": Result("benchmarks", None, "none yet"),
    }
    for name, result in {**parts, **changed}.items():
        monkeypatch.setattr(gpu_check, name, lambda result=result: result)
    return gpu_check.main()


def test_rows_are_appended(page, monkeypatch, capsys):
    assert outcome(monkeypatch) == 0
    assert outcome(monkeypatch) == 0
    text = page.read_text()
    assert gpu_check.NOTHING_YET not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 4 and text.startswith("# What ran\n\nWhy.\n")
    assert "| abc123 | Some GPU | 580.1 | 2.13.0+cu130 | 12 / 0 / 1 | not installed | none yet |" in rows[-1]
    assert len({row.count("|") for row in rows}) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("benchmarks")


@pytest.mark.parametrize("part", ["gpu_tests", "self_test", "sanitizer", "benchmarks"])
def test_any_failure_fails_and_is_recorded(page, monkeypatch, capsys, part):
    names = {
        "gpu_tests": "gpu tests",
        "self_test": "doctor",
        "sanitizer": "compute-sanitizer",
        "benchmarks": "benchmarks",
    }
    assert outcome(monkeypatch, **{part: Result(names[part], False, "11 / 1 / 1")}) == 1
    assert "FAILED" in capsys.readouterr().out
    assert page.read_text().count("Some GPU") == 1


def test_counts_of_a_run(tmp_path):
    (tmp_path / "test_three.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert False\n@pytest.mark.skip\ndef test_c(): pass\n"
    )
    status, counts = gpu_check.pytest_run(str(tmp_path))
    assert status == 1
    assert (counts["passed"], counts["failed"], counts["skipped"]) == (1, 1, 1)


def test_page_is_the_one_that_the_script_changes():
    text = (TOOLS.parent / "docs" / "hardware.md").read_text()
    assert gpu_check.NOTHING_YET in text or gpu_check.HEADER.splitlines()[0] in text
