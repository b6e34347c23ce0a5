"""`attn_implementation="warpform"` for the models of transformers: `warpform.integrations.transformers.register()`.

transformers is imported by `register`, not before. What a model passes between its layers stays padded; attention alone
drops the padding. `warpform.models.from_transformers` drops it for the whole model, where it knows the architecture.

The mask function gives a model one mask [batch, keys] for all its layers, and attention packs by it: once per mask,
not per layer. A mask is bool, or int32 where one row holds several sequences, which it then numbers from 1; 0 is
padding. It has a column for each key that exists, and queries are its last columns.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .. import _env
from ..ops import _check, varlen_attention
from ..packing import Packing

__all__ = ["NAME", "attention", "mask", "register"]

NAME = "warpform"
"""What `attn_implementation` is set to."""
_names = {NAME}  # and that of integrations.ring
# The first release whose mask functions are given q_length and q_offset; pyproject.toml's extra asks for it too.
OLDEST = "5.4"

# Arguments that change scores or keys in ways that `varlen_attention` lacks. To ignore one would give wrong results.
_UNSUPPORTED = {
    "position_bias": "a bias on attention scores",
    "relative_position_bias": "a bias on attention scores",
    "attention_bias": "a bias on attention scores",
    "attn_bias": "a bias on attention scores",
    "alibi": "a bias on attention scores",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "head_mask": "a head mask",
    "indices": "sparse attention",
    "block_indices": "sparse attention",
    "cache": "a paged KV cache",
    "block_table": "a paged KV cache",
    "k_cache": "a paged KV cache",
    "v_cache": "a paged KV cache",
}


def register() -> None:
    """Makes `attn_implementation="warpform"` known to transformers. Calling it again changes nothing.

    It registers an attention function and a mask function (without which models pass no mask, and padding would be
    attended to), has transformers refuse the name for models that would ignore it, such as DeBERTa-v2, and has it note
    on each mask function what it was made from, which torch.compile cannot see.

    Raises:
        ImportError: there is no transformers, or one before 5.4, whose mask functions have another signature.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, masking_utils
        from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask
    except ImportError as error:
        raise ImportError(
            f"warpform.integrations.transformers: needs transformers {OLDEST} or later ({error})"
        ) from error
    if "q_offset" not in inspect.signature(sdpa_mask).parameters:
        import transformers

        raise ImportError(
            f"warpform.integrations.transformers: needs transformers {OLDEST} or later, got {transformers.__version__}"
        )
    with contextlib.suppress(ImportError):  # not in every release
        global _collector
        from transformers.utils.output_capturing import _active_collector as _collector
    _plain_masks.update(causal=causal_mask_function, bidirectional=bidirectional_mask_function)
    for name in _FACTORIES:
        factory = getattr(masking_utils, name, None)  # of which older releases have fewer
        if factory is not None and not hasattr(factory, "_warpform"):
            setattr(masking_utils, name, _described(factory))
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
    _refuse_models_that_ignore_it(PreTrainedModel)


def _refuse_models_that_ignore_it(base: Any) -> None:
    """transformers takes any registered name for any model, and says nothing when the model never looks at it."""
    if hasattr(base.get_correct_attn_implementation, "_warpform"):
        return

    def check(model: Any, name: str) -> None:
        if not model._can_set_attn_implementation():
            raise ValueError(
                f'{type(model).__name__} ignores attn_implementation="{name}": its attention does not go through '
                "transformers' AttentionInterface. Leave attn_implementation out, or see "
                "warpform.models.from_transformers"
            )

    choose, change = base.get_correct_attn_implementation, base.set_attn_implementation

    @functools.wraps(choose)
    def get_correct_attn_implementation(self: Any, requested_attention: Any, *args: Any, **kwargs: Any) -> Any:
        if requested_attention in _names:
            check(self, requested_attention)
        return choose(self, requested_attention, *args, **kwargs)

    @functools.wraps(change)
    def set_attn_implementation(self: Any, attn_implementation: Any, *args: Any, **kwargs: Any) -> Any:
        name = attn_implementation.get("") if isinstance(attn_implementation, dict) else attn_implementation
        if name in _names:
            check(self, name)
        return change(self, attn_implementation, *args, **kwargs)

    get_correct_attn_implementation._warpform = True  # type: ignore[attr-defined]
    base.get_correct_attn_implementation = get_correct_attn_implementation
    base.set_attn_implementation = set_attn_implementation


