"""ALBERT (arXiv 1909.11942)."""

from .config import AlbertConfig
from .model import AlbertForMaskedLM, AlbertForSequenceClassification, AlbertForTokenClassification, AlbertModel

__all__ = [
    "AlbertConfig",
    "AlbertForMaskedLM",
    "AlbertForSequenceClassification",
    "AlbertForTokenClassification",
    "AlbertModel",
]
