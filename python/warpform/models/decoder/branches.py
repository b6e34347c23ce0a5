"""The branches of a LLaMA layer, with every part open to be swapped."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...nn.cores import AttentionCore, GatedActivation
from ...nn.stack import Branch
from .config import DecoderConfig


def attention_core(config: DecoderConfig, layer: int, **options: Any) -> AttentionCore:
    """The causal attention of a layer; options of `AttentionCore` on top."""
    return AttentionCore(
        config.num_attention_heads,
        config.kv_heads,
        config.heads_dim,
        **{
            "window": config.window(layer),
            "rope_theta": config.rope_theta,
            "rope_scaling": config.rope_scaling,
            **options,
        },
    )


def attention_branch(config: DecoderConfig, layer: int) -> Branch:
    """x -> attention(norm(x))."""
    core = attention_core(config, layer)
    width = core.num_heads * core.head_dim
    return Branch(
        nn.RMSNorm(config.hidden_size, config.rms_norm_eps),
        nn.Linear(config.hidden_size, core.width, bias=config.has_qkv_bias),
        core,
        nn.Linear(width, config.hidden_size, bias=config.attention_bias),
    )


def feed_forward_branch(config: DecoderConfig) -> Branch:
    """x -> feed_forward(norm(x)), gated: SwiGLU where hidden_act is "silu"."""
    return Branch(
        nn.RMSNorm(config.hidden_size, config.rms_norm_eps),
        nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias),
        GatedActivation(config.hidden_act),
        nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias),
    )


def layer_branches(config: DecoderConfig) -> list[Branch]:
    """Attention and feed-forward of every layer, in order."""
    return [
        branch
        for layer in range(config.num_hidden_layers)
        for branch in (attention_branch(config, layer), feed_forward_branch(config))
    ]
