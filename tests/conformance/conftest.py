"""Every test here has a parameter `backend`: see helpers/backends.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _backend_is_ready(request: pytest.FixtureRequest) -> Iterator[None]:
    with request.node.callspec.params["backend"].ready(request.node.name):
        yield


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # The sizes here are small: starting threads would take longer than the work.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
