"""Inputs that every implementation of an op is tried on: the reference, kernels in the emulator, kernels on a GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# Above, a CPU and the way to a GPU would take longer than the test.
_LARGEST_DRAWN_ON_THE_CPU = 2**16


def random(*shape: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Normal random numbers, of the seed of torch.

    Small tensors are drawn on the CPU, so that a seed means the same on every device and the emulator repeats what
    failed on a GPU; large ones on the device itself.
    """
    large = math.prod(shape) > _LARGEST_DRAWN_ON_THE_CPU
    return torch.randn(*shape, device=device if large else "cpu").to(device, dtype)


def strided(t: Tensor) -> Tensor:
    """The same values in every second row of a tensor whose other rows hold NaN."""
    if t.dtype.is_floating_point:
        storage = torch.full((2 * t.size(0), *t.shape[1:]), float("nan"), dtype=t.dtype, device=t.device)
    else:
        storage = torch.full((2 * t.size(0), *t.shape[1:]), 77, dtype=t.dtype, device=t.device)
    storage[::2] = t
    return storage[::2]


def misaligned(t: Tensor) -> Tensor:
    """The same values, contiguous, one element past a multiple of 16 bytes; NaN before them."""
    storage = t.new_full((t.numel() + 1,), float("nan"))
    storage[1:] = t.flatten()
    return storage[1:].view(t.shape)


# ---- packing ----


@dataclass(frozen=True)
class MaskCase:
    """A mask [batch, seqlen], by the pattern of its rows."""

    name: str
    rows: tuple[str, ...]  # "1" is a token
    capacity: int | None = None  # None: batch * seqlen

    def mask(self, device: str = "cpu") -> Tensor:
        """The mask, int64 [batch, seqlen]."""
        seqlen = len(self.rows[0]) if self.rows else 3
        return torch.tensor([[int(c) for c in row] for row in self.rows], device=device).view(len(self.rows), seqlen)

    def __str__(self) -> str:
        return self.name


def _pseudo_random_rows(batch: int, seqlen: int) -> tuple[str, ...]:
    generator = torch.Generator().manual_seed(batch * 1000 + seqlen)
    share = torch.rand(batch, 1, generator=generator)
    bits = torch.rand(batch, seqlen, generator=generator) < share
    return tuple("".join("1" if bit else "0" for bit in row) for row in bits.tolist())


MASK_CASES = (
    MaskCase("right", ("11100", "11111", "10000")),
    MaskCase("left", ("00111", "11111", "00001")),
    MaskCase("holes", ("10101", "01010", "11011")),
    MaskCase("empty_rows", ("00000", "01100", "00000")),
    MaskCase("all_masked", ("0000", "0000")),
    MaskCase("full", ("1111", "1111")),
    MaskCase("one", ("1",)),
    MaskCase("no_batch", ()),
    MaskCase("no_seqlen", ("", "")),
    MaskCase("capacity_spare", ("1101", "0111"), capacity=13),
    MaskCase("capacity_exact", ("1101", "0111"), capacity=6),
    MaskCase("capacity_cuts_a_row", ("1101", "0111", "1111"), capacity=5),
    MaskCase("capacity_zero", ("1101", "0111"), capacity=0),
    MaskCase("long", _pseudo_random_rows(3, 1031)),
    MaskCase("many", _pseudo_random_rows(311, 17)),
    MaskCase("long_and_cut", _pseudo_random_rows(2, 2050), capacity=777),
)


@dataclass(frozen=True)
class RowCase:
    """What is packed: rows of a dtype and trailing shape."""

    dtype: torch.dtype
    trailing: tuple[int, ...]

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}-{'x'.join(map(str, self.trailing)) or 'scalar'}"


ROW_CASES = (
    RowCase(torch.float32, (384,)),
    RowCase(torch.float16, (3, 5)),  # 30 bytes: no vector fits
    RowCase(torch.bfloat16, (8,)),  # 16 bytes: one vector
    RowCase(torch.float64, ()),
    RowCase(torch.int64, ()),
    RowCase(torch.bool, (7,)),
    RowCase(torch.uint8, (1, 1, 33)),
    RowCase(torch.float32, (0,)),
    RowCase(torch.complex64, (2,)),
)


# ---- attention ----


@dataclass(frozen=True)
class AttentionCase:
    """Lengths and options of one call of varlen_attention."""

    name: str
    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...] | None = None  # None: as lengths_q
    heads: int = 2
    heads_k: int | None = None  # None: as heads
    head_dim: int = 32
    softmax_scale: float | None = None
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    slopes: str | None = None  # "heads" or "batch"
    rows_past_the_end: int = 0
    layout: str = "contiguous"  # or "qkv": slices of one tensor, as a QKV product gives; needs equal lengths and heads
    score_spread: float = 1.0  # factor on q: large ones make the softmax sharp

    def __str__(self) -> str:
        return self.name

    @property
    def keys(self) -> tuple[int, ...]:
        """Lengths of the key sequences."""
        return self.lengths_q if self.lengths_k is None else self.lengths_k

    @property
    def kv_heads(self) -> int:
        """Heads of k and v."""
        return self.heads if self.heads_k is None else self.heads_k


