"""TurboViT's kind of network against a formula on grids in float64: outputs, and each gradient by itself."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.compare import assert_close
from helpers.parity import randomise
from helpers.training import accuracy_on_digits
from warpform import models

# 16 x 16 tokens, units of 8 x 8, 4 x 4 and 2 x 2.
SMALL: dict[str, Any] = {
    "image_size": 32, "patch_size": 3, "patch_stride": 2, "patch_padding": 1, "hidden_sizes": (8, 8, 12),
    "depths": (2, 3, 2), "num_heads": (1, 2, 3), "mlp_ratios": (1.0, 2.0, 3.0), "masked_unit_size": 8,
    "masked_unit_attention": ((True, False), (False, True, False), True), "num_labels": 5,
}  # fmt: skip


def literal(model: models.TurboViTForImageClassification, pixels: Tensor) -> Tensor:
    """Logits, on grids [batch, height, width, channels] throughout, by torch's functions."""
    config, trunk = model.config, model.trunk
    embeddings = trunk.embeddings
    x = embeddings.projection(pixels).permute(0, 2, 3, 1)
    x = x + embeddings.position_embeddings.view(1, *x.shape[1:])
    sy, sx = config.query_stride
    unit = config.masked_unit_size
    for stage, blocks in enumerate(trunk.stages):
        for i, block in enumerate(blocks):
            pool = stage > 0 and i == 0
            where = config.masked_unit_attention[stage]
            before = config.masked_unit_attention[max(stage - 1, 0)]
            if isinstance(where, bool):
                inside = where or (i == 0 and (before if isinstance(before, bool) else before[-1]))
            else:
                inside = where[i]
            normal = norm(x, block.attention_norm)
            if block.projection is not None:
                x = F.linear(normal, block.projection.weight, block.projection.bias)
            x = pooled(x, sy, sx) if pool else x
            heads = config.num_heads[stage]
            qkv = F.linear(normal, block.attention.qkv.weight, block.attention.qkv.bias)
            q, k, v = qkv.chunk(3, -1)
            window = unit if inside else tuple(k.shape[1:3])
            q = pooled(q, sy, sx) if pool else q
            of_queries = (window[0] // sy, window[1] // sx) if pool else window
            q, k, v = (cut(t, size, heads) for t, size in ((q, of_queries), (k, window), (v, window)))
            mixed = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1) @ v
            mixed = paste(mixed, x.shape, of_queries)
            x = x + F.linear(mixed, block.attention.out.weight, block.attention.out.bias)
            up, down = block.feed_forward.up, block.feed_forward.down
            inner = F.gelu(F.linear(norm(x, block.feed_forward_norm), up.weight, up.bias))
            x = x + F.linear(inner, down.weight, down.bias)
            if pool:
                unit = (unit[0] // sy, unit[1] // sx)
    return F.linear(norm(x.mean((1, 2)), model.norm), model.classifier.weight, model.classifier.bias)


def norm(x: Tensor, module: Any) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], module.weight, module.bias, 1e-6)


def pooled(x: Tensor, sy: int, sx: int) -> Tensor:
    return F.max_pool2d(x.permute(0, 3, 1, 2), (sy, sx)).permute(0, 2, 3, 1)


def cut(x: Tensor, window: tuple[int, int], heads: int) -> Tensor:
    """[batch, H, W, C] -> [batch, windows down, windows across, heads, tokens, d]."""
    x = x.unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0]))
    return x.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).unflatten(-1, (heads, -1)).transpose(3, 4)


def paste(x: Tensor, shape: torch.Size, window: tuple[int, int]) -> Tensor:
    """The opposite of `cut`."""
    x = x.transpose(3, 4).flatten(-2).unflatten(3, window)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(shape)


