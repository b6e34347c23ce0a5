"""Attention within windows as one makes it in torch: what warpform's op is timed against."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Sizes = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Windows:
    """The tables that peers keep of a grid cut into windows of N tokens."""

    grid: Sizes
    window: Sizes
    shift: Sizes
    index: Tensor  # int64 [N * N], the row of the table of each pair
    region: Tensor | None  # int64 [windows, N], which side of the seams a token is from; None without a shift
    mask: Tensor | None  # [windows, N, N], -100 or 0

    @classmethod
    def make(cls, grid: Sizes, window: Sizes, shift: Sizes, device: str, dtype: torch.dtype) -> Windows:
        places = torch.cartesian_prod(*(torch.arange(w) for w in window)).view(math.prod(window), -1)
        index = torch.zeros((), dtype=torch.int64)
        for axis, w in enumerate(window):
            index = index * (2 * w - 1) + places[:, None, axis] - places[None, :, axis] + w - 1
        region = mask = None
        if any(shift):
            region = torch.zeros((), dtype=torch.int64)
            for n, w, s in zip(grid, window, shift, strict=True):
                place = torch.arange(n)
                of_axis = (place >= n - w).long() + (place >= n - s).long() if s else torch.zeros_like(place)
                region = 3 * region.unsqueeze(-1) + of_axis
            region = partition(region[None], window).to(device)
            mask = torch.where(region[:, None] != region[:, :, None], -100.0, 0.0).to(dtype)
        return cls(grid, window, shift, index.flatten().to(device), region, mask)

    @property
    def axes(self) -> list[int]:
        return list(range(1, 1 + len(self.grid)))

    def cut(self, x: Tensor) -> Tensor:
        """[B, *grid, ...] -> [B * windows, N, ...]."""
        if self.region is not None:
            x = x.roll([-s for s in self.shift], self.axes)
        return partition(x, self.window)

    def join(self, x: Tensor) -> Tensor:
        """[B * windows, N, C] -> [B, *grid, C]."""
        counts = [n // w for n, w in zip(self.grid, self.window, strict=True)]
        order = [0, *(e for i in self.axes for e in (i, i + len(counts))), 1 + 2 * len(counts)]
        x = x.view(-1, *counts, *self.window, x.shape[-1]).permute(order).reshape(-1, *self.grid, x.shape[-1])
        return x if self.region is None else x.roll(self.shift, self.axes)


def partition(x: Tensor, window: Sizes) -> Tensor:
    """[B, *grid, ...] -> [B * windows, N, ...]."""
    axes = len(window)
    split = [e for n, w in zip(x.shape[1:], window, strict=False) for e in (n // w, w)]
    x = x.reshape(x.shape[0], *split, *x.shape[1 + axes :])
    order = [0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), *range(2 * axes + 1, x.dim())]
    return x.permute(order).reshape(-1, math.prod(window), *x.shape[2 * axes + 1 :])


def bias_of(table: Tensor, windows: Windows, tokens: int) -> Tensor:
    """[heads, N, N], gathered from [prod(2 w - 1), heads]."""
    return table[windows.index].view(tokens, tokens, -1).permute(2, 0, 1)


# Each peer takes qkv [B * windows, N, 3, heads, d] and the table, and returns [B * windows, N, heads * d].


def eager_windows(qkv: Tensor, table: Tensor, windows: Windows) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B * windows, heads, N, d]
    score = q * q.shape[-1] ** -0.5 @ k.mT + bias_of(table, windows, q.shape[2])
    if windows.mask is not None:
        count = len(windows.mask)
        score = (score.unflatten(0, (-1, count)) + windows.mask.unsqueeze(1)).flatten(0, 1)
    return (torch.softmax(score, -1) @ v).transpose(1, 2).flatten(2)


def sdpa_windows(qkv: Tensor, table: Tensor, windows: Windows) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    added = bias_of(table, windows, q.shape[2]).unsqueeze(0)
    if windows.mask is not None:
        # One for each window of each image, as fused attention takes no mask that repeats along the batch.
        added = added + windows.mask.unsqueeze(1)
        added = added.expand(q.shape[0] // len(added), *added.shape).flatten(0, 1)
    return F.scaled_dot_product_attention(q, k, v, added).transpose(1, 2).flatten(2)


def flex_windows(qkv: Tensor, table: Tensor, windows: Windows) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    index, region = windows.index.view(q.shape[2], q.shape[2]), windows.region

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        score = score + table[index[i, j], h]
        if region is None:
            return score
        window = b % region.shape[0]
        return torch.where(region[window, i] != region[window, j], score - 100.0, score)

    return flex_attention(q, k, v, score_mod=score_mod).transpose(1, 2).flatten(2)


def eager_block(x: Tensor, qkv: Tensor, table: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    return windows.cut(x), windows.join(eager_windows(qkv, table, windows))


def sdpa_block(x: Tensor, qkv: Tensor, table: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    return windows.cut(x), windows.join(sdpa_windows(qkv, table, windows))


def flex_block(x: Tensor, qkv: Tensor, table: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    return windows.cut(x), windows.join(flex_windows(qkv, table, windows))
