"""Initial weights: what is drawn, what is 0 and what is 1, by the function and in every model that uses it."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from warpform import models
from warpform.models.common.init import init_normal
from warpform.nn import AddBiasResidualLayerNorm

WIDTH: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 32,
}  # fmt: skip
FILTER: dict[str, Any] = {"vocab_size": 64, "hidden_size": 48, "num_hidden_layers": 1, "max_position_embeddings": 32}
GRID: dict[str, Any] = {"image_size": 16, "patch_size": 2, "embed_dim": 32, "depths": (1,), "num_heads": (2,)}
MODELS: dict[str, dict[str, Any]] = {
    "BertForMaskedLM": WIDTH,
    "DebertaV2Model": {**WIDTH, "conv_kernel_size": 3, "relative_attention": True, "pos_att_type": ("c2p", "p2c")},
    "M2BertForSequenceClassification": FILTER,
    "M2GPTForCausalLM": {**FILTER, "use_mlp": True},
    "M2ViTForImageClassification": {"image_size": 16, "patch_size": 4, "hidden_size": 48, "num_hidden_layers": 1},
    "MinimalTransformerForImageClassification": {"image_size": 16, "hidden_size": 48, "num_hidden_layers": 1},
    "MoHDForCausalLM": {**WIDTH, "num_groups": 4, "num_shared": 1, "top_k": 1},
    "MoTForCausalLM": {**WIDTH, "mlp_bias": True},
    "PoolFormerForImageClassification": {"depths": (1, 1, 1, 1), "hidden_sizes": (32, 48, 48, 48)},
    "SegformerForSemanticSegmentation": {"depths": (1, 1, 1, 1), "hidden_sizes": (32, 48, 40, 48)},
    "SequenceParallelTransformer": WIDTH,
    "SwinForImageClassification": {**GRID, "window_size": 4},
    "Swinv2ForImageClassification": {**GRID, "window_size": 4},
    "WideForSequenceClassification": WIDTH,
}
STD = 0.3


def is_drawn(weight: torch.Tensor) -> bool:
    """Whether it looks like normal numbers of standard deviation STD: within five times what chance does to it."""
    spread = 5 * (2 * weight.numel()) ** -0.5
    return abs(float(weight.detach().double().square().mean().sqrt()) / STD - 1) < spread


@pytest.mark.parametrize("name", MODELS)
def test_models_draw_with_their_initializer_range(name: str) -> None:
    torch.manual_seed(0)
    kind = getattr(models, name)
    model = kind(kind.config_class(**{**MODELS[name], "initializer_range": STD}))
    drawn = (nn.Linear, nn.Embedding, *model.drawn_convolutions)
    found = 0
    for module in model.modules():
        if isinstance(module, drawn):
            weight, padding = module.weight, getattr(module, "padding_idx", None)
            if padding is not None:
                assert not weight[padding].any()
                weight = torch.cat([weight[:padding], weight[padding + 1 :]])
            assert is_drawn(weight), module
            found += weight.numel() > 1000
        if isinstance(module, (*drawn, nn.LayerNorm, nn.RMSNorm, AddBiasResidualLayerNorm)):
            assert getattr(module, "bias", None) is None or not module.bias.any()
        if isinstance(module, nn.LayerNorm | nn.RMSNorm | AddBiasResidualLayerNorm):
            assert bool((module.weight == 1).all())
    assert found >= 3


def test_the_function_draws_again() -> None:
    """Of modules that hold other values: the same numbers for the same seed."""
    parts = nn.ModuleList(
        [nn.Linear(40, 30), nn.Embedding(50, 20, padding_idx=3), nn.LayerNorm(7), AddBiasResidualLayerNorm(7)]
    )
    for parameter in parts.parameters():
        nn.init.constant_(parameter, 9.0)
    torch.manual_seed(1)
    parts.apply(partial(init_normal, std=STD))
    torch.manual_seed(1)
    expected = [STD * torch.randn(30, 40), STD * torch.randn(50, 20)]
    expected[1][3] = 0
    torch.testing.assert_close(parts[0].weight, expected[0])
    torch.testing.assert_close(parts[1].weight, expected[1])
    assert not parts[0].bias.any()
    assert all(bool((norm.weight == 1).all()) and not norm.bias.any() for norm in (parts[2], parts[3]))


def test_convolutions_are_drawn_on_request() -> None:
    convolution = nn.Conv1d(8, 8, 3)
    before = convolution.weight.detach().clone()
    init_normal(convolution, STD)
    assert torch.equal(convolution.weight, before)
    torch.manual_seed(2)
    init_normal(convolution, STD, (nn.Conv1d,))
    assert is_drawn(convolution.weight) and convolution.bias is not None and not convolution.bias.any()
