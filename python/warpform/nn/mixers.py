"""Token mixers of vision backbones, for `MetaFormerBlock`: [batch, *grid, channels] -> (product, bias or None)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ._product import apply_linear, is_plain, linear, product
from .activations import BiasActivation
from .norm import AddBiasResidualLayerNorm

__all__: list[str] = ["GatedUnit", "GroupedAttention"]

# The longest run of tokens that window attention has kernels for.
LONGEST_WINDOW = 1024
# The kernels of attention take heads of a multiple of so many dimensions.
HEAD_DIM_STEP = 8

PERMUTE = ("always", "train", "never")


def attend_runs(qkv: Tensor, length: int, scale: float | None = None) -> Tensor:
    """Attention inside of runs of adjacent tokens: they are windows of one row.

    Args:
        qkv: [batch, tokens, 3, heads, d].
        length: tokens of a run, which divides tokens.
        scale: of the scores; None: d ** -0.5.

    Returns:
        [batch, tokens, heads * d].
    """
    if length <= LONGEST_WINDOW:
        return ops.window_attention(qkv.unsqueeze(1), window_size=(1, length), scale=scale).squeeze(1)
    q, k, v = qkv.flatten(0, 1).unbind(1)
    offsets = torch.arange(0, q.shape[0] + 1, length, dtype=torch.int32, device=qkv.device)
    out = ops.varlen_attention(q, k, v, offsets, offsets, length, length, softmax_scale=scale)
    return cast("Tensor", out).flatten(1).view(*qkv.shape[:2], qkv.shape[3] * qkv.shape[4])


class GroupedAttention(nn.Module):
    """Self-attention in equal groups of adjacent tokens (SReT, arXiv 2111.05297, section 3.3).

    The N tokens of a grid, row by row, are cut into G runs of N / G tokens, and each token attends to those of its run.
    A block that runs several times has a G for each run. In the runs after the first, tokens are permuted at random
    before they are cut into more than one group, and brought back afterwards, so that other tokens meet.

    Heads whose dimensions the kernels do not take as they are, such as 42, are widened with zeros to a multiple of 8.
    That is done to the weights, in each call, and not to the tokens: parameters keep their shapes, and the widened
    weights are those of the last update.

    Args:
        hidden_size: channels of a token; num_heads must divide it.
        num_heads: heads.
        groups: G, or one for each run.
        permute: when later runs permute tokens: "always", in training mode alone ("train"), or "never".
        qkv_bias: whether queries, keys and values have a bias.

    Raises:
        ValueError: num_heads does not divide hidden_size, groups below 1 or none, another permute.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        groups: int | Sequence[int],
        *,
        permute: str = "train",
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if num_heads <= 0 or hidden_size % num_heads != 0:
            raise ValueError(f"{name}: num_heads must divide hidden_size {hidden_size}, got {num_heads}")
        self.groups = (groups,) if isinstance(groups, int) else tuple(groups)
        if not self.groups or min(self.groups) < 1:
            raise ValueError(f"{name}: groups must be at least 1 in each run, got {groups}")
        if permute not in PERMUTE:
            raise ValueError(f"{name}: permute must be one of {', '.join(PERMUTE)}, got {permute!r}")
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.permute = permute
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=qkv_bias)
        self.out = nn.Linear(hidden_size, hidden_size)

    def permutation(
        self, tokens: int, run: int, device: torch.device, generator: torch.Generator | None = None
    ) -> Tensor | None:
        """Draws the order in which a run takes the tokens.

        Args:
            tokens: N.
            run: 0 for the first.
            device: of the result.
            generator: what it is drawn with, on its own device; None: torch's default one of `device`.

        Returns:
            int64 [N], or None where this run takes tokens as they come.
        """
        if (
            run == 0
            or self.groups[run] == 1
            or not (self.permute == "always" or (self.permute == "train" and self.training))
        ):
            return None
        order = torch.randperm(tokens, generator=generator, device=device if generator is None else generator.device)
        return order.to(device)

    def forward(
        self,
        hidden: Tensor,
        *,
        run: int = 0,
        permutation: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden: [batch, *grid, hidden]. Returns the product of the same shape and the bias [hidden] to be added, or
        None where it is added.

        Args:
            hidden: the normalised tokens.
            run: which of `groups` counts.
            permutation: int64 [tokens], the order in which tokens are cut into groups, one for all samples; None: one
                that is drawn where this run permutes.
            generator: what it is drawn with; None: torch's default one. Where layers are computed again in backward,
                a permutation must be given instead, as the generator would give another one then.

        Raises:
            ValueError: groups that do not divide the tokens.
        """
        tokens, groups = math.prod(hidden.shape[1:-1]), self.groups[run]
        if tokens % groups:
            raise ValueError(
                f"{type(self).__name__}: hidden must have a number of tokens that {groups} groups divide, got {tokens}"
            )
        rows = hidden.flatten(1, -2)
        if permutation is None:
            permutation = self.permutation(tokens, run, hidden.device, generator)
        if permutation is not None:
            rows = rows.index_select(1, permutation)
        out = attend_runs(self.project(rows), tokens // groups, self.head_dim**-0.5)
        if permutation is not None:
            out = out.index_select(1, permutation.argsort())
        out, bias = self.join(out)
        return out.view(hidden.shape), bias

    @property
    def padding(self) -> int:
        """Zeros behind the dimensions of each head."""
        return -self.head_dim % HEAD_DIM_STEP

    def project(self, rows: Tensor) -> Tensor:
        """rows: [batch, tokens, hidden]; returns queries, keys and values, [batch, tokens, 3, heads, head_dim and
        padding]."""
        heads, padding = (3, self.num_heads, -1), self.padding
        if padding == 0:
            return apply_linear(rows, self.qkv).unflatten(-1, heads)
        if not is_plain(self.qkv, nn.Linear):
            return F.pad(self.qkv(rows).unflatten(-1, heads), (0, padding))
        weight: Tensor = F.pad(self.qkv.weight.unflatten(0, (-1, self.head_dim)), (0, 0, 0, padding))
        bias: Tensor | None = self.qkv.bias
        if bias is not None:
            bias = F.pad(bias.unflatten(0, (-1, self.head_dim)), (0, padding)).flatten()
        return linear(rows, weight.flatten(0, 1), bias).unflatten(-1, heads)

    def join(self, out: Tensor) -> tuple[Tensor, Tensor | None]:
        """out: [batch, tokens, heads * (head_dim + padding)]; returns the product with `self.out`, and its bias or
        None, as `forward`."""
        padding = self.padding
        if padding == 0:
            return product(out, self.out)
        heads = (self.num_heads, -1)
        if not is_plain(self.out, nn.Linear):
            return self.out(out.unflatten(-1, heads)[..., : self.head_dim].flatten(-2)), None
        weight = F.pad(self.out.weight.unflatten(1, heads), (0, padding)).flatten(1)
        if out.device.type == "cpu":
            return linear(out, weight, self.out.bias), None
        return F.linear(out, weight), self.out.bias

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}, groups={self.groups}, permute={self.permute!r}"


class GatedUnit(nn.Module):
    """W3 (LN(GELU(W1 n)) * LN(W2 n)) (Activator, arXiv 2405.15953, section 3).

    No token sees another one. W1 and W2 are one product, and one LayerNorm serves both factors.

    Args:
        hidden_size: channels of a token.
        intermediate_size: channels of each factor.
        eps: of the LayerNorm.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.up = nn.Linear(hidden_size, 2 * intermediate_size)
        self.activation = BiasActivation("gelu")
        self.norm = AddBiasResidualLayerNorm(intermediate_size, eps)
        self.down = nn.Linear(intermediate_size, hidden_size)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """hidden: [..., hidden]. Returns the product of the same shape and the bias [hidden] to be added, or None where
        it is added."""
        both, bias = product(hidden, self.up)
        first, second = both.chunk(2, -1)
        of_first, of_second = (None, None) if bias is None else bias.chunk(2)
        gate = self.norm(self.activation(first, of_first), None, None)
        return product(gate * self.norm(second, of_second, None), self.down)
