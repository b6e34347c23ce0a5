"""The options of Hiera, and the stages that follow from them and from those of networks of its kind."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from ...nn import ACTIVATIONS
from ..common.backbone import checked_out_features, without_default
from ..common.config import ModelConfig, TransformersConfig, drop_path_rates
from .units import Pair, Units

Self = TypeVar("Self", bound="HieraConfig")

TOKEN_ORDERS = ("units", "rows")
_PAIRS = ("image_size", "patch_size", "patch_stride", "patch_padding", "masked_unit_size")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        width_in, width: channels that come in and that leave.
        heads: of attention.
        intermediate: channels inside of the feed-forward.
        pool: tokens that the first block makes one of; 1: it pools nothing.
        runs: for each block the tokens that attend to each other, before pooling; None: all of an image.
    """

    width_in: int
    width: int
    heads: int
    intermediate: int
    pool: int
    runs: tuple[int | None, ...]


class Geometry(ModelConfig):
    """What the configs of Hiera and TurboViT do alike: sizes of images, patches, units and poolings."""

    image_size: Any
    patch_size: Any
    patch_stride: Any
    patch_padding: Any
    query_stride: Any
    masked_unit_size: Any
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    masked_unit_attention: tuple[Any, ...]
    num_channels: int
    drop_path_rate: float

    def check_geometry(self, widths: Sequence[int]) -> None:
        """Raises ValueError where sizes do not fit; makes pairs of single numbers. widths: channels of each stage."""
        for name in (*_PAIRS, "query_stride"):
            value = getattr(self, name)
            sizes = (value, value) if isinstance(value, int) else tuple(value)
            if len(sizes) != 2 or min(sizes) < (0 if name == "patch_padding" else 1):
                raise self.error(f"{name} must be one number or two, at least 1, got {value}")
            setattr(self, name, sizes)
        if not self.depths or min(self.depths) < 1:
            raise self.error(f"depths must have a number of at least 1 for each stage, got {self.depths}")
        if len(self.num_heads) != len(self.depths):
            raise self.error(f"num_heads must have {len(self.depths)} numbers, as depths has, got {self.num_heads}")
        for stage, (width, heads) in enumerate(zip(widths, self.num_heads, strict=True)):
            if width < 1 or heads < 1 or width % heads:
                raise self.error(f"num_heads must divide the {width} channels of stage {stage}, got {heads}")
        for axis, place in enumerate(("height", "width")):
            stride, size, padding, unit, image, pool = (
                getattr(self, name)[axis]
                for name in (
                    "patch_stride", "patch_size", "patch_padding", "masked_unit_size", "image_size", "query_stride",
                )
            )  # fmt: skip
            if not 0 < size - 2 * padding <= stride:
                raise self.error(
                    f"patch_padding must leave image_size / patch_stride patches, so that 0 < patch_size - 2 * "
                    f"patch_padding <= patch_stride; got {padding} with {size} and {stride} ({place})"
                )
            if unit % pool ** (len(self.depths) - 1):
                raise self.error(
                    f"masked_unit_size must be a multiple of query_stride ** {len(self.depths) - 1}, one power for "
                    f"each stage but the last, got {unit} with {pool} ({place})"
                )
            if image % (stride * unit):
                raise self.error(
                    f"image_size must be a multiple of patch_stride * masked_unit_size = {stride * unit}, got {image} "
                    f"({place})"
                )

    @property
    def token_grid(self) -> Pair:
        """Tokens of an image of image_size, rows and columns."""
        return self.image_size[0] // self.patch_stride[0], self.image_size[1] // self.patch_stride[1]

    def units(self, grid: Pair) -> Units:
        """The order of tokens on a grid."""
        return Units(grid, self.masked_unit_size, self.query_stride, len(self.depths) - 1)

    def poolings(self, stage: int) -> int:
        """How often tokens are pooled up to the blocks of a stage."""
        return stage

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each stage."""
        raise NotImplementedError

    @property
    def ratios(self) -> tuple[float, ...]:
        """Of each stage the channels inside of the feed-forward to those of the block."""
        raise NotImplementedError

    def stages(self) -> tuple[Stage, ...]:
        """The stages. The window shrinks at each of them, also where nothing is pooled."""
        area, joined = math.prod(self.masked_unit_size), math.prod(self.query_stride)
        found, widths, before = [], self.widths, 0
        for stage, (depth, heads) in enumerate(zip(self.depths, self.num_heads, strict=True)):
            pool = joined if self.poolings(stage) > before else 1
            before = self.poolings(stage)
            window = area // joined**stage
            found.append(
                Stage(
                    widths[max(stage - 1, 0)],
                    widths[stage],
                    heads,
                    int(widths[stage] * self.ratios[stage]),
                    pool,
                    runs_of(self.masked_unit_attention, stage, depth, (pool * window, window)),
                )
            )
        return tuple(found)

    def drop_paths(self) -> tuple[float, ...]:
        """The drop path rate of each block, from 0 up to drop_path_rate."""
        return drop_path_rates(self.drop_path_rate, sum(self.depths))


def runs_of(
    masked: Sequence[bool | Sequence[bool]], stage: int, depth: int, units: tuple[int, int]
) -> tuple[int | None, ...]:
    """The runs of the blocks of a stage.

    A stage of which one bool says it attends in units where that is True. Its first block also does so where the stage
    before does, since it still has that stage's resolution.

    Args:
        masked: for each stage whether it attends in units, or that for each of its blocks.
        stage, depth: its number and its blocks.
        units: tokens of a unit before and after the first block.
    """
    own, before = masked[stage], masked[max(stage - 1, 0)]
    if isinstance(own, bool):
        lag = before if isinstance(before, bool) else before[-1]
        own = [own or lag] + [own] * (depth - 1)
    return tuple((units[0] if block == 0 else units[1]) if one else None for block, one in enumerate(own))


@dataclasses.dataclass
class HieraConfig(Geometry, TransformersConfig):
    """The options of Hiera, under the names of transformers' `HieraConfig`.

    Presets are T, S, B, B+, L and H (table 9 of the paper).

    Attributes:
        image_size: of images without interpolate_pos_encoding: of both axes, or (height, width), a multiple of
            patch_stride * masked_unit_size.
        patch_size, patch_stride, patch_padding: of the convolution that makes tokens, of both axes or of each.
        embed_dim, embed_dim_multiplier: channels of the first stage, and the factor from each stage to the next.
        depths, num_heads: blocks and heads of each stage.
        num_query_pool: so many stages after the first begin with a pooling of queries.
        query_stride: tokens that a pooling joins along each axis.
        masked_unit_size: tokens of a mask unit in the first stage along each axis. A unit larger than
            query_stride ** (stages - 1) is made of several such cells, which lie scattered over the image, as in the
            published code.
        masked_unit_attention: for each stage, whether attention is inside of units; else it is over the image. The
            first block of a stage is also inside of units where the stage before is.
        layer_norm_init: what the weights of normalisations begin with; biases begin with initializer_range.
        mask_ratio: the share of units that a model with is_mae=True leaves out.
        out_features: of a backbone, the stages that it returns: some of stem, stage1, .., in this order; None is the
            last one.
        token_order: of `HieraBackbone` alone: "units" is Hiera. transformers' class of that name does not arrange
            tokens in units, so its windows are tokens from all over the image and its maps are in no order of space;
            "rows" does the same, and is what a model made from it has.

    Raises:
        ValueError: sizes that do not fit, an unknown hidden_act, problem_type or token_order, a probability outside of
            [0, 1].
    """

    model_type = "hiera"
    choices = {"hidden_act": ACTIVATIONS, "token_order": TOKEN_ORDERS}
    positive = ("num_channels", "embed_dim")
    probabilities = ("drop_path_rate", "mask_ratio")
    presets = {
        "T": {"embed_dim": 96, "depths": (1, 2, 7, 2), "num_heads": (1, 2, 4, 8)},
        "S": {"embed_dim": 96, "depths": (1, 2, 11, 2), "num_heads": (1, 2, 4, 8)},
        "B": {"embed_dim": 96, "depths": (2, 3, 16, 3), "num_heads": (1, 2, 4, 8)},
        "B+": {"embed_dim": 112, "depths": (2, 3, 16, 3), "num_heads": (2, 4, 8, 16)},
        "L": {"embed_dim": 144, "depths": (2, 6, 36, 4), "num_heads": (2, 4, 8, 16)},
        "H": {"embed_dim": 256, "depths": (2, 6, 36, 4), "num_heads": (4, 8, 16, 32)},
    }

    embed_dim: int = 96
    image_size: int | Pair = (224, 224)
    patch_size: int | Pair = (7, 7)
    patch_stride: int | Pair = (4, 4)
    patch_padding: int | Pair = (3, 3)
    mlp_ratio: float = 4.0
    depths: tuple[int, ...] = (2, 3, 16, 3)
    num_heads: tuple[int, ...] = (1, 2, 4, 8)
    embed_dim_multiplier: float = 2.0
    num_query_pool: int = 3
    query_stride: int | Pair = (2, 2)
    masked_unit_size: int | Pair = (8, 8)
    masked_unit_attention: tuple[bool, ...] = (True, True, False, False)
    drop_path_rate: float = 0.0
    num_channels: int = 3
    hidden_act: str = "gelu"
    initializer_range: float = 0.02
    layer_norm_init: float = 1.0
    layer_norm_eps: float = 1e-6
    mask_ratio: float = 0.6
    out_features: tuple[str, ...] | None = None
    token_order: str = "units"
    output_hidden_states: bool = False
    return_dict: bool = True
    num_labels: int = 2
    problem_type: str | None = None

    def __post_init__(self) -> None:
        for name in ("depths", "num_heads", "masked_unit_attention"):
            setattr(self, name, tuple(getattr(self, name)))  # config.json has lists
        super().__post_init__()
        if self.embed_dim_multiplier <= 0:
            raise self.error(f"embed_dim_multiplier must be above 0, got {self.embed_dim_multiplier}")
        self.check_geometry(self.widths)
        stages = len(self.depths)
        if len(self.masked_unit_attention) < stages:
            raise self.error(
                f"masked_unit_attention must have {stages} values, as depths has, got {self.masked_unit_attention}"
            )
        if not 0 <= self.num_query_pool < stages:
            raise self.error(f"num_query_pool must be at least 0 and below {stages}, got {self.num_query_pool}")
        self.out_features = checked_out_features(self, self.out_features, stages)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return tuple(int(self.embed_dim * self.embed_dim_multiplier**i) for i in range(len(self.depths)))

    @property
    def ratios(self) -> tuple[float, ...]:
        """Of each stage the channels inside of the feed-forward to those of the block: mlp_ratio."""
        return (self.mlp_ratio,) * len(self.depths)

    @property
    def hidden_size(self) -> int:
        """Channels of the last stage."""
        return self.widths[-1]

    def units(self, grid: Pair) -> Units:
        return dataclasses.replace(super().units(grid), scattered=True)

    def poolings(self, stage: int) -> int:
        return min(stage, self.num_query_pool)

    @classmethod
    def from_transformers(cls: type[Self], fields: Mapping[str, Any], **overrides: Any) -> Self:
        return super().from_transformers(without_default(fields), **overrides)

    def to_transformers(self) -> dict[str, Any]:
        fields = super().to_transformers()
        for name, value in fields.items():
            if isinstance(value, tuple):
                fields[name] = list(value)
        return fields
