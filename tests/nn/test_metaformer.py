"""MetaFormerBlock: its formula in every form, what it leaves to the next block, drop path, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from warpform.nn import (
    AddBiasResidualLayerNorm,
    FeedForward,
    MetaFormerBlock,
    MixFeedForward,
    PoolMixer,
    SampleNorm,
    StridedAttention,
)
from warpform.nn._checkpoint import CheckpointedLayers
from warpform.nn.metaformer import run_blocks

WIDTH = 6


class Mean(nn.Module):
    """A mixer: the mean over the grid, and a bias that is left to be added."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(WIDTH))

    def forward(self, normal: Tensor) -> tuple[Tensor, Tensor]:
        return normal.mean((1, 2), keepdim=True).expand_as(normal) * 2, self.bias


class Whole(Mean):
    """The same mixer, which makes its half in one operation."""

    calls = 0

    def residual(self, hidden: Tensor, norm: nn.Module, scale: Tensor | None) -> Tensor:
        self.calls += 1
        product, bias = self(norm(hidden, None, None))
        return hidden + (product + bias) * (1.0 if scale is None else scale)


def block(mixer: nn.Module | None = None, width: int | None = WIDTH, **options: Any) -> MetaFormerBlock:
    channel = None if width is None else FeedForward(width, 8)
    made = MetaFormerBlock(mixer, channel, **{"norm": "layer", **options}).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return made


def plain_norm(norm: nn.Module, x: Tensor) -> Tensor:
    weight, bias, eps = norm.weight, norm.bias, norm.eps
    if isinstance(norm, AddBiasResidualLayerNorm):
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    mean = x.mean((1, 2, 3), keepdim=True)
    variance = (x - mean).square().mean((1, 2, 3), keepdim=True)
    return (x - mean) / (variance + eps).sqrt() * weight + bias


def plain_block(made: MetaFormerBlock, x: Tensor) -> Tensor:
    """The block by its formula."""
    factors = iter([1.0] * 4 if made.coefficients is None else made.coefficients)
    if hasattr(made, "mixer"):
        normal = plain_norm(made.mixer_norm, x)
        added = normal.mean((1, 2), keepdim=True) * 2 + made.mixer.bias
        x = next(factors) * x + next(factors) * (1.0 if made.mixer_scale is None else made.mixer_scale) * added
    if hasattr(made, "channel_mixer"):
        normal, part = plain_norm(made.channel_mixer_norm, x), made.channel_mixer
        added = F.linear(F.gelu(F.linear(normal, part.up.weight, part.up.bias)), part.down.weight, part.down.bias)
        scale = 1.0 if made.channel_mixer_scale is None else made.channel_mixer_scale
        x = next(factors) * x + next(factors) * scale * added
    return x


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("norm", ["layer", "group"])
@pytest.mark.parametrize("scale", [None, 0.1])
@pytest.mark.parametrize("coefficients", [False, True])
@pytest.mark.parametrize("mixer", [Mean, Whole, None])
def test_formula(norm: str, scale: float | None, coefficients: bool, mixer: type[Mean] | None) -> None:
    if mixer is Whole and norm == "group":
        pytest.skip("Whole calls its norm as LayerNorm")
    made = block(mixer and mixer(), norm=norm, layer_scale=scale, coefficients=coefficients)
    x = torch.randn(3, 4, 5, WIDTH, dtype=torch.float64, requires_grad=True)
    out, expected = made(x), plain_block(made, x)
    assert_same(out, expected)
    probe = torch.randn_like(out)
    wanted = torch.autograd.grad(expected, [x, *made.parameters()], probe)
    for found, right in zip(torch.autograd.grad(out, [x, *made.parameters()], probe), wanted, strict=True):
        assert_same(found, right)
    if mixer is Whole:
        assert made.mixer.calls == (0 if coefficients else 1)


