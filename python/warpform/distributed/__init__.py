"""Sequences longer than one device holds, exact, over any process group of torch.distributed."""

from ._errors import RingError, RingMismatchError, RingTimeoutError
from ._group import LocalGroup
from .layouts import shard_cu_seqlens, shard_positions, shard_sequence, unshard_sequence
from .ring_attention import ring_attention, ring_attention_varlen

__all__ = [
    "LocalGroup",
    "RingError",
    "RingMismatchError",
    "RingTimeoutError",
    "ring_attention",
    "ring_attention_varlen",
    "shard_cu_seqlens",
    "shard_positions",
    "shard_sequence",
    "unshard_sequence",
]
