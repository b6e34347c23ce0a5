"""window_attention and its backward on every backend."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from helpers import cases, checks
from helpers.backends import (
    FEW_SMS,
    HALF,
    MANY_SMS,
    Backend,
    cpu,
    drawn_on,
    kernels,
    on,
    one_dtype,
    reference,
    same,
)
from helpers.cases import WINDOW_CASES, WindowCase, WindowInputs, window_inputs
from helpers.compare import assert_close
from helpers.threads import assert_same_on_threads

REFERENCE = reference()
CPU = cpu(cases.KERNEL_DTYPES)
SIMT, GPU = kernels(HALF, has_kernel=lambda case: case.head_dim % 8 == 0)
EVERY = (REFERENCE, CPU, SIMT, GPU)

# Windows of up to 64 tokens have one kernel, longer ones another.
SHORT = WindowCase("short", (17, 22), (7, 7), (3, 3), batch=2, heads=3, cosine=True, qkv_bias=True)
LONG = WindowCase("long", (17, 22), (9, 10), (4, 3), batch=2, heads=3, cosine=True, qkv_bias=True)
BOTH = (SHORT, LONG)
SCALED = WindowCase("scaled", (30, 23), (7, 7), (3, 3), batch=3, head_dim=16, qkv_bias=True)


# ---- against the oracle ----


@on(*EVERY, case=WINDOW_CASES)
def test_cases(backend: Backend, case: WindowCase, dtype: torch.dtype) -> None:
    for _ in backend.machines((0, FEW_SMS), (len(case.name), MANY_SMS)):
        checks.check_window_attention(backend.library, case, dtype, backend.device)


@drawn_on(*EVERY, case=cases.window_cases(), sm_count=st.sampled_from((FEW_SMS, 4, MANY_SMS)))
def test_drawn(backend: Backend, case: WindowCase, dtype: torch.dtype, seed: int, sm_count: int) -> None:
    backend.configure(seed, sm_count)
    checks.check_window_attention(backend.library, case, dtype, backend.device)


def _call(backend: Backend, x: WindowInputs) -> tuple[Tensor, ...]:
    """out, lse, dqkv, dtable, dlogit_scale, dqkv_bias."""
    out, lse = backend.library.window_attention(*x.tensors, **x.options)
    return out, lse, *backend.library.window_attention_backward(x.dout, *x.tensors, out, lse, **x.options)


@on(*EVERY, case=lambda backend: (*BOTH, SCALED) if backend is REFERENCE else BOTH, dtype=one_dtype)
def test_results_repeat_bit_for_bit(backend: Backend, case: WindowCase, dtype: torch.dtype) -> None:
    """In any order of blocks and threads, since sums have an order of their own."""
    x = window_inputs(case, dtype, backend.device)
    backend.assert_repeats(lambda: _call(backend, x))


# Windows of both kinds, many and few, with heads that are cut between threads and with tables too large to unfold.
THREADED = (
    WindowCase("many", (37, 42), (7, 7), (3, 3), batch=2, heads=3, cosine=True, qkv_bias=True),
    WindowCase("one_window", (7, 7), (7, 7), heads=24, qkv_bias=True),
    WindowCase("tiny_windows", (40, 41), (2, 2), (1, 1), batch=2, heads=2, head_dim=8, qkv_bias=True),
    WindowCase("long_windows", (30, 31), (10, 10), (4, 3), batch=2, heads=2, cosine=True, qkv_bias=True),
    WindowCase("one_long_window", (12, 20), (12, 20), heads=5, head_dim=16),
)


@on(CPU, case=THREADED, dtype=(torch.float32,))
def test_results_do_not_depend_on_the_number_of_threads(backend: Backend, case: WindowCase, dtype: torch.dtype) -> None:
    x = window_inputs(case, dtype, backend.device)
    assert_same_on_threads(lambda: _call(backend, x))


# ---- which pairs meet, and what stays where ----


@on(*EVERY)
@pytest.mark.parametrize(
    ("grid", "window", "shift"),
    [
        ((8, 12), (4, 4), (2, 1)),
        ((6, 7), (3, 5), (0, 4)),
        ((3, 2), (4, 4), (2, 2)),
        ((5, 4, 3), (2, 2, 4), (1, 0, 3)),
        ((16, 32), (8, 16), (4, 1)),  # windows of 128 tokens
    ],
)
def test_which_pairs_meet(
    backend: Backend, grid: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...]
) -> None:
    """q = k = 0 and a mask of -inf: each output is the mean of v over the tokens of its window and region."""
    width = math.prod(grid)
    heads = -(-width // 128)
    # Token n has v one-hot at column n over all heads; padded positions have v = 0.
    v = torch.eye(width, heads * 128).view(*grid, heads, 128)
    qkv = torch.stack([torch.zeros_like(v), torch.zeros_like(v), v], -3)[None].half().to(backend.device)
    out, _ = backend.library.window_attention(qkv, None, None, None, list(window), list(shift), mask_value=-math.inf)
    expected = torch.zeros(width, width)
    groups: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    padded = [-(-n // w) * w for n, w in zip(grid, window, strict=True)]
    for place in itertools.product(*map(range, padded)):
        key = []
        for a, n, w, s in zip(place, padded, window, shift, strict=True):
            rolled = (a - s) % n  # where the token is after rolling by -shift
            key.append((rolled // w, int(a < s)))  # tokens that came around the edge are a region of their own
        number = -1
        if all(a < n for a, n in zip(place, grid, strict=True)):
            number = 0
            for a, n in zip(place, grid, strict=True):
                number = number * n + a
        groups.setdefault(tuple(key), []).append(number)
    for group in groups.values():
        for i in group:
            for j in group:
                if i >= 0 and j >= 0:
                    expected[i, j] = 1 / len(group)
    actual = out.view(width, heads * 128)[:, :width].float().cpu()
    assert torch.equal(actual > 0, expected > 0)
    torch.testing.assert_close(actual, expected, atol=0, rtol=torch.finfo(torch.float16).eps)


@on(*EVERY, case=BOTH, dtype=one_dtype)
def test_bad_values_stay_in_their_window(backend: Backend, case: WindowCase, dtype: torch.dtype) -> None:
    """NaN in one token reaches the tokens of its window and head alone, forward and backward."""
    x = window_inputs(case, dtype, backend.device)
    clean = _call(backend, x)
    x.qkv[1, 5, 6, :, 1] = float("nan")
    dirty = _call(backend, x)
    rows, cols = (
        torch.arange(n).sub(s).remainder(-(-n // w) * w).div(w, rounding_mode="floor")
        for n, w, s in zip(case.grid, case.window, case.shift or (), strict=True)
    )
    hit = torch.zeros(case.batch, *case.grid, case.heads, dtype=torch.bool)
    hit[1, :, :, 1] = (rows[:, None] == rows[5]) & (cols[None, :] == cols[6])
    hit = hit.to(backend.device)
    out, dqkv = (
        [t.view(*hit.shape, -1) if t.dim() == 4 else t.movedim(3, 4).flatten(4) for t in (run[0], run[2])]
        for run in (clean, dirty)
    )
    for before, after in zip(out, dqkv, strict=True):
        assert after[hit].isnan().any() and torch.equal(before[~hit], after[~hit])


@on(*EVERY, case=BOTH, dtype=one_dtype)
def test_clamped_logit_scale_has_no_gradient(backend: Backend, case: WindowCase, dtype: torch.dtype) -> None:
    x = window_inputs(case, dtype, backend.device)
    assert x.logit_scale is not None
    x.logit_scale.copy_(torch.tensor([math.log(100) - 1e-3, math.log(100) + 1e-3, 9.0]))
    out, *_, gradient, _ = _call(backend, x)
    assert (gradient == 0).tolist() == [False, True, True]
    x.logit_scale[2] = 100.0
    assert torch.equal(_call(backend, x)[0], out)


@on(*EVERY, case=BOTH, dtype=lambda backend: backend.dtypes if backend is REFERENCE else (torch.float16,))
def test_zero_rows_have_no_gradient(backend: Backend, case: WindowCase, dtype: torch.dtype) -> None:
    x = window_inputs(case, dtype, backend.device)
    x.qkv[:, 4, :, :2] = 0
    out, _, dqkv, *_ = _call(backend, x)
    assert out.isfinite().all() and dqkv.isfinite().all() and (dqkv[:, 4, :, :2] == 0).all()
    assert (dqkv[:, 4, :, 2] != 0).flatten(2).any(2).all() and (dqkv[:, 5] != 0).flatten(3).any(3).all()


@on(*EVERY, case=BOTH, dtype=one_dtype)
def test_the_bias_of_padding_is_used_nowhere_else(backend: Backend, case: WindowCase, dtype: torch.dtype) -> None:
    """If the windows divide the grid, it is not read and its gradient is 0; no bias is the same as zeros."""
    case = WindowCase("", tuple(2 * w for w in case.window), case.window, case.shift, heads=2, qkv_bias=True)
    x = window_inputs(case, dtype, backend.device)
    assert x.qkv_bias is not None
    expected = _call(backend, x)
    x.qkv_bias.fill_(float("nan"))
    actual = _call(backend, x)
    assert same(actual[:3:2], expected[:3:2]) and (actual[5] == 0).all()

    case = WindowCase("", (13, 9), case.window, case.shift, heads=2)
    x = window_inputs(case, dtype, backend.device)
    expected = _call(backend, x)
    x.qkv_bias = torch.zeros(3, 2, 32, dtype=dtype, device=backend.device)
    assert same(_call(backend, x)[:4], expected[:4])


@on(*EVERY, case=BOTH, dtype=one_dtype)
def test_other_layouts_are_copied(backend: Backend, case: WindowCase, dtype: torch.dtype) -> None:
    """A transposed qkv, one from a place that is not 16-byte aligned, a gradient that is expanded."""
    x = window_inputs(case, dtype, backend.device)
    x.dout = torch.ones((), dtype=dtype, device=backend.device).expand_as(x.dout)
    expected = _call(backend, x)
    plain = x.qkv
    for qkv in (plain.transpose(1, 2).contiguous().transpose(1, 2), cases.misaligned(plain)):
        x.qkv = qkv
        assert same(_call(backend, x), expected)


@on(CPU, case=BOTH)
def test_nothing_is_read_or_written_beside_the_tensors(backend: Backend, case: WindowCase, dtype: torch.dtype) -> None:
    """Every head_dim, also one that is no whole number of vectors, of tensors that lie in the middle of NaN."""
    for head_dim in (1, 5, 9, 16, 17, 33):
        x = window_inputs(replace(case, head_dim=head_dim, batch=1), dtype, backend.device)
        expected = _call(backend, x)
        for name in ("qkv", "table", "logit_scale", "qkv_bias", "dout"):
            tensor = getattr(x, name)
            surrounded = tensor.new_full((tensor.numel() + 65,), math.nan)
            surrounded[33:-32] = tensor.flatten()
            setattr(x, name, surrounded[33:-32].view(tensor.shape))
        assert same(_call(backend, x), expected)


@on(CPU, dtype=(torch.float32,))
def test_windows_that_no_cpu_kernel_takes(backend: Backend, dtype: torch.dtype) -> None:
    qkv = torch.zeros(1, 2, 2, 3, 1, 8, dtype=dtype)
    for message, call in (
        ("more than 4096 tokens", (qkv, None, None, None, [64, 65], [0, 0])),
        ("the CPU kernels take", (qkv.double(), None, None, None, [2, 2], [0, 0])),
        ("qkv_bias is not of qkv's dtype", (qkv.half(), None, None, torch.zeros(3, 1, 8), [2, 2], [0, 0])),
    ):
        with pytest.raises(RuntimeError, match=message):
            backend.library.window_attention(*call)


# ---- gradients of the kernels ----


@on(SIMT, GPU)
def test_the_saved_output_is_in_dq_alone(backend: Backend) -> None:
    """An output that is off moves dq by what it makes delta off; for the other gradients delta is corrected."""
    x = window_inputs(replace(LONG, grid=(9, 12), batch=1), torch.float16, backend.device)
    library = backend.library
    out, lse = library.window_attention(*x.tensors, **x.options)
    rough = (out + 0.1 * torch.randn_like(out)).half()
    results = [library.window_attention_backward(x.dout, *x.tensors, o, lse, **x.options) for o in (out, rough)]
    (dq, *clean), (dq_rough, *others) = ((*r[0].unbind(-3), *r[1:]) for r in results)
    for name, g, truth in zip(("dk", "dv", "dtable", "dlogit_scale", "dqkv_bias"), others, clean, strict=True):
        assert_close(name, g, truth.double(), truth.half(), gradient=True)
    expected = checks.window_error_inherited_by_dq(x, rough, out.double())
    # A difference of two results, each rounded once to float16.
    largest = float(torch.maximum(dq.abs(), dq_rough.abs()).max())
    moved = (dq_rough.double() - dq.double()).float()
    assert expected.abs().max() > 20 * torch.finfo(torch.float16).eps * largest
    assert_close("dq", moved, expected, expected.half(), scale=largest)


@on(CPU, SIMT, GPU, case=BOTH)
@pytest.mark.parametrize("short", (0, 1), ids=("queries", "keys"))
def test_short_rows_and_a_large_loss_scale(backend: Backend, case: WindowCase, short: int) -> None:
    """A gradient of scores over the norm of a row, more than float16 holds, is not what is rounded."""
    x = window_inputs(replace(case, heads=2), torch.float16, backend.device)
    assert x.logit_scale is not None
    x.logit_scale.fill_(1.0)
    rows = x.qkv.view(-1, 3, *x.qkv.shape[-2:])
    rows[::2, short] *= 1e-5
    x.dout *= 1000
    _, gradients = checks.window_oracle(x, torch.float64, True)
    assert gradients["dk" if short else "dq"].abs().max() > 1e6
    *_, dqkv, dtable, dlogit_scale, dqkv_bias = _call(backend, x)
    actual = dict(zip(("dq", "dk", "dv"), (t.flatten(0, 2) for t in dqkv.unbind(-3)), strict=True))
    actual |= {"dtable": dtable, "dlogit_scale": dlogit_scale, "dqkv_bias": dqkv_bias}
    for name, g in actual.items():
        truth = gradients[name].reshape(g.shape)
        if name == ("dk" if short else "dq"):  # its short rows have gradients beyond float16
            g, truth = g[1::2], truth[1::2]
        assert truth.abs().max() < 60000
        assert_close(name, g, truth, truth.half(), gradient=True)
