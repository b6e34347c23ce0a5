"""doctor: right where all is well, and useful where much is broken."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import warpform
from warpform import _direct, _hardware, _library, _torch_private, cli
from warpform.cli import doctor, self_test
from warpform.nn import _product
from warpform.ops import _register

PACKAGE = Path(warpform.__file__).resolve().parent
OPS = set(_register.ops())


def run_doctor(*path: Path) -> tuple[int, dict, str]:
    """Exit status, JSON report and text of doctor in processes whose sys.path begins with `path`."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "warpform", "doctor"]
    as_json = subprocess.run([*command, "--json"], env=env, cwd=path[0], capture_output=True, text=True, timeout=120)
    as_text = subprocess.run(command, env=env, cwd=path[0], capture_output=True, text=True, timeout=120)
    assert "Traceback" not in as_json.stderr + as_text.stderr
    assert as_json.returncode == as_text.returncode
    return as_json.returncode, json.loads(as_json.stdout), as_text.stdout


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(PACKAGE, tmp_path / "copy" / "warpform", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "copy"


def test_all_is_well(capsys):
    assert doctor.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and report["warpform"]["loaded"]
    assert report["torch"]["version"] == torch.__version__
    assert report["binary"]["version"] == warpform.__version__
    assert {row["op"] for row in report["backends"]} == OPS
    assert {row["op"] for row in report["self_test"]} == OPS
    assert doctor.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    on_cpu = report["binary"]["cpu_kernels"]
    for op in OPS:
        backend = "cpu" if op in on_cpu else "reference"
        assert [line.split()[1] for line in lines if line.split()[:1] == [op]] == [backend, "cpu"]
    assert lines[-1] == "everything works"


def test_what_runs_on_the_cpu(quick, capsys, monkeypatch):
    report = doctor.examine()
    kernels = report["machine"]["cpu_kernels"]
    assert kernels["isa"] == (_library.cpu_isa() or None) and (kernels["isa"] is None) == (
        kernels["missing"] is not None
    )
    assert report["torch"]["threads"] == torch.get_num_threads()
    shown = "\n".join(doctor._lines(report))
    assert f"kernels for {kernels['isa']}; " in shown or "no kernels: " in shown
    monkeypatch.setenv("WARPFORM_ONEDNN", "1")
    if _torch_private.onednn_linear() is not None:
        assert doctor.examine()["machine"]["cpu_kernels"]["onednn"]
        assert "float32 products by oneDNN" in doctor._cpu_text(doctor.examine())
    monkeypatch.setenv("WARPFORM_ONEDNN", "0")
    assert "float32 products by the library that torch chooses; " in doctor._cpu_text(doctor.examine())
    monkeypatch.setenv("WARPFORM_ONEDNN", "auto")
    monkeypatch.delenv("WARPFORM_BACKEND", raising=False)
    monkeypatch.setattr(_product, "_is_amd", lambda: True)
    assert ("; of up to 8 rows without a gradient by a kernel; " in doctor._cpu_text(doctor.examine())) is bool(
        kernels["isa"]
    )
    monkeypatch.setattr(_product, "_is_amd", lambda: False)
    assert "by a kernel" not in doctor._cpu_text(doctor.examine())
    monkeypatch.setattr(_library, "cpu_isa", lambda: "")
    monkeypatch.setattr(_library, "cpu_kernels_missing", lambda: "this CPU has no AVX2, which the CPU kernels need")
    assert "no kernels: this CPU has no AVX2" in doctor._cpu_text(doctor.examine())


def test_the_self_test_says_what_ran_on_the_cpu():
    row = {
        "op": "a",
        "device": "cpu",
        "dtype": "float32",
        "direction": "forward",
        "ok": True,
        "problem": None,
        "ms": 1.0,
    }
    tests = [row | {"ran": "kernel"}, row | {"op": "b", "ran": "reference"}, row | {"op": "c", "ran": "kernel"}]
    tests += [row | {"op": "c", "ran": "kernel and reference"}, row | {"op": "d", "device": "cuda", "ran": "kernel"}]
    shown = {line.split()[0]: line.partition("  ok in float32")[2] for line in doctor._test_lines(tests)[1:]}
    assert shown == {"a": ", by kernel", "b": ", by reference", "c": ", by kernel and reference", "d": ""}


HOPPER = [{"name": "GPU", "capability": "9.0"}]


@pytest.mark.parametrize(
    ("built", "gpus", "reason", "says"),
    [
        ("", HOPPER, "", "none, not built: no 90a in WARPFORM_CUDA_ARCHS, or no nvcc"),
        ("90a", [], "", "none, torch sees no GPU"),
        ("90a", {"error": "no driver"}, "", "none, torch sees no GPU"),
        ("90a", HOPPER, "WARPFORM_HOPPER=0", "none, WARPFORM_HOPPER=0"),
        ("90a", HOPPER, "", "where one serves the call"),
    ],
)
def test_whether_kernels_for_hopper_run(monkeypatch, quick, built, gpus, reason, says):
    facts = _library.build_info() | {"hopper": built, "cuda": "13.0"}
    monkeypatch.setattr(_library, "build_info", lambda: facts)
    monkeypatch.setattr(_library, "hopper_kernels_missing", lambda device: reason)
    found = doctor._hopper_kernels({"gpus": gpus})
    assert found["built"] is bool(built) and (found["missing"] is None) is (says == "where one serves the call")
    assert doctor._hopper_text(found) == f"kernels for Hopper: {says}"
    assert doctor._hopper_text({"error": "broken"}) == "kernels for Hopper: none, broken"
    assert any(line.strip().startswith("kernels for Hopper: ") for line in doctor._lines(doctor.examine()))


@pytest.mark.parametrize(
    ("threads", "cores", "advice"),
    [
        (2, 2.0, None),
        (2, 1.5, None),
        (1, 0.5, None),
        (None, 1.0, None),
        (4, None, None),
        (4, 1.5, "torch has 4 threads, and this process is granted 1.5 cores: set OMP_NUM_THREADS=1,"),
        (16, 2.0, "torch has 16 threads, and this process is granted 2 cores: set OMP_NUM_THREADS=2,"),
    ],
)
def test_more_threads_than_cores(threads, cores, advice):
    found = doctor._too_many_threads(threads, cores)
    assert found is None if advice is None else found.startswith(advice) and "OMP_WAIT_POLICY=passive" in found


def test_more_threads_than_cores_is_advice(quick, monkeypatch):
    monkeypatch.setattr(_hardware, "granted_cores", lambda: 1.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    report = doctor.examine()
    assert report["ok"] and any("OMP_NUM_THREADS=1" in sentence for sentence in report["advice"])


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {}, None),
        ("0::/a/b\n", {"a/cpu.max": "50000 100000\n", "a/b/cpu.max": "max 100000\n"}, 0.5),
        ("0::/a/b\n", {"a/cpu.max": "300000 100000\n", "a/b/cpu.max": "200000 100000\n"}, 2.0),
        (
            "4:cpu,cpuacct:/x\n3:cpuset:/\n",
            {"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"},
            2.0,
        ),
        ("1:cpu:/x\n", {"cpu/x/cpu.cfs_quota_us": "-1\n", "cpu/x/cpu.cfs_period_us": "100000\n"}, None),
        ("1:cpu:/x\n", {"cpu/x/cpu.cfs_quota_us": "50000\n", "cpu/x/cpu.cfs_period_us": "100000\n"}, 0.5),
        ("0::/\n", {"cpu.max": "nonsense\n"}, None),
    ],
)
def test_quotas_of_control_groups(groups, files, cores, tmp_path):
    (tmp_path / "cgroup").write_text(groups)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert _hardware._quota(tmp_path / "cgroup", tmp_path) == cores


