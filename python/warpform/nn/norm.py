"""LayerNorm or RMSNorm of a residual sum, together with the bias of the product before it."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..ops._dtypes import accumulation_dtype
from ._product import is_plain


class AddBiasResidualLayerNorm(nn.Module):
    """LayerNorm(dropout(x + bias) + residual), in one pass over the memory.

    Args:
        hidden_size: N, the width of a row.
        eps: the model's own.
        dropout: probability, in training only. Dropout acts between the bias and the residual, so then the sum with the
            bias is made first and the fused operation gets the rest.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-12, dropout: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size))
        self.eps = eps
        self.dropout = dropout

    def forward(
        self, x: Tensor, bias: Tensor | None, residual: Tensor | None, *, return_sum: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x, residual: [..., N]; bias: [N]; returns [..., N], and with return_sum the sum that was normalised too."""
        if self.training and self.dropout > 0.0:
            x = F.dropout(x if bias is None else x + bias, self.dropout, training=True)
            bias = None
        return ops.add_bias_residual_layer_norm(
            x, bias, residual, self.weight, self.bias, self.eps, return_sum=return_sum
        )

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, dropout={self.dropout}"


def norm_of_sum(norm: nn.Module, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """What a block that normalises first needs: the normalised sum, and the sum, which the next block adds to.

    Args:
        norm: `nn.LayerNorm` or `nn.RMSNorm`, which are fused with the sum, or a module that takes their place and is
            called on the sum.
        x, residual: [..., N].
        bias: [N].

    Returns:
        norm(x + bias + residual) and x + bias + residual, each [..., N]; None adds nothing.
    """
    if not is_fused_norm(norm):
        for term in (bias, residual):
            x = x if term is None else x + term
        return norm(x), x
    if isinstance(norm, nn.RMSNorm):
        x = x if bias is None else x + bias
        # As torch has it where no eps is given.
        eps = torch.finfo(accumulation_dtype(x.dtype)).eps if norm.eps is None else norm.eps
        if residual is None:
            return cast("Tensor", ops.add_residual_rms_norm(x, None, norm.weight, eps)), x
        return cast("tuple[Tensor, Tensor]", ops.add_residual_rms_norm(x, residual, norm.weight, eps, return_sum=True))
    plain = cast("nn.LayerNorm", norm)
    if bias is None and residual is None:
        # By the same operation as with a sum, so that it does not matter to the last bit who made the sum.
        out = ops.add_bias_residual_layer_norm(x, None, None, plain.weight, plain.bias, plain.eps)
        return cast("Tensor", out), x
    out = ops.add_bias_residual_layer_norm(x, bias, residual, plain.weight, plain.bias, plain.eps, return_sum=True)
    return cast("tuple[Tensor, Tensor]", out)


def is_fused_norm(norm: nn.Module) -> bool:
    """Tells whether `norm_of_sum` makes one pass of the sum and this norm: over one dimension, with all parameters."""
    if is_plain(norm, nn.RMSNorm):
        return norm.weight is not None and len(cast("nn.RMSNorm", norm).normalized_shape) == 1
    return (
        is_plain(norm, nn.LayerNorm)
        and norm.weight is not None
        and norm.bias is not None
        and len(cast("nn.LayerNorm", norm).normalized_shape) == 1
    )
