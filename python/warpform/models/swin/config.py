"""The options of Swin and Swin V2."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from ...nn import ACTIVATIONS
from ..common.config import PROBLEM_TYPES, ModelConfig, read_fields

Pair = tuple[int, int]

_SIZES: dict[str, dict[str, Any]] = {
    "T": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "S": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)},
    "B": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
    "L": {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)},
}


def pair(value: int | Pair) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


@dataclasses.dataclass
class SwinConfig(ModelConfig):
    """The options of Swin, under the names of transformers' `SwinConfig`.

    Attributes:
        image_size, patch_size, window_size: of both axes, or (height, width). Images of other sizes may be given all
            the same: image_size is that of absolute position embeddings, and in Swin V2 tells where windows shrink.
        embed_dim: channels of the first stage, each further one has twice as many.
        depths, num_heads: blocks and heads of each stage.

    Raises:
        ValueError: an unknown hidden_act or problem_type, sizes that do not fit, a probability outside of [0, 1].
    """

    model_type = "swin"

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
    output_hidden_states: bool = False
    return_dict: bool = True
    num_labels: int = 2
    problem_type: str | None = None

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size", "window_size", "depths", "num_heads"):
            value = getattr(self, name)
            if not isinstance(value, int):
                setattr(self, name, tuple(value))  # config.json has lists
        for name in ("image_size", "patch_size", "window_size"):
            sizes = getattr(self, name)
            if min(pair(sizes)) < 1 or (isinstance(sizes, tuple) and len(sizes) != 2):
                raise ValueError(f"{name} must be one number or two, at least 1, got {sizes}")
        if not self.depths or len(self.depths) != len(self.num_heads):
            raise ValueError(f"depths and num_heads must be of equal lengths, got {self.depths} and {self.num_heads}")
        for stage, heads in enumerate(self.num_heads):
            if heads < 1 or (self.embed_dim << stage) % heads:
                raise ValueError(f"num_heads must divide the {self.embed_dim << stage} channels of stage {stage}, "
                                 f"got {heads}")  # fmt: skip
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act must be one of {', '.join(ACTIVATIONS)}, got {self.hidden_act!r}")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if self.num_labels < 1:
            raise ValueError(f"num_labels must be at least 1, got {self.num_labels}")
        if self.problem_type not in (None, *PROBLEM_TYPES):
            raise ValueError(
                f"problem_type must be None or one of {', '.join(PROBLEM_TYPES)}, got {self.problem_type!r}"
            )

    @classmethod
    def preset(cls: type[SomeConfig], size: str, **overrides: Any) -> SomeConfig:
        """T, S, B or L (section 3.3 of the paper), with the overrides on top.

        Raises:
            ValueError: another size.
        """
        if size not in _SIZES:
            raise ValueError(f"size must be one of {', '.join(_SIZES)}, got {size!r}")
        return cls(**{**_SIZES[size], **overrides})

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
    def from_transformers(cls: type[SomeConfig], fields: Mapping[str, Any], **overrides: Any) -> SomeConfig:
        """From the fields of a transformers config. Fields that change nothing here are ignored.

        Raises:
            ValueError: an option that is not supported: output_attentions.
            TypeError: an override that is no field.
        """
        return cls(**read_fields(cls, fields, overrides))

    def to_transformers(self) -> dict[str, Any]:
        """The fields as keywords of transformers' config.

        Raises:
            ValueError: a window that is not square, which transformers does not have.
        """
        height, width = pair(self.window_size)
        if height != width:
            raise ValueError(f"window_size must be square in transformers, got {self.window_size}")
        return {**dataclasses.asdict(self), "window_size": height}


SomeConfig = TypeVar("SomeConfig", bound=SwinConfig)


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
            raise ValueError(f"pretrained_window_sizes must have {stages} numbers, as depths has, got {sizes}")
        if self.use_absolute_embeddings:
            raise ValueError("use_absolute_embeddings=True is not supported in Swin V2")

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
