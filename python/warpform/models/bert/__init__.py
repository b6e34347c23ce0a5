"""BERT (arXiv 1810.04805)."""

from .config import BertConfig
from .model import BertForMaskedLM, BertForSequenceClassification, BertForTokenClassification, BertModel

__all__ = [
    "BertConfig",
    "BertForMaskedLM",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertModel",
]
