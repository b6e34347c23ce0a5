"""Finds and loads libwarpform.so, which registers the ops. Loading never raises: the error is kept for `require`.

So `import warpform` works on any machine, and `python -m warpform doctor` can say what is wrong.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

REBUILD = "pip install --no-build-isolation -e . in a checkout of warpform"

_loaded = False
_error: Exception | None = None


def library_path() -> Path:
    """Where the library belongs: beside this file. It need not exist."""
    return Path(__file__).resolve().with_name("libwarpform.so")


def loaded() -> bool:
    """Whether the ops are registered."""
    return _loaded


def load_error() -> Exception | None:
    """What kept the library from loading, or None."""
    return _error


def require() -> None:
    """Raises ImportError, with one sentence saying what to do, unless the library is loaded."""
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
    sentence = f"warpform: registering the ops failed ({_describe(error)}); rebuild with {REBUILD}"
    _error = ImportError(sentence)
    _error.__cause__ = error
    _loaded = False


def build_info() -> dict[str, Any]:
    """What the binary was built with: version, cuda, cuda_archs, torch_headers, compiler.

    Raises ImportError where the library is not loaded.
    """
    require()
    import torch

    return json.loads(torch.ops.warpform._build_info())


def kernel_table() -> list[dict[str, Any]]:
    """The configurations that have a CUDA kernel, one dict each. Raises ImportError where the library is not loaded."""
    require()
    import torch

    return json.loads(torch.ops.warpform._kernel_table())


def _describe(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _load() -> None:
    try:
        import torch
    except Exception as error:
        raise ImportError(
            f"warpform: importing torch failed ({_describe(error)}); install torch >= 2.10 in this Python"
        ) from error

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
    try:
        torch.ops.load_library(str(path))
    except Exception as error:
        raise ImportError(
            f"warpform: {path} could not be loaded with torch {version} ({_describe(error)}); rebuild it with {REBUILD}"
        ) from error


def _namespace_exists(torch: Any) -> bool:
    try:
        torch._C._dispatch_find_schema_or_throw("warpform::_build_info", "")
    except RuntimeError:
        return False
    return True


def _mapped_copies() -> list[Path]:
    """Files called libwarpform.so that this process has mapped."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    paths = {line[line.index("/") :] for line in lines if line.rstrip().endswith("/libwarpform.so")}
    return [Path(path) for path in sorted(paths)]
