"""Stencils, channels last: cases, inputs, oracles, and whole checks of one op on one case.

The oracles go another way than the references: pooling is a product with a band matrix on each side of the image, after a
norm with all its parts, and a convolution adds up slices of a padded image. `library` is torch.ops.warpform or
torch.ops.warpform_simt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from .cases import misaligned, random, strided
from .compare import assert_close

ACTIVATIONS = ("linear", "gelu", "relu")
SIZES = (3, 5, 7)

# ---- cases ----

Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class PoolMixerCase:
    """One call of pool_mixer: x [batch, height, width, channels]."""

    name: str
    shape: Shape
    pool_size: int = 3
    scale: bool = True
    wide_parameters: bool = False
    eps: float = 1e-5
    layout: str = "contiguous"
    offset: float = 0.0  # added to x
    spread: float = 1.0  # of x; 0: all values are the offset

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class DepthwiseCase:
    """One call of depthwise_conv2d: x [batch, height, width, channels], weight [channels, size, size]."""

    name: str
    shape: Shape
    size: int = 3
    bias: bool = True
    activation: str = "gelu"
    layout: str = "contiguous"

    def __str__(self) -> str:
        return self.name


LAYOUTS = ("contiguous", "strided", "cropped", "channels_first", "misaligned")

# Sizes that stencils get wrong: fewer rows or columns than the window, one channel, channels that no vector divides,
# and nothing at all.
_SHAPES: dict[str, Shape] = {
    "plain": (2, 9, 11, 16),
    "aligned": (1, 8, 16, 64),
    "beyond_a_tile": (1, 9, 17, 72),
    "odd": (2, 7, 5, 13),
    "one_channel": (2, 6, 7, 1),
    "one_row": (2, 1, 12, 8),
    "one_column": (2, 12, 1, 8),
    "one_position": (3, 1, 1, 24),
    "two_by_two": (3, 2, 2, 20),
    "many_samples": (13, 3, 4, 8),
    "wide": (1, 3, 40, 12),
    "high": (1, 40, 3, 12),
    "many_channels": (1, 4, 4, 200),
    "no_batch": (0, 4, 5, 8),
    "no_height": (2, 0, 5, 8),
    "no_width": (2, 4, 0, 8),
    "no_channels": (2, 4, 5, 0),
}

POOL_MIXER_CASES = (
    *(PoolMixerCase(name, shape) for name, shape in _SHAPES.items()),
    PoolMixerCase("without_scale", (2, 6, 7, 24), scale=False),
    PoolMixerCase("wide_parameters", (2, 6, 7, 24), wide_parameters=True),
    PoolMixerCase("wide_parameters_without_scale", (2, 5, 6, 9), wide_parameters=True, scale=False),
    PoolMixerCase("five", (2, 9, 8, 16), pool_size=5),
    PoolMixerCase("five_odd", (1, 11, 7, 11), pool_size=5, wide_parameters=True),
    PoolMixerCase("seven", (2, 9, 10, 8), pool_size=7),
    PoolMixerCase("seven_on_less", (2, 3, 2, 8), pool_size=7),
    PoolMixerCase("large_eps", (2, 5, 6, 16), eps=0.5),
    PoolMixerCase("offset", (2, 6, 9, 16), offset=30.0),
    PoolMixerCase("constant", (2, 6, 5, 8), eps=1e-2, offset=0.5, spread=0.0),
    *(PoolMixerCase(layout, (3, 6, 7, 16), layout=layout) for layout in LAYOUTS[1:]),
)

DEPTHWISE_CASES = (
    *(DepthwiseCase(name, shape) for name, shape in _SHAPES.items()),
    *(DepthwiseCase(activation, (2, 6, 7, 24), activation=activation) for activation in ACTIVATIONS),
    *(DepthwiseCase(f"{act}_without_bias", (2, 5, 6, 9), bias=False, activation=act) for act in ACTIVATIONS),
    DepthwiseCase("five", (2, 9, 8, 16), size=5),
    DepthwiseCase("five_linear", (1, 11, 7, 11), size=5, activation="linear", bias=False),
    DepthwiseCase("seven", (2, 9, 10, 8), size=7, activation="relu"),
    DepthwiseCase("seven_on_less", (2, 3, 2, 8), size=7),
    *(DepthwiseCase(layout, (3, 6, 7, 16), layout=layout) for layout in LAYOUTS[1:]),
)

# A tile of kernels is 8 by 16 positions by 64 channels. One less, one more, and the same.
_EDGES: tuple[Shape, ...] = ((2, 7, 15, 63), (1, 8, 17, 64), (1, 9, 16, 65), (1, 16, 33, 8), (3, 17, 31, 4), (1, 6, 12, 136))
POOL_MIXER_EDGES = tuple(
    PoolMixerCase(f"{size}-{'x'.join(map(str, shape))}", shape, pool_size=size, wide_parameters=i % 2 == 0)
    for i, shape in enumerate(_EDGES)
    for size in (SIZES[i % 3], SIZES[(i + 1) % 3])
)
DEPTHWISE_EDGES = tuple(
    DepthwiseCase(f"{size}-{'x'.join(map(str, shape))}", shape, size=size, activation=ACTIVATIONS[(i + 1) % 3])
    for i, shape in enumerate(_EDGES)
    for size in (SIZES[i % 3], SIZES[(i + 1) % 3])
)


@st.composite
def _shapes(draw: st.DrawFn) -> Shape:
    channels = draw(st.one_of(st.integers(1, 20), st.integers(1, 12).map(lambda n: 8 * n)))
    return draw(st.integers(0, 3)), draw(st.integers(1, 20)), draw(st.integers(1, 20)), channels


@st.composite
def pool_mixer_cases(draw: st.DrawFn) -> PoolMixerCase:
    """Any sizes and options."""
    return PoolMixerCase(
        "drawn",
        draw(_shapes()),
        pool_size=draw(st.sampled_from(SIZES)),
        scale=draw(st.booleans()),
        wide_parameters=draw(st.booleans()),
        eps=draw(st.sampled_from((1e-5, 1e-2))),
        layout=draw(st.sampled_from(LAYOUTS)),
        offset=draw(st.sampled_from((0.0, 0.0, -4.0))),
    )


@st.composite
def depthwise_cases(draw: st.DrawFn) -> DepthwiseCase:
    """Any sizes and options."""
    return DepthwiseCase(
        "drawn",
        draw(_shapes()),
        size=draw(st.sampled_from(SIZES)),
        bias=draw(st.booleans()),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        layout=draw(st.sampled_from(LAYOUTS)),
    )


# ---- inputs ----


@dataclass
class PoolMixerInputs:
    """Tensors of one PoolMixerCase, and the gradient that comes back."""

    x: Tensor  # [batch, height, width, channels]
    weight: Tensor  # [channels]
    scale: Tensor | None  # [channels]
    dout: Tensor  # as x

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The op's, in the schema's order."""
        return self.x, self.weight, self.scale


