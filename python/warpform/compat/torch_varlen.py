"""torch.nn.attention.varlen of torch 2.13, on `warpform.ops.varlen_attention`: change the import."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..ops import _check, varlen_attention

__all__ = ["AuxRequest", "varlen_attn"]


class AuxRequest(NamedTuple):
    """What to return beside the output. torch's own AuxRequest is taken too."""

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
    window_size: tuple[int, int] = (-1, -1),
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
        window_size: (left, right), both inclusive, aligned at the end of a sequence; -1 is unbounded, (-1, 0) causal.
        enable_gqa: allow fewer key heads than query heads.
        seqused_k, block_table, num_splits: must be None.

    Returns:
        out [Tq, H, D] like query; lse float32 [H, Tq], which is what torch returns, whatever its documentation says.

    Raises:
        NotImplementedError: seqused_k, block_table or num_splits.
        TypeError, ValueError: a wrong dtype, shape or device; Hkv other than H without enable_gqa.
    """
    op = "varlen_attn"
    for name, given, instead in (
        ("seqused_k", seqused_k, "put the used keys alone into key and value"),
        ("block_table", block_table, "there is no paged KV cache; gather the pages into key and value"),
        ("num_splits", num_splits, "there is no split over keys to choose"),
    ):
        if given is not None:
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
    if window_size is None:  # torch takes it so
        window_size = (-1, -1)
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    out, lse = varlen_attention(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, softmax_scale=scale, window_size=window_size,
        return_lse=True,
    )  # fmt: skip
    return (out, lse) if return_aux is not None and return_aux.lse else out
