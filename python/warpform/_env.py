"""The environment variables that are read at run time, each when it is used, so that a script may change it.

NAMES also has those of the build, which doctor shows where they are set.
"""

from __future__ import annotations

import os

BACKENDS = ("auto", "reference")
ONEDNN = ("auto", "0", "1")
CPU_ISAS = ("v3", "v4", "neon", "0")
NAMES = (
    "WARPFORM_BACKEND",
    "WARPFORM_STRICT",
    "WARPFORM_VALIDATE",
    "WARPFORM_LOG",
    "WARPFORM_DIRECT",
    "WARPFORM_HOPPER",
    "WARPFORM_ONEDNN",
    "WARPFORM_CPU_ISA",
    "WARPFORM_CUDA",
    "WARPFORM_CUDA_ARCHS",
    "WARPFORM_SIMT",
    "WARPFORM_SIMT_LIBRARY",
    "WARPFORM_BUILD_DIR",
    "WARPFORM_COMMIT",
    "CUDACXX",
    "CUDA_HOME",
    "CUDA_PATH",
    "CXX",
    "MAX_JOBS",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
)


def _flag(name: str) -> bool:
    value = os.environ.get(name, "")
    if value in ("", "0"):
        return False
    if value == "1":
        return True
    raise ValueError(f"{name} must be 0 or 1, got {value!r}")


def backend() -> str:
    """`WARPFORM_BACKEND`: "auto" (default) or "reference". Raises ValueError for anything else."""
    value = os.environ.get("WARPFORM_BACKEND", "") or "auto"
    if value not in BACKENDS:
        raise ValueError(f"WARPFORM_BACKEND must be one of {', '.join(BACKENDS)}, got {value!r}")
    return value


def strict() -> bool:
    """`WARPFORM_STRICT=1`: on a GPU, going to the reference instead of a kernel is an error, not a warning."""
    return _flag("WARPFORM_STRICT")


def direct() -> bool:
    """`WARPFORM_DIRECT=0`: every call goes through torch's dispatcher. It is read once, when warpform is imported."""
    return os.environ.get("WARPFORM_DIRECT", "") != "0"


def validate() -> bool:
    """`WARPFORM_VALIDATE=1`: check values that take a synchronisation to read, such as those of `cu_seqlens`."""
    return _flag("WARPFORM_VALIDATE")


def log_debug() -> bool:
    """`WARPFORM_LOG=debug`: log each op and its shapes. Raises ValueError for another level."""
    value = os.environ.get("WARPFORM_LOG", "")
    if value not in ("", "debug"):
        raise ValueError(f"WARPFORM_LOG must be debug or unset, got {value!r}")
    return value == "debug"


def onednn() -> str:
    """`WARPFORM_ONEDNN`: "auto" (default), "0" or "1". Raises ValueError for anything else."""
    value = os.environ.get("WARPFORM_ONEDNN", "") or "auto"
    if value not in ONEDNN:
        raise ValueError(f"WARPFORM_ONEDNN must be {', '.join(ONEDNN[:-1])} or {ONEDNN[-1]}, got {value!r}")
    return value


def cpu_isa() -> str:
    """`WARPFORM_CPU_ISA`, which the library reads once; "" where it is unset. Raises ValueError for an unknown one."""
    value = os.environ.get("WARPFORM_CPU_ISA", "")
    if value and value not in CPU_ISAS:
        raise ValueError(f"WARPFORM_CPU_ISA must be {', '.join(CPU_ISAS[:-1])} or {CPU_ISAS[-1]}, got {value!r}")
    return value


def problems() -> list[str]:
    """One sentence for each variable that is set to what it cannot be. Never raises."""
    sentences = []
    for read in (backend, strict, validate, log_debug, onednn, cpu_isa):
        try:
            read()
        except ValueError as error:
            sentences.append(str(error))
    for name in ("WARPFORM_CUDA", "WARPFORM_SIMT"):
        value = os.environ.get(name, "") or "auto"
        if value not in ("auto", "0", "1"):
            sentences.append(f"{name} must be auto, 0 or 1, got {value!r}")
    return sentences