def test_granted_cores(monkeypatch):
    cores = len(os.sched_getaffinity(0))
    monkeypatch.setattr(_hardware, "_quota", lambda: 0.5)
    assert _hardware.granted_cores() == 0.5
    monkeypatch.setattr(_hardware, "_quota", lambda: None)
    assert _hardware.granted_cores() == cores
    vendor, features = _hardware.cpu_features()
    assert isinstance(vendor, str) and all(" " not in feature for feature in features)


@pytest.mark.parametrize("text", ["raise OSError('libcudart.so.13: cannot open')", "__version__ = '2.1.0'"])
def test_broken_torch(copy, tmp_path, text):
    (tmp_path / "fake" / "torch").mkdir(parents=True)
    (tmp_path / "fake" / "torch" / "__init__.py").write_text(text)
    status, report, shown = run_doctor(tmp_path / "fake", copy)
    assert status == 1 and not report["ok"]
    assert "torch" in report["warpform"]["error"]
    assert report["machine"]["cpu"]["cores"] >= 1
    assert "NOT LOADED" in shown and "something is wrong" in shown


def test_no_library(copy):
    (copy / "warpform" / "libwarpform.so").unlink()
    status, report, shown = run_doctor(copy)
    assert status == 1
    assert "does not exist" in report["warpform"]["error"]
    assert report["torch"]["version"] == torch.__version__
    assert {row["backend"] for row in report["backends"]} == {"none"}
    assert "not run, the library is not loaded" in shown


@pytest.fixture
def quick(monkeypatch):
    """A self-test of one family."""
    families = {"short_conv": self_test.families()["short_conv"]}
    monkeypatch.setattr(self_test, "families", lambda: families)


