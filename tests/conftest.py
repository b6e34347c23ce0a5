"""Which tests this machine can run."""

from __future__ import annotations

import functools
import os
import zlib
from collections.abc import Iterator

import pytest

# Two threads are enough for the sizes used here, and many cores would only fight over them.
os.environ.setdefault("OMP_NUM_THREADS", "2")


@functools.cache
def _has_gpu() -> bool:
    try:
        import torch
    except Exception:
        return False
    return torch.cuda.is_available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not _has_gpu():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """Random inputs differ from test to test and are the same in every run of one."""
    try:
        import torch
    except Exception:
        return
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Nothing compiled before or after: for tests that count compilations."""
    import torch

    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
