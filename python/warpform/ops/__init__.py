"""Public functions. Each checks its arguments and calls the op of the same name in `torch.ops.warpform`."""

from .attention import varlen_attention
from .disentangled_attention import disentangled_attention
from .encoder import add_bias_residual_layer_norm, bias_gelu, pack, packing_plan, unpack
from .hidden import hidden_gather_linear, hidden_scatter_linear, hidden_weight_grad
from .routing import RoutingPlan
from .window import window_attention

__all__ = [
    "RoutingPlan",
    "add_bias_residual_layer_norm",
    "bias_gelu",
    "disentangled_attention",
    "hidden_gather_linear",
    "hidden_scatter_linear",
    "hidden_weight_grad",
    "pack",
    "packing_plan",
    "unpack",
    "varlen_attention",
    "window_attention",
]
