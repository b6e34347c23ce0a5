"""Ring self-attention as the paper has it (arXiv 2105.13120, section 3.1): full rows of scores, in two rounds.

Keys go round the ring while each rank makes its rows of scores, L/N x L; after the softmax values go round. A rank
keeps (4 B L Z A + B Z L^2 + B L H) / N elements of an attention layer for the backward. `ring_attention` keeps no
scores and needs O(L / N); this is here to repeat the paper's experiments, and where scores themselves are wanted.

The backward sums gradients of keys and values as they travel (a reduce-scatter), where the paper's code all-reduces
gradients of whole sequences: 4 (N - 1) hops of a block in place of 6 (N - 1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._torch_private import process_group
from ..ops import _check
from ..ops._dtypes import accumulation_dtype
from ._agreement import agree, choose, finish
from ._group import LocalGroup, Ring, execute, name_of, process_groups, rank_and_size
from ._register import register_op
from ._rotation import rotate, rotate_and_reduce
from ._transport import Steps
from .layouts import check_layout, positions_of


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """[B, c, H, D] -> [B, Hkv, H / Hkv * c, D]: queries of the heads that share keys are rows of one product."""
    b, c, h, d = x.shape
    return x.reshape(b, c, kv_heads, h // kv_heads, d).permute(0, 2, 3, 1, 4).reshape(b, kv_heads, h // kv_heads * c, d)


def _ungrouped(x: Tensor, heads: int) -> Tensor:
    """[B, Hkv, H / Hkv * c, D] -> [B, c, H, D]."""
    b, hkv, rows, d = x.shape
    c = rows * hkv // heads
    return x.view(b, heads, c, d).transpose(1, 2)


def _rows(scores: Tensor, kv_heads: int, block: slice) -> Tensor:
    """Columns of [B, H, c, L] as rows of shared keys, [B, Hkv, H / Hkv * c, columns]."""
    part = scores[..., block]
    return part.unflatten(1, (kv_heads, -1)).flatten(2, 3)


def _hidden(ring: Ring, source: int, rows: int, layout: str, device: torch.device) -> Tensor:
    """bool [c, c]: pairs of this rank's queries and the keys of `source` that causal attention does not see."""
    q, k = (positions_of(r, ring.size, rows * ring.size, layout, device=device) for r in (ring.rank, source))
    return k[None, :] > q[:, None]


def _qk_steps(
    ring: Ring, q: Tensor, k: Tensor, *, scale: float, causal: bool, layout: str, group: str
) -> Steps[Tensor]:
    facts = {"q": _check.describe(q), "k": _check.describe(k), "scale": scale, "causal": causal, "layout": layout}
    check = choose("ring_qk", None, q.device)
    yield from agree(ring, "ring_qk", facts, group=group, check=check, device=q.device)
    b, c, h, _ = q.shape
    kv_heads, n = k.shape[2], k.shape[1]
    scores = q.new_empty(b, h, c, n * ring.size)
    queries = _grouped(q, kv_heads)

    def product(source: int, keys: Tensor) -> None:
        part = (queries @ keys.permute(0, 2, 3, 1)).mul_(scale).view(b, h, c, n)
        if causal:
            part.masked_fill_(_hidden(ring, source, c, layout, q.device), float("-inf"))
        scores[..., source * n : source * n + n] = part

    yield from rotate(ring.inner, k, product)
    yield from finish(ring, check=check, device=q.device)
    return scores


