"""Mixture of hidden dimensions, MoHD (arXiv 2412.05644)."""

from .config import MoHDConfig
from .model import MoHDForCausalLM

__all__ = [
    "MoHDConfig",
    "MoHDForCausalLM",
]
