"""Entry point of `python tools/gpu_check`."""

from __future__ import annotations

import sys
from pathlib import Path

# Python put this folder on the path; its modules are imported as parts of the package instead.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from gpu_check.cli import main  # noqa: E402 (found on the path that was set above)

if __name__ == "__main__":
    main(sys.argv[1:])
