"""Token mixers of vision backbones, for `MetaFormerBlock`: [batch, *grid, channels] -> (product, bias or None)."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from .. import ops
from ..packing import Packing
from ._product import apply_linear, product

__all__ = ["MaskUnitAttention"]

# The longest run that `ops.window_attention` takes on a GPU, where the window lies along one axis.
LONGEST_RUN = 1024


def max_of_runs(x: Tensor, pool: int) -> Tensor:
    """The largest of each `pool` adjacent tokens: x [..., n, C] -> [..., n / pool, C]; x itself where pool is 1.

    Of equal ones the gradient goes to the first. In 16 bits they are common.
    """
    return x if pool == 1 else x.unflatten(-2, (-1, pool)).max(-2).values


class MaskUnitAttention(nn.Module):
    """Self-attention in runs of adjacent tokens or over an image, with queries pooled (Hiera, arXiv 2306.00989).

    Tokens come in mask units [batch, units, n, hidden_size], those that are pooled together adjacent. So a window is a
    run, pooling is a maximum over adjacent rows, and units that are left out are rows that are not there.

    Args:
        hidden_size: channels of a token.
        num_heads: heads.
        run: tokens that attend to each other, before pooling; it divides the n tokens of a unit. None: all of an image.
        out_size: channels that come out, and of queries, keys and values; None is hidden_size. num_heads divides it.
        pool: adjacent tokens whose queries become one, the largest of each channel; it divides run.

    Raises:
        ValueError: num_heads does not divide out_size, pool does not divide run, a number below 1.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, run: int | None = None, *, out_size: int | None = None, pool: int = 1
    ) -> None:
        super().__init__()
        out_size = hidden_size if out_size is None else out_size
        name = type(self).__name__
        if num_heads < 1 or out_size % num_heads:
            raise ValueError(f"{name}: num_heads must divide out_size {out_size}, got {num_heads}")
        if pool < 1 or (run is not None and (run < 1 or run % pool)):
            raise ValueError(f"{name}: pool must be at least 1 and divide run {run}, got {pool}")
        self.num_heads, self.head_dim = num_heads, out_size // num_heads
        self.run, self.pool = run, pool
        self.qkv = nn.Linear(hidden_size, 3 * out_size)
        self.out = nn.Linear(out_size, out_size)

    def forward(self, hidden: Tensor, packing: Packing | None = None) -> tuple[Tensor, Tensor | None]:
        """Attends.

        Args:
            hidden: [batch, units, n, hidden_size]; with a packing [1, packing.total, n, hidden_size].
            packing: which units of which image there are; None: the same number for all, one image a row.

        Returns:
            The product [batch, units, n / pool, out_size], and the bias [out_size] to be added, or None.
        """
        qkv = apply_linear(hidden, self.qkv).unflatten(-1, (3, self.num_heads, self.head_dim))
        batch, units, tokens = hidden.shape[:3]
        run = self.run
        if run is None and packing is None:
            run = units * tokens
        if self.pool > 1 or run is None or not 0 < run <= LONGEST_RUN:
            return product(self._attend(qkv, packing), self.out)
        mixed = ops.window_attention(qkv if run == self.run else qkv.flatten(1, 2).unsqueeze(1), window_size=(1, run))
        return product(mixed.view(batch, units, tokens, self.num_heads * self.head_dim), self.out)

    def _attend(self, qkv: Tensor, packing: Packing | None) -> Tensor:
        """qkv [batch, units, n, 3, heads, d] -> [batch, units, n / pool, heads * d], by attention over sequences."""
        batch, units, tokens = qkv.shape[:3]
        q, k, v = qkv.unbind(3)  # [batch, units, n, heads, d]
        if self.pool > 1:
            q = q.unflatten(2, (-1, self.pool)).max(3).values
        pooled = tokens // self.pool
        # Sequence i has keys from starts[i] * keys on, and the longest has `most` times so many.
        if self.run is None and packing is not None:
            starts, keys, most = packing.cu_seqlens, tokens, packing.max_seqlen
        else:
            keys = units * tokens if self.run is None else self.run
            count = batch if self.run is None else batch * units * (tokens // self.run)
            starts, most = torch.arange(count + 1, dtype=torch.int32, device=qkv.device), 1
        queries = keys // self.pool
        q, k, v = q.flatten(0, 2), k.flatten(0, 2), v.flatten(0, 2)
        out = ops.varlen_attention(q, k, v, starts * queries, starts * keys, most * queries, most * keys)
        return cast("Tensor", out).view(batch, units, pooled, self.num_heads * self.head_dim)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}, run={self.run}, pool={self.pool}"
