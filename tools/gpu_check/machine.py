"""The one seam between the check and a GPU: a dry run replaces `Machine` by `emulated.EmulatedMachine`."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_check import ROOT

if TYPE_CHECKING:
    from gpu_check.run import Run

# What the stages import, beyond the standard library.
PACKAGES = ("torch", "numpy", "pytest", "hypothesis")


class Unfit(Exception):
    """This machine, or this Python, cannot run the check; the text is one sentence that says why."""


def output(*command: str, seconds: float = 20.0) -> str:
    """What a command prints, "" where it fails."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=seconds
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def find_tool(name: str, *parts: str) -> str | None:
    """A tool of the CUDA toolkit: on the path, or in one of the toolkit's folders."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [os.path.join(home, part) for home in homes if home for part in ("bin", *parts)]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


class Machine:
    """A machine with a GPU."""

    dry = False
    device = "cuda"

    def require(self) -> None:
        """Raises Unfit, with one sentence, where the check cannot run at all. Touches no GPU in this process."""
        missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
        if missing:
            named = " and ".join(missing)
            raise Unfit(f"{named} missing in {sys.executable}; install, or choose another: make gpu-check PYTHON=...")

    def facts(self) -> dict[str, Any]:
        """What is known of the machine without a child that uses the GPU."""
        return {"nvidia_smi": self.nvidia_smi()}

    def nvidia_smi(self) -> dict[str, str]:
        """Name, driver, clocks and memory of the first GPU, as nvidia-smi prints them; {} without it."""
        fields = (
            "name", "driver_version", "memory.total", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem",
            "power.limit", "temperature.gpu", "mig.mode.current", "compute_mode",
        )  # fmt: skip
        lines = output("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader").splitlines()
        values = lines[0].split(", ") if lines else []
        return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else {}

    def sanitizer(self) -> str | None:
        """The path of compute-sanitizer."""
        return find_tool("compute-sanitizer", "compute-sanitizer")

    def ncu(self) -> str | None:
        """The path of Nsight Compute's command line."""
        return find_tool("ncu", "nsight-compute")

    def smoke_command(self, run: Run, names: Sequence[str], report: Path, dtypes: Sequence[str] = ()) -> list[str]:
        """The child that runs these ops of the self-test and appends its rows to `report`."""
        options = [f"--dtype={dtype}" for dtype in dtypes]
        return [run.python, "-m", "gpu_check.smoke", "--device=cuda", f"--report={report}", *options, *names]

    def test_files(self, run: Run) -> list[Path]:
        """Every file that holds tests marked gpu."""
        files = sorted((ROOT / "tests").rglob("test_*.py"))
        return [path for path in files if "mark.gpu" in path.read_text() and path.name != "test_gpu_check.py"]

    def pytest_arguments(self, run: Run) -> list[str]:
        """Where pytest finds its settings."""
        return ["--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]
