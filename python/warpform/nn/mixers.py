"""Token mixers of vision backbones, for `MetaFormerBlock`: a grid of tokens [batch, height, width, channels] goes in.

Each returns a product of the same shape, and a bias [channels] that is still to be added, or None.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _torch_private, ops
from ._product import apply_linear, is_plain, product
from .metaformer import SampleNorm
from .norm import AddBiasResidualLayerNorm
from .patch_embedding import embed_patches

__all__ = ["PoolMixer", "StridedAttention"]


class PoolMixer(nn.Module):
    """The mean over the neighbours of a token, minus the token (PoolFormer, arXiv 2111.11418, equation 4).

    Neighbours outside of the grid do not count. It has no parameters. In a block with the norm "group" the whole half,
    norm, mixer, layer scale and residual, is one operation, `ops.pool_mixer`.

    Args:
        pool_size: the side of the neighbourhood, odd.

    Raises:
        ValueError: pool_size is even or below 1.
    """

    def __init__(self, pool_size: int = 3) -> None:
        super().__init__()
        if pool_size < 1 or pool_size % 2 == 0:
            raise ValueError(f"PoolMixer: pool_size must be an odd number of at least 1, got {pool_size}")
        self.pool_size = pool_size

    def forward(self, hidden: Tensor) -> tuple[Tensor, None]:
        """hidden: [batch, height, width, channels]; returns the same shape, and None as there is no bias."""
        size = self.pool_size
        pooled = F.avg_pool2d(hidden.permute(0, 3, 1, 2), size, 1, size // 2, count_include_pad=False)
        return pooled.permute(0, 2, 3, 1) - hidden, None

    def residual(self, hidden: Tensor, norm: nn.Module, scale: Tensor | None) -> Tensor | None:
        """hidden + scale * mixer(norm(hidden)) in one operation, or None where it is not that of `ops.pool_mixer`.

        The norm's bias changes nothing, since the mean over neighbours minus a token of a constant is 0. Its gradient
        is 0, rather than none, so that data-parallel training and weight decay treat it as they do every parameter.

        Args:
            hidden: [batch, height, width, channels].
            norm: a `SampleNorm`; with hooks, or of another class, it has to be called.
            scale: [channels] or None.
        """
        if hidden.dim() != 4 or not is_plain(self, PoolMixer) or not is_plain(norm, SampleNorm):
            return None
        weight, bias = norm.weight, norm.bias
        if torch.is_grad_enabled() and bias.requires_grad:
            weight = torch.add(weight, bias, alpha=0.0)
        return ops.pool_mixer(hidden, weight, scale, pool_size=self.pool_size, eps=norm.eps)

    def extra_repr(self) -> str:
        return f"{self.pool_size}"


class StridedAttention(nn.Module):
    """Self-attention of all tokens, whose keys and values are those of a coarser grid (SegFormer, arXiv 2105.15203, 3.1).

    Keys and values are made from LayerNorm(convolution(x)), where the convolution has the stride as its kernel. So N
    tokens attend to N / stride^2. Rows and columns at the end that the stride does not divide are in no key.

    Args:
        hidden_size: channels of a token; num_heads must divide it.
        num_heads: heads.
        stride: tokens of the grid along an axis to one key; with 1 there is neither convolution nor LayerNorm.
        bias: whether queries, keys and values have a bias.
        attention_dropout: dropout on the probabilities. The fused attention keeps none, so a value above 0 raises in
            training mode.
        eps: of the LayerNorm.

    Raises:
        ValueError: num_heads does not divide hidden_size, a stride below 1.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        stride: int = 1,
        *,
        bias: bool = True,
        attention_dropout: float = 0.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if num_heads <= 0 or hidden_size % num_heads != 0:
            raise ValueError(f"StridedAttention: num_heads must divide hidden_size {hidden_size}, got {num_heads}")
        if stride < 1:
            raise ValueError(f"StridedAttention: stride must be at least 1, got {stride}")
        self.num_heads, self.head_dim, self.stride = num_heads, hidden_size // num_heads, stride
        self.attention_dropout = attention_dropout
        self.query = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.key_value = nn.Linear(hidden_size, 2 * hidden_size, bias=bias)
        self.out = nn.Linear(hidden_size, hidden_size)
        self.reduction = nn.Conv2d(hidden_size, hidden_size, stride, stride) if stride > 1 else None
        self.reduction_norm = AddBiasResidualLayerNorm(hidden_size, eps) if stride > 1 else None

    def reduce(self, hidden: Tensor) -> Tensor:
        """hidden: [batch, height, width, channels]; returns the grid of keys, [batch, rows, columns, channels]."""
        if self.reduction is None or self.reduction_norm is None:
            return hidden
        rows, columns = (size // self.stride * self.stride for size in hidden.shape[1:3])
        coarse = embed_patches(hidden[:, :rows, :columns], self.reduction, channels_last=True)
        normal: Tensor = self.reduction_norm(coarse, None, None)
        return normal

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """hidden: [batch, height, width, channels]. Returns the product of the same shape and the bias [channels] to be
        added, or None where it is added.

        Raises:
            ValueError: a grid smaller than the stride, which has no keys.
            NotImplementedError: training mode with attention dropout above 0.
        """
        if self.training and self.attention_dropout > 0.0:
            raise NotImplementedError(
                f"attention_probs_dropout_prob is {self.attention_dropout}, and attention dropout is not supported in "
                "training mode: set attention_probs_dropout_prob=0.0 in the config, or call eval()"
            )
        batch, height, width = hidden.shape[:3]
        if min(height, width) < self.stride:
            raise ValueError(
                f"StridedAttention: hidden must have a grid of at least {self.stride} x {self.stride} tokens, "
                f"got {height} x {width}"
            )
        queries, keys = height * width, (height // self.stride) * (width // self.stride)
        query = apply_linear(hidden, self.query).view(batch * queries, self.num_heads, self.head_dim)
        both = apply_linear(self.reduce(hidden), self.key_value)
        key, value = both.view(batch * keys, 2, self.num_heads, self.head_dim).unbind(1)
        q_offsets = equal_offsets(hidden, batch, queries)
        k_offsets = q_offsets if keys == queries else equal_offsets(hidden, batch, keys)
        mixed = ops.varlen_attention(query, key, value, q_offsets, k_offsets, queries, keys)
        assert isinstance(mixed, Tensor)
        return product(mixed.view(hidden.shape), self.out)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}, stride={self.stride}"


def equal_offsets(x: Tensor, batch: int, length: int) -> Tensor:
    """cu_seqlens of `batch` sequences of `length` rows each: 0, length, ..., batch * length, int32 [batch + 1] beside x.

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
