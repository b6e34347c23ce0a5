"""`python -m warpform doctor | demo | bench`."""

from __future__ import annotations

import sys

USAGE = """usage: python -m warpform COMMAND [options]

  doctor [--json]   what this machine, this torch and this build of warpform can do, and a self-test of every op
  demo [options]    encode real text with a BERT, padded and padding-free, and compare; --help lists the options
  bench             benchmarks of the ops (not in this version)
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
        print("warpform: the benchmarks come in a later version; there is nothing to run yet", file=sys.stderr)
        return 2
    print(f"warpform: unknown command {command!r}; use doctor, demo or bench", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
