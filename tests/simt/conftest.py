"""The emulator's library, and an order of threads for every test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.backends import order_of, simt_library

SEEDS = (0, 1, 2)  # 0 is the plain order of threads


@pytest.fixture(scope="session")
def simt() -> Any:
    """The emulator."""
    return simt_library()


@pytest.fixture(params=SEEDS)
def seed(request: pytest.FixtureRequest, simt: Any) -> int:
    """Runs the test once for each of several orders of threads."""
    simt.configure(request.param)
    return int(request.param)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.simt)


def pytest_runtest_setup(item: pytest.Item) -> None:
    # Every test sees an order of its own, the same in every run.
    if Path(__file__).parent in item.path.parents and simt_library.cache_info().currsize:
        simt_library().configure(order_of(item.name))
