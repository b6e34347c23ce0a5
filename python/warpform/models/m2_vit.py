"""M2-ViT (Monarch Mixer, arXiv 2310.12109, section 5.2): a vision transformer without attention.

Its weights and code were never published: blocks are those of a vision transformer (arXiv 2010.11929), normalised
before, with Monarch Mixer's bidirectional mixer along the patches and its gated MLP across channels.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import AddBiasResidualLayerNorm, MonarchMixerMLP, MonarchMixerSequenceMixer
from ..nn._checkpoint import CheckpointedLayers
from ..nn._product import patches
from ._config import PROBLEM_TYPES
from ._heads import classification_loss
from ._model import Model, ModelConfig
from ._swin_base import ImageClassifierOutput

_PRESETS = {"S": (384, 12), "B": (768, 12)}


@dataclasses.dataclass
class M2ViTConfig(ModelConfig):
    """The options of M2-ViT.

    Attributes:
        image_size, patch_size: pixels of a side, of images and of patches; patch_size divides image_size.
        num_channels: of an image.
        hidden_size, num_hidden_layers: of the blocks.
        intermediate_size: width of each half inside of the MLP; None = 4 hidden_size.
        nblocks: blocks of the MLP's products.
        residual_long_conv, filter_order, emb_dim, omega: of `nn.MonarchMixerSequenceMixer`.
        hidden_dropout_prob: in training, on what mixer and MLP add.
        num_labels, problem_type: of the classifier.

    Raises:
        ValueError: sizes that do not fit, a dropout outside [0, 1], an unknown problem_type.
    """

    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    hidden_size: int = 768
    num_hidden_layers: int = 12
    intermediate_size: int | None = None
    nblocks: int = 4
    residual_long_conv: bool = True
    filter_order: int = 128
    emb_dim: int = 5
    omega: float = 10.0
    hidden_dropout_prob: float = 0.0
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    num_labels: int = 1000
    problem_type: str | None = None

    def __post_init__(self) -> None:
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        for name in (
            "image_size", "patch_size", "num_channels", "hidden_size", "intermediate_size", "nblocks", "filter_order",
            "num_labels",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size must divide image_size {self.image_size}, got {self.patch_size}")
        for name in ("hidden_size", "intermediate_size"):
            if getattr(self, name) % self.nblocks:
                raise ValueError(f"nblocks must divide {name} {getattr(self, name)}, got {self.nblocks}")
        if not 0.0 <= self.hidden_dropout_prob <= 1.0:
            raise ValueError(f"hidden_dropout_prob must be between 0 and 1, got {self.hidden_dropout_prob}")
        if self.problem_type not in (None, *PROBLEM_TYPES):
            raise ValueError(
                f"problem_type must be None or one of {', '.join(PROBLEM_TYPES)}, got {self.problem_type!r}"
            )

    @classmethod
    def preset(cls, size: str, **overrides: Any) -> M2ViTConfig:
        """S or B, the sizes of a ViT on patches of 16 x 16, with the overrides on top.

        Raises:
            ValueError: another size.
        """
        if size not in _PRESETS:
            raise ValueError(f"size must be one of {', '.join(_PRESETS)}, got {size!r}")
        hidden_size, layers = _PRESETS[size]
        return cls(**{"hidden_size": hidden_size, "num_hidden_layers": layers, **overrides})

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch_size) ** 2


class M2ViTBlock(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: M2ViTConfig) -> None:
        super().__init__()
        self.mixer_norm = AddBiasResidualLayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mixer = MonarchMixerSequenceMixer(
            config.hidden_size,
            config.patches,
            bidirectional=True,
            residual=config.residual_long_conv,
            order=config.filter_order,
            emb_dim=config.emb_dim,
            omega=config.omega,
        )
        self.mlp_norm = AddBiasResidualLayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MonarchMixerMLP(
            config.hidden_size, config.intermediate_size, nblocks=config.nblocks, add_and_norm=False
        )
        self.dropout = config.hidden_dropout_prob

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, patches, hidden]; returns the same shape."""
        x = x + F.dropout(self.mixer(self.mixer_norm(x, None, None)), self.dropout, training=self.training)
        return x + F.dropout(self.mlp(self.mlp_norm(x, None, None)), self.dropout, training=self.training)


class M2ViTForImageClassification(Model, CheckpointedLayers):
    """A classifier of images on the mean over patches.

    Args:
        config: its options.
    """

    def __init__(self, config: M2ViTConfig) -> None:
        super().__init__()
        self.config = config
        size = config.patch_size
        # Holds the weights under their usual name and shape. Patches do not overlap, so it is one product.
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, size, size)
        self.position_embeddings = nn.Parameter(torch.empty(1, config.patches, config.hidden_size))
        self.layers = nn.ModuleList([M2ViTBlock(config) for _ in range(config.num_hidden_layers)])
        self.norm = AddBiasResidualLayerNorm(config.hidden_size, config.layer_norm_eps)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        nn.init.normal_(self.position_embeddings, std=config.initializer_range)
        self.apply(self.init_weights)

    def init_weights(self, module: nn.Module) -> None:
        """For `apply`: normal weights of standard deviation initializer_range, biases 0."""
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        """Classifies images.

        Args:
            pixel_values: [batch, channels, image_size, image_size].
            labels: [batch] integers (classes) or [batch] numbers (regression with one label), else [batch, num_labels].

        Returns:
            ImageClassifierOutput: loss, in float32 at least; logits [batch, num_labels].

        Raises:
            ValueError: pixel_values or labels of another shape.
        """
        config, name = self.config, type(self).__name__
        expected = [config.num_channels, config.image_size, config.image_size]
        if pixel_values.dim() != 4 or list(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"{name}: pixel_values must be of shape [batch, {', '.join(map(str, expected))}], "
                f"got {list(pixel_values.shape)}"
            )
        x = patches(pixel_values, self.projection, nn.Conv2d).flatten(1, 2) + self.position_embeddings
        for layer in self.layers:
            x = self.run_layer(layer, x)
        logits = self.classifier(self.norm(x, None, None).mean(1))
        loss = None if labels is None else classification_loss(name, config.problem_type, logits, labels)
        return ImageClassifierOutput(loss, logits)
