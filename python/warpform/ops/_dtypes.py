"""The dtypes that ops compute in."""

from __future__ import annotations

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, of statistics and of what is kept for the backward pass: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