@dataclass
class AttentionInputs:
    """Tensors of one AttentionCase, and the gradients that come back."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    slopes: Tensor | None
    dout: Tensor
    dlse: Tensor
    options: dict[str, object] = field(default_factory=dict)  # keyword arguments of the op
    oracle_options: dict[str, object] = field(default_factory=dict)


def attention_inputs(case: AttentionCase, dtype: torch.dtype, device: str = "cpu") -> AttentionInputs:
    """Fresh random tensors; rows past the last sequence hold NaN, which must go nowhere."""
    total_q = sum(case.lengths_q) + case.rows_past_the_end
    total_k = sum(case.keys) + case.rows_past_the_end
    if case.layout == "qkv":
        assert case.lengths_k is None and case.heads_k is None
        q, k, v = random(total_q, 3, case.heads, case.head_dim, dtype=dtype, device=device).unbind(1)
        q.mul_(case.score_spread)
    else:
        q = random(total_q, case.heads, case.head_dim, dtype=dtype, device=device) * case.score_spread
        k, v = (random(total_k, case.kv_heads, case.head_dim, dtype=dtype, device=device) for _ in range(2))
    dout = random(total_q, case.heads, case.head_dim, dtype=dtype, device=device)
    lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    dlse = random(case.heads, total_q, dtype=lse_dtype, device=device)
    if case.rows_past_the_end:
        for t, lengths in ((q, case.lengths_q), (k, case.keys), (v, case.keys), (dout, case.lengths_q)):
            t[sum(lengths) :] = float("nan")
    slopes = None
    if case.slopes is not None:
        shape = (case.heads,) if case.slopes == "heads" else (len(case.lengths_q), case.heads)
        slopes = torch.rand(shape).to(device)
    options = {
        "softmax_scale": case.softmax_scale,
        "causal": case.causal,
        "window_size_left": case.window[0],
        "window_size_right": case.window[1],
        "softcap": case.softcap,
        "alibi_slopes": slopes,
    }
    oracle_options = {
        "softmax_scale": case.softmax_scale,
        "causal": case.causal,
        "window": case.window,
        "softcap": case.softcap,
        "slopes": slopes,
    }
    cu_seqlens_q = offsets(case.lengths_q, device)
    cu_seqlens_k = cu_seqlens_q if case.lengths_k is None else offsets(case.keys, device)
    return AttentionInputs(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max(case.lengths_q, default=0), max(case.keys, default=0),
        slopes, dout, dlse, options, oracle_options,
    )  # fmt: skip


def offsets(lengths: tuple[int, ...] | list[int], device: str = "cpu") -> Tensor:
    """cu_seqlens of lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