# --- masks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pattern:
    """Which keys a query may see, as read off transformers' mask function."""

    causal: bool
    window: tuple[int, int] = (-1, -1)
    segments: Tensor | None = None  # [B, S]: the number of each token's sequence


# Functions that transformers composes masks with, for `register`: the five that are read, others for their names.
_FACTORIES = (
    "and_masks",
    "sliding_window_overlay",
    "sliding_window_bidirectional_overlay",
    "packed_sequence_mask_function",
    "remap_positions_for_packed_sequence",
    "or_masks",
    "chunked_overlay",
    "blockwise_overlay",
)


def _described(make: Callable[..., Any]) -> Callable[..., Any]:
    """A factory of mask functions, which notes its name and its arguments on what it returns.

    They are in its closure too, but a compiler does not show the closures of functions that it saw being made.
    """
    signature = inspect.signature(make)
    names = [*signature.parameters]
    many = any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values())

    @functools.wraps(make)
    def factory(*args: Any, **kwargs: Any) -> Any:
        function = make(*args, **kwargs)
        parts = {names[0]: args} if many else {**dict(zip(names, args, strict=False)), **kwargs}
        function._warpform_made_by, function._warpform_parts = make.__name__, parts
        return function

    factory._warpform = True  # type: ignore[attr-defined]
    return factory


@dataclass(frozen=True)
class _Plan:
    """The packings of the queries and keys of a padded batch. A packing of None takes all of them, as they are."""

    queries: Packing | None
    keys: Packing | None
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int


@dataclass
class _Known:
    """The facts that are kept about a mask, for as long as it lives and is not written to."""

    version: int | None
    pattern: _Pattern | None = None  # of masks made here
    full: bool = False  # no padding, and one sequence in each row
    plans: dict[tuple[int, bool, bool], _Plan] = field(default_factory=dict)
    contiguous: bool | None = None
    first_query: Tensor | None = None  # of a static cache, when compiling: the column of the first query


_HOLES = f"{NAME}: a sliding window needs masks without holes: padding on the left or right only"

# By identity, through weak references: another tensor at the address of one that died is not found.
_known = WeakTensorKeyDictionary()


def _version(tensor: Tensor) -> int | None:
    """Counts the writes to a tensor; None under inference_mode, where torch does not count."""
    return None if tensor.is_inference() else tensor._version


