"""Which tests this machine can run, in which order, and how hypothesis draws."""

from __future__ import annotations

import functools
import gc
import hashlib
import os
import random
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

try:
    import hypothesis
except ImportError:
    hypothesis = None  # type: ignore[assignment]

# One thread is enough for the sizes used here. Other cores serve other workers: see tools/test_workers.py.
os.environ.setdefault("OMP_NUM_THREADS", "1")

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
    parser.addoption(
        "--slow", action="store_true", help="also run what is marked slow and draw four times as many cases, as CI does"
    )


def pytest_configure(config: pytest.Config) -> None:
    if hypothesis is None:
        raise pytest.UsageError("the tests draw their cases with hypothesis, which is not installed")
    if config.getoption("--slow"):
        os.environ["CI"] = "true"


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


def _mark_the_rest_of_samples(items: list[pytest.Item]) -> None:
    """Of each test that is sampled, the half of its parameters that a quick run leaves out becomes slow.

    Hashes of the names choose, so that each kind of parameter is on both sides. On a GPU all run.
    """
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("sampled") and not item.get_closest_marker("gpu"):
            tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for parameters in tests.values():
        parameters.sort(key=lambda item: hashlib.sha256(item.nodeid.encode()).digest())
        for item in parameters[-(-len(parameters) // 2) :]:
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Any:
    """A test on a GPU that is too small for a kernel is skipped: its reference would run there."""
    try:
        return (yield)
    except RuntimeError as error:
        if pyfuncitem.get_closest_marker("gpu"):
            from warpform.cli import self_test

            if self_test.is_for_want_of_room(error):
                pytest.skip(str(error))
        raise


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    _mark_the_rest_of_samples(items)
    for item in items:
        if item.get_closest_marker("gpu") and not _has_gpu():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
        if item.get_closest_marker("slow") and not os.environ.get("CI"):
            item.add_marker(pytest.mark.skip(reason="slow: runs in CI, or with --slow"))
    seed = config.getoption("shuffle_files")
    if seed is not None:
        # By a hash of the file's name, so that some of the files keep the order that they have among all.
        items.sort(key=lambda item: hashlib.sha256(f"{seed} {item.nodeid.split('::')[0]}".encode()).digest())


def pytest_collection_finish() -> None:
    # What the imports made stays until the end: the collections of garbage need not look through it again and again.
    gc.collect()
    gc.freeze()


@functools.cache
def _unit(root: Path, file: str) -> str | None:
    """What the tests of a file run with in one worker of pytest-xdist; None where each is on its own."""
    text = (root / file).read_text(encoding="utf-8")
    marks = re.findall(r"^(?:@|pytestmark = )pytest\.mark\.(\w+)", text, re.MULTILINE)
    if "distributed" in marks:
        # Several of these at once would need more processes than there are cores, and they share processes.
        return "distributed"
    return file if "one_worker" in marks else None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hands out test after test, those of a unit together, and the units with most tests first.

    The groups of --dist loadgroup are lost in pytest 9.2, where pytest-xdist 3.8 writes them into an unused attribute.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Units(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _unit(config.rootpath, nodeid.partition("::")[0]) or nodeid

    return Units(config, log)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The sizes here are small: threads that wait for each other take longer than the work, above all beside others."""
    try:
        import torch
    except Exception:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """Random inputs differ from test to test and are the same in every run of one."""
    try:
        from helpers.seeds import seed_everything
    except Exception:  # there is no torch, or none that can be imported
        return
    seed_everything(zlib.crc32(request.node.nodeid.encode()))


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
