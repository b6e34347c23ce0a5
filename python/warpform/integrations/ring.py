"""`attn_implementation="warpform_ring"`: models of transformers on sequences spread over ranks.

    warpform.integrations.ring.register(group)  # a process group or mesh, as ring_attention takes it
    model.set_attn_implementation("warpform_ring")
    own = shard_sequence(input_ids, group=group, dim=1)
    positions = shard_positions(input_ids.size(1), group=group)
    hidden = model(own, position_ids=positions.unsqueeze(0)).last_hidden_state  # this rank's tokens

Everything but attention works on tokens one by one and needs no change. What a model derives from the order of its
tokens has to be given: position_ids always, and labels shifted before they are sharded (`shift_labels`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _env
from ..ops import _check
from . import transformers as _padded

NAME = "warpform_ring"


@dataclass(frozen=True)
class _Ring:
    group: Any
    layout: str
    timeout: float | None


_registered: _Ring | None = None


def register(group: Any, *, layout: str = "zigzag", timeout: float | None = None) -> None:
    """Makes `attn_implementation="warpform_ring"` known to transformers. Calling it again changes the group.

    Args:
        group, layout, timeout: those of `warpform.distributed.ring_attention`; not a LocalGroup.

    Raises:
        ImportError: there is no transformers, or one before 5.4.
        TypeError, ValueError: a group or layout that the ring does not take.
    """
    global _registered
    from ..distributed import LocalGroup, _group, layouts

    if isinstance(group, LocalGroup):
        raise TypeError(f"{NAME}: group must be of processes: a model's tensors have no dimension for ranks")
    _group.name_of(NAME, group)
    layouts.check_layout(NAME, layout)
    _padded.register()
    from transformers import AttentionInterface, AttentionMaskInterface

    _registered = _Ring(group, layout, timeout)
    _padded._names.add(NAME)
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


def _ring() -> _Ring:
    if _registered is None:
        raise RuntimeError(f"{NAME}: call warpform.integrations.ring.register(group) first")
    return _registered


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    device: torch.device | str | None = None,
    **kwargs: Any,
) -> Tensor:
    """transformers' AttentionMaskInterface: the kind of mask, as `attention` understands it. No mask is in it.

    Raises:
        NotImplementedError: sliding windows, packed sequences, padding, a KV cache that holds something.
    """
    pattern = _padded._pattern(mask_function)
    if pattern.window != (-1, -1):
        raise NotImplementedError(f"{NAME}: sliding windows are not supported")
    if kv_length != q_length or int(q_offset) != kv_offset:
        raise NotImplementedError(f"{NAME}: a KV cache is not supported; pass use_cache=False")
    if attention_mask is not None and not bool((attention_mask != 0).all()):
        raise NotImplementedError(f"{NAME}: padding is not supported: drop it, or use sequences of one length")
    if pattern.segments is not None and not _are_jumps_of_layout(pattern.segments):
        raise NotImplementedError(
            f"{NAME}: packed sequences are not supported, nor are position_ids other than those of shard_positions"
        )
    made = torch.ones(batch_size, q_length, dtype=torch.bool, device=device)
    _padded._known[made] = _padded._Known(_padded._version(made), _padded._Pattern(pattern.causal), full=True)
    return made


def _own_positions(rows: int) -> Tensor:
    from ..distributed import _group, shard_positions

    ring = _ring()
    size = _group.rank_and_size(NAME, ring.group)[1]
    return shard_positions(rows * size, group=ring.group, layout=ring.layout)


def _are_jumps_of_layout(segments: Tensor) -> bool:
    """transformers takes every jump of position_ids for another sequence; those of a layout are none."""
    positions = _own_positions(segments.size(-1))
    jumps = (positions.diff(prepend=positions[:1] - 1) != 1).cumsum(0)
    return torch.equal(segments.cpu(), jumps.expand_as(segments))


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' AttentionInterface.

    Args:
        query: [B, H, S / N, D]. key: [B, Hkv, S / N, D]. value: [B, Hkv, S / N, Dv] with Dv at most D.
        attention_mask: as `mask` makes it, or None.
        position_ids: where the model hands them on they must be `shard_positions`: checked on a CPU, and elsewhere with
            WARPFORM_VALIDATE=1, as wrong ones give wrong rotary embeddings.

    Returns:
        [B, S / N, H, Dv] and None, as there are no attention probabilities.

    Raises:
        NotImplementedError: dropout above 0, sliding windows, softcaps, attention probabilities, cross attention, any
            other change to scores.
        ValueError: wrong position_ids.
        RingError and others: as `warpform.distributed.ring_attention`. An error in what one rank alone was given raises
            there, and on others when their time-out is over.
    """
    from ..distributed import ring_attention

    ring = _ring()
    refused = {"attention dropout": dropout, "softcap": softcap, "a sliding window": sliding_window}
    refused.update({what: kwargs.get(name) for name, what in _padded._UNSUPPORTED.items()})
    refused["output_attentions"] = kwargs.get("output_attentions")
    refused["packed sequences (cu_seq_lens_q)"] = kwargs.get("cu_seq_lens_q")
    for what, value_of in refused.items():
        if value_of is not None and not (isinstance(value_of, (bool, int, float)) and not value_of):
            raise NotImplementedError(f"{NAME}: {what} is not supported, as {type(module).__name__} asks for")
    if getattr(getattr(module, "config", None), "is_encoder_decoder", False) or query.size(2) != key.size(2):
        raise NotImplementedError(f"{NAME}: cross attention and a KV cache are not supported")
    _padded._check_states(query, key, value)
    if position_ids is not None and (query.device.type == "cpu" or _env.validate()):
        own = _own_positions(query.size(2))
        if not torch.equal(position_ids.cpu(), own.expand_as(position_ids)):
            raise ValueError(
                f"{NAME}: position_ids must be those of shard_positions with layout {ring.layout!r}, "
                f"{own[:4].tolist()} ..., got {position_ids.flatten()[:4].tolist()} ..."
            )
    pattern = None if attention_mask is None else _padded._recall(attention_mask).pattern
    if attention_mask is not None and pattern is None:
        raise NotImplementedError(
            f"{NAME}: masks other than the model's own are not supported, got {_check.describe(attention_mask)}"
        )
    causal = _padded._is_causal(module, is_causal) if pattern is None else pattern.causal
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    value_dim = v.size(3)
    if value_dim < q.size(3):
        v = F.pad(v, (0, q.size(3) - value_dim))
    out = ring_attention(
        q, k, v, group=ring.group, causal=causal, layout=ring.layout, softmax_scale=scaling, timeout=ring.timeout
    )
    return out[..., :value_dim], None
