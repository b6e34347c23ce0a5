"""Activator against a literal form of it under the published names, permuted patches, and digits that it reads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.compare import assert_close
from helpers.compilations import Compilations
from helpers.identities import assert_same, largest
from helpers.parity import randomise
from helpers.training import accuracy_on_digits
from warpform.models import ActivatorConfig, ActivatorForImageClassification, from_pretrained

TINY: dict[str, Any] = {
    "image_size": 12, "patch_size": 3, "num_channels": 2, "hidden_size": 8, "intermediate_size": 12,
    "num_hidden_layers": 2, "dropout": 0.0, "num_labels": 5,
}  # fmt: skip


class PlainUnit(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj_1, self.proj_2 = nn.Linear(width, inner), nn.Linear(width, inner)
        self.proj_3, self.norm = nn.Linear(inner, width), nn.LayerNorm(inner)

    def forward(self, n: Tensor) -> Tensor:
        return self.proj_3(self.norm(F.gelu(self.proj_1(n))) * self.norm(self.proj_2(n)))


class PlainBlock(nn.Module):
    def __init__(self, width: int, inner: int, feed_forward: bool) -> None:
        super().__init__()
        self.norm, self.actgu = nn.LayerNorm(width), PlainUnit(width, inner)
        if feed_forward:
            self.ffn = nn.Module()
            self.ffn.net = nn.ModuleDict({"0": nn.Linear(width, inner), "3": nn.Linear(inner, width)})

    def forward(self, t: Tensor) -> Tensor:
        t = t + self.actgu(self.norm(t))
        if hasattr(self, "ffn"):
            net: Any = self.ffn.net
            t = t + net["3"](F.gelu(net["0"](self.norm(t))))
        return t


class Plain(nn.Module):
    """The formulas, in torch's operations, under the published names."""

    def __init__(self, config: ActivatorConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.patcher = nn.Conv2d(config.num_channels, width, config.patch_size, config.patch_size)
        self.model = nn.Sequential(
            *(PlainBlock(width, inner, config.feed_forward) for _ in range(config.num_hidden_layers))
        )
        self.classifier = nn.Linear(width, config.num_labels)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.model(self.patcher(x).flatten(2).mT).mean(1))


def both(dtype: torch.dtype = torch.float64, **fields: Any) -> tuple[ActivatorForImageClassification, Plain]:
    """A model that was loaded from the state dict of its plain form, and that form."""
    config = ActivatorConfig(**{**TINY, **fields})
    plain = randomise(Plain(config), 0.3).to(dtype)
    assert isinstance(plain, Plain)
    weights = {name: weight.clone() for name, weight in plain.state_dict().items()}
    model = ActivatorForImageClassification.from_published(
        weights, image_size=config.image_size, dropout=config.dropout
    )
    assert model.config == config and not model.training
    return model, plain


def images(batch: int = 3) -> Tensor:
    return torch.randn(batch, 2, 12, 12, dtype=torch.float64)


@pytest.mark.parametrize(("feed_forward", "count"), [(True, 2_650_890), (False, 1_599_242)])
def test_parameters_of_the_published_model(feed_forward: bool, count: int) -> None:
    with torch.device("meta"):
        model = ActivatorForImageClassification(ActivatorConfig(feed_forward=feed_forward))
        plain = Plain(model.config)
        assert model(torch.zeros(2, 3, 32, 32)).logits.shape == (2, 10)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert sum(parameter.numel() for parameter in plain.parameters()) == count
    assert {part for parts in model.weight_names().values() for part in parts} == set(plain.state_dict())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("feed_forward", [True, False])
def test_it_is_the_formula(feed_forward: bool, checkpointing: bool) -> None:
    """In float64, to 1e-12: logits, and the gradient of every parameter, with the one norm of both halves."""
    model, plain = both(feed_forward=feed_forward)
    x, labels = images(), torch.tensor([4, 0, 2])
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    out, logits = model(x, labels), plain(x)
    loss = F.cross_entropy(logits, labels)
    assert_same(out.logits, logits)
    assert_same(out.loss, loss)
    for found, expected in zip(model(x, labels, return_dict=False), (loss, logits), strict=True):
        assert_same(found, expected)
    out.loss.backward()
    loss.backward()
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    compared = set()
    for name, parameter in model.named_parameters():
        parts = model.weight_names()[name]
        assert parameter.grad is not None, name
        for part, chunk in zip(parts, model.split_weight(name, parameter.grad, len(parts)), strict=True):
            other = expected[part]
            assert other is not None and largest(other) > 0
            assert_same(chunk, other, part)
            compared.add(part)
    assert compared == set(expected)


def test_a_block_has_one_norm() -> None:
    model, _ = both()
    for block in model.blocks.children():
        assert block.mixer_norm is block.channel_mixer_norm
        assert block.mixer_norm is not block.mixer.norm  # type: ignore[union-attr]


