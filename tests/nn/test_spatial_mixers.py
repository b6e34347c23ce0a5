"""PoolMixer, StridedAttention, MixFeedForward and embeddings of patches by their formulas in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from helpers.vision import assert_same, randomise
from warpform.nn import (
    FeedForward,
    MetaFormerBlock,
    MixFeedForward,
    OverlappingPatchEmbedding,
    PoolMixer,
    StridedAttention,
)
from warpform.nn._offsets import equal_offsets
from warpform.nn.patch_embedding import embed_patches, least_size


def grid_of(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def check(one: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> None:
    """Two ways to compute the same, and the gradients of the input and of each parameter of the module."""
    found = []
    for function in (one, other):
        leaf = x.clone().requires_grad_()
        out = function(leaf)
        factors = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape).sin()
        found.append([out, *torch.autograd.grad((out * factors).sum(), [leaf, *module.parameters()])])
    names = ["out", "x", *(name for name, _ in module.named_parameters())]
    for name, a, b in zip(names, *found, strict=True):
        assert_same(name, a, b)


def summed(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """The module's product with the bias that it leaves to be added."""

    def call(x: Tensor) -> Tensor:
        out, bias = module(x)
        return out if bias is None else out + bias

    return call


# ---- pooling ----


def pooled(x: Tensor, size: int) -> Tensor:
    """The mean over the neighbours that exist, one position at a time."""
    out, reach = torch.empty_like(x), size // 2
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            near = x[:, max(0, i - reach) : i + reach + 1, max(0, j - reach) : j + reach + 1]
            out[:, i, j] = near.mean((1, 2))
    return out


@pytest.mark.parametrize("size", (1, 3, 5))
def test_pool_mixer_alone(size: int) -> None:
    x = grid_of(2, 4, 3, 5)
    out, bias = PoolMixer(size)(x)
    assert bias is None
    assert_same("out", out, pooled(x, size) - x)


@pytest.mark.parametrize("scaled", (False, True))
def test_pool_mixer_makes_its_half_in_one_operation(scaled: bool) -> None:
    """And computes what norm, mixer and layer scale do one by one; those are called where the norm has a hook."""
    block = MetaFormerBlock(
        PoolMixer(3), None, norm="group", hidden_size=6, eps=1e-3, layer_scale=0.5 if scaled else None
    )
    randomise(block)
    hooked, seen = copy.deepcopy(block), []
    for name, mine in block.named_parameters():
        hooked.get_parameter(name).data = mine.data
    hooked.mixer_norm.register_forward_hook(lambda module, args, out: seen.append(out))
    x = grid_of(2, 5, 3, 6) + 3
    half = block.mixer.residual(x, block.mixer_norm, block.mixer_scale)
    assert half is not None and block.mixer.residual(x, hooked.mixer_norm, None) is None
    assert block.mixer.residual(x[0], block.mixer_norm, None) is None
    assert block.mixer.residual(x, nn.Identity(), None) is None
    found = []
    for module in (block, hooked):
        leaf = x.clone().requires_grad_()
        out = module(leaf)
        factors = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape).sin()
        found.append([out, *torch.autograd.grad((out * factors).sum(), [leaf, *module.parameters()])])
    assert len(seen) == 1
    for name, a, b in zip(["out", "x", *dict(block.named_parameters())], *found, strict=True):
        assert_same(name, a, b)
    norm = block.mixer_norm
    centred = x - x.mean((1, 2, 3), keepdim=True)
    normal = centred / (centred.square().mean((1, 2, 3), keepdim=True) + 1e-3).sqrt() * norm.weight + norm.bias
    scale = block.mixer_scale if scaled else 1.0
    assert_same("out", block(x), x + scale * (pooled(normal, 3) - normal))
    frozen = copy.deepcopy(block)
    frozen.mixer_norm.bias.requires_grad_(False)
    assert_same("out", frozen(x), block(x))


# ---- attention to a coarser grid ----


