"""A progress bar for the benchmarks instead of pytest's lines; what failed is still shown."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class ProgressBar:
    """Plugin of pytest. One step a benchmark; the bar is on stderr and disappears at the end."""

    def __init__(self) -> None:
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        self.progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self.task = self.progress.add_task("collecting", total=None)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self) -> None:
        self.progress.start()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.progress.update(self.task, total=len(session.items), description="starting")

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report: Any) -> tuple[str, str, str] | None:
        # No letters on the terminal: the category is kept, so that pytest's summary counts as ever.
        if report.when == "call" or report.outcome != "passed":
            return report.outcome if report.when == "call" else _category(report), "", ""
        return None

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "teardown":
            name = report.nodeid.partition("[")[2].rstrip("]")
            self.progress.update(self.task, advance=1, description=name[:70])
        if report.failed:
            self.progress.console.print(f"FAILED: {report.nodeid}", markup=False, highlight=False)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self) -> None:
        self.progress.stop()


def _category(report: Any) -> str:
    return "error" if report.failed else str(report.outcome)
