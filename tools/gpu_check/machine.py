"""The one seam between the check and a GPU: a dry run replaces `Machine` by `emulated.EmulatedMachine`."""

from __future__ import annotations

import glob
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_check import ROOT, facts
from gpu_check.run import Limits, Run

# Checks of single products, which the smoke stage runs before any op: a module of the tests.
PRODUCTS = "helpers.wgmma_product"

# Packages that the stages import, beyond the standard library.
PACKAGES = ("torch", "numpy", "pytest", "hypothesis")


class Unfit(Exception):
    """This machine, or this Python, cannot run the check; the text is one sentence that says why."""


def output(*command: str, seconds: float = 20.0) -> str:
    """Returns the output of a command, "" where it fails."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=seconds
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def find_tool(name: str, *parts: str) -> str | None:
    """A tool of the CUDA toolkit: on the path, or in one of the toolkit's folders."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    homes += [str(Path(nvcc).resolve().parent.parent)] if nvcc else []
    folders = [os.path.join(home, part) for home in homes if home for part in ("bin", *parts)]
    folders += [os.path.dirname(path) for path in sorted(glob.glob(f"/opt/nvidia/*/*/{name}"), reverse=True)]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


def families_in(run: Run, fact: str) -> dict[str, tuple[str, ...]]:
    """Names of ops by family, as a fact has them; raises RuntimeError where it says why there are none."""
    found = run.results["facts"].get(fact, "the library is not loaded")
    if not isinstance(found, dict):
        raise RuntimeError(f"the self-test has no {fact}: {found}")
    return {name: tuple(ops) for name, ops in found.items()}


class Machine:
    """A machine with a GPU."""

    dry = False
    device = "cuda"
    limits = Limits()

    def require(self, run: Run) -> None:
        """Gathers the facts. Raises Unfit, with one sentence, where the check cannot run at all."""
        missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
        if missing:
            verb = "is" if len(missing) == 1 else "are"
            raise Unfit(
                f"{' and '.join(missing)} {verb} missing in {sys.executable}; install them, or choose another Python: "
                "make gpu-check PYTHON=..."
            )
        run.results["facts"].update(self.facts(run))
        found = run.results["facts"]
        if "error" in found:
            raise Unfit(f"{sys.executable} cannot say what torch and the GPU are ({found['error']}).")
        self.judge(found)

    def judge(self, found: dict[str, Any]) -> None:
        """Raises Unfit by the facts."""
        if found["gpu"] is None:
            seen = "is built without CUDA" if found["cuda"] is None else "sees no GPU"
            raise Unfit(f"needs a machine with a CUDA GPU; torch {found['torch']} of {sys.executable} {seen}.")
        if not found["loaded"]:
            raise Unfit(f"the library does not load ({found['load_error']}).")
        if not found["build"].get("cuda"):
            raise Unfit("the library was built without CUDA kernels; build it where nvcc is (make build).")
        if found["capability"] == "9.0" and "90a" not in found["build"]["cuda_archs"]:
            raise Unfit(
                f"the library was built for {found['build']['cuda_archs']} and has no machine code for this GPU; "
                'build it with WARPFORM_CUDA_ARCHS="80;90a-real" (make build).'
            )

    def facts(self, run: Run) -> dict[str, Any]:
        """Commit, versions, GPU, library, and what nvidia-smi says; or {"error": why}."""
        return {**facts.ask(run, "probe", 120.0), "nvidia_smi": self.nvidia_smi()}

    def families(self, run: Run) -> dict[str, tuple[str, ...]]:
        """The ops of the self-test by family."""
        return families_in(run, "families")

    def products(self, run: Run) -> dict[str, tuple[str, ...]]:
        """The layouts of single products by wgmma, as a family of ops; none where the GPU has no wgmma."""
        return families_in(run, "products") if run.results["facts"].get("capability") == "9.0" else {}

    def nvidia_smi(self) -> dict[str, str]:
        """Driver, clocks, memory of the first GPU, as nvidia-smi prints them; {} without it."""
        fields = (
            "driver_version", "memory.total", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem",
            "power.limit", "temperature.gpu", "mig.mode.current", "compute_mode",
        )  # fmt: skip
        lines = output("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader").splitlines()
        values = lines[0].split(", ") if lines else []
        return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else {}

    def sanitizer(self) -> str | None:
        """The path of compute-sanitizer."""
        return find_tool("compute-sanitizer", "compute-sanitizer")

    def to_sanitize(self, run: Run, tools: Sequence[str]) -> dict[str, dict[str, tuple[str, ...]]]:
        """Which families each of compute-sanitizer's tools runs."""
        return dict.fromkeys(tools, self.families(run))

    def ncu(self) -> str | None:
        """The path of Nsight Compute's command line."""
        return find_tool("ncu", "nsight-compute")

    def smoke_command(
        self, run: Run, names: Sequence[str], report: Path, *, stacks: Path, seconds: float, dtypes: Sequence[str] = ()
    ) -> list[str]:
        """The child that runs these ops of the self-test: see smoke.py."""
        command = [run.python, "-m", "gpu_check.smoke", f"--report={report}", f"--stacks={stacks}"]
        command += [f"--seconds={seconds}", *(f"--dtype={dtype}" for dtype in dtypes), *self.smoke_options(names)]
        return [*command, *names]

    def smoke_options(self, names: Sequence[str]) -> list[str]:
        """Options that choose the device of the ops, and the module that tests them."""
        return ["--device=cuda", *self.module_options(names)]

    def module_options(self, names: Sequence[str]) -> list[str]:
        """Layouts of single products are tested by a module of the tests."""
        return [f"--module={PRODUCTS}", f"--path={ROOT / 'tests'}"] if names[0].startswith("a_") else []

    def test_root(self, run: Run) -> Path:
        """The folder that node ids begin at."""
        return ROOT

    def test_files(self, run: Run) -> list[Path]:
        """Every file that holds tests marked gpu."""
        files = sorted((ROOT / "tests").rglob("test_*.py"))
        return [
            path
            for path in files
            if path.parent.name == "conformance"
            or ("pytest.mark.gpu" in path.read_text() and path.name != "test_gpu_check.py")
        ]

    def pytest_arguments(self, run: Run) -> list[str]:
        """Arguments that tell pytest where its settings are."""
        return ["--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]
