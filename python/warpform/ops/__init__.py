"""Public functions. Each checks its arguments and calls the op of the same name in `torch.ops.warpform`."""

from .attention import varlen_attention
from .attention_step import attention_step, attention_step_backward
from .disentangled_attention import disentangled_attention
from .encoder import add_bias_residual_layer_norm, bias_gelu, pack, packing_plan, unpack
from .window import window_attention

__all__ = [
    "add_bias_residual_layer_norm",
    "attention_step",
    "attention_step_backward",
    "bias_gelu",
    "disentangled_attention",
    "pack",
    "packing_plan",
    "unpack",
    "varlen_attention",
    "window_attention",
]
