"""Stages 5 to 8 of the GPU check with their children replaced: rows, crashes, and the profiler's table."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "tools").is_dir():
    pytest.skip("needs a checkout", allow_module_level=True)
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "bench")]

import harness  # noqa: E402
import rows  # noqa: E402

from gpu_check import measure, ncu  # noqa: E402
from gpu_check.machine import Machine  # noqa: E402
from gpu_check.pretended_ncu import SAMPLE  # noqa: E402
from gpu_check.processes import Done  # noqa: E402
from gpu_check.run import Run  # noqa: E402


class Small(Machine):
    """Dry, with a profiler."""

    dry, device = True, "cpu"

    def ncu(self) -> str | None:
        return "ncu"


class InProcess(Run):
    """Runs bench/rows.py in this process; `children` come first, one for each command."""

    children: list[Callable[[list[str]], Done]]
    seen: list[list[str]]

    def command(self, name: str, argv: Sequence[str], **how: Any) -> Done:
        words = list(argv)
        self.seen.append(words)
        if self.children:
            done = self.children.pop(0)(words)
        else:
            done = Done(rows.main(words[2:]), 1.0, False, "")
        if how.get("stalled"):
            how["stalled"]()
        return done


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[InProcess]:
    monkeypatch.setattr(measure, "DRY_FAMILIES", ("short_conv",))
    monkeypatch.setattr(measure, "ROW_LIMIT", 0)  # it would end this process
    monkeypatch.setattr(measure, "COMPILED_ROW_LIMIT", 0)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # sizes are tiny, and other tests may run beside
    made = InProcess(Small(), tmp_path)
    made.children, made.seen = [], []
    made.results["facts"]["commit"] = "0123456789ab"
    yield made
    torch.set_num_threads(before)
    shutil.rmtree(made.scratch)


def table_of(run: Run) -> list[dict[str, str]]:
    with (run.output / "rows.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_of_three_stages_share_a_table_and_a_date(run: InProcess) -> None:
    for stage in (measure.own_rows, measure.peers, measure.compiled_peers):
        assert stage(run).ok is True
    found = table_of(run)
    assert tuple(found[0]) == harness.COLUMNS
    # Alone; after the eager peer; after the compiled one, which a tiny run leaves out.
    providers = ["warpform"] * 2 + ["torch_eager", "warpform"] * 2 + ["torch_compiled", "warpform"] * 2
    assert [row["provider"] for row in found] == providers
    assert len({row["date"] for row in found}) == 1
    stages = run.results["stages"]
    assert stages["own_rows"]["cases"]["own_rows::short_conv"]["outcome"] == "passed"
    assert len(stages["peers"]["rows"]) == 4
    assert any("torch_eager=" in line for line in stages["peers"]["summary"])


def test_a_crash_costs_one_row(run: InProcess) -> None:
    """The first process dies in its first row, and a second one goes on behind it."""

    def dies(words: list[str]) -> Done:
        journal = next(word.partition("=")[2] for word in words if word.startswith("--journal="))
        workload = "short_conv_gate-forward-batch2-seqlen20-tokens40-hidden8"
        entry = {"event": "begun", "family": "short_conv", "workload": workload, "provider": "warpform"}
        Path(journal).write_text(json.dumps(entry) + "\n")
        return Done(-11, 1.0, False, "Fatal Python error: Segmentation fault")

    run.children = [dies]
    outcome = measure.own_rows(run)
    assert outcome.ok is False and outcome.text == "1 rows timed, 0 missing, 1 failed"
    assert [row["status"] for row in table_of(run)] == ["failed: it ended the process that measured it", "ok"]
    case = run.results["stages"]["own_rows"]["cases"]["own_rows::short_conv"]
    assert case["outcome"] == "failed" and "SIGSEGV" in case["text"] and "Segmentation fault" in case["text"]


def test_no_time_left(run: InProcess) -> None:
    """What was not begun leaves no row, which would stand for one of an earlier stage, but is listed."""
    run.children = [lambda words: Done(rows.main([*words[2:], "--seconds=1e-9"]), 1.0, False, "")]
    assert measure.own_rows(run).ok is None
    case = run.results["stages"]["own_rows"]["cases"]["own_rows::short_conv"]
    assert case["outcome"] == "not run" and case["text"] == "no time left for 2 rows"
    assert not (run.output / "rows.csv").exists()


def test_a_child_that_comes_to_no_row_is_not_called_again(run: InProcess) -> None:
    run.children = [lambda words: Done(-9, 1.0, False, "no torch")] * 5
    outcome = measure.own_rows(run)
    assert outcome.ok is None and len(run.seen) == 1
    case = run.results["stages"]["own_rows"]["cases"]["own_rows::short_conv"]
    assert case["outcome"] == "not run" and "no torch" in case["text"]


def test_profile(run: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    run.children = [lambda words: Done(0, 1.0, False, SAMPLE)]
    outcome = measure.profile(run)
    assert outcome.ok is True and outcome.text == "1 kernels"
    (line,) = run.results["stages"]["profile"]["summary"][2:]
    expected = "1250 | 55.25 | 41.5 | - | - | - | 168 | long_scoreboard 3.5, barrier 0.75 | 2048 | 16 | -"
    workload = "monarch_multiply-forward-T5-4x4x4-4x8x4"
    assert line == f"| {workload} | monarch_forward<bf16_t, MonarchTile<4>> | {expected} |"
    assert "--clock-control=none" in run.seen[0] and "--page=raw" in run.seen[0]
    # A version that knows one of the sections not is asked for what it reads by default.
    run.children = [
        lambda words: Done(1, 1.0, False, "==ERROR== no section"),
        lambda words: Done(0, 1.0, False, SAMPLE),
    ]
    assert measure.profile(run).ok is True
    assert any(word.startswith("--section=") for word in run.seen[1])
    assert not any(word.startswith("--section=") for word in run.seen[2])
    run.children = [lambda words: Done(None, 70.0, True, "")]
    assert measure.profile(run).ok is False
    monkeypatch.setattr(Small, "ncu", lambda self: None)
    assert measure.profile(run).ok is None


def test_columns_of_other_versions() -> None:
    """Names that differ, units of another size, numbers that are not there."""
    conflicts = "l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op"
    names = (
        "ID", "Kernel Name", "gpu__time_duration.sum", f"{conflicts}_ld.sum", f"{conflicts}_st.sum",
        "dram__throughput.avg.pct_of_peak_sustained_elapsed",
        "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    )  # fmt: skip
    rows_of = [names, ("", "", "nsecond", "", "", "%", "%"), ("0", "warpform::k(int)", "2,500", "3", "4", "n/a", "12")]
    text = "\n".join(",".join(f'"{cell}"' for cell in row) for row in rows_of)
    (kernel,) = ncu.parse("==PROF== x\n" + text, ["w"])
    assert (kernel.name, kernel.workload) == ("k", "-")  # no marker said where a workload begins
    assert kernel.values == {"us": "2.5", "bank conflicts": "7", "tensor pipe %": "12"}
    assert ncu.parse("==ERROR== nothing", []) == []


def test_what_is_profiled_is_there() -> None:
    session = harness.Session("cuda")
    for family, workloads in measure.PROFILED.items():
        assert set(workloads) <= {str(spec) for spec in rows.load(family, session) if spec.main}, family
    assert set(measure.FAMILIES) == set(rows.FAMILIES)
