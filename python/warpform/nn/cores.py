"""What stands between the two products of a branch: attention with its cache, and activations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _autocast, ops
from ._key_ranges import attention_in_ranges
from .activations import BiasActivation
from .cache import KeyValueCache
from .rotary import Rotary, apply_rotary
from .stack import Step, normalise


class AttentionCore(nn.Module):
    """Attention over packed sequences: [T, (Hq + 2 Hkv) D], queries, keys and values side by side, to [T, Hq D].

    Args:
        num_heads: Hq.
        num_kv_heads: Hkv, which divides Hq; query head h reads key head h // (Hq / Hkv). None: Hq.
        head_dim: D, not tied to the width of the model.
        causal: a token sees itself and those before it. Else all of its sequence.
        window: a token sees at most so many keys, itself included, as `sliding_window` counts. None: no window.
        softmax_scale: None: D ** -0.5.
        rotary_share: the part of a head that rotary positions turn, its first dimensions; 0: no positions.
        rope_theta, rope_scaling: as of `nn.rotary.Rotary`.
        q_norm, k_norm: norms over the heads of queries and keys, called with [T, H, D] before they are turned.

    Raises:
        ValueError: heads that do not divide, a window below 1, a rotary part that is odd, a rope_scaling that is not
            supported.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int = 64,
        *,
        causal: bool = True,
        window: int | None = None,
        softmax_scale: float | None = None,
        rotary_share: float = 1.0,
        rope_theta: float = 10_000.0,
        rope_scaling: Mapping[str, Any] | None = None,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if kv_heads < 1 or num_heads % kv_heads:
            raise ValueError(f"AttentionCore: num_kv_heads must divide num_heads {num_heads}, got {kv_heads}")
        if window is not None and window < 1:
            raise ValueError(f"AttentionCore: window must be at least 1, itself, got {window}")
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, kv_heads, head_dim
        self.causal, self.window, self.softmax_scale = causal, window, softmax_scale
        if not 0 <= rotary_share <= 1:
            raise ValueError(f"AttentionCore: rotary_share must be from 0 to 1, got {rotary_share}")
        turned = int(head_dim * rotary_share)
        self.rotary = Rotary(turned, rope_theta, rope_scaling) if turned else None
        self.q_norm, self.k_norm = q_norm, k_norm

    @property
    def width(self) -> int:
        """Columns of the product that the core reads: (Hq + 2 Hkv) D."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def window_size(self) -> tuple[int, int]:
        """The window as `ops.varlen_attention` takes it: keys before and after a token, itself left out."""
        if self.window is None:
            return (-1, -1)
        return (self.window - 1, 0 if self.causal else self.window - 1)

    def split(self, product: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """product [T, width] -> queries and keys, turned, [T, Hq + Hkv, D], and values [T, Hkv, D]."""
        heads = product.unflatten(-1, (-1, self.head_dim))
        turning, value = heads.split((self.num_heads + self.num_kv_heads, self.num_kv_heads), 1)
        if self.q_norm is not None or self.k_norm is not None:
            query, key = turning.split((self.num_heads, self.num_kv_heads), 1)
            query = query if self.q_norm is None else normalise(self.q_norm, query, step)
            key = key if self.k_norm is None else normalise(self.k_norm, key, step)
            turning = torch.cat((query, key), 1)
        return self.turn(turning, step), value

    def turn(self, heads: Tensor, step: Step) -> Tensor:
        """heads [T, H, D], turned by their positions."""
        return heads if self.rotary is None else apply_rotary(heads, *step.rotary(self.rotary, heads.dtype))

    def forward(self, product: Tensor, step: Step, cache: KeyValueCache | None = None) -> Tensor:
        """product: [T, (Hq + 2 Hkv) D] -> [T, Hq D]; with a cache, keys and values are appended and all are seen.

        Raises:
            ValueError: a cache of other heads, dtype or device, or one without the places of tokens in the step.
        """
        turned, value = self.split(product, step)
        query, key = turned.split((self.num_heads, turned.size(1) - self.num_heads), 1)
        return self.attend(query, key, value, step, cache).flatten(1)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, step: Step, cache: KeyValueCache | None) -> Tensor:
        """Attention of query [T, Hq, D] to key [T, Hkv, D] and value [T, Hkv, Dv], and to the cache: [T, Hq, Dv]."""
        q_offsets = k_offsets = step.cu_seqlens
        longest = step.max_seqlen
        if cache is not None:
            places = step.places
            self._check_cache(cache, key)
            if places is None:
                raise ValueError("AttentionCore: a cache needs the places of new tokens; make the step by Step.after")
            key, value = cache.append(key, value, places)
            q_offsets, k_offsets, longest = places.cu_seqlens_q, places.cu_seqlens_k, places.max_seqlen_k
        if step.key_ranges is not None:
            return attention_in_ranges(query, key, value, q_offsets, k_offsets, step.key_ranges, self.softmax_scale)
        out = ops.varlen_attention(
            query,
            key,
            value,
            q_offsets,
            k_offsets,
            step.max_seqlen,
            longest,
            softmax_scale=self.softmax_scale,
            causal=self.causal,
            window_size=self.window_size,
        )
        return cast("Tensor", out)

    def cache(
        self, batch: int, capacity: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> KeyValueCache:
        """An empty cache for `batch` sequences of at most `capacity` tokens."""
        return KeyValueCache(batch, capacity, self.num_kv_heads, self.head_dim, device, dtype)

    def _check_cache(self, cache: Any, key: Tensor) -> None:
        heads = list(key.shape[1:])
        if not isinstance(cache, KeyValueCache) or list(cache.keys.shape[2:]) != heads:
            held = f"{list(cache.keys.shape[2:])}" if isinstance(cache, KeyValueCache) else type(cache).__name__
            raise ValueError(
                f"AttentionCore: the cache must hold keys of [heads, head_dim] {heads}, as one that this model made, "
                f"got {held}"
            )
        if cache.keys.dtype != key.dtype and not _autocast.enabled(key.device):
            raise ValueError(f"AttentionCore: the cache must hold {key.dtype} as the keys are, got {cache.keys.dtype}")
        if cache.keys.device != key.device:
            raise ValueError(
                f"AttentionCore: the cache must be on {key.device} as the keys are, got {cache.keys.device}"
            )

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, "
            f"causal={self.causal}, window={self.window}"
        )


class GatedActivation(nn.Module):
    """act(gate) * up of a product [T, 2 f] of gate and up side by side (GLU variants, arXiv 2002.05202): [T, f].

    Args:
        name: one of `ACTIVATIONS`; with "silu" it is SwiGLU.

    Attributes:
        rowwise: each row depends on itself alone.
    """

    rowwise = True

    def __init__(self, name: str = "silu") -> None:
        super().__init__()
        self.activation = None if name == "silu" else BiasActivation(name)

    def forward(self, product: Tensor, step: Step | None = None, cache: None = None) -> Tensor:
        """product: [..., 2 f] -> [..., f]."""
        return self.gated(*product.chunk(2, -1))

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """act(gate) * up, [..., f], where the two are not side by side."""
        if self.activation is not None:
            return self.activation(gate, None) * up
        gate = F.silu(gate)
        # In place where no gradient needs the factors.
        in_place = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
        return gate.mul_(up) if in_place else gate * up


class Activation(nn.Module):
    """act of a product [T, f], for a feed-forward branch without a gate.

    Args:
        name: one of `ACTIVATIONS`.

    Attributes:
        rowwise: each row depends on itself alone.
    """

    rowwise = True

    def __init__(self, name: str = "gelu") -> None:
        super().__init__()
        self.activation = BiasActivation(name)

    def forward(self, product: Tensor, step: Step | None = None, cache: None = None) -> Tensor:
        """product: [..., f] -> the same shape."""
        out: Tensor = self.activation(product, None)
        return out


__all__ = ["Activation", "AttentionCore", "GatedActivation"]
