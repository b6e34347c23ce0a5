"""MAXIM against its formula in float64 with the names and layouts of the release, its identities, and a photo."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers.drawn import drawn
from helpers.parity import randomise
from warpform.models import MAXIMConfig, MAXIMForImageRestoration
from warpform.models.maxim.blocks import GatedMixing, ResizedLinear, rescale, upsample
from warpform.models.maxim.published import published_names

# Windows that are not square, another grid than block, three levels, two stages of three scales.
SMALL = MAXIMConfig(
    features=8, num_stages=2, num_groups=1, num_bottleneck_blocks=1, num_supervision_scales=3, block_size_hr=(2, 4),
    grid_size_hr=(4, 2), block_size_lr=(2, 3), channels_reduction=2,
)  # fmt: skip
WINDOWS = {name: getattr(SMALL, name) for name in ("block_size_hr", "grid_size_hr", "block_size_lr")}
# One stage of two levels, quick to run.
TINY = replace(SMALL, num_stages=1, depth=2, high_res_stages=1, num_supervision_scales=2)
# By presets, with 1 and with 3 supervised scales.
PARAMETERS = {
    "S-1": (6_108_515, 6_139_561),
    "S-2": (13_353_830, 14_176_178),
    "S-3": (20_599_145, 22_212_795),
    "M-1": (19_361_219, 19_464_265),
    "M-2": (40_839_110, 43_227_986),
    "M-3": (62_317_001, 66_991_707),
}


def model_of(config: MAXIMConfig) -> MAXIMForImageRestoration:
    """In float64, with weights of which none is 0 and none makes features grow."""
    model = MAXIMForImageRestoration(config).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3)
            if parameter.dim() > 1:
                parameter.mul_((parameter.numel() / parameter.shape[0]) ** -0.5 / 0.3)
            elif "norm" in name and "weight" in name:
                parameter.add_(1)
            if name.endswith("squeeze.bias"):
                parameter[0] = 2  # of units that are all off no gradient would come
    return model.eval()


# ---- the formula, with weights as the release names and lays them out ----


class Formula:
    """Its steps, in the order of the paper and of the release, on grids [batch, height, width, channels]."""

    def __init__(self, config: MAXIMConfig, weights: dict[str, Tensor]) -> None:
        self.config, self.weights = config, weights
        self.resizes = 0

    def windows(self, level: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """The block and the grid. Where levels have the smaller ones both are the block."""
        config: Any = self.config
        fine = (config.block_size_hr, config.grid_size_hr)
        return fine if level < config.high_res_stages else (config.block_size_lr, config.block_size_lr)

    def dense(self, x: Tensor, name: str) -> Tensor:
        kernel = self.weights[f"{name}/kernel"]
        return x @ kernel.reshape(kernel.shape[-2:]) + self.weights[f"{name}/bias"]

    def norm(self, x: Tensor, name: str) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return x * self.weights[f"{name}/scale"] + self.weights[f"{name}/bias"]

    def conv(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        """A tap after the other; one row of zeros on each side, for 3 x 3 and for 4 x 4 of stride 2."""
        kernel, (high, wide) = self.weights[f"{name}/kernel"], x.shape[1:3]
        x = F.pad(x, (0, 0, 1, 1, 1, 1))
        out = self.weights[f"{name}/bias"].expand(x.shape[0], high // stride, wide // stride, -1)
        for a in range(kernel.shape[0]):
            for b in range(kernel.shape[1]):
                out = (
                    out
                    + x[:, a : a + high : stride, b : b + wide : stride][:, : high // stride, : wide // stride]
                    @ kernel[a, b]
                )
        return out

    def double(self, x: Tensor, name: str) -> Tensor:
        """A transposed convolution of 2 x 2 and stride 2 as jax has it: its kernel lies the other way around."""
        kernel = self.weights[f"{name}/kernel"]
        rows = [torch.stack([x @ kernel[1 - a, 1 - b] for b in (0, 1)], 3).flatten(2, 3) for a in (0, 1)]
        return torch.stack(rows, 2).flatten(1, 2) + self.weights[f"{name}/bias"]

    def resized(self, x: Tensor, steps: int) -> Tensor:
        """jax.image.resize: a triangle around each place, as wide as a step of the coarser grid, of sum 1."""

        def matrix(size: int) -> Tensor:
            made = size * 2**steps
            out = int(made)
            place = (torch.arange(out, dtype=torch.float64) + 0.5) * size / out - 0.5
            reach = max(size / out, 1.0)
            weights = (1 - (place[:, None] - torch.arange(size)).abs() / reach).clamp(min=0)
            return weights / weights.sum(1, keepdim=True)

        return torch.einsum("ph,qw,bhwc->bpqc", matrix(x.shape[1]), matrix(x.shape[2]), x)

    def up_sample_ratio(self, x: Tensor, steps: int) -> Tensor:
        self.resizes += 1
        return self.dense(self.resized(x, steps), f"UpSampleRatio_{self.resizes - 1}/Conv_0")

    @staticmethod
    def gelu(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def mixed(self, x: Tensor, name: str, window: tuple[int, int], grid: bool) -> Tensor:
        """Blocks [cells, tokens of a cell]: blocks are mixed over the tokens of a cell, the grid over the cells."""
        batch, high, wide, channels = x.shape
        cell = (high // window[0], wide // window[1]) if grid else window
        rows, columns = high // cell[0], wide // cell[1]
        x = x.reshape(batch, rows, cell[0], columns, cell[1], channels).permute(0, 1, 3, 2, 4, 5)
        x = x.reshape(batch, rows * columns, cell[0] * cell[1], channels)
        kernel, bias = self.weights[f"{name}/kernel"], self.weights[f"{name}/bias"]
        if grid:
            x = torch.einsum("bgtc,gk->bktc", x, kernel) + bias[:, None, None]
        else:
            x = torch.einsum("bgtc,tk->bgkc", x, kernel) + bias[:, None]
        x = x.reshape(batch, rows, columns, *cell, channels).permute(0, 1, 3, 2, 4, 5)
        return x.reshape(batch, high, wide, channels)

    def gated(self, x: Tensor, name: str, kind: str, window: tuple[int, int]) -> Tensor:
        y = self.gelu(self.dense(self.norm(x, f"{name}/LayerNorm"), f"{name}/in_project"))
        u, v = y.chunk(2, -1)
        unit = f"{name}/{kind}GatingUnit"
        v = self.mixed(self.norm(v, f"{unit}/intermediate_layernorm"), f"{unit}/Dense_0", window, kind == "Grid")
        return x + self.dense(u * (v + 1), f"{name}/out_project")

    def multi_axis(self, x: Tensor, name: str, level: int) -> Tensor:
        block, grid = self.windows(level)
        u, v = self.gelu(self.dense(self.norm(x, f"{name}/LayerNorm_in"), f"{name}/in_project")).chunk(2, -1)
        u, v = (
            self.gated(u, f"{name}/GridGmlpLayer", "Grid", grid),
            self.gated(v, f"{name}/BlockGmlpLayer", "Block", block),
        )
        return x + self.dense(torch.cat([u, v], -1), f"{name}/out_project")

    def attention(self, x: Tensor, name: str) -> Tensor:
        y = torch.relu(self.dense(x.mean((1, 2)), f"{name}/Conv_0"))
        return x * torch.sigmoid(self.dense(y, f"{name}/Conv_1"))[:, None, None]

    def convolved_channels(self, x: Tensor, name: str) -> Tensor:
        y = self.conv(self.norm(x, f"{name}/LayerNorm"), f"{name}/conv1")
        y = torch.where(y > 0, y, 0.2 * y)
        return x + self.attention(self.conv(y, f"{name}/conv2"), f"{name}/channel_attention")

    def dense_channels(self, x: Tensor, name: str) -> Tensor:
        y = self.gelu(self.dense(self.norm(x, f"{name}/LayerNorm"), f"{name}/channel_mixing/Dense_0"))
        return x + self.attention(self.dense(y, f"{name}/channel_mixing/Dense_1"), f"{name}/channel_attention")

    def gates(self, x: Tensor, name: str, level: int) -> Tensor:
        block, grid = self.windows(level)
        u, v = self.gelu(self.dense(self.norm(x, f"{name}/LayerNorm_in"), f"{name}/in_project")).chunk(2, -1)
        both = self.mixed(u, f"{name}/Dense_0", grid, True), self.mixed(v, f"{name}/Dense_1", block, False)
        return self.dense(torch.cat(both, -1), f"{name}/out_project")

    def cross_gating(self, x: Tensor, y: Tensor, name: str, level: int, up: bool) -> tuple[Tensor, Tensor]:
        y = self.double(y, f"{name}/ConvTranspose_0") if up else y
        x0, y0 = self.dense(x, f"{name}/Conv_0"), self.dense(y, f"{name}/Conv_1")
        x1, y1 = (
            self.gelu(self.dense(self.norm(t, f"{name}/LayerNorm_{s}"), f"{name}/in_project_{s}"))
            for t, s in ((x0, "x"), (y0, "y"))
        )
        gx, gy = (self.gates(t, f"{name}/SplitHeadMultiAxisGating_{s}", level) for t, s in ((x1, "x"), (y1, "y")))
        y = y0 + self.dense(y1 * gx, f"{name}/out_project_y")
        return x0 + self.dense(x1 * gy, f"{name}/out_project_x") + y, y

    def level(self, x: Tensor, name: str, level: int) -> Tensor:
        start = x = self.dense(x, f"{name}/Conv_0")
        for group in range(self.config.num_groups):
            x = self.multi_axis(x, f"{name}/SplitHeadMultiAxisGmlpLayer_{group}", level)
            x = self.convolved_channels(x, f"{name}/channel_attention_block_1{group}")
        return x + start

    def __call__(self, image: Tensor) -> list[list[Tensor]]:
        """image: [batch, height, width, 3], of sizes that windows divide. Stages of scales, the coarsest first."""
        config, depth = self.config, self.config.depth
        pixels = [image]
        for i in range(1, config.num_supervision_scales):
            rows, columns = (
                ((torch.arange(n >> i) + 0.5) * 2**i).floor().long() for n in image.shape[1:3]
            )  # the nearest one
            pixels.append(image[:, rows][:, :, columns])
        outputs: list[list[Tensor]] = []
        encoded_before: list[Tensor] = []
        decoded_before: dict[int, Tensor] = {}
        supervised: dict[int, Tensor] = {}
        for stage in range(config.num_stages):
            here = f"stage_{stage}"
            inputs = []
            for i, picture in enumerate(pixels):
                x = self.conv(picture, f"{here}_input_conv_{i}")
                if stage:
                    x, _ = self.cross_gating(x, supervised[i], f"{here}_input_fuse_sam_{i}", i, False)
                inputs.append(x)
            x, encoded = inputs[0], []
            for i in range(depth):
                name = f"{here}_encoder_block_{i}"
                x = self.level(torch.cat([x, inputs[i]], -1) if i < len(inputs) else x, name, i)
                if stage:
                    before = encoded_before[i] + decoded_before[i]
                    x, _ = self.cross_gating(x, before, f"{name}/cross_gating_block", i, False)
                encoded.append(x)
                x = self.conv(x, f"{name}/Conv_1", 2)
            for i in range(config.num_bottleneck_blocks):
                name = f"{here}_global_block_{i}"
                start = x = self.dense(x, f"{name}/input_proj")
                for group in range(config.num_groups):
                    x = self.multi_axis(x, f"{name}/SplitHeadMultiAxisGmlpLayer_{group}", depth)
                    x = self.dense_channels(x, f"{name}/channel_attention_block_1_{group}")
                x = x + start
            shared, skips = x, []
            for i in reversed(range(depth)):
                signal = torch.cat([self.up_sample_ratio(e, j - i) for j, e in enumerate(encoded)], -1)
                skip, shared = self.cross_gating(signal, shared, f"{here}_cross_gating_block_{i}", i, True)
                skips.append(skip)
            decoded, images = {}, []
            features: dict[int, Tensor] = {}
            for i in reversed(range(depth)):
                name = f"{here}_decoder_block_{i}"
                signal = torch.cat([self.up_sample_ratio(s, depth - j - 1 - i) for j, s in enumerate(skips)], -1)
                x = torch.cat([self.double(x, f"{name}/ConvTranspose_0"), signal], -1)
                x = decoded[i] = self.level(x, f"{name}/UNetEncoderBlock_0", i)
                if i >= config.num_supervision_scales:
                    continue
                if stage + 1 < config.num_stages:
                    name = f"{here}_supervised_attention_module_{i}"
                    made = self.conv(x, f"{name}/Conv_1")
                    made = made + pixels[i] if made.shape[-1] == 3 else made
                    features[i] = self.conv(x, f"{name}/Conv_0") * self.conv(made, f"{name}/Conv_2").sigmoid() + x
                else:
                    made = self.conv(x, f"{here}_output_conv_{i}") + pixels[i]
                images.append(made)
            encoded_before, decoded_before, supervised = encoded, decoded, features
            outputs.append(images)
        return outputs


def published(model: MAXIMForImageRestoration, of: str = "data") -> dict[str, Tensor]:
    """The parameters, or with "grad" their gradients, as the release names and lays them out."""
    found = {}
    for ours, theirs in published_names(model).items():
        parameter = model.get_parameter(ours)
        value: Tensor = getattr(parameter, of)
        module = model.get_submodule(ours.rpartition(".")[0])
        if isinstance(module, nn.ConvTranspose2d) and value.dim() == 4:
            value = value.permute(2, 3, 0, 1).flip(0, 1)
        elif value.dim() == 4:
            value = value.permute(2, 3, 1, 0)
        elif value.dim() == 2:
            value = value.t()
            # Products of the release are convolutions of one tap where flax counts them so.
            if theirs.split("/")[-2].startswith(("Conv_", "input_proj")):
                value = value[None, None]
        found[theirs] = value.detach().clone(memory_format=torch.contiguous_format)
    return found


def assert_same(name: str, one: Tensor, other: Tensor) -> None:
    assert one.shape == other.shape, name
    difference, size = (float(t.detach().abs().max()) for t in (one - other, other))
    assert difference <= 1e-12 * max(1.0, size), name


@pytest.mark.parametrize("channels", (3, 2))
def test_it_is_the_formula(channels: int) -> None:
    """All stages and scales, and the gradients of the image and of every parameter, in the names of the release."""
    config = SMALL if channels == 3 else replace(TINY, num_channels=channels, num_stages=2, num_supervision_scales=1)
    model = model_of(config)
    image = torch.randn(2, channels, 16, 24, dtype=torch.float64, requires_grad=True)
    output = model(image)
    weights = {name: tensor.requires_grad_() for name, tensor in published(model).items()}
    assert len(weights) == len(list(model.parameters()))
    expected = Formula(config, weights)(image.permute(0, 2, 3, 1))
    assert len(output.stages) == config.num_stages and output.restored is output.stages[-1][-1]
    loss = truth = torch.zeros((), dtype=torch.float64)
    for found, wanted in zip(output.stages, expected, strict=True):
        for one, other in zip(found, wanted, strict=True):
            assert_same("stages", one, other.permute(0, 3, 1, 2))
            factors = torch.randn_like(one)
            loss, truth = loss + (one * factors).sum(), truth + (other.permute(0, 3, 1, 2) * factors).sum()
    (of_image,) = torch.autograd.grad(loss, image, retain_graph=True)
    loss.backward(inputs=list(model.parameters()))
    gradients = torch.autograd.grad(truth, [image, *weights.values()])
    assert_same("image", of_image, gradients[0])
    found = published(model, "grad")
    for name, gradient in zip(weights, gradients[1:], strict=True):
        assert gradient.abs().max() > 0, name
        assert_same(name, found[name], gradient)


# ---- published weights ----


def test_published_weights() -> None:
    """By names with the optimiser's before them, nested, in numpy's arrays: the model, and its config but windows."""
    model = model_of(TINY)
    weights = published(model)
    image = torch.rand(1, 3, 16, 24, dtype=torch.float64)
    expected = model(image).restored
    nested: dict[str, Any] = {}
    for name, tensor in weights.items():
        *path, leaf = name.split("/")
        inner = nested
        for part in path:
            inner = inner.setdefault(part, {})
        inner[leaf] = tensor.numpy()
    nested = {"opt": {"target": nested, "state": {"step": np.zeros(1)}}}
    for given in (nested, weights):
        found = MAXIMForImageRestoration.from_published(given, **WINDOWS)
        assert found.config == model.config and not found.training
        assert torch.equal(found(image).restored, expected)
    assert MAXIMForImageRestoration.from_published(weights, dtype=torch.float32, **WINDOWS).dtype == torch.float32
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.zero_()
    assert all(tensor.any() for tensor in weights.values())  # copied


def test_the_config_of_published_weights() -> None:
    """Square windows follow from the weights."""
    config = replace(
        TINY, block_size_hr=4, grid_size_hr=2, block_size_lr=3, features=8, channels_reduction=4, num_groups=2
    )
    model = MAXIMForImageRestoration(config)
    assert MAXIMForImageRestoration.from_published(published(model)).config == config


def test_published_weights_that_do_not_fit() -> None:
    weights = published(MAXIMForImageRestoration(TINY))
    some = "stage_0_encoder_block_0/Conv_0/kernel"
    for message, given in (
        (
            "the weights lack stage_0_input_conv_0/kernel",
            {k: w for k, w in weights.items() if k != "stage_0_input_conv_0/kernel"},
        ),
        (f"the weights lack {some}", {k: w for k, w in weights.items() if k != some}),
        ("the weights have unknown extra", {**weights, "extra": torch.zeros(1)}),
        (
            rf"{some} must have a shape that gives stages.0.encoder.0.enter.weight the shape \[8, 16\], got \[3, 4\]",
            {**weights, some: torch.zeros(3, 4)},
        ),
    ):
        with pytest.raises(ValueError, match=f"MAXIMForImageRestoration.from_published: {message}"):
            MAXIMForImageRestoration.from_published(given, **WINDOWS)
    with pytest.raises(ValueError, match="block_size_hr must be given where windows are not square, got 8 tokens"):
        MAXIMForImageRestoration.from_published(weights)


# ---- sizes of models ----


@pytest.mark.parametrize(
    ("size", "scales"),
    [
        pytest.param(size, scales, marks=() if size in ("S-1", "M-2") else pytest.mark.slow)
        for size in PARAMETERS
        for scales in (1, 3)
    ],
)
def test_parameters_of_presets(size: str, scales: int) -> None:
    config = MAXIMConfig.preset(size, num_supervision_scales=scales)
    with torch.device("meta"):
        model = MAXIMForImageRestoration(config)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[size][scales == 3]
    assert config.size_multiple() == (64, 64)


def test_initial_weights() -> None:
    """Mixing matrices N(0, .02) with bias 0, in a cross-gating 1; products of multi-axis blocks alike; LeCun normal."""
    model = MAXIMForImageRestoration(replace(SMALL, features=32, block_size_hr=16, grid_size_hr=16, block_size_lr=8))
    for ours, theirs in published_names(model).items():
        weight, (*_, module, leaf) = model.get_parameter(ours), theirs.split("/")
        if leaf in ("scale", "bias"):
            ones = leaf == "scale" or ("MultiAxisGating" in theirs and module.startswith("Dense"))
            assert bool((weight == float(ones)).all()), theirs
            continue
        inside = "GmlpLayer" in theirs or "channel_mixing" in theirs or "Dense_" in module
        std = (
            0.02
            if inside
            else (weight.numel() / weight.shape[isinstance(model.get_submodule(ours[:-7]), nn.ConvTranspose2d)]) ** -0.5
        )
        spread = 5 * (2 * weight.numel()) ** -0.5
        weight = weight.detach()
        assert abs(float(weight.std()) / std - 1) < spread, theirs
        assert inside or float(weight.abs().max()) <= 2 * std / 0.8796, theirs


# ---- identities ----


@pytest.mark.parametrize("size", ((16, 24), (13, 21), (9, 40)))
def test_weights_of_zero_give_back_the_image(size: tuple[int, int]) -> None:
    """Bit by bit, in every stage, and at coarser scales the pixels behind the middle of 2 or 4."""
    model = MAXIMForImageRestoration(SMALL)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    image = torch.rand(2, 3, *size)
    output = model(image)
    for images in output.stages:
        assert torch.equal(images[-1], image)
    if size == (16, 24):
        assert torch.equal(output.stages[0][1], image[..., 1::2, 1::2])
        assert torch.equal(output.stages[1][0], image[..., 2::4, 2::4])


def test_exchanged_blocks_are_exchanged() -> None:
    module = randomise(GatedMixing(8, (2, 4), dilated=False, eps=1e-6), 0.3)
    x = torch.randn(2, 6, 8, 8)
    other = x.clone()
    other[:, :2, 4:], other[:, 4:, :4] = x[:, 4:, :4], x[:, :2, 4:]
    expected = module(x)
    expected[:, :2, 4:], expected[:, 4:, :4] = expected[:, 4:, :4].clone(), expected[:, :2, 4:].clone()
    assert torch.equal(module(other), expected)


def test_a_grid_reaches_every_cell_and_a_block_stays() -> None:
    """Of the gradient of one token: the places where windows say that it is read."""
    for dilated in (False, True):
        module = randomise(GatedMixing(4, (2, 4), dilated=dilated, eps=1e-6), 0.5)
        x = torch.randn(1, 6, 8, 4, requires_grad=True)
        module(x)[0, 3, 5].sum().backward()
        read = torch.zeros(6, 8, dtype=torch.bool)
        if dilated:
            read[0::3, 1::2] = True  # cells of 3 x 2
        else:
            read[2:4, 4:] = True
        assert torch.equal(x.grad[0].ne(0).any(-1), read)


def test_parts_are_torchs() -> None:
    """The transposed convolution as a product, and the resize that changes places with a product."""
    conv = nn.ConvTranspose2d(5, 3, 2, 2).double()
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    assert_same("upsample", upsample(x, conv), conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    for steps in (-2, -1, 0, 1, 2):
        module = ResizedLinear(5, 3, steps).double()
        x = torch.randn(2, 8, 12, 5, dtype=torch.float64)
        assert_same("order", module(x), module.linear(rescale(x, steps)))


# ---- sizes of images ----


@drawn(12, size=st.tuples(st.integers(7, 40), st.integers(9, 50)))
def test_any_size(size: tuple[int, int]) -> None:
    """What numpy reflects to multiples of 8 and 12, cut: first a line behind odd sides, then the same on both sides."""
    model = small_model()
    image = torch.rand(1, 3, *size)
    even = np.pad(image.numpy(), ((0, 0), (0, 0), (0, size[0] % 2), (0, size[1] % 2)), mode="reflect")
    pads = [(-n % m) // 2 for n, m in zip(even.shape[2:], (8, 12), strict=True)]
    whole = np.pad(even, ((0, 0), (0, 0), *((p, p) for p in pads)), mode="reflect")
    assert whole.shape[2] % 8 == 0 and whole.shape[3] % 12 == 0
    with torch.no_grad():
        output, reflected = model(image), model(torch.from_numpy(whole))
    expected = reflected.restored[..., pads[0] : pads[0] + size[0], pads[1] : pads[1] + size[1]]
    assert torch.equal(output.restored, expected)
    coarse = output.stages[0][0].shape[2:]
    assert all(n / 2 <= c <= n / 2 + 1 for n, c in zip(size, coarse, strict=True))


def small_model() -> MAXIMForImageRestoration:
    torch.manual_seed(1)
    return MAXIMForImageRestoration(TINY).eval()


def test_bad_input() -> None:
    model = small_model()
    name = "MAXIMForImageRestoration"
    for shape in ((1, 2, 16, 24), (3, 16, 24), (1, 3, 16, 24, 1)):
        with pytest.raises(
            ValueError, match=rf"{name}: pixel_values must be of shape \[batch, 3, height, width\], got"
        ):
            model(torch.zeros(shape))
    with pytest.raises(
        ValueError, match=rf"{name}: pixel_values must be large enough to be reflected .* in width, got 3"
    ):
        model(torch.zeros(1, 3, 16, 3))
    with pytest.raises(ValueError, match=rf"{name}: pixel_values must .* in height, got 1"):
        model(torch.zeros(1, 3, 1, 24))
    with pytest.raises(ValueError, match=f"{name}: pixel_values must have at least 1 pixels a side"):
        model(torch.zeros(1, 3, 0, 24))
    with pytest.raises(ValueError, match=f"{name}: labels is not supported"):
        model(torch.zeros(1, 3, 16, 24), labels=torch.zeros(1))
    assert model(torch.zeros(0, 3, 15, 20)).restored.shape == (0, 3, 15, 20)
    restored, stages = model(torch.zeros(1, 3, 16, 24), return_dict=False)
    assert torch.equal(restored, stages[-1][-1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_supervision_scales": 4}, "num_supervision_scales must be at most depth 3, got 4"),
        ({"high_res_stages": 4}, "high_res_stages must be at most depth 3, got 4"),
        ({"block_size_hr": (16, 0)}, "block_size_hr must be one number or two, at least 1"),
        ({"grid_size_hr": (4, 4, 4)}, "grid_size_hr must be one number or two"),
        ({"channels_reduction": 64}, "channels_reduction must be at most features 32, got 64"),
        ({"num_stages": 0}, "num_stages must be at least 1, got 0"),
    ],
)
def test_bad_config(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"MAXIMConfig: {message}"):
        MAXIMConfig(**fields)


# ---- training ----


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_16_bit(dtype: torch.dtype) -> None:
    """All parts run, and what comes out is what float32 gives to a tenth of the change."""
    model = small_model()
    image = torch.rand(1, 3, 16, 24)
    expected = model(image).restored - image
    model.to(dtype)
    output = model(image.to(dtype))
    sum(one.float().square().sum() for one in output.stages[0]).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert output.restored.dtype == dtype
    error = (output.restored.float() - image - expected).detach().abs().max()
    assert error <= 0.1 * expected.detach().abs().max()


def test_gradient_checkpointing_changes_no_gradient() -> None:
    model, image = small_model().train(), torch.rand(1, 3, 8, 12)
    found = []
    for _ in range(2):
        model.zero_grad()
        model(image).restored.square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.gradient_checkpointing_enable()
    assert all(map(torch.equal, *found))


@pytest.mark.slow
def test_it_restores_a_photo() -> None:
    """Noise of sigma .1 on a photo of which it saw the left part: far better on the rest than a mean of 3 x 3."""
    datasets = pytest.importorskip("sklearn.datasets")
    pytest.importorskip("PIL")
    torch.manual_seed(0)
    photo = torch.from_numpy(datasets.load_sample_image("china.jpg").copy()).permute(2, 0, 1).float() / 255
    config = MAXIMConfig(
        features=16, depth=2, num_groups=1, num_bottleneck_blocks=1, high_res_stages=1, block_size_hr=8,
        grid_size_hr=8, block_size_lr=4,
    )  # fmt: skip
    model, steps = MAXIMForImageRestoration(config), 400
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        rows, columns = torch.randint(427 - 32, (8,)).tolist(), torch.randint(400 - 32, (8,)).tolist()
        clean = torch.stack([photo[:, i : i + 32, j : j + 32] for i, j in zip(rows, columns, strict=True)])
        loss = F.l1_loss(model(clean + 0.1 * torch.randn_like(clean)).restored, clean)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    clean = photo[None, :, :, 400:]
    noisy = clean + 0.1 * torch.randn_like(clean)
    with torch.inference_mode():
        restored = model.eval()(noisy).restored

    def decibels(image: Tensor) -> float:
        return -10 * math.log10(float((image - clean).square().mean()))

    mean = decibels(F.avg_pool2d(noisy, 3, 1, 1, count_include_pad=False))
    assert decibels(noisy) < mean and decibels(restored) > mean + 3, (decibels(noisy), mean, decibels(restored))
