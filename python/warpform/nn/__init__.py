"""Modules: padding-free ones take packed tensors [total, hidden], Swin's grids, Monarch Mixer's whole sequences."""

from .activations import ACTIVATIONS, BiasActivation
from .attention import SelfAttention
from .causal_monarch import CausalMonarchConvolution, CausalMonarchMixer, MixerState, TriangularMonarch
from .chain import ChainLinear, ChainRMSNorm
from .classes import ClassLayerNorm, ClassLinear, ClassRMSNorm
from .convolution import TokenConvolution
from .cores import Activation, AttentionCore, GatedActivation
from .disentangled import DisentangledEncoder, DisentangledSelfAttention, FusedDisentangledSelfAttention
from .embeddings import Embeddings
from .encoder import Encoder, EncoderLayer
from .feed_forward import FeedForward
from .hidden import GroupFusion, HiddenLinear, HiddenRouter
from .long_convolution import ImplicitFilter, MonarchMixerSequenceMixer
from .masked_lm import MaskedLMHead
from .metaformer import DropPath, MetaFormerBlock, SampleNorm
from .mixers import GatedUnit, GroupedAttention, MaskUnitAttention
from .monarch import BlockdiagLinear, MonarchLinear, MonarchMixerMLP
from .nested import NestedFeedForward, TokenWidths
from .norm import AddBiasResidualLayerNorm
from .patch_embedding import PatchEmbedding
from .pooling import FirstTokenPooler, first_tokens, last_tokens, max_pool, mean_pool
from .stack import Branch, Stack, Step
from .window import CosineWindowAttention, PatchMerging, SwinBlock, SwinV2Block, WindowAttention

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "AddBiasResidualLayerNorm",
    "AttentionCore",
    "BiasActivation",
    "BlockdiagLinear",
    "Branch",
    "CausalMonarchConvolution",
    "CausalMonarchMixer",
    "ChainLinear",
    "ChainRMSNorm",
    "ClassLayerNorm",
    "ClassLinear",
    "ClassRMSNorm",
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
    "GatedActivation",
    "GatedUnit",
    "GroupFusion",
    "GroupedAttention",
    "HiddenLinear",
    "HiddenRouter",
    "ImplicitFilter",
    "MaskUnitAttention",
    "MaskedLMHead",
    "MetaFormerBlock",
    "MixerState",
    "MonarchLinear",
    "MonarchMixerMLP",
    "MonarchMixerSequenceMixer",
    "NestedFeedForward",
    "PatchEmbedding",
    "PatchMerging",
    "SampleNorm",
    "SelfAttention",
    "Stack",
    "Step",
    "SwinBlock",
    "SwinV2Block",
    "TokenConvolution",
    "TokenWidths",
    "TriangularMonarch",
    "WindowAttention",
    "first_tokens",
    "last_tokens",
    "max_pool",
    "mean_pool",
]
