"""MAXIM (arXiv 2201.02973): U-Nets one after the other, of gated MLPs that mix in blocks and across grids."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn.grids import convolve
from ...nn.window_mix import WindowMix
from ..common.checks import check_pixels, refuse_arguments
from ..common.outputs import Output
from ..common.pretrained import PretrainedModel, fill
from .blocks import (
    CrossGating,
    DenseChannels,
    Level,
    MultiAxisGating,
    ResizedLinear,
    SpatialGates,
    SupervisedAttention,
    upsample,
)
from .config import MAXIMConfig
from .published import config_fields, flat, renamed

Self = TypeVar("Self", bound="MAXIMForImageRestoration")


@dataclasses.dataclass
class ImageRestorationOutput(Output):
    """The output of a model that restores images.

    Attributes:
        restored: [batch, channels, height, width].
        stages: for each stage the images of each scale, the coarsest first: [batch, channels, height / 2 ** scale,
            width / 2 ** scale], of an odd number the part that holds pixels of the image. The last one of the last
            stage is `restored`.
    """

    restored: Tensor
    stages: tuple[tuple[Tensor, ...], ...] | None = None


@dataclasses.dataclass
class Carried:
    """What a stage leaves for the next one, of each level, the finest first.

    Attributes:
        encoded, decoded: features of the two ways through the levels.
        supervised: features of the supervised attention, of each scale.
    """

    encoded: list[Tensor]
    decoded: list[Tensor]
    supervised: list[Tensor]


class MAXIMStage(nn.Module):
    """A U-Net whose levels exchange features by cross-gating.

    Args:
        config: of the model.
        index: of the stage. Those after the first take features of their predecessor, the last one has no supervised
            attention.
    """

    def __init__(self, config: MAXIMConfig, index: int) -> None:
        super().__init__()
        levels, scales = range(config.depth), range(config.num_supervision_scales)
        widths = [config.channels(level) for level in levels]
        eps, later = config.layer_norm_eps, index > 0
        bottom = widths[-1]
        self.inputs = nn.ModuleList(nn.Conv2d(config.num_channels, widths[i], 3, padding=1) for i in scales)
        self.fusions = nn.ModuleList(
            CrossGating(widths[i], widths[i], widths[i], config.windows(i), eps) for i in scales if later
        )
        below = [widths[0], *widths[:-1]]
        self.encoder = nn.ModuleList(
            Level(
                below[i] + (widths[i] if i in scales else 0),
                widths[i],
                config.windows(i),
                config,
                cross_gating=later,
                down=True,
            )
            for i in levels
        )
        self.bottlenecks = nn.ModuleList(
            Level(bottom, bottom, config.windows(config.depth), config, bottom=True)
            for _ in range(config.num_bottleneck_blocks)
        )
        self.encoder_resizes, self.skip_resizes = (
            nn.ModuleList(nn.ModuleList(ResizedLinear(widths[j], widths[i], j - i) for j in levels) for i in levels)
            for _ in range(2)
        )
        above = [*widths[1:], bottom]
        self.gatings = nn.ModuleList(
            CrossGating(config.depth * widths[i], above[i], widths[i], config.windows(i), eps, upsample=True)
            for i in levels
        )
        self.ups = nn.ModuleList(nn.ConvTranspose2d(above[i], widths[i], 2, 2) for i in levels)
        self.decoder = nn.ModuleList(
            Level((1 + config.depth) * widths[i], widths[i], config.windows(i), config) for i in levels
        )
        last = index + 1 == config.num_stages
        self.supervisions = nn.ModuleList(
            SupervisedAttention(widths[i], config.num_channels) for i in scales if not last
        )
        self.outputs = nn.ModuleList(nn.Conv2d(widths[i], config.num_channels, 3, padding=1) for i in scales if last)

    def forward(self, pixels: Sequence[Tensor], carried: Carried | None) -> tuple[list[Tensor], Carried]:
        """pixels: the image at each scale, [batch, height / 2 ** scale, width / 2 ** scale, num_channels].

        Returns:
            The restored image at each scale, the finest first; what the next stage takes.
        """
        inputs = [convolve(image, conv) for image, conv in zip(pixels, self.inputs, strict=True)]
        if carried is not None:
            given = zip(self.fusions, inputs, carried.supervised, strict=True)
            inputs = [fusion(x, features)[0] for fusion, x, features in given]
        encoded, x = self._encode(inputs, carried)
        for level in self.bottlenecks:
            x = level(x)
        skips: dict[int, Tensor] = {}
        shared = x
        for i in reversed(range(len(encoded))):
            skips[i], shared = self.gatings[i](self._gather(encoded, self.encoder_resizes[i].children()), shared)
        # The release lists these the coarsest first, and joins them so.
        coarse_first = [skips[i] for i in sorted(skips, reverse=True)]
        decoded: list[Tensor] = []
        for i in reversed(range(len(encoded))):
            joined = self._gather(coarse_first, list(self.skip_resizes[i].children())[::-1])
            x = self.decoder[i](upsample(x, self.ups[i]), joined)
            decoded.insert(0, x)
        supervised, images = [], []
        for i, image in enumerate(pixels):
            if self.supervisions:
                features, restored = self.supervisions[i](decoded[i], image)
                supervised.append(features)
            else:
                restored = convolve(decoded[i], self.outputs[i]) + image
            images.append(restored)
        return images, Carried(encoded, decoded, supervised)

    def _encode(self, inputs: Sequence[Tensor], carried: Carried | None) -> tuple[list[Tensor], Tensor]:
        """The features of every level, and what the last one leaves for the bottom.

        The first level takes the features of the image twice, as in the release, whose parameters count both.
        """
        x, encoded = inputs[0], []
        for i, level in enumerate(self.encoder):
            context = None if carried is None else carried.encoded[i] + carried.decoded[i]
            encoded.append(level(x, inputs[i] if i < len(inputs) else None, context=context))
            x = convolve(encoded[-1], level.down)  # type: ignore[arg-type]
        return encoded, x

    @staticmethod
    def _gather(features: Sequence[Tensor], resizes: Iterable[nn.Module]) -> Tensor:
        """Features of all levels at the size and with the channels of one, joined."""
        return torch.cat([resized(x) for resized, x in zip(resizes, features, strict=True)], -1)


class MAXIMForImageRestoration(PretrainedModel):
    """Restores images: denoising, deblurring, deraining, dehazing and enhancement, by one architecture.

    Args:
        config: its options.

    Attributes:
        stages: the U-Nets.
    """

    config_class = MAXIMConfig

    def __init__(self, config: MAXIMConfig) -> None:
        super().__init__()
        self.config = config
        self.stages = nn.ModuleList(MAXIMStage(config, i) for i in range(config.num_stages))
        if self.device.type != "meta":  # there is nothing to draw there, which takes torch seconds
            self.apply(self.init_weights)

    def init_weights(self, module: nn.Module) -> None:
        """For `apply`: products as flax draws them, which is LeCun's rule, with biases of 0.

        As in the release those of multi-axis blocks and of `DenseChannels`, its MlpBlock, are drawn with
        initializer_range instead. So are mixing matrices. Their bias is 0, and 1 in a cross-gating, where no 1 is
        added.
        """
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            # The variance of LeCun's rule is 1 / inputs, of numbers that are cut off at twice the standard deviation.
            taps = module.weight[0, 0].numel() if module.weight.dim() == 4 else 1
            inputs = taps * (module.in_features if isinstance(module, nn.Linear) else module.in_channels)
            wide = inputs**-0.5 / 0.87962566103423978
            nn.init.trunc_normal_(module.weight, std=wide, a=-2 * wide, b=2 * wide)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        elif isinstance(module, WindowMix):
            module.reset_parameters(std)
        elif isinstance(module, SpatialGates):
            for mix in (module.grid, module.block):
                mix.reset_parameters(std, 1.0)
        elif isinstance(module, MultiAxisGating):
            for inner in module.modules():
                if isinstance(inner, nn.Linear):
                    nn.init.normal_(inner.weight, std=std)
        elif isinstance(module, DenseChannels):
            for linear in (module.up, module.down):
                nn.init.normal_(linear.weight, std=std)

    @classmethod
    def from_published(
        cls: type[Self], weights: Mapping[str, Any], *, dtype: torch.dtype | None = None, **overrides: Any
    ) -> Self:
        """A model from weights under the names of the release, which are those of flax, in eval mode.

        The options follow from the weights, of windows as far as they are square.

        Args:
            weights: names with slashes, with or without "opt/target/" before them, to arrays or tensors, such as what
                `numpy.load` gives of a published checkpoint; or the nested dictionary of the same. They are copied.
                Kernels are [inputs, outputs] and [rows, columns, inputs, outputs], and those of transposed
                convolutions turned around, as in flax.
            dtype: None keeps that of the weights.
            **overrides: fields of the config to change.

        Raises:
            ValueError: weights that are missing, unknown or of another shape, or that fit no config.
            TypeError: an override that is no field.
        """
        what = f"{cls.__name__}.from_published"
        given = flat(weights)
        config = MAXIMConfig(**{**config_fields(given, what, overrides), **overrides})
        with torch.device("meta"):
            model = cls(config)
        fill(model, renamed(model, given, what), f"{what}: the weights", dtype)
        return model.eval()

    def forward(
        self, pixel_values: Tensor, *, return_dict: bool | None = None, **unsupported: Any
    ) -> ImageRestorationOutput | tuple[Any, ...]:
        """Images of any size, reflected to multiples of `MAXIMConfig.size_multiple`, and the results cut.

        As in the release an image with an odd side is first made even by one line of its reflection behind, and then
        reflected on both sides by the same number of lines.

        Args:
            pixel_values: [batch, num_channels, height, width]; published weights were trained with pixels in [0, 1].
            return_dict: False returns a tuple.
            **unsupported: other arguments, accepted when None or False.

        Raises:
            ValueError: pixel_values of another shape, or too small to be reflected to such a multiple; an argument that
                is not supported, by name.
        """
        name = type(self).__name__
        refuse_arguments(name, unsupported)
        check_pixels(name, pixel_values, self.config.num_channels)
        borders = [self._border(axis, n) for axis, n in enumerate(pixel_values.shape[2:])]
        x = pixel_values
        for axis, (odd, border) in enumerate(borders):
            for pad in ((0, odd), (border, border)):
                if any(pad):
                    x = F.pad(x, (0, 0, *pad) if axis == 0 else (*pad, 0, 0), mode="reflect")
        x = x.permute(0, 2, 3, 1).contiguous()
        # What nearest neighbours take of 2 ** i pixels is the one behind the middle.
        scales = [(1 << i, (1 << i) // 2) for i in range(self.config.num_supervision_scales)]
        pixels = [x[:, first::step, first::step].contiguous() for step, first in scales]
        carried, found = None, []
        for stage in self.stages:
            images, carried = stage(pixels, carried)
            found.append(tuple(self._cut(image, pixel_values, borders, i) for i, image in enumerate(images))[::-1])
        output = ImageRestorationOutput(found[-1][-1], tuple(found))
        return output.to_tuple() if return_dict is False else output

    def _border(self, axis: int, size: int) -> tuple[int, int]:
        """Lines that are added behind to make a side even, and then on both sides. Raises ValueError if it lacks them.

        axis: 0 is the height.
        """
        multiple = self.config.size_multiple()[axis]
        odd = size % 2
        border = -(size + odd) % multiple // 2
        if border >= size + odd or odd >= size:
            raise ValueError(
                f"{type(self).__name__}: pixel_values must be large enough to be reflected to a multiple of {multiple} "
                f"pixels, {border + 1} in {('height', 'width')[axis]}, got {size}"
            )
        return odd, border

    @staticmethod
    def _cut(image: Tensor, pixel_values: Tensor, borders: Sequence[tuple[int, int]], scale: int) -> Tensor:
        """Of an image [batch, rows, columns, channels] of a scale the part that is of pixel_values, channels first."""
        for axis, (_, border) in enumerate(borders):
            first = border >> scale
            behind = -(-(border + pixel_values.shape[2 + axis]) >> scale)
            image = image.narrow(1 + axis, first, behind - first)
        return image.permute(0, 3, 1, 2).contiguous()
