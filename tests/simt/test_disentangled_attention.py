"""disentangled_attention and its backward: the CUDA kernels, run in the emulator."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from helpers import cases, checks
from helpers.cases import DisentangledCase, disentangled_inputs
from helpers.drawn import drawn

DTYPES = (torch.float16, torch.bfloat16)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
SHARED = 232_448
CASES = tuple(case for case in cases.DISENTANGLED_CASES if case.head_dim % 8 == 0)
LOG = DisentangledCase("", (70, 9, 0, 40), **cases.LOG_BUCKETS)


@by_dtype
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(simt: Any, case: DisentangledCase, dtype: torch.dtype) -> None:
    for seed in (0, len(case.name)):
        simt._configure(seed)
        checks.check_disentangled_attention(simt, case, dtype)


@pytest.mark.parametrize(("buckets", "most"), [(256, 512), (32, 128), (64, 256), (256, 1024)])
def test_every_distance_has_its_bucket(simt: Any, buckets: int, most: int) -> None:
    """One sequence that reaches past the last bucket."""
    case = DisentangledCase(
        "", (min(most + 100, 700),), heads=1, head_dim=8, span=buckets, position_buckets=buckets,
        max_relative_positions=most,
    )  # fmt: skip
    checks.check_disentangled_attention(simt, case, torch.float16)


@pytest.mark.parametrize("head_dim", (16, 64, 72, 128))
@pytest.mark.parametrize("options", ({}, {"holes": True}, cases.LOG_BUCKETS), ids=("linear", "holes", "log"))
def test_several_tiles(simt: Any, head_dim: int, options: dict[str, Any]) -> None:
    """Runs of one column that pass from tile to tile, in both walks."""
    case = DisentangledCase("", (145, 3, 70), heads=1, head_dim=head_dim, layout="qkv", **({"span": 30} | options))
    checks.check_disentangled_attention(simt, case, torch.bfloat16)


@drawn(60, case=cases.disentangled_cases(), dtype=st.sampled_from(DTYPES))
def test_drawn(simt: Any, case: DisentangledCase, dtype: torch.dtype, seed: int) -> None:
    simt._configure(seed)
    checks.check_disentangled_attention(simt, case, dtype)


def _call(simt: Any, case: DisentangledCase, dtype: torch.dtype = torch.bfloat16, **change: Any) -> tuple[Tensor, ...]:
    """out, lse, dq, dk, dv, dpos_key, dpos_query."""
    x = disentangled_inputs(case, dtype)
    values = {
        "q": x.q, "k": x.k, "v": x.v, "pos_key": x.pos_key, "pos_query": x.pos_query, "cu_seqlens": x.cu_seqlens,
        "max_seqlen": x.max_seqlen, **x.options,
    } | change  # fmt: skip
    out, lse = simt.disentangled_attention(**values)
    return out, lse, *simt.disentangled_attention_backward(dout=x.dout, out=out, lse=lse, **values)


def _same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@by_dtype
def test_results_repeat_bit_for_bit(simt: Any, dtype: torch.dtype) -> None:
    """In any order of blocks and threads."""
    case = DisentangledCase("", (300, 40), holes=True, **cases.LOG_BUCKETS)
    runs = []
    for seed in (0, 1, 2):
        simt._configure(seed)
        torch.manual_seed(0)
        runs.append(_call(simt, case, dtype))
    assert all(_same(runs[0], run) for run in runs[1:])


def test_without_terms_it_is_varlen_attention(simt: Any) -> None:
    x = disentangled_inputs(DisentangledCase("", (70, 1, 0, 40), terms="none"), torch.bfloat16)
    where, twice = (x.cu_seqlens, x.max_seqlen), (x.cu_seqlens, x.cu_seqlens, x.max_seqlen, x.max_seqlen)
    out, lse = simt.disentangled_attention(x.q, x.k, x.v, None, None, *where)
    assert _same((out, lse), simt.varlen_attention(x.q, x.k, x.v, *twice))
    *gradients, dpos_key, dpos_query = simt.disentangled_attention_backward(
        x.dout, x.q, x.k, x.v, None, None, out, lse, *where
    )
    expected = simt.varlen_attention_backward(x.dout, None, x.q, x.k, x.v, out, lse, *twice, deterministic=True)
    assert _same(tuple(gradients), expected) and dpos_key.shape == dpos_query.shape == (0,)


def test_a_zero_table_changes_nothing(simt: Any) -> None:
    """Scores are those of varlen_attention, at the scale of three terms."""
    x = disentangled_inputs(LOG, torch.float16)
    zeros = torch.zeros_like(x.pos_key)
    out, lse, *_ = _call(simt, LOG, torch.float16, q=x.q, k=x.k, v=x.v, pos_key=zeros, pos_query=zeros)
    where = (x.cu_seqlens, x.cu_seqlens, x.max_seqlen, x.max_seqlen)
    simt._configure(0, 1024, SHARED)  # the small tile
    plain = simt.varlen_attention(x.q, x.k, x.v, *where, softmax_scale=(3 * LOG.head_dim) ** -0.5)
    assert _same((out, lse), plain)


def test_the_terms_by_hand(simt: Any) -> None:
    """Two tokens: query 0 sees key 1 at distance -1, query 1 sees key 0 at +1."""
    q, k = torch.zeros(2, 2, 1, 8, dtype=torch.float16).unbind(0)
    q[:, 0, 0], k[:, 0, 1] = 1, 1
    tables = torch.zeros(2, 4, 1, 8, dtype=torch.float16)
    tables[0, :, 0, 0] = torch.tensor([0.0, 1.0, 2.0, 4.0])  # q . pos_key[column]
    tables[1, :, 0, 1] = torch.tensor([0.0, 8.0, 16.0, 32.0])  # k . pos_query[column]
    cu = torch.tensor([0, 2], dtype=torch.int32)
    # Columns: -1 is 1, 0 is 2, +1 is 3.
    score = torch.tensor([[2.0 + 16, 1 + 8], [4 + 32, 2 + 16]])
    _, lse = simt.disentangled_attention(q, k, k, tables[0], tables[1], cu, 2, softmax_scale=0.125)
    torch.testing.assert_close(lse[0], torch.logsumexp(score / 8, 1))


def test_max_seqlen_is_only_a_bound(simt: Any) -> None:
    """It chooses how much of the tables is made, and nothing that can be seen."""
    case = DisentangledCase("", (40, 7), span=100)
    results = []
    for bound in (40, 60, 1000):
        torch.manual_seed(0)
        results.append(_call(simt, case, max_seqlen=bound))
    assert _same(results[0], results[1]) and _same(results[0], results[2])
    for dtable in results[0][5:]:
        reached = dtable[100 - 39 : 100 + 40]
        assert (reached != 0).flatten(1).any(1).all() and (dtable != 0).sum() == (reached != 0).sum()


@pytest.mark.parametrize("options", (cases.LOG_BUCKETS, {"span": 50}), ids=("log", "linear"))
def test_positions_without_holes_are_ranks(simt: Any, options: dict[str, Any]) -> None:
    """Only differences count: a row that is padded on the left begins at some place."""
    case = DisentangledCase("", (130, 9, 66), **options)
    results = []
    for positions in (None, torch.cat([torch.arange(n) + start for n, start in ((130, 0), (9, 121), (66, -7))])):
        torch.manual_seed(0)
        results.append(_call(simt, case, positions=positions))
    assert _same(*results)


def test_other_sequences_do_not_leak(simt: Any) -> None:
    """A neighbour full of NaN and Inf shares tiles in memory, never results."""
    case = DisentangledCase("", (20, 30, 9), **cases.LOG_BUCKETS)
    torch.manual_seed(1)
    clean = _call(simt, case)
    torch.manual_seed(1)
    x = disentangled_inputs(case, torch.bfloat16)
    for t, poison in ((x.q, float("nan")), (x.k, float("inf")), (x.v, float("nan"))):
        t[20:50] = poison
    torch.manual_seed(1)
    dirty = _call(simt, case, q=x.q, k=x.k, v=x.v)
    keep = [i for i in range(59) if not 20 <= i < 50]
    for before, after in zip((clean[0], clean[1].T, *clean[2:5]), (dirty[0], dirty[1].T, *dirty[2:5]), strict=True):
        assert torch.equal(before[keep], after[keep])


@pytest.mark.parametrize("offsets", ([0, 1000, 20], [5, -7, 40], [0, 30, 12], [2**31 - 1, -(2**31), 7], [3, 9, 20]))
def test_bad_offsets_stay_in_bounds(simt: Any, offsets: list[int]) -> None:
    """What cu_seqlens holds cannot be checked without waiting for the GPU; the emulator reports accesses outside."""
    for holes in (False, True):
        case = DisentangledCase("", (20, 20), holes=holes, **cases.LOG_BUCKETS)
        out, *_ = _call(simt, case, cu_seqlens=torch.tensor(offsets, dtype=torch.int32))
        assert out.shape == (40, 2, 32)


def test_bad_positions_stay_in_bounds(simt: Any) -> None:
    """Neither increasing nor small: whatever they hold, some column is taken."""
    case = DisentangledCase("", (70, 20), **cases.LOG_BUCKETS)
    wild = torch.randint(-(2**63), 2**63 - 1, (90,))
    wild[:3] = torch.tensor([2**63 - 1, -(2**63), 0])
    for positions in (wild, torch.arange(90).flip(0)):
        assert all(t.isfinite().all() for t in _call(simt, case, positions=positions))


def test_rows_of_no_sequence_are_zero(simt: Any) -> None:
    """Before the first offset and past the last; NaN there goes nowhere, into the tables' gradients neither."""
    case = DisentangledCase("", (20, 20), **cases.LOG_BUCKETS)
    x = disentangled_inputs(case, torch.bfloat16)
    for t in (x.q, x.k, x.v):
        t[:7], t[33:] = float("nan"), float("inf")
    offsets = torch.tensor([7, 20, 33], dtype=torch.int32)
    out, lse, *gradients = _call(simt, case, q=x.q, k=x.k, v=x.v, cu_seqlens=offsets)
    for t in (out, lse.T, *gradients[:3]):
        outside = torch.cat([t[:7], t[33:]])
        assert (outside == (-math.inf if t.shape == lse.T.shape else 0)).all() and t[7:33].isfinite().all()
    assert all(t.isfinite().all() for t in gradients[3:])


