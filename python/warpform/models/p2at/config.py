"""The options of P2AT."""

from __future__ import annotations

import dataclasses

from ..common.config import ModelConfig
from ..resnet import ResNetConfig
from ..system_backbone import backbone_config, checked_backbone

MAPS = 4  # of the backbone


@dataclasses.dataclass
class P2ATConfig(ModelConfig):
    """The options of P2AT. Presets are S, M and L (ResNet-18, -34 and -50).

    Attributes:
        backbone: a preset of `ResNetConfig`, or a `ResNetConfig`; None: the model is given a backbone of another kind.
        auxiliary_heads: whether there are two heads on the fusions too, for training.
        hidden_size: channels of all that is on the backbone.
        num_blocks: with axial attention, on the coarsest map.
        num_attention_heads, key_dim: of axial attention; a value has twice the dimensions of a key.
        mlp_ratio: channels inside of feed-forward and decoder blocks, in hidden_size.
        num_positions: of the learned ones, which are resized to the rows and columns of a map.
        released: whether the pyramid is the first pooled map twice and the third, as in the published code, in place of
            all three, as in the paper. The weights that come with that code need it.
        auxiliary_loss_weight: of the loss of each auxiliary head, beside 1 of the last one. The published code has two
            weights for three losses; 0.4 is PSPNet's (arXiv 1612.01105).
        semantic_loss_ignore_index: the label of pixels that the loss does not look at.
        num_labels: classes.

    Raises:
        ValueError: sizes below 1, or no such backbone.
    """

    model_type = "p2at"
    positive = ("hidden_size", "num_blocks", "num_attention_heads", "key_dim", "mlp_ratio", "num_positions")
    presets = {"S": {"backbone": "18"}, "M": {"backbone": "34"}, "L": {"backbone": "50"}}

    backbone: str | ResNetConfig | None = "18"
    auxiliary_heads: bool = False
    hidden_size: int = 64
    num_blocks: int = 2
    num_attention_heads: int = 8
    key_dim: int = 16
    mlp_ratio: int = 4
    num_positions: int = 16
    released: bool = False
    auxiliary_loss_weight: float = 0.4
    semantic_loss_ignore_index: int = 255
    num_labels: int = 19

    def __post_init__(self) -> None:
        self.backbone = checked_backbone(self, self.backbone)
        super().__post_init__()
        options = backbone_config(self.backbone)
        if options is not None and len(options.depths) != MAPS:
            raise self.error(f"backbone must have {MAPS} stages, got {len(options.depths)}")
