"""Modules of padding-free transformers: packed tensors [total, hidden] in, packed tensors out."""

from .activations import ACTIVATIONS, BiasActivation
from .attention import SelfAttention
from .convolution import TokenConvolution
from .disentangled import DisentangledEncoder, DisentangledSelfAttention, FusedDisentangledSelfAttention
from .embeddings import Embeddings
from .encoder import Encoder, EncoderLayer
from .feed_forward import FeedForward
from .masked_lm import MaskedLMHead
from .norm import AddBiasResidualLayerNorm
from .pooling import FirstTokenPooler, first_tokens, last_tokens, max_pool, mean_pool

__all__ = [
    "ACTIVATIONS",
    "AddBiasResidualLayerNorm",
    "BiasActivation",
    "DisentangledEncoder",
    "DisentangledSelfAttention",
    "Embeddings",
    "Encoder",
    "EncoderLayer",
    "FeedForward",
    "FirstTokenPooler",
    "FusedDisentangledSelfAttention",
    "MaskedLMHead",
    "SelfAttention",
    "TokenConvolution",
    "first_tokens",
    "last_tokens",
    "max_pool",
    "mean_pool",
]
