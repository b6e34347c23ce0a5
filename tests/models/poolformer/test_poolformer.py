"""PoolFormer against transformers' in float64, its sizes, its drop path, files, and digits that it reads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from helpers.compare import assert_close
from helpers.compilations import Compilations
from helpers.training import accuracy_on_digits
from helpers.vision import assert_same, check_parity, check_there_and_back, randomise
from warpform import models
from warpform.models.common.backbone import Backbone
from warpform.nn import DropPath

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

SMALL: dict[str, Any] = {"depths": (1, 2, 1), "hidden_sizes": (8, 12, 10), "num_labels": 5}
LISTS = ("patch_sizes", "strides", "padding")


def make(head: bool = True, **fields: Any) -> nn.Module:
    torch.manual_seed(0)
    options = {**SMALL, **fields}
    stages = len(options["depths"])
    defaults = transformers.PoolFormerConfig()
    convolutions = {name: getattr(defaults, name)[:stages] for name in LISTS if name not in options}
    config = transformers.PoolFormerConfig(**convolutions, **options, num_encoder_blocks=stages)
    return randomise((transformers.PoolFormerForImageClassification if head else transformers.PoolFormerModel)(config))


OPTIONS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "usual": ({}, (2, 3, 48, 40)),
    "odd sizes": ({}, (1, 3, 37, 51)),
    "one row of tokens": ({}, (2, 3, 3, 70)),
    "pools beyond the grid": ({"pool_size": 7}, (1, 3, 20, 24)),
    "no layer scale": ({"use_layer_scale": False}, (2, 3, 24, 20)),
    "other widths": ({"mlp_ratio": 2.5, "hidden_act": "relu", "num_channels": 1}, (1, 1, 24, 20)),
    "other convolutions": (
        {"patch_sizes": (2, 2, 5), "strides": (2, 2, 1), "padding": (0, 0, 2), "pool_size": 5},
        (1, 3, 19, 22),
    ),
    "four stages": ({"depths": (1, 1, 1, 1), "hidden_sizes": (4, 8, 6, 12)}, (1, 3, 64, 33)),
}


@pytest.mark.sampled
@pytest.mark.parametrize("options, shape", OPTIONS.values(), ids=OPTIONS)
def test_parity(options: dict[str, Any], shape: tuple[int, ...]) -> None:
    model = make(**options)
    labels = torch.arange(shape[0]) + 1
    check_parity(model, torch.randn(shape, dtype=torch.float64), labels)


@pytest.mark.parametrize("head", (False, True), ids=("bare", "head"))
def test_parity_in_training_and_files(head: bool, tmp_path: Path) -> None:
    model, pixels = make(head), torch.randn(2, 3, 33, 40, dtype=torch.float64)
    check_there_and_back(model, pixels, tmp_path)
    check_parity(model.train(), pixels)
    ours = models.from_transformers(model)
    names = ("ours", "ours") if not head else ("theirs", "ours")
    for name in names:  # a folder gives the model without a head
        bare = models.from_pretrained(tmp_path / name)
        assert type(bare) is models.PoolFormerModel
    assert type(ours) is (models.PoolFormerForImageClassification if head else models.PoolFormerModel)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = make()
    pixels = torch.randn(2, 3, 48, 40, dtype=torch.float64).to(dtype)
    with torch.inference_mode():
        truth = model(pixels.double()).logits
        eager = model.to(dtype)(pixels).logits
        assert_close("logits", models.from_transformers(model)(pixels).logits, truth, eager)


def test_autocast() -> None:
    """Parameters stay float32, products are made in bfloat16, and every parameter has its gradient.

    The stream stays float32: with the usual layer scale a block adds less than bfloat16 would keep.
    """
    model = models.from_transformers(make(drop_path_rate=0.2)).float().train()
    block, x = model.base.stages[1][1], torch.randn(2, 4, 5, 12)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        block.mixer_scale.mul_(1e-5)
        added = block.mixer.residual(x, block.mixer_norm, block.mixer_scale) - x
        assert added.dtype == torch.float32 and float(added.abs().max()) > 0
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(torch.randn(2, 3, 32, 40), torch.tensor([0, 1])).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


COUNTS = {"S12": 11_915_176, "S24": 21_388_968, "S36": 30_862_760, "M36": 56_172_520, "M48": 73_473_448}


@pytest.mark.parametrize("size", COUNTS)
def test_published_sizes(size: str) -> None:
    config = models.PoolFormerConfig.preset(size, num_labels=1000)
    with torch.device("meta"):
        model = models.PoolFormerForImageClassification(config)
    assert sum(p.numel() for p in model.parameters()) == COUNTS[size]
    if size == "S12":
        assert sum(p.numel() for p in model.base.parameters()) == 11_401_152
    assert config.layer_scale_init_value == (1e-5 if size in ("S12", "S24") else 1e-6)


def test_beginning() -> None:
    """What layer scale and classifiers begin with; the norm's first values; another head on the same parameters."""
    config = models.PoolFormerConfig(**SMALL, patch_sizes=(7, 3, 3), strides=(4, 2, 2), padding=(2, 1, 1))
    model = models.PoolFormerForImageClassification(config)
    block = model.base.stages[0][0]
    assert bool((block.mixer_scale == 1e-5).all()) and block.mixer_norm.eps == 1e-5
    assert 0.01 < float(block.channel_mixer.up.weight.detach().std()) < 0.03
    again = models.PoolFormerForImageClassification(config, model.base)
    assert again.base is model.base
    assert isinstance(model.base, Backbone)
    assert model.base.channels == (8, 12, 10) and model.base.strides == (4, 8, 16)
    maps = model.base.feature_maps(torch.randn(2, 3, 32, 48))
    assert [tuple(x.shape) for x in maps] == [(2, 8, 12, 8), (2, 4, 6, 12), (2, 2, 3, 10)]
    states = model.base(torch.zeros(1, 3, 32, 48), output_hidden_states=True, return_dict=False)
    assert [tuple(x.shape) for x in states[2]] == [(1, 8, 8, 12), (1, 12, 4, 6), (1, 10, 2, 3)]