def _qk_backward_steps(
    ring: Ring, dscores: Tensor, q: Tensor, k: Tensor, *, scale: float, causal: bool, layout: str
) -> Steps[tuple[Tensor, Tensor]]:
    c, h = q.shape[1:3]
    kv_heads, n = k.shape[2], k.shape[1]
    dtype = accumulation_dtype(q.dtype)
    queries = _grouped(q, kv_heads)
    dq = torch.zeros(queries.shape, dtype=dtype, device=q.device)

    def columns(rank: int) -> Tensor:
        part = dscores[..., rank * n : rank * n + n]
        if causal:  # what was minus infinity has no gradient, whatever comes back for it
            part = part.masked_fill(_hidden(ring, rank, c, layout, q.device), 0)
        return _rows(part, kv_heads, slice(None))

    def for_queries(source: int, keys: Tensor) -> None:
        dq.add_(columns(source) @ keys.transpose(1, 2), alpha=scale)

    def for_keys(home: int) -> Tensor:
        return (columns(home).transpose(2, 3) @ queries).to(dtype).mul_(scale)

    dk = yield from rotate_and_reduce(ring.inner, k, for_queries, for_keys)
    yield from finish(ring, check=choose("ring_qk", None, q.device), device=q.device)
    return _ungrouped(dq, h).to(q.dtype).contiguous(), dk.transpose(1, 2).to(k.dtype).contiguous()