RAGGED = (17, 0, 1, 33, 64, 5)
ATTENTION_CASES = (
    AttentionCase("plain", RAGGED),
    AttentionCase("qkv_slices", RAGGED, heads=3, layout="qkv"),
    AttentionCase("one_long", (3, 2, 700, 1, 4)),
    AttentionCase("many_short", (5, 3, 5, 2, 3, 5, 1, 5, 3, 1, 2), layout="qkv"),
    AttentionCase("adjacent_equal", (9, 9, 9, 4, 4)),
    AttentionCase("one_token_each", (1, 1, 1)),
    AttentionCase("all_empty", (0, 0)),
    AttentionCase("no_sequence", ()),
    AttentionCase("rows_past_the_end", (6, 0, 21), rows_past_the_end=9),
    AttentionCase("cross", (5, 1, 40, 0, 7), (31, 9, 3, 4, 0)),
    AttentionCase("decode", (1, 2, 1, 1), (700, 300, 256, 5)),
    AttentionCase("decode_gqa_window", (1, 2, 4), (600, 41, 300), heads=4, heads_k=2, head_dim=80, causal=True,
                  window=(400, -1)),
    AttentionCase("decode_softcap_alibi", (1, 2), (520, 33), head_dim=40, softcap=3.0, slopes="batch", causal=True),
    AttentionCase("causal", RAGGED, causal=True),
    AttentionCase("causal_more_keys", (5, 1, 40), (31, 9, 66), causal=True),
    AttentionCase("causal_fewer_keys", (31, 9, 66), (5, 1, 40), causal=True),
    AttentionCase("window", RAGGED, window=(4, 7)),
    AttentionCase("window_left", RAGGED, window=(6, -1)),
    AttentionCase("window_right", RAGGED, window=(-1, 3)),
    AttentionCase("window_diagonal", RAGGED, window=(0, 0)),
    AttentionCase("window_causal", RAGGED, causal=True, window=(10, 5)),
    AttentionCase("window_long", (600, 31), (577, 40), window=(33, 12)),
    AttentionCase("window_fewer_keys", (40, 12), (13, 2), window=(3, 2)),
    AttentionCase("softcap", RAGGED, softcap=3.0, score_spread=4.0),
    AttentionCase("softcap_causal_window", (40, 12), (33, 20), softcap=2.0, causal=True, window=(9, 0)),
    AttentionCase("alibi", RAGGED, heads=3, slopes="heads"),
    AttentionCase("alibi_batch", (17, 5, 17, 2, 5), slopes="batch"),
    AttentionCase("alibi_cross_causal", (5, 40), (31, 13), slopes="batch", causal=True),
    AttentionCase("gqa", RAGGED, heads=6, heads_k=2),
    AttentionCase("mqa_cross_alibi", (5, 1, 40), (31, 9, 3), heads=4, heads_k=1, slopes="heads", causal=True),
    AttentionCase("scale", RAGGED, softmax_scale=0.37),
    AttentionCase("sharp", (64, 130), score_spread=30.0),
    AttentionCase("everything", (40, 0, 7), (33, 3, 20), heads=4, heads_k=2, softcap=5.0, slopes="batch", causal=True,
                  window=(15, -1), softmax_scale=0.3, rows_past_the_end=3),
    AttentionCase("d16", (33, 5), head_dim=16),
    AttentionCase("d64", (70, 5), head_dim=64, causal=True),
    AttentionCase("d80", (70, 5), head_dim=80),
    AttentionCase("d128", (70, 5), head_dim=128),
    AttentionCase("d256", (40, 5), head_dim=256),
    AttentionCase("d7", (12, 5), head_dim=7),
)  # fmt: skip


@st.composite
def attention_cases(draw: st.DrawFn) -> AttentionCase:
    """Any combination of lengths and options."""
    batch = draw(st.integers(0, 6))
    length = st.one_of(st.integers(0, 3), st.integers(0, 40), st.sampled_from((31, 32, 33, 64, 65)))
    lengths_q = tuple(draw(st.lists(length, min_size=batch, max_size=batch)))
    lengths_k = draw(st.none() | st.lists(length, min_size=batch, max_size=batch).map(tuple))
    heads_k = draw(st.integers(1, 3))
    heads = heads_k * draw(st.integers(1, 3))
    side = st.one_of(st.just(-1), st.integers(0, 40))
    layout = draw(st.sampled_from(("contiguous", "qkv"))) if lengths_k is None and heads == heads_k else "contiguous"
    return AttentionCase(
        "drawn",
        lengths_q,
        lengths_k,
        heads=heads,
        heads_k=None if heads_k == heads else heads_k,
        head_dim=draw(st.sampled_from((8, 16, 24, 32, 64))),
        softmax_scale=draw(st.none() | st.floats(0.05, 1.0)),
        causal=draw(st.booleans()),
        window=(draw(side), draw(side)),
        softcap=draw(st.sampled_from((0.0, 0.0, 1.5, 20.0))),
        slopes=draw(st.sampled_from((None, "heads", "batch"))),
        rows_past_the_end=draw(st.sampled_from((0, 0, 1, 5))),
        layout=layout,
    )


# ---- disentangled attention ----


@dataclass(frozen=True)
class DisentangledCase:
    """Lengths and options of one call of disentangled_attention."""

    name: str
    lengths: tuple[int, ...]
    heads: int = 2
    head_dim: int = 32
    terms: str = "both"  # or "key" (content to position only), "query" (position to content only), "none"
    span: int = 8  # half the relative positions that have an embedding
    position_buckets: int = 0
    max_relative_positions: int = 512
    softmax_scale: float | None = None
    holes: bool = False  # positions with gaps, as a mask with holes gives
    rows_past_the_end: int = 0
    layout: str = "contiguous"  # or "qkv": slices of one tensor, as a QKV product gives
    score_spread: float = 1.0  # factor on q and k: large ones make the softmax sharp

    def __str__(self) -> str:
        return self.name


@dataclass
class DisentangledInputs:
    """Tensors of one DisentangledCase, and the gradient that comes back."""

    q: Tensor
    k: Tensor
    v: Tensor
    pos_key: Tensor | None
    pos_query: Tensor | None
    cu_seqlens: Tensor
    max_seqlen: int
    dout: Tensor
    options: dict[str, object] = field(default_factory=dict)  # keyword arguments of the op and of the oracle


