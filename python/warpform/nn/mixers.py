"""Token mixers of vision backbones, for `MetaFormerBlock`: [batch, *grid, channels] -> (product, bias or None)."""

from __future__ import annotations

__all__: list[str] = []
