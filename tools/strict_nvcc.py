"""Runs a CUDA compiler, and fails where ptxas only notes that it serialised wgmma or injected a fence.

    python tools/strict_nvcc.py [ccache] nvcc ARGUMENTS...

CMake puts it in front of the compiler (CUDA_COMPILER_LAUNCHER) for the kernels of Hopper. nvcc exits with 0 after such
notes, no option makes them errors, and the machine code keeps none of them. ccache belongs behind this program: what it
replays from its cache is then read here too.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path

REMEDIES = {
    "C7510": "wgmma is serialised: keep its accumulators and its operands in registers untouched until the wgmma_wait",
    "C7511": "wgmma is serialised for want of registers: keep those in flight untouched, or take smaller tiles",
    "C7514": "wgmma is serialised: give the accumulators of all paths through the code the same fences and waits",
    "C7519": "a fence is injected: list every register that wgmma reads or writes in the wgmma_fence before it",
}
# Other releases may number such a note otherwise.
SERIALISED = "wgmma is serialised: keep its registers untouched from the wgmma_fence to the wgmma_wait"


def fault(output: str) -> tuple[str, str] | None:
    """The first such note in a compiler's output, and what to do; None where there is none."""
    for line in output.splitlines():
        code = re.search(r"\((C\d{4})\)", line)
        if code and code[1] in REMEDIES:
            return line.strip(), REMEDIES[code[1]]
        if "wgmma" in line and "are serialized" in line:
            return line.strip(), SERIALISED
        if "warpgroup.arrive is injected" in line:
            return line.strip(), REMEDIES["C7519"]
    return None


def source_of(command: list[str]) -> str:
    """The file that a command compiles."""
    files = [each for each in command if not each.startswith("-") and each.endswith(".cu")]
    return files[-1] if files else command[0]


def output_of(command: list[str]) -> Path | None:
    """The file that a command writes."""
    for option, value in itertools.pairwise(command):
        if option in ("-o", "--output-file"):
            return Path(value)
    return None


def main(command: list[str]) -> int:
    if not command:
        print("warpform: strict_nvcc.py needs a compiler and its arguments", file=sys.stderr)
        return 2
    try:
        done = subprocess.run(command, capture_output=True)
    except OSError as error:
        print(f"warpform: {command[0]} cannot be run: {error.strerror}", file=sys.stderr)
        return 127
    for stream, text in ((sys.stdout, done.stdout), (sys.stderr, done.stderr)):
        stream.buffer.write(text)
        stream.buffer.flush()
    if done.returncode:
        return done.returncode if done.returncode > 0 else 128 - done.returncode
    found = fault((done.stdout + done.stderr).decode(errors="replace"))
    if found is None:
        return 0
    note, remedy = found
    print(
        f"warpform: {source_of(command)} compiles with the note <{note}>: {remedy}; a build without 90a in "
        "WARPFORM_CUDA_ARCHS leaves the kernels for Hopper out.",
        file=sys.stderr,
    )
    output = output_of(command)
    if output is not None:
        output.unlink(missing_ok=True)  # so that no later step takes it for a result
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