def _recall(made: Tensor) -> _Known:
    """Returns the facts about a mask; none, if it was written to since, or could have been without a trace."""
    if torch.compiler.is_compiling():
        # A compiler sees no weak references, but attributes of tensors.
        noted: _Known | None = getattr(made, "_warpform_known", None)
        return _Known(None, getattr(made, "_warpform_pattern", None)) if noted is None else noted
    known: _Known | None = _known.get(made)
    version = _version(made)
    if known is None and hasattr(made, "_warpform_pattern"):  # made in a compiled part of the model
        known = _Known(version, made._warpform_pattern)
    if known is not None and known.version == version and (version is not None or known.pattern is not None):
        return known
    known = _Known(version)
    if version is not None:
        _known[made] = known
    return known


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
    """transformers' AttentionMaskInterface: the mask that a model hands to each layer's `attention`.

    Returns:
        [batch_size, keys], bool or int32 (see the top of this module). It is a tensor of its own, so that writing to
        the user's mask later changes nothing that was planned, and it is made anew in each forward pass.

    Raises:
        NotImplementedError: mask functions beyond causal, bidirectional, sliding window and packed sequences.
        ValueError: an attention_mask that is not two-dimensional.
    """
    pattern = _pattern(mask_function)
    if isinstance(q_offset, Tensor) and torch.compiler.is_compiling():
        return _mask_of_static_cache(
            pattern, batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask, device
        )
    # A static cache has room for keys that do not exist yet. Queries are the last ones that do.
    width = min(kv_length, int(q_offset) + q_length - kv_offset) if pattern.causal else kv_length
    if attention_mask is None:
        if pattern.segments is None:
            made = torch.ones(batch_size, width, dtype=torch.bool, device=device)
        else:
            made = (pattern.segments.expand(batch_size, -1) + 1).to(torch.int32)
    elif attention_mask.dim() != 2:
        raise ValueError(
            f"{NAME}: attention_mask must be of shape [batch, keys], got {_check.describe(attention_mask)}"
        )
    else:
        # generate() may have cropped it already: it calls this once before the model does.
        start = kv_offset if attention_mask.size(1) >= kv_offset + width else attention_mask.size(1) - width
        if start < 0:
            raise ValueError(
                f"{NAME}: attention_mask must cover the {width} keys, cached ones too, "
                f"got {_check.describe(attention_mask)}"
            )
        made = attention_mask[:, start : start + width] != 0
    full = attention_mask is None and pattern.segments is None
    made._warpform_pattern = pattern  # type: ignore[attr-defined]
    if torch.compiler.is_compiling():
        made._warpform_known = _Known(None, pattern, full)  # type: ignore[attr-defined]
    else:
        _known[made] = _Known(_version(made), pattern, full)
    return made


def _mask_of_static_cache(
    pattern: _Pattern,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Tensor,
    kv_offset: int,
    attention_mask: Tensor | None,
    device: torch.device | str | None,
) -> Tensor:
    """The mask of all keys that the cache has room for, false where none exists yet: no size depends on values."""
    columns = torch.arange(kv_length, device=device) + kv_offset
    made = (columns < q_offset + q_length).expand(batch_size, -1).contiguous()
    if attention_mask is not None:
        missing = kv_offset + kv_length - attention_mask.size(1)
        given = F.pad(attention_mask, (0, missing)) if missing > 0 else attention_mask
        made = made & (given[:, kv_offset : kv_offset + kv_length] != 0)
    made._warpform_pattern = pattern  # type: ignore[attr-defined]
    made._warpform_known = _Known(None, pattern, first_query=q_offset - kv_offset)  # type: ignore[attr-defined]
    return made


def _pattern(function: Callable[..., Any] | None) -> _Pattern:
    """transformers describes a mask by nested closures of (batch, head, query, key); those that are known, by name."""
    if function is None or function is _plain_masks.get("causal"):
        return _Pattern(causal=True)
    if function is _plain_masks.get("bidirectional"):
        return _Pattern(causal=False)
    name, parts = _made_by(function)
    if name == "sliding_window_overlay":
        return _Pattern(causal=False, window=(parts["sliding_window"] - 1, -1))
    if name == "sliding_window_bidirectional_overlay":
        return _Pattern(causal=False, window=(parts["sliding_window"], parts["sliding_window"]))
    if name == "packed_sequence_mask_function":
        return _Pattern(causal=False, segments=parts["packed_sequence_mask"])
    if name == "remap_positions_for_packed_sequence":
        return _pattern(parts["mask_function"])
    if name == "and_masks":
        result = _Pattern(causal=False)
        for function in parts["mask_functions"]:
            one = _pattern(function)
            result = _Pattern(
                result.causal or one.causal,
                (_narrower(result.window[0], one.window[0]), _narrower(result.window[1], one.window[1])),
                result.segments if one.segments is None else one.segments,
            )
        return result
    raise NotImplementedError(
        f"{NAME}: this model masks attention by {name}, which is neither causal, bidirectional, a sliding window nor "
        'packed sequences; use attn_implementation="sdpa" or "eager"'
    )