@pytest.mark.parametrize("head", (False, True), ids=("model", "classifier"))
@pytest.mark.parametrize("states", (False, True), ids=("last", "states"))
def test_tuples(head: bool, states: bool) -> None:
    """Every place holds what transformers has there; without a head the second one is empty."""
    theirs = make(head)
    ours, pixels = models.from_transformers(theirs), torch.randn(1, 3, 32, 48, dtype=torch.float64)
    expected, found = (m(pixels, output_hidden_states=states, return_dict=False) for m in (theirs, ours))
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert type(one) is type(other)
        if other is not None:
            for x, y in zip(one, other, strict=True) if isinstance(other, tuple) else ((one, other),):
                assert_same("place", x, y)


def test_a_half_is_dropped_once() -> None:
    """As in the paper: each half is left out for a sample, or scaled. transformers drops inside of the feed-forward."""
    model = models.from_transformers(make(False, depths=(2,), hidden_sizes=(8,), drop_path_rate=0.5)).train()
    block = model.stages[0][1]
    assert block.drop_path.probability == 0.5 and model.stages[0][0].drop_path.probability == 0.0
    hidden = torch.randn(40, 3, 4, 8, dtype=torch.float64)
    with torch.no_grad():
        out = block(hidden)
        # Of both halves: left out, or twice what it adds without drop path.
        seen = set()
        for i in range(40):
            x = hidden[i : i + 1]
            for first in (0.0, 2.0):
                normal = block.mixer_norm(x)
                middle = x + first * block.mixer_scale * block.mixer(normal)[0]
                added, _ = block.channel_mixer(block.channel_mixer_norm(middle))
                for second in (0.0, 2.0):
                    expected = middle + second * block.channel_mixer_scale * added
                    if float((out[i] - expected[0]).abs().max()) < 1e-12:
                        seen.add((i, first, second))
    assert len(seen) == 40 and {kind[1:] for kind in seen} == {(a, b) for a in (0.0, 2.0) for b in (0.0, 2.0)}


