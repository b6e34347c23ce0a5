"""DiT-3D (arXiv 2307.01831)."""

from .config import DiT3DConfig
from .model import DiT3DModel

__all__ = [
    "DiT3DConfig",
    "DiT3DModel",
]
