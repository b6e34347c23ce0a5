"""packing_plan, pack and unpack in the emulator: their errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch


def test_errors_name_the_argument(simt: Any) -> None:
    x, indices, ranks = torch.randn(2, 3, 4), torch.arange(6), torch.arange(6, dtype=torch.int32).view(2, 3)
    with pytest.raises(RuntimeError, match=r"pack: x must be of shape \[2, 3, '...'\] as the mask was, got float32"):
        simt.pack(x[:, :2], indices, ranks)
    with pytest.raises(RuntimeError, match=r"pack: indices must be int64 of shape \[total\], got int32"):
        simt.pack(x, indices.int(), ranks)
    with pytest.raises(RuntimeError, match=r"unpack: t must be of shape \[6, '...'\]"):
        simt.unpack(x, indices, ranks)
    with pytest.raises(RuntimeError, match=r"packing_plan: mask must be bool or integer, got float32"):
        simt.packing_plan(torch.ones(2, 3), 6)
    with pytest.raises(RuntimeError, match=r"packing_plan: mask must be of shape \[batch, seqlen\]"):
        simt.packing_plan(torch.ones(6, dtype=torch.bool), 6)
