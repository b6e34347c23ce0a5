"""Products with the bias where it is cheapest, and the size of blocks of rows on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Rows of a feed-forward block that a CPU takes at once: 512 x 3072 float32 is 6 MB, which stays in its cache and in the
# allocator's heap. All rows at once would be written to fresh pages and read back from memory, which on 2 cores of an
# AMD EPYC halves the speed of the two products at 16,000 rows (82 against 192 GFLOP/s at hidden 384).
CPU_ROWS = 512


def product(x: Tensor, linear: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """x @ weight.T and the bias that is still to be added by the fused operation that follows.

    On a CPU the matrix product adds a bias for nothing, while an elementwise pass costs; so there None is left to add.
    """
    if x.device.type == "cpu":
        return linear(x), None
    return F.linear(x, linear.weight), linear.bias


def in_blocks(x: Tensor) -> bool:
    """Whether to take rows in blocks: on a CPU, in inference. Gradients need the whole; compilers decide themselves."""
    return (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and x.shape[0] > CPU_ROWS
    )
