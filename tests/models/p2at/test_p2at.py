"""P2AT against its formulas, written in float64 under the names of the published code; sizes, losses, digit scenes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.compare import assert_close
from helpers.scenes import digit_scenes, mean_iou
from helpers.training import train
from helpers.vision import assert_same, wrap_products
from helpers.vision import randomise as in_double
from warpform import models, ops
from warpform.models import P2ATConfig, P2ATForSemanticSegmentation, ResNetConfig
from warpform.models.p2at.blocks import P2ATContext, P2ATPyramid

HEADS, KEY = 3, 4
BACKBONE = ResNetConfig(layer_type="basic", embedding_size=8, hidden_sizes=(8, 12, 16, 20), depths=(1, 1, 1, 1))
SMALL: dict[str, Any] = {
    "backbone": BACKBONE, "hidden_size": 10, "num_attention_heads": HEADS, "key_dim": KEY, "num_positions": 5,
    "mlp_ratio": 2, "num_labels": 4,
}  # fmt: skip


def model_of(**fields: Any) -> P2ATForSemanticSegmentation:
    """In float64 and eval mode, every weight random: gamma and statistics too."""
    model = in_double(P2ATForSemanticSegmentation(P2ATConfig(**{**SMALL, **fields})))
    assert isinstance(model, P2ATForSemanticSegmentation)
    return model


def published(model: P2ATForSemanticSegmentation) -> dict[str, Tensor]:
    """The weights under the published names and in their shapes, as functions of the model's."""
    state: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    found = {}
    for name, parts in model.published_names().items():
        chunks = state[name].chunk(len(parts)) if len(parts) > 1 else (state[name],)
        for part, chunk in zip(parts, chunks, strict=True):
            pointwise = chunk.dim() == 2 and ".pwconv" not in part  # a convolution in the published code
            if part.startswith(("final_seg_head", "aux_seg_head")):
                pointwise = part.endswith("conv2.weight")
            found[part] = chunk[:, :, None, None] if pointwise else chunk
    return found


