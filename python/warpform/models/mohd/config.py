"""The options of MoHD and its sizes. What the sources leave open is an option."""

from __future__ import annotations

import dataclasses
from typing import Any

from ...nn.hidden import SCALE_MODES
from ..decoder.config import DecoderConfig

# How much wider the hidden dimension is, then groups, shared, routed: as many dimensions in use as the share of the
# dense model's that the name says, all of them from "2x" on.
_SETTINGS = {
    "50%": (1, 16, 6, 2),
    "75%": (1, 16, 9, 3),
    "2x": (2, 16, 6, 2),
    "3x": (3, 24, 6, 2),
    "4x": (4, 32, 6, 2),
}


@dataclasses.dataclass
class MoHDConfig(DecoderConfig):
    """Sizes by default are those of the 355M decoder at 50 % activation.

    Certain from the paper's abstract: shared dimensions that are always on, specialised ones that are routed per token,
    activation scaling and group fusion. Second-hand, and so the defaults: N = 16 groups, three quarters of the active
    ones shared, attention and feed-forward both sparse, softmax scores, the scale N * sum(g), a Monarch matrix for
    fusion, a balance loss of weight 0.01. A guess: one router for each block, that gates multiply what a block reads
    and not what it writes, and all sizes but the number of parameters.

    Attributes:
        vocab_size, and so on: those of `DecoderConfig`. A model that is wider than the dense one keeps its head_dim.
        num_groups, num_shared, top_k: groups of hidden dimensions, the first that all tokens use, and the choices.
            num_groups 0: a dense decoder.
        sparse_attention, sparse_feed_forward: which blocks are routed.
        route_in, route_out: whether a block reads, and writes, routed dimensions.
        gates: where the gates multiply: "in", "out", "both" or "none" (they are 1).
        scale_mode, renormalise: as in `nn.HiddenRouter`.
        fusion: a `nn.GroupFusion` after each routed output.
        balance_loss_weight: of the mean balance loss in the loss.

    Raises:
        ValueError: sizes that do not fit, an unknown choice.
    """

    model_type = "mohd"
    other_model_types = ()
    choices = {**DecoderConfig.choices, "gates": ("in", "out", "both", "none"), "scale_mode": SCALE_MODES}
    # Dense decoders that come to these counts of parameters with 32,000 embeddings, in and out.
    presets = {
        "355M": {"hidden_size": 1024, "intermediate_size": 2560, "num_hidden_layers": 24, "num_attention_heads": 16},
        "495M": {"hidden_size": 1280, "intermediate_size": 2752, "num_hidden_layers": 24, "num_attention_heads": 20},
        "1.13B": {"hidden_size": 2048, "intermediate_size": 4032, "num_hidden_layers": 24, "num_attention_heads": 32},
    }

    hidden_size: int = 1024
    intermediate_size: int = 2560
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    rms_norm_eps: float = 1e-5
    num_groups: int = 16
    num_shared: int = 6
    top_k: int = 2
    sparse_attention: bool = True
    sparse_feed_forward: bool = True
    route_in: bool = True
    route_out: bool = True
    gates: str = "in"
    scale_mode: str = "sum"
    renormalise: bool = False
    fusion: bool = True
    balance_loss_weight: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_groups and self.hidden_size % self.num_groups:
            raise self.error(f"num_groups must divide hidden_size {self.hidden_size}, got {self.num_groups}")

    @property
    def sparse(self) -> bool:
        """True if a block is routed."""
        return self.num_groups > 0 and (self.sparse_attention or self.sparse_feed_forward)

    @classmethod
    def preset(cls, size: str = "355M", setting: str = "50%", **fields: Any) -> MoHDConfig:
        """A decoder of "355M", "495M" or "1.13B" parameters, "dense", at "50%" or "75%" activation, or "2x", "3x", "4x"
        as wide with as many dimensions in use as the dense one has ("2x" and wider: groups of the same number).

        Raises:
            ValueError: another size or setting.
        """
        if setting not in ("dense", *_SETTINGS):
            raise cls.error(f"setting must be one of dense, {', '.join(_SETTINGS)}, got {setting!r}")
        wider, groups, shared, routed = _SETTINGS.get(setting, (1, 0, 0, 0))
        dense = super().preset(size)
        routing = {
            "hidden_size": dense.hidden_size * wider,
            "head_dim": dense.heads_dim,
            "num_groups": groups,
            "num_shared": shared,
            "top_k": routed,
        }
        return super().preset(size, **{**routing, **fields})