def test_tokens_past_max_seqlen_take_no_part(simt: Any) -> None:
    """As if the sequences were cut there."""
    case = DisentangledCase("", (90, 200), heads=1, **cases.LOG_BUCKETS)
    for holes in (False, True):
        positions = torch.arange(290) * 2 if holes else None
        torch.manual_seed(0)
        out, lse, dq, dk, dv, *tables = _call(simt, case, max_seqlen=48, positions=positions)
        for t in (out, lse.T, dq, dk, dv):
            past = torch.cat([t[48:90], t[138:]])
            assert (past == (-math.inf if t.shape == lse.T.shape else 0)).all()
        torch.manual_seed(0)
        x = disentangled_inputs(case, torch.bfloat16)
        kept = torch.cat([torch.arange(48), torch.arange(90, 138)])
        where = (torch.tensor([0, 48, 96], dtype=torch.int32), 48)
        cut = [t[kept].contiguous() for t in (x.dout, x.q, x.k, x.v)]
        options = {**x.options, "positions": None if positions is None else positions[kept]}
        alone = simt.disentangled_attention(*cut[1:], x.pos_key, x.pos_query, *where, **options)
        gradients = simt.disentangled_attention_backward(*cut, x.pos_key, x.pos_query, *alone, *where, **options)
        assert _same((out[kept], lse[:, kept], dq[kept], dk[kept], dv[kept]), (*alone, *gradients[:3]))
        assert all(t.isfinite().all() for t in tables)


