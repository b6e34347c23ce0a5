"""Token mixers of vision backbones, for `MetaFormerBlock`: [batch, *grid, channels] -> (product, bias or None)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _autocast, ops
from ..packing import Packing
from ._offsets import equal_offsets
from ._product import apply_linear, is_plain, linear, product
from .activations import BiasActivation
from .metaformer import SampleNorm
from .norm import AddBiasResidualLayerNorm
from .patch_embedding import embed_patches

__all__ = ["GatedUnit", "GroupedAttention", "MaskUnitAttention", "PoolMixer", "StridedAttention"]

# The longest run that `ops.window_attention` takes on a GPU, where the window lies along one axis.
LONGEST_RUN = 1024
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
    if length <= LONGEST_RUN:
        return ops.window_attention(qkv.unsqueeze(1), window_size=(1, length), scale=scale).squeeze(1)
    q, k, v = qkv.flatten(0, 1).unbind(1)
    offsets = equal_offsets(qkv, q.shape[0] // length, length)
    out = ops.varlen_attention(q, k, v, offsets, offsets, length, length, softmax_scale=scale)
    return cast("Tensor", out).flatten(1).view(*qkv.shape[:2], qkv.shape[3] * qkv.shape[4])


def check_grid(name: str, hidden: Tensor) -> None:
    """Raises ValueError where hidden is not [batch, height, width, channels]; `name` begins the message."""
    if hidden.dim() != 4:
        raise ValueError(f"{name}: hidden must be [batch, height, width, channels], got shape {list(hidden.shape)}")


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
        """hidden: [batch, height, width, channels]; returns the same shape, and None as there is no bias.

        Raises:
            ValueError: hidden of another shape.
        """
        check_grid("PoolMixer", hidden)
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
        sample_norm = cast("SampleNorm", norm)
        weight: Tensor = sample_norm.weight
        bias = sample_norm.bias
        if torch.is_grad_enabled() and bias.requires_grad:
            weight = torch.add(weight, bias, alpha=0.0)
        how: dict[str, Any] = {"pool_size": self.pool_size, "eps": sample_norm.eps}
        if not _autocast.enabled(hidden.device):
            return ops.pool_mixer(hidden, weight, scale, **how)
        # Autocast would round the stream, where a layer scale of 1e-5 adds less than a unit of bfloat16.
        with _autocast.off(hidden.device):
            return ops.pool_mixer(hidden, weight, scale, **how)

    def extra_repr(self) -> str:
        return f"{self.pool_size}"


class StridedAttention(nn.Module):
    """Self-attention whose keys and values are those of a coarser grid (SegFormer, arXiv 2105.15203, section 3.1).

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
            ValueError: hidden of another shape, a grid smaller than the stride, which has no keys.
            NotImplementedError: training mode with attention dropout above 0.
        """
        check_grid("StridedAttention", hidden)
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
        mixed = cast("Tensor", ops.varlen_attention(query, key, value, q_offsets, k_offsets, queries, keys))
        return product(mixed.view(hidden.shape), self.out)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}, stride={self.stride}"


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

        Raises:
            ValueError: hidden of another shape, or with an n that run or pool does not divide.
        """
        name = type(self).__name__
        if hidden.dim() != 4:
            raise ValueError(f"{name}: hidden must be [batch, units, n, channels], got shape {list(hidden.shape)}")
        for of, divisor in (("run", self.run), ("pool", self.pool)):
            if divisor is not None and hidden.shape[2] % divisor:
                raise ValueError(
                    f"{name}: hidden must have a number of tokens a unit that {of} {divisor} divides, "
                    f"got {hidden.shape[2]}"
                )
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
        q = max_of_runs(q.flatten(3), self.pool).unflatten(3, q.shape[3:])
        pooled = tokens // self.pool
        if self.run is None and packing is not None:
            keys = packing.max_seqlen * tokens  # of the image with the most units
            q_offsets, k_offsets = packing.cu_seqlens * pooled, packing.cu_seqlens * tokens
        else:
            keys = units * tokens if self.run is None else self.run
            count = batch if self.run is None else batch * units * (tokens // self.run)
            q_offsets, k_offsets = (equal_offsets(qkv, count, length) for length in (keys // self.pool, keys))
        q, k, v = q.flatten(0, 2), k.flatten(0, 2), v.flatten(0, 2)
        out = ops.varlen_attention(q, k, v, q_offsets, k_offsets, keys // self.pool, keys)
        return cast("Tensor", out).view(batch, units, pooled, self.num_heads * self.head_dim)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}, run={self.run}, pool={self.pool}"
