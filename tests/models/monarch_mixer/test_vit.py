"""M2-ViT against the same written plainly from its formulas, and digits that it learns to read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import plain_m2 as plain
from helpers.compare import assert_close
from helpers.compilations import Compilations
from helpers.parity import randomise
from helpers.training import accuracy_on_digits
from warpform.models import M2ViTConfig, M2ViTForImageClassification

TINY = {
    "image_size": 15, "patch_size": 3, "num_channels": 2, "hidden_size": 16, "num_hidden_layers": 2,
    "intermediate_size": 24, "filter_order": 16, "num_labels": 5,
}  # fmt: skip


def make_model(**fields: Any) -> Any:
    torch.manual_seed(0)
    model = randomise(M2ViTForImageClassification(M2ViTConfig(**{**TINY, **fields})), 0.2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "filter_fn" in name:
                parameter.mul_(3)
    return model


def plain_vit(weights: Mapping[str, Tensor], config: M2ViTConfig, pixels: Tensor) -> Tensor:
    """Patch by patch, row by row of the image."""
    p, eps = config.patch_size, config.layer_norm_eps
    places = range(0, config.image_size, p)
    patches = torch.stack([pixels[:, :, y : y + p, x : x + p].flatten(1) for y in places for x in places], dim=1)
    x = patches @ weights["projection.weight"].flatten(1).T + weights["projection.bias"]
    x = x + weights["position_embeddings"]
    for i in range(config.num_hidden_layers):
        layer = plain.under(weights, f"layers.{i}.")
        normal = plain.layer_norm(plain.under(layer, "mixer_norm."), x, eps)
        x = x + plain.mixer(plain.under(layer, "mixer."), normal)
        normal = plain.layer_norm(plain.under(layer, "mlp_norm."), x, eps)
        x = x + plain.mlp(plain.under(layer, "mlp."), normal, None)
    x = plain.layer_norm(plain.under(weights, "norm."), x, eps).mean(1)
    return plain.linear(plain.under(weights, "classifier."), x)


@pytest.mark.parametrize(
    "fields", ({}, {"residual_long_conv": False, "nblocks": 2}), ids=("default", "one convolution")
)
def test_parity_with_the_formulas(fields: dict[str, Any]) -> None:
    """Logits, the loss, and the gradient of every parameter by itself."""
    model = make_model(**fields)
    batches, labels = torch.randn(8, 4, 2, 15, 15), torch.tensor([0, 4, 2, 2])
    outs = [model(pixels, labels) for pixels in batches]
    runs, losses = [], []
    for dtype in (torch.float64, torch.float32):
        weights = plain.weights_of(model, dtype)
        runs.append(torch.stack([plain_vit(weights, model.config, pixels.to(dtype)) for pixels in batches]))
        losses.append((weights, [torch.nn.functional.cross_entropy(logits, labels) for logits in runs[-1]]))
    assert_close("logits", torch.stack([out.logits for out in outs]), *runs)
    assert_close("loss", *(torch.stack(one) for one in ([out.loss for out in outs], losses[0][1], losses[1][1])))
    plain.check_gradients(model, [out.loss for out in outs], *losses)


def test_bad_input() -> None:
    model = make_model()
    for bad in (torch.randn(2, 2, 15), torch.randn(2, 3, 15, 15), torch.randn(2, 2, 15, 12)):
        with pytest.raises(ValueError, match=r"pixel_values must be of shape \[batch, 2, 15, 15\], got"):
            model(bad)
    with pytest.raises(ValueError, match="labels"):
        model(torch.randn(2, 2, 15, 15), torch.tensor([1]))
    for fields, message in (
        ({"patch_size": 4}, "patch_size must divide image_size 15, got 4"),
        ({"hidden_size": 18}, "nblocks must divide hidden_size 18, got 4"),
        ({"num_labels": 0}, "num_labels must be at least 1, got 0"),
        ({"hidden_dropout_prob": 2.0}, "hidden_dropout_prob must be between 0 and 1"),
        ({"problem_type": "none"}, "problem_type must be None or one of"),
    ):
        with pytest.raises(ValueError, match=message):
            M2ViTConfig(**{**TINY, **fields})
    with pytest.raises(ValueError, match="size must be one of S, B, got 'L'"):
        M2ViTConfig.preset("L")
    assert M2ViTConfig.preset("S").patches == 196


@pytest.mark.slow
def test_compiles_as_one_graph_for_all_batch_sizes() -> None:
    model = make_model(num_hidden_layers=1)
    backend = Compilations()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for batch in (4, 3, 5):  # not the 2 of the channels: tracing takes equal sizes for the same
            pixels = torch.randn(batch, 2, 15, 15)
            torch.testing.assert_close(compiled(pixels).logits, model(pixels).logits)
    assert backend.count == 1


@pytest.mark.slow
def test_learns_digits() -> None:
    torch.manual_seed(0)
    config = M2ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=32, num_hidden_layers=2, intermediate_size=64,
        filter_order=16, num_labels=10,
    )  # fmt: skip
    accuracy = accuracy_on_digits(M2ViTForImageClassification(config), steps=150, rate=5e-3)
    assert accuracy >= 0.95, accuracy
