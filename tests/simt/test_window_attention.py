"""window_attention and its backward: the CUDA kernels, run in the emulator."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from helpers import cases, checks
from helpers.cases import WindowCase, WindowInputs, window_inputs
from helpers.compare import assert_close
from helpers.drawn import drawn

DTYPES = (torch.float16, torch.bfloat16)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
CASES = tuple(case for case in cases.WINDOW_CASES if case.head_dim % 8 == 0)

# On one multiprocessor a block walks over many windows and adds up over them; on many, every window has its own.
FEW_SMS, MANY_SMS = 1, 1024
H200_SHARED, AD102_SHARED = 232_448, 101_376


@by_dtype
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(simt: Any, case: WindowCase, dtype: torch.dtype) -> None:
    for seed, sm_count in ((0, FEW_SMS), (len(case.name), MANY_SMS)):
        simt._configure(seed, sm_count, H200_SHARED)
        checks.check_window_attention(simt, case, dtype)


@drawn(
    60,
    case=cases.window_cases(),
    dtype=st.sampled_from(DTYPES),
    sm_count=st.sampled_from((FEW_SMS, 4, MANY_SMS)),
)
def test_drawn(simt: Any, case: WindowCase, dtype: torch.dtype, seed: int, sm_count: int) -> None:
    simt._configure(seed, sm_count, H200_SHARED)
    checks.check_window_attention(simt, case, dtype)


def _call(simt: Any, x: WindowInputs) -> tuple[Tensor, ...]:
    """out, lse, dqkv, dtable, dlogit_scale, dqkv_bias."""
    out, lse = simt.window_attention(*x.tensors, **x.options)
    return out, lse, *simt.window_attention_backward(x.dout, *x.tensors, out, lse, **x.options)


SHORT = WindowCase("", (17, 22), (7, 7), (3, 3), batch=2, heads=3, cosine=True, qkv_bias=True)
LONG = WindowCase("", (17, 22), (9, 10), (4, 3), batch=2, heads=3, cosine=True, qkv_bias=True)
both_lengths = pytest.mark.parametrize("case", (SHORT, LONG), ids=("short", "long"))


@both_lengths
def test_results_repeat_bit_for_bit(simt: Any, case: WindowCase) -> None:
    """In any order of blocks and threads: nothing is added by whoever comes first."""
    x = window_inputs(case, torch.bfloat16)
    runs = []
    for seed in (1, 2, 3):
        simt._configure(seed, 3, H200_SHARED)
        runs.append(_call(simt, x))
    for name, *results in zip(("out", "lse", "dqkv", "dtable", "dlogit_scale", "dqkv_bias"), *runs, strict=True):
        assert all(torch.equal(results[0], r) for r in results[1:]), name


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
def test_which_pairs_meet(simt: Any, grid: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...]) -> None:
    """q = k = 0 and a mask of -inf: each output is the mean of v over the tokens of its window and region."""
    width = math.prod(grid)
    heads = -(-width // 128)
    # Token n has v one-hot at column n over all heads; padded positions have v = 0.
    v = torch.eye(width, heads * 128).view(*grid, heads, 128)
    qkv = torch.stack([torch.zeros_like(v), torch.zeros_like(v), v], -3)[None].half()
    out, _ = simt.window_attention(qkv, None, None, None, list(window), list(shift), mask_value=-math.inf)
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
    actual = out.view(width, heads * 128)[:, :width].float()
    assert torch.equal(actual > 0, expected > 0)
    torch.testing.assert_close(actual, expected, atol=0, rtol=torch.finfo(torch.float16).eps)


@both_lengths
def test_bad_values_stay_in_their_window(simt: Any, case: WindowCase) -> None:
    """NaN in one token reaches the tokens of its window and head alone, forward and backward."""
    x = window_inputs(case, torch.bfloat16)
    clean = _call(simt, x)
    x.qkv[1, 5, 6, :, 1] = float("nan")
    dirty = _call(simt, x)
    rows, cols = (
        torch.arange(n).sub(s).remainder(-(-n // w) * w).div(w, rounding_mode="floor")
        for n, w, s in zip(case.grid, case.window, case.shift or (), strict=True)
    )
    hit = torch.zeros(case.batch, *case.grid, case.heads, dtype=torch.bool)
    hit[1, :, :, 1] = (rows[:, None] == rows[5]) & (cols[None, :] == cols[6])
    out, dqkv = (
        [t.view(*hit.shape, -1) if t.dim() == 4 else t.movedim(3, 4).flatten(4) for t in (run[0], run[2])]
        for run in (clean, dirty)
    )
    for before, after in zip(out, dqkv, strict=True):
        assert after[hit].isnan().any() and torch.equal(before[~hit], after[~hit])


@both_lengths
def test_clamped_logit_scale_has_no_gradient(simt: Any, case: WindowCase) -> None:
    x = window_inputs(case, torch.bfloat16)
    assert x.logit_scale is not None
    x.logit_scale.copy_(torch.tensor([math.log(100) - 1e-3, math.log(100) + 1e-3, 9.0]))
    *_, gradient, _ = _call(simt, x)
    assert (gradient == 0).tolist() == [False, True, True]


@both_lengths
def test_zero_rows_have_no_gradient(simt: Any, case: WindowCase) -> None:
    x = window_inputs(case, torch.float16)
    x.qkv[:, 4, :, :2] = 0
    out, _, dqkv, *_ = _call(simt, x)
    assert out.isfinite().all() and dqkv.isfinite().all() and (dqkv[:, 4, :, :2] == 0).all()


def test_the_saved_output_is_in_dq_alone(simt: Any) -> None:
    """An output that is off moves dq by what it makes delta off; for the other gradients delta is corrected."""
    x = window_inputs(replace(LONG, grid=(9, 12), batch=1), torch.float16)
    out, lse = simt.window_attention(*x.tensors, **x.options)
    rough = (out + 0.1 * torch.randn_like(out)).half()
    results = [simt.window_attention_backward(x.dout, *x.tensors, o, lse, **x.options) for o in (out, rough)]
    (dq, *clean), (dq_rough, *others) = ((*r[0].unbind(-3), *r[1:]) for r in results)
    for name, g, truth in zip(("dk", "dv", "dtable", "dlogit_scale", "dqkv_bias"), others, clean, strict=True):
        assert_close(name, g, truth.double(), truth.half(), gradient=True)
    expected = checks.window_error_inherited_by_dq(x, rough, out.double())
    # A difference of two results, each rounded once to float16.
    largest = float(torch.maximum(dq.abs(), dq_rough.abs()).max())
    moved = (dq_rough.double() - dq.double()).float()
    assert expected.abs().max() > 20 * torch.finfo(torch.float16).eps * largest
    assert_close("dq", moved, expected, expected.half(), scale=largest)


@both_lengths
@pytest.mark.parametrize("short", (0, 1), ids=("queries", "keys"))
def test_short_rows_and_a_large_loss_scale(simt: Any, case: WindowCase, short: int) -> None:
    """A gradient of scores over the norm of a row, more than float16 holds, is not what is rounded."""
    x = window_inputs(replace(case, heads=2), torch.float16)
    assert x.logit_scale is not None
    x.logit_scale.fill_(1.0)
    rows = x.qkv.view(-1, 3, *x.qkv.shape[-2:])
    rows[::2, short] *= 1e-5
    x.dout *= 1000
    _, gradients = checks.window_oracle(x, torch.float64, True)
    assert gradients["dk" if short else "dq"].abs().max() > 1e6
    *_, dqkv, dtable, dlogit_scale, dqkv_bias = _call(simt, x)
    actual = dict(zip(("dq", "dk", "dv"), (t.flatten(0, 2) for t in dqkv.unbind(-3)), strict=True))
    actual |= {"dtable": dtable, "dlogit_scale": dlogit_scale, "dqkv_bias": dqkv_bias}
    for name, g in actual.items():
        truth = gradients[name].reshape(g.shape)
        if name == ("dk" if short else "dq"):  # its short rows have gradients beyond float16
            g, truth = g[1::2], truth[1::2]
        assert truth.abs().max() < 60000
        assert_close(name, g, truth, truth.half(), gradient=True)


@both_lengths
def test_the_bias_of_padding_is_used_nowhere_else(simt: Any, case: WindowCase) -> None:
    """Where the windows divide the grid nobody reads it and its gradient is 0; none is the same as zeros."""
    case = WindowCase("", tuple(2 * w for w in case.window), case.window, case.shift, heads=2, qkv_bias=True)
    x = window_inputs(case, torch.bfloat16)
    assert x.qkv_bias is not None
    expected = _call(simt, x)
    x.qkv_bias.fill_(float("nan"))
    actual = _call(simt, x)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[2], expected[2]) and (actual[5] == 0).all()

    case = WindowCase("", (13, 9), case.window, case.shift, heads=2)
    x = window_inputs(case, torch.bfloat16)
    expected = _call(simt, x)
    x.qkv_bias = torch.zeros(3, 2, 32, dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(_call(simt, x)[:4], expected[:4], strict=True))


@both_lengths
def test_other_layouts_are_copied(simt: Any, case: WindowCase) -> None:
    """A transposed qkv, one from a place that is not 16-byte aligned, a gradient that is expanded."""
    x = window_inputs(case, torch.bfloat16)
    x.dout = torch.ones((), dtype=torch.bfloat16).expand_as(x.dout)
    expected = _call(simt, x)
    plain = x.qkv
    for qkv in (plain.transpose(1, 2).contiguous().transpose(1, 2), cases.misaligned(plain)):
        x.qkv = qkv
        assert all(torch.equal(a, b) for a, b in zip(_call(simt, x), expected, strict=True))


@pytest.mark.parametrize(
    "wrong",
    [
        {"mask_value": 0.0},
        {"mask_value": 100.0},
        {"shift_size": [0, 0]},
        {"shift_size": [2, 3]},
        {"shift_size": [3, 4]},
        {"window_size": [7, 6]},
    ],
    ids=str,
)
def test_a_broken_mask_is_caught(simt: Any, wrong: dict[str, Any]) -> None:
    """The kernels told something else than the oracle: no mask, its sign, other shifts, another window."""

    class Broken:
        @staticmethod
        def window_attention(*tensors: Any, **how: Any) -> Any:
            return simt.window_attention(*tensors, **how | wrong)

    case = WindowCase("", (14, 21), (7, 7), (3, 3), bias=None)
    checks.check_window_attention(simt, case, torch.bfloat16, backward=False)
    with pytest.raises(AssertionError, match="out: largest error"):
        checks.check_window_attention(Broken, case, torch.bfloat16, backward=False)


def test_more_windows_than_multiprocessors_leave_few_sums(simt: Any) -> None:
    """Partial sums follow the number of multiprocessors, not of windows; one window each is the extreme."""
    case = WindowCase("", (28, 28), (4, 4), (2, 2), heads=1, qkv_bias=True)
    x = window_inputs(case, torch.bfloat16)
    results = []
    for sm_count in (1, 5, 1024):
        simt._configure(1, sm_count, H200_SHARED)
        results.append(_call(simt, x))
        checks.check_window_attention(simt, case, torch.bfloat16)  # sums of more parts, in another order
    assert all(torch.equal(r[2], results[0][2]) for r in results)


def test_kernel_table_lists_what_runs(simt: Any) -> None:
    rows = [row for row in json.loads(simt._kernel_table()) if row["op"].startswith("window_attention")]
    assert {(row["op"], row["dtype"]) for row in rows} == {
        (op, dtype) for op in ("window_attention", "window_attention_backward") for dtype in ("float16", "bfloat16")
    }
    for row in rows:
        step, most = row["head_dim"]["multiple_of"], row["head_dim"]["max"]
        for head_dim in range(step, most + 1, step):
            case = WindowCase("", (3, 4), (3, 2), (1, 0), heads=3, head_dim=head_dim)
            backward = row["op"].endswith("backward")
            checks.check_window_attention(simt, case, getattr(torch, row["dtype"]), backward=backward)


def test_windows_too_large_for_the_gpu(simt: Any) -> None:
    case = WindowCase("", (20, 20), (20, 20), heads=1, batch=0)
    x = window_inputs(case, torch.float16)
    simt._configure(1, FEW_SMS, AD102_SHARED)
    _call(simt, x)
    with pytest.raises(RuntimeError, match="no kernel: the window needs more shared memory a block than this GPU has"):
        simt._configure(1, FEW_SMS, 48 * 1024)
        _call(simt, x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.zeros(1, 8, 8, 3, 2, 7).half()}, "no kernel: head_dim is not a multiple of 8 up to 128"),
        ({"qkv": torch.zeros(1, 8, 8, 3, 2, 136).half()}, "no kernel: head_dim is not a multiple of 8 up to 128"),
        ({"qkv": torch.zeros(1, 8, 8, 3, 2, 8)}, "no kernel: the kernels take float16 and bfloat16"),
        ({"window_size": [1, 1025], "shift_size": [0, 0]}, "no kernel: a window of more than 1024 tokens"),
        ({"window_size": [512, 512], "shift_size": [0, 0]}, "no kernel: the window is too large for shared memory"),
        ({"qkv_bias": torch.zeros(3, 2, 8)}, "no kernel: qkv_bias is not of qkv's dtype"),
        ({"logit_scale": torch.zeros(2).double()}, "no kernel: a float64 table or logit_scale"),
        ({"qkv": torch.zeros(1, 8, 3, 2, 8).half()}, r"qkv must be of shape \[batch, height, width, 3, heads"),
        ({"window_size": [4, 4, 4], "shift_size": [0, 0, 0]}, r"qkv must be of shape \[batch, depth, height, width, 3"),
        ({"window_size": [4]}, "window_size must have 2 or 3 numbers, got 1"),
        ({"window_size": [4, 0]}, r"window_size must be 1 to 2\^20 on every axis, got 0"),
        ({"shift_size": [1]}, "shift_size must have 2 numbers, as window_size, got 1"),
        ({"shift_size": [1, 4]}, "shift_size must be at least 0 and less than window_size, got 4 for 4"),
        ({"shift_size": [-1, 0]}, "shift_size must be at least 0 and less than window_size, got -1 for 4"),
        ({"relative_position_bias_table": torch.zeros(48, 2)}, r"table must be floating-point of shape \[49, 2\], got"),
        ({"logit_scale": torch.zeros(3)}, r"logit_scale must be floating-point of shape \[2\], got float32 of shape"),
        ({"qkv_bias": torch.zeros(48).half()}, r"qkv_bias must be floating-point of shape \[3, 2, 8\], got float16"),
        ({"logit_scale": torch.zeros(2), "scale": 1.0}, "scale and logit_scale exclude each other, got both"),
    ],
)  # fmt: skip
def test_bad_input(simt: Any, change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "qkv": torch.zeros(1, 8, 8, 3, 2, 8).half(), "relative_position_bias_table": None, "logit_scale": None,
        "qkv_bias": None, "window_size": [4, 4], "shift_size": [2, 2],
    } | change  # fmt: skip
    with pytest.raises(RuntimeError, match=f"window_attention: .*{message}"):
        simt.window_attention(**arguments)


def test_bad_gradient_input(simt: Any) -> None:
    case = WindowCase("", (9, 9), (9, 9), heads=1)
    x = window_inputs(case, torch.float16)
    out, lse = simt.window_attention(*x.tensors, **x.options)
    for dout, o, rows, message in (
        (x.dout[:, 1:], out, lse, "dout must have the shape and dtype of the output"),
        (x.dout, out.float(), lse, "out must have the shape and dtype of the output"),
        (x.dout, out, lse[..., 1:], "lse must be float32 as the forward returned it"),
    ):
        with pytest.raises(RuntimeError, match=f"window_attention_backward: {message}"):
            simt.window_attention_backward(dout, *x.tensors, o, rows, **x.options)
