"""`nn.grids` against torch's functions, channels first."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.vision import Wrapped, assert_same
from warpform.nn.grids import convolve, depthwise, resize


def last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


@pytest.mark.parametrize(("name", "activation"), [("linear", lambda x: x), ("gelu", F.gelu), ("relu", F.relu)])
def test_depthwise(name: str, activation: Callable[[Tensor], Tensor]) -> None:
    """A module in the convolution's place is called, and gives the same."""
    conv, x = nn.Conv2d(5, 5, 3, padding=1, groups=5).double(), torch.randn(2, 5, 5, 5).double()
    expected = activation(conv(x))
    for module in (conv, Wrapped(conv)):
        assert_same(name, depthwise(last(x), module, name), last(expected))


def test_convolve() -> None:
    conv, x = nn.Conv2d(3, 4, 3, 2, 1).double(), torch.randn(2, 3, 5, 6).double()
    out = convolve(last(x), conv)
    assert out.is_contiguous()
    assert_same("convolve", out, last(conv(x)))


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("size", [(3, 4), (7, 5), (9, 13)])
def test_resize(size: tuple[int, int], antialias: bool) -> None:
    x = torch.randn(2, 3, 7, 5).double()
    expected = F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=antialias)
    assert_same("resize", resize(last(x), size, antialias=antialias), last(expected))
    assert resize(last(x), (7, 5)).data_ptr() == x.data_ptr()
