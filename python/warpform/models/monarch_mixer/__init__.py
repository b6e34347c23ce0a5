"""Monarch Mixer (arXiv 2310.12109): M2-BERT, M2-GPT and M2-ViT."""

from .bert import M2BertModel
from .bert_heads import M2BertForMaskedLM, M2BertForSentenceEmbedding, M2BertForSequenceClassification, SentenceOutput
from .config import M2BertConfig, M2GPTConfig, M2ViTConfig
from .gpt import M2GPTForCausalLM
from .vit import M2ViTForImageClassification

__all__ = [
    "M2BertConfig",
    "M2BertForMaskedLM",
    "M2BertForSentenceEmbedding",
    "M2BertForSequenceClassification",
    "M2BertModel",
    "M2GPTConfig",
    "M2GPTForCausalLM",
    "M2ViTConfig",
    "M2ViTForImageClassification",
    "SentenceOutput",
]