@dataclass
class DepthwiseInputs:
    """Tensors of one DepthwiseCase, and the gradient that comes back."""

    x: Tensor  # [batch, height, width, channels]
    weight: Tensor  # [channels, size, size]
    bias: Tensor | None  # [channels]
    dout: Tensor  # as x

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The op's, in the schema's order."""
        return self.x, self.weight, self.bias


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The same values, [batch, height, width, channels], in another layout of memory; what lies between them is NaN."""
    if layout == "strided":
        return strided(t)
    if layout == "cropped":
        batch, height, width, channels = t.shape
        storage = t.new_full((batch, height + 2, width + 1, channels), math.nan)
        storage[:, 1:-1, 1:] = t
        return storage[:, 1:-1, 1:]
    if layout == "channels_first":
        return t.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    return misaligned(t) if layout == "misaligned" else t


def pool_mixer_inputs(case: PoolMixerCase, dtype: torch.dtype, device: str = "cpu") -> PoolMixerInputs:
    """Fresh random tensors. The gradient that comes back is laid out as x is."""
    channels = case.shape[-1]
    x = (case.offset + case.spread * random(*case.shape, dtype=torch.float64, device=device)).to(dtype)
    dout = random(*case.shape, dtype=dtype, device=device)
    of_parameters = wide_dtype(dtype) if case.wide_parameters else dtype
    weight = random(channels, dtype=of_parameters, device=device)
    scale = random(channels, dtype=of_parameters, device=device) if case.scale else None
    return PoolMixerInputs(laid_out(x, case.layout), weight, scale, laid_out(dout, case.layout))


