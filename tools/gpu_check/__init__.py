"""`make gpu-check`: what works and how fast it is on a machine with a GPU, in stages that survive each other.

`python tools/gpu_check --help` lists the options; docs/hardware.md says how two short calls give a full verdict.
Every piece of work runs in a process of its own, with a limit of its own, and the output folder is complete after each.
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
