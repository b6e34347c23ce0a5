"""`python -m warpform doctor | demo | bench | ring-model`."""

from __future__ import annotations

import sys

USAGE = """usage: python -m warpform COMMAND [options]

  doctor [--json]   what this machine, this torch and this build of warpform can do, and a self-test of every op
  demo [options]    encode real text with a BERT, padded and padding-free, and compare; --help lists the options
  bench [options]   benchmarks of the ops and models, from a checkout; --help lists the options
  ring-model [options]
                    time, overlap and memory of ring attention over N ranks, modelled from measured numbers
"""


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if argv else 2
    command, rest = argv[0], argv[1:]
    if command == "doctor":
        from .doctor import main as doctor

        return doctor(rest)
    if command == "demo":
        from .demo import main as demo

        return demo(rest)
    if command == "bench":
        from .bench import main as bench

        return bench(rest)
    if command == "ring-model":
        from .distributed.ring_model import main as ring_model

        return ring_model(rest)
    print(f"warpform: unknown command {command!r}; use doctor, demo, bench or ring-model", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
