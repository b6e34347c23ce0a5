"""A transformer for sequences longer than one device holds (arXiv 2105.13120)."""

from .config import SequenceParallelTransformerConfig
from .model import SequenceParallelOutput, SequenceParallelTransformer, next_tokens

__all__ = [
    "SequenceParallelOutput",
    "SequenceParallelTransformer",
    "SequenceParallelTransformerConfig",
    "next_tokens",
]
