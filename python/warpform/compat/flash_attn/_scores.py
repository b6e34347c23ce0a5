"""The arguments of flash-attn's functions that say how scores are made and which are seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import _arguments


def scores(
    op: str,
    softmax_scale: float | None,
    causal: bool,
    window_size: Sequence[int] | Tensor,
    softcap: float,
    alibi_slopes: Tensor | None,
) -> dict[str, Any]:
    """The same arguments for `varlen_attention`: plain numbers, a softcap that is not negative, contiguous slopes.

    Raises:
        TypeError, ValueError: as `_arguments` says.
    """
    softcap = _arguments.number(op, "softcap", softcap)
    return {
        "softmax_scale": None if softmax_scale is None else _arguments.number(op, "softmax_scale", softmax_scale),
        "causal": _arguments.flag(op, "causal", causal),
        "window_size": _arguments.window(op, window_size),
        "softcap": softcap if softcap > 0 else 0.0,  # to flash-attn it is off there
        "alibi_slopes": alibi_slopes.contiguous() if isinstance(alibi_slopes, Tensor) else alibi_slopes,
    }
