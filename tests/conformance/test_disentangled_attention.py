"""disentangled_attention and its backward on every backend."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import cases, checks
from helpers.backends import HALF, MANY_SMS, Backend, cpu, drawn_on, kernels, on, one_dtype, reference, same
from helpers.cases import DISENTANGLED_CASES, LOG_BUCKETS, DisentangledCase, disentangled_inputs, offsets
from helpers.threads import assert_same_on_threads

REFERENCE = reference()
CPU = cpu(cases.KERNEL_DTYPES)
SIMT, GPU = kernels(HALF, has_kernel=lambda case: case.head_dim % 8 == 0)
EVERY = (REFERENCE, CPU, SIMT, GPU)
LOG = DisentangledCase("log", (70, 9, 0, 40), **LOG_BUCKETS)


# ---- against the oracle ----


@on(*EVERY, case=DISENTANGLED_CASES)
def test_cases(backend: Backend, case: DisentangledCase, dtype: torch.dtype) -> None:
    for _ in backend.machines((0,), (len(case.name),)):
        checks.check_disentangled_attention(backend.library, case, dtype, backend.device)


@drawn_on(*EVERY, case=cases.disentangled_cases())
def test_drawn(backend: Backend, case: DisentangledCase, dtype: torch.dtype, seed: int) -> None:
    backend.configure(seed)
    checks.check_disentangled_attention(backend.library, case, dtype, backend.device)


@on(*EVERY)
@pytest.mark.parametrize(("buckets", "most"), [(256, 512), (32, 128), (64, 256), (256, 1024)])
def test_every_distance_has_its_bucket(backend: Backend, buckets: int, most: int) -> None:
    """One sequence that reaches past the last bucket."""
    case = DisentangledCase(
        "", (min(most + 100, 700),), heads=1, head_dim=8, span=buckets, position_buckets=buckets,
        max_relative_positions=most,
    )  # fmt: skip
    checks.check_disentangled_attention(backend.library, case, torch.float16, backend.device)


@on(CPU)
@pytest.mark.parametrize("options", ({"span": 20}, LOG_BUCKETS, {"span": 20, "terms": "key", "head_dim": 72}))
def test_far_past_the_last_row(backend: Backend, options: dict[str, Any], dtype: torch.dtype) -> None:
    """Blocks of pairs that all have a table's first or last row, and others of which some have."""
    case = DisentangledCase("", (700, 3), **{"heads": 1, "head_dim": 16, **options})
    checks.check_disentangled_attention(backend.library, case, dtype, backend.device)


def _call(
    backend: Backend, case: DisentangledCase, dtype: torch.dtype = torch.bfloat16, **change: Any
) -> tuple[Tensor, ...]:
    """out, lse, dq, dk, dv, dpos_key, dpos_query, of the same inputs in every call of a test, but for what changes."""
    torch.manual_seed(0)
    x = disentangled_inputs(case, dtype, backend.device)
    values = {
        "q": x.q, "k": x.k, "v": x.v, "pos_key": x.pos_key, "pos_query": x.pos_query, "cu_seqlens": x.cu_seqlens,
        "max_seqlen": x.max_seqlen, **x.options,
    } | change  # fmt: skip
    out, lse = backend.library.disentangled_attention(**values)
    return out, lse, *backend.library.disentangled_attention_backward(dout=x.dout, out=out, lse=lse, **values)


@on(*EVERY, case=(LOG, DisentangledCase("holes", (300, 40), holes=True, **LOG_BUCKETS)))
def test_results_repeat_bit_for_bit(backend: Backend, case: DisentangledCase, dtype: torch.dtype) -> None:
    """In any order of blocks and threads."""
    backend.assert_repeats(lambda: _call(backend, case, dtype), machines=[(0,), (1,), (2,)])


@on(CPU, holes=(False, True))
def test_threads_change_no_bit(backend: Backend, holes: bool, dtype: torch.dtype) -> None:
    case = DisentangledCase("", (300, 40, 0, 210, 120), heads=3, holes=holes, head_dim=16, **LOG_BUCKETS)
    assert_same_on_threads(lambda: _call(backend, case, dtype))


# ---- meaning ----


