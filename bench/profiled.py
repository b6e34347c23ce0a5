"""Calls of chosen workloads for a profiler: each once, after it ran before, with a marker in front of it.

    ncu --profile-from-start off ... python bench/profiled.py WORKLOAD ...

The marker is torch's spin kernel, which nothing else here launches: what a profiler lists between two of them belongs
to one workload. Prints `profiled N: WORKLOAD` for each, in the order of the markers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import harness
import rows
import torch


def find(workloads: Sequence[str], families: Sequence[str], session: harness.Session) -> list[harness.Spec]:
    """The specs of these names, in this order. Raises ValueError for a name that none has."""
    named = {str(spec): spec for family in families for spec in rows.load(family, session)}
    missing = [name for name in workloads if name not in named]
    if missing:
        raise ValueError(f"no workload {missing[0]} in {', '.join(families)}")
    return [named[name] for name in workloads]


def profile(number: int, spec: harness.Spec, session: harness.Session) -> None:
    torch.manual_seed(0)
    call = spec.build(session).prepare("warpform")[0]
    call()
    harness.synchronize(session.device)
    print(f"profiled {number}: {spec}", flush=True)
    if session.device == "cuda":
        torch.cuda.profiler.start()
        torch.cuda._sleep(1)
    call()
    harness.synchronize(session.device)
    if session.device == "cuda":
        torch.cuda.profiler.stop()
        torch.cuda.empty_cache()


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="profiled.py", description="calls of chosen workloads for a profiler")
    parser.add_argument("workloads", nargs="+", metavar="WORKLOAD", help="names, as rows.py --list prints them")
    parser.add_argument("--family", default=",".join(rows.FAMILIES), help="where they are, with commas")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes that say nothing")
    given = parser.parse_args(words)
    session = harness.Session(given.device, tiny=given.tiny)
    for number, spec in enumerate(find(given.workloads, given.family.split(","), session)):
        profile(number, spec, session)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