def test_misaligned_slices_are_refused(simt: Any) -> None:
    case = DisentangledCase("", (30, 11), head_dim=24)
    x = disentangled_inputs(case, torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"disentangled_attention: q must be 16-byte aligned, .* call \.clone\(\)"):
        _call(simt, case, q=cases.misaligned(x.q))
    spread = torch.zeros(*x.k.shape, 2, dtype=torch.bfloat16)[..., 0]
    with pytest.raises(RuntimeError, match=r"k must be contiguous in its last dimension; call \.contiguous\(\)"):
        _call(simt, case, k=spread)


def test_strided_tables_and_gradients_are_read(simt: Any) -> None:
    """pos_key and pos_query go to the library's products, which take any strides; dout is copied where it must be."""
    x = disentangled_inputs(LOG, torch.bfloat16)
    out, lse, *_ = _call(simt, LOG, q=x.q, k=x.k, v=x.v, pos_key=x.pos_key, pos_query=x.pos_query)
    where = (x.cu_seqlens, x.max_seqlen)
    results = []
    for change in (lambda t: t, cases.strided, cases.misaligned):
        tables = [change(t) for t in (x.pos_key, x.pos_query)]
        forward = simt.disentangled_attention(x.q, x.k, x.v, *tables, *where, **x.options)
        gradients = simt.disentangled_attention_backward(
            change(x.dout), x.q, x.k, x.v, *tables, change(out), lse, *where, **x.options
        )
        results.append((*forward, *gradients))
    assert _same(results[0], results[1]) and _same(results[0], results[2])


