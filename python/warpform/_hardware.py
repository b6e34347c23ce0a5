"""The machine: its CPU, the CUDA compiler on it, and the NVIDIA drivers that a CUDA needs.

The build reads this file too, by its path, so it imports the standard library alone.
"""

from __future__ import annotations

import functools
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
    model = re.search(r"^model name\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    return model[1].strip() if model else platform.processor() or platform.machine()


@functools.cache
def cpu_features() -> tuple[str, frozenset[str]]:
    """The vendor of the CPU, as "AuthenticAMD", and its features, as "avx512f"; empty where Linux names none."""
    text = _cpuinfo()
    vendor = re.search(r"^vendor_id\s*:\s*(\S+)", text, re.MULTILINE)
    flags = re.search(r"^flags\s*:\s*(.+)$", text, re.MULTILINE)
    return (vendor[1] if vendor else ""), frozenset(flags[1].split() if flags else ())


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""


def granted_cores() -> float:
    """The cores that this process may use: those of its affinity, or less where a control group has a quota of time."""
    cores = float(len(os.sched_getaffinity(0)))
    quota = _quota()
    return cores if quota is None else min(cores, quota)


def _quota(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Cores of the smallest quota of this process's control groups; None where there is none, or Linux tells none.

    groups: the file that names them. root: where they are mounted.
    """
    found = []
    try:
        lines = groups.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if not controllers:  # version 2; a quota of a group above holds too
            parts = Path(name).parts[1:]
            found += [_read_quota(root.joinpath(*parts[:depth], "cpu.max")) for depth in range(len(parts) + 1)]
        elif "cpu" in controllers.split(","):
            for folder in (root / controllers / name.lstrip("/"), root / "cpu" / name.lstrip("/"), root / "cpu"):
                found.append(_read_quota(folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us"))
    return min((cores for cores in found if cores is not None), default=None)


def _read_quota(*files: Path) -> float | None:
    """Quota over period, which one file or two hold; None for no quota."""
    try:
        quota, period = " ".join(file.read_text(encoding="utf-8").strip() for file in files).split()
        return float(quota) / float(period) if quota != "max" and float(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None


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
