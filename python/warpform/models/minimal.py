"""The minimal transformer (arXiv 2410.13732): what is left of a layer when matrices that are not needed are taken out.

Four steps, each an option. (a) There is no feed-forward. (b) One matrix serves for query and key: s_ij = x_i W x_j /
sqrt(d). (c) That matrix is symmetric, W = L L^T with L lower-triangular, of half the parameters. (d) There are no
matrices of values and of the output, and what attention adds is a convex sum of the x themselves. In matrices of d^2 a
layer has 12, without the feed-forward 4, with one matrix for query and key 3, or about 2.5 where it is symmetric, and
without value and output 1, or about a half.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from ..nn._product import linear
from ..nn.branches import placement
from ..nn.cores import AttentionCore
from ..nn.stack import Branch, Step, at_step
from .common.sequence_classifier import ImageClassifier, ImageClassifierConfig

__all__ = ["MinimalTransformerConfig", "MinimalTransformerForImageClassification"]

SIMILARITIES = ("separate", "single", "symmetric")


@dataclasses.dataclass
class MinimalTransformerConfig(ImageClassifierConfig):
    """The options of a minimal transformer. With the defaults it is a usual one.

    Queries, keys and values of several heads are parts of head_dim columns each: of x where there is no matrix, of x W
    with one for query and key, and on both sides of x L where that is symmetric. So with "single" a head compares all
    of x_i with its part of x_j. With "symmetric" it has scores x_i L_h L_h^T x_j of its own columns of L. Scores are
    divided by sqrt(head_dim).

    Attributes:
        similarity: what scores are made with: "separate" matrices for queries and keys, a "single" one, or a single
            "symmetric" one. The last two have no biases.
        value: whether attention has the matrices of values and of the output.
        feed_forward: whether layers have a feed-forward.
        image_size, patch_size: pixels of a side, of images and of patches; patch_size divides image_size.
        num_channels: of an image.
        hidden_size, num_hidden_layers, num_attention_heads: of the stack; one head by default. The GPU's kernels take
            heads of a multiple of 8 dimensions up to 256.
        intermediate_size, hidden_act, norm_first, bias, pooling, num_labels, problem_type: as of `ClassifierConfig`.

    Raises:
        ValueError: sizes that do not fit, an unknown choice, a head_dim other than hidden_size / num_attention_heads.
    """

    model_type = "minimal_transformer"
    choices = {**ImageClassifierConfig.choices, "similarity": SIMILARITIES}

    similarity: str = "separate"
    value: bool = True
    feed_forward: bool = True
    hidden_size: int = 64
    num_hidden_layers: int = 4
    num_attention_heads: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads_dim * self.num_attention_heads != self.hidden_size:
            raise self.error(
                f"head_dim must be None or hidden_size / num_attention_heads, as heads are parts of x, "
                f"got {self.head_dim} with {self.num_attention_heads} heads and hidden_size {self.hidden_size}"
            )


class TriangularLinear(nn.Module):
    """x -> x L for a lower-triangular L, of which only the triangle is kept.

    Args:
        size: d, the columns and rows of L.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.triangle = nn.Parameter(torch.empty(size * (size + 1) // 2))
        self.reset_parameters(size**-0.5)

    def reset_parameters(self, std: float) -> None:
        """Draws the triangle from a normal distribution."""
        nn.init.normal_(self.triangle, std=std)

    def dense(self) -> Tensor:
        """L [d, d], rows of the triangle one after the other: the first has one number, the last d."""
        zeros = self.triangle.new_zeros(self.size, self.size)
        return zeros.masked_scatter(torch.ones_like(zeros, dtype=torch.bool).tril(), self.triangle)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., d] -> [..., d]."""
        return linear(x, self.dense().t())

    def extra_repr(self) -> str:
        return str(self.size)


class MinimalAttention(Branch):
    """Attention in which x itself may take the place of keys and values, and the convex sum that of the output.

    Args:
        config: its options.

    Attributes:
        inwards: x -> queries and keys side by side, or queries, or what serves as both.
        values: x -> values; None: x serves.
        outwards: the convex sum -> what is added; the identity where there are no values.
    """

    def __init__(self, config: MinimalTransformerConfig) -> None:
        width, bias, kind = config.hidden_size, config.bias, config.similarity
        super().__init__(
            nn.LayerNorm(width, config.layer_norm_eps),
            TriangularLinear(width)
            if kind == "symmetric"
            else nn.Linear(width, (2 if kind == "separate" else 1) * width, bias=bias and kind == "separate"),
            AttentionCore(config.num_attention_heads, head_dim=config.heads_dim, causal=False, rotary_share=0),
            nn.Linear(width, width, bias=bias) if config.value else nn.Identity(),
            placement=placement(config.norm_first),
        )
        self.kind = kind
        self.values = nn.Linear(width, width, bias=bias) if config.value else None

    def _body(self, x: Tensor, step: Step, cache: None = None) -> Tensor:
        core: AttentionCore = self.core  # type: ignore[assignment]
        split = (-1, core.head_dim)
        own = x.unflatten(-1, split)
        product = at_step(self.inwards, x, step).unflatten(-1, split)
        query, key = product[:, : core.num_heads], product[:, -core.num_heads :]
        if self.kind == "single":
            key = own
        value = own if self.values is None else at_step(self.values, x, step).unflatten(-1, split)
        return at_step(self.outwards, core.attend(query, key, value, step, None).flatten(1), step)


class MinimalTransformerForImageClassification(ImageClassifier):
    """A classifier of images on layers from which matrices were taken out.

    Args:
        config: its options.

    Attributes:
        stack: the layers, an `nn.Stack` of an attention branch for each and, where there is one, a feed-forward branch.
    """

    config_class = MinimalTransformerConfig

    def layer_branches(self, layer: int) -> list[Branch]:
        config = self.config
        usual = config.similarity == "separate" and config.value
        attention = self.attention_branch() if usual else MinimalAttention(config)
        return [attention, self.feed_forward_branch()] if config.feed_forward else [attention]

    def init_weights(self, module: nn.Module) -> None:
        super().init_weights(module)
        if isinstance(module, TriangularLinear):
            module.reset_parameters(self.config.initializer_range)