def test_a_failure_is_reported(monkeypatch, capsys, quick):
    monkeypatch.setattr(self_test, "_difference", lambda *tensors: "is off by 1, allowed are 0")
    assert doctor.main(["--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert {row["op"] for row in report["self_test"] if not row["ok"]} == {
        "short_conv_gate", "short_conv_gate_backward",
    }  # fmt: skip
    assert doctor.main([]) == 1
    text = capsys.readouterr().out
    failures = re.findall(r"FAILED in (\d+) of (\d+) tests", text)
    assert len(failures) == 2 and all(failed == tests for failed, tests in failures)
    assert "something is wrong" in text
    assert "  FAILED: float32, backward: 3 taps: gradient 0 is off by 1, allowed are 0" in text


def test_an_op_that_raises_is_found(monkeypatch, quick):
    def broken(*args):
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(self_test, "_forward", broken)
    rows = {(row["op"], row["direction"]): row for row in doctor.examine()["self_test"]}
    assert rows["short_conv_gate", "forward"]["problem"] == "RuntimeError: broken on purpose"
    assert rows["short_conv_gate", "backward"]["ok"]


def test_every_probe_is_guarded(monkeypatch):
    def broken(*args):
        raise ValueError("broken on purpose")

    probes = (
        "_packages",
        "_torch",
        "_binary",
        "_cpu",
        "_nvidia_smi",
        "_driver",
        "_nvcc",
        "_hopper_kernels",
        "_backends",
    )
    probes += ("_self_tests",)
    for probe in probes:
        monkeypatch.setattr(doctor, probe, broken)
    report = doctor.examine()
    assert not report["ok"]
    assert "\n".join(doctor._lines(report)).count("broken on purpose") >= 4


@pytest.mark.parametrize(
    "archs, capability, covered",
    [
        ("80 90a-real", "8.0", True),
        ("80 90a-real", "8.9", True),
        ("80 90a-real", "9.0", True),
        ("80 90a-real", "12.0", True),
        ("80 90a-real", "7.5", False),
        ("90a-real", "10.0", False),
        ("80-real", "9.0", False),
        ("80-virtual", "8.0", True),
        ("100f-real 120", "12.1", True),
        ("", "8.0", False),
    ],
)
def test_which_gpu_an_architecture_serves(archs, capability, covered):
    assert doctor._covers(archs, capability) is covered


@pytest.mark.parametrize(
    ("archs", "capability", "says"),
    [
        ("80", "9.0", "WARPFORM_CUDA_ARCHS=90a-real"),
        ("80 90a-real", "12.0", "WARPFORM_CUDA_ARCHS=120-real"),
        ("80", "8.9", None),
        ("90a-real", "9.0", None),
        ("90a-real", "8.0", None),  # no kernel runs there, and the backends say so
    ],
)
def test_says_where_the_driver_compiles_the_kernels(monkeypatch, archs, capability, says):
    monkeypatch.setattr(_library, "stale_sources", lambda: None)
    report = {
        "binary": {"cuda": "13.0", "cuda_archs": archs},
        "machine": {"gpus": [], "driver_cuda": "13.0"},
        "torch": {"gpus": [{"name": "GPU", "capability": capability}]},
    }
    advice = " ".join(doctor._advice(report))
    assert (says in advice) if says else not advice


def backends(
    monkeypatch, gpus: list[dict], binary: dict, backend: str = "auto", driver: str = "13.0"
) -> dict[str, tuple[str, str]]:
    monkeypatch.setenv("WARPFORM_BACKEND", backend)
    report = {
        "warpform": {"loaded": True},
        "torch": {"cuda": "13.0", "gpus": gpus},
        "binary": binary,
        "machine": {"driver_cuda": driver},
    }
    return {row["op"]: (row["backend"], row["why"]) for row in doctor._backends(report)}


def test_backend_of_each_op(monkeypatch):
    gpu = {"name": "GPU", "capability": "9.0"}
    built = {"cuda": "13.0", "cuda_archs": "80 90a-real", "kernels": {"pack": [{"dtype": "any"}]}}
    rows = backends(monkeypatch, [gpu], built)
    assert rows["pack"] == ("cuda", "any")
    assert rows["bias_gelu"] == ("reference", "has no kernel in this version")
    assert backends(monkeypatch, [gpu], built, "reference")["pack"] == ("reference", "WARPFORM_BACKEND=reference")
    assert backends(monkeypatch, [], built)["pack"] == ("reference", "CPU: torch sees no GPU")
    on_cpu = {"cpu_isa": "x86-64-v3", "cpu_kernels": {"pack": [{}], "bias_gelu": [{"dtype": "float32"}]}}
    assert backends(monkeypatch, [], built | on_cpu)["pack"] == ("cpu", "x86-64-v3: any dtype")
    assert backends(monkeypatch, [], built | on_cpu)["bias_gelu"] == ("cpu", "x86-64-v3: float32")
    assert backends(monkeypatch, [], built | on_cpu, "reference")["pack"][0] == "reference"
    assert backends(monkeypatch, [gpu], {"cuda": "", "kernels": {}})["pack"][1] == "the library was built without nvcc"
    old = {"name": "GPU", "capability": "7.5"}
    assert "compute capability 7.5" in backends(monkeypatch, [old], built)["pack"][1]
    assert "the driver serves CUDA 12.4" in backends(monkeypatch, [gpu], built, driver="12.4")["pack"][1]


@pytest.mark.parametrize(
    ("driver", "built", "says"),
    [
        ("13.0", "13.0", None),
        ("13.0", "13.2", None),
        ("14.1", "13.0", None),
        ("12.8", "13.0", "update the driver to 580 or later, or build warpform with nvcc 12"),
        ("11.8", "12.4", "update the driver to 525 or later, or build warpform with nvcc 11"),
        ("13.0", "15.0", "update the driver, or build warpform with nvcc 13"),
        (None, "13.0", None),
        ({"error": "no driver"}, "13.0", None),
        ("12.8", "", None),
    ],
)
def test_what_an_old_driver_needs(monkeypatch, driver, built, says):
    monkeypatch.setattr(_library, "stale_sources", lambda: None)
    sentence = doctor._old_driver(driver, built)
    assert sentence is None if says is None else says in sentence
    machine = {"driver_cuda": driver, "gpus": [{"name": "GPU"}]}
    assert doctor._advice({"binary": {"cuda": built}, "machine": machine, "torch": {}}) == (
        [sentence] if sentence else []
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [("WARPFORM_BACKEND", "foo"), ("WARPFORM_STRICT", "yes"), ("WARPFORM_VALIDATE", "true"), ("WARPFORM_LOG", "1"),
     ("WARPFORM_CUDA", "on"), ("WARPFORM_ONEDNN", "yes"), ("WARPFORM_CPU_ISA", "avx")],
)  # fmt: skip
def test_settings_that_cannot_be_are_problems(monkeypatch, capsys, quick, name, value):
    monkeypatch.setenv(name, value)
    assert doctor.main([]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"problem   {name} must be ") and repr(value) in line for line in lines)
    assert lines[-1] == "something is wrong; see above"


