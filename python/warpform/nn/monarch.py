"""Linear maps of block-diagonal and Monarch matrices (Monarch, arXiv 2204.00595), and the MLP of Monarch Mixer."""

from __future__ import annotations

import math
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ._product import is_plain
from .norm import AddBiasResidualLayerNorm

Self = TypeVar("Self", bound="MonarchLinear")


def _blocks(name: str, features: int, nblocks: int) -> int:
    """Features of a block: those that nblocks blocks need to hold all of them."""
    if features < 1 or nblocks < 1:
        raise ValueError(f"{name}: features and nblocks must be at least 1, got {features} and {nblocks}")
    return -(-features // nblocks)


class _BlockedLinear(nn.Module):
    """The base of both linear maps: features that blocks do not divide, and a bias that starts like `nn.Linear`'s.

    Where nblocks does not divide the features in, zeros are appended to them; features out beyond those asked for are
    cut. Either costs a copy.
    """

    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: bool, nblocks: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.nblocks = in_features, out_features, nblocks
        name = type(self).__name__
        self.in_block, self.out_block = _blocks(name, in_features, nblocks), _blocks(name, out_features, nblocks)
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def reset_parameters(self) -> None:
        """Uniform within 1 / sqrt(fan in), each factor by its own blocks and the bias by in_features."""
        for name, parameter in self.named_parameters():
            fan_in = self.in_features if name == "bias" else parameter.shape[-1]
            nn.init.uniform_(parameter, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The op, on x [..., nblocks * in_block]; bias [nblocks * out_block] or None."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features]; returns [..., out_features]."""
        missing = self.nblocks * self.in_block - self.in_features
        if missing:
            x = F.pad(x, (0, missing))
        if self.nblocks * self.out_block == self.out_features:
            return self.multiply(x, self.bias)
        out = self.multiply(x, None)[..., : self.out_features]
        return out.contiguous() if self.bias is None else out + self.bias.to(out.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, nblocks={self.nblocks}"


class BlockdiagLinear(_BlockedLinear):
    """x @ blockdiag(weight).T + bias: `nn.Linear` whose matrix is 0 outside of nblocks blocks.

    Args:
        in_features, out_features: widths; see above where nblocks does not divide them.
        bias: whether there is one.
        nblocks: blocks on the diagonal.

    Attributes:
        weight: [nblocks, out_features / nblocks, in_features / nblocks].

    Raises:
        ValueError: a width or nblocks below 1.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, nblocks: int = 4) -> None:
        super().__init__(in_features, out_features, bias, nblocks)
        self.weight = nn.Parameter(torch.empty(nblocks, self.out_block, self.in_block))
        self.reset_parameters()

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return ops.blockdiag_multiply(x, self.weight, bias)


class MonarchLinear(_BlockedLinear):
    """x @ M.T + bias for a Monarch matrix M: two block-diagonal factors with a permutation between them and after.

    Square n: 2 n^2 / nblocks parameters, 4 n^2 / nblocks FLOPs a token. See `ops.monarch_multiply` for the definition
    and `ops.project_to_monarch` for the nearest Monarch matrix to a dense one.

    Args:
        in_features, out_features: widths; see `BlockdiagLinear` where nblocks does not divide them.
        bias: whether there is one.
        nblocks: blocks of each factor. More blocks are fewer parameters.

    Attributes:
        blkdiag1, blkdiag2: the factors, with i and o the widths of a block: [nblocks, i, i] and [nblocks, o, i] where
            the map widens, else [nblocks, o, i] and [nblocks, o, o]. Names and shapes are those of the published code.

    Raises:
        ValueError: a width or nblocks below 1.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, nblocks: int = 4) -> None:
        super().__init__(in_features, out_features, bias, nblocks)
        i, o = self.in_block, self.out_block
        inner = min(i, o)
        self.blkdiag1 = nn.Parameter(torch.empty(nblocks, inner, i))
        self.blkdiag2 = nn.Parameter(torch.empty(nblocks, o, inner))
        self.reset_parameters()

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        out = ops.monarch_multiply(x, self.blkdiag1, self.blkdiag2)
        return out if bias is None else out + bias.to(out.dtype)

    @classmethod
    def from_dense(cls: type[Self], weight: Tensor, bias: Tensor | None = None, *, nblocks: int = 4) -> Self:
        """The nearest Monarch matrix, in the sum of squares, to a dense one; both are as in `nn.Linear`.

        Args:
            weight: [out_features, in_features].
            bias: [out_features], copied, or None.
            nblocks: blocks of each factor.

        Raises:
            ValueError: weight is not 2-D.
        """
        if weight.dim() != 2:
            raise ValueError(f"MonarchLinear.from_dense: weight must be 2-D, got shape {list(weight.shape)}")
        out_features, in_features = weight.shape
        # On the meta device: what would be drawn at random is set right away.
        with torch.device("meta"):
            linear = cls(in_features, out_features, bias is not None, nblocks)
        with torch.no_grad():
            behind = nblocks * linear.in_block - in_features, nblocks * linear.out_block - out_features
            dense = F.pad(weight.detach(), (0, behind[0], 0, behind[1]))
            factors = ops.project_to_monarch(dense, nblocks=nblocks)
            linear.blkdiag1, linear.blkdiag2 = (nn.Parameter(factor.contiguous()) for factor in factors)
            linear.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        return linear

    @classmethod
    def from_linear(cls: type[Self], linear: nn.Linear, *, nblocks: int = 4) -> Self:
        """Calls `from_dense` with the weight and the bias of an `nn.Linear`."""
        return cls.from_dense(linear.weight, linear.bias, nblocks=nblocks).train(linear.training)

    def to_dense(self) -> Tensor:
        """The matrix M, [out_features, in_features], differentiable."""
        eye = torch.eye(self.nblocks * self.in_block, device=self.blkdiag1.device, dtype=self.blkdiag1.dtype)
        return self.multiply(eye, None).t()[: self.out_features, : self.in_features]


class MonarchMixerMLP(nn.Module):
    """Monarch Mixer's MLP over channels (arXiv 2310.12109): LayerNorm(x + wo(GELU(a) * b)), (a, b) = gated_layers(x).

    Both products are block-diagonal, and all between norm and norm is one op, `ops.blockdiag_glu`. Parameters have the
    names of the published code.

    Args:
        hidden_size: d.
        intermediate_size: width of a and of b; None = 4 d.
        nblocks: blocks of both products, which divides both widths.
        eps: of the normalisation.
        dropout: in training only, on GELU(a) * b; then the op is taken apart.
        add_and_norm: False returns wo(GELU(a) * b) alone, for blocks that normalise before.

    Raises:
        ValueError: widths that nblocks does not divide.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int | None = None,
        *,
        nblocks: int = 4,
        eps: float = 1e-12,
        dropout: float = 0.0,
        add_and_norm: bool = True,
    ) -> None:
        super().__init__()
        inner = 4 * hidden_size if intermediate_size is None else intermediate_size
        for name, width in (("hidden_size", hidden_size), ("intermediate_size", inner)):
            if nblocks < 1 or width % nblocks:
                raise ValueError(f"MonarchMixerMLP: nblocks must divide {name} {width}, got {nblocks}")
        self.gated_layers = BlockdiagLinear(hidden_size, 2 * inner, bias=False, nblocks=nblocks)
        self.wo = BlockdiagLinear(inner, hidden_size, nblocks=nblocks)
        self.layernorm = AddBiasResidualLayerNorm(hidden_size, eps) if add_and_norm else None
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., hidden]; returns the same shape."""
        plain = is_plain(self.wo, BlockdiagLinear)
        # The bias is added where the sum is made anyhow.
        late = self.wo.bias if plain and self.layernorm is not None else None
        if plain and is_plain(self.gated_layers, BlockdiagLinear) and not (self.training and self.dropout > 0.0):
            out = ops.blockdiag_glu(x, self.gated_layers.weight, self.wo.weight, self.wo.bias if late is None else None)
        else:
            a, b = self.gated_layers(x).chunk(2, dim=-1)
            inner = F.dropout(F.gelu(a) * b, self.dropout, training=self.training)
            out = self.wo(inner) if late is None else ops.blockdiag_multiply(inner, self.wo.weight, None)
        return cast("Tensor", out if self.layernorm is None else self.layernorm(out, late, x))
