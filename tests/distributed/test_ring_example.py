"""The example under torchrun, and the figure in docs/ring.md."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.slow
@pytest.mark.distributed
def test_example_under_torchrun() -> None:
    script = ROOT / "examples" / "ring_attention.py"
    if not script.is_file():
        pytest.skip("the tests run without their checkout")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "largest difference from one process" in done.stdout
    assert all(f"rank {rank} of 3: tokens {32 * rank} to {191 - 32 * rank}" in done.stdout for rank in range(3))


def test_figure_is_what_the_code_does() -> None:
    script = ROOT / "tools" / "ring_figure.py"
    if not script.is_file():
        pytest.skip("the tests run without their checkout")
    drawn = runpy.run_path(str(script))
    assert drawn["TARGET"].read_text(encoding="utf-8") == drawn["figure"](), "run tools/ring_figure.py"