def test_kernel_table_lists_what_runs(simt: Any) -> None:
    rows = [row for row in json.loads(simt._kernel_table()) if row["op"].startswith("disentangled_attention")]
    assert {(row["op"], row["dtype"]) for row in rows} == {
        (op, dtype)
        for op in ("disentangled_attention", "disentangled_attention_backward")
        for dtype in ("float16", "bfloat16")
    }
    for row in rows:
        step, most = row["head_dim"]["multiple_of"], row["head_dim"]["max"]
        for head_dim in range(step, most + 1, step):
            case = DisentangledCase("", (5,), heads=1, head_dim=head_dim)
            backward = row["op"].endswith("backward")
            checks.check_disentangled_attention(simt, case, getattr(torch, row["dtype"]), backward=backward)


def test_little_shared_memory_is_no_kernel(simt: Any) -> None:
    case = DisentangledCase("", (9,), head_dim=128, span=1500, holes=True)
    simt._configure(0, 4, 65_000)
    with pytest.raises(RuntimeError, match="no kernel: head_dim and the relative positions need more shared memory"):
        _call(simt, case)
    simt._configure(0, 4, 101_376)  # as on sm_86 and sm_89
    checks.check_disentangled_attention(simt, case, torch.float16)


def _table(rows: int, heads: int = 2, head_dim: int = 16, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(rows, heads, head_dim, dtype=dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 7}, "no kernel: head_dim is not a multiple of 8 up to 128"),
        ({"head_dim": 136}, "no kernel: head_dim is not a multiple of 8 up to 128"),
        ({"softmax_scale": -1.0}, "no kernel: softmax_scale is not a positive float32"),
        ({"pos_key": _table(9000), "pos_query": None, "positions": torch.arange(9)},
         "no kernel: relative positions differ past a distance of 4096"),
        ({"max_seqlen": -1}, "max_seqlen must not be negative"),
        ({"k": torch.zeros(9, 2, 16)}, "k must have the shape and dtype of q"),
        ({"v": torch.zeros(8, 2, 16).bfloat16()}, "v must have the shape and dtype of q"),
        ({"pos_key": _table(7)}, r"pos_key must be of shape \[2 \* span, heads, head_dim\] .* got bfloat16 of shape"),
        ({"pos_key": _table(0)}, "pos_key must be of shape"),
        ({"pos_key": _table(16, heads=3)}, "pos_key must be of shape"),
        ({"pos_query": _table(16, head_dim=8)}, "pos_query must be of shape"),
        ({"pos_query": _table(16, dtype=torch.float16)}, "pos_query must be of shape .* got float16"),
        ({"pos_query": _table(18)}, "pos_key and pos_query must have the same shape, got 16 and 18 relative positions"),
        ({"cu_seqlens": torch.zeros(2)}, r"cu_seqlens must be int32 of shape \[batch \+ 1\], got float32"),
        ({"positions": torch.zeros(9)}, r"positions must be int64 of shape \[9\], got float32"),
        ({"positions": torch.zeros(8).long()}, r"positions must be int64 of shape \[9\], got int64 of shape \[8\]"),
        ({"positions": torch.zeros(18).long()[::2]}, "positions must be contiguous"),
        ({"position_buckets": 1}, r"position_buckets must be 0 \(none\) or at least 2, got 1"),
        ({"position_buckets": -1}, r"position_buckets must be 0 \(none\) or at least 2, got -1"),
        ({"position_buckets": 32, "max_relative_positions": 17},
         "max_relative_positions must be more than position_buckets / 2 [+] 1, got 17 and 32 buckets"),
    ],
)  # fmt: skip
def test_bad_input(simt: Any, change: dict[str, Any], message: str) -> None:
    change = dict(change)
    case = DisentangledCase("", (9,), head_dim=change.pop("head_dim", 16))
    with pytest.raises(RuntimeError, match=f"disentangled_attention: .*{message}"):
        _call(simt, case, **change)
