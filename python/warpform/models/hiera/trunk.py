"""The stages of Hiera (arXiv 2306.00989), in the order of mask units: windows and poolings are runs of rows."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from ...nn import AddBiasResidualLayerNorm, FeedForward, MaskUnitAttention, mean_pool
from ...nn._checkpoint import CheckpointedLayers
from ...nn._product import apply_linear
from ...nn.metaformer import MetaFormerBlock, Terms, normalise, run_blocks
from ...nn.mixers import max_of_runs
from ...packing import Packing
from ..common.checks import check_pixels, check_shape
from ..common.positions import resize_grid
from .config import Geometry
from .units import Units


class HieraBlock(MetaFormerBlock):
    """Attention with queries pooled, and a feed-forward, normalised before each (Hiera, arXiv 2306.00989, section 3).

    Where the width changes, what attention is added to is a projection of the normalised tokens, pooled as the queries
    are; else it is the tokens, pooled.

    Args:
        attention: mixes tokens, and says width, pooling and run.
        hidden_size, out_size: channels that come in and that leave.
        intermediate_size, hidden_act: of the feed-forward.
        eps: of both normalisations.
        drop_path: in training only, on what each half adds.
    """

    part_names = ("attention", "feed_forward")
    attention: MaskUnitAttention
    attention_norm: nn.Module
    feed_forward: nn.Module
    feed_forward_norm: nn.Module

    def __init__(
        self,
        attention: MaskUnitAttention,
        hidden_size: int,
        out_size: int,
        intermediate_size: int,
        hidden_act: str = "gelu",
        *,
        eps: float = 1e-6,
        drop_path: float = 0.0,
    ) -> None:
        widths = iter((hidden_size, out_size))
        super().__init__(
            attention,
            FeedForward(out_size, intermediate_size, hidden_act),
            norm=lambda: AddBiasResidualLayerNorm(next(widths), eps),
            drop_path=drop_path,
        )
        self.projection = nn.Linear(hidden_size, out_size) if hidden_size != out_size else None

    def run(
        self,
        hidden: Tensor,
        added: Tensor | None,
        bias: Tensor | None,
        packing: Packing | None = None,
        **mixing: Any,
    ) -> Terms:
        """`forward` without the last addition.

        Args:
            hidden, added: [batch, units, n, hidden_size], with a packing [1, packing.total, n, hidden_size]; None adds
                nothing.
            bias: [hidden_size], or None.
            packing: which units of which image there are; None: the same number for all.
            **mixing: further arguments of the attention.

        Returns:
            [batch, units, n / pool, out_size] and what is still to be added to it.
        """
        normal, hidden = normalise(self.attention_norm, hidden, added, bias)
        if self.projection is not None:
            hidden = apply_linear(normal, self.projection)
        hidden = max_of_runs(hidden, self.attention.pool)
        added, bias = self.attention(normal, packing, **mixing)
        added, bias = self._drop_images(added, bias, packing)
        normal, hidden = normalise(self.feed_forward_norm, hidden, added, bias)
        added, bias = self.feed_forward(normal)
        return (hidden, *self._drop_images(added, bias, packing))

    def _drop_images(self, added: Tensor, bias: Tensor | None, packing: Packing | None) -> tuple[Tensor, Tensor | None]:
        """`_drop`, for whole images also where their units are packed."""
        if packing is None or not self.drop_path.drops:
            return self._drop(added, bias)
        added = added if bias is None else added + bias
        factor = self.drop_path.factor(added.new_empty(packing.batch_size))
        images = packing.indices.clamp(min=0) // packing.seqlen
        return added * factor[images].view(1, -1, 1, 1), None


class HieraEmbeddings(nn.Module):
    """Images to tokens, by a convolution, and learned positions.

    Args:
        config: of Hiera or TurboViT.
        width: channels of a token.
    """

    def __init__(self, config: Geometry, width: int) -> None:
        super().__init__()
        self.grid, self.stride, self.unit = config.token_grid, config.patch_stride, config.masked_unit_size
        self.projection = nn.Conv2d(
            config.num_channels, width, config.patch_size, config.patch_stride, config.patch_padding
        )
        self.position_embeddings = nn.Parameter(torch.zeros(1, math.prod(self.grid), width))

    def forward(self, pixel_values: Tensor, kept: Tensor | None, interpolate_pos_encoding: bool = False) -> Tensor:
        """Embeds.

        Args:
            pixel_values: [batch, channels, height, width].
            kept: bool [batch, units]: pixels of others are taken as 0, so that none is seen through the convolution.
            interpolate_pos_encoding: lets positions serve images of another size.

        Returns:
            [batch, rows, columns, width].
        """
        grid = (pixel_values.shape[2] // self.stride[0], pixel_values.shape[3] // self.stride[1])
        if kept is not None:
            pixels = [side * stride for side, stride in zip(self.unit, self.stride, strict=True)]
            mask = kept.to(pixel_values.dtype).view(kept.shape[0], 1, grid[0] // self.unit[0], grid[1] // self.unit[1])
            for axis, count in zip((2, 3), pixels, strict=True):
                mask = mask.repeat_interleave(count, axis)
            pixel_values = pixel_values * mask
        tokens: Tensor = self.projection(pixel_values)
        positions = self.position_embeddings[0]
        if interpolate_pos_encoding:
            positions = resize_grid(positions, self.grid, grid)
        return tokens.permute(0, 2, 3, 1) + positions.unflatten(0, grid)


@dataclasses.dataclass
class Run:
    """What the trunk gives.

    Attributes:
        states: the embeddings and the output of every stage, [batch, units, n, channels], or with a packing
            [1, packing.total, n, channels].
        units: their order.
        packing: which units of which image there are; None: all.
    """

    states: list[Tensor]
    units: Units
    packing: Packing | None

    def padded(self, state: Tensor) -> Tensor:
        """A state as [batch, units, n, channels]; with a packing K units, the kept ones, and 0 after them."""
        if self.packing is None:
            return state
        lengths, starts = self.packing.lengths.long(), self.packing.cu_seqlens[:-1].long()
        places = torch.arange(self.packing.max_seqlen, device=state.device)
        rows = (starts.unsqueeze(1) + places).clamp(max=max(self.packing.total - 1, 0))
        there = places < lengths.unsqueeze(1)
        return torch.where(there[:, :, None, None], state[0][rows], state.new_zeros(()))

    def mean(self) -> Tensor:
        """The mean over the tokens of each image after the last stage, [batch, channels]; 0 where there are none."""
        last = self.states[-1]
        if self.packing is None:
            return last.flatten(1, 2).mean(1)
        return mean_pool(last[0].mean(1), self.packing)


class HieraTrunk(CheckpointedLayers):
    """Embeddings and stages, which Hiera and TurboViT share.

    Args:
        config: of one of them.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        stages = config.stages()
        self.embeddings = HieraEmbeddings(config, stages[0].width)
        rates = iter(config.drop_paths())
        self.stages = nn.ModuleList()
        for stage in stages:
            blocks = nn.ModuleList()
            for i, run in enumerate(stage.runs):
                width, pool = (stage.width_in, stage.pool) if i == 0 else (stage.width, 1)
                attention = MaskUnitAttention(width, stage.heads, run, out_size=stage.width, pool=pool)
                blocks.append(
                    HieraBlock(
                        attention,
                        width,
                        stage.width,
                        stage.intermediate,
                        config.hidden_act,
                        eps=config.layer_norm_eps,
                        drop_path=next(rates),
                    )
                )
            self.stages.append(blocks)

    def order(self, name: str, pixel_values: Tensor, interpolate_pos_encoding: bool = True) -> Units:
        """The units of images.

        Raises:
            ValueError: pixel_values that are not [batch, channels, height, width], or of a size that no grid of units
                has, or of another one than image_size without interpolate_pos_encoding.
        """
        config = self.config
        check_pixels(name, pixel_values, config.num_channels)
        size = (pixel_values.shape[2], pixel_values.shape[3])
        sides = [s * u for s, u in zip(config.patch_stride, config.masked_unit_size, strict=True)]
        if size[0] % sides[0] or size[1] % sides[1]:
            raise ValueError(
                f"{name}: pixel_values must have a height and a width that patch_stride * masked_unit_size = {sides} "
                f"divides, got {list(pixel_values.shape)}"
            )
        if size != tuple(config.image_size) and not interpolate_pos_encoding:
            raise ValueError(
                f"{name}: pixel_values must have the height and width {list(config.image_size)} of image_size, or "
                f"interpolate_pos_encoding must be True, got {list(pixel_values.shape)}"
            )
        found: Units = config.units((size[0] // config.patch_stride[0], size[1] // config.patch_stride[1]))
        return found

    def forward(
        self,
        pixel_values: Tensor,
        units: Units,
        kept: Tensor | None = None,
        *,
        interpolate_pos_encoding: bool = False,
        by_rows: bool = False,
    ) -> Run:
        """Runs all stages.

        Args:
            pixel_values: [batch, channels, height, width].
            units: their order, of `order`.
            kept: bool [batch, units], units to go on with; None is all.
            interpolate_pos_encoding: lets positions serve images of another size.
            by_rows: takes the tokens row by row for the order of transformers (`HieraConfig.token_order`).
        """
        tokens = self.embeddings(pixel_values, kept, interpolate_pos_encoding)
        hidden = units.from_reversed(tokens.flatten(1, 2)) if by_rows else units.split(tokens)
        packing = None
        if kept is not None:
            packing = Packing.from_mask(kept)
            hidden = packing.pack(hidden).unsqueeze(0)
        states = [hidden]
        for blocks in self.stages:
            hidden = run_blocks(self, blocks, hidden, packing=packing)
            states.append(hidden)
        return Run(states, units, packing)


def checked_units(name: str, bool_masked_pos: Tensor | None, batch: int, units: Units) -> Tensor | None:
    """bool_masked_pos as bool.

    Raises:
        TypeError: neither bool nor integers.
        ValueError: another shape than [batch, units].
    """
    if bool_masked_pos is None:
        return None
    if bool_masked_pos.is_floating_point() or bool_masked_pos.is_complex():
        raise TypeError(f"{name}: bool_masked_pos must be bool or integers, got {bool_masked_pos.dtype}")
    check_shape(name, "bool_masked_pos", bool_masked_pos, (batch, units.count))
    return bool_masked_pos.bool()
