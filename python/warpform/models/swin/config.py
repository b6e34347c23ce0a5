"""The options of Swin and Swin V2."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from ...nn import ACTIVATIONS
from ..common.backbone import checked_out_features, without_default
from ..common.config import TransformersConfig

Pair = tuple[int, int]
Self = TypeVar("Self", bound="SwinConfig")


def pair(value: int | Pair) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


@dataclasses.dataclass
class SwinConfig(TransformersConfig):
    """The options of Swin, under the names of transformers' `SwinConfig`.

    Presets are T, S, B and L (section 3.3 of the paper).

    Attributes:
        image_size, patch_size, window_size: of both axes, or (height, width). Images of other sizes may be given all
            the same: image_size is that of absolute position embeddings, and in Swin V2 tells where windows shrink.
        embed_dim: channels of the first stage, each further one has twice as many.
        depths, num_heads: blocks and heads of each stage.
        out_features: of a backbone, the stages that it returns: some of stem, stage1, .., in this order; None is the
            last one.

    Raises:
        ValueError: an unknown hidden_act or problem_type, sizes that do not fit, a probability outside of [0, 1].
    """

    model_type = "swin"
    choices = {"hidden_act": ACTIVATIONS}
    probabilities = ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate")
    presets = {
        "T": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
        "S": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)},
        "B": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
        "L": {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)},
    }

    image_size: int | Pair = 224
    patch_size: int | Pair = 4
    num_channels: int = 3
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int | Pair = 7
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    drop_path_rate: float = 0.1
    hidden_act: str = "gelu"
    use_absolute_embeddings: bool = False
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    out_features: tuple[str, ...] | None = None
    output_hidden_states: bool = False
    return_dict: bool = True
    num_labels: int = 2
    problem_type: str | None = None

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size", "window_size", "depths", "num_heads"):
            value = getattr(self, name)
            if not isinstance(value, int):
                setattr(self, name, tuple(value))  # config.json has lists
        super().__post_init__()
        self.out_features = checked_out_features(self, self.out_features, len(self.depths))
        for name in ("image_size", "patch_size", "window_size"):
            sizes = getattr(self, name)
            if min(pair(sizes)) < 1 or (isinstance(sizes, tuple) and len(sizes) != 2):
                raise self.error(f"{name} must be one number or two, at least 1, got {sizes}")
        if not self.depths or len(self.depths) != len(self.num_heads):
            raise self.error(f"depths and num_heads must be of equal lengths, got {self.depths} and {self.num_heads}")
        for stage, heads in enumerate(self.num_heads):
            if heads < 1 or (self.embed_dim << stage) % heads:
                raise self.error(f"num_heads must divide the {self.embed_dim << stage} channels of stage {stage}, "
                                 f"got {heads}")  # fmt: skip

    @property
    def hidden_size(self) -> int:
        """Channels of the last stage."""
        return self.embed_dim << (len(self.depths) - 1)

    @property
    def patch_grid(self) -> Pair:
        """Tokens of an image of image_size, where patches divide it."""
        (height, width), (rows, columns) = pair(self.image_size), pair(self.patch_size)
        return height // rows, width // columns

    def windows(self) -> tuple[Pair, ...]:
        """The window of each stage."""
        return (pair(self.window_size),) * len(self.depths)

    @classmethod
    def from_transformers(cls: type[Self], fields: Mapping[str, Any], **overrides: Any) -> Self:
        return super().from_transformers(without_default(fields), **overrides)

    def to_transformers(self) -> dict[str, Any]:
        """The fields as keywords of transformers' config.

        Raises:
            ValueError: a window that is not square, which transformers does not have.
        """
        height, width = pair(self.window_size)
        if height != width:
            raise self.error(f"window_size must be square in transformers, got {self.window_size}")
        fields = {**super().to_transformers(), "window_size": height}
        if self.out_features is not None:
            fields["out_features"] = list(self.out_features)
        return fields


@dataclasses.dataclass
class Swinv2Config(SwinConfig):
    """The options of Swin V2, under the names of transformers' `Swinv2Config`.

    Attributes:
        pretrained_window_sizes: for each stage the window that its position bias was trained with; 0 is window_size.
        mask_value: what is added to scores of pairs that shifting brought together. transformers adds -100 twice, the
            published code once.
    """

    model_type = "swinv2"

    pretrained_window_sizes: tuple[int, ...] | None = None
    mask_value: float = -200.0

    def __post_init__(self) -> None:
        stages = len(self.depths)
        sizes = (0,) * stages if self.pretrained_window_sizes is None else tuple(self.pretrained_window_sizes)
        self.pretrained_window_sizes = sizes[:stages]
        super().__post_init__()
        if len(sizes) < stages:
            raise self.error(f"pretrained_window_sizes must have {stages} numbers, as depths has, got {sizes}")
        if self.use_absolute_embeddings:
            raise self.error("use_absolute_embeddings=True is not supported in Swin V2")

    def windows(self) -> tuple[Pair, ...]:
        """The window of each stage: no larger than the stage's grid at image_size.

        A square window looks at the height alone, as in transformers.
        """
        height, width = pair(self.window_size)
        rows, columns = self.patch_grid
        columns = rows if height == width else columns
        stages = range(len(self.depths))
        return tuple((max(1, min(rows >> i, height)), max(1, min(columns >> i, width))) for i in stages)

    def to_transformers(self) -> dict[str, Any]:
        fields = super().to_transformers()
        del fields["mask_value"]
        return fields
