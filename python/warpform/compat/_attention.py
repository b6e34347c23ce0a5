"""`warpform.ops.varlen_attention` for functions with another name: shapes that kernels take, errors in their words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import varlen_attention
from . import _arguments

_OP = "varlen_attention"
# The attention kernels take head sizes that are a multiple of the first number, up to the second.
_HEAD_DIM_STEP, _HEAD_DIM_LIMIT = 8, 256


def attention(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    *,
    names: Mapping[str, str] | None = None,
    **how: Any,
) -> tuple[Tensor, Tensor]:
    """`varlen_attention` with return_lse, called by the function `op`.

    Args:
        q, k, v: as there, with any strides.
        max_seqlen_q, max_seqlen_k: what `_arguments.integer` takes.
        names: what `op` calls the arguments of `varlen_attention`, where the names differ.
        **how: the keyword arguments of `varlen_attention`.

    Returns:
        out and lse. In 16 bits, a head size that is not a multiple of 8 is filled up with zeros on the way to the op,
        as the kernels need it: zeros add nothing to a score, and their columns of the output are cut off.

    Raises:
        TypeError, ValueError, RuntimeError: as there, in the words of `op`.
    """
    names = names or {}
    max_seqlen_q = _longest(op, names.get("max_seqlen_q", "max_seqlen_q"), max_seqlen_q, q)
    max_seqlen_k = _longest(op, names.get("max_seqlen_k", "max_seqlen_k"), max_seqlen_k, k)
    q, k, v = (contiguous_heads(t) for t in (q, k, v))
    fill = _fill(q, k, v)
    if fill:
        head_dim = q.size(-1)
        if how.get("softmax_scale") is None:
            how["softmax_scale"] = head_dim**-0.5
        q, k, v = (F.pad(t, (0, fill)) for t in (q, k, v))
    places = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if torch.compiler.is_compiling():
        out, lse = varlen_attention(q, k, v, *places, **how, return_lse=True)
    else:
        try:
            out, lse = varlen_attention(q, k, v, *places, **how, return_lse=True)
        except (TypeError, ValueError, RuntimeError) as error:
            text = str(error)
            if not text.startswith(f"{_OP}: "):
                raise
            raise type(error)(op + _in_words_of(names, text.removeprefix(_OP))) from None
    if fill:
        out = out[..., :head_dim].contiguous()
    return out, lse


def contiguous_heads(t: Tensor) -> Tensor:
    """t with its last dimension contiguous."""
    return t if not isinstance(t, Tensor) or t.dim() == 0 or t.stride(-1) == 1 else t.contiguous()


def _longest(op: str, name: str, value: Any, rows: Tensor) -> int:
    if torch.compiler.is_compiling() and hasattr(value, "dtype"):
        return rows.size(0)  # no sequence is longer, and the value of a tensor or array is not known while tracing
    return _arguments.integer(op, name, value)


def _fill(q: Tensor, k: Tensor, v: Tensor) -> int:
    """Returns the number of zeros to put at the end of each head."""
    if not all(isinstance(t, Tensor) and t.dim() == 3 and t.size(-1) == q.size(-1) for t in (q, k, v)):
        return 0  # the op says what is wrong
    device = q.device.type
    casts = device in ("cpu", "cuda") and torch.is_autocast_enabled(device) and q.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if casts else q.dtype
    head_dim = q.size(-1)
    if dtype not in (torch.float16, torch.bfloat16) or not 0 < head_dim < _HEAD_DIM_LIMIT:
        return 0
    return -head_dim % _HEAD_DIM_STEP


def _in_words_of(names: Mapping[str, str], text: str) -> str:
    """text with the arguments named as the caller knows them."""
    if not names:
        return text
    pattern = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    return re.sub(rf"(?<![\w.])({pattern})(?!\w)", lambda found: names[found[1]], text)
