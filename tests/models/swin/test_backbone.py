"""Backbones of Swin and Swin V2 against those of transformers in float64: maps, states and each gradient."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.compare import assert_close
from helpers.parity import randomise
from warpform import models
from warpform.models.common.backbone import Backbone

transformers = pytest.importorskip("transformers")

SMALL: dict[str, Any] = {
    "image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4,
}  # fmt: skip
versions = pytest.mark.parametrize("version", ("Swin", "Swinv2"))


def hf_model(version: str, kind: str = "Backbone", **fields: Any) -> nn.Module:
    """A transformers model in float64 whose every weight is random."""
    torch.manual_seed(0)
    names = ["stem", "stage1", "stage2"]
    config = getattr(transformers, f"{version}Config")(**{**SMALL, "out_features": names, **fields})
    return randomise(getattr(transformers, f"{version}{kind}")(config).double(), 0.2)


def assert_same(out: Any, truth: Any) -> None:
    assert list(out) == list(truth)
    for key in truth:
        for x, y in zip(out[key], truth[key], strict=True):
            assert_close(key, x, y, y)


SIZES = {
    "as_the_config": (32, 32),
    "nothing_divides": (35, 41),
    "grids_below_the_window": (6, 13),  # which a backbone pads to windows, where the model attends as a whole
}


@versions
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_parity(version: str, size: tuple[int, int]) -> None:
    model = hf_model(version)
    ours = models.from_transformers(copy.deepcopy(model))
    pixels = torch.randn(2, 3, *size).double()
    runs = {"ours": ours, "theirs": model}
    outputs = {name: m(pixels, output_hidden_states=True) for name, m in runs.items()}
    assert_same(outputs["ours"], outputs["theirs"])
    weights = [torch.randn_like(x) for x in outputs["ours"].feature_maps]
    grads = {}
    for name, m in runs.items():
        loss = sum((x * w).sum() for x, w in zip(outputs[name].feature_maps, weights, strict=True))
        named = dict(m.named_parameters())
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        grads[name] = dict(zip(named, found, strict=True))
    theirs = {ours.file_name(name): g for name, g in grads["theirs"].items()}
    unused = 0
    for name, parts in ours.weight_names().items():
        own = grads["ours"][name]
        if own is None:
            # transformers has the norm after the last stage too, which no map has gone through.
            assert all(theirs[part] is None and "layernorm." in part and "encoder" not in part for part in parts)
            unused += 1
            continue
        whole = torch.cat([theirs[part] for part in parts])
        chunks = (
            [(own, whole)] if "bias" in name else zip(own.chunk(len(parts)), [theirs[p] for p in parts], strict=True)
        )
        for x, y in chunks:
            # The gradient of what is before a softmax, or of the keys' bias, is small beside its terms.
            assert_close(name, x, y, y, gradient=True, scale=float(whole.abs().max()))
    assert unused == (2 if version == "Swin" else 0)


@versions
@pytest.mark.parametrize("chosen", (None, ["stage1"], ["stem", "stage2"]), ids=str)
def test_chosen_stages(version: str, chosen: list[str] | None) -> None:
    model = hf_model(version, out_features=chosen)
    ours = models.from_transformers(model)
    assert isinstance(ours, Backbone) and ours.out_features == tuple(model.out_features)
    assert list(ours.channels) == model.channels
    pixels = torch.randn(1, 3, 32, 64).double()
    assert_same(ours(pixels), model(pixels))
    maps = ours.feature_maps(pixels)
    for x, first, channels, stride in zip(maps, ours(pixels).feature_maps, ours.channels, ours.strides, strict=True):
        assert x.shape == (1, 32 // stride, 64 // stride, channels)
        assert torch.equal(first, x.permute(0, 3, 1, 2)) and first.is_contiguous()
    assert torch.equal(ours(pixels, return_dict=False)[0][0], ours(pixels)[0][0])


@versions
def test_folders_both_ways(version: str, tmp_path: Path) -> None:
    model = hf_model(version)
    pixels = torch.randn(1, 3, 30, 34).double()
    truth = model(pixels)
    model.save_pretrained(tmp_path / "theirs")
    kind = getattr(models, f"{version}Backbone")
    ours = kind.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    back = getattr(transformers, kind.__name__).from_pretrained(tmp_path / "ours").double().eval()
    alone = kind(ours.config).double().eval()
    alone.load_state_dict(ours.state_dict())
    found = models.from_pretrained(tmp_path / "ours")
    assert type(found) is kind
    for m in (ours, back, found, alone.to_transformers().double(), models.from_transformers(model).to_transformers()):
        assert_same(m(pixels), truth)


@versions
def test_on_a_model(version: str) -> None:
    base = models.from_transformers(hf_model(version, "Model")).eval()
    kind = getattr(models, f"{version}Backbone")
    backbone = kind(base.config, base)
    small = torch.randn(1, 3, 8, 8).double()
    before = base(small)[0]
    pixels = torch.randn(1, 3, 32, 32).double()
    states = base(pixels, output_hidden_states=True, output_hidden_states_before_downsampling=True)
    for x, state in zip(backbone.feature_maps(pixels), states.reshaped_hidden_states, strict=True):
        truth = state.permute(0, 2, 3, 1)
        if version == "Swin":
            truth = nn.functional.layer_norm(truth, truth.shape[-1:], eps=1e-5)
        assert_close("map", x, truth, truth)
    # The parameters are shared. The model itself goes on as it was: its windows shrink on small grids.
    shared = {id(p) for p in base.parameters()}
    assert all(id(p) in shared for p in backbone.base.parameters())
    assert torch.equal(base(small)[0], before)
    with pytest.raises(TypeError, match=f"{kind.__name__}: base must be a {version}Model, got Linear"):
        kind(base.config, nn.Linear(1, 1))
    with pytest.raises(ValueError, match="config must be base.config"):
        kind(getattr(models, f"{version}Config")(**SMALL), base)


def test_weights_of_a_classifier_are_read_by_swin_v2(tmp_path: Path) -> None:
    hf_model("Swinv2", "ForImageClassification").save_pretrained(tmp_path)
    base, backbone = models.Swinv2Model.from_pretrained(tmp_path), models.Swinv2Backbone.from_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 32, 32).double()
    states = base(pixels, output_hidden_states=True, output_hidden_states_before_downsampling=True)
    for x, truth in zip(backbone(pixels).feature_maps, states.reshaped_hidden_states, strict=True):
        assert_close("map", x, truth, truth)


@versions
def test_what_the_base_classes_bring(version: str) -> None:
    torch.manual_seed(0)
    kind = getattr(models, f"{version}Backbone")
    config = getattr(models, f"{version}Config")(**SMALL, out_features=("stage1", "stage2"), drop_path_rate=0.0)
    backbone = kind(config).train()
    pixels = torch.randn(2, 3, 32, 32)

    def gradients() -> list[Tensor]:
        loss = sum(x.square().sum() for x in backbone.feature_maps(pixels))
        used = [p for n, p in backbone.named_parameters() if not n.startswith("base.norm.")]
        return list(torch.autograd.grad(loss, used))

    plain = gradients()
    backbone.gradient_checkpointing_enable()
    assert all(torch.equal(x, y) for x, y in zip(gradients(), plain, strict=True))
    resized = backbone.eval().resized(window_size=6)
    assert resized.feature_maps(pixels)[0].shape == (2, 16, 16, 16)
    with pytest.raises(ValueError, match="pixel_values must be of shape"):
        backbone(pixels[:, :1])
    assert backbone(pixels[:0]).feature_maps[0].shape == (0, 16, 16, 16)
    with pytest.raises(ValueError, match=rf"{version}Config: out_features must be some of stem, stage1, stage2"):
        type(config)(**SMALL, out_features=("stage3",))


def test_files_of_older_releases_and_of_classifiers(tmp_path: Path) -> None:
    """They lack the norm after the last stage, or put a prefix before all names."""
    model = hf_model("Swin")
    model.save_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 32, 32).double()
    truth = model(pixels)
    load, save = pytest.importorskip("safetensors.torch").load_file, pytest.importorskip("safetensors.torch").save_file
    weights = load(tmp_path / "model.safetensors")
    assert "encoder.layers.0.blocks.0.layernorm_after.weight" in weights and "swin.layernorm.weight" in weights
    older = {name: weight for name, weight in weights.items() if not name.startswith("swin.layernorm.")}
    prefixed = {name if "norms" in name else f"swin.{name}": weight for name, weight in older.items()}
    for given in (older, {**prefixed, "classifier.weight": torch.zeros(1)}):
        save(given, tmp_path / "model.safetensors")
        assert_same(models.SwinBackbone.from_pretrained(tmp_path)(pixels), truth)
