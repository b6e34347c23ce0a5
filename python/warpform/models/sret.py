"""SReT, the sliced recursive transformer (arXiv 2111.05297): each block runs twice, on groups of tokens.

Three convolutions make a grid of tokens at an eighth of the image's sides. A stage is a list of shared blocks. Each
runs, is followed by a feed-forward of its own kind, runs again, and is followed by another one, so that a model has
twice the layers of its parameters. Attention sees groups of tokens (`nn.GroupedAttention`), fewer and larger ones in
the second run.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import AddBiasResidualLayerNorm, FeedForward, GroupedAttention, MetaFormerBlock
from ..nn._checkpoint import CheckpointedLayers
from ..nn._product import apply_linear
from ..nn.metaformer import run_blocks
from ..nn.mixers import PERMUTE
from .common.checks import check_pixels
from .common.config import ModelConfig
from .common.losses import classification_loss
from .common.outputs import ImageClassifierOutput
from .common.pretrained import PretrainedModel, load_weights, named_weights

__all__ = ["SReTConfig", "SReTForImageClassification"]

STRIDE = 8  # of the tokens of the first stage, in pixels
RUNS = 2  # of each shared block


@dataclasses.dataclass
class SReTConfig(ModelConfig):
    """The options of SReT. Presets are T, LT and S.

    Attributes:
        image_size: pixels of a side, which 8 divides. Positions are learned, so images of other sizes are refused.
        num_channels: of an image.
        hidden_sizes: channels of each stage. Each divides the next, and the first is even.
        depths: shared blocks of each stage. Each runs twice.
        num_heads: of each stage.
        groups: for each stage the groups of tokens that attention sees in the first run of a block and in the second.
        permute: when the second run permutes tokens at random, where it has more than one group: in training alone
            ("train"), so that a model in eval mode is deterministic; "always", as in the published code; or "never".
        mlp_ratio: channels inside of the feed-forward of a block, in hidden_sizes, rounded down.
        between_ratio: the same of the feed-forward behind each run.
        drop_path_rate: of the last block, rising from 0 in the first.
        layer_norm_eps: of every LayerNorm.
        num_labels, problem_type: of the classifier.

    Raises:
        ValueError: sizes that do not fit, groups that do not divide the tokens of their stage, another permute.
    """

    model_type = "sret"
    positive = ("image_size", "num_channels")
    choices = {"permute": PERMUTE}
    probabilities = ("drop_path_rate",)
    presets = {
        "T": {},
        "LT": {"mlp_ratio": 4.0},
        "S": {
            "hidden_sizes": (126, 252, 504), "num_heads": (3, 6, 12), "mlp_ratio": 3.0, "between_ratio": 2.0,
            "drop_path_rate": 0.2,
        },
    }  # fmt: skip

    image_size: int = 224
    num_channels: int = 3
    hidden_sizes: tuple[int, ...] = (64, 128, 256)
    depths: tuple[int, ...] = (2, 5, 3)
    num_heads: tuple[int, ...] = (2, 4, 8)
    groups: tuple[tuple[int, int], ...] = ((8, 2), (4, 1), (1, 1))
    permute: str = "train"
    mlp_ratio: float = 3.6
    between_ratio: float = 1.0
    drop_path_rate: float = 0.1
    layer_norm_eps: float = 1e-6
    num_labels: int = 1000
    problem_type: str | None = None

    def __post_init__(self) -> None:
        # config.json has lists.
        self.hidden_sizes, self.depths = tuple(self.hidden_sizes), tuple(self.depths)
        self.num_heads = tuple(self.num_heads)
        self.groups = tuple(tuple(pair) for pair in self.groups)  # type: ignore[misc]
        super().__post_init__()
        stages = len(self.hidden_sizes)
        for name in ("hidden_sizes", "depths", "num_heads"):
            sizes = getattr(self, name)
            if not sizes or len(sizes) != stages or min(sizes) < 1:
                raise self.error(f"{name} must be a number of at least 1 for each of {stages} stages, got {sizes}")
        if len(self.groups) != stages or any(len(pair) != RUNS or min(pair) < 1 for pair in self.groups):
            raise self.error(f"groups must be two numbers of at least 1 for each of {stages} stages, got {self.groups}")
        if self.image_size % STRIDE:
            raise self.error(f"image_size must be a multiple of {STRIDE}, got {self.image_size}")
        if self.hidden_sizes[0] % 2:
            raise self.error(f"hidden_sizes must begin with an even number, got {self.hidden_sizes}")
        for stage, (width, heads, groups, side) in enumerate(
            zip(self.hidden_sizes, self.num_heads, self.groups, self.grid_sizes(), strict=True)
        ):
            if width % self.hidden_sizes[max(stage - 1, 0)]:
                raise self.error(f"hidden_sizes must each divide the next, got {self.hidden_sizes}")
            if width % heads:
                raise self.error(f"num_heads must divide the {width} channels of stage {stage}, got {heads}")
            if any(side**2 % number for number in groups):
                raise self.error(f"groups must divide the {side**2} tokens of stage {stage}, got {groups}")

    def grid_sizes(self) -> list[int]:
        """The tokens of a side in each stage."""
        sizes = [self.image_size // STRIDE]
        while len(sizes) < len(self.hidden_sizes):
            sizes.append((sizes[-1] + 1) // 2)
        return sizes


class ConvolutionEmbedding(nn.Module):
    """Three times a 3x3 convolution of stride 2, BatchNorm and ReLU: images to tokens at an eighth of the sides.

    Args:
        in_channels: of an image.
        hidden_size: channels of a token; the first convolution makes half as many.
    """

    def __init__(self, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        widths = (in_channels, hidden_size // 2, hidden_size, hidden_size)
        for i in range(3):
            self.add_module(f"conv{i + 1}", nn.Conv2d(widths[i], widths[i + 1], 3, 2, 1))
            self.add_module(f"bn{i + 1}", nn.BatchNorm2d(widths[i + 1]))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values: [batch, in_channels, height, width]; returns [batch, height / 8, width / 8, hidden_size]."""
        x = pixel_values.contiguous(memory_format=torch.channels_last)
        for i in range(3):
            x = F.relu(self.get_submodule(f"bn{i + 1}")(self.get_submodule(f"conv{i + 1}")(x)))
        return x.permute(0, 2, 3, 1)


