"""The decoder on which language systems stand, LLaMA as it comes, both ways to and from transformers."""

from .config import DecoderConfig
from .model import DecoderForCausalLM

__all__ = [
    "DecoderConfig",
    "DecoderForCausalLM",
]
