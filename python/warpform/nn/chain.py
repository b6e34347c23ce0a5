"""Chains of hidden dimensions, each of which sees itself and those before it (Chain-of-Model, arXiv 2505.11820).

A width is divided into n chains. In every module here chain i of what comes out depends on the chains 1 to i of what
goes in alone. So the first chains are a smaller model within the whole. Every module keeps a weight for each chain, and
runs the first `chains` of them: nothing of later chains is read or multiplied then, and input and output have the width
of the first chains.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _autocast, _torch_private, ops
from ._product import PLAIN_TENSORS, add_linear_, linear, records
from .cache import KeyValueCache
from .cores import AttentionCore, GatedActivation
from .stack import Step


class _Chains(nn.Module):
    """A module with a weight for each chain. What it computes depends on `Step.chains`.

    Args:
        **sizes: for each name the widths of the chains, which become an attribute.

    Raises:
        ValueError: no chains, another number of them, or a width below 1.
    """

    def __init__(self, **sizes: Sequence[int]) -> None:
        super().__init__()
        self.num_chains = len(next(iter(sizes.values())))
        for name, widths in sizes.items():
            setattr(self, name, tuple(widths))
            if len(widths) != self.num_chains or min(widths, default=0) < 1:
                many = f"{self.num_chains} numbers" if self.num_chains else "numbers, one for each chain,"
                raise ValueError(f"{type(self).__name__}: {name} must be {many} of at least 1, got {list(widths)}")

    def count(self, chains: int | None) -> int:
        """The number of chains in use; None: all.

        Raises:
            ValueError: 0, or more than there are.
        """
        return checked_chains(type(self).__name__, chains, self.num_chains)

    def at_step(self, x: Tensor, step: Step) -> Tensor:
        """The module called with the chains of the step."""
        out: Tensor = self(x, step.chains)
        return out

    def check_width(self, x: Tensor, width: int) -> None:
        """Raises ValueError where x is not [..., width]."""
        if x.dim() == 0 or x.shape[-1] != width:
            raise ValueError(f"{type(self).__name__}: x must be of shape [..., {width}], got {list(x.shape)}")


def checked_chains(name: str, chains: int | None, there_are: int, argument: str = "chains") -> int:
    """`chains`, or all that there are for None. `name` and `argument` begin the message of the error.

    Raises:
        ValueError: 0, or more than there are.
    """
    if chains is None:
        return there_are
    if isinstance(chains, bool) or not isinstance(chains, int) or not 1 <= chains <= there_are:
        raise ValueError(f"{name}: {argument} must be an integer from 1 to {there_are}, got {chains!r}")
    return chains


def _join(parts: Sequence[Tensor], dim: int = -1) -> Tensor:
    """The chains side by side."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


