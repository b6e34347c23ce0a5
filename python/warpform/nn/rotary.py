"""Rotary position embedding (RoFormer, arXiv 2104.09864)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..ops._dtypes import accumulation_dtype

ROPE_TYPES = ("default", "linear", "llama3")
_FACTORS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


class Rotary:
    """The frequencies of rotary positions, and how they are stretched for sequences longer than a model was trained on.

    Args:
        dim: components of a head that are rotated, even.
        theta: the base: pair i turns by theta ** (-2 i / dim) a position.
        scaling: as `rope_scaling` of a transformers config. "rope_type" (or "type") is "default"; or "linear", which
            divides frequencies by "factor"; or "llama3", which divides those whose wavelength is above
            "original_max_position_embeddings" / "low_freq_factor", leaves those below it / "high_freq_factor", and
            blends between. None: "default".

    Raises:
        ValueError: an odd dim, another type, or a factor that is missing.
    """

    def __init__(self, dim: int, theta: float = 10_000.0, scaling: Mapping[str, Any] | None = None) -> None:
        if dim < 2 or dim % 2:
            raise ValueError(f"rotary positions need an even number of dimensions, got {dim}")
        scaling = scaling or {}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind not in ROPE_TYPES:
            raise ValueError(f"rope_scaling: rope_type must be one of {', '.join(ROPE_TYPES)}, got {kind!r}")
        missing = [name for name in _FACTORS[kind] if scaling.get(name) is None]
        if missing:
            raise ValueError(f"rope_scaling: rope_type {kind} needs {', '.join(missing)}")
        self.dim = dim
        self.theta = theta
        self.factors = tuple(float(scaling[name]) for name in _FACTORS[kind])
        self.kind = kind

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for equal frequencies."""
        return (self.dim, self.theta, self.kind, self.factors)

    def frequencies(self, device: torch.device | None = None) -> Tensor:
        """float64 [dim / 2], in radians a position."""
        steps = torch.arange(0, self.dim, 2, dtype=torch.float64, device=device)
        frequencies = self.theta ** (-steps / self.dim)
        if self.kind == "linear":
            return frequencies / self.factors[0]
        if self.kind == "llama3":
            factor, low, high, original = self.factors
            turns = original * frequencies / (2 * math.pi)  # over the length that the model was first trained on
            kept = ((turns - low) / (high - low)).clamp(0, 1)
            return frequencies * (kept + (1 - kept) / factor)
        return frequencies

    def tables(self, positions: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Cosine and sine of position * frequency, with angles in float64: far positions keep their place.

        Args:
            positions: integer [...].
            dtype: of the heads that will be rotated; tables are in float32 at least.

        Returns:
            cos and sin [..., dim / 2], in float32, or in float64 where dtype is.
        """
        wide = accumulation_dtype(dtype)
        angles = positions.unsqueeze(-1) * self.frequencies(positions.device)
        return angles.cos().to(wide), angles.sin().to(wide)


def rotary_tables(
    positions: Tensor, head_dim: int, theta: float = 10_000.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """`Rotary(head_dim, theta).tables(positions, dtype)`: cos and sin [..., head_dim / 2]."""
    return Rotary(head_dim, theta).tables(positions, dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (x_i, x_{i + R / 2}) of the first R dimensions of each head, as LLaMA of transformers does.

    Args:
        x: packed [T, H, D], or sequences [B, L, H, D], with D at least R.
        cos, sin: as `rotary_tables` makes them: [T, R / 2], or [L, R / 2] for all sequences alike, or [B, L, R / 2].

    Returns:
        Like x, computed in float32 (float64 for float64). Dimensions from R on are as they were.
    """
    wide, half = accumulation_dtype(x.dtype), cos.shape[-1]
    first, second = x[..., :half].to(wide), x[..., half : 2 * half].to(wide)
    cos, sin = cos.unsqueeze(-2).to(wide), sin.unsqueeze(-2).to(wide)
    turned = [first * cos - second * sin, second * cos + first * sin]
    if x.shape[-1] == 2 * half:
        return torch.cat(turned, -1).to(x.dtype)
    return torch.cat([*(t.to(x.dtype) for t in turned), x[..., 2 * half :]], -1)
