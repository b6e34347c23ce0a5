"""Learned positions of a grid, for grids of other sizes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ...ops._dtypes import accumulation_dtype


def resize_grid(rows: Tensor, before: tuple[int, int], after: tuple[int, int]) -> Tensor:
    """rows [before height * width, n] -> [after height * width, n], bicubic; rows themselves where nothing changes."""
    if tuple(before) == tuple(after):
        return rows
    wide = rows.to(accumulation_dtype(rows.dtype)).t().unflatten(1, before).unsqueeze(0)
    resized = F.interpolate(wide, size=after, mode="bicubic", align_corners=False)
    return resized.squeeze(0).flatten(1).t().to(rows.dtype).contiguous()
