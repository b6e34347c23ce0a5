"""The ResNet backbone against that of transformers, its names and sizes against torchvision's, and what it refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.compare import assert_close
from helpers.compilations import Compilations
from helpers.vision import assert_same, check_parity, check_there_and_back, randomise
from warpform import models
from warpform.models import ResNetBackbone, ResNetConfig

transformers = pytest.importorskip("transformers")

SMALL: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": (8, 12, 16, 20), "depths": (2, 1, 2, 1)}
STAGES = ("stage1", "stage2", "stage3", "stage4")
VARIANTS: tuple[dict[str, Any], ...] = (
    {"layer_type": "basic", "out_features": STAGES},
    {"layer_type": "bottleneck", "out_features": ("stem", "stage2", "stage4")},
    {"layer_type": "bottleneck", "downsample_in_bottleneck": True},
    {"layer_type": "basic", "downsample_in_first_stage": True, "out_features": STAGES[1:]},
)


def hf_model(**fields: Any) -> nn.Module:
    options = {**SMALL, **fields}
    if "out_features" in options:
        options["out_features"] = list(options["out_features"])
    model: nn.Module = transformers.ResNetBackbone(transformers.ResNetConfig(**options))
    return randomise(model)


def our_model(**fields: Any) -> ResNetBackbone:
    return ResNetBackbone(ResNetConfig(**{**SMALL, "layer_type": "basic", **fields}))


@pytest.mark.sampled
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("fields", VARIANTS)
def test_parity(fields: dict[str, Any], training: bool) -> None:
    """Maps, stem and stages, every gradient, and in training mode the statistics of BatchNorm after the step."""
    theirs, pixels = hf_model(**fields).train(training), torch.randn(2, 3, 45, 70).double()
    check_parity(theirs, pixels)
    ours = models.from_transformers(theirs)
    assert isinstance(ours, ResNetBackbone)
    for found, channels, stride in zip(ours.feature_maps(pixels), ours.channels, ours.strides, strict=True):
        assert found.shape == (2, -(-45 // stride), -(-70 // stride), channels)


@pytest.mark.sampled
@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
def test_there_and_back(layer_type: str, tmp_path: Path) -> None:
    check_there_and_back(hf_model(layer_type=layer_type), torch.randn(2, 3, 33, 40).double(), tmp_path)


def test_a_classifier_of_transformers_gives_its_backbone(tmp_path: Path) -> None:
    theirs = randomise(transformers.ResNetForImageClassification(transformers.ResNetConfig(**SMALL, num_labels=4)))
    theirs.save_pretrained(tmp_path)
    ours, pixels = models.from_pretrained(tmp_path), torch.randn(2, 3, 40, 33).double()
    assert isinstance(ours, ResNetBackbone)
    (found,) = ours.feature_maps(pixels)
    assert_same("map", found.permute(0, 3, 1, 2), theirs.resnet(pixels).last_hidden_state)


def test_an_eps_other_than_the_usual_is_taken_over() -> None:
    theirs = hf_model(layer_type="basic")
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.1
    check_parity(theirs, torch.randn(1, 3, 32, 32).double())


@pytest.mark.sampled
@pytest.mark.parametrize(("size", "parameters", "entries"), [("18", 11_176_512, 120), ("34", 21_284_672, 216),
                                                            ("50", 23_508_032, 318)])  # fmt: skip
def test_presets_have_torchvisions_sizes_and_names(size: str, parameters: int, entries: int) -> None:
    """Without `fc`, which has 2 entries."""
    with torch.device("meta"):
        model = ResNetBackbone(ResNetConfig.preset(size))
    assert sum(p.numel() for p in model.parameters()) == parameters
    state = model.state_dict()
    assert len(state) == entries
    shapes = {name: tuple(state[name].shape) for name in ("conv1.weight", "layer2.0.conv1.weight", "bn1.running_mean")}
    assert shapes["conv1.weight"] == (64, 3, 7, 7) and shapes["bn1.running_mean"] == (64,)
    assert shapes["layer2.0.conv1.weight"] == ((128, 256, 1, 1) if size == "50" else (128, 64, 3, 3))
    assert ("layer1.0.downsample.1.num_batches_tracked" in state) == (size == "50")
    assert {"layer4.0.downsample.0.weight", "layer3.5.bn2.weight" if size != "18" else "layer3.1.bn2.weight"} <= {
        *state
    }
    # The stride is that of the 3x3 convolution, as in torchvision.
    place = model.get_submodule("layer3.0.conv2" if size == "50" else "layer3.0.conv1")
    assert place.stride == (2, 2) and place.kernel_size == (3, 3)


def test_backbone_protocol() -> None:
    model = our_model(out_features=STAGES).eval()
    assert isinstance(model, models.common.backbone.Backbone)
    assert model.channels == (8, 12, 16, 20) and model.strides == (4, 8, 16, 32)
    maps = model.feature_maps(torch.randn(2, 3, 33, 70))  # sizes are rounded up
    assert [tuple(x.shape) for x in maps] == [(2, 9, 18, 8), (2, 5, 9, 12), (2, 3, 5, 16), (2, 2, 3, 20)]
    assert all(x.is_contiguous() for x in maps)
    for found, expected in zip(model(torch.zeros(1, 3, 1, 1)).feature_maps, model.channels, strict=True):
        assert found.shape == (1, expected, 1, 1)
    assert [x.shape[0] for x in model.feature_maps(torch.zeros(0, 3, 32, 32))] == [0] * 4
    assert our_model().channels == (20,)


@pytest.mark.sampled
@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
def test_from_published(layer_type: str) -> None:
    """From a state dict of torchvision's kind: its classifier is ignored, and counts that old files lack begin at 0."""
    model = randomise(our_model(layer_type=layer_type, num_channels=2))
    assert isinstance(model, ResNetBackbone)
    weights = {**model.state_dict(), "fc.weight": torch.zeros(5, 20), "fc.bias": torch.zeros(5)}
    found, pixels = ResNetBackbone.from_published(weights), torch.randn(1, 2, 40, 40).double()
    assert found.config == model.config and not found.training
    assert found.conv1.weight.data_ptr() == model.conv1.weight.data_ptr()
    assert torch.equal(found.feature_maps(pixels)[0], model.feature_maps(pixels)[0])
    old = {name: weight for name, weight in weights.items() if "num_batches" not in name}
    chosen = ResNetBackbone.from_published(old, out_features=("stage1", "stage3"))
    assert int(chosen.bn1.num_batches_tracked) == 0 and chosen.channels == (8, 16)  # type: ignore[arg-type]
    assert torch.equal(chosen.feature_maps(pixels)[1], model.stage_maps(pixels)[3])

    with pytest.raises(ValueError, match="from_published: weights must have torchvision's names"):
        ResNetBackbone.from_published({"stem.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="from_published lack"):
        ResNetBackbone.from_published({n: w for n, w in weights.items() if n != "layer2.0.bn1.weight"})
    with pytest.raises(ValueError, match="from_published have unknown gate"):
        ResNetBackbone.from_published({**weights, "gate": torch.zeros(1)})
    with pytest.raises(TypeError, match="has no field 'kernel'"):
        ResNetBackbone.from_published(weights, kernel=3)


def test_state_dicts_of_both_names_load() -> None:
    theirs, ours = hf_model(layer_type="basic"), our_model().double()
    ours.load_state_dict(theirs.state_dict())
    again = our_model().double()
    again.load_state_dict(ours.state_dict())
    pixels = torch.randn(1, 3, 33, 33).double()
    expected = theirs(pixels).feature_maps[0]
    for model in (ours, again):
        assert_same("map", model.eval()(pixels).feature_maps[0], expected)


def test_gradient_checkpointing_counts_a_batch_once() -> None:
    """Blocks are computed twice, and their statistics are those of one forward, bit by bit."""
    model = our_model(layer_type="bottleneck").train()
    twin, pixels = copy.deepcopy(model), torch.randn(2, 3, 64, 64)
    twin.gradient_checkpointing_enable()
    calls: list[int] = []
    twin.get_submodule("layer1.0.conv1").register_forward_hook(lambda *_: calls.append(1))
    for one in (model, twin):
        one(pixels).feature_maps[0].square().sum().backward()
    assert len(calls) == 2
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, twin.get_buffer(name)), name
        assert not name.endswith("num_batches_tracked") or int(buffer) == 1
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, twin.get_parameter(name).grad), name  # type: ignore[arg-type]
    assert all(m.track_running_stats for m in twin.modules() if isinstance(m, nn.BatchNorm2d))


