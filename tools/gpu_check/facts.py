"""Stage 1: what this machine and this build are, and the two rates that nothing here can exceed.

Both are asked in children, `python -m gpu_check.facts probe|ceilings FILE DEVICE`: a driver that hangs ends a child.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_check import ROOT
from gpu_check.run import Outcome, Run

STAGE = "machine"
PACKAGES = ("numpy", "pytest", "hypothesis", "transformers", "triton", "pytest-timeout", "pytest-benchmark")


def machine(run: Run) -> Outcome:
    """Measures the ceilings; the facts were gathered before, by `Machine.require`."""
    found = ask(run, "ceilings", 60.0)
    run.record(STAGE, "ceilings", found)
    if "error" in found:
        run.failed(STAGE, "machine::ceilings", found["error"])
        return Outcome(False, "the ceilings could not be measured")
    text = f"bf16 product {found['tflops']:.0f} TFLOP/s, copy {found['gbs']:.0f} GB/s"
    run.results["facts"]["ceilings"] = found
    run.case(STAGE, "machine::ceilings", "passed")
    if run.results["facts"].get("stale_sources"):
        text += "; THE LIBRARY WAS BUILT FROM OTHER SOURCES THAN THESE"
    return Outcome(True, text)


def ask(run: Run, what: str, seconds: float) -> dict[str, Any]:
    """The answer of a child, or {"error": why}."""
    path = run.scratch / f"{what}.json"
    command = [run.python, "-m", "gpu_check.facts", what, str(path), run.machine.device]
    done = run.command(f"facts-{what}", command, seconds=seconds)
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        lines = done.text.strip().splitlines()[-3:]
        return {"error": f"{done.how()}: {' '.join(lines)}"}
    return found


# ---- in the child ----


def probe(device: str) -> dict[str, Any]:
    """Versions, the GPU, the library and its ops, as plain data."""
    import torch

    found: dict[str, Any] = {
        "commit": _guarded(lambda: _bench().commit()),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "gpu": None,
        "cores": len(os.sched_getaffinity(0)),
        "packages": {name: _version(name) for name in PACKAGES},
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = properties.name
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["multiprocessors"] = properties.multi_processor_count
        found["memory_gib"] = round(properties.total_memory / 2**30, 1)
        found["l2_mib"] = round(getattr(properties, "L2_cache_size", 0) / 2**20, 1)
    import warpform
    from warpform import _library

    found["warpform"] = warpform.__version__
    found["loaded"] = _library.loaded()
    if not _library.loaded():
        found["load_error"] = str(_library.load_error())
        return found
    found["build"] = _library.build_info()
    if hasattr(_library, "stale_sources"):
        found["stale_sources"] = _guarded(_library.stale_sources)
    found["families"] = _guarded(lambda: importlib.import_module("warpform.cli.self_test").families())
    found["products"] = _guarded(_products)
    return found


def _products() -> dict[str, tuple[str, ...]]:
    """The layouts of single products, from the module of the tests that checks them."""
    sys.path.append(str(ROOT / "tests"))
    families: dict[str, tuple[str, ...]] = importlib.import_module("helpers.wgmma_product").families()
    return families


def ceilings(device: str) -> dict[str, Any]:
    """By the benchmarks' own measure."""
    import torch

    tflops, gbs = _bench().ceilings(device, torch.bfloat16, device == "cpu")
    return {"tflops": tflops, "gbs": gbs, "dtype": "bfloat16"}


def _bench() -> Any:
    """Imports the module that the benchmarks share."""
    sys.path.insert(0, str(ROOT / "bench"))
    return importlib.import_module("harness")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _guarded(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:
        return f"unknown ({error})"


if __name__ == "__main__":
    what, path, device = sys.argv[1:]
    answer = {"probe": probe, "ceilings": ceilings}[what](device)
    Path(path).write_text(json.dumps(answer, default=str))
