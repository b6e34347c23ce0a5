"""DuoFormer against its formulas, written out in float64 under the names of the published code; sizes, digits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.compare import assert_close
from helpers.training import accuracy_on_digits
from helpers.vision import assert_same, wrap_products
from helpers.vision import randomise as in_double
from warpform import models, ops
from warpform.models import DuoFormerConfig, DuoFormerForImageClassification, ResNetConfig
from warpform.models.duoformer import cut_patches

BACKBONE = ResNetConfig(layer_type="basic", embedding_size=8, hidden_sizes=(8, 12, 16, 20), depths=(1, 1, 1, 1))
HEADS = 2
SMALL: dict[str, Any] = {
    "backbone": BACKBONE, "image_size": 64, "hidden_size": 12, "num_attention_heads": HEADS, "intermediate_size": 20,
    "scale_layers": 2, "patch_layers": 3, "num_labels": 5,
}  # fmt: skip
KINDS = [(1, "learned"), (2, "features"), (3, "learned"), (4, "features")]


def model_of(**fields: Any) -> DuoFormerForImageClassification:
    """In float64 and eval mode, every weight random."""
    model = in_double(DuoFormerForImageClassification(DuoFormerConfig(**{**SMALL, **fields})))
    assert isinstance(model, DuoFormerForImageClassification)
    return model


def published(model: DuoFormerForImageClassification) -> dict[str, Tensor]:
    """The weights under the published names and in their shapes, as functions of the model's."""
    state: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    found = {theirs: state[name] for name, (theirs,) in model.published_names().items()}
    return {
        name: weight[:, :, None, None] if name.startswith("projection.") and weight.dim() == 2 else weight
        for name, weight in found.items()
    }


def tokens_of(patch: tuple[int, int], scale: int) -> list[tuple[int, int]]:
    """Where on the map of a scale, 0 for the coarsest, the tokens of a patch are, in the published order."""
    side = 2**scale
    places = [(patch[0] * side + y, patch[1] * side + x) for y in range(side) for x in range(side)]
    return [places[i] for i in (0, 2, 1, 3)] if scale == 1 else places


