"""Modules of padding-free transformers: packed tensors [total, hidden] in, packed tensors out."""

from .activations import ACTIVATIONS, BiasActivation
from .attention import SelfAttention
from .embeddings import Embeddings
from .encoder import Encoder, EncoderLayer
from .feed_forward import FeedForward
from .norm import AddBiasResidualLayerNorm
from .pooling import FirstTokenPooler, first_tokens, mean_pool

__all__ = [
    "ACTIVATIONS",
    "AddBiasResidualLayerNorm",
    "BiasActivation",
    "Embeddings",
    "Encoder",
    "EncoderLayer",
    "FeedForward",
    "FirstTokenPooler",
    "SelfAttention",
    "first_tokens",
    "mean_pool",
]