def test_the_bias_of_the_first_norm_has_gradient_0() -> None:
    """Not none, with which DistributedDataParallel waits, and not the rounding noise of the usual way."""
    model = models.from_transformers(make()).float().train()
    model(torch.randn(2, 3, 32, 32), torch.tensor([0, 1])).loss.backward()
    biases = [p for name, p in model.named_parameters() if name.endswith("mixer_norm.bias") and "channel" not in name]
    assert len(biases) == 4
    for bias in biases:
        assert bias.grad is not None and not bias.grad.any() and bool(bias.detach().any())
    with torch.inference_mode():
        assert model.eval()(torch.randn(2, 3, 32, 32)).logits.isfinite().all()


def test_hooks_are_called_and_change_nothing() -> None:
    model = models.from_transformers(make())
    pixels = torch.randn(2, 3, 40, 32, dtype=torch.float64)
    expected, other, seen = model(pixels).logits, copy.deepcopy(model), []
    for module in other.modules():
        module.register_forward_hook(lambda module, args, out: seen.append(module))
    assert_same("logits", other(pixels).logits, expected)
    unused = (nn.ModuleList, DropPath)
    assert set(seen) == {m for m in other.modules() if not isinstance(m, unused)}


def test_bad_input() -> None:
    model = models.from_transformers(make())
    with pytest.raises(ValueError, match=r"PoolFormerModel: pixel_values must be of shape \[batch, 3, height, width\]"):
        model(torch.randn(2, 1, 32, 32, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"pixel_values must have at least 3 pixels a side, got \[2, 3, 2, 32\]"):
        model(torch.randn(2, 3, 2, 32, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"labels"):
        model(torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="output_attentions is not supported"):
        model(torch.randn(2, 3, 32, 32, dtype=torch.float64), output_attentions=True)
    assert model(torch.randn(0, 3, 32, 32, dtype=torch.float64)).logits.shape == (0, 5)
    for fields, text in (
        ({"pool_size": 4}, "pool_size must be odd, got 4"),
        ({"depths": (1, 2)}, "must be of equal lengths"),
        ({"strides": (4, 2, 2, 0)}, "strides must be above 0"),
        ({"padding": (2, 1, 1, -1)}, "padding must be at least 0"),
        ({"hidden_act": "none"}, "hidden_act must be one of"),
        ({"drop_path_rate": 1.5}, "drop_path_rate must be between 0 and 1"),
    ):
        with pytest.raises(ValueError, match=f"PoolFormerConfig: .*{text}"):
            models.PoolFormerConfig(**fields)


@pytest.mark.slow
def test_compiled_and_exported() -> None:
    model = models.from_transformers(make(depths=(1, 1), hidden_sizes=(8, 12))).float()
    counted = Compilations()
    compiled = torch.compile(model, fullgraph=True, backend=counted)
    for batch in (2, 3):
        pixels, labels = torch.randn(batch, 3, 45, 40), torch.zeros(batch, dtype=torch.int64)
        for tensor in (pixels, labels):
            torch._dynamo.mark_dynamic(tensor, 0)
        loss, expected = (m(pixels, labels).loss for m in (compiled, model))
        torch.testing.assert_close(loss, expected)
        loss.backward()
    assert counted.count == 1
    size = torch.export.Dim("batch", max=64)
    program = torch.export.export(model.eval(), (pixels,), dynamic_shapes=({0: size}, *[None] * 0))
    torch.testing.assert_close(program.module()(pixels[:2]).logits, model(pixels[:2]).logits)


@pytest.mark.slow
def test_learns_digits() -> None:
    torch.manual_seed(0)
    config = models.PoolFormerConfig(
        num_channels=1, depths=(2, 2), hidden_sizes=(32, 64), patch_sizes=(3, 3), strides=(2, 2), padding=(1, 1),
        layer_scale_init_value=0.1, num_labels=10,
    )  # fmt: skip
    accuracy = accuracy_on_digits(models.PoolFormerForImageClassification(config), steps=300, rate=2e-3)
    assert accuracy >= 0.94, accuracy
