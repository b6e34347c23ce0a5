"""Swin (arXiv 2103.14030) and Swin V2 (arXiv 2111.09883)."""

from .backbone import SwinBackbone, Swinv2Backbone
from .base import SwinOutput
from .config import SwinConfig, Swinv2Config
from .heads import SwinForImageClassification, Swinv2ForImageClassification
from .model import SwinModel, Swinv2Model

__all__ = [
    "SwinBackbone",
    "SwinConfig",
    "SwinForImageClassification",
    "SwinModel",
    "SwinOutput",
    "Swinv2Backbone",
    "Swinv2Config",
    "Swinv2ForImageClassification",
    "Swinv2Model",
]
