"""M2-ViT (Monarch Mixer, arXiv 2310.12109, section 5.2): a vision transformer without attention.

Its weights and code were never published: blocks are those of a vision transformer (arXiv 2010.11929), normalised
before, with Monarch Mixer's bidirectional mixer along the patches and its gated MLP across channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn import AddBiasResidualLayerNorm, MonarchMixerMLP, MonarchMixerSequenceMixer
from ...nn._checkpoint import CheckpointedLayers
from ...nn.patch_embedding import embed_patches
from ..common.losses import classification_loss
from ..common.outputs import ImageClassifierOutput
from ..common.pretrained import PretrainedModel
from .config import M2ViTConfig


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


class M2ViTForImageClassification(PretrainedModel, CheckpointedLayers):
    """A classifier of images on the mean over patches.

    Args:
        config: its options.
    """

    config_class = M2ViTConfig
    drawn_convolutions = (nn.Conv2d,)

    def __init__(self, config: M2ViTConfig) -> None:
        super().__init__()
        self.config = config
        size = config.patch_size
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, size, size)
        self.position_embeddings = nn.Parameter(torch.empty(1, config.patches, config.hidden_size))
        self.layers = nn.ModuleList([M2ViTBlock(config) for _ in range(config.num_hidden_layers)])
        self.norm = AddBiasResidualLayerNorm(config.hidden_size, config.layer_norm_eps)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        nn.init.normal_(self.position_embeddings, std=config.initializer_range)
        self.apply(self.init_weights)

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
        x = embed_patches(pixel_values, self.projection).flatten(1, 2) + self.position_embeddings
        for layer in self.layers:
            x = self.run_layer(layer, x)
        logits = self.classifier(self.norm(x, None, None).mean(1))
        loss = None if labels is None else classification_loss(name, config.problem_type, logits, labels)
        return ImageClassifierOutput(loss, logits)