def _av_steps(ring: Ring, p: Tensor, v: Tensor, *, group: str) -> Steps[Tensor]:
    check = choose("ring_av", None, v.device)
    facts = {"p": _check.describe(p), "v": _check.describe(v)}
    yield from agree(ring, "ring_av", facts, group=group, check=check, device=v.device)
    h, n, kv_heads = p.shape[1], v.shape[1], v.shape[2]
    dtype = accumulation_dtype(v.dtype)
    out = torch.zeros(p.shape[0], kv_heads, h // kv_heads * p.shape[2], v.shape[3], dtype=dtype, device=v.device)

    def product(source: int, values: Tensor) -> None:
        out.add_(_rows(p, kv_heads, slice(source * n, source * n + n)) @ values.transpose(1, 2))

    yield from rotate(ring.inner, v, product)
    yield from finish(ring, check=check, device=v.device)
    return _ungrouped(out, h).to(v.dtype).contiguous()


def _av_backward_steps(ring: Ring, dout: Tensor, p: Tensor, v: Tensor) -> Steps[tuple[Tensor, Tensor]]:
    b, h, c, _ = p.shape
    n, kv_heads = v.shape[1:3]
    dtype = accumulation_dtype(v.dtype)
    rows = _grouped(dout, kv_heads)
    dp = torch.empty_like(p, memory_format=torch.contiguous_format)

    def for_scores(source: int, values: Tensor) -> None:
        dp[..., source * n : source * n + n] = (rows @ values.permute(0, 2, 3, 1)).view(b, h, c, n)

    def for_values(home: int) -> Tensor:
        return (_rows(p, kv_heads, slice(home * n, home * n + n)).transpose(2, 3) @ rows).to(dtype)

    dv = yield from rotate_and_reduce(ring.inner, v, for_scores, for_values)
    yield from finish(ring, check=choose("ring_av", None, v.device), device=v.device)
    return dp, dv.transpose(1, 2).to(v.dtype).contiguous()


# ---- ops ----


def _ranks(group: str, like: Tensor) -> int:
    """Returns the number of ranks; in one process they are the first dimension."""
    if LocalGroup.named(group) is not None:
        return like.shape[0]
    return int(process_group(group).size())


def _qk(q: Tensor, k: Tensor, scale: float, causal: bool, layout: str, group: str, timeout: float | None) -> Any:
    how = {"scale": scale, "causal": causal, "layout": layout, "group": group}
    return execute("ring_qk", group, timeout, _qk_steps, q, k, **how)


def _qk_fake(
    q: Tensor, k: Tensor, scale: float, causal: bool, layout: str, group: str, timeout: float | None
) -> Tensor:
    *rest, c, h, _ = q.shape
    return q.new_empty((*rest, h, c, k.shape[-3] * _ranks(group, q)))


def _qk_backward(
    dscores: Tensor, q: Tensor, k: Tensor, scale: float, causal: bool, layout: str, group: str, timeout: float | None
) -> Any:
    how = {"scale": scale, "causal": causal, "layout": layout}
    return execute("ring_qk backward", group, timeout, _qk_backward_steps, dscores, q, k, **how)


def _av(p: Tensor, v: Tensor, group: str, timeout: float | None) -> Any:
    return execute("ring_av", group, timeout, _av_steps, p, v, group=group)


def _av_fake(p: Tensor, v: Tensor, group: str, timeout: float | None) -> Tensor:
    *rest, h, c, _ = p.shape
    return v.new_empty((*rest, c, h, v.shape[-1]))


def _av_backward(dout: Tensor, p: Tensor, v: Tensor, group: str, timeout: float | None) -> Any:
    return execute("ring_av backward", group, timeout, _av_backward_steps, dout, p, v)


def _backward_fake(gradient: Tensor, first: Tensor, second: Tensor, *how: Any) -> tuple[Tensor, Tensor]:
    return first.new_empty(first.shape), second.new_empty(second.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    first, second, *ctx.how = inputs
    ctx.save_for_backward(first, second)


def _qk_gradient(ctx: Any, dscores: Tensor) -> tuple[Tensor | None, ...]:
    return (*_ring_qk_backward(dscores, *ctx.saved_tensors, *ctx.how), *(None,) * len(ctx.how))


def _av_gradient(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    return (*_ring_av_backward(dout, *ctx.saved_tensors, *ctx.how), *(None,) * len(ctx.how))


_QK = "float scale, bool causal, str layout, str group, float? timeout"
_ring_qk_backward = register_op(
    f"ring_qk_backward(Tensor dscores, Tensor q, Tensor k, {_QK}) -> (Tensor, Tensor)",
    _qk_backward,
    fake=_backward_fake,
)
_ring_qk = register_op(
    f"ring_qk(Tensor q, Tensor k, {_QK}) -> Tensor",
    _qk,
    fake=_qk_fake,
    backward=_qk_gradient,
    setup_context=_save,
    autocast=("q", "k"),
)
_ring_av_backward = register_op(
    "ring_av_backward(Tensor dout, Tensor p, Tensor v, str group, float? timeout) -> (Tensor, Tensor)",
    _av_backward,
    fake=_backward_fake,
)
_ring_av = register_op(
    "ring_av(Tensor p, Tensor v, str group, float? timeout) -> Tensor",
    _av,
    fake=_av_fake,
    backward=_av_gradient,
    setup_context=_save,
    autocast=("p", "v"),
)


# ---- public functions ----


def _check_pair(op: str, names: tuple[str, str], shapes: tuple[str, str], x: Any, y: Any, group: Any) -> None:
    """That both are tensors of five dimensions in one process, of four between processes, and fit each other."""
    local = isinstance(group, LocalGroup)
    for name, shape, value in zip(names, shapes, (x, y), strict=True):
        _check.tensor(op, name, value)
        _check.floating(op, name, value)
        if value.dim() != 4 + local or (local and value.shape[0] != group.size):
            expected = f"[ranks, {shape[1:]}" if local else shape
            raise ValueError(f"{op}: {name} must be of shape {expected}, got {_check.describe(value)}")
    if x.dtype != y.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(
            f"{op}: {names[1]} must be {_check.dtype_name(x.dtype)} as {names[0]} is, got {_check.describe(y)}"
        )
    _check.same_device(op, names[1], y, names[0], x)
    rings = 1 if local and group.inner_size in (None, group.size) else 2 if local else len(process_groups(op, group))
    if rings != 1:
        raise ValueError(f"{op}: group must be one ring, got {rings} rings; ring_attention takes double rings")


def ring_qk(
    q: Tensor,
    k: Tensor,
    *,
    group: Any,
    scale: float = 1.0,
    causal: bool = False,
    layout: str = "contiguous",
    timeout: float | None = None,
) -> Tensor:
    """This rank's rows of scale Q K^T over the keys of all ranks (arXiv 2105.13120, equations 3 and 4).

    Keys make N - 1 hops around the ring; in the backward they do again, and their gradients sum up as they travel.

    Args:
        q: [B, L/N, H, D], this rank's queries. With a LocalGroup there is one dimension more in front, the ranks.
        k: [B, L/N, Hkv, D], of q's dtype; Hkv divides H.
        group: the ranks that share the sequence: a ProcessGroup, a DeviceMesh of one dimension, or a LocalGroup.
        scale: what scores are multiplied by, 1 / sqrt(D) in attention.
        causal: pairs whose key comes after the query are minus infinity, and have no gradient.
        layout: which rows ranks hold, which causal needs: "contiguous", "zigzag" or "striped".
        timeout: seconds that a message may take; None: the group's own.

    Returns:
        [B, H, L/N, L] of q's dtype: columns in the order of ranks, the L/N keys of each as it holds them.

    Raises:
        TypeError, ValueError: not a tensor, a dtype or shape that does not fit, an unknown layout, a double ring.
        RingMismatchError: ranks differ in shapes, dtypes, scale, causal or layout; all of them raise it.
        RingError: a rank is gone or late.
    """
    op = "ring_qk"
    _check_pair(op, ("q", "k"), ("[batch, L / N, heads, head_dim]", "[batch, L / N, kv_heads, head_dim]"), q, k, group)
    if q.shape[:-3] != k.shape[:-3] or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"{op}: k must have the batch and head_dim of q {list(q.shape)}, got {list(k.shape)}")
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(f"{op}: the heads of k must divide those of q {q.shape[-2]}, got {k.shape[-2]}")
    if causal and q.shape[-3] != k.shape[-3]:
        raise ValueError(f"{op}: k must have as many rows as q {q.shape[-3]} where causal, got {k.shape[-3]}")
    check_layout(op, layout)
    return _ring_qk(q, k, float(scale), bool(causal), layout, name_of(op, group), timeout)


def ring_av(p: Tensor, v: Tensor, *, group: Any, timeout: float | None = None) -> Tensor:
    """This rank's rows of P V over the values of all ranks (arXiv 2105.13120, equations 5 and 6).

    Values make N - 1 hops around the ring; in the backward they do again, and their gradients sum up as they travel.

    Args:
        p: [B, H, L/N, L], probabilities with columns as `ring_qk` orders them. With a LocalGroup there is one dimension
            more in front, the ranks.
        v: [B, L/N, Hkv, D], of p's dtype; Hkv divides H.
        group, timeout: as of `ring_qk`.

    Returns:
        [B, L/N, H, D] of p's dtype, summed in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: not a tensor, a dtype or shape that does not fit, a double ring.
        RingMismatchError: ranks differ in shapes or dtypes; all of them raise it.
        RingError: a rank is gone or late.
    """
    op = "ring_av"
    _check_pair(op, ("p", "v"), ("[batch, heads, L / N, L]", "[batch, L / N, kv_heads, head_dim]"), p, v, group)
    columns = v.shape[-3] * (group.size if isinstance(group, LocalGroup) else rank_and_size(op, group)[1])
    if p.shape[:-3] != v.shape[:-3] or p.shape[-1] != columns:
        raise ValueError(
            f"{op}: p must have the batch of v {list(v.shape)} and {columns} columns, the rows of all ranks, got "
            f"{list(p.shape)}"
        )
    if v.shape[-2] == 0 or p.shape[-3] % v.shape[-2]:
        raise ValueError(f"{op}: the heads of v must divide those of p {p.shape[-3]}, got {v.shape[-2]}")
    return _ring_av(p, v, name_of(op, group), timeout)


def rsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Any,
    causal: bool = False,
    layout: str = "contiguous",
    softmax_scale: float | None = None,
    timeout: float | None = None,
) -> Tensor:
    """softmax(scale Q K^T) V with full rows of scores, the paper's ring self-attention.

    Args:
        q, k, v, group, causal, layout, timeout: as of `ring_qk` and `ring_av`.
        softmax_scale: None is 1 / sqrt(D).

    Returns:
        [B, L/N, H, D] of q's dtype.

    Raises:
        TypeError, ValueError, RingMismatchError, RingError: as they do.
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    scores = ring_qk(q, k, group=group, scale=scale, causal=causal, layout=layout, timeout=timeout)
    # Softmax saves its output only, and that same tensor is what the second product saves.
    return ring_av(torch.softmax(scores, dim=-1), v, group=group, timeout=timeout)
