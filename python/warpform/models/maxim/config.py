"""The options of MAXIM."""

from __future__ import annotations

import dataclasses
import math

from ..common.config import ModelConfig

Pair = tuple[int, int]


@dataclasses.dataclass
class MAXIMConfig(ModelConfig):
    """The options of MAXIM (arXiv 2201.02973), mostly under the names of its release.

    Presets are S-1, S-2, S-3, M-1, M-2 and M-3: S has 32 features and M 64, and the number is that of stages. Published
    weights have num_supervision_scales=3: deblurring and denoising are S-3, deraining, dehazing and enhancement S-2.

    Level i of a stage has features * 2 ** i channels and a grid of 1 / 2 ** i of the image's rows and columns.

    Attributes:
        features: channels of the first level.
        depth: levels of a stage.
        num_stages: U-Nets one after the other.
        num_groups: pairs of a multi-axis block and a channel-attention block of each level.
        num_bottleneck_blocks: at the bottom of a stage.
        num_supervision_scales: levels that see the image and restore it, the finest ones.
        high_res_stages: levels, the finest ones, that have the windows `block_size_hr` and `grid_size_hr`.
        block_size_hr, grid_size_hr: tokens of both axes, or of each, of a block, and cells of the grid across which
            tokens are mixed.
        block_size_lr: the same at other levels and at the bottom, for blocks and for the grid: the release reads its
            own grid size nowhere.
        channels_reduction: by how much channel attention is narrower inside.
        num_channels: of the image. What the supervised attention of stages before the last restores has the image
            added to it only where there are 3, as in the release.
        layer_norm_eps: of every LayerNorm.
        initializer_range: the standard deviation of new mixing matrices and of the other products of multi-axis blocks.

    Raises:
        ValueError: a number below 1, more scales or levels than depth, a channels_reduction above features.
    """

    model_type = "maxim"
    positive = (
        "features", "depth", "num_stages", "num_groups", "num_bottleneck_blocks", "num_supervision_scales",
        "channels_reduction", "num_channels",
    )  # fmt: skip
    presets = {
        f"{size}-{stages}": {"features": features, "num_stages": stages}
        for size, features in (("S", 32), ("M", 64))
        for stages in (1, 2, 3)
    }

    features: int = 32
    depth: int = 3
    num_stages: int = 1
    num_groups: int = 2
    num_bottleneck_blocks: int = 2
    num_supervision_scales: int = 1
    high_res_stages: int = 2
    block_size_hr: int | Pair = (16, 16)
    grid_size_hr: int | Pair = (16, 16)
    block_size_lr: int | Pair = (8, 8)
    channels_reduction: int = 4
    num_channels: int = 3
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("block_size_hr", "grid_size_hr", "block_size_lr"):
            value = getattr(self, name)
            sizes = (value, value) if isinstance(value, int) else tuple(value)  # config.json has lists
            if len(sizes) != 2 or min(sizes) < 1:
                raise self.error(f"{name} must be one number or two, at least 1, got {value}")
            setattr(self, name, sizes)
        for name in ("num_supervision_scales", "high_res_stages"):
            if not 0 <= getattr(self, name) <= self.depth:
                raise self.error(f"{name} must be at most depth {self.depth}, got {getattr(self, name)}")
        if self.channels_reduction > self.features:
            raise self.error(
                f"channels_reduction must be at most features {self.features}, got {self.channels_reduction}"
            )

    def channels(self, level: int) -> int:
        """Channels of a level."""
        return self.features << level

    def windows(self, level: int) -> tuple[Pair, Pair]:
        """The block and the grid of a level; the level below the last is the bottom."""
        if level < self.high_res_stages:
            return self.block_size_hr, self.grid_size_hr  # type: ignore[return-value]
        return self.block_size_lr, self.block_size_lr  # type: ignore[return-value]

    def size_multiple(self) -> Pair:
        """What the height and the width of an image have to be multiples of, (64, 64) by default.

        Windows divide the grid of every level, of which each has half the rows and columns of the level above.
        """
        bottom = (self.block_size_lr, self.block_size_lr)
        sizes = [(1 << level, self.windows(level)) for level in range(self.depth)] + [(1 << self.depth, bottom)]
        rows, columns = (
            math.lcm(*(stride * window[axis] for stride, windows in sizes for window in windows))  # type: ignore[index]
            for axis in (0, 1)
        )
        return rows, columns
