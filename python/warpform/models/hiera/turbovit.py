"""A hierarchical transformer whose stages are free, with windowed and global blocks mixed (TurboViT, 2308.11421)."""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn

from ...nn import ACTIVATIONS, AddBiasResidualLayerNorm
from ..common.config import ModelConfig
from ..common.losses import classification_loss
from ..common.outputs import ImageClassifierOutput
from .config import Geometry
from .model import HieraWeights
from .trunk import HieraTrunk, checked_units
from .units import Pair


@dataclasses.dataclass
class TurboViTConfig(Geometry, ModelConfig):
    """The options of a hierarchical transformer of Hiera's kind whose stages may differ in everything (TurboViT).

    TurboViT (arXiv 2308.11421) is such a network, found by a search: queries are pooled between its stages, and blocks
    that attend in mask units stand beside blocks that attend to the whole image. Its table of layers is not public in
    a form that could be read, so the defaults here are no published network.

    Attributes:
        hidden_sizes, depths, num_heads, mlp_ratios: channels, blocks, heads, and channels inside of the feed-forward in
            those of the block, of each stage. All but the first stage begin with a pooling of queries.
        masked_unit_attention: for each stage a bool, as of `HieraConfig`, or one for each of its blocks: True attends
            inside of units, False to the image. The first block of a stage pools after it attended, and so has the
            units of the stage before.
        masked_unit_size: tokens of a unit in the first stage along each axis, beside each other: a multiple of
            query_stride ** (stages - 1).
        image_size, patch_size, patch_stride, patch_padding, query_stride, num_channels, drop_path_rate, hidden_act,
        initializer_range, layer_norm_eps, num_labels, problem_type: as of `HieraConfig`.

    Raises:
        ValueError: as of `HieraConfig`.
    """

    model_type = "turbovit"
    choices = {"hidden_act": ACTIVATIONS}
    positive = ("num_channels",)
    probabilities = ("drop_path_rate",)

    image_size: int | Pair = (224, 224)
    patch_size: int | Pair = (7, 7)
    patch_stride: int | Pair = (4, 4)
    patch_padding: int | Pair = (3, 3)
    hidden_sizes: tuple[int, ...] = (64, 128, 256, 384)
    depths: tuple[int, ...] = (1, 2, 8, 2)
    num_heads: tuple[int, ...] = (1, 2, 4, 6)
    mlp_ratios: tuple[float, ...] = (4.0, 4.0, 4.0, 4.0)
    query_stride: int | Pair = (2, 2)
    masked_unit_size: int | Pair = (8, 8)
    masked_unit_attention: tuple[bool | tuple[bool, ...], ...] = (True, True, False, False)
    drop_path_rate: float = 0.0
    num_channels: int = 3
    hidden_act: str = "gelu"
    initializer_range: float = 0.02
    layer_norm_init: float = 1.0
    layer_norm_eps: float = 1e-6
    return_dict: bool = True
    num_labels: int = 2
    problem_type: str | None = None

    def __post_init__(self) -> None:
        for name in ("hidden_sizes", "depths", "num_heads", "mlp_ratios"):
            setattr(self, name, tuple(getattr(self, name)))
        self.masked_unit_attention = tuple(
            one if isinstance(one, bool) else tuple(one) for one in self.masked_unit_attention
        )
        super().__post_init__()
        stages = len(self.depths)
        for name in ("hidden_sizes", "mlp_ratios", "masked_unit_attention"):
            if len(getattr(self, name)) != stages:
                raise self.error(f"{name} must have {stages} values, as depths has, got {getattr(self, name)}")
        self.check_geometry(self.hidden_sizes)
        for stage, (one, depth) in enumerate(zip(self.masked_unit_attention, self.depths, strict=True)):
            if not isinstance(one, bool) and len(one) != depth:
                raise self.error(
                    f"masked_unit_attention must be a bool or have {depth} values in stage {stage}, as it has blocks, "
                    f"got {one}"
                )
        if min(int(w * ratio) for w, ratio in zip(self.hidden_sizes, self.mlp_ratios, strict=True)) < 1:
            raise self.error(f"mlp_ratios must leave a channel inside of the feed-forward, got {self.mlp_ratios}")

    @property
    def hidden_size(self) -> int:
        """Channels of the last stage."""
        return self.hidden_sizes[-1]

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each stage: hidden_sizes."""
        return self.hidden_sizes

    @property
    def ratios(self) -> tuple[float, ...]:
        """mlp_ratios."""
        return self.mlp_ratios


class TurboViTForImageClassification(HieraWeights):
    """The stages of `TurboViTConfig`, with a classifier on the normalised mean over tokens.

    Images whose sides patch_stride * masked_unit_size divides; others are refused.

    Args:
        config: its options.
    """

    config_class = TurboViTConfig

    def __init__(self, config: TurboViTConfig) -> None:
        super().__init__()
        self.config = config
        self.trunk = HieraTrunk(config)
        self.norm = AddBiasResidualLayerNorm(config.hidden_size, config.layer_norm_eps)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.apply(self.init_weights)

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        *,
        bool_masked_pos: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
    ) -> ImageClassifierOutput | tuple[Tensor, ...]:
        """Classifies images.

        Args:
            pixel_values: [batch, channels, height, width], of image_size.
            labels: [batch] integers (classes) or [batch] numbers (regression with one label), else [batch, num_labels].
            bool_masked_pos: bool or integers [batch, units], units row by row: 1 for those that are kept, any number
                an image. None keeps all.
            interpolate_pos_encoding: resizes positions for images of another size.
            num_items_in_batch: what the sum of the losses is divided by, in place of the number of labels.
            return_dict: False returns a tuple. None = as the config says.

        Returns:
            ImageClassifierOutput: loss, in float32 at least; logits [batch, num_labels].

        Raises:
            TypeError: bool_masked_pos of another dtype.
            ValueError: pixel_values, labels or bool_masked_pos of another shape.
        """
        name = type(self).__name__
        units = self.trunk.order(name, pixel_values, interpolate_pos_encoding)
        kept = checked_units(name, bool_masked_pos, pixel_values.shape[0], units)
        run = self.trunk(pixel_values, units, kept, interpolate_pos_encoding=interpolate_pos_encoding)
        logits = self.classifier(self.norm(run.mean(), None, None))
        loss = None
        if labels is not None:
            loss = classification_loss(name, self.config.problem_type, logits, labels, num_items_in_batch)
        output = ImageClassifierOutput(loss, logits)
        if return_dict is None:
            return_dict = self.config.return_dict
        return output if return_dict else output.to_tuple()
