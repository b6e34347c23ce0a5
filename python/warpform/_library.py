"""Finds and loads libwarpform.so, which registers the ops. Loading never raises: the error is kept for `require`.

So `import warpform` works on any machine, and `python -m warpform doctor` can say what is wrong.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from . import _elf
from ._sources import sources_hash

REBUILD = "pip install --no-build-isolation -e . in a checkout of warpform"

_loaded = False
_error: Exception | None = None


def library_path() -> Path:
    """Returns the path at which the library belongs, beside this file. It need not exist."""
    return Path(__file__).resolve().with_name("libwarpform.so")


def loaded() -> bool:
    """Tells whether the ops are registered."""
    return _loaded


def load_error() -> Exception | None:
    """Returns the error that kept the library from loading, or None."""
    return _error


def require() -> None:
    """Raises ImportError unless the library is loaded: a sentence that says what to do, below it further reasons."""
    if not _loaded:
        raise ImportError(str(_error) if _error else "warpform: the library was never loaded") from _error


def load() -> bool:
    """Loads the library once; returns whether the ops are registered, and keeps the error where they are not."""
    global _loaded, _error
    if not _loaded:
        try:
            _load()
            _loaded, _error = True, None
        except Exception as error:
            _error = error
    return _loaded


def reject(error: Exception) -> None:
    """Marks the library as unusable: it loaded, but registering the Python side of the ops failed with `error`."""
    global _loaded, _error
    _error = _failure("registering the ops failed", error, f"rebuild with {REBUILD}")
    _error.__cause__ = error
    _loaded = False


def build_info() -> dict[str, Any]:
    """Returns the facts of the build: version, cuda, cuda_archs, hopper, torch_headers, compiler.

    Raises ImportError where the library is not loaded.
    """
    require()
    import torch

    return json.loads(torch.ops.warpform._build_info())


def kernel_table(device: str = "cuda") -> list[dict[str, Any]]:
    """The configurations that have a kernel for CUDA GPUs or, with device="cpu", for this process's CPU, one dict each.

    Raises ImportError where the library is not loaded.
    """
    require()
    import torch

    ops = torch.ops.warpform
    return json.loads(ops._cpu_kernel_table() if device == "cpu" else ops._kernel_table())


def cpu_isa() -> str:
    """The instruction set of the CPU kernels that run in this process, such as x86-64-v4; empty where none do.

    Raises ImportError where the library is not loaded.
    """
    require()
    import torch

    return torch.ops.warpform._cpu_isa()


def cpu_kernels_missing() -> str:
    """Why no CPU kernel runs in this process; empty where they do.

    Raises ImportError where the library is not loaded.
    """
    require()
    import torch

    return torch.ops.warpform._cpu_kernels_missing()


def hopper_kernels_missing(device: int = 0) -> str:
    """Why calls on a GPU take none of the kernels for compute capability 9.0; empty where they do.

    Raises ImportError where the library is not loaded, and RuntimeError where there is no such GPU.
    """
    require()
    import torch

    return torch.ops.warpform._hopper_kernels_missing(device)


def stale_sources() -> str | None:
    """A sentence where a checkout's csrc lies beside the package and the library was built from other sources.

    None where there is no checkout, where the sources are the same, and where no library is loaded or it does not say.
    It reads all of csrc, so it is for `doctor` and for checks, not for imports.
    """
    csrc = library_path().parents[2] / "csrc"
    if not _loaded or not csrc.is_dir():
        return None
    built = build_info().get("sources")
    if not built or built == sources_hash(csrc):
        return None
    return f"{library_path()} was built from other sources than those in {csrc}; rebuild it with {REBUILD}"


def _failure(what: str, error: BaseException, remedy: str) -> ImportError:
    """One sentence with the first reason; below it, a line each, what else the error and those that caused it say."""
    first, *rest = _reasons(error)
    return ImportError("\n  ".join((f"warpform: {what} ({first}); {remedy}", *rest)))


def _reasons(error: BaseException) -> list[str]:
    """The lines of the error's text and of its causes' texts, the outermost first, each once."""
    lines: list[str] = []
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        # The rest of a C++ exception's text is its backtrace.
        text = str(current).split("\nException raised from", 1)[0].strip()
        name = type(current).__name__
        lines += [line.rstrip() for line in (f"{name}: {text}" if text else name).splitlines() if line.strip()]
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return list(dict.fromkeys(lines))


def _load() -> None:
    try:
        import torch
    except Exception as error:
        raise _failure("importing torch failed", error, "install torch >= 2.10 in this Python") from error

    version = str(getattr(torch, "__version__", "unknown"))
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or (int(numbers[1]), int(numbers[2])) < (2, 10):
        raise ImportError(f"warpform: needs torch >= 2.10, this Python has torch {version}; install torch==2.13.0")

    path = library_path()
    if not path.is_file():
        raise ImportError(f"warpform: {path} does not exist; build it with {REBUILD}, or install the wheel")

    # A second library defining the same ops ends the process inside torch, so this must be known before loading.
    if _namespace_exists(torch):
        others = _mapped_copies()
        if path in others:
            return
        where = ", ".join(map(str, others)) or "a library that is not called libwarpform.so"
        raise ImportError(
            f"warpform: the ops are registered already by {where}, so {path} was not loaded; "
            "keep one copy of warpform on sys.path and load no other"
        )
    fault = _elf.fault(path)
    if fault is not None:
        raise ImportError(f"warpform: {path} {fault}; rebuild it with {REBUILD}, or copy it again")
    try:
        torch.ops.load_library(str(path))
    except Exception as error:
        what = f"{path} could not be loaded with torch {version}"
        raise _failure(what, error, f"rebuild it with {REBUILD}") from error


def _namespace_exists(torch: Any) -> bool:
    return hasattr(torch.ops.warpform, "_build_info")


def _mapped_copies() -> list[Path]:
    """Files called libwarpform.so that this process has mapped."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    paths = {line[line.index("/") :] for line in lines if line.rstrip().endswith("/libwarpform.so")}
    return [Path(path) for path in sorted(paths)]
