"""Every test here has a parameter `backend`: see helpers/backends.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _backend_is_ready(request: pytest.FixtureRequest) -> Iterator[None]:
    with request.node.callspec.params["backend"].ready(request.node.name):
        yield
