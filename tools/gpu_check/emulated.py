"""The seam of a dry run: every stage end to end on a machine without a GPU.

The ops run in the emulator (build/libwarpform_simt.so) or, where that was not built, as references; compute-sanitizer
and ncu are scripts that run their command and print a report; a family of ops and a folder of tests with planted faults
(one of each kind that the check has to survive) are beside the real ones or replace them. So a dry run ends with
status 1, and its summary lists the planted faults and nothing else.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_check import ROOT
from gpu_check.machine import Machine, families_in
from gpu_check.run import Limits, Run

LIBRARY = ROOT / "build" / "libwarpform_simt.so"
PLANTED = "planted"
PLANTED_OPS = ("well", "wrong", "crashing", "hanging", "poisoning", "last")

# The module that smoke.py takes for the self-test, of the planted family.
SELF_TEST = """
import os, time

def run(names, *, device, library=None, dtypes=None):
    for op in names:
        yield {"op": op, "dtype": "bfloat16", "starting": True}
        if op == "crashing":
            os.abort()
        if op == "hanging":
            time.sleep(600)
        problem = {"wrong": "off by 3", "poisoning": "CUDA error: an illegal memory access was encountered"}.get(op)
        row = {"op": op, "device": device, "dtype": "bfloat16", "ok": problem is None, "problem": problem, "ms": 0.1}
        yield {**row, "direction": "forward"}
"""

TESTS = {
    "test_well.py": "def test_passes(): pass\n\n@pytest.mark.skip(reason='planted')\ndef test_skipped(): pass\n",
    "test_wrong.py": "def test_fails(): assert 1 == 2\n\ndef test_after(): pass\n",
    "test_hanging.py": "def test_before(): pass\n\ndef test_hangs(): time.sleep(600)\n\ndef test_after(): pass\n",
    "test_crashing.py": "def test_dies(): os.kill(os.getpid(), 9)\n\ndef test_after(): pass\n",
    "test_poisoned.py": (
        "def test_poisons():\n    raise RuntimeError('CUDA error: an illegal memory access was encountered')\n\n"
        "def test_after(): pass\n"
    ),
    # Beside others it lacks memory, alone it does not: see TestFile.crowded.
    "test_crowded.py": (
        "def test_large():\n    known = __file__ + '.known'\n    if not os.path.exists(known):\n"
        "        open(known, 'w').close()\n        raise RuntimeError('CUDA out of memory.')\n"
    ),
    "test_huge.py": "@pytest.mark.huge\ndef test_huge(): pass\n\ndef test_small(): pass\n",
}
SETTINGS = "[pytest]\nmarkers =\n    gpu\n    huge\n"

# Replaces compute-sanitizer: runs the command that follows its own options, then prints a report.
TOOL = """#!{python}
import subprocess, sys
command = sys.argv[1:]
while command[0].startswith("-"):
    del command[0]
status = subprocess.run(command).returncode
print({reports!r}["planted" in " ".join(command)])
sys.exit(status)
"""
CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors"
ERROR = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 16 bytes
=========     at void warpform::planted_kernel<__nv_bfloat16, (int)64>(warpform::Params)+0x1f0
=========     by thread (31,0,0) in block (2,0,0)
=========     Access at 0x7f3c5a000400 is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7f3c5a000000 of size 1,024 bytes
=========
========= ERROR SUMMARY: 1 error"""


class EmulatedMachine(Machine):
    """A machine that only looks as if it had a GPU."""

    dry = True
    device = "cpu"
    limits = Limits(test=1.5, huge_test=1.5, smoke_op=20.0, startup=60.0, least=0.5)
    # A dry run shows that the stages work, not that all ops do: tests/simt does.
    real_families = ("attention_step",)
    planted_seconds = 1.0

    def require(self, run: Run) -> None:
        """Gathers the facts, and lays out what replaces tools and tests."""
        self.folder = run.scratch / "emulated"
        self.tests = self.folder / "tests" / "gpu"
        self.tests.mkdir(parents=True)
        (self.folder / "pytest.ini").write_text(SETTINGS)
        (self.folder / "planted_self_test.py").write_text(SELF_TEST)
        for name, text in TESTS.items():
            (self.tests / name).write_text(
                f"import os, time\n\nimport pytest\n\npytestmark = pytest.mark.gpu\n\n{text}"
            )
        super().require(run)

    def judge(self, found: dict[str, Any]) -> None:
        """Anything will do."""

    def nvidia_smi(self) -> dict[str, str]:
        return {"driver_version": "none: this is a dry run"}

    def families(self, run: Run) -> dict[str, tuple[str, ...]]:
        all_of_them = super().families(run) if run.results["facts"]["loaded"] else {}
        return {**{name: all_of_them[name] for name in self.real_families if all_of_them}, PLANTED: PLANTED_OPS}

    def products(self, run: Run) -> dict[str, tuple[str, ...]]:
        all_of_them = families_in(run, "products") if run.results["facts"]["loaded"] and LIBRARY.exists() else {}
        return {family: layouts[:2] for family, layouts in all_of_them.items()}

    def to_sanitize(self, run: Run, tools: Sequence[str]) -> dict[str, dict[str, tuple[str, ...]]]:
        return {tools[0]: {PLANTED: PLANTED_OPS}}

    def sanitizer(self) -> str | None:
        return self.tool("compute-sanitizer", CLEAN, ERROR)

    def ncu(self) -> str | None:
        path = Path(__file__).with_name("pretended_ncu.py")
        return str(path) if path.exists() else None

    def tool(self, name: str, report: str, planted: str) -> str:
        """A script that runs its command and prints `report`, or `planted` where the command is a planted one."""
        path = self.folder / name
        path.write_text(TOOL.format(python=sys.executable, reports={False: report, True: planted}))
        path.chmod(0o755)
        return str(path)

    def smoke_command(
        self, run: Run, names: Sequence[str], report: Path, *, stacks: Path, seconds: float, dtypes: Sequence[str] = ()
    ) -> list[str]:
        if names[0] in PLANTED_OPS:
            seconds = self.planted_seconds
        return super().smoke_command(run, names, report, stacks=stacks, seconds=seconds, dtypes=dtypes)

    def smoke_options(self, names: Sequence[str]) -> list[str]:
        if names[0] in PLANTED_OPS:
            return ["--device=cpu", "--module=planted_self_test", f"--path={self.folder}"]
        library = ["--library", "warpform_simt", str(LIBRARY)] if LIBRARY.exists() else []
        return ["--device=cpu", *library, *self.module_options(names)]

    def test_root(self, run: Run) -> Path:
        return self.folder

    def test_files(self, run: Run) -> list[Path]:
        return sorted(self.tests.glob("test_*.py"))

    def pytest_arguments(self, run: Run) -> list[str]:
        return ["--rootdir", str(self.folder), "-c", str(self.folder / "pytest.ini"), "--import-mode=importlib"]
