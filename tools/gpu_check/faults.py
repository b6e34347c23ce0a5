"""Faults that Python cannot catch: calls that hang, and errors after which the GPU refuses the process everything."""

from __future__ import annotations

import faulthandler
import sys
from typing import IO

# Exit status of a process that one of its steps left without a working GPU.
POISONED = 71

# GPU memory that a process may keep between steps.
KEPT_BYTES = 2 << 30

# Texts of CUDA errors that stay with the process (the runtime's own words, and those of its error codes).
STICKY = (
    "illegal memory access",
    "misaligned address",
    "unspecified launch failure",
    "device-side assert",
    "illegal instruction",
    "invalid program counter",
    "invalid address space",
    "hardware stack error",
    "launch timed out",
    "uncorrectable ECC",
    "CUDA_ERROR_ILLEGAL_ADDRESS",
    "CUDA_ERROR_LAUNCH_FAILED",
)


def is_sticky(text: str) -> bool:
    """Tells whether an error's text names a fault after which every further call of the process fails."""
    return any(words in text for words in STICKY)


def context_is_dead() -> bool:
    """Tells whether the GPU refuses this process. A process that has not used one, or has no torch, is well."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


def give_memory_back() -> None:
    """Frees the memory that torch's allocator keeps for later, as other processes use the GPU, too."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized() and torch.cuda.memory_reserved() > KEPT_BYTES:
        torch.cuda.empty_cache()


class Watchdog:
    """Ends the process, after writing where every thread is, unless it is fed in time.

    A hung CUDA call ends at no signal that Python handles and may hold the interpreter's lock. The timer of
    faulthandler is a thread of C, which needs neither.
    """

    def __init__(self, seconds: float, stacks: IO[str]) -> None:
        self.seconds = seconds
        self.stacks = stacks

    def feed(self) -> None:
        """From now the process has `seconds` again."""
        faulthandler.dump_traceback_later(self.seconds, exit=True, file=self.stacks)

    def rest(self) -> None:
        faulthandler.cancel_dump_traceback_later()