def plain_attention(module: StridedAttention, x: Tensor) -> Tensor:
    """The mixer by its formula: one head and one query at a time."""
    batch, height, width, channels = x.shape
    coarse = x
    if module.reduction is not None:
        side, norm = module.stride, module.reduction_norm
        rows = [
            torch.einsum("bpqc,ocpq->bo", x[:, i : i + side, j : j + side], module.reduction.weight)
            for i in range(0, height - side + 1, side)
            for j in range(0, width - side + 1, side)
        ]
        coarse = torch.stack(rows, 1) + module.reduction.bias
        coarse = coarse - coarse.mean(-1, keepdim=True)
        coarse = coarse / (coarse.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias
    tokens, keys = x.reshape(batch, -1, channels), coarse.reshape(batch, -1, channels)
    q = tokens @ module.query.weight.t() + (0 if module.query.bias is None else module.query.bias)
    both = keys @ module.key_value.weight.t() + (0 if module.key_value.bias is None else module.key_value.bias)
    k, v = both.chunk(2, -1)
    heads = []
    for columns in torch.arange(channels).chunk(module.num_heads):
        scores = q[..., columns] @ k[..., columns].transpose(1, 2) / module.head_dim**0.5
        heads.append(scores.softmax(-1) @ v[..., columns])
    out = torch.cat(heads, -1) @ module.out.weight.t() + module.out.bias
    return out.view(x.shape)


@pytest.mark.parametrize(
    "stride, size, bias",
    ((1, (3, 4), True), (2, (4, 6), True), (2, (5, 7), True), (3, (3, 8), False), (4, (4, 4), True)),
)
def test_strided_attention(stride: int, size: tuple[int, int], bias: bool) -> None:
    module = randomise(StridedAttention(8, 2, stride, bias=bias))
    check(summed(module), lambda x: plain_attention(module, x), module, grid_of(2, *size, 8))


def test_rows_that_the_stride_does_not_divide_are_in_no_key() -> None:
    module = randomise(StridedAttention(8, 2, 2))
    x = grid_of(1, 5, 7, 8)
    other = x.clone()
    other[:, 4], other[:, :, 6] = 9.0, -9.0
    one, changed = summed(module)(x), summed(module)(other)
    assert_same("the rest", changed[:, :4, :6], one[:, :4, :6])
    assert float((changed[:, 4] - one[:, 4]).detach().abs().max()) > 0.1


def test_offsets_are_made_once() -> None:
    x = torch.randn(1)
    with torch.inference_mode():
        first = equal_offsets(x, 3, 11)
    assert first.tolist() == [0, 11, 22, 33] and first.dtype == torch.int32 and not first.is_inference()
    assert equal_offsets(x, 3, 11) is first and equal_offsets(x, 2, 11) is not first
    assert equal_offsets(x, 0, 7).tolist() == [0]
    with FakeTensorMode() as mode:
        fake = equal_offsets(mode.from_tensor(x), 3, 13)
        assert type(fake).__name__ == "FakeTensor"
    assert equal_offsets(x, 3, 13).tolist() == [0, 13, 26, 39]  # not the fake one
    assert equal_offsets(x.to("meta"), 3, 13).is_meta


def test_strided_attention_refuses() -> None:
    for options, text in (
        ((8, 3, 1), "num_heads must divide hidden_size 8, got 3"),
        ((8, 2, 0), "stride must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=f"StridedAttention: {text}"):
            StridedAttention(*options)
    with pytest.raises(ValueError, match="must have a grid of at least 4 x 4 tokens, got 3 x 9"):
        StridedAttention(8, 2, 4)(torch.randn(1, 3, 9, 8))
    with pytest.raises(NotImplementedError, match="attention dropout is not supported in training mode"):
        StridedAttention(8, 2, attention_dropout=0.1)(torch.randn(1, 3, 9, 8))
    for size in (0, 2):
        with pytest.raises(ValueError, match=f"PoolMixer: pool_size must be an odd number of at least 1, got {size}"):
            PoolMixer(size)
        with pytest.raises(ValueError, match=f"kernel_size must be an odd number of at least 1, got {size}"):
            MixFeedForward(4, 4, kernel_size=size)
    with pytest.raises(ValueError, match="hidden_act must be one of"):
        MixFeedForward(4, 4, "none")


# ---- feed-forwards and embeddings ----

ACTS: dict[str, Any] = {"gelu": F.gelu, "relu": F.relu, "linear": lambda x: x, "silu": F.silu}


@pytest.mark.parametrize("act, taps", (("gelu", 3), ("relu", 5), ("linear", 3), ("silu", 3)))
def test_mix_feed_forward(act: str, taps: int) -> None:
    module = randomise(MixFeedForward(4, 6, act, kernel_size=taps))

    def plain(x: Tensor) -> Tensor:
        wide = F.linear(x, module.up.weight, module.up.bias).permute(0, 3, 1, 2)
        mixed = F.conv2d(wide, module.depthwise.weight, module.depthwise.bias, padding=taps // 2, groups=6)
        return F.linear(ACTS[act](mixed).permute(0, 2, 3, 1), module.down.weight, module.down.bias)

    x = grid_of(2, 4, 3, 4)
    check(summed(module), plain, module, x)
    seen: list[nn.Module] = []
    for part in module.children():
        part.register_forward_hook(lambda part, args, out: seen.append(part))
    assert_same("with hooks", summed(module)(x), plain(x))
    assert seen == list(module.children())
    dropping = MixFeedForward(4, 6, act, dropout=1.0)
    assert_same("all dropped", summed(dropping)(x.float()), dropping.down.bias.expand(2, 4, 3, 4))


def test_feed_forward_with_the_weights_of_1x1_convolutions() -> None:
    module = randomise(FeedForward(4, 6, pointwise=True))
    assert module.up.weight.shape == (6, 4, 1, 1) and module.down.weight.shape == (4, 6, 1, 1)

    def plain(x: Tensor) -> Tensor:
        inner = F.gelu(F.conv2d(x.movedim(-1, 1), module.up.weight, module.up.bias))
        return F.conv2d(inner, module.down.weight, module.down.bias).movedim(1, -1)

    check(summed(module), plain, module, grid_of(2, 4, 3, 4))
    x = grid_of(1, 30, 40, 4)  # in inference rows are taken in blocks
    with torch.inference_mode():
        assert_same("blocks", summed(module)(x), plain(x))
    with torch.device("meta"):  # as on a GPU, the bias is left to what follows
        other = FeedForward(4, 6, pointwise=True)
        out, bias = other(torch.empty(2, 3, 4))
    assert out.shape == (2, 3, 4) and bias is other.down.bias
    module.down = nn.Sequential(module.down)  # what takes its place is called as a convolution
    assert_same("replaced", summed(module)(x[:, :3]), F.conv2d(
        F.gelu(F.conv2d(x[:, :3].movedim(-1, 1), module.up.weight, module.up.bias)), module.down[0].weight,
        module.down[0].bias,
    ).movedim(1, -1))  # fmt: skip


def test_embeddings_of_patches() -> None:
    convolution = randomise(nn.Conv2d(3, 5, (2, 4), (2, 4)))
    x = grid_of(2, 6, 8, 3)
    check(
        lambda t: embed_patches(t, convolution, channels_last=True),
        lambda t: convolution(t.permute(0, 3, 1, 2)).permute(0, 2, 3, 1),
        convolution,
        x,
    )
    convolution.register_forward_hook(lambda module, args, out: None)  # now it is called
    assert_same(
        "called",
        embed_patches(x, convolution, channels_last=True),
        embed_patches(x.permute(0, 3, 1, 2), convolution),
    )
    embedding = randomise(OverlappingPatchEmbedding(3, 5, 3, 2, 1))
    inner = embedding.projection
    check(
        embedding,
        lambda t: F.conv2d(t.permute(0, 3, 1, 2), inner.weight, inner.bias, 2, 1).permute(0, 2, 3, 1),
        embedding,
        grid_of(2, 7, 6, 3),
    )
    assert embedding(grid_of(2, 7, 6, 3)).is_contiguous()


@pytest.mark.parametrize("patches, strides, padding, grids", (
    ((7, 3, 3, 3), (4, 2, 2, 2), (3, 1, 1, 1), (8, 4, 2, 1)),
    ((7, 3), (4, 2), (2, 1), (1, 1)),
    ((2, 5, 3), (2, 1, 2), (0, 2, 0), (1, 3, 2)),
))  # fmt: skip
def test_least_size(patches: Any, strides: Any, padding: Any, grids: Any) -> None:
    """By trying all: the least number of pixels with which every grid is large enough."""

    def enough(size: int) -> bool:
        for patch, stride, pad, grid in zip(patches, strides, padding, grids, strict=True):
            size = (size + 2 * pad - patch) // stride + 1
            if size < grid:
                return False
        return True

    assert least_size(patches, strides, padding, grids) == next(size for size in range(1, 200) if enough(size))


@pytest.mark.parametrize("mixer", (PoolMixer(), StridedAttention(8, 2, 2), StridedAttention(8, 2)))
@pytest.mark.parametrize("shape", ((2, 6, 8), (2, 2, 4, 4, 8)))
def test_mixers_refuse_what_is_no_grid(mixer: nn.Module, shape: tuple[int, ...]) -> None:
    wanted = rf"{type(mixer).__name__}: hidden must be \[batch, height, width, channels\], got shape \[2, "
    with pytest.raises(ValueError, match=wanted):
        mixer(torch.randn(shape))