def test_a_library_of_other_sources_is_told(monkeypatch, capsys, quick):
    monkeypatch.setattr(_library, "stale_sources", lambda: "the library was built from other sources")
    assert doctor.main([]) == 0
    assert "advice    the library was built from other sources" in capsys.readouterr().out.splitlines()


def test_plans_of_every_op(monkeypatch, capsys):
    monkeypatch.setattr(self_test, "run", lambda *given, **how: iter([]))
    doctor.main(["--plans", "--json"])
    plans = json.loads(capsys.readouterr().out)["plans"]
    doctor.main(["--plans"])
    text = capsys.readouterr().out
    if importlib.util.find_spec("warpform._C") is None:
        assert "launch plans: ModuleNotFoundError" in text and "error" in plans
        return
    assert {row["op"] for row in plans["launches"]} == OPS
    if _library.build_info()["cuda"]:
        assert "launch plans for " in text and " varlen_attention_forward<" in text
        assert all(row["waves"] > 0 for row in plans["launches"] if "no_kernel" not in row)
        assert torch.cuda.is_available() or "only a GPU says how many blocks" in text
    else:
        assert all("no_kernel" in row for row in plans["launches"])
        assert "no kernel: " in text


def test_plans_of_a_gpu_that_kernels_do_not_run_on(monkeypatch, capsys):
    module = pytest.importorskip("warpform._C")
    monkeypatch.setattr(self_test, "run", lambda *given, **how: iter([]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    monkeypatch.setattr(_direct, "launch_limits", lambda index: {"sm_count": 40, "shared_memory_limit": 65536})
    asked = []
    monkeypatch.setattr(module, "supported", lambda op, device: asked.append(device) or "this GPU is too old")
    plans = doctor._plans()
    assert plans["machine"] == {"name": "Tesla T4", "sm_count": 40, "shared_memory_limit": 65536}
    assert set(asked) == {"cuda:0"}
    assert {row["no_kernel"] for row in plans["launches"]} == {"this GPU is too old"}


def test_commands(capsys):
    assert cli.main([]) == 2
    text = capsys.readouterr().out
    assert all(f"  {name} " in text and command.help in text for name, command in cli.COMMANDS.items())
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    assert cli.main(["bench", "--help"]) == 0
    with pytest.raises(SystemExit) as ended:
        cli.main(["docter"])
    assert ended.value.code == 2
    assert "invalid choice: 'docter'" in capsys.readouterr().err


def test_library_is_where_doctor_says(capsys):
    doctor.main(["--json"])
    assert Path(json.loads(capsys.readouterr().out)["warpform"]["library"]) == _library.library_path()