@on(*EVERY)
def test_the_terms_by_hand(backend: Backend) -> None:
    """Two tokens: query 0 sees key 1 at distance -1, query 1 sees key 0 at +1."""
    q, k = torch.zeros(2, 2, 1, 8, dtype=torch.float16, device=backend.device).unbind(0)
    q[:, 0, 0], k[:, 0, 1] = 1, 1
    tables = torch.zeros(2, 4, 1, 8, dtype=torch.float16, device=backend.device)
    tables[0, :, 0, 0] = torch.tensor([0.0, 1.0, 2.0, 4.0])  # q . pos_key[column]
    tables[1, :, 0, 1] = torch.tensor([0.0, 8.0, 16.0, 32.0])  # k . pos_query[column]
    cu = offsets([2], backend.device)
    # Columns: -1 is 1, 0 is 2, +1 is 3.
    score = torch.tensor([[2.0 + 16, 1 + 8], [4 + 32, 2 + 16]])
    _, lse = backend.library.disentangled_attention(q, k, k, tables[0], tables[1], cu, 2, softmax_scale=0.125)
    torch.testing.assert_close(lse[0].cpu(), torch.logsumexp(score / 8, 1))


@on(CPU, SIMT, GPU)
def test_without_terms_it_is_varlen_attention(backend: Backend) -> None:
    x = disentangled_inputs(DisentangledCase("", (70, 1, 0, 40), terms="none"), torch.bfloat16, backend.device)
    where, twice = (x.cu_seqlens, x.max_seqlen), (x.cu_seqlens, x.cu_seqlens, x.max_seqlen, x.max_seqlen)
    out, lse = backend.library.disentangled_attention(x.q, x.k, x.v, None, None, *where)
    assert same((out, lse), backend.library.varlen_attention(x.q, x.k, x.v, *twice))
    *gradients, dpos_key, dpos_query = backend.library.disentangled_attention_backward(
        x.dout, x.q, x.k, x.v, None, None, out, lse, *where
    )
    expected = backend.library.varlen_attention_backward(
        x.dout, None, x.q, x.k, x.v, out, lse, *twice, deterministic=True
    )
    assert same(tuple(gradients), expected) and dpos_key.shape == dpos_query.shape == (0,)


@on(CPU, SIMT, GPU)
def test_a_zero_table_changes_nothing(backend: Backend) -> None:
    """Scores are those of varlen_attention, at the scale of three terms."""
    x = disentangled_inputs(LOG, torch.float16, backend.device)
    zeros = torch.zeros_like(x.pos_key)
    out, lse, *_ = _call(backend, LOG, torch.float16, q=x.q, k=x.k, v=x.v, pos_key=zeros, pos_query=zeros)
    where = (x.cu_seqlens, x.cu_seqlens, x.max_seqlen, x.max_seqlen)
    backend.configure(0, MANY_SMS)  # the small tile
    plain = backend.library.varlen_attention(x.q, x.k, x.v, *where, softmax_scale=(3 * LOG.head_dim) ** -0.5)
    assert same((out, lse), plain)


@on(*EVERY, dtype=one_dtype)
def test_max_seqlen_is_only_a_bound(backend: Backend, dtype: torch.dtype) -> None:
    """It chooses how much of the tables is made, and nothing that can be seen."""
    case = DisentangledCase("", (40, 7), span=100)
    results = [_call(backend, case, dtype, max_seqlen=bound) for bound in (40, 60, 1000)]
    assert same(results[0], results[1]) and same(results[0], results[2])
    for dtable in results[0][5:]:
        reached = dtable[100 - 39 : 100 + 40]
        assert (reached != 0).flatten(1).any(1).all() and (dtable != 0).sum() == (reached != 0).sum()


@on(*EVERY, dtype=one_dtype)
@pytest.mark.parametrize("options", (LOG_BUCKETS, {"span": 50}), ids=("log", "linear"))
def test_positions_without_holes_are_ranks(backend: Backend, options: dict[str, Any], dtype: torch.dtype) -> None:
    """Only differences count: a row that is padded on the left begins at some place."""
    lengths = (130, 9, 66)
    case = DisentangledCase("", lengths, **options)
    expected = _call(backend, case, dtype)
    # The kernels for GPUs take positions beyond 2^30 as that.
    far = 1 << (29 if backend in (SIMT, GPU) else 40)
    for starts in ((0, 0, 0), (0, 121, -7), (-far, 5, far)):
        positions = torch.cat([torch.arange(n) + start for n, start in zip(lengths, starts, strict=True)])
        assert same(_call(backend, case, dtype, positions=positions.to(backend.device)), expected)


# ---- what stays where ----


