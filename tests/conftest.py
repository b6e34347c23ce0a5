"""Which tests this machine can run, in which order, and how hypothesis draws."""

from __future__ import annotations

import functools
import hashlib
import os
import random
import sys
import zlib
from collections.abc import Iterator

import pytest

try:
    import hypothesis
except ImportError:
    hypothesis = None  # type: ignore[assignment]

# Two threads are enough for the sizes used here, and many cores would only fight over them.
os.environ.setdefault("OMP_NUM_THREADS", "2")

if hypothesis is not None:
    # The same examples in every run and on every machine: no test fails by chance or by the load of a machine.
    # --hypothesis-profile=random explores others, and keeps those that fail in .hypothesis to try them first.
    steady = {"deadline": None, "print_blob": True, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
    hypothesis.settings.register_profile("warpform", derandomize=True, **steady)
    hypothesis.settings.register_profile("random", derandomize=False, **steady)
    hypothesis.settings.load_profile("warpform")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--shuffle-files",
        type=int,
        nargs="?",
        const=random.SystemRandom().randrange(2**16),
        metavar="SEED",
        help="run the files in an order drawn from SEED (default: any), and the tests of a file in their own",
    )
    parser.addoption("--slow", action="store_true", help="also run what is marked slow, as CI does")


def pytest_configure() -> None:
    if hypothesis is None:
        raise pytest.UsageError("the tests draw their cases with hypothesis, which is not installed")


def _order(config: pytest.Config) -> list[str]:
    seed = config.getoption("shuffle_files")
    return [] if seed is None else [f"files shuffled: --shuffle-files={seed} repeats this order"]


def pytest_report_header(config: pytest.Config) -> list[str]:
    return _order(config)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    # With -q there is no header.
    for line in _order(config):
        terminalreporter.write_line(line)


@functools.cache
def _has_gpu() -> bool:
    try:
        import torch
    except Exception:
        return False
    return torch.cuda.is_available()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not _has_gpu():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
        if item.get_closest_marker("slow") and not (config.getoption("slow") or os.environ.get("CI")):
            item.add_marker(pytest.mark.skip(reason="slow: runs in CI, or with --slow"))
    seed = config.getoption("shuffle_files")
    if seed is not None:
        # By a hash of the file's name, so that some of the files keep the order that they have among all.
        items.sort(key=lambda item: hashlib.sha256(f"{seed} {item.nodeid.split('::')[0]}".encode()).digest())


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


@pytest.fixture(autouse=True)
def _no_warning_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """A warning that is given once a process is given again in the next test."""
    register = sys.modules.get("warpform.ops._register")
    if register is not None:
        monkeypatch.setattr(register, "_warned", set())
