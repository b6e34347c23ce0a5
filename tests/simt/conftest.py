"""The emulator's library, and an order of threads for every test."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

SEEDS = (0, 1, 2)  # 0 is the plain order of threads


def _library() -> Path:
    given = os.environ.get("WARPFORM_SIMT_LIBRARY")
    return Path(given) if given else Path(__file__).parents[2] / "build" / "libwarpform_simt.so"


@pytest.fixture(scope="session")
def simt() -> Any:
    """torch.ops.warpform_simt: the ops of torch.ops.warpform with their CUDA kernels, run on CPU tensors."""
    path = _library()
    if not path.exists():
        pytest.skip(
            f"the emulator was not built: {path.name} is missing (an editable install builds it where CUDA's headers "
            "are found; WARPFORM_SIMT=1 insists; WARPFORM_SIMT_LIBRARY names another place)"
        )
    torch.ops.load_library(str(path))
    return torch.ops.warpform_simt


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # Inputs are small: a second thread would only wait.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=SEEDS)
def seed(request: pytest.FixtureRequest, simt: Any) -> int:
    """Runs the test once for each of several orders of threads."""
    simt._configure(request.param)
    return int(request.param)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.simt)


def pytest_runtest_setup(item: pytest.Item) -> None:
    # Every test sees an order of its own, the same in every run.
    if Path(__file__).parent in item.path.parents and hasattr(torch.ops.warpform_simt, "_configure"):
        torch.ops.warpform_simt._configure(1 + zlib.crc32(item.name.encode()) % 1000)
