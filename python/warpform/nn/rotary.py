"""Rotary position embedding (RoFormer, arXiv 2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops._dtypes import accumulation_dtype


def rotary_tables(
    positions: Tensor, head_dim: int, theta: float = 10_000.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position * theta ** (-2 i / head_dim), with angles in float64: far positions keep their place.

    Args:
        positions: integer [...].
        head_dim: of the heads that will be rotated, even.
        theta: the base of the frequencies.
        dtype: of the heads that will be rotated; tables are in float32 at least.

    Returns:
        cos and sin [..., head_dim / 2], in float32, or in float64 where dtype is.
    """
    wide = accumulation_dtype(dtype)
    steps = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device)
    angles = positions.unsqueeze(-1) * theta ** (-steps / head_dim)
    return angles.cos().to(wide), angles.sin().to(wide)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (x_i, x_{i + D / 2}) of each head, as LLaMA of transformers lays them out.

    Args:
        x: packed [T, H, D], or sequences [B, L, H, D].
        cos, sin: as `rotary_tables` makes them: [T, D / 2], or [L, D / 2] for all sequences alike, or [B, L, D / 2].

    Returns:
        Like x, computed in float32 (float64 for float64).
    """
    wide = accumulation_dtype(x.dtype)
    first, second = x.to(wide).chunk(2, -1)
    cos, sin = cos.unsqueeze(-2).to(wide), sin.unsqueeze(-2).to(wide)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)
