"""A pytest plugin (`-p gpu_check.pytest_plugin`) for runs that may hang or crash at any test.

It tells of every test when it begins and when it ends, ends the process at a test that hangs, ends it after one that
left the GPU unusable, and lets several processes share one file: the process that claims a test first runs it, so a
process that follows one which died goes on with what is left. Settings come from the environment:

GPU_CHECK_EVENTS   the file that events are appended to
GPU_CHECK_STACKS   the file that the stacks of a hanging test are written to
GPU_CHECK_CLAIMS   a folder, the same for all processes of a file
GPU_CHECK_NAME     this process
GPU_CHECK_SECONDS  that one test may take
GPU_CHECK_ONLY     optional: a file with the node ids to run, one a line
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from gpu_check.events import Writer
from gpu_check.faults import POISONED, Watchdog, context_is_dead, give_memory_back, is_sticky

# Characters that are kept of a failure's text, from its end, which holds the error.
TEXT = 8000


def claim_path(folder: Path, identifier: str) -> Path:
    """The file whose existence says that some process has taken a test."""
    return folder / hashlib.sha1(identifier.encode()).hexdigest()[:20]


class Checked:
    """The plugin proper, made once the settings are known."""

    def __init__(self, settings: dict[str, str]) -> None:
        self.events = Writer(Path(settings["GPU_CHECK_EVENTS"]))
        self.claims = Path(settings["GPU_CHECK_CLAIMS"])
        self.name = settings["GPU_CHECK_NAME"]
        self.only = settings.get("GPU_CHECK_ONLY")
        stacks = open(settings["GPU_CHECK_STACKS"], "w")  # noqa: SIM115 (open as long as the process lives)
        self.watchdog = Watchdog(float(settings["GPU_CHECK_SECONDS"]), stacks)
        self.huge: list[str] = []
        self.verdict: dict[str, Any] = {}
        self.sticky = False

    def pytest_sessionstart(self) -> None:
        """A drawn test that fails says with which example, and does not spend its time on a smaller one."""
        hypothesis = sys.modules.get("hypothesis")
        if hypothesis is not None:
            phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
            hypothesis.settings.register_profile(
                "gpu-check", hypothesis.settings(), phases=phases, report_multiple_bugs=False
            )
            hypothesis.settings.load_profile("gpu-check")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        if self.only is not None:
            wanted = set(Path(self.only).read_text().splitlines())
            config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in wanted])
            items[:] = [item for item in items if item.nodeid in wanted]

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        """Tests of the other size: what a later process will run."""
        chosen = [item for item in items if item.get_closest_marker("gpu") and item.get_closest_marker("huge")]
        self.huge += [item.nodeid for item in chosen]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.events.write(event="broken", id=report.nodeid, text=str(report.longrepr)[-TEXT:])

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """pytest's own loop, over the tests that this process can claim."""
        self.events.write(event="collected", ids=[item.nodeid for item in session.items], huge=self.huge)
        claimed = self._claimed(session.items)
        item = next(claimed, None)
        while item is not None:
            # pytest tears down what the next test does not share, so the next one has to be claimed by now.
            following = next(claimed, None)
            self._run(item, following)
            item = following
        self.events.write(event="done")
        return True

    def _claimed(self, items: list[pytest.Item]) -> Iterator[pytest.Item]:
        for item in items:
            try:
                with claim_path(self.claims, item.nodeid).open("x") as file:
                    file.write(self.name)
            except FileExistsError:
                continue
            yield item

    def _run(self, item: pytest.Item, following: pytest.Item | None) -> None:
        self.verdict = {"outcome": "passed", "seconds": 0.0, "text": ""}
        self.sticky = False
        self.watchdog.feed()
        self.events.write(event="start", id=item.nodeid)
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        poisoned = self.verdict["outcome"] == "failed" and (self.sticky or context_is_dead())
        self.watchdog.rest()
        self.events.write(event="end", id=item.nodeid, poisoned=poisoned, **self.verdict)
        if poisoned:
            # Every test that follows in this process would fail; its other ends (fixtures, reports) would, too.
            os._exit(POISONED)
        give_memory_back()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.verdict["seconds"] += report.duration
        if report.failed:
            text = report.longreprtext + "".join(f"\n--- {name}\n{content}" for name, content in report.sections)
            self.sticky = self.sticky or is_sticky(text)
            before = self.verdict["text"] + "\n" if self.verdict["text"] else ""
            self.verdict.update(outcome="failed", text=before + text[-TEXT:])
        elif report.skipped and self.verdict["outcome"] == "passed":
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else getattr(report, "wasxfail", "")
            self.verdict.update(outcome="skipped", text=str(reason))


def pytest_configure(config: pytest.Config) -> None:
    settings = {name: value for name, value in os.environ.items() if name.startswith("GPU_CHECK_")}
    # Without them this is a pytest that a test has started, not ours.
    if "GPU_CHECK_EVENTS" in settings:
        for name in settings:
            del os.environ[name]
        config.pluginmanager.register(Checked(settings), "gpu_check")
