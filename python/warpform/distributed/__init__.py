"""Sequences longer than one device holds, exact, over any process group of torch.distributed."""

from ._errors import RingError, RingMismatchError, RingTimeoutError
from ._group import LocalGroup
from .layouts import shard_cu_seqlens, shard_positions, shard_sequence, unshard_sequence
from .linformer import linformer_attention
from .ring_attention import ring_attention, ring_attention_varlen
from .rsa import ring_av, ring_qk, rsa_attention
from .sequence_parallel import SequenceParallel, SequenceParallelAttention

__all__ = [
    "LocalGroup",
    "RingError",
    "RingMismatchError",
    "RingTimeoutError",
    "SequenceParallel",
    "SequenceParallelAttention",
    "linformer_attention",
    "ring_attention",
    "ring_attention_varlen",
    "ring_av",
    "ring_qk",
    "rsa_attention",
    "shard_cu_seqlens",
    "shard_positions",
    "shard_sequence",
    "unshard_sequence",
]