class ChainLinear(_Chains):
    """y_i = W_i x_<=i + b_i for each chain i, side by side: a block lower-triangular weight (equation 2 of the paper).

    The product is one dense product for each chain, with a prefix of the input. In the backward pass the gradients of
    the prefixes, which overlap, are added up in place. A weight that is frozen gets no gradient, and none is computed.

    Args:
        in_sizes, out_sizes: the widths of the chains before and behind, as many of the one as of the other.
        bias: whether there are biases.

    Attributes:
        weights: for each chain i [out_sizes[i], sum of in_sizes up to i].
        biases: for each chain [out_sizes[i]], or None.

    Raises:
        ValueError: another number of widths before than behind, or a width below 1.
    """

    in_sizes: tuple[int, ...]
    out_sizes: tuple[int, ...]

    def __init__(self, in_sizes: Sequence[int], out_sizes: Sequence[int], bias: bool = False) -> None:
        super().__init__(in_sizes=in_sizes, out_sizes=out_sizes)
        shapes = [(out, sum(self.in_sizes[: i + 1])) for i, out in enumerate(self.out_sizes)]
        self.weights = nn.ParameterList(nn.Parameter(torch.empty(shape)) for shape in shapes)
        self.biases = nn.ParameterList(nn.Parameter(torch.empty(out)) for out, _ in shapes) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights of each chain as `nn.Linear` does."""
        for i, weight in enumerate(self.weights):
            bound = weight.size(1) ** -0.5
            for parameter in (weight,) if self.biases is None else (weight, self.biases[i]):
                nn.init.uniform_(parameter, -bound, bound)

    def dense(self) -> Tensor:
        """The weight of all chains with its zeros, [sum of out_sizes, sum of in_sizes]; gradients go through it."""
        width = sum(self.in_sizes)
        return torch.cat([F.pad(weight, (0, width - weight.size(1))) for weight in self.weights])

    def forward(self, x: Tensor, chains: int | None = None) -> Tensor:
        """x: [..., in] -> [..., out].

        Args:
            x: the chains in use side by side, strided or not.
            chains: how many of the first are in use. None: all.

        Raises:
            ValueError: another width, or chains that there are not.
        """
        n = self.count(chains)
        weights = list(self.weights)[:n]
        biases = [None] * n if self.biases is None else list(self.biases)[:n]
        self.check_width(x, weights[-1].size(1))
        if n > 1 and records(x, *weights, *biases) and _is_seen_by_autograd_alone(x, *weights, *biases):
            out: Tensor = _ChainProduct.apply(x.reshape(-1, x.shape[-1]), n, *weights, *biases)
            return out.view(*x.shape[:-1], -1) if x.dim() != 2 else out
        return _products(x, weights, biases)

    def extra_repr(self) -> str:
        return f"in_sizes={self.in_sizes}, out_sizes={self.out_sizes}, bias={self.biases is not None}"


def _products(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    """x [..., in] times each weight [out_i, in_<=i], with a prefix of x: [..., sum of out_i]."""
    pairs = zip(weights, biases, strict=True)
    return _join([linear(x[..., : weight.size(1)], weight, bias) for weight, bias in pairs])


def _is_seen_by_autograd_alone(*tensors: Tensor | None) -> bool:
    """Tells whether no compiler, mode, transform or subclass of tensors sees a call with the tensors."""
    return (
        not torch.compiler.is_compiling()
        and not _torch_private.sees_calls()
        and all(t is None or type(t) in PLAIN_TENSORS for t in tensors)
    )


class _ChainProduct(torch.autograd.Function):
    """`_products` of x [rows, in]. Its gradient is made of `linear`, so that it has gradients in turn.

    Autograd by itself would make a gradient as large as x, with zeros, for each of the prefixes.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, n: int, *parameters: Tensor | None) -> Tensor:
        weights, need_x, need_weights = parameters[:n], ctx.needs_input_grad[0], ctx.needs_input_grad[2 : 2 + n]
        ctx.save_for_backward(x if any(need_weights) else None, *(weights if need_x else [None] * n))
        ctx.sizes = [weight.shape for weight in weights]  # type: ignore[union-attr]
        return _products(x, weights, parameters[n:])  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        n = len(weights)
        douts = gradients[0].split([out for out, _ in ctx.sizes], 1)
        dx = None
        if ctx.needs_input_grad[0]:
            # The longest prefix, which is all of x, comes first; the others are added into it.
            dx = linear(douts[-1], weights[-1].t())
            for dout, weight in zip(douts[-2::-1], weights[-2::-1], strict=True):
                add_linear_(dx[:, : weight.size(1)], dout, weight.t())
        need_weights, need_biases = ctx.needs_input_grad[2 : 2 + n], ctx.needs_input_grad[2 + n :]
        dweights = [
            linear(dout.t(), x[:, :width].t()) if needed else None
            for dout, (_, width), needed in zip(douts, ctx.sizes, need_weights, strict=True)
        ]
        dbiases = [dout.sum(0) if needed else None for dout, needed in zip(douts, need_biases, strict=True)]
        return dx, None, *dweights, *dbiases


class ChainRMSNorm(_Chains):
    """RMSNorm of each chain by itself (arXiv 1910.07467): one over all chains would let later ones into the first.

    Args:
        sizes: the widths of the chains.
        eps: added to the mean square.

    Attributes:
        weights: for each chain [sizes[i]].

    Raises:
        ValueError: no chains, or a width below 1.
    """

    sizes: tuple[int, ...]

    def __init__(self, sizes: Sequence[int], eps: float = 1e-6) -> None:
        super().__init__(sizes=sizes)
        self.eps = eps
        self.weights = nn.ParameterList(nn.Parameter(torch.ones(size)) for size in self.sizes)

    def forward(self, x: Tensor, chains: int | None = None) -> Tensor:
        """x: [..., width] -> the same shape.

        Args:
            x: the chains in use side by side.
            chains: how many of the first are in use. None: all.

        Raises:
            ValueError: another width, or chains that there are not.
        """
        sizes = self.sizes[: self.count(chains)]
        self.check_width(x, sum(sizes))
        parts = zip(x.split(sizes, -1), self.weights, strict=False)
        # As other norms of a stack: a stream in float32 stays in float32.
        with _autocast.off(x.device) if _autocast.enabled(x.device) else contextlib.nullcontext():
            return _join([cast("Tensor", ops.add_residual_rms_norm(part, None, w, self.eps)) for part, w in parts])

    def extra_repr(self) -> str:
        return f"sizes={self.sizes}, eps={self.eps}"