def disentangled_inputs(case: DisentangledCase, dtype: torch.dtype, device: str = "cpu") -> DisentangledInputs:
    """Fresh random tensors; rows past the last sequence hold NaN, which must go nowhere."""
    tokens = sum(case.lengths)
    shape = (tokens + case.rows_past_the_end, case.heads, case.head_dim)
    if case.layout == "qkv":
        q, k, v = random(shape[0], 3, *shape[1:], dtype=dtype, device=device).unbind(1)
    else:
        q, k, v = (random(*shape, dtype=dtype, device=device) for _ in range(3))
    q.mul_(case.score_spread)
    k.mul_(case.score_spread)
    dout = random(*shape, dtype=dtype, device=device)
    for t in (q, k, v, dout):
        t[tokens:] = float("nan")
    relative = (2 * case.span, case.heads, case.head_dim)
    pos_key = random(*relative, dtype=dtype, device=device) if case.terms in ("both", "key") else None
    pos_query = random(*relative, dtype=dtype, device=device) if case.terms in ("both", "query") else None
    positions = None
    if case.holes:
        rows = [torch.randint(1, 4, (length,)).cumsum(0) + 5 for length in case.lengths]
        positions = torch.cat([*rows, torch.full((case.rows_past_the_end,), -(2**62))]).to(device, torch.int64)
    options = {
        "positions": positions,
        "softmax_scale": case.softmax_scale,
        "position_buckets": case.position_buckets,
        "max_relative_positions": case.max_relative_positions,
    }
    return DisentangledInputs(
        q, k, v, pos_key, pos_query, offsets(case.lengths, device), max(case.lengths, default=0), dout, options
    )


LOG_BUCKETS = {"position_buckets": 16, "max_relative_positions": 32, "span": 16}
DISENTANGLED_CASES = (
    DisentangledCase("linear", RAGGED),
    DisentangledCase("log", RAGGED, **LOG_BUCKETS),
    DisentangledCase("log_long", (3, 300, 1), heads=1, **LOG_BUCKETS),
    DisentangledCase("linear_long", (3, 200, 1), heads=1, span=40),
    DisentangledCase("linear_within_the_span", RAGGED, span=100),
    DisentangledCase("one_embedding_a_side", RAGGED, span=1),
    DisentangledCase("odd_span", RAGGED, span=13),
    DisentangledCase("span_past_the_buckets", (70, 9), position_buckets=8, max_relative_positions=20, span=50),
    DisentangledCase("span_below_the_buckets", (70, 9), position_buckets=32, max_relative_positions=64, span=5),
    DisentangledCase("three_buckets", RAGGED, position_buckets=3, max_relative_positions=9, span=3),
    DisentangledCase("key_only", RAGGED, terms="key", **LOG_BUCKETS),
    DisentangledCase("query_only", RAGGED, terms="query", **LOG_BUCKETS),
    DisentangledCase("neither", RAGGED, terms="none"),
    DisentangledCase("key_only_linear", (150, 2), heads=1, terms="key", span=20),
    DisentangledCase("query_only_linear", (150, 2), heads=1, terms="query", span=20),
    DisentangledCase("many_short", (5, 3, 5, 2, 3, 5, 1, 5, 3, 1, 2), layout="qkv"),
    DisentangledCase("one_token_each", (1, 1, 1)),
    DisentangledCase("all_empty", (0, 0)),
    DisentangledCase("no_sequence", ()),
    DisentangledCase("rows_past_the_end", (6, 0, 71), rows_past_the_end=9, **LOG_BUCKETS),
    DisentangledCase("holes", RAGGED, holes=True, **LOG_BUCKETS),
    DisentangledCase("holes_linear", (70, 3), holes=True, span=30, rows_past_the_end=4),
    DisentangledCase("qkv_slices", RAGGED, heads=3, layout="qkv", **LOG_BUCKETS),
    DisentangledCase("scale", RAGGED, softmax_scale=0.37, **LOG_BUCKETS),
    DisentangledCase("sharp", (64, 90), score_spread=5.0, **LOG_BUCKETS),
    DisentangledCase("d16", (33, 5), head_dim=16),
    DisentangledCase("d64", (70, 130, 5), head_dim=64, layout="qkv", **LOG_BUCKETS),
    DisentangledCase("d72", (70, 5), head_dim=72, **LOG_BUCKETS),
    DisentangledCase("d128", (70, 5), head_dim=128, holes=True, **LOG_BUCKETS),
    DisentangledCase("d7", (12, 5), head_dim=7),
)  # fmt: skip


