"""window_attention's kernels in the emulator: what is asked of them alone."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import checks
from helpers.backends import AD102_SHARED, FEW_SMS, H200_SHARED
from helpers.cases import WindowCase, WindowInputs, window_inputs


def _call(simt: Any, x: WindowInputs) -> tuple[Tensor, ...]:
    """out, lse, dqkv, dtable, dlogit_scale, dqkv_bias."""
    out, lse = simt.window_attention(*x.tensors, **x.options)
    return out, lse, *simt.window_attention_backward(x.dout, *x.tensors, out, lse, **x.options)


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
        simt.configure(1, sm_count, H200_SHARED)
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
    simt.configure(1, FEW_SMS, AD102_SHARED)
    _call(simt, x)
    with pytest.raises(RuntimeError, match="no kernel: the window needs more shared memory a block than this GPU has"):
        simt.configure(1, FEW_SMS, 48 * 1024)
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
        ({"logit_scale": torch.zeros(2).double()}, "logit_scale must be float16 as qkv is, or float32, got float64"),
        ({"qkv": torch.zeros(1, 8, 3, 2, 8).half()}, r"qkv must be of shape \[batch, height, width, 3, heads"),
        ({"window_size": [4, 4, 4], "shift_size": [0, 0, 0]}, r"window_size must be an int or 2 .*, got \[4, 4, 4\]"),
        ({"window_size": [4]}, r"window_size must be an int or 2 of them, one for each axis, got \[4\]"),
        ({"window_size": [4, 0]}, r"window_size must be at least 1, got \[4, 0\]"),
        ({"window_size": [4, 2**20 + 1]}, r"window_size must be at most 2\^20 on every axis, got \[4, 1048577\]"),
        ({"shift_size": [1]}, r"shift_size must be an int or 2 of them, one for each axis, got \[1\]"),
        ({"shift_size": [1, 4]}, r"shift_size must be at least 0 and below window_size \[4, 4\], got \[1, 4\]"),
        ({"shift_size": [-1, 0]}, r"shift_size must be at least 0 and below window_size \[4, 4\], got \[-1, 0\]"),
        ({"relative_position_bias_table": torch.zeros(48, 2)}, r"table must be of shape \[49, 2\], got \[48, 2\]"),
        ({"logit_scale": torch.zeros(3)}, r"logit_scale must be of shape \[2\], got \[3\]"),
        ({"qkv_bias": torch.zeros(48).half()}, r"qkv_bias must be of shape \[3, 2, 8\], got \[48\]"),
        ({"logit_scale": torch.zeros(2), "scale": 1.0}, "scale must be None where logit_scale is given, got 1.0"),
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
