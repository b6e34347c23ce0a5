"""warpform's Hiera against that of transformers in float64: outputs, states and the gradient of every parameter."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.compare import assert_close
from helpers.parity import check_gradients, randomise
from helpers.training import accuracy_on_digits
from helpers.vision import assert_same
from warpform import models
from warpform.models.hiera.units import Units

transformers = pytest.importorskip("transformers")
modeling = pytest.importorskip("transformers.models.hiera.modeling_hiera")

# 16 x 16 tokens of 2 x 2 pixels, in units of 4 x 4.
SMALL: dict[str, Any] = {
    "embed_dim": 8, "image_size": (32, 32), "patch_size": (3, 3), "patch_stride": (2, 2), "patch_padding": (1, 1),
    "depths": (1, 2, 2), "num_heads": (1, 2, 2), "num_query_pool": 2, "masked_unit_size": (4, 4),
    "masked_unit_attention": (True, True, False), "num_labels": 5,
}  # fmt: skip


def hf_model(kind: str, *, options: dict[str, Any] | None = None, **fields: Any) -> nn.Module:
    """A transformers model in float64 and eval mode whose every weight is random."""
    torch.manual_seed(0)
    fields = {name: list(v) if isinstance(v, tuple) else v for name, v in {**SMALL, **fields}.items()}
    config = transformers.HieraConfig(**fields)
    model = getattr(transformers, kind)(config, **(options or {})).double()
    randomise(model, 0.2)
    return model


def check_parity(model: nn.Module, pixels: Tensor, **inputs: Any) -> None:
    """All outputs, and the gradient of each parameter, of a fixed linear functional of all outputs."""
    ours = models.from_transformers(copy.deepcopy(model))
    losses: dict[str, tuple[nn.Module, Tensor]] = {}
    weights: dict[str, Tensor] = {}
    found: dict[str, dict[str, Tensor]] = {}
    for name, m in (("ours", ours), ("theirs", model), ("again", copy.deepcopy(model))):
        out = m(pixels, output_hidden_states=True, **inputs)
        flat = {}
        for key, value in out.items():
            many = isinstance(value, (tuple, list))
            flat |= {f"{key}[{i}]": x for i, x in enumerate(value)} if many else {key: value}
        loss = torch.zeros((), dtype=torch.float64)
        for key, value in flat.items():
            if value.is_floating_point():
                weights.setdefault(key, torch.randn(value.shape, dtype=torch.float64))
                loss = loss + (value * weights[key]).sum()
        losses[name], found[name] = (m, loss), flat
    assert list(found["ours"]) == list(found["theirs"])
    for key, value in found["ours"].items():
        truth = found["theirs"][key]
        if value.is_floating_point():
            assert_close(key, value, truth, truth)
        else:
            assert torch.equal(value, truth), key
    check_gradients(*losses["ours"], losses["again"], losses["theirs"])


OPTIONS: dict[str, dict[str, Any]] = {
    "three_stages": {},
    "four_stages": {
        "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8), "num_query_pool": 3, "masked_unit_size": (8, 8),
        "masked_unit_attention": (True, True, False, False),
    },
    "one_stage": {"depths": (2,), "num_heads": (2,), "num_query_pool": 0, "masked_unit_attention": (True,)},
    "fewer_poolings": {"num_query_pool": 1, "masked_unit_attention": (True, True, True)},
    "global_first": {"masked_unit_attention": (False, True, False)},
    "global_everywhere": {"masked_unit_attention": (False, False, False)},
    "units_of_many_cells": {"masked_unit_size": (8, 8)},
    "cells_that_are_not_square": {"masked_unit_size": (8, 4), "image_size": (32, 16)},
    "strides_that_differ": {"query_stride": (2, 1), "masked_unit_size": (4, 2)},
    "other_widths": {"embed_dim_multiplier": 1.5, "mlp_ratio": 2.5, "hidden_act": "relu", "layer_norm_eps": 0.1},
    "same_width": {"embed_dim_multiplier": 1.0, "num_query_pool": 0, "num_heads": (1, 2, 4)},
    "patches_without_overlap": {"patch_size": (2, 2), "patch_padding": (0, 0), "num_channels": 1},
}  # fmt: skip


@pytest.mark.sampled
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_parity(options: dict[str, Any]) -> None:
    model = hf_model("HieraModel", **options)
    config = model.config
    check_parity(model, torch.randn(2, config.num_channels, *config.image_size, dtype=torch.float64))


def test_parity_at_224() -> None:
    fields = {name: value for name, value in OPTIONS["four_stages"].items() if name != "depths"}
    sizes = {"image_size": (224, 224), "patch_size": (7, 7), "patch_stride": (4, 4), "patch_padding": (3, 3)}
    check_parity(hf_model("HieraModel", depths=(1, 1, 1, 1), **fields, **sizes), torch.randn(1, 3, 224, 224).double())


@pytest.mark.parametrize("size", ((48, 48), (40, 24), (64, 16)), ids=("larger", "not_square", "as_many_tokens"))
def test_interpolated_positions(size: tuple[int, int]) -> None:
    """transformers rolls states back to grids of image_size alone, so only what it returns without them is compared."""
    model = hf_model("HieraModel")
    ours = models.from_transformers(model)
    pixels = torch.randn(2, 3, *size).double()
    truth = model(pixels, interpolate_pos_encoding=True)
    out = ours(pixels, interpolate_pos_encoding=True, output_hidden_states=True)
    for name in ("last_hidden_state", "pooler_output"):
        assert_close(name, out[name], truth[name], truth[name])
    grid = [side // 2 for side in size]
    assert [x.shape[1:3] for x in out.reshaped_hidden_states] == [
        torch.Size(n // s for n in grid) for s in (1, 1, 2, 4)
    ]
    with pytest.raises(ValueError, match=r"interpolate_pos_encoding must be True, got \[2, 3"):
        ours(pixels)


def test_an_image_size_that_is_not_square() -> None:
    """transformers takes its positions for those of a square, so the formula stands here."""
    ours = models.HieraModel(models.HieraConfig(**{**SMALL, "image_size": (16, 48)})).double().eval()
    pixels = torch.randn(1, 3, 32, 64).double()
    positions = ours.trunk.embeddings.position_embeddings.detach().view(1, 8, 24, 8).permute(0, 3, 1, 2)
    wanted = nn.functional.interpolate(positions, (16, 32), mode="bicubic", align_corners=False)
    state = ours(pixels, interpolate_pos_encoding=True, output_hidden_states=True).reshaped_hidden_states[0]
    truth = (ours.trunk.embeddings.projection(pixels) + wanted).permute(0, 2, 3, 1)
    assert_close("embeddings", state, truth, truth)


def test_parity_of_the_classifier() -> None:
    model = hf_model("HieraForImageClassification")
    pixels, labels = torch.randn(3, 3, 32, 32).double(), torch.tensor([0, 4, 2])
    check_parity(model, pixels, labels=labels)
    ours = models.from_transformers(model)
    for kind, given in (("regression", torch.randn(3, 5)), ("multi_label_classification", torch.rand(3, 5).round())):
        model.config.problem_type = kind
        theirs = model(pixels, labels=given.double()).loss
        assert_close(kind, models.from_transformers(model)(pixels, given.double()).loss, theirs, theirs)
    # What the published head does in eval mode beside the product, a softmax, is not here.
    assert (ours(pixels).logits.sum(1) - 1).abs().min() > 1e-3


@pytest.mark.sampled
@pytest.mark.parametrize("training", (False, True))
@pytest.mark.parametrize("options", ("three_stages", "four_stages", "units_of_many_cells", "fewer_poolings"))
def test_parity_of_masked_units(options: str, training: bool) -> None:
    model = hf_model("HieraModel", options={"is_mae": True}, **OPTIONS[options]).train(training)
    grid = [
        side // 2 // unit for side, unit in zip(model.config.image_size, model.config.masked_unit_size, strict=True)
    ]
    pixels, noise = torch.randn(2, 3, 32, 32).double(), torch.rand(2, math.prod(grid))
    check_parity(model, pixels, noise=noise)
    # The same units, given.
    ours = models.from_transformers(model)
    ours.is_mae = False
    truth = model(pixels, noise=noise)
    out = ours(pixels, truth.bool_masked_pos)
    assert_close("pooler_output", out.pooler_output, truth.pooler_output, truth.pooler_output)
    assert_close("last_hidden_state", out.last_hidden_state, truth.last_hidden_state, truth.last_hidden_state)


def test_the_share_of_units_that_is_left_out() -> None:
    model = models.HieraModel(models.HieraConfig(**SMALL, mask_ratio=0.7), is_mae=True)
    first, second = (model(torch.randn(3, 3, 32, 32)) for _ in range(2))
    assert first.bool_masked_pos.sum(1).tolist() == [4, 4, 4]  # of 16
    assert not torch.equal(first.bool_masked_pos, second.bool_masked_pos)
    assert first.ids_restore.sort(1).values.equal(torch.arange(16).expand(3, -1))


def test_any_number_of_units_an_image() -> None:
    torch.manual_seed(0)
    model = randomise(models.HieraModel(models.HieraConfig(**SMALL)).double(), 0.2)
    pixels = torch.randn(4, 3, 32, 32).double()
    kept = torch.rand(4, 16) < torch.tensor([0.2, 0.9, 0.0, 1.1]).unsqueeze(1)
    counts = kept.sum(1).tolist()
    assert counts[2:] == [0, 16] and len(set(counts)) == 4
    out = model(pixels, kept, output_hidden_states=True)
    assert out.last_hidden_state.shape == (4, 16, 32)
    for i, count in enumerate(counts):
        alone = model(pixels[i : i + 1], kept[i : i + 1].long(), output_hidden_states=True)
        assert alone.last_hidden_state.shape == (1, count, 32)
        for x, single in zip(out.reshaped_hidden_states, alone.reshaped_hidden_states, strict=True):
            assert_close("state", x[i, :count], single[0], single[0])
            assert not x[i, count:].any()
        if count:
            assert_close("pooled", out.pooler_output[i : i + 1], alone.pooler_output, alone.pooler_output)
    # All units kept is no mask.
    whole = model(pixels[3:])
    assert_close("whole", out.pooler_output[3:], whole.pooler_output, whole.pooler_output)
    assert torch.isfinite(out.pooler_output).all()  # also of an image of which nothing is kept


def test_what_is_left_out_is_not_seen() -> None:
    torch.manual_seed(0)
    model = randomise(models.HieraModel(models.HieraConfig(**SMALL)).double(), 0.2)
    kept = torch.zeros(1, 16, dtype=torch.bool)
    kept[0, [1, 6, 11]] = True
    pixels = torch.randn(1, 3, 32, 32).double().requires_grad_()
    (gradient,) = torch.autograd.grad(model(pixels, kept).pooler_output.square().sum(), pixels)
    # A unit is 8 x 8 pixels, and there are 4 x 4 of them.
    seen = gradient.abs().amax((0, 1)).unflatten(1, (4, 8)).unflatten(0, (4, 8)).amax((1, 3)).flatten() > 0
    assert torch.equal(seen, kept[0])


def test_pretraining_of_transformers_with_this_encoder() -> None:
    fields = {"decoder_hidden_size": 8, "decoder_depth": 1, "decoder_num_heads": 2}
    model = hf_model("HieraForPreTraining", **fields)
    other = copy.deepcopy(model)
    other.hiera = models.from_transformers(other.hiera)
    pixels, noise = torch.randn(2, 3, 32, 32).double(), torch.rand(2, 16)
    truth, out = model(pixels, noise=noise).loss, other(pixels, noise=noise).loss
    assert_close("loss", out, truth, truth)
    with pytest.raises(TypeError, match=r"replace its encoder: model\.hiera = "):
        models.from_transformers(model)


def test_weights_of_pretraining_are_read(tmp_path: Path) -> None:
    fields = {"decoder_hidden_size": 8, "decoder_depth": 1, "decoder_num_heads": 2}
    model = hf_model("HieraForPreTraining", **fields)
    model.save_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 32, 32).double()
    plain = transformers.HieraModel(model.config, add_pooling_layer=False).double().eval()
    plain.load_state_dict(model.hiera.state_dict())
    truth = plain(pixels)[0]
    found = models.from_pretrained(tmp_path)
    assert type(found) is models.HieraModel and found(pixels).pooler_output is None
    assert_close("last_hidden_state", found(pixels)[0], truth, truth)
    with pytest.raises(ValueError, match=r"lack classifier\.bias"):
        models.HieraForImageClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ("HieraModel", "HieraForImageClassification", "HieraBackbone"))
def test_folders_both_ways(kind: str, tmp_path: Path) -> None:
    model = hf_model(kind, out_features=["stem", "stage2"])
    pixels = torch.randn(2, 3, 32, 32).double()
    truth = model(pixels)
    model.save_pretrained(tmp_path / "theirs")
    ours = getattr(models, kind).from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    back = getattr(transformers, kind).from_pretrained(tmp_path / "ours").double().eval()
    alone = type(ours)(ours.config).double().eval()
    alone.load_state_dict(ours.state_dict())
    again = models.from_pretrained(tmp_path / "ours")
    made = [ours, back, alone.to_transformers(), *([again] if type(again) is type(ours) else [])]
    for out in (m(pixels) for m in made):
        for key, value in truth.items():
            for x, y in zip(out[key], value, strict=True) if isinstance(value, tuple) else [(out[key], value)]:
                assert_close(key, x, y, y)
    if kind == "HieraModel":
        without = hf_model(kind, options={"add_pooling_layer": False})
        assert models.from_transformers(without).to_transformers() is without


@pytest.mark.parametrize("options", ("three_stages", "four_stages", "fewer_poolings"))
def test_parity_of_the_backbone(options: str) -> None:
    stages = len(OPTIONS[options].get("depths", SMALL["depths"]))
    names = ["stem", *(f"stage{i + 1}" for i in range(stages))]
    model = hf_model("HieraBackbone", out_features=names, **OPTIONS[options])
    check_parity(model, torch.randn(2, 3, 32, 32).double())
    ours = models.from_transformers(model)
    assert ours.config.token_order == "rows"
    assert list(ours.channels) == model.channels and ours.stage_channels == ours.channels


def test_the_backbone_in_the_order_of_units() -> None:
    base = models.from_transformers(hf_model("HieraModel", out_features=["stem", "stage1", "stage3"]))
    backbone = models.HieraBackbone(base.config, base)
    assert (backbone.channels, backbone.strides) == ((8, 8, 32), (2, 2, 8))
    randomise(backbone.hidden_states_norms)
    pixels = torch.randn(2, 3, 32, 32).double()
    states = base(pixels, output_hidden_states=True).reshaped_hidden_states
    maps, output = backbone.feature_maps(pixels), backbone(pixels, output_hidden_states=True)
    assert len(maps) == 3
    for i, norm, x, first in zip(
        (0, 1, 3), backbone.hidden_states_norms.values(), maps, output.feature_maps, strict=True
    ):
        truth = nn.functional.layer_norm(states[i], states[i].shape[-1:], norm.weight, norm.bias, 1e-5)
        assert_close("map", x, truth, truth)
        assert first.is_contiguous() and torch.equal(first, x.permute(0, 3, 1, 2))
    wanted = base(pixels, output_hidden_states=True).hidden_states
    for x, y in zip(output.hidden_states, wanted, strict=True):
        assert torch.equal(x, y)
    # Parameters are shared, the pooler's apart, and other sizes need no flag.
    assert backbone.base.trunk is base.trunk and backbone.base.norm is None and base.norm is not None
    assert [x.shape[1:3] for x in backbone.feature_maps(torch.randn(1, 3, 48, 16).double())] == [
        (24, 8), (24, 8), (6, 2),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="token_order must be 'rows'"):
        backbone.to_transformers()


def test_folders_say_the_order_of_tokens(tmp_path: Path) -> None:
    theirs = hf_model("HieraBackbone")
    theirs.save_pretrained(tmp_path)
    for found in (models.from_pretrained(tmp_path), models.HieraBackbone.from_pretrained(tmp_path)):
        assert type(found) is models.HieraBackbone and found.config.token_order == "rows"
    assert models.HieraBackbone.from_pretrained(tmp_path, token_order="units").config.token_order == "units"
    models.HieraBackbone(models.HieraConfig(**SMALL)).save_pretrained(tmp_path)
    assert models.from_pretrained(tmp_path).config.token_order == "units"
    # A model without the head reads the stages of either.
    assert models.HieraModel.from_pretrained(tmp_path).norm is None


def test_folders_that_transformers_computes_otherwise(tmp_path: Path) -> None:
    """Its class has the maps of a folder in the order "rows", and others of one in the order "units", as docs say."""
    pixels = torch.randn(1, 3, 32, 32).double()
    for order in ("rows", "units"):
        ours = randomise(models.HieraBackbone(models.HieraConfig(**SMALL, token_order=order)).double())
        ours.save_pretrained(tmp_path)
        again = models.from_pretrained(tmp_path)
        theirs = transformers.HieraBackbone.from_pretrained(tmp_path, dtype=torch.float64).eval()
        expected, found, other = (model(pixels).feature_maps[0] for model in (ours, again, theirs))
        assert again.config == ours.config and torch.equal(found, expected)
        if order == "rows":
            assert_same("map", other, expected)
        else:
            assert other.shape == expected.shape and float((other - expected).detach().abs().max()) > 0.01


@pytest.mark.parametrize(
    ("size", "count"),
    (
        ("T", 27_910_216), ("S", 35_008_072), ("B", 51_524_968), ("B+", 69_896_616), ("L", 213_739_912),
        ("H", 672_779_752),
    ),
)  # fmt: skip
def test_published_sizes(size: str, count: int) -> None:
    with torch.device("meta"):
        model = models.HieraForImageClassification(models.HieraConfig.preset(size, num_labels=1000))
    assert sum(p.numel() for p in model.parameters()) == count
    theirs = transformers.HieraConfig(**model.config.to_transformers())
    assert theirs.num_labels == 1000 and theirs.hidden_size == model.config.hidden_size


def test_initial_weights() -> None:
    torch.manual_seed(0)
    model = models.HieraForImageClassification(models.HieraConfig(**SMALL, layer_norm_init=0.9))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert torch.all(parameter == 0.02), name
        elif "norm" in name:
            assert torch.all(parameter == 0.9), name
        elif parameter.numel() > 500:
            assert 0.015 < float(parameter.detach().std()) < 0.025, name


@pytest.mark.parametrize("scattered", (True, False))
@pytest.mark.parametrize(
    ("grid", "unit", "stride", "poolings"),
    (
        ((8, 8), (8, 8), (2, 2), 3),
        ((8, 16), (4, 4), (2, 2), 2),
        ((12, 8), (4, 4), (2, 1), 2),
        ((8, 8), (4, 8), (2, 2), 1),
    ),
)
def test_the_order_of_tokens(
    grid: tuple[int, int], unit: tuple[int, int], stride: tuple[int, int], poolings: int, scattered: bool
) -> None:
    units = Units(grid, unit, stride, poolings, scattered)
    tokens = torch.randn(2, *grid, 3)
    split = units.split(tokens)
    assert split.shape == (2, units.count, math.prod(unit), 3)
    assert torch.equal(units.join(split, 0), tokens)
    assert torch.equal(units.from_reversed(units.reversed(split, 0)), split)
    # Each pooling joins adjacent rows.
    pooled, rows = tokens, split
    for step in range(1, poolings + 1):
        sy, sx = stride
        pooled = pooled.unflatten(2, (-1, sx)).unflatten(1, (-1, sy)).amax((2, 4))
        rows = rows.unflatten(2, (-1, sy * sx)).amax(3)
        assert torch.equal(units.join(rows, step), pooled)
        assert torch.equal(units.after(step).split(pooled), rows)
    if scattered:
        theirs = modeling.unroll(tokens.flatten(1, 2), grid, (1, 1), [list(stride)] * poolings)
        assert torch.equal(units.reversed(split, 0), theirs)
        return
    # A unit is a rectangle of the grid.
    (height, width), columns = unit, grid[1] // unit[1]
    for i in range(units.count):
        y, x = i // columns * height, i % columns * width
        square = tokens[:, y : y + height, x : x + width].flatten(1, 2)
        assert torch.equal(split[:, i].sort(1).values, square.sort(1).values)


def test_bad_input() -> None:
    model = models.HieraModel(models.HieraConfig(**SMALL))
    for shape, message in (
        ((1, 3, 32), r"pixel_values must be of shape \[batch, 3, height, width\]"),
        ((1, 1, 32, 32), r"pixel_values must be of shape \[batch, 3, height, width\], got \[1, 1, 32, 32\]"),
        ((1, 3, 36, 32), r"patch_stride \* masked_unit_size = \[8, 8\] divides, got \[1, 3, 36, 32\]"),
        ((1, 3, 31, 32), "patch_stride"),
        ((1, 3, 0, 0), "at least 1 pixels"),
        ((1, 3, 40, 40), "or interpolate_pos_encoding must be True"),
    ):
        with pytest.raises(ValueError, match=message):
            model(torch.randn(shape))
    pixels = torch.randn(2, 3, 32, 32)
    with pytest.raises(ValueError, match=r"bool_masked_pos must have shape \[2, 16\], got \[2, 4\]"):
        model(pixels, torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"bool_masked_pos must be bool or integers, got torch\.float32"):
        model(pixels, torch.ones(2, 16))
    with pytest.raises(ValueError, match="output_attentions is not supported"):
        model(pixels, output_attentions=True)
    assert model(pixels[:0]).pooler_output.shape == (0, 32)
    assert model(pixels[:0], torch.ones(0, 16, dtype=torch.bool)).last_hidden_state.shape[0] == 0
    without = models.HieraModel(model.config, add_pooling_layer=False)
    with pytest.raises(ValueError, match="base must have a pooler"):
        models.HieraForImageClassification(model.config, without)


@pytest.mark.parametrize(
    ("fields", "message"),
    (
        ({"num_heads": (1, 3, 2)}, r"num_heads must divide the 16 channels of stage 1, got 3"),
        ({"num_heads": (1, 2)}, r"num_heads must have 3 numbers"),
        ({"masked_unit_size": 6}, r"masked_unit_size must be a multiple of query_stride \*\* 2"),
        ({"image_size": 36}, r"image_size must be a multiple of patch_stride \* masked_unit_size = 8, got 36"),
        ({"patch_padding": 0}, r"patch_padding must leave image_size / patch_stride patches"),
        ({"num_query_pool": 3}, r"num_query_pool must be at least 0 and below 3, got 3"),
        ({"masked_unit_attention": (True,)}, r"masked_unit_attention must have 3 values"),
        ({"image_size": (32, 32, 32)}, r"image_size must be one number or two"),
        ({"out_features": ("stage2", "stage1")}, r"out_features must be some of stem, stage1, stage2, stage3"),
        ({"token_order": "columns"}, r"token_order must be one of units, rows, got 'columns'"),
        ({"depths": ()}, r"depths must have a number"),
        ({"embed_dim": 0}, r"embed_dim must be at least 1"),
        ({"hidden_act": "elu"}, r"hidden_act must be one of"),
    ),
)
def test_bad_configs(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"HieraConfig: {message}"):
        models.HieraConfig(**{**SMALL, **fields})


@pytest.mark.parametrize("masked", (False, True), ids=("whole", "masked"))
def test_gradient_checkpointing(masked: bool) -> None:
    torch.manual_seed(0)
    model = models.HieraForImageClassification(models.HieraConfig(**SMALL)).double().train()
    pixels, kept = torch.randn(3, 3, 32, 32).double(), torch.rand(3, 16) < 0.6 if masked else None
    gradients = []
    for again in (False, True):
        (model.gradient_checkpointing_enable if again else model.gradient_checkpointing_disable)()
        loss = model(pixels, torch.tensor([0, 1, 2]), bool_masked_pos=kept).loss
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for first, second in zip(*gradients, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("masked", (False, True), ids=("whole", "masked"))
def test_a_path_is_dropped_for_a_whole_image(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = models.HieraModel(models.HieraConfig(**{**SMALL, "drop_path_rate": 0.5})).double()
    block, kept = model.trunk.stages[2][1], torch.tensor([[4], [9], [6]]) > torch.arange(16)
    pixels = torch.randn(3, 3, 32, 32).double()
    states = model.trunk(pixels, model.trunk.order("", pixels), kept if masked else None)
    hidden, packing = states.states[-1].detach(), states.packing
    whole = block.eval()(hidden, packing=packing)
    monkeypatch.setattr(block.drop_path, "factor", lambda x: x.new_tensor([0, 1, 0]).view(3, *[1] * (x.dim() - 1)))
    out = block.train()(hidden, packing=packing)
    images = torch.arange(3).repeat_interleave(kept.sum(1)) if masked else torch.arange(3)
    axis = 1 if masked else 0
    for image, wanted in ((0, hidden), (1, whole), (2, hidden)):
        x, truth = (t.index_select(axis, (images == image).nonzero().flatten()) for t in (out, wanted))
        assert x.numel() > 0
        assert_close(f"image {image}", x, truth, truth)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_lower_precision(dtype: torch.dtype) -> None:
    model = hf_model("HieraForImageClassification")
    oracle = copy.deepcopy(model)
    low = model.to(dtype)
    for own, exact in zip(low.parameters(), oracle.parameters(), strict=True):
        exact.data.copy_(own)
    pixels = torch.randn(4, 3, 32, 32, dtype=dtype)
    with torch.inference_mode():
        out = models.from_transformers(low)(pixels).logits
        assert_close("logits", out, oracle(pixels.double()).logits, low(pixels).logits)


@pytest.mark.slow
@pytest.mark.parametrize("masked", (False, True), ids=("whole", "masked"))
def test_compiles_whole(masked: bool) -> None:
    torch.manual_seed(0)
    model = models.HieraForImageClassification(models.HieraConfig(**SMALL)).eval()
    pixels = torch.randn(2, 3, 32, 32)
    inputs = {"bool_masked_pos": torch.rand(2, 16) < 0.5} if masked else {}
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(pixels, **inputs).logits, model(pixels, **inputs).logits)


@pytest.mark.slow
def test_exports() -> None:
    model = models.HieraForImageClassification(models.HieraConfig(**SMALL)).eval()
    pixels = torch.randn(2, 3, 32, 32)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (pixels,), dynamic_shapes={"pixel_values": {0: batch}})
    more = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(program.module()(more).logits, model(more).logits)


@pytest.mark.slow
def test_learns_digits() -> None:
    torch.manual_seed(0)
    # 8 x 8 pixels, each a token, in units of 4 x 4; global attention in the last stage alone.
    config = models.HieraConfig(
        image_size=8, patch_size=3, patch_stride=1, patch_padding=1, num_channels=1, embed_dim=24, depths=(1, 2, 1),
        num_heads=(1, 2, 4), num_query_pool=2, masked_unit_size=4, masked_unit_attention=(True, True, False),
        mlp_ratio=2.0, num_labels=10,
    )  # fmt: skip
    accuracy = accuracy_on_digits(models.HieraForImageClassification(config), steps=300, rate=2e-3)
    assert accuracy >= 0.96, accuracy
