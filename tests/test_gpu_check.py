"""`make gpu-check` without the GPU: a dry run of every stage, and what hangs, crashes or is cut short on the way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).resolve().parent.parent / "tools"
if not TOOLS.is_dir():
    pytest.skip("needs a checkout", allow_module_level=True)
sys.path.insert(0, str(TOOLS))

from gpu_check import cli, emulated, machine, report, sanitizer_report, suites, summary  # noqa: E402
from gpu_check.run import Outcome, Run  # noqa: E402
from gpu_check.stages import STAGES, Stage  # noqa: E402

# One dry run serves several tests.
pytestmark = pytest.mark.one_worker

# What the planted faults are called, and how each is told.
PLANTED_TESTS = {
    "tests/gpu/test_wrong.py::test_fails": "assert 1 == 2",
    "tests/gpu/test_hanging.py::test_hangs": "hung",
    "tests/gpu/test_crashing.py::test_dies": "killed by SIGKILL",
    "tests/gpu/test_poisoned.py::test_poisons": "illegal memory access",
}
PLANTED_OPS = {
    "smoke::planted::wrong::bfloat16::forward": "off by 3",
    "smoke::planted::crashing::bfloat16": "killed by SIGABRT in crashing",
    "smoke::planted::hanging::bfloat16": "hung in hanging",
    "smoke::planted::poisoning::bfloat16::forward": "illegal memory access",
}
SANITIZED = "sanitizer::memcheck::planted"


class Quick(emulated.EmulatedMachine):
    """Without the two processes that import torch."""

    limits = replace(emulated.EmulatedMachine.limits, test=1.0)
    planted_seconds = 0.5

    def facts(self, run: Run) -> dict[str, Any]:
        return {"loaded": False}


def check(
    output: Path, stages: Sequence[Stage], quick: machine.Machine | None = None, **options: Any
) -> tuple[int, dict[str, Any]]:
    """Exit status and results of a check in this process."""
    quick = quick or Quick()
    run = Run(quick, output, jobs=2, limits=quick.limits, **options)
    status = cli.check(run, stages)
    shutil.rmtree(run.scratch)
    return status, json.loads((output / "results.json").read_text())


def named(*names: str) -> list[Stage]:
    return [stage for stage in STAGES if stage.name in names]


def outcomes(results: dict[str, Any], outcome: str) -> dict[str, str]:
    """The texts of the cases that ended so."""
    return {name: case["text"] for name, case in summary.all_cases(results).items() if case["outcome"] == outcome}


# ---- all of it ----


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """A dry run of every stage, as it is called on the command line; away from the checkout, without git."""
    output = tmp_path_factory.mktemp("dry") / "output"
    env = {**os.environ, "WARPFORM_COMMIT": "abc123", "OUT": str(output)}
    command = [sys.executable, str(TOOLS / "gpu_check"), "--dry-run", "--jobs", "2"]
    return subprocess.run(command, cwd=output.parent, env=env, capture_output=True, text=True, timeout=300), output


@pytest.mark.slow
def test_dry_run_finds_the_planted_faults_and_nothing_else(dry):
    done, output = dry
    results = json.loads((output / "results.json").read_text())
    failures = outcomes(results, "failed")
    assert set(failures) == {*PLANTED_TESTS, *PLANTED_OPS, SANITIZED}, done.stdout + done.stderr
    for name, words in {**PLANTED_TESTS, **PLANTED_OPS, SANITIZED: "warpform::planted_kernel"}.items():
        assert words in failures[name], name
    assert done.returncode == 1
    assert not outcomes(results, "not run")
    assert results["facts"]["commit"] == "abc123"
    assert [stage["status"] for stage in results["stages"].values()].count("ERROR") == 0
    assert list(results["stages"]) == [stage.name for stage in STAGES]


@pytest.mark.slow
def test_what_comes_after_a_fault_runs(dry):
    passed = outcomes(json.loads((dry[1] / "results.json").read_text()), "passed")
    for file in ("wrong", "hanging", "crashing", "poisoned"):
        assert f"tests/gpu/test_{file}.py::test_after" in passed
    assert "tests/gpu/test_crowded.py::test_large" in passed and "tests/gpu/test_huge.py::test_huge" in passed
    assert "smoke::planted::last::bfloat16::forward" in passed
    real = {name.split("::")[1] for name in passed if name.startswith("smoke::")} - {"planted"}
    products = {"wgmma_product"} if emulated.LIBRARY.exists() else set()
    assert real == {*emulated.EmulatedMachine.real_families, *products}


@pytest.mark.slow
def test_the_files_agree(dry):
    _, output = dry
    assert {path.name for path in output.iterdir()} <= set(report.FILES)
    cases = summary.all_cases(json.loads((output / "results.json").read_text()))
    bad = {name for name, case in cases.items() if case["outcome"] == "failed"}
    junit = {case.get("name"): case for case in ET.parse(output / "junit.xml").getroot().iter("testcase")}
    assert junit.keys() == cases.keys()
    assert {name for name, case in junit.items() if case.find("failure") is not None} == bad
    assert set(cli.read_failed(output / "failed.txt")) == bad == set(cli.read_failed(output / "results.json"))
    text = (output / "summary.txt").read_text()
    assert all(name in text for name in bad) and "warpform::planted_kernel" in text
    with tarfile.open(output / "logs.tar.gz") as logs:
        assert any("hanging" in name for name in logs.getnames())


@pytest.mark.slow
def test_one_that_broke_its_process_runs_again_alone(dry):
    results = json.loads((dry[1] / "results.json").read_text())
    found = results["stages"]["tests"]["diagnoses"]
    assert found.keys() == {"tests/gpu/test_crashing.py::test_dies", "tests/gpu/test_poisoned.py::test_poisons"}
    for texts in found.values():
        assert texts.keys() == {"blocking", "memcheck"}


# ---- parts ----


def test_failed_runs_exactly_those(tmp_path):
    asked = [*list(PLANTED_TESTS)[:2], *list(PLANTED_OPS)[:2]]
    status, results = check(tmp_path, named("smoke", "tests"), only=asked)
    assert status == 1
    assert summary.all_cases(results).keys() == set(asked)


def test_failed_passes_once_it_is_mended(tmp_path, monkeypatch):
    monkeypatch.setitem(emulated.TESTS, "test_wrong.py", "def test_fails(): pass\n\ndef test_after(): assert False\n")
    status, results = check(tmp_path, named("smoke", "tests"), only=["tests/gpu/test_wrong.py::test_fails"])
    assert status == 0
    assert outcomes(results, "passed").keys() == {"tests/gpu/test_wrong.py::test_fails"}
    assert (tmp_path / "failed.txt").read_text() == ""


def test_budget_skips_and_says_so(tmp_path):
    status, results = check(tmp_path, named("smoke", "tests", "profile"), budget=5.0)
    assert status == 0 and not outcomes(results, "failed")
    assert outcomes(results, "not run").keys() == {"stage::smoke", "stage::tests", "stage::profile"}
    assert "without a verdict: smoke, tests, profile" in results["verdict"]
    assert cli.read_failed(tmp_path / "failed.txt") == ["stage::smoke", "stage::tests", "stage::profile"]


@pytest.mark.slow
def test_stage_without_time_leaves_the_rest_unrun(tmp_path, monkeypatch):
    for name in set(emulated.TESTS) - {"test_hanging.py"}:
        monkeypatch.delitem(emulated.TESTS, name)
    quick = Quick()
    quick.limits = replace(quick.limits, test=60.0)
    _, results = check(tmp_path, [replace(named("tests")[0], needs=0.1)], quick, budget=5.5)
    left = outcomes(results, "not run")
    assert left.keys() <= {
        "tests/gpu/test_hanging.py",
        *(f"tests/gpu/test_hanging.py::test_{name}" for name in ("hangs", "after", "before")),
    }
    assert left and not outcomes(results, "failed")


def test_signal_in_the_middle_leaves_complete_files(tmp_path, monkeypatch):
    for name in set(emulated.TESTS) - {"test_hanging.py", "test_well.py"}:
        monkeypatch.delitem(emulated.TESTS, name)
    quick = Quick()
    quick.limits = replace(quick.limits, test=60.0)

    def terminate() -> None:
        until = time.monotonic() + 30
        while time.monotonic() < until and not list(tmp_path.glob("*/begun")):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    begun = f"def test_before(): pass\n\ndef test_hangs():\n    open({str(tmp_path / 'a' / 'begun')!r}, 'w').close()\n"
    monkeypatch.setitem(emulated.TESTS, "test_hanging.py", begun + "    time.sleep(600)\n\ndef test_after(): pass\n")
    (tmp_path / "a").mkdir()
    thread = threading.Thread(target=terminate)
    thread.start()
    begin = time.monotonic()
    status, results = check(tmp_path / "output", named("tests", "profile"), quick)
    thread.join()
    assert status == 128 + signal.SIGTERM and time.monotonic() - begin < 40
    assert "interrupted by SIGTERM" in results["verdict"]
    assert "tests/gpu/test_hanging.py::test_before" in outcomes(results, "passed")
    assert not outcomes(results, "failed")
    left = outcomes(results, "not run")
    assert {"tests/gpu/test_hanging.py::test_hangs", "stage::tests", "stage::profile"} <= left.keys()
    ET.parse(tmp_path / "output" / "junit.xml")
    with tarfile.open(tmp_path / "output" / "logs.tar.gz") as logs:
        assert logs.getnames()


def test_exception_in_a_stage_ends_that_stage_only(tmp_path):
    def broken(run: Run) -> Outcome:
        run.case("first", "first::part", "passed")
        raise ValueError("nobody thought of this")

    def well(run: Run) -> Outcome:
        run.case("second", "second::part", "passed")
        return run.judge("second")

    stages = [Stage(1, "first", 10, broken, 0), Stage(2, "second", 10, well, 0)]
    status, results = check(tmp_path, stages)
    assert status == 1
    assert "nobody thought of this" in outcomes(results, "failed")["stage::first"]
    assert results["stages"]["second"]["status"] == "ok"


def test_long_file_is_shared_by_processes(tmp_path, monkeypatch):
    for name in list(emulated.TESTS):
        monkeypatch.delitem(emulated.TESTS, name)
    many = "@pytest.mark.parametrize('i', range(40))\ndef test_one(i): time.sleep(0.1)\n"
    monkeypatch.setitem(emulated.TESTS, "test_long.py", many)
    status, results = check(tmp_path, named("tests"))
    assert status == 0 and len(outcomes(results, "passed")) == 40
    with tarfile.open(tmp_path / "logs.tar.gz") as logs:
        assert sorted(logs.getnames()) == ["tests-gpu-test_long-1.txt", "tests-gpu-test_long-2.txt"]


def test_broken_file_is_one_failure(tmp_path, monkeypatch):
    monkeypatch.setitem(emulated.TESTS, "test_wrong.py", "import no_such_module\n")
    _, results = check(tmp_path, named("tests"), only=["tests/gpu/test_wrong.py"])
    assert outcomes(results, "failed").keys() == {"tests/gpu/test_wrong.py"}
    assert "no_such_module" in outcomes(results, "failed")["tests/gpu/test_wrong.py"]


def test_without_pytest_it_is_one_sentence(tmp_path, monkeypatch, capsys):
    found = machine.importlib.util.find_spec
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: None if name == "hypothesis" else found(name))
    assert check(tmp_path, STAGES, machine.Machine())[0] == 2
    assert capsys.readouterr().err.startswith("gpu-check: hypothesis is missing in ")


# ---- pieces ----


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    made = Run(Quick(), tmp_path)
    yield made
    shutil.rmtree(made.scratch)


def test_command_that_ignores_signals_is_killed_with_its_children(run, tmp_path):
    child = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    parent = (
        "import signal, subprocess, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        f"subprocess.run([sys.executable, '-c', {child!r}])"
    )
    done = run.command("stubborn", [sys.executable, "-c", parent], seconds=1.5)
    assert done.timed_out and done.status == -signal.SIGKILL and done.seconds < 20
    pid = int((tmp_path / "pid").read_text())
    # A process that was killed is there until it has run once more, which on a busy machine takes a moment.
    deadline = time.monotonic() + 20
    while _lives(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _lives(pid)


def _lives(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().split()
    except OSError:
        return False


def test_command_that_does_not_exist(run):
    done = run.command("missing", ["/no/such/command"], seconds=1)
    assert not done.ok and done.status is None and "No such file" in done.text


def test_logs_are_cut_and_packed_below_the_limit(run, monkeypatch):
    monkeypatch.setattr(report, "LOG_BYTES", 50_000)
    (run.logs / "long.txt").write_bytes(b"first line\n" + os.urandom(300_000) + b"\nlast line")
    packed = report.pack(run.logs)
    assert len(packed) < 50_000


def test_shares_of_a_budget(run):
    run._budget = 255.0
    first = STAGES[:4]
    machine_share, smoke, sanitizer, tests = (cli.share(run, stage, first[i + 1 :]) for i, stage in enumerate(first))
    assert machine_share == pytest.approx(STAGES[0].needs, abs=30)
    assert smoke >= STAGES[1].needs and sanitizer < tests <= 255
    # The last of the stages may have all that is left, up to its own limit.
    assert tests == pytest.approx(255, abs=2)


MEMCHECK = """torch says something
============================= test session starts ==============================
========= COMPUTE-SANITIZER
========= Invalid __shared__ write of size 4 bytes
=========     at void warpform::window_attention_forward<warpform::bf16_t, (int)32>(warpform::WindowParams)+0xa10
=========     by thread (3,0,0) in block (0,1,0)
=========     Address 0x1400 is out of bounds
=========         Device Frame: a frame
=========
========= Invalid __shared__ write of size 4 bytes
=========     at void warpform::window_attention_forward<warpform::f16_t, (int)32>(warpform::WindowParams)+0xa10
=========     by thread (3,0,0) in block (0,1,0)
=========
========= Program hit cudaErrorLaunchFailure (error 719) due to "unspecified launch failure" on CUDA API call.
=========
========= ERROR SUMMARY: 3 errors
"""
RACECHECK = """========= COMPUTE-SANITIZER
========= Error: Race reported between Read access at warpform::(anonymous namespace)::scan_lengths(P)+0x280
=========     and Write access at warpform::(anonymous namespace)::scan_lengths(P)+0xa0 [508 hazards]
=========
========= RACECHECK SUMMARY: 3 hazards displayed (1 error, 2 warnings)
"""


def test_sanitizer_report():
    found = sanitizer_report.parse(MEMCHECK)
    assert found.errors == 3
    assert list(found.kernels) == ["warpform::window_attention_forward", "(no kernel of warpform)"]
    assert "bf16_t" in found.kernels["warpform::window_attention_forward"]
    races = sanitizer_report.parse(RACECHECK)
    assert (races.errors, races.warnings) == (1, 2)
    (kernel, block), *others = races.kernels.items()
    assert not others and kernel == "warpform::(anonymous namespace)::scan_lengths" and "508 hazards" in block
    found.add(races)
    assert (found.errors, found.warnings, len(found.kernels)) == (4, 2, 3)
    nothing = sanitizer_report.parse("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n")
    assert nothing.errors == 0 and not nothing.kernels
    assert sanitizer_report.parse("Segmentation fault").errors is None
    # An error of the tool's own is no verdict on the kernels, unless it comes with one.
    internal = "========= Internal Sanitizer Error: The Sanitizer failed to handle a hardware exception.\n"
    gave_up = sanitizer_report.parse(
        f"{internal}=========\n========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n"
    )
    assert gave_up.gave_up and gave_up.errors == 1 and not races.gave_up and not nothing.gave_up
    gave_up.add(races)
    assert not gave_up.gave_up


def test_every_gpu_test_is_found(run):
    files = {path.relative_to(TOOLS.parent / "tests").as_posix() for path in machine.Machine().test_files(run)}
    for folder in ("gpu", "conformance"):
        assert {f"{folder}/{path.name}" for path in (TOOLS.parent / "tests" / folder).glob("test_*.py")} <= files
    assert {"test_packing.py", "models/bert/test_bert.py"} <= files and "test_gpu_check.py" not in files


def test_own_frames():
    stacks = 'Thread 1:\n  File "/x/_pytest/python.py", line 1 in f\n  File "/tests/gpu/test_a.py", line 2 in test_b\n'
    assert suites.own_frames(stacks) == 'Thread 1:\n  File "/tests/gpu/test_a.py", line 2 in test_b'


def test_failures_that_are_alike_are_told_once():
    cases = {
        f"tests/a.py::test_{i}": {
            "outcome": "failed",
            "group": "tests/a.py",
            "text": f"tests/a.py:{i}: in f\nE   off by {i}e-3",
        }
        for i in range(9)
    }
    results = {"verdict": "FAILED", "seconds": 1.0, "facts": {}, "stages": {"tests": {"cases": cases}}}
    last = summary.brief(results).splitlines()[-1]
    assert last == "FAILED tests/a.py::test_0: off by 0e-3 (and 8 like it)"
    text = summary.summary(results)
    assert text.count("in f") == 1 and all(name in text for name in cases)


def test_stages_by_number_and_name():
    options = cli.parser().parse_args(["--stages", "4,smoke"])
    assert [stage.name for stage in options.stages] == ["smoke", "tests"]
    with pytest.raises(SystemExit):
        cli.parser().parse_args(["--stages", "9"])
