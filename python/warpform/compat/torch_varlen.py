"""torch.nn.attention.varlen of torch 2.13, on `warpform.ops.varlen_attention`: change the import."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..ops import _check
from . import _arguments
from ._attention import attention

__all__ = ["AuxRequest", "varlen_attn", "varlen_attn_out"]

# Names here of the arguments of `warpform.ops.varlen_attention`.
_NAMES = {
    "q": "query",
    "k": "key",
    "v": "value",
    "cu_seqlens_q": "cu_seq_q",
    "cu_seqlens_k": "cu_seq_k",
    "max_seqlen_q": "max_q",
    "max_seqlen_k": "max_k",
    "softmax_scale": "scale",
}


class AuxRequest(NamedTuple):
    """Names the results that are returned beside the output. torch's own AuxRequest is taken too."""

    lse: bool = False


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: AuxRequest | None = None,
    scale: float | None = None,
    window_size: Sequence[int] | Tensor | None = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over sequences laid end to end, with the arguments of torch.nn.attention.varlen.varlen_attn.

    Args:
        query: [Tq, H, D]. key, value: [Tk, Hkv, D]. float16, bfloat16, float32 or float64.
        cu_seq_q, cu_seq_k: int32 [B + 1], where each sequence begins and the last one ends.
        max_q, max_k: at least the longest sequence.
        return_aux: with lse=True, return (out, lse).
        scale: D ** -0.5 by default.
        window_size: (left, right), both inclusive, aligned at the end of a sequence; negative is unbounded, (-1, 0)
            causal.
        enable_gqa: allow fewer key heads than query heads.
        seqused_k, block_table, num_splits: must be None.

    Numbers may be Python's or numpy's, or tensors of one element, which are read from their device; window_size may be
    any sequence, tensor or array of two integers. In 16 bits a D that is not a multiple of 8 is filled up with zeros on
    the way to the kernels, up to 256, at the cost of a copy.

    Returns:
        out [Tq, H, D] like query; lse float32 [H, Tq], which is what torch returns, whatever its documentation says.

    Raises:
        NotImplementedError: seqused_k, block_table or num_splits.
        TypeError, ValueError: a wrong dtype, shape or device; Hkv other than H without enable_gqa.
    """
    out, lse = _attend(
        "varlen_attn", query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size,
        enable_gqa=enable_gqa, seqused_k=seqused_k, block_table=block_table, num_splits=num_splits,
    )  # fmt: skip
    return (out, lse) if return_aux is not None and return_aux.lse else out


def varlen_attn_out(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: AuxRequest | None = None,
    scale: float | None = None,
    window_size: Sequence[int] | Tensor | None = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`varlen_attn` that writes its output into out, [Tq, H, D] like query and of any strides, and returns it.

    The output is computed apart and then copied, so out may be one of the inputs where no gradient is recorded.

    Raises:
        NotImplementedError, TypeError, ValueError: as `varlen_attn`; out of another shape, dtype or device than query.
    """
    op = "varlen_attn_out"
    _check.tensor(op, "out", out)
    _check.tensor(op, "query", query)
    if out.shape != query.shape:
        raise ValueError(f"{op}: out must be of shape {list(query.shape)} as query is, got {_check.describe(out)}")
    if out.dtype != query.dtype:
        raise TypeError(f"{op}: out must be {_check.dtype_name(query.dtype)} as query is, got {_check.describe(out)}")
    _check.same_device(op, "out", out, "query", query)
    result, lse = _attend(
        op, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size,
        enable_gqa=enable_gqa, seqused_k=seqused_k, block_table=block_table, num_splits=num_splits,
    )  # fmt: skip
    out.copy_(result)
    return (out, lse) if return_aux is not None and return_aux.lse else out


def _attend(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: Any,
    max_k: Any,
    *,
    scale: float | None,
    window_size: Sequence[int] | Tensor | None,
    enable_gqa: bool,
    **unsupported: Any,
) -> tuple[Tensor, Tensor]:
    """out and lse, for the function `op`."""
    for name, instead in (
        ("seqused_k", "put the used keys alone into key and value"),
        ("block_table", "there is no paged KV cache; gather the pages into key and value"),
        ("num_splits", "there is no split over keys to choose"),
    ):
        if unsupported[name] is not None:
            raise NotImplementedError(f"{op}: {name} is not supported: {instead}, and pass None")
    for name, t in (("query", query), ("key", key), ("value", value)):
        _check.tensor(op, name, t)
        if t.dim() != 3:
            raise ValueError(f"{op}: {name} must be of shape [total, heads, head_dim], got {_check.describe(t)}")
    if cu_seq_k is None:
        raise TypeError(f"{op}: cu_seq_k must be a tensor, got None, which goes with a block_table only")
    if not enable_gqa and query.size(1) != key.size(1):
        raise ValueError(
            f"{op}: key and value must have the {query.size(1)} heads of query unless enable_gqa=True, "
            f"got {_check.describe(key)}"
        )
    return attention(
        op, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, names=_NAMES,
        softmax_scale=None if scale is None else _arguments.number(op, "scale", scale),
        window_size=_arguments.window(op, window_size),
    )  # fmt: skip
