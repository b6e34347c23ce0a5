"""flash-attn 2's functions (arXiv 2307.08691), argument for argument, on `warpform.ops.varlen_attention`.

Change `from flash_attn import ...` to `from warpform.compat.flash_attn import ...`; its modules `flash_attn_interface`
and `bert_padding` are here too. Shapes: batch B, sequences of Sq queries and Sk keys, H query heads, Hkv key heads (H a
multiple of Hkv), head size D. dtypes: float16, bfloat16, and float32 and float64 too, which flash-attn does not take.

Every function shares these arguments:

* dropout_p: must be 0.
* softmax_scale: D ** -0.5 by default.
* causal: query i sees keys up to i + Sk - Sq (aligned at the end, as in flash-attn 2.1 and later).
* window_size: (left, right), both inclusive and aligned as causal is; negative is unbounded.
* softcap: above 0, scores become softcap * tanh(score / softcap); otherwise it is off.
* alibi_slopes: float32 [H] or [B, H]; -slope * |i + Sk - Sq - j| is added. No gradient.
* deterministic: the same gradients bit by bit in each run.
* return_attn_probs: return (out, softmax_lse, S_dmask) instead of out. S_dmask is None, as there is no dropout.

Numbers may be Python's or numpy's, or tensors of one element, which are read from their device; window_size may be any
sequence, tensor or array of two integers. In 16 bits a D that is not a multiple of 8 is filled up with zeros on the way
to the kernels, up to 256, at the cost of a copy.

The functions raise:

* NotImplementedError: dropout_p above 0, a block_table.
* TypeError, ValueError: a wrong dtype, shape or device; `warpform.ops.varlen_attention` says which.

Three things differ from flash-attn, on purpose: a query that sees no key has softmax_lse -inf (flash-attn: +inf),
softmax_lse is of the scores as defined above also under causal ALiBi (flash-attn drops a constant per row), and it is
differentiable.

Attributes:
    __version__: the version of flash-attn whose functions these are, for callers that ask.
"""

from __future__ import annotations

from . import bert_padding, flash_attn_interface
from .flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

__version__ = "2.8.3"

__all__ = [
    "bert_padding",
    "flash_attn_func",
    "flash_attn_interface",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]
