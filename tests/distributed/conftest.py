"""Processes that tests share: starting some for each test would cost more than the tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from helpers.processes import Processes


class _Shared:
    def __init__(self) -> None:
        self._by_size: dict[int, Processes] = {}

    def __call__(self, size: int) -> Processes:
        """Processes of this number, whose ranks were not left waiting by a test before."""
        if size not in self._by_size:
            self._by_size[size] = Processes(size)
        return self._by_size[size]

    def close(self) -> None:
        for processes in self._by_size.values():
            processes.close()


@pytest.fixture(scope="session")
def _shared() -> Iterator[_Shared]:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("needs a torch with gloo")
    shared = _Shared()
    yield shared
    shared.close()


@pytest.fixture
def processes(_shared: _Shared, request: pytest.FixtureRequest) -> Iterator[Callable[[int], Processes]]:
    """processes(4).run(function, ...) calls it on the four ranks of a gloo group."""
    yield _shared
    # Ranks that failed where others went on may be out of step: later tests get new ones.
    if getattr(request.node, "failed", False):
        _shared.close()
        _shared._by_size.clear()


@pytest.hookimpl(tryfirst=True, hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome = yield
    if outcome.get_result().failed:  # type: ignore[attr-defined]
        item.failed = True  # type: ignore[attr-defined]
