"""Patches of images and of voxels to tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ._product import is_plain, linear
from .grids import convolve

CONVOLUTIONS: dict[int, type[Any]] = {2: nn.Conv2d, 3: nn.Conv3d}


class PatchEmbedding(nn.Module):
    """Cuts a grid into patches that do not overlap, and makes each a token (ViT, arXiv 2010.11929, equation 1).

    A convolution whose stride is its kernel holds the weights, under their usual names and shapes. What it computes is
    one product over the rows of patches.

    Args:
        in_channels: channels of the grid.
        hidden_size: width of a token.
        patch_size: the sides of a patch: two numbers for images, three for voxels.
        name: of the submodule that holds the weights.
        pad: whether a grid that patches do not divide is padded with zeros at the end of each axis; else it is refused.

    Raises:
        ValueError: sides that are neither two nor three, or below 1.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_size: int,
        patch_size: Sequence[int],
        *,
        name: str = "projection",
        pad: bool = False,
    ) -> None:
        super().__init__()
        sides = tuple(patch_size)
        if len(sides) not in CONVOLUTIONS or min(sides) < 1:
            raise ValueError(f"patch_size must be two or three numbers of at least 1, got {sides}")
        self.in_channels, self.patch_size, self.name, self.pad = in_channels, sides, name, pad
        self.add_module(name, CONVOLUTIONS[len(sides)](in_channels, hidden_size, sides, sides))

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, in_channels, *sizes]; returns [batch, *grid, hidden_size], where grid is sizes / patch_size.

        Raises:
            ValueError: another number of axes or of channels; without `pad` sizes that patches do not divide.
        """
        sides = self.patch_size
        if x.dim() != len(sides) + 2 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"{type(self).__name__}: x must be of shape [batch, {self.in_channels}, {len(sides)} sizes], "
                f"got {list(x.shape)}"
            )
        if any(size % side for size, side in zip(x.shape[2:], sides, strict=True)):
            if not self.pad:
                raise ValueError(
                    f"{type(self).__name__}: x must have sizes that patches of {sides} divide, got {list(x.shape)}"
                )
            missing = [-size % side for size, side in zip(x.shape[2:], sides, strict=True)]
            x = F.pad(x, [n for amount in reversed(missing) for n in (0, amount)])
        projection: nn.Module = getattr(self, self.name)
        return embed_patches(x, projection)

    def extra_repr(self) -> str:
        return f"patch_size={self.patch_size}, pad={self.pad}"


def embed_patches(x: Tensor, projection: nn.Module, *, channels_last: bool = False) -> Tensor:
    """projection(x), channels last, for a convolution whose patches do not overlap: one product over their rows.

    Args:
        x: [batch, in_channels, *sizes], or with channels_last [batch, *sizes, in_channels], each size a multiple of the
            patch's.
        projection: `nn.Conv2d` or `nn.Conv3d` whose stride is its kernel. A module that takes its place, such as an
            adapter, is called.

    Returns:
        [batch, *grid, out_channels].
    """
    if not any(is_plain(projection, kind) for kind in CONVOLUTIONS.values()):
        out: Tensor = projection(x.movedim(-1, 1) if channels_last else x)
        return out.movedim(1, -1)
    weight: Tensor = projection.weight  # type: ignore[assignment]
    bias: Tensor | None = projection.bias  # type: ignore[assignment]
    axes = weight.dim() - 2
    first = 1 if channels_last else 2  # the dimension of the first size
    for axis in range(axes - 1, -1, -1):
        x = x.unflatten(first + axis, (-1, weight.shape[2 + axis]))
    grid, inside = range(first, first + 2 * axes, 2), range(first + 1, first + 2 * axes, 2)
    if channels_last:
        # [batch, rows, p, columns, q, channels] -> [batch, rows, columns, p, q, channels], and the weight likewise: it
        # is smaller than the rows, which so are copied in whole vectors of channels.
        rows = x.permute(0, *grid, *inside, x.dim() - 1).flatten(axes + 1)
        return linear(rows, weight.movedim(1, -1).flatten(1), bias)
    # [batch, channels, rows, p, columns, q] -> [batch, rows, columns, channels, p, q]
    rows = x.permute(0, *grid, 1, *inside).flatten(axes + 1)
    return linear(rows, weight.flatten(1), bias)


class OverlappingPatchEmbedding(nn.Module):
    """Makes each patch of a grid a token; patches may overlap (SegFormer, arXiv 2105.15203, section 3.1).

    It is a convolution with zeros around the grid, which torch computes with channels last in memory.

    Args:
        in_channels: channels of the grid.
        hidden_size: width of a token.
        patch_size, stride, padding: of the convolution.
        name: of the submodule that holds the weights.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_size: int,
        patch_size: int,
        stride: int,
        padding: int,
        *,
        name: str = "projection",
    ) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, nn.Conv2d(in_channels, hidden_size, patch_size, stride, padding))

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, height, width, in_channels]; returns [batch, rows, columns, hidden_size]."""
        return convolve(x, getattr(self, self.name))


def least_size(patch_sizes: Sequence[int], strides: Sequence[int], padding: Sequence[int], grids: Sequence[int]) -> int:
    """The least size of an image of which each stage's patches make a grid of at least so many tokens a side."""
    least = 1
    for patch, stride, pad, grid in zip(*(tuple(x)[::-1] for x in (patch_sizes, strides, padding, grids)), strict=True):
        least = max(1, (max(grid, least) - 1) * stride + patch - 2 * pad)
    return least