def test_permuted_patches_change_nothing() -> None:
    model, _ = both()
    x = images()
    patches = x.unflatten(3, (4, 3)).unflatten(2, (4, 3)).transpose(3, 4).flatten(2, 3)  # [batch, 2, patches, 3, 3]
    order = torch.randperm(16)
    shuffled = patches[:, :, order].unflatten(2, (4, 4)).transpose(3, 4).flatten(4, 5).flatten(2, 3)
    assert not torch.equal(shuffled, x)
    with torch.no_grad():
        assert_same(model(shuffled).logits, model(x).logits)
        # Another shape of the image is such a permutation too.
        row = patches.transpose(2, 3).flatten(3).contiguous()  # [batch, 2, 3, 48]
        assert_same(model(row).logits, model(x).logits)
        # The order of pixels inside of a patch is another matter.
        assert largest(model(x.flip(3)).logits - model(x).logits) > 1e-3


def test_dropout_is_of_the_feed_forward() -> None:
    """In training behind its activation and behind its second product, nowhere else."""
    x = images()
    without, _ = both(feed_forward=False, dropout=0.5)
    assert torch.equal(without.train()(x).logits, without.eval()(x).logits)
    model, _ = both(dropout=0.5)
    assert torch.equal(model(x).logits, model(x).logits)
    model.train()
    assert not torch.equal(model(x).logits, model(x).logits)
    feed_forward: Any = model.blocks[0].channel_mixer
    rows = torch.randn(400, 8, dtype=torch.float64)
    torch.manual_seed(3)
    out, bias = feed_forward(rows)
    torch.manual_seed(3)
    inner = F.dropout(F.gelu(feed_forward.up(rows)), 0.5)
    assert bias is None
    assert_same(out, F.dropout(feed_forward.down(inner), 0.5))


def test_published_weights() -> None:
    load = ActivatorForImageClassification.from_published
    _, plain = both()
    weights = dict(plain.state_dict())
    for name, change in (("patcher.weight", "lack"), ("model.1.norm.bias", "lack"), ("model.0.other", "unknown")):
        changed = {**weights, name: weights["classifier.bias"]}
        if change == "lack":
            del changed[name]
        with pytest.raises(ValueError, match=rf"from_published: .*{change} {name}"):
            load(changed)
    with pytest.raises(ValueError, match=r"model\.0\.actgu\.proj_2\.weight must be .* of shape \[12, 8\]"):
        load({**weights, "model.0.actgu.proj_2.weight": torch.zeros(11, 8)})
    with pytest.raises(TypeError, match="ActivatorConfig has no field 'patches'"):
        load(weights, patches=4)


def test_files_have_the_published_names(tmp_path: Path) -> None:
    model, plain = both()
    model.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    stored, state = load_file(tmp_path / "model.safetensors"), plain.state_dict()
    assert stored.keys() == state.keys() and all(torch.equal(w, state[name]) for name, w in stored.items())
    again: Any = from_pretrained(tmp_path)
    assert again.config == model.config and again.blocks[0].mixer_norm is again.blocks[0].channel_mixer_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model, plain = both(dtype)
    oracle = copy.deepcopy(plain).double()
    x = images(16).to(dtype)
    with torch.no_grad():
        assert_close("logits", model(x).logits, oracle(x.double()), plain(x))


def test_bad_input() -> None:
    model, _ = both()
    for bad in (torch.zeros(2, 12, 12), torch.zeros(2, 3, 12, 12)):
        with pytest.raises(ValueError, match=r"pixel_values must be of shape \[batch, 2, height, width\], got"):
            model(bad.double())
    with pytest.raises(ValueError, match=r"pixel_values must have at least 3 pixels a side, got \[1, 2, 2, 12\]"):
        model(torch.zeros(1, 2, 2, 12).double())
    with pytest.raises(
        ValueError, match=r"pixel_values must have sizes that patches of 3 divide, got \[1, 2, 12, 13\]"
    ):
        model(torch.zeros(1, 2, 12, 13).double())
    with pytest.raises(ValueError, match=r"labels must have shape \[2\], got \[1\]"):
        model(images(2), torch.tensor([1]))
    assert model(images(0)).logits.shape == (0, 5)
    with pytest.raises(ValueError, match="^ActivatorConfig: patch_size must divide image_size 12, got 5"):
        ActivatorConfig(**{**TINY, "patch_size": 5})


@pytest.mark.slow
def test_compiles_as_one_graph() -> None:
    torch._dynamo.reset()
    model, _ = both(num_hidden_layers=1)
    backend = Compilations()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for batch in (4, 3, 5):
            x = images(batch)
            assert_same(compiled(x).logits, model(x).logits)
    assert backend.count == 1


@pytest.mark.slow
@pytest.mark.parametrize(("patch", "least", "most"), [(4, 0.9, 1.0), (2, 0.5, 0.88)])
def test_digits(patch: int, least: float, most: float) -> None:
    """It reads digits by patches of 4 x 4; of a bag of patches of 2 x 2 it cannot."""
    torch.manual_seed(0)
    config = ActivatorConfig(
        image_size=8, patch_size=patch, num_channels=1, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        dropout=0.1,
    )  # fmt: skip
    accuracy = accuracy_on_digits(ActivatorForImageClassification(config), steps=300, rate=2e-3)
    assert least <= accuracy <= most, accuracy
