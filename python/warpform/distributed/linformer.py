"""Linformer's attention (arXiv 2006.04768) on a ring (arXiv 2105.13120, section 4.3): cost and memory linear in L / N.

Keys and values of the whole sequence are projected to K rows, K' = E K and V' = F V. Each rank projects its own rows
with its own columns of E and F, and what the ranks sum up are K x D matrices, whatever the length: every term of a
rank's time and memory that has the length in it is divided by N.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import _check
from . import _collectives
from ._agreement import agree, choose, finish
from ._group import LocalGroup, Ring, execute, name_of
from ._register import register_op
from ._transport import Steps


def _sum_steps(ring: Ring, x: Tensor, *, group: str) -> Steps[Tensor]:
    """The sum of x over all ranks, the same bits on each: every rank sums an N-th, then all gather them."""
    op = "linformer_attention"
    check = choose(op, None, x.device)
    yield from agree(ring, op, {"projected k, v": _check.describe(x)}, group=group, check=check, device=x.device)
    flat = x.flatten()
    length = -(-flat.numel() // ring.size)
    parts = F.pad(flat, (0, length * ring.size - flat.numel())).view(ring.size, length)
    total = yield from _collectives.reduce_scatter(ring, parts)
    parts = yield from _collectives.gather(ring, total)
    yield from finish(ring, check=check, device=x.device)
    return parts.flatten()[: flat.numel()].view_as(x).clone()


def _sum(x: Tensor, group: str, timeout: float | None) -> Any:
    return execute("linformer_attention", group, timeout, _sum_steps, x, group=group)


def _sum_fake(x: Tensor, group: str, timeout: float | None) -> Tensor:
    return x.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.how = inputs[1:]


def _gradient(ctx: Any, dtotal: Tensor) -> tuple[Tensor | None, ...]:
    # Every rank's loss depends on the sum, so the gradient of a part of it is the sum of the gradients.
    return _ring_sum(dtotal, *ctx.how), None, None


_ring_sum = register_op(
    "ring_sum(Tensor x, str group, float? timeout) -> Tensor",
    _sum,
    fake=_sum_fake,
    backward=_gradient,
    setup_context=_setup,
)


def linformer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_projection: Tensor,
    value_projection: Tensor,
    *,
    group: Any = None,
    softmax_scale: float | None = None,
    timeout: float | None = None,
) -> Tensor:
    """softmax(scale Q (E K)^T) F V of this rank's queries (arXiv 2006.04768, equation 7).

    Not causal, for E and F mix all positions. The projections are those of the rows that this rank holds, in the layout
    that it holds them; any layout does.

    Args:
        q: [B, L/N, H, D]. With a LocalGroup all tensors have one dimension more in front, the ranks.
        k, v: [B, L/N, Hkv, D], of q's dtype; Hkv divides H.
        key_projection, value_projection: [K, L/N], this rank's columns of E and F, shared by heads.
        group: the ranks that share the sequence, as in `ring_attention`. None: this rank has all of it.
        softmax_scale: None is 1 / sqrt(D).
        timeout: seconds that a message may take; None: the group's own.

    Returns:
        [B, L/N, H, D] of q's dtype.

    Raises:
        TypeError, ValueError: not a tensor, dtypes or shapes that do not fit.
        RingMismatchError: ranks differ in batch, K, heads, head_dim or dtype; all of them raise it.
        RingError: a rank is gone or late.
    """
    op = "linformer_attention"
    local = isinstance(group, LocalGroup)
    _check_inputs(op, group, q, k, v, key_projection, value_projection)
    # Both projections of all heads, summed over ranks in one go.
    parts = [e @ x.flatten(-2) for e, x in ((_beside_batch(key_projection), k), (_beside_batch(value_projection), v))]
    both = torch.stack(parts, dim=-2)  # [B, K, 2, Hkv D]
    if group is not None:
        both = _ring_sum(both, name_of(op, group), timeout)
    kv = both.unflatten(-1, k.shape[-2:])  # [B, K, 2, Hkv, D]
    keys, values = kv.unbind(-3)
    rows = [t.flatten(0, 1) if local else t for t in (q, keys, values)]
    queries, keys, values = (t.transpose(1, 2) for t in rows)
    grouped = queries.shape[1] != keys.shape[1]
    out = F.scaled_dot_product_attention(queries, keys, values, scale=softmax_scale, enable_gqa=grouped)
    return out.transpose(1, 2).reshape(q.shape)


def _beside_batch(projection: Tensor) -> Tensor:
    """[K, L/N] as it is, [ranks, K, L/N] with a dimension for the batch."""
    return projection if projection.dim() == 2 else projection.unsqueeze(1)


def _check_inputs(op: str, group: Any, q: Any, k: Any, v: Any, e: Any, f: Any) -> None:
    local = isinstance(group, LocalGroup)
    ranks = "ranks, " if local else ""
    shapes = {
        "q": f"[{ranks}batch, L / N, heads, head_dim]",
        "k": f"[{ranks}batch, L / N, kv_heads, head_dim]",
        "v": f"[{ranks}batch, L / N, kv_heads, head_dim]",
        "key_projection": f"[{ranks}K, L / N]",
        "value_projection": f"[{ranks}K, L / N]",
    }
    for (name, shape), value in zip(shapes.items(), (q, k, v, e, f), strict=True):
        _check.tensor(op, name, value)
        _check.floating(op, name, value)
        if value.dim() != shape.count(",") + 1 or (local and value.shape[0] != group.size):
            raise ValueError(f"{op}: {name} must be of shape {shape}, got {_check.describe(value)}")
        if value.dtype != q.dtype and not torch.is_autocast_enabled(q.device.type):
            raise TypeError(f"{op}: {name} must be {_check.dtype_name(q.dtype)} as q is, got {_check.describe(value)}")
        _check.same_device(op, name, value, "q", q)
    if k.shape != v.shape:
        raise ValueError(f"{op}: v must be of shape {list(k.shape)} as k is, got {list(v.shape)}")
    if k.shape[:-2] != q.shape[:-2] or k.shape[-1] != q.shape[-1]:
        raise ValueError(f"{op}: k must have the batch, rows and head_dim of q {list(q.shape)}, got {list(k.shape)}")
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(f"{op}: the heads of k must divide those of q {q.shape[-2]}, got {k.shape[-2]}")
    if e.shape[-1] != k.shape[-3]:
        raise ValueError(f"{op}: key_projection must have {k.shape[-3]} columns, the rows of k, got {list(e.shape)}")
    if f.shape != e.shape:
        raise ValueError(f"{op}: value_projection must be of shape {list(e.shape)}, got {list(f.shape)}")