def _made_by(function: Any) -> tuple[str, dict[str, Any]]:
    """The factory that made a mask function, and what from; of a function by itself, its name."""
    noted: str | None = getattr(function, "_warpform_made_by", None)
    if noted is not None:
        return noted, function._warpform_parts
    name: str = getattr(function, "__qualname__", None) or "a function of its own"
    factory = name.partition(".<locals>")[0]
    if torch.compiler.is_compiling() or factory not in _FACTORIES:
        return name, {}
    return factory, dict(inspect.getclosurevars(function).nonlocals)


def _narrower(a: int, b: int) -> int:
    return max(a, b) if min(a, b) < 0 else min(a, b)


_plain_masks: dict[str, Callable[..., Any]] = {}  # known to `register`


# --- plans -----------------------------------------------------------------------------------------------------------


def _even(batch: int, length: int, device: torch.device) -> Tensor:
    return torch.arange(batch + 1, dtype=torch.int32, device=device) * length


def _plan(made: Tensor, known: _Known, q_length: int, causal: bool, keep_queries: bool) -> _Plan:
    key = (q_length, causal, keep_queries)
    plan = known.plans.get(key)
    if plan is None:
        if known.full and q_length <= made.size(1):
            plan = _dense_plan(made.size(0), q_length, made.size(1), made.device)
        else:
            plan = _make_plan(made, known.first_query, *key)
        known.plans[key] = plan
    return plan


def _dense_plan(batch: int, q_length: int, k_length: int, device: torch.device) -> _Plan:
    even = _even(batch, q_length, device)
    even_k = even if k_length == q_length else _even(batch, k_length, device)
    return _Plan(None, None, even, even_k, q_length, k_length)


def _make_plan(made: Tensor, first_query: Tensor | None, q_length: int, causal: bool, keep_queries: bool) -> _Plan:
    batch, width = made.shape
    if causal and q_length > width:
        raise ValueError(f"{NAME}: a causal attention_mask must cover the {q_length} queries, got {list(made.shape)}")
    compiling = torch.compiler.is_compiling()
    # When compiling, sizes must not depend on values, so there are as many rows as places; the last ones hold nothing.
    keys = Packing.from_mask(made, capacity=made.numel() if compiling else None)
    if made.dtype == torch.int32:
        return _plan_of_segments(made, keys, q_length)
    queries: Packing | None
    if q_length == width and not keep_queries and first_query is None:
        queries = keys
    elif causal and q_length > 1:
        if first_query is None:
            last = made[:, width - q_length :]
        else:
            last = made[:, torch.arange(q_length, device=made.device) + first_query]
        queries = Packing.from_mask(last, capacity=last.numel() if compiling else None)
    else:  # all of them: a single query is the last key, and queries of another sequence have a mask of their own
        queries = None
    even_q = queries is None or (not compiling and queries.total == batch * q_length)
    even_k = not compiling and keys.total == batch * width
    return _Plan(
        queries=None if even_q else queries,
        keys=None if even_k else keys,
        cu_seqlens_q=_even(batch, q_length, made.device) if queries is None else queries.cu_seqlens,
        cu_seqlens_k=keys.cu_seqlens,
        max_seqlen_q=q_length if queries is None else queries.max_seqlen,
        max_seqlen_k=keys.max_seqlen,
    )