class Formula:
    """P2AT as its equations say, on channels first, with nothing of this project but the backbone's maps.

    statistics: of each BatchNorm that ran in training mode the mean, the unbiased variance, by its published name.
    """

    def __init__(self, model: P2ATForSemanticSegmentation) -> None:
        self.w, self.training, self.config = published(model), model.training, model.config
        self.backbone = model.backbone
        self.statistics: dict[str, tuple[Tensor, Tensor]] = {}

    def norm(self, name: str, x: Tensor) -> Tensor:
        w = self.w
        mean, variance = w[f"{name}.running_mean"], w[f"{name}.running_var"]
        if self.training:
            mean = x.mean((0, 2, 3))
            variance = (x - mean[:, None, None]).square().mean((0, 2, 3))
            count = x.numel() // x.shape[1]
            self.statistics[name] = (mean, variance * count / (count - 1))
        normal = (x - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
        return normal * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]

    def prelu(self, name: str, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, x * self.w[f"{name}.weight"][:, None, None])

    def conv(self, name: str, x: Tensor, groups: int = 1) -> Tensor:
        weight = self.w[f"{name}.weight"]
        return F.conv2d(x, weight, self.w.get(f"{name}.bias"), padding=weight.shape[-1] // 2, groups=groups)

    def full(self, name: str, x: Tensor, groups: int = 1) -> Tensor:
        """PReLU BN convolution."""
        return self.prelu(f"{name}.act", self.norm(f"{name}.bn", self.conv(f"{name}.conv", x, groups)))

    def resize(self, x: Tensor, like: Tensor) -> Tensor:
        return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)

    def axis(self, name: str, axis: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention over an axis: q, k, v [batch, channels, n] -> [batch, channels, n]."""
        q, k = (
            t + F.interpolate(self.w[f"{name}.pos_emb_{axis}_{kind}.pos_embed"], t.shape[2], mode="linear")
            for kind, t in (("q", q), ("k", k))
        )
        out = []
        for head in range(HEADS):
            keys, values = slice(head * KEY, (head + 1) * KEY), slice(2 * head * KEY, 2 * (head + 1) * KEY)
            scores = q[:, keys].transpose(1, 2) @ k[:, keys] / KEY**0.5
            out.append((scores.softmax(-1) @ v[:, values].transpose(1, 2)).transpose(1, 2))
        return torch.cat(out, 1)

    def attention(self, name: str, x: Tensor) -> Tensor:
        residual = self.norm(f"{name}.details_enhancer.conv1.1", self.conv(f"{name}.details_enhancer.conv1.0.conv", x))
        local = self.conv(f"{name}.details_enhancer.conv2.0.conv", residual)
        details = self.norm(f"{name}.details_enhancer.conv2.1", local) + residual
        c = self.full(f"{name}.pool_feats_processor.conv1", x)
        first = F.avg_pool2d(c, 3, 1, 1)
        second = F.avg_pool2d(first, 5, 1, 2)
        third = F.avg_pool2d(second, 7, 1, 3)
        joined = torch.cat([first, first if self.config.released else second, third], 1)
        x = self.full(f"{name}.pool_feats_processor.conv2", joined, groups=c.shape[1]) * c
        q, k, v = (self.conv(f"{name}.to_{kind}.conv", x) for kind in "qkv")
        rows = self.axis(name, "row", *(t.mean(3) for t in (q, k, v)))[:, :, :, None]
        columns = self.axis(name, "column", *(t.mean(2) for t in (q, k, v)))[:, :, None]
        mixed = v + self.full(f"{name}.proj_encode_row", rows) + self.conv(f"{name}.proj_encode_column.conv", columns)
        return self.full(f"{name}.proj", mixed) * details

    def block(self, name: str, x: Tensor) -> Tensor:
        x = x + self.attention(f"{name}.attn", x)
        inside = self.conv(f"{name}.mlp.fc1.conv", x)
        inside = self.conv(f"{name}.mlp.dwconv", inside, groups=inside.shape[1]).clamp(min=0)
        return x + self.conv(f"{name}.mlp.fc2.conv", inside)

    def decoder(self, name: str, x: Tensor) -> Tensor:
        w, y = self.w, self.norm(f"{name}.dwconv.1", self.conv(f"{name}.dwconv.0", x, groups=x.shape[1]))
        y = y.permute(0, 2, 3, 1) @ w[f"{name}.pwconv1.0.weight"].t() + w[f"{name}.pwconv1.0.bias"]
        y = y * (y + 3).clamp(0, 6) / 6
        y = y @ w[f"{name}.pwconv2.weight"].t() + w[f"{name}.pwconv2.bias"]
        return x + (w[f"{name}.gamma"] * y).permute(0, 3, 1, 2)

    def fusion(self, name: str, fine: Tensor, middle: Tensor, deep: Tensor) -> Tensor:
        h = self.full(f"{name}.down_feat.conv1", fine)
        mean = self.conv(f"{name}.down_feat.conv2.conv", h.mean((2, 3), keepdim=True).expand_as(h))
        fine = self.conv(
            f"{name}.down_feat.fuse.conv", mean + torch.sigmoid(self.conv(f"{name}.down_feat.conv3.conv", h))
        )
        s = self.resize(self.norm(f"{name}.st_feat.1", self.conv(f"{name}.st_feat.0.conv", middle)), fine)
        weights = self.conv(f"{name}.up_feat.conv2.conv", deep).softmax(1)
        u = self.resize(self.full(f"{name}.up_feat.conv1", deep) * weights, fine)
        out = self.norm(f"{name}.fuse.1", self.conv(f"{name}.fuse.0.conv", torch.cat([fine, u, s], 1)))
        return out + s * u + torch.sigmoid(s * fine)

    def context(self, name: str, x: Tensor) -> Tensor:
        w, y = self.w, self.conv(f"{name}.conv1.conv", x.mean((2, 3), keepdim=True))
        y = y * w[f"{name}.bn_scale.weight"][:, None, None] + w[f"{name}.bn_scale.bias"][:, None, None]
        return x + self.full(f"{name}.conv2", y)

    def head(self, name: str, x: Tensor, size: torch.Size) -> Tensor:
        x = self.conv(f"{name}.conv1", self.norm(f"{name}.bn1", x).clamp(min=0))
        x = self.conv(f"{name}.conv2", self.norm(f"{name}.bn2", x).clamp(min=0))
        return F.interpolate(x, size, mode="bilinear", align_corners=True)

    def __call__(self, pixels: Tensor) -> list[Tensor]:
        """The logits, and those of auxiliary heads."""
        x1, x2, x3, x4 = (x.permute(0, 3, 1, 2) for x in self.backbone.feature_maps(pixels))
        x, size = self.full("feature_reducer", x4), pixels.shape[2:]
        for i in range(self.config.num_blocks):
            x = self.block(f"deep_feature_processor.transformer_layers.{i}", x)
        p1 = self.decoder("P1_decoder", x)
        b4 = self.fusion("BiS4", x2, x3, p1)
        p2 = self.decoder("P2_decoder", self.context("pool_gce4", b4))
        b3 = self.fusion("BiS3", x1, x2, p2)
        x = self.full("refine3.c2_", self.decoder("P3_decoder", self.context("pool_gce3", b3)))
        x = self.full("refine2.c2_", self.full("fuse1", torch.cat([self.resize(p2, x), x], 1)))
        x = self.full("refine1.c2_", self.full("fuse2", torch.cat([self.resize(p1, x), x], 1)))
        found = [self.head("final_seg_head", x, size)]
        if self.config.auxiliary_heads:
            found += [self.head("aux_seg_head1", b4, size), self.head("aux_seg_head2", b3, size)]
        return found


@pytest.mark.sampled
@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_formula(training: bool, released: bool) -> None:
    """Logits, the gradient of every parameter by itself, and the statistics of every BatchNorm after a step."""
    model = model_of(released=released, auxiliary_heads=True).train(training)
    twin, pixels = copy.deepcopy(model), torch.randn(3, 3, 69, 140).double()
    before = dict(copy.deepcopy(model).named_buffers())
    formula = Formula(twin)
    expected = formula(pixels)
    out = model(pixels)
    found = [out.logits, *out.auxiliary]
    probes = [torch.randn_like(x) for x in expected]
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert_same(f"logits {i}", one, other)
    gradients = []
    for module, logits in ((model, found), (twin, expected)):
        total = torch.stack([(x * probe).sum() for x, probe in zip(logits, probes, strict=True)]).sum()
        gradients.append(torch.autograd.grad(total, list(module.parameters())))
    # What BatchNorm takes away again has a gradient of 0 in training mode, and rounding of what cancels.
    cancels = ("contexts.0.bias", "contexts.1.bias", *(f"decoders.{i}.depthwise.bias" for i in range(3)))
    largest = max(float(x.abs().max()) for x in gradients[1])
    for (name, _), one, other in zip(model.named_parameters(), *gradients, strict=True):
        if training and name in cancels:
            assert float(one.abs().max()) <= 1e-12 * largest, name
            continue
        assert float(other.abs().max()) > 0, name
        assert_same(name, one, other)
    after = dict(model.named_buffers())
    if not training:
        assert all(torch.equal(value, before[name]) for name, value in after.items())
        return
    names = {parts[0]: name for name, parts in model.published_names().items()}
    own = [name for name in after if name.endswith("running_mean") and not name.startswith("backbone.")]
    assert len(formula.statistics) == len(own)
    for place, (mean, variance) in formula.statistics.items():
        for leaf, value in (("running_mean", mean), ("running_var", variance)):
            name = names[f"{place}.{leaf}"]
            assert_same(name, after[name], 0.9 * before[name] + 0.1 * value)
        assert int(after[names[f"{place}.num_batches_tracked"]]) == 4  # in_double begins with 3


def test_the_released_pyramid_is_another_one() -> None:
    """With the first map in the place of the second the same weights are another model."""
    pyramids = [P2ATPyramid(10, released).double().eval() for released in (False, True)]
    pyramids[1].load_state_dict(pyramids[0].state_dict())
    found = [pyramid(torch.ones(1, 5, 6, 10).double()).detach() for pyramid in pyramids]
    assert float((found[0] - found[1]).abs().max()) > 1e-3


def test_an_output_of_the_pyramid_sees_neighbouring_channels_of_one_map() -> None:
    """Output c sees joined channels 3 c to 3 c + 2: with 64 channels, output 30 sees 26 to 28 of the second map."""
    pyramid = P2ATPyramid(64, released=False).double().eval()
    whole = torch.randn(1, 4, 4, 64).double()
    seen = []
    pyramid.inwards.forward = lambda x: x  # type: ignore[method-assign, assignment]
    for output in (0, 30, 63):
        x = whole.clone().requires_grad_()
        (gradient,) = torch.autograd.grad((pyramid(x)[..., output] / x[..., output].detach()).sum(), x)
        channels = gradient.abs().sum((0, 1, 2)).nonzero().flatten().tolist()
        seen.append([c for c in channels if c != output])  # the product with c itself
    assert seen == [[1, 2], [26, 27, 28], [61, 62]]


def test_a_context_has_one_tap() -> None:
    """3x3 and 7x7 on the mean of a map: other taps see zeros alone, and their gradients are 0."""
    context = P2ATContext(6).double().eval()
    out = context(torch.randn(2, 3, 4, 6).double())
    out.sum().backward()
    conv: Any = context.out.conv
    for weight, middle in ((context.inwards.weight, 1), (conv.weight, 3)):
        taps = weight.grad.abs().sum((0, 1)).nonzero().tolist()
        assert taps == [[middle, middle]]
    # A convolution with a hook is called, and gives the same.
    x, seen = torch.randn(2, 3, 4, 6).double(), []
    expected = context(x)
    for module in (context.inwards, conv):
        module.register_forward_hook(lambda _, given, out: seen.append(tuple(out.shape)))
    assert_same("with hooks", context(x), expected)
    assert seen == [(2, 6, 1, 1)] * 2
    context.out.register_forward_hook(lambda _, given, out: seen.append(tuple(out.shape)))
    context(x)
    assert seen[4:] == [(2, 1, 1, 6)]


def test_modules_in_the_place_of_products() -> None:
    """Adapters are called on what they stand for; maps of 10 x 10 have as many channels."""
    model, pixels = model_of(auxiliary_heads=True), torch.randn(2, 3, 80, 80).double()
    expected = model(pixels)
    assert wrap_products(model) > 50
    found = model(pixels)
    assert_same("logits", found.logits, expected.logits)
    for i, (one, other) in enumerate(zip(found.auxiliary, expected.auxiliary, strict=True)):
        assert_same(f"auxiliary {i}", one, other)


def test_rows_and_columns_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """With queries and keys of as many dimensions as values have, and the scale of their own."""
    calls: list[tuple[Any, ...]] = []
    attend = ops.varlen_attention

    def watched(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, *rest: Any, **how: Any) -> Any:
        calls.append((tuple(q.shape), tuple(v.shape), offsets.tolist(), rest[1:], how["softmax_scale"]))
        assert not q[..., KEY:].any() and not k[..., KEY:].any()
        return attend(q, k, v, offsets, *rest, **how)

    monkeypatch.setattr(ops, "varlen_attention", watched)
    model_of(num_blocks=1)(torch.randn(2, 3, 65, 129).double())  # the coarsest map is 3 x 5
    shape = (16, HEADS, 2 * KEY)
    assert calls == [(shape, shape, [0, 3, 8, 11, 16], (5, 5), KEY**-0.5)]


@pytest.mark.sampled
@pytest.mark.parametrize(("size", "alone", "with_heads"), [("S", 12_736_019, 12_812_729), ("M", 22_844_179, 22_920_889),
                                                           ("L", 25_276_435, 25_353_145)])  # fmt: skip
def test_sizes(size: str, alone: int, with_heads: int) -> None:
    with torch.device("meta"):
        model = P2ATForSemanticSegmentation(P2ATConfig.preset(size, auxiliary_heads=True))
    assert sum(p.numel() for p in model.parameters()) == with_heads
    assert with_heads - sum(p.numel() for p in model.auxiliary_heads.parameters()) == alone
    block: Any = model.blocks[0]
    assert block.attention.value.weight.shape == (256, 64) and block.attention.positions.shape == (4, 128, 16)


def test_from_published() -> None:
    """Pointwise convolutions are linear layers here; the config follows from the weights, of the released kind."""
    model = model_of(released=True, auxiliary_heads=True)
    weights = {name: weight.detach() for name, weight in published(model).items()}
    assert weights["feature_reducer.conv.weight"].dim() == 4 and weights["P1_decoder.pwconv2.weight"].dim() == 2
    found = P2ATForSemanticSegmentation.from_published(weights, num_attention_heads=HEADS, key_dim=KEY)
    assert found.config == model.config and not found.training
    own, read = model.state_dict(), found.state_dict()
    assert own.keys() == read.keys() and all(torch.equal(own[name], read[name]) for name in own)
    plain = P2ATForSemanticSegmentation.from_published(
        weights, num_attention_heads=HEADS, key_dim=KEY, released=False, auxiliary_heads=False
    )
    assert not plain.config.released and len(plain.auxiliary_heads) == 0
    options = {"num_attention_heads": HEADS, "key_dim": KEY}
    with pytest.raises(ValueError, match="from_published: weights must have the published names, and lack feature_red"):
        P2ATForSemanticSegmentation.from_published(model.state_dict(), **options)
    with pytest.raises(ValueError, match=r"from_published lack fusions.0.fine_gate.weight"):
        P2ATForSemanticSegmentation.from_published(
            {n: w for n, w in weights.items() if n != "BiS4.down_feat.conv3.conv.weight"}, **options
        )
    with pytest.raises(ValueError, match=r"attention.positions must be floating point of shape \[4, 128, 5\]"):
        P2ATForSemanticSegmentation.from_published(weights)


def test_losses() -> None:
    """The last head counts once, each auxiliary one 0.4 times; pixels labelled 255 do not count."""
    model = model_of(auxiliary_heads=True).eval()
    pixels, labels = torch.randn(2, 3, 40, 33).double(), torch.randint(0, 4, (2, 40, 33))
    labels[:, ::3] = 255
    out = model(pixels, labels)
    last, *others = (F.cross_entropy(x, labels, ignore_index=255) for x in (out.logits, *out.auxiliary))
    torch.testing.assert_close(out.loss, last + 0.4 * (others[0] + others[1]))
    assert float(model(pixels, torch.full_like(labels, 255)).loss.detach()) == 0
    names = ("loss", "logits", "auxiliary")
    for one, name in zip(model(pixels, labels, return_dict=False), names, strict=True):
        torch.testing.assert_close(one, out[name])
    model.config.auxiliary_loss_weight = 2.0
    torch.testing.assert_close(model(pixels, labels).loss, last + 2 * (others[0] + others[1]))
    alone = model_of().eval()
    out = alone(pixels, labels)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits, labels, ignore_index=255))
    assert out.auxiliary is None and "auxiliary" not in out


def test_saved_with_heads_and_read_without(tmp_path: Path) -> None:
    model, pixels = model_of(auxiliary_heads=True), torch.randn(1, 3, 40, 40).double()
    model.save_pretrained(tmp_path)
    both, alone = models.from_pretrained(tmp_path), models.from_pretrained(tmp_path, auxiliary_heads=False)
    assert both.config == model.config and isinstance(both.config.backbone, ResNetConfig)
    assert len(alone.auxiliary_heads) == 0
    expected = model(pixels)
    assert_same("auxiliary", both(pixels).auxiliary[1], expected.auxiliary[1])
    for other in (both, alone):
        assert_same("logits", other(pixels).logits, expected.logits)


def test_sizes_of_images() -> None:
    """Any, also one pixel; none gives none."""
    model = model_of(auxiliary_heads=True)
    for batch, height, width in ((1, 1, 1), (1, 31, 64), (3, 33, 7), (0, 40, 50)):
        out = model(torch.randn(batch, 3, height, width).double())
        assert out.logits.shape == out.auxiliary[0].shape == (batch, 4, height, width)
        assert bool(torch.isfinite(out.logits).all())


def test_one_image_in_training_mode() -> None:
    model, pixels = model_of().train(), torch.randn(1, 3, 64, 64).double()
    for batch in (0, 1):
        with pytest.raises(
            ValueError, match="P2ATForSemanticSegmentation: pixel_values must be two images or more in tr"
        ):
            model(pixels[:batch])
    # Statistics of this kind span processes. In one process torch refuses the image.
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        synced(pixels)
    for module in model.modules():  # frozen statistics
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    assert_same("logits", model(pixels).logits, model.eval()(pixels).logits)


def test_bad_input() -> None:
    model = model_of()
    for shape in ((2, 1, 40, 40), (3, 40, 40)):
        with pytest.raises(ValueError, match=r"pixel_values must be of shape \[batch, 3, height, width\]"):
            model(torch.zeros(shape).double())
    for wrong in ((2, 8, 8), (1, 40), (1, 1, 40, 40)):
        with pytest.raises(
            ValueError, match=r"P2ATForSemanticSegmentation: labels must be of shape \[1, height, width\]"
        ):
            model(torch.zeros(1, 3, 40, 40).double(), torch.zeros(wrong, dtype=torch.int64))
    for fields, text in (
        ({"backbone": "101"}, "backbone must be one of 18, 34, 50, or options, got '101'"),
        ({"backbone": ResNetConfig(depths=(1, 1), hidden_sizes=(8, 8))}, "backbone must have 4 stages, got 2"),
        ({"key_dim": 0}, "key_dim must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=text):
            P2ATConfig(**{**SMALL, **fields})
    with pytest.raises(TypeError, match="P2ATConfig: backbone must be a name, a ResNetConfig or None, got int"):
        P2ATConfig(backbone=18)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="backbone must be given where the config's backbone is None"):
        P2ATForSemanticSegmentation(P2ATConfig(backbone=None))
    with pytest.raises(
        TypeError, match="backbone must be a module with channels, strides and feature_maps, got Linear"
    ):
        P2ATForSemanticSegmentation(P2ATConfig(backbone=None), nn.Linear(1, 1))
    with pytest.raises(
        ValueError, match="the config's backbone must be None, or what the given backbone has as config"
    ):
        P2ATForSemanticSegmentation(P2ATConfig(), model.backbone)
    with pytest.raises(ValueError, match="backbone must have 4 feature maps, got 1"):
        P2ATForSemanticSegmentation(P2ATConfig(backbone=None), models.ResNetBackbone(BACKBONE))
    shared = P2ATForSemanticSegmentation(P2ATConfig(**{**SMALL, "backbone": model.backbone.config}), model.backbone)
    assert shared.backbone is model.backbone


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    """Beside the formula in the same dtype."""
    model, pixels = model_of(), torch.randn(2, 3, 64, 96).to(dtype)
    with torch.inference_mode():
        truth = model.to(dtype).double()(pixels.double()).logits
        model.to(dtype)
        assert_close("logits", model(pixels).logits, truth, Formula(model)(pixels)[0])


def test_gradient_checkpointing() -> None:
    model = model_of().float().train()
    twin, pixels, labels = copy.deepcopy(model), torch.randn(2, 3, 40, 50), torch.randint(0, 4, (2, 40, 50))
    twin.gradient_checkpointing_enable()
    calls: list[int] = []
    twin.blocks[1].register_forward_pre_hook(lambda *_: calls.append(1))
    for one in (model, twin):
        one(pixels, labels).loss.backward()
    assert len(calls) == 2
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, twin.get_buffer(name)), name
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, twin.get_parameter(name).grad), name  # type: ignore[arg-type]


@pytest.mark.slow
def test_compiled() -> None:
    """As one graph, for images of any size."""
    model = model_of(num_blocks=1).float().requires_grad_(False)
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    for size in (40, 72):
        pixels = torch.randn(2, 3, size, size + 40)
        torch.testing.assert_close(compiled(pixels).logits, model(pixels).logits)


class FourConvolutions(nn.Module):
    """A backbone of another kind: 3x3 convolutions with BatchNorm and ReLU."""

    channels, strides = (16, 24, 24, 32), (2, 4, 8, 16)

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


@pytest.mark.slow
def test_it_learns_digit_scenes() -> None:
    config = P2ATConfig(backbone=None, hidden_size=24, num_labels=5, auxiliary_heads=True)
    model, scenes = P2ATForSemanticSegmentation(config, FourConvolutions()), digit_scenes(600)

    def loss() -> Tensor:
        chosen = torch.randint(len(scenes.images), (16,))
        found: Tensor = model(scenes.images[chosen], scenes.labels[chosen]).loss
        return found

    train(model.train(), loss, 250, 5e-3)
    held_out = digit_scenes(100, held_out=True)
    with torch.inference_mode():
        predicted = model.eval()(held_out.images).logits.argmax(1)
    assert mean_iou(predicted, held_out.labels, 5) > 0.6