@st.composite
def disentangled_cases(draw: st.DrawFn) -> DisentangledCase:
    """Any combination of lengths and options."""
    length = st.one_of(st.integers(0, 3), st.integers(0, 40), st.sampled_from((63, 64, 65, 100)))
    buckets = draw(st.one_of(st.just(0), st.integers(2, 40)))
    return DisentangledCase(
        "drawn",
        tuple(draw(st.lists(length, max_size=5))),
        heads=draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from((8, 16, 24, 32, 64))),
        terms=draw(st.sampled_from(("both", "both", "key", "query", "none"))),
        # With holes no length bounds the distances; so many columns are reached by max_relative_positions.
        span=draw(st.integers(1, buckets // 2 * 2 if buckets else 50)),
        position_buckets=buckets,
        max_relative_positions=buckets // 2 + draw(st.integers(2, 100)),
        softmax_scale=draw(st.none() | st.floats(0.05, 1.0)),
        holes=draw(st.booleans()),
        rows_past_the_end=draw(st.sampled_from((0, 0, 1, 5))),
        layout=draw(st.sampled_from(("contiguous", "qkv"))),
    )


# ---- window attention ----


@dataclass(frozen=True)
class WindowCase:
    """Shapes and options of one call of window_attention."""

    name: str
    grid: tuple[int, ...]  # (depth,) height, width
    window: tuple[int, ...]
    shift: tuple[int, ...] | None = None  # None: 0
    batch: int = 1
    heads: int = 2
    head_dim: int = 32
    bias: str | None = "float32"  # the dtype of the bias table: "float32", "qkv" (as qkv), or None: no table
    cosine: bool = False
    qkv_bias: bool = False
    scale: float | None = None
    mask_value: float = -100.0
    score_spread: float = 1.0  # factor on q: large ones make the softmax sharp
    zero_rows: bool = False  # some tokens' q and k are 0
    hidden_rows: bool = False  # tables of -inf: head 0 hides the first token's keys, the last of several heads all keys

    def __str__(self) -> str:
        return self.name

    @property
    def tokens(self) -> int:
        """Tokens of a window."""
        return math.prod(self.window)

    @property
    def windows(self) -> int:
        """Windows of one image."""
        return math.prod(-(-n // w) for n, w in zip(self.grid, self.window, strict=True))


@dataclass
class WindowInputs:
    """Tensors of one WindowCase, and the gradient that comes back."""

    qkv: Tensor  # [batch, *grid, 3, heads, head_dim]
    table: Tensor | None  # [prod(2 w - 1), heads]
    logit_scale: Tensor | None  # [heads]
    qkv_bias: Tensor | None  # [3, heads, head_dim]
    dout: Tensor  # [batch, *grid, heads * head_dim]
    options: dict[str, Any] = field(default_factory=dict)  # the op's arguments behind the tensors

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The op's tensors, in the schema's order."""
        return self.qkv, self.table, self.logit_scale, self.qkv_bias


def window_inputs(case: WindowCase, dtype: torch.dtype, device: str = "cpu") -> WindowInputs:
    """Fresh random tensors; one head's logit scale is past the clamp."""
    qkv = random(case.batch, *case.grid, 3, case.heads, case.head_dim, dtype=dtype, device=device)
    qkv[..., 0, :, :] *= case.score_spread
    if case.zero_rows:
        qkv.view(-1, 3, case.heads, case.head_dim)[::3, :2] = 0
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    table = logit_scale = qkv_bias = None
    if case.bias is not None:
        entries = math.prod(2 * w - 1 for w in case.window)
        table = random(entries, case.heads, dtype=wide if case.bias == "float32" else dtype, device=device)
        if case.hidden_rows:
            # Only from the first token of a window no key lies before it along any axis.
            boxes = table.view(*(2 * w - 1 for w in case.window), case.heads)
            boxes[(*(slice(w) for w in case.window), 0)] = -math.inf
            if case.heads > 1:
                table[:, -1] = -math.inf
    if case.cosine:
        logit_scale = torch.linspace(1.5, 5.0, case.heads).to(device, wide)
    if case.qkv_bias:
        qkv_bias = random(3, case.heads, case.head_dim, dtype=dtype, device=device)
    dout = random(case.batch, *case.grid, case.heads * case.head_dim, dtype=dtype, device=device)
    options = {
        "window_size": list(case.window),
        "shift_size": list(case.shift or [0] * len(case.window)),
        "scale": case.scale,
        "mask_value": case.mask_value,
    }
    return WindowInputs(qkv, table, logit_scale, qkv_bias, dout, options)


WINDOW_CASES = (
    WindowCase("w7_shifted", (14, 21), (7, 7), (3, 3), heads=3),
    WindowCase("w7_padded", (10, 15), (7, 7), (3, 3), batch=2, qkv_bias=True),
    WindowCase("w7_padded_without_bias", (9, 7), (7, 7), bias=None),
    WindowCase("w8_plain", (16, 8), (8, 8), batch=2, heads=1, bias=None),
    WindowCase("w8_shifted", (8, 16), (8, 8), (4, 4), heads=4),
    WindowCase("w8_cosine", (16, 8), (8, 8), (4, 4), heads=3, cosine=True, mask_value=-200.0),
    WindowCase("w7_cosine_padded", (8, 9), (7, 7), (3, 3), heads=3, cosine=True, qkv_bias=True),
    WindowCase("cosine_zero_rows", (7, 10), (4, 4), (2, 2), cosine=True, zero_rows=True),
    WindowCase("cosine_bare", (6, 6), (3, 3), cosine=True, bias=None),
    WindowCase("w2", (5, 6), (2, 2), (1, 1), heads=3, head_dim=16, batch=2),
    WindowCase("w1", (3, 4), (1, 1), head_dim=16),
    WindowCase("w4_many", (25, 18), (4, 4), (2, 2), head_dim=16, heads=5, qkv_bias=True),
    WindowCase("uneven", (11, 7), (5, 3), (2, 1), heads=1, batch=3),
    WindowCase("one_axis_shifted", (10, 10), (5, 5), (0, 3)),
    WindowCase("window_beyond_grid", (3, 5), (7, 7), (3, 3), qkv_bias=True),
    WindowCase("strip", (1, 23), (1, 8), (0, 4)),
    WindowCase("volume", (3, 5, 9), (2, 3, 4), (1, 1, 2), qkv_bias=True),
    WindowCase("volume_w4", (4, 8, 4), (4, 4, 4), (2, 2, 0), head_dim=64),
    WindowCase("volume_long", (8, 7, 9), (8, 7, 7), (4, 3, 0), heads=1),
    WindowCase("w12_shifted", (15, 20), (12, 12), (6, 6), heads=3, qkv_bias=True),
    WindowCase("w12_cosine", (12, 13), (12, 12), (6, 6), heads=3, cosine=True, qkv_bias=True),
    WindowCase("w16", (16, 17), (16, 16), (8, 8), heads=1, head_dim=64),
    WindowCase("w24", (24, 25), (24, 24), (12, 12), heads=1, head_dim=8),
    WindowCase("volume_w8", (8, 9, 8), (8, 8, 8), (4, 4, 4), heads=1, head_dim=16, qkv_bias=True),
    WindowCase("n65", (5, 13), (5, 13), bias=None, cosine=True, zero_rows=True),
    WindowCase("n128", (8, 32), (8, 16), (4, 8), bias="qkv"),
    WindowCase("mask_barely_counts", (8, 8), (4, 4), (2, 2), mask_value=-0.5),
    WindowCase("scale", (7, 9), (4, 4), scale=0.4),
    WindowCase("sharp", (14, 14), (7, 7), (3, 3), score_spread=30.0),
    WindowCase("sharp_long", (12, 12), (12, 12), (6, 6), score_spread=30.0),
    WindowCase("hidden_rows", (8, 9), (4, 5), (2, 2), heads=3, qkv_bias=True, mask_value=-math.inf, hidden_rows=True),
    WindowCase("hidden_rows_cosine", (7, 8), (7, 7), (3, 3), cosine=True, hidden_rows=True),
    WindowCase(
        "hidden_rows_long", (9, 11), (9, 9), (4, 3), heads=3, qkv_bias=True, mask_value=-math.inf, hidden_rows=True
    ),
    WindowCase("hidden_rows_long_cosine", (8, 9), (8, 9), cosine=True, hidden_rows=True),
    WindowCase("table_as_qkv", (9, 9), (5, 5), (2, 2), bias="qkv"),
    WindowCase("no_batch", (8, 8), (4, 4), (2, 2), batch=0, qkv_bias=True, cosine=True),
    WindowCase("no_rows", (0, 8), (4, 4), qkv_bias=True),
    WindowCase("no_heads", (8, 8), (4, 4), heads=0),
    WindowCase("d8", (7, 7), (4, 4), (2, 2), head_dim=8, heads=5),
    WindowCase("d24", (7, 7), (4, 4), (2, 2), head_dim=24, heads=3, qkv_bias=True),
    WindowCase("d48", (8, 7), (7, 7), (3, 3), head_dim=48, cosine=True),
    WindowCase("d72", (8, 8), (8, 8), (4, 4), head_dim=72),
    WindowCase("d72_long", (9, 9), (9, 9), (4, 4), head_dim=72, qkv_bias=True),
    WindowCase("d96_long", (9, 20), (9, 10), (4, 5), heads=1, head_dim=96),
    WindowCase("d128", (7, 9), (7, 7), (3, 3), head_dim=128, heads=1, qkv_bias=True),
    WindowCase("d128_long", (9, 10), (9, 9), (4, 4), head_dim=128, heads=1, cosine=True),
    WindowCase("d16_long", (9, 10), (9, 9), (4, 4), head_dim=16, heads=3),
    WindowCase("d7", (6, 6), (4, 4), (2, 2), head_dim=7),
)


@st.composite
def window_cases(draw: st.DrawFn) -> WindowCase:
    """Any combination of shapes and options."""
    axes = draw(st.integers(2, 3))
    side = st.integers(1, 11 if axes == 2 else 5)
    window = tuple(draw(side) for _ in range(axes))
    cosine = draw(st.booleans())
    return WindowCase(
        "drawn",
        tuple(draw(st.integers(1, 14 if axes == 2 else 7)) for _ in range(axes)),
        window,
        tuple(draw(st.integers(0, w - 1)) for w in window),
        batch=draw(st.integers(0, 2)),
        heads=draw(st.integers(1, 5)),
        head_dim=draw(st.sampled_from((8, 16, 24, 32, 64))),
        bias=draw(st.sampled_from((None, "float32", "qkv"))),
        cosine=cosine,
        qkv_bias=draw(st.booleans()),
        scale=None if cosine else draw(st.none() | st.floats(0.05, 1.0)),
        mask_value=draw(st.sampled_from((-100.0, -200.0, -1.0, 0.0, -math.inf))),
        zero_rows=draw(st.booleans()),
        hidden_rows=draw(st.booleans()),
    )


# ---- LayerNorm and GELU ----

# What has CUDA kernels: the dtype of x, and whether the parameters are float32 beside it.
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KERNEL_PARAMETERS = tuple(
    (d, wide) for d in KERNEL_DTYPES for wide in ((False,) if d == torch.float32 else (False, True))
)
KERNEL_PARAMETER_IDS = tuple(f"{str(d).removeprefix('torch.')}{'-wide' * wide}" for d, wide in KERNEL_PARAMETERS)


@dataclass(frozen=True)
class LayerNormCase:
    """Shape and optional inputs of one call of add_bias_residual_layer_norm."""

    name: str
    shape: tuple[int, ...]
    bias: bool = True
    residual: bool = True
    eps: float = 1e-5
    wide_parameters: bool = False  # float32 parameters whatever x is
    offset: float = 0.0  # far from zero mean, one-pass variances go wrong
    strided: bool = False
    no_variance: bool = False  # every row is constant

    def __str__(self) -> str:
        return self.name


LAYER_NORM_CASES = (
    LayerNormCase("plain", (37, 384)),
    LayerNormCase("wide_parameters", (37, 384), wide_parameters=True),
    LayerNormCase("no_bias", (5, 7, 96), bias=False),
    LayerNormCase("no_residual", (19, 768), residual=False),
    LayerNormCase("alone", (19, 64), bias=False, residual=False, eps=1e-12),
    LayerNormCase("odd_width", (11, 333)),
    LayerNormCase("one_wide_row", (1, 5000)),
    LayerNormCase("width_one", (6, 1), no_variance=True),
    LayerNormCase("vector", (48,)),
    LayerNormCase("no_rows", (0, 32)),
    LayerNormCase("no_rows_in_the_middle", (3, 0, 32)),
    LayerNormCase("offset", (9, 256), offset=100.0),
    LayerNormCase("strided", (9, 128), strided=True),
)

# Every shape of kernel, its last column and one more; what is no multiple of 16 bytes is loaded element by element.
LAYER_NORM_WIDTHS = (
    1, 2, 3, 7, 8, 31, 32, 33, 64, 100, 384, 511, 512, 513, 768, 1000, 1024, 1032, 3072, 4096, 4104, 5000, 5001, 16383,
    16384,
)  # fmt: skip


def layer_norm_grid(width: int, *, wide_parameters: bool) -> tuple[LayerNormCase, ...]:
    """With and without bias and residual (long rows: both or neither); more rows than one block takes at a time."""
    rows = 21 if width <= 513 else 11 if width <= 1032 else 3
    return tuple(
        LayerNormCase(
            f"{rows}x{width}{'-bias' * bias}{'-residual' * residual}",
            (rows, width),
            bias=bias,
            residual=residual,
            wide_parameters=wide_parameters,
            no_variance=width == 1,
        )
        for bias in (False, True)
        for residual in ((False, True) if width <= 1032 else (bias,))
    )


@st.composite
def layer_norm_cases(draw: st.DrawFn) -> LayerNormCase:
    """Any shape and options; at least three columns, below which the variance of a row may be nothing but rounding."""
    width = draw(st.one_of(st.integers(3, 70), st.integers(3, 1200), st.integers(1, 160).map(lambda n: 8 * n)))
    rows = draw(st.integers(0, 40 if width < 300 else 6))
    return LayerNormCase(
        "drawn",
        (rows, width) if draw(st.booleans()) else (1, rows, width),
        bias=draw(st.booleans()),
        residual=draw(st.booleans()),
        eps=draw(st.sampled_from((1e-5, 1e-12, 0.1))),
        wide_parameters=draw(st.booleans()),
        offset=draw(st.sampled_from((0.0, 0.0, -3.0, 30.0))),
        strided=rows > 0 and draw(st.booleans()),
    )


@dataclass
class LayerNormInputs:
    """Tensors of one LayerNormCase, and the gradients that come back."""

    x: Tensor
    bias: Tensor | None
    residual: Tensor | None
    weight: Tensor
    ln_bias: Tensor
    dout: Tensor
    dsum: Tensor


def layer_norm_inputs(case: LayerNormCase, dtype: torch.dtype, device: str = "cpu") -> LayerNormInputs:
    """Fresh random tensors."""
    wide = torch.float32 if case.wide_parameters else dtype
    width = case.shape[-1]
    x = random(*case.shape, dtype=dtype, device=device) + case.offset
    residual = random(*case.shape, dtype=dtype, device=device) if case.residual else None
    if case.strided:
        x, residual = strided(x), None if residual is None else strided(residual)
    bias = random(width, dtype=wide, device=device) if case.bias else None
    weight, ln_bias = (random(width, dtype=wide, device=device) for _ in range(2))
    dout, dsum = (random(*case.shape, dtype=dtype, device=device) for _ in range(2))
    return LayerNormInputs(x, bias, residual, weight, ln_bias, dout, dsum)


@dataclass(frozen=True)
class GeluCase:
    """Shape of one call of bias_gelu."""

    name: str
    shape: tuple[int, ...]
    bias: bool = True
    wide_bias: bool = False
    strided: bool = False

    def __str__(self) -> str:
        return self.name


GELU_CASES = (
    GeluCase("plain", (37, 96)),
    GeluCase("no_bias", (5, 7, 33), bias=False),
    GeluCase("wide_bias", (12, 64), wide_bias=True),
    GeluCase("odd", (3, 1001)),
    GeluCase("no_rows", (0, 8)),
    GeluCase("vector", (40,)),
    GeluCase("strided", (7, 24), strided=True),
)

GELU_WIDTHS = (1, 2, 3, 7, 8, 31, 32, 33, 64, 100, 384, 1000, 1001, 1030, 3072, 4096, 16384)


def gelu_grid(width: int, *, wide_bias: bool) -> tuple[GeluCase, ...]:
    """With and without bias; more rows than one block takes at a time."""
    rows = 300 if width <= 8 else 37 if width <= 400 else 5
    return tuple(
        GeluCase(f"{rows}x{width}{'-bias' * bias}", (rows, width), bias=bias, wide_bias=wide_bias)
        for bias in (False, True)
    )


@st.composite
def gelu_cases(draw: st.DrawFn) -> GeluCase:
    """Any shape and options."""
    width = draw(st.one_of(st.integers(1, 70), st.integers(1, 2100), st.integers(1, 300).map(lambda n: 8 * n)))
    rows = draw(st.integers(0, 60 if width < 300 else 6))
    return GeluCase(
        "drawn",
        (rows, width) if draw(st.booleans()) else (1, rows, width),
        bias=draw(st.booleans()),
        wide_bias=draw(st.booleans()),
        strided=rows > 0 and draw(st.booleans()),
    )


def few_rows(kind: type[Any]) -> st.SearchStrategy[Any]:
    """Cases of LayerNorm or GELU with no row or several, for what is as exact as the eager computation.

    Of a single row all errors are one, and may be ten times another's by chance: the rule wants a few.
    """
    leading = st.sampled_from(((0,), (3, 0), (17,), (5, 7), (2, 3, 4), (41,)))
    shapes = st.tuples(leading, st.integers(8, 130)).map(lambda drawn: (*drawn[0], drawn[1]))
    options: dict[str, st.SearchStrategy[Any]] = {"bias": st.booleans()}
    if kind is LayerNormCase:
        options["residual"] = st.booleans()
    return st.builds(kind, st.just("drawn"), shapes, **options)


def gelu_inputs(case: GeluCase, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor | None, Tensor]:
    """x, bias and the gradient of the output; x spans the tails, where GELU is 0 or the identity."""
    x = 3 * random(*case.shape, dtype=dtype, device=device)
    if case.strided:
        x = strided(x)
    bias_dtype = torch.float32 if case.wide_bias else dtype
    bias = random(case.shape[-1], dtype=bias_dtype, device=device) if case.bias else None
    return x, bias, random(*case.shape, dtype=dtype, device=device)