def test_one_norm_for_both_halves_and_a_block_without_channel_mixer() -> None:
    norm = AddBiasResidualLayerNorm(WIDTH, 1e-6)
    made = block(Mean(), norm=lambda: norm)
    assert made.mixer_norm is made.channel_mixer_norm and len(list(made.parameters())) == 7
    x = torch.randn(2, 3, 3, WIDTH, dtype=torch.float64)
    assert_same(made(x), plain_block(made, x))
    alone = block(Mean(), width=None, hidden_size=WIDTH)
    assert_same(alone(x), plain_block(alone, x))


def test_blocks_leave_their_last_addition_to_the_next() -> None:
    model = CheckpointedLayers()
    blocks = nn.ModuleList([block(Mean()), block(Whole(), layer_scale=1.0), block(None, norm="group"), block(Mean())])
    x = torch.randn(2, 3, 3, WIDTH, dtype=torch.float64)
    expected = x
    for made in blocks:
        expected = plain_block(made, expected)
    assert_same(run_blocks(model, blocks, x), expected)
    seen = []
    blocks[1].register_forward_hook(lambda module, given, out: seen.append((len(given), out.shape)))
    assert_same(run_blocks(model, blocks, x), expected)
    assert seen == [(1, x.shape)]
    blocks[2] = nn.Identity()
    assert run_blocks(model, blocks, x).shape == x.shape


@pytest.mark.parametrize("mixer", [Mean, Whole])
def test_drop_path_takes_whole_samples(mixer: type[Mean]) -> None:
    made = block(mixer(), width=None, hidden_size=WIDTH, drop_path=0.25)
    x = torch.randn(40, 2, 2, WIDTH, dtype=torch.float64)
    added = plain_block(made, x) - x
    out = made.train()(x)
    kept = [bool((one - before).abs().max() > 1e-9) for one, before in zip(out, x, strict=True)]
    assert 20 < sum(kept) < 40
    for i, keeps in enumerate(kept):
        assert_same(out[i], x[i] + added[i] / 0.75 if keeps else x[i])
    assert_same(made.eval()(x), x + added)


def test_sample_norm_is_group_norm_of_one_group() -> None:
    norm = SampleNorm(WIDTH, 1e-3).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    for shape in ((2, 5, 4, WIDTH), (2, 7, WIDTH), (0, 3, 3, WIDTH)):
        x = torch.randn(shape, dtype=torch.float64)
        expected = F.group_norm(x.movedim(-1, 1), 1, norm.weight, norm.bias, 1e-3).movedim(1, -1)
        assert_same(norm(x), expected)
        assert_same(norm._by_rows(x), expected)  # what a GPU takes


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="mixer or channel_mixer must be given"):
        MetaFormerBlock(None, None, norm="layer")
    with pytest.raises(ValueError, match="norm must be one of layer, group or what makes a norm, got 'batch'"):
        MetaFormerBlock(Mean(), None, norm="batch")
    with pytest.raises(ValueError, match="hidden_size must be given"):
        MetaFormerBlock(Mean(), None, norm="layer")


@pytest.mark.parametrize(
    "mixer, channel_mixer",
    (
        (PoolMixer(), FeedForward(6, 8)),
        (PoolMixer(), FeedForward(6, 8, pointwise=True)),
        (None, MixFeedForward(6, 8)),
        (StridedAttention(6, 2), None),
    ),
    ids=("linear", "pointwise", "with neighbours", "of the mixer"),
)
@pytest.mark.parametrize("norm", ("layer", "group"))
def test_channels_are_read_off(mixer: nn.Module | None, channel_mixer: nn.Module | None, norm: str) -> None:
    made = MetaFormerBlock(mixer, channel_mixer, norm=norm, layer_scale=0.5)
    for part in made.halves:
        assert getattr(made, f"{part}_norm").weight.shape == getattr(made, f"{part}_scale").shape == (6,)
    assert made(torch.randn(2, 4, 3, 6)).shape == (2, 4, 3, 6)
