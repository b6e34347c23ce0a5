"""SegFormer (arXiv 2105.15203): the Mix Transformer (MiT), alone, with a classifier, and with a segmentation head."""

from .config import SegformerConfig
from .heads import SegformerForImageClassification, SegformerForSemanticSegmentation
from .model import SegformerModel

__all__ = [
    "SegformerConfig",
    "SegformerForImageClassification",
    "SegformerForSemanticSegmentation",
    "SegformerModel",
]
