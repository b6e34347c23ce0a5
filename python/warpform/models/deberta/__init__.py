"""DeBERTa (arXiv 2006.03654) and its versions 2 and 3 (arXiv 2111.09543)."""

from .config import DebertaConfig, DebertaV2Config
from .heads import (
    DebertaForMaskedLM,
    DebertaForSequenceClassification,
    DebertaForTokenClassification,
    DebertaV2ForMaskedLM,
    DebertaV2ForSequenceClassification,
    DebertaV2ForTokenClassification,
)
from .model import DebertaModel, DebertaV2Model

__all__ = [
    "DebertaConfig",
    "DebertaForMaskedLM",
    "DebertaForSequenceClassification",
    "DebertaForTokenClassification",
    "DebertaModel",
    "DebertaV2Config",
    "DebertaV2ForMaskedLM",
    "DebertaV2ForSequenceClassification",
    "DebertaV2ForTokenClassification",
    "DebertaV2Model",
]
