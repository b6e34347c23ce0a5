"""The options of DiT-3D and its published sizes."""

from __future__ import annotations

import dataclasses

from ...nn import ACTIVATIONS
from ..common.config import ModelConfig

Axes = tuple[int, int, int]


@dataclasses.dataclass
class DiT3DConfig(ModelConfig):
    """The options of DiT-3D, under the names of the published code; the sizes by default are those of XL.

    Presets are S, B, L and XL (table 1 of the paper).

    Attributes:
        input_size: voxels along each axis, one number or three; patch_size divides them.
        patch_size: p; p^3 voxels are a token.
        in_channels: channels of a voxel.
        hidden_size, depth, num_heads, mlp_ratio, hidden_act: of the blocks.
        num_classes: classes, without the null class.
        class_dropout_prob: how often training replaces a label by the null class, which classifier-free guidance needs
            (arXiv 2207.12598). 0: there is no null class.
        learn_sigma: the output has the variance beside the noise, so twice the channels.
        window_size: tokens of a window along each axis, one number or three; along a shorter axis, that axis.
        window_block_indexes: the blocks that attend within windows, all others are global. None: every third one,
            from the first. In the published code no block does: its scripts give the indices as text, which becomes a
            tuple of characters, so that no block finds its number there. Where numbers are given, such a block attends
            to the whole sequence in the order of windows, and then mixes the samples of the batch as it puts the
            windows back. The published checkpoints were trained with global attention, which is () here.

    Raises:
        ValueError: sizes that do not fit, a class_dropout_prob outside [0, 1), an unknown hidden_act.
    """

    model_type = "dit3d"
    positive = ("patch_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes")
    divides = (("num_heads", "hidden_size"),)
    choices = {"hidden_act": ACTIVATIONS}
    presets = {
        "S": {"hidden_size": 384, "depth": 12, "num_heads": 6},
        "B": {"hidden_size": 768, "depth": 12, "num_heads": 12},
        "L": {"hidden_size": 1152, "depth": 24, "num_heads": 16},
        "XL": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
    }

    input_size: int | Axes = 32
    patch_size: int = 4
    in_channels: int = 3
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    hidden_act: str = "gelu"
    num_classes: int = 1
    class_dropout_prob: float = 0.1
    learn_sigma: bool = False
    window_size: int | Axes = 4
    window_block_indexes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("input_size", "window_size"):
            if min(axes(name, getattr(self, name))) < 1:
                raise self.error(f"{name} must be at least 1 along every axis, got {getattr(self, name)}")
        if any(size % self.patch_size for size in self.voxels):
            raise self.error(f"patch_size must divide input_size {self.input_size}, got {self.patch_size}")
        if self.hidden_size < 6:
            raise self.error(f"hidden_size must be at least 6, a sine and a cosine an axis, got {self.hidden_size}")
        if int(self.hidden_size * self.mlp_ratio) < 1:
            raise self.error(f"mlp_ratio must give at least one channel, got {self.mlp_ratio}")
        if not 0.0 <= self.class_dropout_prob < 1.0:
            raise self.error(f"class_dropout_prob must be at least 0 and below 1, got {self.class_dropout_prob}")
        if any(not 0 <= i < self.depth for i in self.window_block_indexes or ()):
            raise self.error(
                f"window_block_indexes must be from 0 to {self.depth - 1}, got {self.window_block_indexes}"
            )

    @property
    def voxels(self) -> Axes:
        """Voxels along each axis."""
        return axes("input_size", self.input_size)

    @property
    def grid(self) -> Axes:
        """Tokens along each axis."""
        x, y, z = self.voxels
        return x // self.patch_size, y // self.patch_size, z // self.patch_size

    @property
    def windows(self) -> tuple[Axes | None, ...]:
        """For each block the tokens of its windows along each axis, or None where it is global."""
        x, y, z = (min(w, g) for w, g in zip(axes("window_size", self.window_size), self.grid, strict=True))
        indexes = range(0, self.depth, 3) if self.window_block_indexes is None else self.window_block_indexes
        return tuple((x, y, z) if i in indexes else None for i in range(self.depth))

    @property
    def out_channels(self) -> int:
        return 2 * self.in_channels if self.learn_sigma else self.in_channels


def axes(name: str, value: int | Axes) -> Axes:
    if isinstance(value, int):
        return value, value, value
    if len(value) != 3:
        raise ValueError(f"{name} must be one number or three, got {value}")
    return value
