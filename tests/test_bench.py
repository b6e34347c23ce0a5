"""Every benchmark once at a tiny size, the rows it would record, and the report on them."""

from __future__ import annotations

import csv
import ctypes
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest
import torch
from torch.utils._pytree import tree_map

import warpform
from warpform import _direct, _library
from warpform.cli import bench

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"
if not BENCH.is_dir():
    pytest.skip("needs a checkout", allow_module_level=True)
pytest.importorskip("pytest_benchmark")
pytest.importorskip("transformers")

# One run of all benchmarks serves several tests.
pytestmark = pytest.mark.one_worker


sys.path.insert(0, str(BENCH))

import busy  # noqa: E402
import harness  # noqa: E402
import plans  # noqa: E402
import report  # noqa: E402
from suites import DEADLINES, FAMILIES  # noqa: E402


def load_conftest() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_conftest", BENCH / "conftest.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


conftest = load_conftest()


def test_a_family_is_declared_in_one_place() -> None:
    """What FAMILIES names is a file with benchmarks and a row of the docs, and the other way round."""
    files = {path.stem for path in (BENCH / "suites").glob("*.py") if "\ndef specs(" in path.read_text()}
    rows = re.findall(r"^\| `bench/suites/(\w+)\.py` \|", (ROOT / "docs" / "benchmarks.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(FAMILIES) == sorted(files)
    assert list(DEADLINES.values())[-1] == pytest.approx(1)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows of a tiny run, made as a user makes them."""
    folder = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-m", "warpform", "bench", "--tiny", "--results", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "python"), "WARPFORM_COMMIT": "0123456789ab"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder, env=environment)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "best peer / warpform" in done.stdout
    return folder


@pytest.mark.slow
def test_every_benchmark_runs(results: Path) -> None:
    rows = report.read(results)
    assert {row["family"] for row in rows} == set(FAMILIES)
    # Projections and spectra are made once, outside of any model's forward.
    ops = {name for name in warpform.ops.__all__ if not name.startswith("project_")} - {"fft_conv_spectrum"}
    assert {row["kernel"] for row in rows if row["family"] == "host"} == ops
    assert {row["kernel"] for row in rows} >= ops | {"bert_base", "deberta_v3_base", "swin_t", "m2_bert_80m"}
    for row in rows:
        assert None not in row and row["commit"] and row["date"] and row["device"] and row["torch"]
        timed = bool(row["p50_us"])
        assert timed == (row["status"] == "ok"), row
        if row["provider"] == "warpform":
            assert timed and float(row["p20_us"]) <= float(row["p50_us"]) <= float(row["p80_us"])
        if row["provider"] == "warpform_mma_sync" and row["kind"].startswith("cpu"):
            assert row["status"] == "missing: needs a GPU"
        # What is not timed says why.
        assert timed or row["status"].startswith(("missing: ", "failed: ")), row
        if timed and row["family"] != "host":
            assert float(row["gbs"]) > 0 and float(row["roofline"]) > 0
            assert bool(row["images_s"]) == (row["family"] == "swin")
    # One row for each provider of a workload, and ratios to each that was timed.
    assert max(Counter((row["workload"], row["provider"]) for row in rows).values()) == 1
    for row in rows:
        if row["provider"] == "warpform":
            peers = {r["provider"] for r in rows if r["workload"] == row["workload"] and r["p50_us"]} - {"warpform"}
            assert {part.partition("=")[0] for part in row["ratios"].split()} == peers


@pytest.mark.slow
def test_report(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    page, plots = tmp_path / "report.md", tmp_path / "plots"
    assert report.main(["--results", str(results), "--markdown", str(page), "--plots", str(plots)]) == 0
    text = page.read_text()
    headings = (
        "varlen_attention, backward", "disentangled_attention, forward", "deberta_v3_base, training step",
        "window_attention, forward+backward", "monarch_multiply, forward", "gated_fft_conv, forward+backward",
    )  # fmt: skip
    for words in (
        *(f"## {heading}" for heading in headings),
        "Not timed:",
        "share of roofline",
        "images/s, warpform",
        "tokens/ms, warpform",
    ):
        assert words in text
    assert "| 2 x 6x9, 108 tokens, windows 3x3 shifted 1x1, 2 heads of 16 |" in text
    assert "| 16 to 32 in 4 blocks, 5 tokens |" in text
    for line in text.splitlines():
        if line.startswith("| "):
            assert line.endswith(" |")
    drawn = list(plots.glob("*.svg"))
    names = {
        "attention",
        "decoders",
        "encoder",
        "conv",
        "hidden",
        "m2",
        "mix",
        "models",
        "monarch",
        "norm",
        "ring",
        "swin",
        "window",
    }
    assert {path.stem.rpartition("-")[2] for path in drawn} == names
    assert len(drawn) == len(FAMILIES) - 1, "one for each family but the host's"
    for path in drawn:
        root = ElementTree.parse(path).getroot()
        # Text is kept as text, so what was drawn can be read.
        shapes = [element for element in root.iter() if element.tag.endswith("}path")]
        assert root.tag.endswith("svg") and "warpform" in "".join(root.itertext()) and len(shapes) > 10, path.name
    capsys.readouterr()
    assert report.main(["--results", str(tmp_path)]) == 2
    assert "no results yet" in capsys.readouterr().err
    assert report.main(["--results", str(results), "--device", "no such device"]) == 2


@pytest.mark.slow
def test_pages_are_written_from_results(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Machine, date, commit and files; plots that are there; the same bytes again; and nothing but the blocks.

    README quotes GPUs alone: without one it stays as it is.
    """
    pytest.importorskip("matplotlib")
    folder = tmp_path / "results"
    shutil.copytree(results, folder)
    facts = {"date": "2026-01-02", "device": "a CPU", "dtype": "float32", "torch": "2", "transformers": "5"}
    facts |= {"model": "m", "batch_size": 4, "max_length": 8, "repeats": 3}
    run = {"order": "arrival", "texts": 5, "padding_ratio": 2.5, "transformers_seconds": 2.0, "warpform_seconds": 1.0}
    facts["results"] = [run | {"speedup": 2.0, "max_difference": 1e-7}]
    (folder / "demo-cpu.json").write_text(json.dumps(facts))
    readme, page = tmp_path / "README.md", tmp_path / "docs" / "benchmarks.md"
    page.parent.mkdir()
    readme.write_text("<!-- numbers:begin -->\nkept\n<!-- numbers:end -->\n")
    around = (
        "# Title\n\n<!-- demo:begin -->\n",
        "<!-- demo:end -->\n\nwords\n\n<!-- bench:begin -->\nold\n",
        "<!-- bench:end -->\n",
    )
    page.write_text("".join(around))
    command = ["--results", str(folder), "--readme", str(readme)]
    assert report.main(command) == 2
    assert "does not say at which commit" in capsys.readouterr().err
    (folder / "demo-cpu.json").write_text(json.dumps(facts | {"commit": "abcdef0"}))
    assert report.main(command) == 0
    text = page.read_text()
    assert text.startswith(around[0]) and "\nwords\n" in text and text.endswith(around[2]) and "old" not in text
    row = report.read(folder)[0]
    for words in ("abcdef0", "| speed-up | 2.00x |", row["device"], row["date"][:10], row["commit"], row["torch"]):
        assert words in text
    targets = re.findall(r"\]\(([^)]*)\)", text)
    assert len(targets) > 8 and all((page.parent / target).is_file() for target in targets)
    assert "\nkept\n" in readme.read_text()
    before = {path: path.read_bytes() for path in [readme, page, *(tmp_path / "docs" / "plots").glob("*.svg")]}
    assert report.main(command) == 0
    assert {path: path.read_bytes() for path in before} == before

    page.write_text("no markers\n")
    assert report.main(command) == 2
    assert "demo:begin" in capsys.readouterr().err


@pytest.mark.parametrize("commit", ["0123456789ab (changed)", "unknown", ""])
def test_readme_quotes_no_row_without_a_commit(tmp_path: Path, commit: str, capsys: pytest.CaptureFixture[str]) -> None:
    row = dict.fromkeys(harness.COLUMNS, "") | {"device": "a", "family": "attention", "provider": "warpform"}
    harness.append(tmp_path / "attention.csv", [row | {"p50_us": "1", "status": "ok", "commit": commit}])
    page = tmp_path / "README.md"
    page.write_text("untouched\n")
    assert report.main(["--results", str(tmp_path), "--readme", str(page)]) == 2
    assert "measured at a commit" in capsys.readouterr().err and page.read_text() == "untouched\n"


def gpu_rows(device: str, workloads: list[str], commit: str) -> list[dict[str, str]]:
    """Rows of workloads on a GPU, beside a peer that takes half of the time and one that takes double."""
    row = dict.fromkeys(harness.COLUMNS, "") | {"device": device, "kind": "cuda", "family": "f", "kernel": "k"}
    row |= {"direction": "forward", "date": "2026-01-01T00:00Z", "status": "ok", "commit": commit, "dtype": "bfloat16"}
    times = {"warpform": "2000", "warpform_graphs": "10", "sdpa_cudnn_padded": "1000", "slow": "4000"}
    return [
        row | {"workload": workload, "provider": provider, "p50_us": us}
        for workload in workloads
        for provider, us in times.items()
    ]


def test_readme_quotes_the_fastest_peer_of_the_gpu_with_most_workloads(tmp_path: Path) -> None:
    names = [*report.readme.QUOTED, "another"]
    rows = gpu_rows("A", names[:1], "a1") + gpu_rows("B", names, "b1")
    rows += [row | {"device": "C", "kind": "cpu"} for row in gpu_rows("C", names, "c1")]
    found = report.newest(rows)
    assert report.readme.quoted_device(found) == "B"
    assert report.readme.quoted_device({"C": found["C"]}) is None and report.readme.quoted_device({}) is None
    lines = report.readme.numbers("B", found["B"], "plot.svg", "Words.")
    assert lines[0].endswith("](plot.svg)") and "commit b1" in " ".join(lines) and lines[-1].endswith("Words.")
    table = [line for line in lines if line.startswith("| ")][1:]
    labels = list(report.readme.QUOTED.values())
    assert table == [f"| {label} | cuDNN | 1 ms | 2 ms | 0.50x |" for label in labels]


def test_pages_in_the_repository_say_what_results_say() -> None:
    """Every table of figures in README and docs/benchmarks.md; python bench/report --readme writes them."""
    page, long = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
    text, long_text = page.read_text(encoding="utf-8"), long.read_text(encoding="utf-8")
    found = report.newest(filter(report.readme.quotable, report.read(BENCH / "results")))
    drawn = {
        (device, family): ROOT / "docs" / "plots" / report.file_name(device, family)
        for device, kernels in found.items()
        for family in report.figures(device, kernels)
    }
    assert len(drawn) > 10 and all(path.is_file() for path in drawn.values())
    new, long_new = report.readme.filled(page, long, BENCH / "results", found, drawn)
    assert new == text
    assert long_new == long_text
    for name, where in (("numbers", text), ("demo", long_text), ("bench", long_text)):
        assert report.readme.replace(where, name, ["x"]) != where


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

    flops, bytes, images, end_to_end, where, elsewhere = 1e3, 1e3, 0, False, "", ()

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
    conftest.measure_one(session, spec, "warpform", _Benchmark())
    with pytest.raises(AssertionError, match="got 2"):
        conftest.measure_one(session, spec, "wrong", _Benchmark())
    for provider in ("absent", "broken"):
        with pytest.raises(pytest.skip.Exception):
            conftest.measure_one(session, spec, provider, _Benchmark())
    session.flush()
    states = {row["provider"]: row["status"] for row in session.rows}
    assert states["warpform"] == "ok" and states["wrong"].startswith("disagrees: got 2")
    assert states["absent"] == "missing: needs a GPU" and states["broken"] == "failed: RuntimeError: no kernel"


@pytest.mark.parametrize("before", [None, "1"])
def test_a_call_runs_under_a_setting_that_is_restored(before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set while the call runs, in the environment that C reads too; as it was afterwards, also after an error."""
    name = "WARPFORM_TEST_SETTING"
    if before is None:
        monkeypatch.delenv(name, raising=False)
    else:
        monkeypatch.setenv(name, before)
    getenv = ctypes.CDLL(None).getenv
    getenv.restype = ctypes.c_char_p

    def seen() -> tuple[str | None, bytes | None]:
        return os.environ.get(name), getenv(name.encode())

    outside = (before, before and before.encode())
    assert seen() == outside
    call = harness.under(name, "0", seen)
    assert seen() == outside, "wrapping a call sets nothing"
    assert call() == ("0", b"0") and seen() == outside
    assert call() == ("0", b"0") and seen() == outside

    def fails() -> None:
        assert seen() == ("0", b"0")
        raise KeyError("planted")

    with pytest.raises(KeyError, match="planted"):
        harness.under(name, "0", fails)()
    assert seen() == outside


def test_mma_sync_is_timed_where_kernels_for_hopper_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(harness.HOPPER, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(_direct, "launch_limits", lambda device: {"capability": 90})
    reason, served = "", True
    monkeypatch.setattr(_library, "hopper_kernels_missing", lambda device: reason)

    def names(calls: object, **machine: int) -> list[str]:
        assert machine == {"capability": 90}
        return ["hopper" if served and os.environ.get(harness.HOPPER) != "0" else "every GPU"]

    monkeypatch.setattr(plans, "kernels", names)
    seen: list[str | None] = []

    def prepare() -> list:
        return [lambda: seen.append(os.environ.get(harness.HOPPER))] * 2

    def never() -> list:
        raise AssertionError("nothing is prepared where it is missing anyway")

    with pytest.raises(harness.Missing, match="^needs a GPU$"):
        harness.on_mma_sync(harness.Session("cpu"), never)
    gpu = harness.Session("cuda")
    reason = "the GPU's compute capability is not 9.0"
    with pytest.raises(harness.Missing, match=f"^{reason}$"):
        harness.on_mma_sync(gpu, never)
    reason, served = "", False
    with pytest.raises(harness.Missing, match="no kernel for Hopper serves this call"):
        harness.on_mma_sync(gpu, prepare)
    served = True
    calls = harness.on_mma_sync(gpu, prepare)
    seen.clear()
    for call in calls:
        call()
    assert seen == ["0", "0"] and harness.HOPPER not in os.environ

    def broken(*given: object, **machine: int) -> list[str]:
        raise RuntimeError("no plans")

    # Without plans, or with none for any op of the call, both are timed.
    for kernels in (broken, lambda calls, **machine: []):
        monkeypatch.setattr(plans, "kernels", kernels)
        assert len(harness.on_mma_sync(gpu, prepare)) == 2
    assert harness.HOPPER not in os.environ


def test_suites_with_kernels_for_hopper_time_those_on_mma_sync() -> None:
    """Beside warpform's plain call; and the sizes that its aims name, on a GPU alone, are among the main ones."""
    for device in ("cpu", "cuda"):
        session = harness.Session(device)
        found, main = set(), set()
        for family in FAMILIES:
            for spec in importlib.import_module(f"suites.{family}").specs(session):
                if "warpform_mma_sync" in spec.providers:
                    found.add(spec.kernel)
                    assert spec.providers[0] == "warpform" and spec.providers[-1] != "warpform_mma_sync"
                if spec.main:
                    main.add(str(spec))
        layers = {"hidden_gather_linear", "hidden_scatter_linear"}
        assert found == {"varlen_attention", "monarch_multiply", "blockdiag_multiply"} | layers
        aims = {f"{layer}-forward-T8192-d4096" for layer in layers} | {"blockdiag_multiply-forward-T8192-1x8192x8192"}
        assert aims & main == (aims if device == "cuda" else set())
        assert not {aim.replace("forward", "forward+backward") for aim in aims} & main
    attention = {str(spec) for spec in importlib.import_module("suites.attention").specs(harness.Session("cuda"))}
    for size in ("H16-16-D128", "H32-32-D64"):
        assert {f"varlen_attention-forward-B1-S16384-T16384-{size}{mask}" for mask in ("", "-causal")} <= attention


def test_what_warpform_is_compared_with_is_no_mode_of_it() -> None:
    """The plain call stands for warpform though the same without kernels for Hopper took half of its time."""
    times = {"warpform": "10", "warpform_mma_sync": "5", "warpform_all_on": "4", "warpform_graphs": "8", "peer": "20"}
    row = {"family": "f", "kernel": "k", "direction": "forward", "workload": "w", "status": "ok"}
    rows = {provider: row | {"provider": provider, "p50_us": us} for provider, us in times.items()}
    assert report.readme.ratio(rows) == pytest.approx(20 / 8)
    line = harness.summary(list(rows.values()))[1]
    assert line.split()[-5:] == ["1", "1", "2.50,", "2.50,", "2.50"]
    figure = report.plots.Figure(
        "", "", {"w": {"forward": report.plots.Cell(10, {"warpform_mma_sync": 5, "peer": 20})}}
    )
    assert figure.providers() == ["peer", "warpform_mma_sync"], "a grey bar, after those of the peers"


@pytest.mark.skipif(_direct.why_not() is not None, reason=f"no plans: {_direct.why_not()}")
@pytest.mark.skipif(not _library.build_info()["cuda"], reason="needs kernels")
def test_waves_are_those_of_each_op() -> None:
    q = torch.randn(512, 4, 64, dtype=torch.bfloat16)
    cu = torch.tensor([0, 256, 512], dtype=torch.int32)
    step = harness.inference_or_step(
        lambda q, k, v: warpform.ops.varlen_attention(q, k, v, cu, cu, 256, 256), (q, q, q), (q,), True
    )
    calls = plans.ops_of(step)
    names = ["varlen_attention", "varlen_attention_backward"]
    assert [name for name, _, _ in calls] == names
    found, half = plans.waves(calls, sm_count=132), plans.waves(calls, sm_count=66)
    assert list(found) == names
    kernels = plans.kernels(calls, sm_count=132, capability=80)
    assert len(kernels) >= 2 and all("attention" in kernel for kernel in (kernels[0], kernels[-1]))
    for name, value in found.items():
        assert 0 < value < 1 and half[name] == pytest.approx(2 * value, rel=1e-4)
    # float64 has no kernel.
    none = plans.ops_of(lambda: warpform.ops.bias_gelu(q.double(), None))
    assert plans.waves(none) == {} and plans.kernels(none) == []


def test_rows_have_waves(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU; and a call that cannot be planned leaves a row that is timed."""
    found = {"a": 0.1234, "b": 123.4}
    monkeypatch.setattr(harness, "backend", lambda device, call, elsewhere: "kernels")
    monkeypatch.setattr(_direct, "launch_limits", lambda device: {"sm_count": 132})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    def fails(*given: object, **machine: int) -> dict[str, float]:
        raise RuntimeError("CUDA out of memory")

    rows = []
    for waves in (lambda calls, **machine: found, fails):
        monkeypatch.setattr(plans, "waves", waves)
        session = harness.Session("cpu", tiny=True)
        session.facts = {"device": "a"}
        spec = harness.Spec("k", "forward", (), ("warpform",))
        session._spec, session._case = spec, _Case()
        rows.append(session.measure(spec, "warpform")[0])
    assert [row["waves"] for row in rows] == ["a=0.12 b=123.4", ""]
    assert all(row["status"] == "ok" and row["p50_us"] for row in rows)
    assert report.waves(rows[0]) == ", 0.12 waves" and report.waves(rows[1]) == ""


def test_a_cpu_row_says_what_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 8)
    isa = _library.cpu_isa()
    kernels = f"kernels ({isa})" if isa else "reference"

    def call(dtype: torch.dtype) -> torch.Tensor:
        return warpform.ops.bias_gelu(x.to(dtype), None)

    def both() -> None:
        call(torch.float32)
        warpform.ops.blockdiag_multiply(x.double(), torch.randn(2, 4, 4, dtype=torch.float64))

    assert harness.backend("cpu", lambda: call(torch.float32)) == kernels
    assert harness.backend("cpu", lambda: call(torch.float64)) == "reference"
    assert harness.backend("cpu", lambda: x + x) == "reference"
    mixed = f"{kernels}, reference for blockdiag_multiply" if isa else "reference"
    assert harness.backend("cpu", both) == mixed
    assert harness.backend("cpu", lambda: None, ("bias_gelu", "bias_gelu_backward")) == kernels
    monkeypatch.setenv("WARPFORM_BACKEND", "reference")
    assert harness.backend("cpu", lambda: call(torch.float32)) == "reference"


def test_the_ceiling_is_of_the_faster_library(monkeypatch: pytest.MonkeyPatch) -> None:
    from warpform import _torch_private

    slow = harness.ceilings("cpu", torch.float32, tiny=True)[0]
    monkeypatch.setattr(_torch_private, "onednn_linear", lambda: lambda a, b, bias: a)
    assert harness.ceilings("cpu", torch.float32, tiny=True)[0] > slow > 0
    monkeypatch.setattr(_torch_private, "onednn_linear", lambda: None)
    assert harness.ceilings("cpu", torch.float32, tiny=True)[0] > 0


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_busy_processes_run_and_end() -> None:
    with pytest.raises(KeyError), busy.busy(2) as started:
        pids = [process.pid for process in started]
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not all(_seconds(pid) > 0.2 for pid in pids):
            time.sleep(0.05)
        assert len(pids) == 2 and all(_seconds(pid) > 0.2 for pid in pids)
        raise KeyError
    assert not any(map(alive, pids))
    with busy.busy(0) as none:
        assert none == []


def _seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_busy_processes_end_with_their_parent() -> None:
    code = (
        "import busy, os\nwith busy.busy(1) as (one,):\n    print(one.pid, flush=True)\n    os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=BENCH, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == -9
    deadline = time.monotonic() + 60
    while alive(int(done.stdout)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(int(done.stdout))


def test_rows_beside_busy_processes_are_set_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "pytest", "suites/encoder.py", "-k", "bias_gelu and forward", "--tiny", "--busy"]
    command += ["--results", str(tmp_path), "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "python"), "WARPFORM_COMMIT": "0123456789ab"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=BENCH, env=environment)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "beside 1 busy" in done.stdout
    rows = report.read(tmp_path, busy=True)
    assert rows and {row["kind"] for row in rows} == {"cpu beside 1 busy"} and report.read(tmp_path) == []
    assert not any(map(report.readme.quotable, rows))
    assert report.main(["--results", str(tmp_path)]) == 2
    capsys.readouterr()
    assert report.main(["--results", str(tmp_path), "--busy"]) == 0
    assert "beside 1 busy process, warpform" in capsys.readouterr().out
    assert "CPU, beside 1 busy process, " in report.machine(rows[0])


def test_rows_in_another_dtype_are_set_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for dtype, kind in (("", "cpu"), ("float32", "cpu"), ("bfloat16", "cpu in bfloat16")):
        session = harness.Session(device="cpu", tiny=True, results=tmp_path, date=dtype or "own", dtype_name=dtype)
        spec = next(
            spec for spec in importlib.import_module("suites.encoder").specs(session) if spec.kernel == "bias_gelu"
        )
        row, error = session.measure(spec, "warpform")
        session.flush()
        assert error is None and (row["kind"], row["dtype"]) == (kind, dtype or "float32")
    assert [row["date"] for row in report.read(tmp_path)] == ["own", "float32"]
    assert [row["date"] for row in report.read(tmp_path, dtype="bfloat16")] == ["bfloat16"]
    assert report.read(tmp_path, dtype="float16") == []
    assert not any(map(report.readme.quotable, report.read(tmp_path, dtype="bfloat16")))
    assert report.main(["--results", str(tmp_path), "--dtype", "bfloat16"]) == 0
    assert ". bfloat16, " in capsys.readouterr().out


def test_torch_varlen_is_called_as_this_torch_has_it() -> None:
    gqa = {"enable_gqa": True}

    def today(q: None, *, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False) -> None: ...

    def without_gqa(q: None, *, window_size: tuple[int, int] = (-1, -1)) -> None: ...

    def without_window(q: None, is_causal: bool = False) -> None: ...

    options = importlib.import_module("suites.attention").varlen_options
    assert options(today, True, gqa) == {"window_size": (-1, 0), "enable_gqa": True} and options(today, False, {}) == {}
    assert options(without_gqa, True, gqa) == {"window_size": (-1, 0)} and options(without_gqa, False, gqa) == {}
    assert options(without_window, True, gqa) == {"is_causal": True} and options(without_window, False, gqa) == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_check_can_fail(family: str) -> None:
    """Outputs that are a little off are refused, of peers and of warpform alike."""
    session = harness.Session("cpu", tiny=True)
    seen = set()
    for spec in importlib.import_module(f"suites.{family}").specs(session):
        if (spec.kernel, spec.direction) in seen:
            continue
        seen.add((spec.kernel, spec.direction))
        torch.manual_seed(0)
        case = spec.build(session)
        output = case.prepare("warpform")[0]()
        case.check("warpform", output)
        # Of a plan the host's benchmark checks what torch computes too.
        places = (0, 2) if str(spec).startswith("packing_plan-host") else range(len(list(tensors(output))))
        outputs = {"warpform": output}
        if family == "window":  # whose peers return more: what they moved into windows too
            outputs["eager"] = case.prepare("eager")[0]()
        elif family == "decoders":  # whose peers are dense, where warpform's system is another model
            outputs["transformers"] = case.prepare("transformers")[0]()
        elif family != "host":
            outputs[spec.providers[-1]] = output
        if "warpform_mma_sync" in spec.providers:
            outputs["warpform_mma_sync"] = output
        for provider, output in outputs.items():
            case.check(provider, output)
            for i in range(len(list(tensors(output)))) if provider == "eager" else places:
                with pytest.raises(AssertionError):
                    case.check(provider, spoiled(output, i))


def tensors(output: object) -> Iterator[torch.Tensor]:
    """Those that a check looks at: of a Packing what others compute too, of tuples all."""
    if isinstance(output, warpform.Packing):
        yield from (output.cu_seqlens, output.indices)
    elif isinstance(output, torch.Tensor):
        yield output
    else:
        for one in output:
            yield from tensors(one)


def spoiled(output: object, which: int) -> object:
    """The output with one of its tensors off by 1 %, or by 1."""
    output = tree_map(lambda t: t.detach().clone() if isinstance(t, torch.Tensor) else t, output)
    t = list(tensors(output))[which]
    t.add_(1) if not t.is_floating_point() else t.mul_(1.01)
    return output


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("experiment", "rows"), [("model", 4), ("longest", 2)])
def test_ring_experiments(experiment: str, rows: int, tmp_path: Path) -> None:
    """At a tiny size: predictions beside measured times, which are labelled; sequences that fit."""
    out = tmp_path / "out.json"
    command = [sys.executable, str(BENCH / "experiments" / "ring.py"), experiment, "--tiny", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = json.loads(out.read_text())
    assert len(found["rows"]) == rows and found["commit"] and found["device"]
    for row in found["rows"]:
        if experiment == "model":
            assert row["predicted_s"] > 0 and row["measured_s"] > 0 and "(modelled)" in done.stdout
        else:
            assert row["longest"] == 128 * row["ranks"]


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