class Formula:
    """DuoFormer as its equations say, with nothing of this project but the backbone's maps."""

    def __init__(self, model: DuoFormerForImageClassification) -> None:
        self.w, self.config, self.training = published(model), model.config, model.training
        self.backbone = model.backbone

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.w[f"{name}.weight"].flatten(1).t() + self.w[f"{name}.bias"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        normal = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return normal * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def attention(self, name: str, x: Tensor) -> Tensor:
        """x: [..., tokens, D]."""
        width = x.shape[-1] // HEADS
        q, k, v = self.linear(f"{name}.qkv", x).chunk(3, -1)
        out = []
        for head in range(HEADS):
            part = slice(head * width, (head + 1) * width)
            scores = q[..., part] @ k[..., part].transpose(-1, -2) / width**0.5
            out.append(scores.softmax(-1) @ v[..., part])
        return self.linear(f"{name}.proj", torch.cat(out, -1))

    def batch_norm(self, name: str, x: Tensor) -> Tensor:
        mean, variance = self.w[f"{name}.running_mean"], self.w[f"{name}.running_var"]
        if self.training:
            mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        normal = (x - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
        return normal * self.w[f"{name}.weight"][:, None, None] + self.w[f"{name}.bias"][:, None, None]

    def conv(self, name: str, x: Tensor, stride: int) -> Tensor:
        return F.conv2d(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"], stride, 1)

    def scale_token(self, maps: list[Tensor]) -> Tensor:
        """maps: the finest first; returns what broadcasts to [batch, patches, 1, D]."""
        if self.config.scale_token == "learned":
            return self.w["channel_token"]
        x1 = self.conv("chann_proj1.conv2", self.conv("chann_proj1.conv1", maps[0], 2), 2)
        x2 = self.conv("chann_proj2.conv1", maps[1], 2)
        x = torch.cat([*(F.max_pool2d(t, 2) for t in (x1, x2, maps[2])), maps[3]], 1)
        for i in range(4):
            x = self.batch_norm(f"chann_proj_all.nConvs.{i}.norm", self.conv(f"chann_proj_all.nConvs.{i}.conv", x, 1))
            x = x.clamp(min=0)
        return x.flatten(2).transpose(1, 2)[:, :, None]

    def __call__(self, pixels: Tensor) -> Tensor:
        """The logits."""
        maps = [x.permute(0, 3, 1, 2) for x in self.backbone.feature_maps(pixels)]
        rows, columns = maps[3].shape[2:]
        patches = [(y, x) for y in range(rows) for x in range(columns)]
        tokens = []
        for scale in range(self.config.num_scales):
            projected = self.linear(f"projection.proj_heads{3 - scale}", maps[3 - scale].permute(0, 2, 3, 1))
            found = [[projected[:, y, x] for y, x in tokens_of(patch, scale)] for patch in patches]
            tokens.append(torch.stack([torch.stack(one, 1) for one in found], 1))  # [batch, patches, tokens, D]
        first = self.scale_token(maps).expand(len(pixels), len(patches), 1, -1)
        x = torch.cat([first, *tokens], 2) + self.w["vision_transformer.pos_embed_for_scale"]
        for i in range(self.config.scale_layers):
            place = f"vision_transformer.scaleBlocks.{i}"
            x = x + self.attention(f"{place}.attn", self.norm(f"{place}.norm1", x))
            inside = self.linear(f"{place}.mlp.fc1", self.norm(f"{place}.norm2", x))
            x = x + self.linear(f"{place}.mlp.fc2", inside * (1 + torch.erf(inside / 2**0.5)) / 2)
        classes = self.w["vision_transformer.cls_token"].expand(len(pixels), 1, -1)
        x = torch.cat([classes, x[:, :, 0]], 1) + self.w["vision_transformer.pos_embed"]
        for i in range(self.config.patch_layers):
            x = self.attention(f"vision_transformer.blocks.{i}.attn", x)
        return self.linear("vision_transformer.head", x[:, 0])


@pytest.mark.sampled
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("scales", "token"), KINDS)
def test_formula(scales: int, token: str, training: bool) -> None:
    """Logits, and the gradient of every parameter by itself; the norm that is thrown away has none."""
    model = model_of(num_scales=scales, scale_token=token).train(training)
    twin, pixels = copy.deepcopy(model), torch.randn(2, 3, 64, 64).double()
    expected, found = Formula(twin)(pixels), model(pixels).logits
    assert_same("logits", found, expected)
    probe = torch.randn_like(expected)
    gradients = [
        torch.autograd.grad((x * probe).sum(), [p for p in module.parameters() if p.requires_grad])
        for module, x in ((model, found), (twin, expected))
    ]
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert {name for name, _ in model.named_parameters()} - {*names} == {"norm.weight", "norm.bias"}
    largest = max(float(x.abs().max()) for x in gradients[1])
    for name, one, other in zip(names, *gradients, strict=True):
        # Biases that BatchNorm takes away again in training mode, and those of keys, have a gradient of 0.
        if training and name.startswith("scale_features.mixing") and name.endswith("conv.bias"):
            assert float(one.abs().max()) <= 1e-12 * largest, name
            continue
        assert float(other.abs().max()) > 0, name
        assert_same(name, one, other)


@pytest.mark.sampled
@pytest.mark.parametrize(("scales", "total"), [(2, 139_325_514), (3, 139_731_786), (4, 139_978_314)])
def test_sizes(scales: int, total: int) -> None:
    """With ten classes; a scale token of features takes the place of a vector of 768."""
    with torch.device("meta"):
        config = DuoFormerConfig(num_scales=scales, scale_token="features", num_labels=10)
        model = DuoFormerForImageClassification(config)
    assert sum(p.numel() for p in model.parameters()) == total - 768 + 46_016_512
    assert model.scale_features is not None
    assert sum(p.numel() for p in model.scale_features.parameters()) == 46_016_512
    assert model.scale_positions.shape == (1, 1, {2: 6, 3: 22, 4: 86}[scales], 768)
    if scales == 4:
        others = (model.backbone, model.projections, model.scale_features)
        assert sum(p.numel() for p in model.parameters()) - sum(
            p.numel() for module in others for p in module.parameters()
        ) == 113_517_322  # fmt: skip
    vector = DuoFormerForImageClassification(DuoFormerConfig(**{**SMALL, "hidden_size": 16})).scale_token
    assert vector is not None and vector.numel() == 16


def test_order_of_tokens() -> None:
    """2 x 2 column by column, others row by row; patches row by row."""
    for scale in range(4):
        side = 2**scale
        places = torch.stack(torch.meshgrid(torch.arange(2 * side), torch.arange(3 * side), indexing="ij"), -1)
        found = cut_patches(places.unsqueeze(0), side)[0].tolist()
        patches = [(y, x) for y in range(2) for x in range(3)]
        assert found == [[list(place) for place in tokens_of(patch, scale)] for patch in patches]
    assert tokens_of((0, 0), 1) == [(0, 0), (1, 0), (0, 1), (1, 1)]


def test_attention_is_in_windows_of_a_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales: runs of S tokens. Patches: one run of all of them and the class token. Scores are divided by sqrt(d)."""
    calls = []
    attend = ops.window_attention

    def watched(qkv: Tensor, *rest: Any, **how: Any) -> Tensor:
        calls.append((tuple(qkv.shape), how["window_size"], how["scale"]))
        return attend(qkv, *rest, **how)

    monkeypatch.setattr(ops, "window_attention", watched)
    model_of(num_scales=3)(torch.randn(2, 3, 64, 64).double())
    scale = (12 // HEADS) ** -0.5
    # Six dimensions are padded to eight.
    assert calls[:2] == [((2, 1, 4 * 22, 3, HEADS, 8), (1, 22), scale)] * 2
    assert calls[2:] == [((2, 1, 5, 3, HEADS, 8), (1, 5), scale)] * 3


@pytest.mark.sampled
@pytest.mark.parametrize("token", ["learned", "features"])
def test_from_published(token: str) -> None:
    model = model_of(num_scales=3, scale_token=token)
    weights = {name: weight.detach() for name, weight in published(model).items()}
    assert weights["projection.proj_heads3.weight"].shape == (12, 20, 1, 1)
    found = DuoFormerForImageClassification.from_published(weights, num_attention_heads=HEADS)
    assert found.config == model.config and not found.training and not found.norm.weight.requires_grad
    own, read = model.state_dict(), found.state_dict()
    assert own.keys() == read.keys() and all(torch.equal(own[name], read[name]) for name in own)
    with pytest.raises(
        ValueError, match="from_published: weights must have the published names, and lack vision_transf"
    ):
        DuoFormerForImageClassification.from_published(model.state_dict())
    with pytest.raises(ValueError, match=r"from_published lack scale_blocks.1.mixer.out.bias"):
        left = {n: w for n, w in weights.items() if n != "vision_transformer.scaleBlocks.1.attn.proj.bias"}
        DuoFormerForImageClassification.from_published(left, num_attention_heads=HEADS)
    with pytest.raises(ValueError, match="from_published have unknown gate"):
        DuoFormerForImageClassification.from_published({**weights, "gate": torch.zeros(1)}, num_attention_heads=HEADS)
    # The table that the published code makes for two scales, with which it cannot run.
    wrong = {**weights, "vision_transformer.pos_embed_for_scale": torch.zeros(1, 1, 21, 12)}
    with pytest.raises(ValueError, match=r"scale_positions must be floating point of shape \[1, 1, 22, 12\]"):
        DuoFormerForImageClassification.from_published(wrong, num_attention_heads=HEADS)


def test_saved_and_loaded(tmp_path: Path) -> None:
    """Under its own names; the norm that is not called is in the file, and stays without a gradient."""
    model, pixels = model_of(scale_token="features"), torch.randn(2, 3, 64, 64).double()
    model.save_pretrained(tmp_path)
    found = models.from_pretrained(tmp_path)
    assert isinstance(found, DuoFormerForImageClassification) and found.config == model.config
    assert torch.equal(found.norm.weight, model.norm.weight) and not found.norm.weight.requires_grad
    assert_same("logits", found(pixels).logits, model(pixels).logits)


def test_modules_in_the_place_of_products() -> None:
    """Adapters are called on what they stand for."""
    model, pixels = model_of(num_scales=3, scale_token="features"), torch.randn(2, 3, 64, 64).double()
    expected = model(pixels).logits
    assert wrap_products(model) > 30
    assert_same("logits", model(pixels).logits, expected)


def test_losses_and_dropout() -> None:
    pixels, labels = torch.randn(3, 3, 64, 64).double(), torch.tensor([0, 4, 2])
    model = model_of(hidden_dropout_prob=0.3)
    out = model(pixels, labels)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits, labels))
    loss, logits = model(pixels, labels, return_dict=False)
    assert torch.equal(loss, out.loss) and torch.equal(logits, out.logits)
    for module in model.train().modules():  # statistics that do not move
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    first, second = model(pixels).logits.detach(), model(pixels).logits.detach()
    assert float((first - second).abs().max()) > 1e-3
    with pytest.raises(ValueError, match=r"DuoFormerForImageClassification: labels must have shape \[3\]"):
        model(pixels, labels[:2])


def test_bad_input() -> None:
    model = model_of()
    for shape in ((2, 3, 64, 63), (2, 3, 32, 32), (3, 64, 64)):
        with pytest.raises(ValueError, match=r"pixel_values must be of shape \[batch, num_channels, 64, 64\]"):
            model(torch.zeros(shape).double())
    with pytest.raises(ValueError, match=r"pixel_values must be of shape \[batch, 3, height, width\]"):
        model(torch.zeros(2, 1, 64, 64).double())
    assert model(torch.zeros(0, 3, 64, 64).double()).logits.shape == (0, 5)
    assert model_of(image_size=32)(torch.randn(1, 3, 32, 32).double()).logits.shape == (1, 5)  # one patch
    alone = model_of(image_size=32, scale_token="features").train()
    alone.backbone.eval()
    with pytest.raises(ValueError, match="ConvNorm: x must have more than one place a channel in training mode"):
        alone(torch.zeros(1, 3, 32, 32).double())
    for fields, text in (
        ({"scale_token": "mean"}, "scale_token must be one of learned, features, got 'mean'"),
        ({"num_scales": 0}, "num_scales must be at least 1, got 0"),
        ({"num_attention_heads": 5}, "num_attention_heads must divide hidden_size 12, got 5"),
        ({"num_scales": 5}, "backbone must have 5 feature maps, got 4"),
        ({"image_size": 48}, "image_size must be a multiple of 32, got 48"),
    ):
        with pytest.raises(ValueError, match=text):
            model_of(**fields)


class ThreeConvolutions(nn.Module):
    """A backbone of another kind: 3x3 convolutions of stride 2 with BatchNorm and ReLU, on one channel."""

    channels, strides = (16, 32, 48), (2, 4, 8)

    def __init__(self) -> None:
        super().__init__()
        sizes = zip((1, *self.channels), self.channels, strict=False)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()) for a, b in sizes
        )

    def feature_maps(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        maps = []
        for layer in self.layers:
            pixel_values = layer(pixel_values)
            maps.append(pixel_values.permute(0, 2, 3, 1))
        return tuple(maps)


def digits_model(**fields: Any) -> DuoFormerForImageClassification:
    config = DuoFormerConfig(
        backbone=None, image_size=32, hidden_size=48, num_attention_heads=4, intermediate_size=96, scale_layers=2,
        patch_layers=2, num_labels=10, **fields,
    )  # fmt: skip
    return DuoFormerForImageClassification(config, ThreeConvolutions())


@pytest.mark.sampled
@pytest.mark.parametrize("token", ["learned", "features"])
def test_a_backbone_of_another_kind(token: str) -> None:
    model = digits_model(scale_token=token)
    assert model.positions.shape == (1, 17, 48) and model.scale_positions.shape == (1, 1, 6, 48)
    out = model(torch.randn(2, 1, 32, 32), torch.tensor([1, 2]))
    out.loss.backward()
    assert out.logits.shape == (2, 10)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="backbone must be given where the config's backbone is None"):
        DuoFormerForImageClassification(model.config)
    odd = ThreeConvolutions()
    odd.strides = (2, 4, 16)
    with pytest.raises(ValueError, match=r"each has twice the stride of the one before, got strides \(2, 4, 16\)"):
        DuoFormerForImageClassification(model.config, odd)


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    """Beside the formula in the same dtype."""
    model, pixels = model_of(num_scales=3), torch.randn(2, 3, 64, 64).to(dtype)
    with torch.inference_mode():
        truth = model.to(dtype).double()(pixels.double()).logits
        model.to(dtype)
        assert_close("logits", model(pixels).logits, truth, Formula(model)(pixels))


def test_gradient_checkpointing() -> None:
    model = model_of(scale_token="features").float().train()
    twin, pixels, labels = copy.deepcopy(model), torch.randn(2, 3, 64, 64), torch.tensor([3, 1])
    twin.gradient_checkpointing_enable()
    calls: list[int] = []
    twin.patch_attentions[1].register_forward_pre_hook(lambda *_: calls.append(1))
    for one in (model, twin):
        one(pixels, labels).loss.backward()
    assert len(calls) == 2
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, twin.get_buffer(name)), name
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, twin.get_parameter(name).grad), name  # type: ignore[arg-type]


@pytest.mark.slow
def test_compiled() -> None:
    """As one graph, for batches of any size."""
    model = digits_model().eval().requires_grad_(False)
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    for batch in (2, 5):
        pixels = torch.randn(batch, 1, 32, 32)
        torch.testing.assert_close(compiled(pixels).logits, model(pixels).logits)


@pytest.mark.slow
def test_it_learns_digits() -> None:
    """Enlarged to 32 x 32 pixels: 16 patches of 6 tokens."""
    model = digits_model()

    class Enlarged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: Tensor, labels: Tensor | None = None) -> Any:
            return self.model(F.interpolate(images, size=(32, 32), mode="bilinear"), labels)

    assert accuracy_on_digits(Enlarged(), 300, 2e-3) > 0.93