def depthwise_inputs(case: DepthwiseCase, dtype: torch.dtype, device: str = "cpu") -> DepthwiseInputs:
    """Fresh random tensors. Taps are of a size that leaves the convolution's outputs where activations bend."""
    channels, size = case.shape[-1], case.size
    x, dout = (laid_out(random(*case.shape, dtype=dtype, device=device), case.layout) for _ in range(2))
    weight = (random(channels, size, size, dtype=torch.float32, device=device) / size).to(dtype)
    return DepthwiseInputs(x, weight, random(channels, dtype=dtype, device=device) if case.bias else None, dout)


# ---- oracles ----


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics."""
    return torch.promote_types(dtype, torch.float32)


def mean_of_neighbours(places: int, size: int, like: Tensor) -> Tensor:
    """[places, places]: row i has 1 / count in the columns of i's neighbours that exist, itself among them."""
    place = torch.arange(places, device=like.device)
    near = ((place[:, None] - place).abs() <= size // 2).to(torch.float64)
    return (near / near.sum(1, keepdim=True)).to(like.dtype)


def pool_mixer(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    *,
    pool_size: int = 3,
    eps: float = 1e-5,
    norm_bias: Tensor | None = None,
) -> Tensor:
    """x + scale (P n - n) with the whole norm n, its mean and, if one is given, its bias."""
    mean, rstd = (t.view(-1, 1, 1, 1) for t in statistics(x, eps))
    n = (x - mean) * rstd * weight
    n = n if norm_bias is None else n + norm_bias
    rows, columns = (mean_of_neighbours(places, pool_size, x) for places in x.shape[1:3])
    pooled = torch.einsum("hi,wj,bijc->bhwc", rows, columns, n)
    return x + (pooled - n if scale is None else scale * (pooled - n))


def statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(variance + eps) of each sample, [batch]."""
    flat = x.reshape(x.size(0), math.prod(x.shape[1:]))
    mean = flat.mean(1)
    return mean, 1 / torch.sqrt(((flat - mean[:, None]) ** 2).mean(1) + eps)


def activate(pre: Tensor, activation: str) -> Tensor:
    """By the formulas."""
    if activation == "gelu":
        return pre * (0.5 + 0.5 * torch.erf(pre * math.sqrt(0.5)))
    return torch.where(pre > 0, pre, torch.zeros_like(pre)) if activation == "relu" else pre


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str = "linear") -> Tensor:
    """Slices of an image with a margin of zeros, times a tap."""
    size, (height, width) = weight.size(1), x.shape[1:3]
    margin = size // 2
    padded = torch.nn.functional.pad(x, (0, 0, margin, margin, margin, margin))
    pre = torch.zeros_like(x) if bias is None else bias.expand(x.shape)
    for i in range(size):
        for j in range(size):
            pre = pre + weight[:, i, j] * padded[:, i : i + height, j : j + width]
    return activate(pre, activation)


# ---- checks ----


def _largest(t: Tensor) -> float:
    return float(t.abs().max()) if t.numel() else 0.0


def _in(dtype: torch.dtype, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.detach().to(dtype, copy=True).contiguous().requires_grad_() for t in tensors]


def _gradients(out: Tensor, dout: Tensor, leaves: Sequence[Tensor | None]) -> list[Tensor | None]:
    wanted = [t for t in leaves if t is not None]
    found = iter(torch.autograd.grad((out * dout.to(out.dtype)).sum(), wanted))
    return [None if t is None else next(found) for t in leaves]


def _pool_mixer_oracle(
    case: PoolMixerCase, inputs: PoolMixerInputs, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor | None]]:
    """out and the gradients, computed in dtype."""
    leaves = _in(dtype, inputs.tensors)
    out = pool_mixer(*leaves, pool_size=case.pool_size, eps=case.eps)
    return out.detach(), _gradients(out, inputs.dout, leaves)


def check_pool_mixer(
    library: Any, case: PoolMixerCase, dtype: torch.dtype, device: str = "cpu", *, backward: bool = True
) -> None:
    """pool_mixer, its statistics, and its backward, every gradient by itself."""
    inputs = pool_mixer_inputs(case, dtype, device)
    how = {"pool_size": case.pool_size}
    out, mean, rstd = library.pool_mixer(*inputs.tensors, eps=case.eps, **how)
    assert out.dtype == dtype and out.is_contiguous() and out.shape == case.shape
    wide = wide_dtype(dtype)
    for t in (mean, rstd):
        assert t.dtype == wide and t.is_contiguous() and t.shape == case.shape[:1]
    truth, truths = _pool_mixer_oracle(case, inputs, torch.float64)
    eager, yardsticks = _pool_mixer_oracle(case, inputs, dtype)
    assert_close("out", out, truth, eager)
    true_statistics = statistics(inputs.x.double(), case.eps)
    if out.numel():
        size = _largest(inputs.x.double())
        eager_mean, eager_rstd = statistics(inputs.x.to(wide), case.eps)
        assert_close("mean", mean, true_statistics[0], eager_mean, scale=size)
        assert_close("rstd", rstd, true_statistics[1], eager_rstd)
    if not backward:
        return
    gradients = library.pool_mixer_backward(inputs.dout, *inputs.tensors, mean, rstd, **how)
    # A pooled value less the value itself may cancel, and so may sums over positions, which are made in float32 at least.
    finer = torch.finfo(wide).eps / torch.finfo(dtype).eps
    scale = torch.ones(()) if inputs.scale is None else inputs.scale
    weight, scale, dout = (t.to(device, torch.float64) for t in (inputs.weight, scale, inputs.dout))
    normal = [t.view(-1, 1, 1, 1) for t in true_statistics]
    terms = 2 * dout.abs().sum((0, 1, 2)) * _largest((inputs.x.double() - normal[0]) * normal[1])
    z = dout * normal[1] * weight * scale
    scales = (_largest(dout) + 2 * _largest(z), finer * _largest(terms * scale), finer * _largest(terms * weight))
    _check_gradients(("dx", "dweight", "dscale"), gradients, truths, yardsticks, inputs.tensors, scales)


def _depthwise_oracle(
    case: DepthwiseCase, inputs: DepthwiseInputs, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor | None]]:
    """out and the gradients, computed in dtype."""
    leaves = _in(dtype, inputs.tensors)
    out = depthwise_conv2d(*leaves, activation=case.activation)
    return out.detach(), _gradients(out, inputs.dout, leaves)


def check_depthwise_conv2d(
    library: Any, case: DepthwiseCase, dtype: torch.dtype, device: str = "cpu", *, backward: bool = True
) -> None:
    """depthwise_conv2d and its backward, every gradient by itself."""
    inputs = depthwise_inputs(case, dtype, device)
    out = library.depthwise_conv2d(*inputs.tensors, activation=case.activation)
    assert out.dtype == dtype and out.is_contiguous() and out.shape == case.shape
    truth, truths = _depthwise_oracle(case, inputs, torch.float64)
    eager, yardsticks = _depthwise_oracle(case, inputs, dtype)
    assert_close("out", out, truth, eager)
    if not backward:
        return
    gradients = library.depthwise_conv2d_backward(inputs.dout, *inputs.tensors, activation=case.activation)
    # Sums over positions may cancel; they are made in float32 at least.
    finer = torch.finfo(wide_dtype(dtype)).eps / torch.finfo(dtype).eps
    terms = finer * _largest(inputs.dout.double().abs().sum((0, 1, 2)))
    scales = (0.0, terms * _largest(inputs.x.double()), terms)
    _check_gradients(("dx", "dweight", "dbias"), gradients, truths, yardsticks, inputs.tensors, scales)


def _check_gradients(
    names: Sequence[str],
    found: Sequence[Tensor],
    truths: Sequence[Tensor | None],
    yardsticks: Sequence[Tensor | None],
    given: Sequence[Tensor | None],
    scales: Sequence[float],
) -> None:
    for name, g, truth, yardstick, t, scale in zip(names, found, truths, yardsticks, given, scales, strict=True):
        if t is None:
            assert g.shape == (0,), name
            continue
        assert truth is not None and yardstick is not None
        assert g.dtype == t.dtype and g.is_contiguous() and g.shape == t.shape, name
        assert_close(name, g, truth, yardstick.to(g.dtype), gradient=True, scale=scale)
