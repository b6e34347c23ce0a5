"""ResNet (arXiv 1512.03385) as a backbone: the convolutions on which vision systems stand.

Weights have torchvision's names (`conv1`, `bn1`, `layer1.0.conv1`, ...) and shapes. The convolutions and BatchNorm are
torch's own, on tensors in its channels_last format, so that feature maps whose channels come last are views.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn._checkpoint import CheckpointedLayers
from ..nn.conv_norm import needs_places
from ..nn.grids import channels_last
from .common.backbone import BackboneModel, checked_out_features
from .common.checks import check_pixels
from .common.config import TransformersConfig, config_overrides
from .common.pretrained import load_weights, named_weights
from .common.weights import rename

__all__ = ["ResNetBackbone", "ResNetConfig"]

REDUCTION = 4  # of the channels inside of a bottleneck

# torchvision's names to transformers'; the numbers of stages, and of convolutions in a block, begin with 1 there.
_TO_TRANSFORMERS = (
    (r"^conv1\.", "embedder.embedder.convolution."),
    (r"^bn1\.", "embedder.embedder.normalization."),
    (r"\.downsample\.0\.", ".shortcut.convolution."),
    (r"\.downsample\.1\.", ".shortcut.normalization."),
)
_IN_A_BLOCK = re.compile(r"\.(conv|bn)(\d)\.")
_STAGE = re.compile(r"^layer(\d)\.(\d+)\.")


@dataclasses.dataclass
class ResNetConfig(TransformersConfig):
    """The options of a ResNet, under the names of transformers' `ResNetConfig`.

    Presets are "18", "34" and "50" layers (table 1 of the paper), in torchvision's layout: the 3x3 convolution of a
    bottleneck has the stride.

    Attributes:
        num_channels: of an image.
        embedding_size: channels of the stem, 7x7 of stride 2 and a max-pooling 3x3 of stride 2.
        hidden_sizes, depths: channels and blocks of each stage.
        layer_type: "basic", two 3x3 convolutions, or "bottleneck", 1x1, 3x3 and 1x1 with a quarter of the channels.
        hidden_act: "relu".
        downsample_in_first_stage: whether the first stage has stride 2 too.
        downsample_in_bottleneck: whether the first 1x1 of a bottleneck has the stride, in place of the 3x3.
        out_features: the stages that the backbone returns, of "stem", "stage1", ...; None: the last.

    Raises:
        ValueError: an unknown layer_type or stage, or sizes that do not fit.
    """

    model_type = "resnet"
    positive = ("num_channels", "embedding_size")
    choices = {"layer_type": ("basic", "bottleneck"), "hidden_act": ("relu",)}
    presets = {
        "18": {"layer_type": "basic", "hidden_sizes": (64, 128, 256, 512), "depths": (2, 2, 2, 2)},
        "34": {"layer_type": "basic", "hidden_sizes": (64, 128, 256, 512), "depths": (3, 4, 6, 3)},
        "50": {"layer_type": "bottleneck", "hidden_sizes": (256, 512, 1024, 2048), "depths": (3, 4, 6, 3)},
    }

    num_channels: int = 3
    embedding_size: int = 64
    hidden_sizes: tuple[int, ...] = (256, 512, 1024, 2048)
    depths: tuple[int, ...] = (3, 4, 6, 3)
    layer_type: str = "bottleneck"
    hidden_act: str = "relu"
    downsample_in_first_stage: bool = False
    downsample_in_bottleneck: bool = False
    out_features: tuple[str, ...] | None = None
    output_hidden_states: bool = False
    return_dict: bool = True

    def __post_init__(self) -> None:
        self.hidden_sizes, self.depths = tuple(self.hidden_sizes), tuple(self.depths)
        super().__post_init__()
        sizes, depths = self.hidden_sizes, self.depths
        if not depths or len(sizes) != len(depths) or min(*sizes, *depths) < 1:
            raise self.error(
                f"hidden_sizes and depths must be of equal lengths and at least 1, got {sizes} and {depths}"
            )
        if self.layer_type == "bottleneck" and any(size % REDUCTION for size in sizes):
            raise self.error(f"hidden_sizes must be multiples of {REDUCTION} with bottlenecks, got {sizes}")
        self.out_features = checked_out_features(self, self.out_features, len(depths))

    def to_transformers(self) -> dict[str, Any]:
        names = self.out_features
        return {**super().to_transformers(), "out_features": None if names is None else list(names)}


def _conv(inputs: int, outputs: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel_size, stride, kernel_size // 2, bias=False)


class ResNetBlock(nn.Module):
    """x + f(x), then ReLU, for two 3x3 convolutions, or for 1x1, 3x3 and 1x1, each with BatchNorm.

    Args:
        config: of the model.
        inputs, outputs: channels.
        stride: of the block.

    Attributes:
        downsample: a 1x1 convolution and BatchNorm of the residual where channels or stride change, else None.
    """

    def __init__(self, config: ResNetConfig, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        if config.layer_type == "basic":
            layers = [(inputs, outputs, 3, stride), (outputs, outputs, 3, 1)]
        else:
            inside = outputs // REDUCTION
            first, second = (stride, 1) if config.downsample_in_bottleneck else (1, stride)
            layers = [(inputs, inside, 1, first), (inside, inside, 3, second), (inside, outputs, 1, 1)]
        self.depth = len(layers)
        for i, sizes in enumerate(layers, 1):
            self.add_module(f"conv{i}", _conv(*sizes))
            self.add_module(f"bn{i}", nn.BatchNorm2d(sizes[1]))
        self.downsample: nn.Sequential | None = None
        if inputs != outputs or stride != 1:
            self.downsample = nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, inputs, height, width] in the channels_last format; returns [batch, outputs, ...] likewise."""
        out = x
        for i in range(1, self.depth + 1):
            if i > 1:
                out = F.relu(out)
            out = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class ResNetStage(nn.Sequential, CheckpointedLayers):
    """Blocks, one after the other."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = self.run_layer(block, x)
        return x


Self = TypeVar("Self", bound="ResNetBackbone")


class ResNetBackbone(BackboneModel):
    """A ResNet without a head. Called as `transformers.ResNetBackbone`, on images of any size.

    Sizes that strides do not divide are rounded up: an image of 33 pixels has maps of 9, 5, 3 and 2. In training mode
    BatchNorm needs more than one place a channel, so one image of up to 32 pixels a side is refused.

    Args:
        config: its options.
    """

    config_class = ResNetConfig
    transformers_class = "ResNetBackbone"
    transformers_config_class = "ResNetConfig"
    weight_prefix = "resnet."
    ignored_weights = ("classifier.",)
    is_encoder = True
    config: ResNetConfig

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        self.config = config
        self.conv1 = _conv(config.num_channels, config.embedding_size, 7, 2)
        self.bn1 = nn.BatchNorm2d(config.embedding_size)
        inputs = config.embedding_size
        for stage, (outputs, depth) in enumerate(zip(config.hidden_sizes, config.depths, strict=True)):
            stride = 2 if stage or config.downsample_in_first_stage else 1
            blocks = [ResNetBlock(config, inputs, outputs, stride)]
            blocks += [ResNetBlock(config, outputs, outputs, 1) for _ in range(depth - 1)]
            self.add_module(f"layer{stage + 1}", ResNetStage(*blocks))
            inputs = outputs
        self.apply(self.init_weights)

    def init_weights(self, module: nn.Module) -> None:
        """For `apply`: convolutions as in arXiv 1502.01852, by the number of outputs; BatchNorm 1 and 0."""
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()

    @classmethod
    def build(cls, config: ResNetConfig, *, with_optional: bool = True) -> ResNetBackbone:
        return cls(config)

    @property
    def stage_channels(self) -> tuple[int, ...]:
        return (self.config.embedding_size, *self.config.hidden_sizes)

    @property
    def stage_strides(self) -> tuple[int, ...]:
        first = 8 if self.config.downsample_in_first_stage else 4
        return (4, *(first << stage for stage in range(len(self.config.depths))))

    def stage_maps(self, pixel_values: Tensor) -> list[Tensor]:
        check_pixels(type(self).__name__, pixel_values, self.config.num_channels)
        self.check_places(pixel_values)
        x = pixel_values.contiguous(memory_format=torch.channels_last)
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        maps = [x]
        for stage in range(len(self.config.depths)):
            x = getattr(self, f"layer{stage + 1}")(x)
            maps.append(x)
        return [channels_last(x) for x in maps]

    def check_places(self, pixel_values: Tensor) -> None:
        """Raises ValueError where a BatchNorm in training mode would see fewer than two places."""
        stride = self.stage_strides[-1]
        batch, _, height, width = pixel_values.shape
        places = batch * -(-height // stride) * -(-width // stride)
        if places < 2 and any(needs_places(module) for module in self.modules()):
            raise ValueError(
                f"{type(self).__name__}: pixel_values must give BatchNorm more than one place a channel in training "
                f"mode, got {list(pixel_values.shape)}, of which the last map has {places}: give more images, or call "
                "eval()"
            )

    def weight_names(self) -> dict[str, tuple[str, ...]]:
        return {name: (_transformers_name(name),) for name in named_weights(self)}

    @classmethod
    def canonical_weights(cls, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if "conv1.weight" not in weights:
            return dict(weights)
        return {_transformers_name(name): weight for name, weight in weights.items() if not name.startswith("fc.")}

    @classmethod
    def from_published(cls: type[Self], weights: Mapping[str, Tensor], **overrides: Any) -> Self:
        """A model in eval mode from a state dict of torchvision's `resnet18`, `resnet34`, `resnet50`, or of their kind.

        The config follows from names and shapes. The classifier (`fc`) is ignored. Counts of batches, which old files
        lack, begin at 0. The weights are not copied.

        Args:
            weights: by torchvision's names.
            **overrides: fields of the config that the weights do not tell, such as out_features.

        Raises:
            ValueError: weights under other names, missing, unknown or of another shape.
            TypeError: an override that is no field.
        """
        what = f"{cls.__name__}.from_published"
        config_overrides(cls.config_class, overrides)
        config = dataclasses.replace(published_config(what, weights), **overrides)
        counts = {name.removesuffix("running_var") + "num_batches_tracked" for name in weights if "running_var" in name}
        weights = {**{name: torch.zeros((), dtype=torch.int64) for name in counts}, **weights}
        return load_weights(cls, config, weights, what).eval()


def published_config(what: str, weights: Mapping[str, Tensor]) -> ResNetConfig:
    """The config of weights under torchvision's names; `what` begins the messages of errors.

    Raises:
        ValueError: weights under other names.
    """
    if "conv1.weight" not in weights or "layer1.0.conv1.weight" not in weights:
        raise ValueError(
            f"{what}: weights must have torchvision's names, such as conv1.weight and layer1.0.conv1.weight"
        )
    depths: dict[int, int] = {}
    for name in weights:
        found = _STAGE.match(name)
        if found:
            depths[int(found[1])] = max(depths.get(int(found[1]), 0), int(found[2]) + 1)
    bottleneck = "layer1.0.conv3.weight" in weights
    stages = range(1, len(depths) + 1)
    last = [f"layer{stage}.0.conv{3 if bottleneck else 2}.weight" for stage in stages]
    missing = [name for name in last if name not in weights]
    if missing:
        raise ValueError(f"{what}: weights lack {missing[0]}")
    embedding, channels = weights["conv1.weight"].shape[:2]
    return ResNetConfig(
        num_channels=channels,
        embedding_size=embedding,
        hidden_sizes=tuple(weights[name].shape[0] for name in last),
        depths=tuple(depths[stage] for stage in stages),
        layer_type="bottleneck" if bottleneck else "basic",
    )


def _transformers_name(name: str) -> str:
    """The name in transformers of a weight of the given name in torchvision."""
    kinds = {"conv": "convolution", "bn": "normalization"}
    stage = _STAGE.match(name)
    if stage:
        name = f"encoder.stages.{int(stage[1]) - 1}.layers.{stage[2]}.{name[stage.end() :]}"
        name = _IN_A_BLOCK.sub(lambda found: f".layer.{int(found[2]) - 1}.{kinds[found[1]]}.", name)
    return rename(name, _TO_TRANSFORMERS)
