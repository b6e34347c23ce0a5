"""The two branches of a transformer layer as GPT-2 and `torch.nn.TransformerEncoderLayer` have it.

LayerNorm, biases on all products, and a feed-forward without a gate. The norm stands before each branch (GPT-2), or
behind the sum (the first transformer, arXiv 1706.03762, section 3.1).
"""

from __future__ import annotations

from torch import nn

from .cores import Activation, AttentionCore
from .stack import Branch


def placement(norm_first: bool) -> str:
    """Where the norm of a branch stands."""
    return "before" if norm_first else "sum"


def attention_branch(
    hidden_size: int,
    num_heads: int,
    head_dim: int,
    *,
    causal: bool = True,
    bias: bool = True,
    eps: float = 1e-5,
    norm_first: bool = True,
) -> Branch:
    """Attention without rotary positions.

    Args:
        hidden_size: the width of the stream.
        num_heads, head_dim: of the attention; their product need not be hidden_size.
        causal: whether a token sees itself and those before it, or all of its sequence.
        bias: whether the products have biases.
        eps: of the LayerNorm.
        norm_first: whether the norm stands before the branch, or behind the sum.
    """
    core = AttentionCore(num_heads, head_dim=head_dim, causal=causal, rotary_share=0)
    return Branch(
        nn.LayerNorm(hidden_size, eps),
        nn.Linear(hidden_size, core.width, bias=bias),
        core,
        nn.Linear(num_heads * head_dim, hidden_size, bias=bias),
        placement=placement(norm_first),
    )


def feed_forward_branch(
    hidden_size: int,
    intermediate_size: int,
    *,
    activation: str = "gelu",
    bias: bool = True,
    eps: float = 1e-5,
    norm_first: bool = True,
) -> Branch:
    """A feed-forward of two products.

    Args:
        hidden_size, intermediate_size: the widths outside and inside.
        activation: between the products, one of `nn.ACTIVATIONS`.
        bias, eps, norm_first: as of `attention_branch`.
    """
    return Branch(
        nn.LayerNorm(hidden_size, eps),
        nn.Linear(hidden_size, intermediate_size, bias=bias),
        Activation(activation),
        nn.Linear(intermediate_size, hidden_size, bias=bias),
        placement=placement(norm_first),
    )
