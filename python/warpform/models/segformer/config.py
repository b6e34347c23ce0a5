"""The options of SegFormer."""

from __future__ import annotations

import dataclasses
from typing import Any

from ...nn import ACTIVATIONS
from ..common.config import TransformersConfig, check_stages

_LISTS = ("depths", "hidden_sizes", "num_attention_heads", "sr_ratios", "patch_sizes", "strides", "mlp_ratios")
_WIDE = {"hidden_sizes": (64, 128, 320, 512), "decoder_hidden_size": 768}


@dataclasses.dataclass
class SegformerConfig(TransformersConfig):
    """The options of SegFormer, under the names of transformers' `SegformerConfig`.

    Presets are B0 to B5 (table 6 of the paper): the encoder's sizes, and the width of the head.

    Attributes:
        num_channels: of an image.
        depths, hidden_sizes, num_attention_heads, mlp_ratios: of each stage.
        sr_ratios: of each stage the tokens along an axis to one key of attention.
        patch_sizes, strides: of the convolution before each stage, whose padding is patch_size // 2.
        hidden_dropout_prob, attention_probs_dropout_prob: in training; that of attention has to be 0 there.
        classifier_dropout_prob: before the classifier of pixels.
        drop_path_rate: of the last block, from 0 in the first.
        block_norm_eps: of the LayerNorms in blocks and after stages; others have 1e-5. The published code has 1e-6
            here. transformers has 1e-5 everywhere: its layer_norm_eps changes nothing, and it does not read this field,
            so what it reads from a folder computes with 1e-5. `to_transformers` sets the eps of the norms themselves,
            and `from_transformers` takes it from them, into this field where all agree.
        decoder_hidden_size: channels of the head for segmentation.
        semantic_loss_ignore_index: the label of pixels that the loss does not look at.
        reshape_last_stage: whether the last output is [batch, channels, height, width] as all others, rather than
            [batch, tokens, channels].

    Raises:
        ValueError: an unknown hidden_act or problem_type, lists of unequal lengths, a size below 1, heads that do not
            divide the channels, a probability outside of [0, 1].
    """

    model_type = "segformer"
    positive = ("num_channels", "decoder_hidden_size")
    choices = {"hidden_act": ACTIVATIONS}
    probabilities = (
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "classifier_dropout_prob",
        "drop_path_rate",
    )
    presets = {
        "B0": {"depths": (2, 2, 2, 2), "hidden_sizes": (32, 64, 160, 256), "decoder_hidden_size": 256},
        "B1": {"depths": (2, 2, 2, 2), "hidden_sizes": (64, 128, 320, 512), "decoder_hidden_size": 256},
        "B2": {"depths": (3, 4, 6, 3), **_WIDE},
        "B3": {"depths": (3, 4, 18, 3), **_WIDE},
        "B4": {"depths": (3, 8, 27, 3), **_WIDE},
        "B5": {"depths": (3, 6, 40, 3), **_WIDE},
    }

    num_channels: int = 3
    depths: tuple[int, ...] = (2, 2, 2, 2)
    sr_ratios: tuple[int, ...] = (8, 4, 2, 1)
    hidden_sizes: tuple[int, ...] = (32, 64, 160, 256)
    patch_sizes: tuple[int, ...] = (7, 3, 3, 3)
    strides: tuple[int, ...] = (4, 2, 2, 2)
    num_attention_heads: tuple[int, ...] = (1, 2, 5, 8)
    mlp_ratios: tuple[float, ...] = (4, 4, 4, 4)
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    classifier_dropout_prob: float = 0.1
    initializer_range: float = 0.02
    drop_path_rate: float = 0.1
    block_norm_eps: float = 1e-5
    decoder_hidden_size: int = 256
    semantic_loss_ignore_index: int = 255
    reshape_last_stage: bool = True
    output_hidden_states: bool = False
    return_dict: bool = True
    num_labels: int = 2
    problem_type: str | None = None

    def __post_init__(self) -> None:
        check_stages(self, _LISTS)
        super().__post_init__()
        for stage, (width, heads) in enumerate(zip(self.hidden_sizes, self.num_attention_heads, strict=True)):
            if width % heads:
                raise self.error(f"num_attention_heads must divide the {width} channels of stage {stage}, got {heads}")

    @property
    def hidden_size(self) -> int:
        """Channels of the last stage."""
        return self.hidden_sizes[-1]

    def to_transformers(self) -> dict[str, Any]:
        """The fields as keywords of transformers' config."""
        whole = tuple(int(ratio) if ratio == int(ratio) else ratio for ratio in self.mlp_ratios)
        return {**super().to_transformers(), "num_encoder_blocks": len(self.depths), "mlp_ratios": whole}
