"""A model of transformers whose sequence is spread over ranks, against the same model in one process."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import warpform
from warpform.distributed import shard_positions, shard_sequence, unshard_sequence


def build(name: str) -> torch.nn.Module:
    """Random weights in float64, the same on all ranks."""
    import transformers

    sizes: dict[str, Any] = {
        "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40,
    }  # fmt: skip
    if name == "llama":
        config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, use_cache=False)
        model = transformers.LlamaModel._from_config(config, attn_implementation="sdpa")
    else:
        config = transformers.BertConfig(**sizes, max_position_embeddings=64)
        model = transformers.BertModel._from_config(config, attn_implementation="sdpa", add_pooling_layer=False)
    return model.double().eval()


def check_model(name: str, layout: str) -> None:
    """Outputs and the gradient of every parameter, to 1e-11."""
    group, batch, length = dist.group.WORLD, 2, 24
    reference = build(name)
    model = copy.deepcopy(reference)
    warpform.integrations.ring.register(group, layout=layout, timeout=60.0)
    model.set_attn_implementation("warpform_ring")
    ids, weight = torch.randint(61, (batch, length)), torch.randn(batch, length, 32, dtype=torch.float64)
    expected = reference(ids).last_hidden_state
    (expected * weight).sum().backward()

    own, own_weight = (shard_sequence(t, group=group, dim=1, layout=layout) for t in (ids, weight))
    positions = shard_positions(length, group=group, layout=layout).unsqueeze(0)
    out = model(own, position_ids=positions).last_hidden_state
    (out * own_weight).sum().backward()
    found = unshard_sequence(out.detach(), group=group, dim=1, layout=layout)
    assert (found - expected).abs().max() < 1e-11
    for (which, parameter), wanted in zip(model.named_parameters(), reference.parameters(), strict=True):
        if wanted.grad is None:
            continue
        gradient: Tensor = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        dist.all_reduce(gradient)  # each rank's tokens add to it
        assert (gradient - wanted.grad).abs().max() < 1e-11 * max(1.0, wanted.grad.abs().max().item()), which


def refusals() -> list[str]:
    """What a Llama on a ring says to that which is not supported. No rank gets as far as a hop."""
    warpform.integrations.ring.register(dist.group.WORLD, timeout=20.0)
    model = build("llama")
    model.set_attn_implementation("warpform_ring")
    rows, size = 4, dist.get_world_size()
    ids = torch.randint(61, (1, rows))
    own = shard_positions(rows * size, group=dist.group.WORLD).unsqueeze(0)
    said = []
    for arguments in (
        {"position_ids": own + 1},
        {"position_ids": torch.tensor([[0, 0, 1, 2]])},
        {"position_ids": own, "attention_mask": torch.tensor([[0, 1, 1, 1]])},
        {"position_ids": own, "output_attentions": True},
    ):
        try:
            model(ids, **arguments)
            said.append("nothing")
        except (NotImplementedError, ValueError) as error:
            said.append(str(error))
    return said
