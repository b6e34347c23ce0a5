"""The benchmarks under pytest and pytest-benchmark: their options, and the fixture that runs one."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import busy
import harness
import pytest
import torch

SESSION = pytest.StashKey[harness.Session]()
BUSY = pytest.StashKey[contextlib.ExitStack]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("warpform benchmarks")
    group.addoption("--tiny", action="store_true", help="every benchmark once, at a tiny size; nothing is recorded")
    group.addoption(
        "--everything",
        action="store_true",
        help="all sizes on a GPU, and compiled peers where a default run leaves them out",
    )
    group.addoption("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    group.addoption("--budget", type=float, default=harness.BUDGET, help="seconds; 0 is no limit (default %(default)s)")
    group.addoption("--results", type=Path, help="folder that rows are appended to (default bench/results)")
    group.addoption("--no-results", action="store_true", help="append nothing")
    group.addoption(
        "--busy",
        type=_count,
        nargs="?",
        const=1,
        default=0,
        metavar="N",
        help="beside N processes that keep a core busy",
    )
    group.addoption(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="default: bfloat16 on a GPU, float32 on a CPU"
    )
    group.addoption("--progress", action="store_true", help="a progress bar instead of a line for each file")


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a number of processes")
    return int(text)


def pytest_configure(config: pytest.Config) -> None:
    tiny = config.getoption("--tiny")
    device = config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch sees no GPU")
    results = config.getoption("--results") or (None if tiny else harness.RESULTS)
    config.stash[SESSION] = harness.Session(
        device=device,
        tiny=tiny,
        everything=config.getoption("--everything"),
        results=None if config.getoption("--no-results") else results,
        budget=config.getoption("--budget"),
        dtype_name=config.getoption("--dtype") or "",
        busy=config.getoption("--busy"),
    )
    # The suite has a summary of its own.
    config.option.benchmark_quiet = True
    if config.getoption("--progress") and importlib.util.find_spec("rich") is not None:
        from progress import ProgressBar

        config.option.verbose -= 1
        config.pluginmanager.register(ProgressBar(), "warpform-progress")
    # Short runs use at most two threads, as the tests do; full runs use as many as torch finds.
    if tiny and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_sessionstart(session: pytest.Session) -> None:
    stack = session.config.stash[BUSY] = contextlib.ExitStack()
    session.config.add_cleanup(stack.close)
    stack.enter_context(busy.busy(session.config.stash[SESSION].busy))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "spec" in metafunc.fixturenames:
        specs = metafunc.module.specs(metafunc.config.stash[SESSION])
        pairs = [(spec, provider) for spec in specs for provider in spec.providers]
        metafunc.parametrize(("spec", "provider"), pairs, ids=[f"{spec}-{provider}" for spec, provider in pairs])


def clock(benchmark: Any, call: Callable[[], Any], rounds: int, iterations: int, device: str) -> list[float]:
    """Microseconds of a call by pytest-benchmark's clock, round by round; on a GPU each starts with it idle."""
    if device == "cuda":
        benchmark.pedantic(call, setup=torch.cuda.synchronize, rounds=rounds, iterations=1)
    else:
        benchmark.pedantic(call, rounds=rounds, iterations=iterations)
    return [] if benchmark.stats is None else [seconds * 1e6 for seconds in benchmark.stats.stats.data]


# The columns of a row that pytest-benchmark keeps.
EXTRA = (
    "p20_us", "p50_us", "p80_us", "images_s", "tflops", "gbs", "roofline", "ceiling_tflops", "ceiling_gbs",
)  # fmt: skip


def measure_one(session: harness.Session, spec: harness.Spec, provider: str, benchmark: Any) -> None:
    """A peer that is missing or fails leaves a row that says so, and a skip.

    What computes something else, and warpform itself, must not go unnoticed: those raise.
    """
    benchmark.group = str(spec)
    row, error = session.measure(spec, provider, functools.partial(clock, benchmark))
    benchmark.extra_info.update({name: row[name] for name in EXTRA if name in row})
    if error is None:
        return
    status = row["status"]
    if not status.startswith("missing") and (provider == "warpform" or status.startswith("disagrees")):
        raise error
    pytest.skip(status)


@pytest.fixture
def measure(request: pytest.FixtureRequest, benchmark: Any) -> Iterator[Callable[[harness.Spec, str], None]]:
    session = request.config.stash[SESSION]
    yield lambda spec, provider: measure_one(session, spec, provider, benchmark)


def pytest_sessionfinish(session: pytest.Session) -> None:
    run = session.config.stash.get(SESSION, None)
    if run is not None:
        run.flush()
    if BUSY in session.config.stash:
        session.config.stash[BUSY].close()


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    run = config.stash.get(SESSION, None)
    if run is None or not run.rows:
        return
    beside = f", beside {run.busy} busy" if run.busy else ""
    terminalreporter.write_sep("=", f"warpform benchmarks, {run.facts['device']}, torch {torch.__version__}{beside}")
    for line in harness.summary(run.rows):
        terminalreporter.write_line(line)
    where = "nothing was recorded" if run.results is None else f"rows appended in {run.results}"
    terminalreporter.write_line(where)
