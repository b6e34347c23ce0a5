"""Stage 3: the ops of the smoke stage again under compute-sanitizer, one process a family and tool."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from gpu_check.op_processes import OpProcesses, chosen
from gpu_check.processes import Done
from gpu_check.run import Outcome, Run
from gpu_check.sanitizer_report import NO_KERNEL, PREFIX, Report, parse

STAGE = "sanitizer"
# In the order in which they run while there is time: what makes results wrong first.
TOOLS = ("memcheck", "racecheck", "synccheck")
ERRORS_FOUND = 9
# Without a caching allocator every tensor is an allocation of its own, and memcheck sees reads past its end.
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
_PORTS = itertools.count()


def invocation(program: str, tool: str) -> list[str]:
    """The beginning of a command line that compute-sanitizer is to run."""
    return [
        program,
        f"--tool={tool}",
        # Only this library's kernels (their mangled names hold its namespace): torch's would take most of the time.
        "--kernel-name=kernel_substring=warpform",
        # Torch asks the driver things that it may refuse; that is no finding.
        "--report-api-errors=no",
        "--check-exit-code=no",
        f"--error-exitcode={ERRORS_FOUND}",
        # A kernel with an error is ended alone, and what follows is still checked.
        "--destroy-on-device-error=kernel",
        "--show-backtrace=device",
        "--print-limit=50",
        "--launch-timeout=120",
        # Several run side by side; each listens on ports of its own.
        f"--port={49152 + 16 * (next(_PORTS) % 512)}",
        "--max-connections=16",
    ]


def sanitizer(run: Run) -> Outcome:
    """Cases are sanitizer::TOOL::FAMILY; with --failed those that it names."""
    program = run.machine.sanitizer()
    if program is None:
        return Outcome(None, "compute-sanitizer is not installed")
    wanted = run.wanted(STAGE)
    work = [
        _Sanitized(run, program, tool, family, ops)
        for tool, families in run.machine.to_sanitize(run, TOOLS).items()
        for family, ops in chosen(families, f"{STAGE}::{tool}", wanted).items()
    ]
    hung = {name.split("::")[2] for name, case in run.cases("smoke").items() if case["text"].startswith("hung")}
    for one in work:
        # They would hang here, too, and take the time of what follows.
        one.remaining.sort(key=hung.__contains__)
    run.parallel(work, lambda one: one.check(), 2 * run.jobs)
    return run.judge(STAGE)


class _Sanitized(OpProcesses):
    # One dtype: what differs in the other is arithmetic, and time is short.
    dtypes = ("bfloat16",)

    def __init__(self, run: Run, program: str, tool: str, family: str, ops: tuple[str, ...]) -> None:
        super().__init__(run, f"{tool}-{family}", ops)
        self.program, self.tool, self.family = program, tool, family
        self.seconds = 3 * run.limits.smoke_op
        self.identifier = f"{STAGE}::{tool}::{family}"
        self.report = Report()
        self.problems: list[str] = []
        self.time_was_over = False

    def check(self) -> None:
        """Runs the tool and records one case."""
        if self.run.left() < self.run.limits.least_sanitized:
            self.run.not_run(STAGE, self.identifier, "no time was left", self.tool)
            return
        begin = self.run.seconds()
        self.run_all()
        report, seconds = self.report, self.run.seconds() - begin
        found = [f"{kernel}\n{block}" for kernel, block in report.kernels.items()]
        counts = f"{report.errors or 0} errors, {report.warnings} warnings"
        text = "\n\n".join([counts, *self.problems, *found])
        bad = self.problems or report.errors
        outcome = "failed" if bad else "not run" if self.time_was_over else "passed"
        if report.gave_up:
            # It says nothing about these kernels. Seen of racecheck, in a batched product of cuBLAS on an H100.
            outcome, text = "skipped", f"the sanitizer itself failed and checked nothing: {report.kernels[NO_KERNEL]}"
        self.run.case(STAGE, self.identifier, outcome, seconds=seconds, text=text, group=self.tool)
        kernels = {"errors": report.errors, "warnings": report.warnings, "kernels": report.kernels}
        self.run.record(STAGE, "reports", {f"{self.tool} {self.family}": kernels})
        self.run.describe(STAGE, table(self.run))

    def wrap(self, command: list[str]) -> list[str]:
        return [*invocation(self.program, self.tool), *command]

    def environment(self) -> Mapping[str, str]:
        return {**super().environment(), **ENVIRONMENT}

    def ended(self, done: Done) -> None:
        self.report.add(parse(done.text))

    def lost(self, op: str, dtype: str, text: str) -> None:
        # The report has the tool's own output.
        self.problems.append("\n".join(line for line in text.splitlines() if not line.startswith(PREFIX)))

    def broken(self, text: str) -> None:
        # The tool's own way of saying that it found errors.
        if not (f"exit status {ERRORS_FOUND}" in text and self.report.errors):
            self.problems.append(text)

    def unreached(self, op: str) -> None:
        self.time_was_over = True


def table(run: Run) -> list[str]:
    """One line a tool and family, then the first error of every kernel."""
    lines, blocks = [], []
    reports = run.found(STAGE, "reports")
    for identifier, case in sorted(run.cases(STAGE).items()):
        _, tool, family = identifier.split("::")
        verdict = "FAILED" if case["outcome"] == "failed" else case["outcome"]
        first = " ".join(case["text"].splitlines()[:1])
        lines.append(f"{tool:10} {family:24} {verdict:8} {case['seconds']:5.0f} s  {first}")
    for name, report in sorted(reports.items()):
        for kernel, block in report["kernels"].items():
            blocks += ["", f"{name}: {kernel}", *(f"    {line}" for line in block.splitlines())]
    return lines + blocks
