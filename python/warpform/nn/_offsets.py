"""cu_seqlens of sequences of one length, which attention over packed sequences takes."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import _torch_private


def equal_offsets(x: Tensor, batch: int, length: int) -> Tensor:
    """cu_seqlens of `batch` sequences of `length` rows each: 0, length, ..., int32 [batch + 1] on the device of x.

    They are made once for each size and device. Where torch traces or captures a call they are made in it, as what is
    kept has to hold values from then on.
    """
    device = x.device
    if (
        torch.compiler.is_compiling()
        or _torch_private.is_fake(x)
        or device.type == "meta"
        or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
    ):
        return torch.arange(batch + 1, dtype=torch.int32, device=device) * length
    return _kept_offsets(batch, length, device)


@functools.lru_cache(maxsize=256)
def _kept_offsets(batch: int, length: int, device: torch.device) -> Tensor:
    # A copy from the host ends before it returns, so that other streams find the values. An inference tensor could not
    # be kept for a backward pass.
    with torch.inference_mode(False):
        return (torch.arange(batch + 1, dtype=torch.int32, device="cpu") * length).to(device)
