"""Attention under the names and signatures of other libraries, for code that calls those: change the import."""

from . import flash_attn, torch_varlen

__all__ = ["flash_attn", "torch_varlen"]