class ChainEmbedding(_Chains):
    """A table of tokens of which each chain has its columns.

    Args:
        num_embeddings: tokens.
        sizes: the widths of the chains.

    Attributes:
        weights: for each chain [num_embeddings, sizes[i]].

    Raises:
        ValueError: no chains, or a width below 1.
    """

    sizes: tuple[int, ...]

    def __init__(self, num_embeddings: int, sizes: Sequence[int]) -> None:
        super().__init__(sizes=sizes)
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(num_embeddings, size)) for size in self.sizes)

    def forward(self, ids: Tensor, chains: int | None = None) -> Tensor:
        """ids: int64 [...] -> [..., width of the chains in use]; chains None: all."""
        return _join([F.embedding(ids, weight) for weight in list(self.weights)[: self.count(chains)]])

    def extra_repr(self) -> str:
        return f"{self.weights[0].size(0)}, sizes={self.sizes}"


class ChainHead(_Chains):
    """The logits of every chain in one pass: logits_i = sum over j up to i of x_j H_j^T.

    Args:
        sizes: the widths of the chains.
        num_classes: logits.

    Attributes:
        weights: for each chain [num_classes, sizes[i]].

    Raises:
        ValueError: no chains, or a width below 1.
    """

    sizes: tuple[int, ...]

    def __init__(self, sizes: Sequence[int], num_classes: int) -> None:
        super().__init__(sizes=sizes)
        self.weights = nn.ParameterList(nn.Parameter(torch.empty(num_classes, size)) for size in self.sizes)
        for weight in self.weights:
            nn.init.uniform_(weight, -(sum(self.sizes) ** -0.5), sum(self.sizes) ** -0.5)

    def of_each(self, x: Tensor, chains: int | None = None) -> list[Tensor]:
        """x: [..., width] -> for each chain in use its logits, [..., num_classes]; chains None: all."""
        return self._sums(x, self._weights(x, chains))

    def forward(self, x: Tensor, chains: int | None = None) -> Tensor:
        """x: [..., width] -> the logits of the last chain in use, [..., num_classes]; chains None: all."""
        weights = self._weights(x, chains)
        recorded = records(x, *weights)
        if x.device.type == "cpu" and not recorded and _is_seen_by_autograd_alone(x, *weights):
            # Logits of many rows fill more memory than the cache has, so each product adds into the same ones.
            first, *others = x.reshape(-1, x.shape[-1]).split([weight.size(1) for weight in weights], -1)
            out = linear(first, weights[0])
            for part, weight in zip(others, weights[1:], strict=True):
                add_linear_(out, part, weight)
            return out.resize_(*x.shape[:-1], out.shape[-1])
        # Logits of more rows than the width are larger than the weight, and one product saves sums of them. A frozen
        # weight needs its own product, to be left out of the gradient. What is compiled must serve any number of rows.
        alike = not recorded or len({weight.requires_grad for weight in weights}) == 1
        if alike and not torch.compiler.is_compiling() and x.numel() > x.shape[-1] ** 2:
            return linear(x, _join(weights))
        return self._sums(x, weights)[-1]

    def _weights(self, x: Tensor, chains: int | None) -> list[Tensor]:
        weights = list(self.weights)[: self.count(chains)]
        self.check_width(x, sum(weight.size(1) for weight in weights))
        return weights

    @staticmethod
    def _sums(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
        """The logits of each chain."""
        parts = x.split([weight.size(1) for weight in weights], -1)
        return list(itertools.accumulate(linear(part, weight) for part, weight in zip(parts, weights, strict=True)))

    def extra_repr(self) -> str:
        return f"sizes={self.sizes}, {self.weights[0].size(0)}"


class ChainAttentionCore(AttentionCore):
    """Attention whose heads belong to chains: those of a chain see the keys of that chain, or with share_kv of chain 1.

    The product that it reads has the chains one after the other, each with its queries, keys and values side by side.
    `Step.chains` says how many of the first there are.

    Args:
        heads: heads of queries of each chain.
        kv_heads: heads of keys and values of each chain, with the same ratio everywhere; with share_kv (CoLM-Air) those
            of the first chain and 0 for the others.
        head_dim: D.
        share_kv: head r of a chain reads key head r mod kv_heads[0] of the first chain.
        **options: of `AttentionCore`, but for norms of queries and keys.

    Attributes:
        widths: the columns of each chain in the product.

    Raises:
        ValueError: heads that do not fit; and as `AttentionCore`.
    """

    def __init__(
        self,
        heads: Sequence[int],
        kv_heads: Sequence[int],
        head_dim: int = 64,
        *,
        share_kv: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(sum(heads), sum(kv_heads), head_dim, **options)
        self.heads, self.kv_heads, self.share_kv = tuple(heads), tuple(kv_heads), share_kv
        if share_kv:
            rule = "be those of the first chain alone and divide the heads of every chain,"
            fits = not any(kv_heads[1:]) and not any(count % kv_heads[0] for count in heads)
        else:
            rule, ratio = "have the same ratio to the heads of every chain,", self.num_heads // self.num_kv_heads
            fits = self.heads == tuple(ratio * count for count in kv_heads)
        if not fits:
            raise ValueError(f"ChainAttentionCore: kv_heads must {rule} {list(heads)}, got {list(kv_heads)}")

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple((q + 2 * kv) * self.head_dim for q, kv in zip(self.heads, self.kv_heads, strict=True))

    def forward(self, product: Tensor, step: Step, cache: KeyValueCache | None = None) -> Tensor:
        """product: [T, sum of widths of the chains in use] -> [T, their heads * D].

        A cache holds the keys and values of all chains, or with share_kv of chain 1. Where fewer chains are in use, its
        other heads stay as they are.
        """
        n = checked_chains("ChainAttentionCore", step.chains, len(self.heads))
        queries, keys = sum(self.heads[:n]), sum(self.kv_heads[:n])
        sizes = [size for q, kv in zip(self.heads[:n], self.kv_heads[:n], strict=True) for size in (q, kv, kv)]
        parts = product.unflatten(-1, (-1, self.head_dim)).split(sizes, 1)
        turned = self.turn(torch.cat((*parts[0::3], *parts[1::3]), 1), step)
        query, key = turned.split((queries, keys), 1)
        value = _join(parts[2::3], 1)
        if cache is not None and keys < self.num_kv_heads:
            cache = _first_heads(cache, keys)
        if not self.share_kv:
            return self.attend(query, key, value, step, cache).flatten(1)
        # The first kv heads of a chain are the heads 0, 1, ... of keys, and so on: attention wants those of a key
        # together. Chains begin at multiples of the number of keys.
        query = query.unflatten(1, (-1, keys)).transpose(1, 2).flatten(1, 2)
        out = self.attend(query, key, value, step, cache)
        return out.unflatten(1, (keys, -1)).transpose(1, 2).flatten(1)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, kv_heads={self.kv_heads}, share_kv={self.share_kv}, head_dim={self.head_dim}"


def _first_heads(cache: KeyValueCache, heads: int) -> KeyValueCache:
    """The first heads of a cache, in the same memory."""
    first = copy.copy(cache)
    first.keys, first.values = cache.keys[:, :, :heads], cache.values[:, :, :heads]
    return first


class ChainGatedActivation(GatedActivation):
    """act(gate) * up of each chain; the chains stand one after the other, each with its gate and up side by side.

    Args:
        sizes: the widths of the chains behind it.
        name: one of `ACTIVATIONS`.
    """

    def __init__(self, sizes: Sequence[int], name: str = "silu") -> None:
        super().__init__(name)
        self.sizes = tuple(sizes)

    def forward(self, product: Tensor, step: Step | None = None, cache: None = None) -> Tensor:
        """product: [..., 2 f], f the width of the chains in use -> [..., f]."""
        n = checked_chains("ChainGatedActivation", None if step is None else step.chains, len(self.sizes))
        parts = product.split([2 * size for size in self.sizes[:n]], -1)
        return _join([self.gated(*part.chunk(2, -1)) for part in parts])