def _plan_of_segments(made: Tensor, keys: Packing, q_length: int) -> _Plan:
    """Several sequences in a row: each ends where the next number or the next row begins."""
    if q_length != made.size(1):
        raise ValueError(
            f"{NAME}: packed sequences must have as many queries as keys, got {q_length} and {made.size(1)}"
        )
    if torch.compiler.is_compiling():
        return _traced_plan_of_segments(made, keys)
    numbers, rows = made.flatten()[keys.indices], keys.indices // made.size(1)
    starts = ((numbers.diff() != 0) | (rows.diff() != 0)).nonzero().flatten() + 1
    edges = [0, *starts.tolist(), keys.total] if keys.total else [0]
    cu_seqlens = torch.tensor(edges, dtype=torch.int32, device=made.device)
    longest = max((b - a for a, b in itertools.pairwise(edges)), default=0)
    packing = None if keys.total == made.numel() else keys
    return _Plan(packing, packing, cu_seqlens, cu_seqlens, longest, longest)


def _traced_plan_of_segments(made: Tensor, keys: Packing) -> _Plan:
    """The same where a compiler traces: how many sequences there are is a symbol. The rows that hold no token make one
    more sequence, which nothing reads."""
    numbers, rows = keys.pack(made), keys.indices.clamp(min=-1).floor_divide(made.size(1))
    first = numbers.new_ones(1, dtype=torch.bool)
    starts = torch.cat([first, (numbers.diff() != 0) | (rows.diff() != 0)]).nonzero().flatten()
    cu_seqlens = F.pad(starts, (0, 1), value=made.numel()).to(torch.int32)
    return _Plan(keys, keys, cu_seqlens, cu_seqlens, made.size(1), made.size(1))


def _has_no_holes(made: Tensor) -> Tensor:
    """bool []: padding is on the left or on the right only."""
    real = made != 0
    starts = (real[:, 1:] & ~real[:, :-1]).sum(1) + real[:, :1].sum(1)
    return (starts <= 1).all()


def _may_cross_attend(module: Any) -> bool:
    """Tells whether queries may come from another sequence than keys: then the mask says nothing about them."""
    config = getattr(module, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False):
        return True
    return any("cross_attention" in name and value for name, value in vars(config).items())


