"""A transformer for sequences longer than one device holds (arXiv 2105.13120)."""

from ..common.losses import next_tokens
from .config import SequenceParallelTransformerConfig
from .model import SequenceParallelOutput, SequenceParallelTransformer

__all__ = [
    "SequenceParallelOutput",
    "SequenceParallelTransformer",
    "SequenceParallelTransformerConfig",
    "next_tokens",
]