OPTIONS: dict[str, dict[str, Any]] = {
    "mixed": {},
    "by_stage": {"masked_unit_attention": (True, True, False)},
    "global": {"masked_unit_attention": (False, False, False)},
    "pooled_in_global": {"masked_unit_attention": (True, (False, True, True), (False, False))},
    "wider": {"hidden_sizes": (6, 10, 9), "image_size": (16, 48)},
    "one_cell": {"masked_unit_size": 4, "query_stride": (2, 2)},
    "uneven": {"query_stride": (2, 1), "masked_unit_size": (4, 2), "image_size": (16, 8)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_is_the_formula(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = models.TurboViTConfig(**{**SMALL, **options})
    model = randomise(models.TurboViTForImageClassification(config).double(), 0.2)
    pixels = torch.randn(2, 3, *config.image_size).double()
    out, truth = model(pixels).logits, literal(model, pixels)
    assert_close("logits", out, truth, truth)
    dout = torch.randn_like(out)
    named = dict(model.named_parameters())
    own, theirs = (torch.autograd.grad(x, list(named.values()), dout) for x in (out, truth))
    for name, gradient, true in zip(named, own, theirs, strict=True):
        assert_close(name, gradient, true, true, gradient=True)


def test_is_hiera_where_its_numbers_are() -> None:
    torch.manual_seed(0)
    same = {"image_size": 32, "patch_size": 3, "patch_stride": 2, "patch_padding": 1, "masked_unit_size": 4}
    hiera = models.HieraForImageClassification(
        models.HieraConfig(
            **same, embed_dim=8, depths=(1, 2, 1), num_heads=(1, 2, 4), num_query_pool=2,
            masked_unit_attention=(True, True, False),
        )
    ).double()  # fmt: skip
    model = models.TurboViTForImageClassification(
        models.TurboViTConfig(
            **same, hidden_sizes=(8, 16, 32), depths=(1, 2, 1), num_heads=(1, 2, 4), mlp_ratios=(4.0, 4.0, 4.0),
            masked_unit_attention=(True, True, False),
        )
    ).double()  # fmt: skip
    model.load_state_dict({name.removeprefix("base."): weight for name, weight in hiera.state_dict().items()})
    pixels, kept = torch.randn(3, 3, 32, 32).double(), torch.rand(3, 16) < 0.5
    labels = torch.tensor([0, 1, 1])
    for mask in (None, kept):
        out, truth = (m(pixels, labels, bool_masked_pos=mask) for m in (model, hiera))
        assert torch.equal(out.logits, truth.logits) and torch.equal(out.loss, truth.loss)
    larger = torch.randn(1, 3, 48, 64).double()
    out, truth = (m(larger, interpolate_pos_encoding=True).logits for m in (model, hiera))
    assert torch.equal(out, truth)
    assert type(model(pixels, return_dict=False)) is tuple


def test_units_of_several_cells_are_not_torn() -> None:
    """Windows of `TurboViTConfig` are rectangles also where a unit is more than poolings join."""
    config = models.TurboViTConfig(**{**SMALL, "depths": (1, 1, 1), "masked_unit_attention": (True, True, True)})
    model = randomise(models.TurboViTForImageClassification(config).double(), 0.2)
    kept = torch.tensor([[True, False, False, False]])
    pixels = torch.randn(1, 3, 32, 32).double().requires_grad_()
    (gradient,) = torch.autograd.grad(model(pixels, bool_masked_pos=kept).logits.square().sum(), pixels)
    seen = gradient.abs().amax((0, 1)) > 0
    assert seen[:16, :16].any() and not seen[16:].any() and not seen[:, 16:].any()


@pytest.mark.parametrize(
    ("fields", "message"),
    (
        ({"hidden_sizes": (8, 8)}, "hidden_sizes must have 3 values, as depths has"),
        ({"mlp_ratios": (1.0,)}, "mlp_ratios must have 3 values"),
        ({"mlp_ratios": (1.0, 1.0, 0.01)}, "mlp_ratios must leave a channel"),
        ({"masked_unit_attention": ((True,), True, True)}, "masked_unit_attention must be a bool or have 2 values in"),
        ({"num_heads": (1, 2, 5)}, "num_heads must divide the 12 channels of stage 2, got 5"),
    ),
)
def test_bad_configs(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"TurboViTConfig: {message}"):
        models.TurboViTConfig(**{**SMALL, **fields})
    with pytest.raises(ValueError, match="there are no presets"):
        models.TurboViTConfig.preset("T")


@pytest.mark.slow
def test_learns_digits() -> None:
    torch.manual_seed(0)
    config = models.TurboViTConfig(
        image_size=8, patch_size=3, patch_stride=1, patch_padding=1, num_channels=1, hidden_sizes=(16, 32, 48),
        depths=(1, 2, 1), num_heads=(1, 2, 3), mlp_ratios=(2.0, 2.0, 1.0), masked_unit_size=4,
        masked_unit_attention=(True, (True, False), False), num_labels=10,
    )  # fmt: skip
    accuracy = accuracy_on_digits(models.TurboViTForImageClassification(config), steps=300, rate=2e-3)
    assert accuracy >= 0.96, accuracy
