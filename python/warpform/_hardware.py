"""The machine: its CPU, the CUDA compiler on it, and the NVIDIA drivers that a CUDA needs.

The build reads this file too, by its path, so it imports the standard library alone.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

# The first driver that serves each CUDA; later ones of its major version run what an earlier one's toolkit compiled.
DRIVERS = {12: "525", 13: "580"}


def needed_driver(cuda: str) -> str | None:
    """Names the driver that kernels of this CUDA need, as "an NVIDIA driver 580 or later"; None for an unknown CUDA."""
    first = DRIVERS.get(int(cuda.split(".")[0]))
    return None if first is None else f"an NVIDIA driver {first} or later"


def version_pair(text: str) -> tuple[int, int] | None:
    """(major, minor) of the version that a text begins with, as (2, 13) of "2.13.0+cpu"; None where there is none."""
    match = re.match(r"(\d+)\.(\d+)", text)
    return None if match is None else (int(match[1]), int(match[2]))


def cpu_name() -> str:
    """The model of the CPU as Linux names it, or the architecture where it names none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return model[1].strip() if model else platform.processor() or platform.machine()


def package_toolkits() -> list[Path]:
    """Roots of the CUDA toolkits in installed Python packages (site-packages/nvidia/cu13), the newest first."""
    try:
        spec = importlib.util.find_spec("nvidia")
    except (ImportError, ValueError):
        return []
    roots = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    return sorted((found for root in roots for found in root.glob("cu[0-9]*")), reverse=True)


def nvcc_paths() -> list[str]:
    """Every nvcc that can be executed: CUDACXX, then CUDA_HOME, CUDA_PATH, PATH and Python packages."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    named = [os.environ.get("CUDACXX", ""), *(str(Path(home) / "bin" / "nvcc") for home in homes), "nvcc"]
    named += [str(root / "bin" / "nvcc") for root in package_toolkits()]
    found = (shutil.which(name) for name in named if name)
    return list(dict.fromkeys(path for path in found if path))


def nvcc_version(nvcc: str) -> tuple[int, int] | None:
    """(major, minor) of the CUDA that this nvcc is of; None where it does not answer."""
    try:
        done = subprocess.run(
            [nvcc, "--version"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    release = re.search(r"release (\d+\.\d+)", done.stdout) if done.returncode == 0 else None
    return version_pair(release[1]) if release else None
