"""What every test on a GPU has in common."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

import warpform  # noqa: F401  registers the ops: a file that does not name the package runs alone too


@pytest.fixture(autouse=True)
def _kernels_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WARPFORM_STRICT", "1")  # a fallback to the reference is an error


@pytest.fixture(autouse=True)
def _memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test marked huge(gigabytes=N) finds as much free, or is skipped, and leaves none of it reserved."""
    huge = request.node.get_closest_marker("huge")
    if huge is None:
        yield
        return
    _release()
    free, needed = torch.cuda.mem_get_info()[0], huge.kwargs["gigabytes"] * 2**30
    if free < needed:
        pytest.skip(f"needs {needed / 2**30:g} GB of free GPU memory, there are {free / 2**30:.1f}")
    yield
    _release()


def _release() -> None:
    # What torch keeps reserved after a test is neither free for the next one nor for other processes.
    gc.collect()
    torch.cuda.empty_cache()
