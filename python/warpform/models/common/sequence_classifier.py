"""Classifiers of sequences and of images on a stack of branches: embeddings, stack, pooling, and labels.

It is the other head beside a decoder's. Tokens or patches are rows of the same `nn.Stack`, and padding is not computed.
An architecture derives from one of the two and says which branches its stack has.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...nn._product import apply_linear
from ...nn.activations import ACTIVATIONS
from ...nn.branches import attention_branch, feed_forward_branch
from ...nn.patch_embedding import PatchEmbedding
from ...nn.pooling import first_tokens, last_tokens, max_pool, mean_pool
from ...nn.stack import Branch, Stack
from ...packing import Packing
from .config import ModelConfig
from .init import linear_std
from .inputs import full_packing, read_rows, step_by_places
from .losses import classification_loss
from .outputs import HeadOutput, ImageClassifierOutput
from .pretrained import PretrainedModel

POOLINGS = {"mean": mean_pool, "max": max_pool, "first": first_tokens, "last": last_tokens}


@dataclasses.dataclass
class ClassifierConfig(ModelConfig):
    """What the options of all classifiers on a stack have in common.

    Attributes:
        hidden_size, num_hidden_layers, num_attention_heads: of the stack.
        head_dim: None: hidden_size / num_attention_heads.
        intermediate_size: width inside of the feed-forward; None: 4 hidden_size.
        hidden_act: of the feed-forward, one of `nn.ACTIVATIONS`.
        norm_first: as of `torch.nn.TransformerEncoderLayer`: whether LayerNorm stands before each branch, and once more
            behind the last, or behind each sum.
        bias: whether the products of the stack have biases.
        initializer_range: the standard deviation of new weights; None: that of `torch.nn.Linear` for hidden_size
            inputs. Narrow models of BERT's 0.02 take several times as long to begin to learn.
        pooling: what is classified: the "mean" or "max" over a sequence, its "first" or its "last" row.
        num_labels, problem_type: of the classifier.

    Raises:
        ValueError: sizes that do not fit, an unknown choice.
    """

    positive: ClassVar[tuple[str, ...]] = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    )  # fmt: skip
    choices = {"hidden_act": ACTIVATIONS, "pooling": tuple(POOLINGS)}

    hidden_size: int = 256
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    head_dim: int | None = None
    intermediate_size: int | None = None
    hidden_act: str = "gelu"
    norm_first: bool = True
    bias: bool = True
    layer_norm_eps: float = 1e-5
    initializer_range: float | None = None
    pooling: str = "mean"
    num_labels: int = 2
    problem_type: str | None = None

    def __post_init__(self) -> None:
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        super().__post_init__()
        if self.initializer_range is None:
            self.initializer_range = linear_std(self.hidden_size)
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise self.error(
                f"num_attention_heads must divide hidden_size {self.hidden_size} where head_dim is None, "
                f"got {self.num_attention_heads}"
            )
        if self.head_dim is not None and self.head_dim < 1:
            raise self.error(f"head_dim must be at least 1, got {self.head_dim}")

    @property
    def heads_dim(self) -> int:
        """Dimensions of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads


