# ruff: noqa: F403  (star imports are for type checkers alone: each family says in `__all__` what they take)
"""Architectures assembled from warpform's ops, made from a transformers model or from a folder of weights.

Each family has a folder, which is imported when one of its names is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .families import FAMILIES as _FAMILIES
from .families import PLACES as _PLACES

if TYPE_CHECKING:
    from .activator import *
    from .albert import *
    from .algoformer import *
    from .auto import *
    from .bert import *
    from .colm import *
    from .common.backbone import BackboneOutput as BackboneOutput
    from .common.outputs import EncoderOutput as EncoderOutput
    from .common.outputs import HeadOutput as HeadOutput
    from .common.outputs import ImageClassifierOutput as ImageClassifierOutput
    from .common.outputs import ImageModelOutput as ImageModelOutput
    from .common.outputs import SemanticSegmenterOutput as SemanticSegmenterOutput
    from .deberta import *
    from .decoder import *
    from .distilbert import *
    from .dit3d import *
    from .duoformer import *
    from .hiera import *
    from .ladder import *
    from .matformer import *
    from .maxim import *
    from .minimal import *
    from .mohd import *
    from .monarch_mixer import *
    from .mot import *
    from .p2at import *
    from .poolformer import *
    from .resnet import *
    from .segformer import *
    from .sentence_encoder import *
    from .sequence_parallel_transformer import *
    from .sret import *
    from .swin import *
    from .wide import *

__all__ = sorted(_PLACES)


def __getattr__(name: str) -> Any:
    place = _PLACES.get(name)
    if place is not None:
        value = getattr(importlib.import_module(f".{place}", __name__), name)
        globals()[name] = value
        return value
    if name in _FAMILIES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
