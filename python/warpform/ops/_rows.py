"""Shapes that ops over rows share: [..., N] is seen as rows of N."""

from __future__ import annotations

from torch import Tensor

from ._dtypes import accumulation_dtype


def statistics_like(x: Tensor) -> Tensor:
    """An unset number for each row of x [..., N], in the dtype of sums. Rows without columns have none.

    Raises:
        ValueError: x has no dimensions.
    """
    if x.dim() == 0:
        raise ValueError("x must be of shape [..., width], got a scalar")
    cols, rows = x.shape[-1], 1
    for size in x.shape[:-1]:
        rows = rows * size
    if isinstance(cols, int) and cols == 0:
        rows = 0
    return x.new_empty(rows, dtype=accumulation_dtype(x.dtype))