# --- attention -------------------------------------------------------------------------------------------------------


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
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | Tensor | None = None,
    max_length_k: int | Tensor | None = None,
    position_ids: Tensor | None = None,
    deterministic: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' AttentionInterface.

    Args:
        query: [B, H, Sq, D]. key: [B, Hkv, Sk, D]. value: [B, Hkv, Sk, Dv] with Dv at most D.
        attention_mask: as `mask` makes it, or any bool or integer [B, keys], nonzero where there is a token. Keys past
            its last column are not seen; causal queries are its last columns. None: no padding.
        cu_seq_lens_q, cu_seq_lens_k: int32 [sequences + 1], for B * S rows that hold several sequences end to end, with
            max_length_q and max_length_k, the longest of them.
        position_ids: checked against cu_seq_lens_q where that needs no synchronisation: on a CPU, and elsewhere with
            WARPFORM_VALIDATE=1.

    Returns:
        [B, Sq, H, Dv] with zeros at padded queries, and None, as there are no attention probabilities.

    Raises:
        NotImplementedError: dropout above 0 (in training), attention probabilities, sinks, score biases, paged caches.
        ValueError: a mask of other than two dimensions, tensors on different devices, position_ids that disagree with
            cu_seq_lens_q, holes in a mask under a sliding window.
        TypeError: a wrong dtype.
    """
    if dropout:
        raise NotImplementedError(
            f"{NAME}: attention dropout is not supported, got {dropout}; set the config's attention dropout "
            "(attention_probs_dropout_prob, attention_dropout) to 0, or call model.eval()"
        )
    if kwargs.get("output_attentions") or _probabilities_are_collected():
        raise NotImplementedError(
            f'{NAME}: output_attentions needs attn_implementation="eager": probabilities are not made'
        )
    for name, what in _UNSUPPORTED.items():
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"{NAME}: {what} ({name}) is not supported, as {type(module).__name__} asks for")
    for name, given in kwargs.items():  # of a model that came later than this list
        if isinstance(given, Tensor) and ("bias" in name or "sink" in name):
            raise NotImplementedError(f"{NAME}: {name} is not supported, as {type(module).__name__} asks for")
    _check_states(query, key, value)

    known = None
    if attention_mask is not None:
        _check_mask(attention_mask, query, key)
        known = _recall(attention_mask)
    if known is not None and known.pattern is not None:
        causal, window = known.pattern.causal, known.pattern.window
    else:
        causal = _is_causal(module, is_causal)
        window = (-1, -1) if sliding_window is None else (sliding_window - 1, -1 if causal else sliding_window - 1)

    q, k, v = (t.transpose(1, 2) for t in (query, key, value))  # [B, S, heads, D]
    head_dim, value_dim = q.size(3), v.size(3)
    if value_dim < head_dim:
        v = F.pad(v, (0, head_dim - value_dim))
    batch, q_length = q.size(0), q.size(1)

    given = (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
    if any(one is not None for one in given):
        plan = _plan_of_offsets(q, k, *given, position_ids, attention_mask, known, causal)
    elif attention_mask is not None and known is not None:
        k, v = k[:, : attention_mask.size(1)], v[:, : attention_mask.size(1)]
        plan = _plan(attention_mask, known, q_length, causal, not causal and _may_cross_attend(module))
        if window != (-1, -1) and not known.full and known.contiguous is None:
            no_holes = _has_no_holes(attention_mask)
            if torch.compiler.is_compiling():  # asked on the device as the program runs
                torch._assert_async(no_holes, _HOLES)
                known.contiguous = True
            else:
                known.contiguous = bool(no_holes)
        if known.contiguous is False and window != (-1, -1):
            raise ValueError(_HOLES)
    else:
        plan = _dense_plan(batch, q_length, k.size(1), q.device)

    out = varlen_attention(
        _rows(q, plan.queries), _rows(k, plan.keys), _rows(v, plan.keys),
        plan.cu_seqlens_q, plan.cu_seqlens_k, plan.max_seqlen_q, plan.max_seqlen_k,
        softmax_scale=scaling, causal=causal, window_size=window, softcap=softcap or 0.0,
        deterministic=bool(deterministic),
    )  # fmt: skip
    assert isinstance(out, Tensor)
    out = out.unflatten(0, (batch, q_length)) if plan.queries is None else plan.queries.unpack(out)
    return (out[..., :value_dim] if value_dim < head_dim else out), None


_collector: Any = None  # known to `register`


def _probabilities_are_collected() -> bool:
    """Tells whether the model was called with output_attentions=True, which some models do not hand to their layers."""
    wanted = None if _collector is None else _collector.get()
    return any("attentions" in name for name in wanted or ())


def _rows(t: Tensor, packing: Packing | None) -> Tensor:
    """[B, S, heads, D] -> [rows, heads, D], the last dimension contiguous."""
    if packing is not None:
        return packing.pack(t)
    t = t.flatten(0, 1)
    return t if t.stride(-1) == 1 else t.contiguous()


def _is_causal(module: torch.nn.Module, is_causal: bool | None) -> bool:
    if is_causal is None:
        is_causal = getattr(module, "is_causal", None)
    if is_causal is None:
        raise ValueError(
            f"{NAME}: nothing says whether {type(module).__name__} is causal: it has no is_causal, and gave "
            "neither that argument nor a mask made for this forward pass"
        )
    return bool(is_causal)


def _check_states(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, t in (("query", query), ("key", key), ("value", value)):
        _check.tensor(NAME, name, t)
        if t.dim() != 4:
            raise ValueError(
                f"{NAME}: {name} must be of shape [batch, heads, seqlen, head_dim], got {_check.describe(t)}"
            )
        _check.same_device(NAME, name, t, "query", query)
    if key.size(0) != query.size(0) or value.shape[:3] != key.shape[:3] or value.size(3) > key.size(3):
        raise ValueError(
            f"{NAME}: key and value must be of shapes [{query.size(0)}, heads, keys, head_dim], value's head_dim at "
            f"most key's, got key {_check.describe(key)} and value {_check.describe(value)}"
        )


def _check_mask(attention_mask: Tensor, query: Tensor, key: Tensor) -> None:
    _check.tensor(NAME, "attention_mask", attention_mask)
    if attention_mask.dim() != 2:
        what = "masks of more dimensions need"
        if attention_mask.is_floating_point():
            what = "numbers that are added to scores, such as a relative position bias (BEiT), need"
        raise ValueError(
            f"{NAME}: attention_mask must be of shape [batch, keys], got {_check.describe(attention_mask)}; "
            f'{what} attn_implementation="sdpa" or "eager"'
        )
    if attention_mask.is_floating_point():
        raise TypeError(f"{NAME}: attention_mask must be bool or integer, got {_check.describe(attention_mask)}")
    _check.same_device(NAME, "attention_mask", attention_mask, "query", query)
    if attention_mask.size(0) != query.size(0) or attention_mask.size(1) > key.size(2):
        raise ValueError(
            f"{NAME}: attention_mask must be of shape [{query.size(0)}, at most {key.size(2)}], "
            f"got {_check.describe(attention_mask)}"
        )


def _plan_of_offsets(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_length_q: int | Tensor | None,
    max_length_k: int | Tensor | None,
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
    known: _Known | None,
    causal: bool,
) -> _Plan:
    """The plan that a caller gives, checked against what else was given."""
    if cu_seqlens_q is None or cu_seqlens_k is None or max_length_q is None or max_length_k is None:
        raise ValueError(
            f"{NAME}: cu_seq_lens_q, cu_seq_lens_k, max_length_q and max_length_k go together; one is missing"
        )
    for name, t in (("cu_seq_lens_q", cu_seqlens_q), ("cu_seq_lens_k", cu_seqlens_k)):
        _check.tensor(NAME, name, t)
        if t.dim() != 1 or t.is_floating_point() or t.size(0) == 0:
            raise ValueError(f"{NAME}: {name} must be int32 of shape [sequences + 1], got {_check.describe(t)}")
        _check.same_device(NAME, name, t, "query", q)
    if not torch.compiler.is_compiling():
        padded = (
            attention_mask is not None
            and known is not None
            and attention_mask.dtype != torch.int32
            and _plan(attention_mask, known, q.size(1), causal, False).keys is not None
        )
        if padded:
            raise ValueError(f"{NAME}: an attention_mask with padding and cu_seq_lens_q exclude each other")
        # Three dimensions: positions in time, height and width, which say nothing about sequences.
        if position_ids is not None and position_ids.dim() <= 2 and (q.device.type == "cpu" or _env.validate()):
            _check.same_device(NAME, "position_ids", position_ids, "query", q)
            _check_positions(position_ids, cu_seqlens_q, q.size(0) * q.size(1))
    return _Plan(
        None,
        None,
        cu_seqlens_q.to(torch.int32),
        cu_seqlens_k.to(torch.int32),
        int(max_length_q) if isinstance(max_length_q, Tensor) else max_length_q,
        int(max_length_k) if isinstance(max_length_k, Tensor) else max_length_k,
    )


def _check_positions(position_ids: Tensor, cu_seqlens: Tensor, total: int) -> None:
    """Positions must count up by one inside each sequence, and not run on from one into the next."""
    if position_ids.numel() != total:
        return  # one row for a batch of several, which says nothing about sequences
    positions = position_ids.flatten()[: int(cu_seqlens[-1])]
    jumps = (positions.diff() != 1).nonzero().flatten() + 1
    edges = cu_seqlens.to(jumps.dtype).unique()
    edges = edges[(edges > 0) & (edges < positions.numel())]
    if not torch.equal(jumps, edges):
        raise ValueError(
            f"{NAME}: position_ids must begin anew where cu_seq_lens_q says that a sequence does, at rows "
            f"{edges.tolist()[:8]}, got new beginnings at rows {jumps.tolist()[:8]}"
        )
