"""Modules of transformers: padding-free ones take and give packed tensors [total, hidden], those of Swin grids."""

from .activations import ACTIVATIONS, BiasActivation
from .attention import SelfAttention
from .convolution import TokenConvolution
from .disentangled import DisentangledEncoder, DisentangledSelfAttention, FusedDisentangledSelfAttention
from .embeddings import Embeddings
from .encoder import Encoder, EncoderLayer
from .feed_forward import FeedForward
from .hidden import GroupFusion, HiddenLinear, HiddenRouter
from .masked_lm import MaskedLMHead
from .norm import AddBiasResidualLayerNorm
from .pooling import FirstTokenPooler, first_tokens, last_tokens, max_pool, mean_pool
from .window import CosineWindowAttention, DropPath, PatchMerging, SwinBlock, SwinV2Block, WindowAttention

__all__ = [
    "ACTIVATIONS",
    "AddBiasResidualLayerNorm",
    "BiasActivation",
    "CosineWindowAttention",
    "DisentangledEncoder",
    "DisentangledSelfAttention",
    "DropPath",
    "Embeddings",
    "Encoder",
    "EncoderLayer",
    "FeedForward",
    "FirstTokenPooler",
    "FusedDisentangledSelfAttention",
    "GroupFusion",
    "HiddenLinear",
    "HiddenRouter",
    "MaskedLMHead",
    "PatchMerging",
    "SelfAttention",
    "SwinBlock",
    "SwinV2Block",
    "TokenConvolution",
    "WindowAttention",
    "first_tokens",
    "last_tokens",
    "max_pool",
    "mean_pool",
]
