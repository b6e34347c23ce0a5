"""Seeds torch's generators."""

from __future__ import annotations

import torch


def seed_everything(seed: int) -> None:
    """torch.manual_seed for the CPU and, where there are any, for CUDA GPUs.

    torch.manual_seed also queues the seed for every backend that is not initialised, with a formatted stack each:
    milliseconds a call, which thousands of tests pay.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)
