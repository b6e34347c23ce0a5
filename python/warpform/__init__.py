"""CUDA kernels for transformers that skip work which changes nothing: padded tokens, pairs out of the window.

`import warpform` loads the library and registers the ops as `torch.ops.warpform.*`. It never raises: where the library
cannot be loaded, the first use of `warpform.ops`, `warpform.Packing`, `warpform.nn` or `warpform.models` raises
ImportError and says why, and `python -m warpform doctor` tells more.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import _direct, _library
from ._version import __version__

if TYPE_CHECKING:
    from . import models, nn, ops
    from .packing import Packing

__all__ = ["Packing", "__version__", "models", "nn", "ops"]

_SUBMODULES = ("compat", "distributed", "integrations", "models", "nn", "ops")

if _library.load():
    # Autograd and autocast must be registered before anyone calls torch.ops.warpform.*, hence at import.
    _direct.attach()
    try:
        importlib.import_module(".ops", __name__)
    except Exception as error:
        _library.reject(error)


def __getattr__(name: str) -> Any:
    if name in __all__ or name in _SUBMODULES:
        _library.require()
        if name == "Packing":
            # Kept, as modules are: an import a use would take longer than a small plan.
            found = globals()[name] = importlib.import_module(".packing", __name__).Packing
            return found
        try:
            return importlib.import_module(f".{name}", __name__)
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
