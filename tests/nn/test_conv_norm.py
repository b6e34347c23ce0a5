"""`nn.conv_norm`: which layout its modules take, and where BatchNorm is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers.vision import assert_same, randomise, wrap_products
from warpform.nn.conv_norm import ConvNorm


@pytest.mark.parametrize(("kernel_size", "groups"), [(1, 1), (3, 1), (1, 5), (3, 5)])
def test_a_module_in_the_place_of_the_convolution(kernel_size: int, groups: int) -> None:
    """It takes the layout of what it stands for, also where the side equals the channels."""
    layer = randomise(ConvNorm(5, 5, kernel_size, groups=groups, bias=True, activation="prelu"))
    x = torch.randn(2, 5, 5, 5).double()
    expected = layer(x)
    assert wrap_products(layer) == 1
    assert_same("wrapped", layer(x), expected)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_one_place_in_training_mode(kernel_size: int) -> None:
    """nn.BatchNorm2d has no variance there. Statistics of nn.SyncBatchNorm may span processes, so torch decides."""
    layer, x = ConvNorm(4, 6, kernel_size), torch.randn(1, 1, 1, 4)
    with pytest.raises(ValueError, match=r"ConvNorm: x must have more than one place a channel .* got \[1, 1, 1\]"):
        layer(x)
    nn.SyncBatchNorm.convert_sync_batchnorm(layer)
    assert isinstance(layer.norm, nn.SyncBatchNorm)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        layer(x)
