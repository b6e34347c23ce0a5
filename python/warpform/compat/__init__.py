"""Attention under the names and signatures of other libraries, for code that calls those: change the import."""

from . import flash_attn, flash_attn_interface, torch_varlen

__all__ = ["flash_attn", "flash_attn_interface", "torch_varlen"]