class SReTForImageClassification(PretrainedModel, CheckpointedLayers):
    """SReT with a classifier on the mean over tokens.

    In training, in the second run of blocks with more than one group, all samples of a batch have one permutation of
    their tokens, drawn anew for each block.

    Args:
        config: its options.

    Attributes:
        blocks: for each stage its shared blocks. They are `nn.MetaFormerBlock`s.
        between: for each stage the feed-forwards behind runs, in order: that behind run r of block j is number 2 j + r.
    """

    config_class = SReTConfig

    def __init__(self, config: SReTConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.hidden_sizes
        side = config.grid_sizes()[0]
        self.patch_embed = ConvolutionEmbedding(config.num_channels, widths[0])
        self.pos_embed = nn.Parameter(torch.empty(1, widths[0], side, side))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.blocks, self.between, self.pools = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for stage, depth in enumerate(config.depths):
            self.blocks.append(nn.ModuleList([self.make_block(stage, i) for i in range(depth)]))
            self.between.append(nn.ModuleList([self.make_between(stage) for _ in range(RUNS * depth)]))
            if stage + 1 < len(config.depths):
                width = widths[stage]
                self.pools.append(nn.Conv2d(width, widths[stage + 1], 3, 2, 1, groups=width))
        self.norm = AddBiasResidualLayerNorm(widths[-1], config.layer_norm_eps)
        self.head = nn.Linear(widths[-1], config.num_labels)

    def make_block(self, stage: int, index: int) -> MetaFormerBlock:
        """A shared block."""
        config, width = self.config, self.config.hidden_sizes[stage]
        # As published: of a stage the shared blocks have the rates of its first layers.
        place = RUNS * sum(config.depths[:stage]) + index
        return MetaFormerBlock(
            GroupedAttention(width, config.num_heads[stage], config.groups[stage], permute=config.permute),
            FeedForward(width, int(width * config.mlp_ratio)),
            norm="layer",
            eps=config.layer_norm_eps,
            coefficients=True,
            drop_path=config.drop_path_rate * place / (RUNS * sum(config.depths)),
        )

    def make_between(self, stage: int) -> MetaFormerBlock:
        """The feed-forward behind a run of a block."""
        config, width = self.config, self.config.hidden_sizes[stage]
        feed_forward = FeedForward(width, int(width * config.between_ratio))
        return MetaFormerBlock(None, feed_forward, norm="layer", eps=config.layer_norm_eps, coefficients=True)

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        return_dict: bool | None = None,
    ) -> ImageClassifierOutput | tuple[Any, ...]:
        """Classifies images.

        Args:
            pixel_values: [batch, num_channels, image_size, image_size].
            labels: [batch] integers (classes) or [batch] numbers (regression with one label), else [batch, num_labels].
            generator: what permutations are drawn with, where there are any; None: torch's default one of the device.
            return_dict: False returns a tuple.

        Returns:
            ImageClassifierOutput: loss, in float32 at least; logits [batch, num_labels].

        Raises:
            ValueError: pixel_values or labels of another shape, another size of images among them: positions are
                learned for one.
        """
        name, config = type(self).__name__, self.config
        check_pixels(name, pixel_values, config.num_channels)
        if tuple(pixel_values.shape[2:]) != (config.image_size,) * 2:
            raise ValueError(
                f"{name}: pixel_values must be images of {config.image_size} x {config.image_size} pixels, as "
                f"config.image_size says, got {list(pixel_values.shape)}"
            )
        hidden = self.patch_embed(pixel_values) + self.pos_embed.permute(0, 2, 3, 1)
        for stage in range(len(config.depths)):
            if stage > 0:
                hidden = self.pools[stage - 1](hidden.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            hidden = self.run_stage(stage, hidden.contiguous(), generator)
        pooled = self.norm(hidden.flatten(1, 2).mean(1), None, None)
        logits = apply_linear(pooled, self.head)
        loss = None if labels is None else classification_loss(name, config.problem_type, logits, labels)
        output = ImageClassifierOutput(loss, logits)
        return output.to_tuple() if return_dict is False else output

    def run_stage(self, stage: int, hidden: Tensor, generator: torch.Generator | None) -> Tensor:
        """The blocks of a stage on hidden [batch, rows, columns, channels]."""
        blocks: list[nn.Module] = []
        mixing: list[dict[str, Any]] = []
        tokens = hidden.shape[1] * hidden.shape[2]
        between = self.between[stage].children()
        for block in self.blocks[stage].children():
            mixer = cast("GroupedAttention", block.mixer)
            for run in range(RUNS):
                # Drawn here, as a block that is computed again in backward must see the same.
                permutation = mixer.permutation(tokens, run, hidden.device, generator)
                blocks += [block, next(between)]
                mixing += [{"run": run, "permutation": permutation}, {}]
        return run_blocks(self, blocks, hidden, each=mixing)

    def weight_names(self) -> dict[str, tuple[str, ...]]:
        return {name: published_names(name) for name in named_weights(self)}

    @classmethod
    def check_weights(cls, what: str, config: SReTConfig, weights: Mapping[str, Tensor]) -> None:
        for name, weight in weights.items():
            first = _first_name(name)
            if first in weights and not torch.equal(weights[first], weight):
                raise ValueError(f"{what}: {name} must equal {first}, as both are of one shared block")

    @classmethod
    def own_weights(cls, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: weight for name, weight in weights.items() if _first_name(name) not in weights}

    @classmethod
    def from_published(cls, weights: Mapping[str, Tensor], **fields: Any) -> SReTForImageClassification:
        """A model, in eval mode, from weights under the names of the published code.

        Sizes follow from the shapes of the weights: image_size, num_channels, hidden_sizes, depths, mlp_ratio,
        between_ratio and num_labels. The heads of models of T's and S's widths are theirs. Of a shared block, whose
        weights the published state dict has under two names, one is enough. Weights are not copied where that is not
        necessary.

        Args:
            weights: for instance `torch.load(path, weights_only=True)["model"]`, or what safetensors reads.
            **fields: of the config, which no shape tells: num_heads, groups, permute.

        Raises:
            ValueError: weights under other names, missing, unknown or of another shape; two copies of a shared block
                that differ; num_heads that are neither given nor known; fields that do not fit.
            TypeError: a field that the config does not have.
        """
        what = f"{cls.__name__}.from_published"
        config = SReTConfig.from_fields(published_fields(what, weights, fields), **fields)
        return load_weights(cls, config, weights, f"{what}: weights").eval()


# A part of a block here, and the same in the published code.
_PARTS = {
    "mixer_norm": "norm1",
    "mixer.qkv": "attn.qkv",
    "mixer.out": "attn.proj",
    "channel_mixer_norm": "norm2",
    "channel_mixer.up": "mlp.fc1",
    "channel_mixer.down": "mlp.fc2",
}


def published_names(name: str) -> tuple[str, ...]:
    """The names in the published code of what makes up the weight of this name.

    A published stage has a list of what runs, one after the other: the first run of shared block j is number 4 j, its
    second, under whose number the same weights are listed again, 4 j + 2, and feed-forward i behind a run 2 i + 1.
    """
    place = re.fullmatch(r"(blocks|between)\.(\d+)\.(\d+)\.(.+)", name)
    if place is None:
        return (re.sub(r"^pools\.(\d+)\.", r"pools.\1.conv.", name),)
    kind, stage, index, part = place[1], int(place[2]), int(place[3]), place[4]
    prefix = f"transformers.{stage}.blocks.{4 * index if kind == 'blocks' else 2 * index + 1}"
    if part == "coefficients":
        return tuple(f"{prefix}.coefficient{i + 1}.bias" for i in range(4 if kind == "blocks" else 2))
    owner, _, leaf = part.rpartition(".")
    # Without attention the only norm is the first.
    theirs = "norm1" if kind == "between" and owner == "channel_mixer_norm" else _PARTS[owner]
    return (f"{prefix}.{theirs}.{leaf}",)


def _first_name(name: str) -> str:
    """For a published name of a weight in the second run of a shared block that in the first run; "" for others."""
    place = re.fullmatch(r"(transformers\.\d+\.blocks\.)(\d+)(\..+)", name)
    if place is None or int(place[2]) % 4 != 2:
        return ""
    return f"{place[1]}{int(place[2]) - 2}{place[3]}"


def published_fields(what: str, weights: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the config that published weights tell by their shapes.

    Raises:
        ValueError: weights under other names, or of shapes that no config has; heads that are neither given nor known.
    """
    stages: dict[int, int] = {}
    for name in weights:
        place = re.match(r"transformers\.(\d+)\.blocks\.(\d+)\.", name)
        if place is not None:
            stages[int(place[1])] = max(stages.get(int(place[1]), 0), int(place[2]) + 1)
    if not stages:
        raise ValueError(
            f"{what}: weights must have the published names, such as transformers.0.blocks.0.attn.qkv.weight"
        )
    count = max(stages) + 1
    try:
        first = weights["patch_embed.conv1.weight"]
        side = weights["pos_embed"].shape[-1]
        labels = weights["head.weight"].shape[0]
        inner, between = (
            [weights[f"transformers.{i}.blocks.{block}.mlp.fc1.weight"].shape for i in range(count)] for block in (0, 1)
        )
    except KeyError as error:
        raise ValueError(f"{what}: weights lack {error.args[0]}") from None
    widths = tuple(shape[1] for shape in inner)
    fields: dict[str, Any] = {
        "image_size": STRIDE * side,
        "num_channels": first.shape[1],
        "hidden_sizes": widths,
        "depths": tuple(-(-stages.get(i, 0) // (2 * RUNS)) for i in range(count)),
        "mlp_ratio": _ratio(what, inner),
        "between_ratio": _ratio(what, between),
        "num_labels": labels,
    }
    if "num_heads" not in given:
        known = {SReTConfig.preset(size).hidden_sizes: SReTConfig.preset(size).num_heads for size in SReTConfig.presets}
        if widths not in known:
            raise ValueError(f"{what}: num_heads must be given for hidden_sizes {widths}, as no shape tells it")
        fields["num_heads"] = known[widths]
    return fields


def _ratio(what: str, shapes: Sequence[torch.Size]) -> float:
    """The shortest decimal number r with floor(r * width) = inner for all shapes [inner, width]."""
    low = max(inner / width for inner, width in shapes)
    for digits in range(9):
        ratio = math.ceil(round(low * 10**digits, 6)) / 10**digits
        if all(int(width * ratio) == inner for inner, width in shapes):
            return ratio
    sizes = [tuple(shape) for shape in shapes]
    raise ValueError(f"{what}: mlp.fc1.weight must have one ratio of widths in all stages, got shapes {sizes}")