@on(*EVERY, dtype=one_dtype)
@pytest.mark.parametrize("bad", (math.nan, math.inf))
def test_a_sequence_keeps_its_bad_values_to_itself(backend: Backend, bad: float, dtype: torch.dtype) -> None:
    """Beside a sequence of NaN or infinities, and before rows of them past the end: tiles in memory are shared,
    results never."""
    case = DisentangledCase("", checks.LENGTHS_ALIKE, head_dim=16, rows_past_the_end=2, **LOG_BUCKETS)
    torch.manual_seed(0)
    x = disentangled_inputs(case, dtype, backend.device)
    checks.check_bad_values_stay((x.q, x.k, x.v), bad, lambda **change: _call(backend, case, dtype, **change))


@on(*EVERY, dtype=one_dtype)
def test_bad_positions_stay_in_bounds(backend: Backend, dtype: torch.dtype) -> None:
    """Neither increasing nor small: whatever they hold, some column is taken."""
    case = DisentangledCase("", (70, 20), **LOG_BUCKETS)
    wild = torch.randint(-(2**63), 2**63 - 1, (90,))
    wild[:3] = torch.tensor([2**63 - 1, -(2**63), 0])
    for positions in (wild, torch.arange(90).flip(0)):
        results = _call(backend, case, dtype, positions=positions.to(backend.device))
        assert all(t.isfinite().all() for t in results)


@on(SIMT, GPU)
def test_rows_of_no_sequence_are_zero(backend: Backend) -> None:
    """Before the first offset and past the last; NaN there goes nowhere, into the tables' gradients neither."""
    case = DisentangledCase("", (20, 20), **cases.LOG_BUCKETS)
    x = disentangled_inputs(case, torch.bfloat16, backend.device)
    for t in (x.q, x.k, x.v):
        t[:7], t[33:] = float("nan"), float("inf")
    cu_seqlens = torch.tensor([7, 20, 33], dtype=torch.int32, device=backend.device)
    out, lse, *gradients = _call(backend, case, q=x.q, k=x.k, v=x.v, cu_seqlens=cu_seqlens)
    for t in (out, lse.T, *gradients[:3]):
        outside = torch.cat([t[:7], t[33:]])
        assert (outside == (-math.inf if t.shape == lse.T.shape else 0)).all() and t[7:33].isfinite().all()
    assert all(t.isfinite().all() for t in gradients[3:])


@on(SIMT, GPU)
def test_tokens_past_max_seqlen_take_no_part(backend: Backend) -> None:
    """As if the sequences were cut there."""
    case = DisentangledCase("", (90, 200), heads=1, **cases.LOG_BUCKETS)
    for holes in (False, True):
        positions = torch.arange(290, device=backend.device) * 2 if holes else None
        out, lse, dq, dk, dv, *tables = _call(backend, case, max_seqlen=48, positions=positions)
        for t in (out, lse.T, dq, dk, dv):
            past = torch.cat([t[48:90], t[138:]])
            assert (past == (-math.inf if t.shape == lse.T.shape else 0)).all()
        torch.manual_seed(0)
        x = disentangled_inputs(case, torch.bfloat16, backend.device)
        kept = torch.cat([torch.arange(48), torch.arange(90, 138)])
        where = (offsets([48, 48], backend.device), 48)
        cut = [t[kept].contiguous() for t in (x.dout, x.q, x.k, x.v)]
        options = {**x.options, "positions": None if positions is None else positions[kept]}
        tables_of = (x.pos_key, x.pos_query)
        alone = backend.library.disentangled_attention(*cut[1:], *tables_of, *where, **options)
        gradients = backend.library.disentangled_attention_backward(*cut, *tables_of, *alone, *where, **options)
        assert same((out[kept], lse[:, kept], dq[kept], dk[kept], dv[kept]), (*alone, *gradients[:3]))
        assert all(t.isfinite().all() for t in tables)


@on(*EVERY)
def test_strided_tables_and_gradients_are_read(backend: Backend) -> None:
    """pos_key and pos_query go to the library's products, which take any strides; dout is copied where it must be."""
    x = disentangled_inputs(LOG, torch.bfloat16, backend.device)
    out, lse, *_ = _call(backend, LOG, q=x.q, k=x.k, v=x.v, pos_key=x.pos_key, pos_query=x.pos_query)
    where = (x.cu_seqlens, x.max_seqlen)
    results = []
    for change in (lambda t: t, cases.strided, cases.misaligned):
        tables = [change(t) for t in (x.pos_key, x.pos_query)]
        forward = backend.library.disentangled_attention(x.q, x.k, x.v, *tables, *where, **x.options)
        gradients = backend.library.disentangled_attention_backward(
            change(x.dout), x.q, x.k, x.v, *tables, change(out), lse, *where, **x.options
        )
        results.append((*forward, *gradients))
    assert same(results[0], results[1]) and same(results[0], results[2])