def test_hooks_of_stages_are_called() -> None:
    """With gradient checkpointing too, where blocks are computed again and not the whole of a stage."""
    model, seen = our_model().train(), []
    for name in ("layer1", "layer4"):
        model.get_submodule(name).register_forward_hook(lambda _, given, out: seen.append(tuple(out.shape)))
    pixels = torch.randn(2, 3, 64, 64)
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        (found,) = model(pixels).feature_maps
        found.sum().backward()
        assert seen == [(2, 8, 16, 16), (2, 20, 2, 2)]
        seen.clear()


def test_bfloat16() -> None:
    model, pixels = randomise(our_model()), torch.randn(2, 3, 40, 40)
    (truth,) = model.feature_maps(pixels.double())
    half = copy.deepcopy(model).bfloat16()
    (found,) = half.feature_maps(pixels.bfloat16())
    theirs = hf_model(layer_type="basic").bfloat16()
    theirs.load_state_dict({name: half.state_dict()[ours] for ours, (name,) in half.weight_names().items()})
    eager: Tensor = theirs(pixels.bfloat16()).feature_maps[0]
    assert_close("map", found, truth, eager.permute(0, 2, 3, 1))


def test_bad_input() -> None:
    model = our_model()
    for shape in ((2, 1, 40, 40), (2, 3, 40), (3, 40, 40)):
        with pytest.raises(
            ValueError, match=r"ResNetBackbone: pixel_values must be of shape \[batch, 3, height, width\]"
        ):
            model(torch.zeros(shape))
    with pytest.raises(ValueError, match="pixel_values must have at least 1 pixels a side"):
        model(torch.zeros(1, 3, 0, 8))
    for batch in (0, 1):
        with pytest.raises(
            ValueError,
            match=r"ResNetBackbone: pixel_values must give BatchNorm more than one place a channel in training mode, "
            rf"got \[{batch}, 3, 32, 32\], of which the last map has {batch}: give more images",
        ):
            model.train()(torch.zeros(batch, 3, 32, 32))
    model(torch.zeros(1, 3, 32, 33))  # 1 x 2
    for module in model.modules():  # frozen statistics need no second place
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    model(torch.zeros(1, 3, 32, 32))
    for wrong, text in (
        ({"layer_type": "deep"}, "layer_type must be one of basic, bottleneck, got 'deep'"),
        ({"depths": (1, 1)}, "hidden_sizes and depths must be of equal lengths"),
        ({"depths": (1, 1, 0, 1)}, "at least 1"),
        ({"layer_type": "bottleneck", "hidden_sizes": (8, 12, 16, 18)}, "must be multiples of 4 with bottlenecks"),
        ({"out_features": ("stage5",)}, "out_features must be some of stem, stage1"),
        ({"hidden_act": "gelu"}, "hidden_act must be one of relu, got 'gelu'"),
    ):
        with pytest.raises(ValueError, match=text):
            our_model(**wrong)


@pytest.mark.slow
def test_compiled() -> None:
    model = our_model(hidden_sizes=(8, 12), depths=(1, 1), out_features=("stage1", "stage2")).eval()
    counter = Compilations()
    compiled = torch.compile(model.feature_maps, backend=counter, fullgraph=True, dynamic=True)
    for size in (40, 72):
        pixels = torch.randn(2, 3, size, size + 8)
        for found, expected in zip(compiled(pixels), model.feature_maps(pixels), strict=True):
            torch.testing.assert_close(found, expected)
    assert counter.count == 1
