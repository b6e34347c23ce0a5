"""Public functions. Each checks its arguments and calls the op of the same name in `torch.ops.warpform`."""

from .attention import varlen_attention
from .attention_step import attention_step, attention_step_backward
from .disentangled_attention import disentangled_attention
from .encoder import add_bias_residual_layer_norm, bias_gelu, pack, packing_plan, unpack
from .fft_conv import fft_conv, fft_conv_spectrum
from .hidden import hidden_gather_linear, hidden_scatter_linear, hidden_weight_grad
from .monarch import blockdiag_glu, blockdiag_multiply, monarch_multiply
from .norm import add_residual_rms_norm, rms_norm_gelu
from .projection import project_to_blockdiag, project_to_monarch
from .routing import RoutingPlan
from .short_conv import short_conv_gate
from .spatial import depthwise_conv2d, pool_mixer
from .window import window_attention

__all__ = [
    "RoutingPlan",
    "add_bias_residual_layer_norm",
    "add_residual_rms_norm",
    "attention_step",
    "attention_step_backward",
    "bias_gelu",
    "blockdiag_glu",
    "blockdiag_multiply",
    "depthwise_conv2d",
    "disentangled_attention",
    "fft_conv",
    "fft_conv_spectrum",
    "hidden_gather_linear",
    "hidden_scatter_linear",
    "hidden_weight_grad",
    "monarch_multiply",
    "pack",
    "packing_plan",
    "pool_mixer",
    "project_to_blockdiag",
    "project_to_monarch",
    "rms_norm_gelu",
    "short_conv_gate",
    "unpack",
    "varlen_attention",
    "window_attention",
]
