"""Hiera (arXiv 2306.00989), and networks of its kind with free stages (TurboViT, arXiv 2308.11421)."""

from .config import HieraConfig
from .heads import HieraBackbone, HieraForImageClassification
from .model import HieraModel, HieraOutput
from .turbovit import TurboViTConfig, TurboViTForImageClassification

__all__ = [
    "HieraBackbone",
    "HieraConfig",
    "HieraForImageClassification",
    "HieraModel",
    "HieraOutput",
    "TurboViTConfig",
    "TurboViTForImageClassification",
]