class StackClassifier(PretrainedModel):
    """Learned positions, a stack in which every row sees all of its sequence, and a classifier of what is pooled.

    Args:
        config: its options, derived from `ClassifierConfig`.
    """

    config_class = ClassifierConfig

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.embeddings = self.make_embeddings()
        self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.stack = Stack(branch for layer in range(config.num_hidden_layers) for branch in self.layer_branches(layer))
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps) if config.norm_first else None
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.apply(self.init_weights)

    def make_embeddings(self) -> nn.Module:
        """What makes rows of the width of the stack."""
        raise NotImplementedError

    def layer_branches(self, layer: int) -> list[Branch]:
        """The branches of a layer: attention and feed-forward."""
        return [self.attention_branch(), self.feed_forward_branch()]

    def attention_branch(self) -> Branch:
        """The attention of a layer."""
        config = self.config
        return attention_branch(
            config.hidden_size,
            config.num_attention_heads,
            config.heads_dim,
            causal=False,
            bias=config.bias,
            eps=config.layer_norm_eps,
            norm_first=config.norm_first,
        )

    def feed_forward_branch(self) -> Branch:
        """The feed-forward of a layer."""
        config = self.config
        return feed_forward_branch(
            config.hidden_size,
            config.intermediate_size,
            activation=config.hidden_act,
            bias=config.bias,
            eps=config.layer_norm_eps,
            norm_first=config.norm_first,
        )

    def classify(self, rows: Tensor, packing: Packing, labels: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """The loss, where labels are given, and logits [batch, num_labels], 0 for empty sequences, of embedded rows."""
        step = step_by_places(packing)
        hidden = self.stack(rows + self.positions(step.positions), step, self.norm)
        logits = apply_linear(POOLINGS[self.config.pooling](hidden, packing), self.classifier)
        logits = torch.where((packing.lengths > 0).unsqueeze(1), logits, logits.new_zeros(()))
        if labels is None:
            return None, logits
        return classification_loss(type(self).__name__, self.config.problem_type, logits, labels), logits


@dataclasses.dataclass
class SequenceClassifierConfig(ClassifierConfig):
    """The options of a classifier of sequences of tokens.

    Attributes:
        vocab_size: tokens.
        max_position_embeddings: the longest sequence, padding left out.
    """

    positive = (*ClassifierConfig.positive, "vocab_size", "max_position_embeddings")

    vocab_size: int = 256
    max_position_embeddings: int = 1024


class SequenceClassifier(StackClassifier):
    """Classifies sequences of tokens.

    A token's position is its place among the tokens of its sequence. So padding, wherever it is, changes nothing.
    """

    config_class = SequenceClassifierConfig

    def make_embeddings(self) -> nn.Module:
        return nn.Embedding(self.config.vocab_size, self.config.hidden_size)

    def get_input_embeddings(self) -> nn.Module:
        """The token table, for callers that know transformers models."""
        return self.embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        packing: Packing | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> HeadOutput:
        """Padded: ids [B, S] and a mask of any pattern. Packed: ids [total] and their packing.

        Args:
            input_ids: int64 [B, S], or [total] with `packing`.
            attention_mask: bool or integer [B, S], nonzero = token; None = all are tokens. Not with `packing`.
            labels: [B] integers (classes) or [B] numbers (regression with one label), else [B, num_labels].
            packing: says that ids or embeddings are packed.
            inputs_embeds: [B, S, hidden] or [total, hidden], in place of input_ids.

        Returns:
            HeadOutput: loss, in float32 at least; logits [B, num_labels], 0 for a sequence without a token.

        Raises:
            ValueError: both or neither of input_ids and inputs_embeds, shapes that do not match, a mask with `packing`,
                more tokens than max_position_embeddings (a RuntimeError in a compiled or exported model).
        """
        name, limit = type(self).__name__, self.config.max_position_embeddings
        if input_ids is not None and inputs_embeds is None:
            packing, _, ids = read_rows(name, "input_ids", input_ids, (), attention_mask, packing, limit)
            rows = self.embeddings(ids)
        elif inputs_embeds is not None and input_ids is None:
            width = (self.config.hidden_size,)
            packing, _, rows = read_rows(name, "inputs_embeds", inputs_embeds, width, attention_mask, packing, limit)
        else:
            raise ValueError(f"{name}: exactly one of input_ids and inputs_embeds must be given")
        return HeadOutput(*self.classify(rows, packing, labels))


@dataclasses.dataclass
class ImageClassifierConfig(ClassifierConfig):
    """The options of a classifier of images.

    Attributes:
        image_size, patch_size: pixels of a side, of images and of patches; patch_size divides image_size.
        num_channels: of an image.
    """

    positive = (*ClassifierConfig.positive, "image_size", "patch_size", "num_channels")
    divides = (("patch_size", "image_size"),)

    image_size: int = 28
    patch_size: int = 4
    num_channels: int = 1
    num_labels: int = 10

    @property
    def max_position_embeddings(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch_size) ** 2


class ImageClassifier(StackClassifier):
    """Classifies images by their patches."""

    config_class = ImageClassifierConfig
    drawn_convolutions = (nn.Conv2d,)

    def make_embeddings(self) -> nn.Module:
        config = self.config
        return PatchEmbedding(config.num_channels, config.hidden_size, (config.patch_size, config.patch_size))

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        """Classifies images.

        Args:
            pixel_values: [batch, num_channels, image_size, image_size].
            labels: [batch] integers (classes) or [batch] numbers (regression with one label), else [batch, num_labels].

        Returns:
            ImageClassifierOutput: loss, in float32 at least; logits [batch, num_labels].

        Raises:
            ValueError: pixel_values or labels of another shape.
        """
        config = self.config
        expected = [config.num_channels, config.image_size, config.image_size]
        if pixel_values.dim() != 4 or list(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"{type(self).__name__}: pixel_values must be of shape [batch, {', '.join(map(str, expected))}], "
                f"got {list(pixel_values.shape)}"
            )
        patches = self.embeddings(pixel_values).flatten(1, 2)
        packing = full_packing(patches.shape[0], patches.shape[1], patches.device)
        return ImageClassifierOutput(*self.classify(patches.flatten(0, 1), packing, labels))
