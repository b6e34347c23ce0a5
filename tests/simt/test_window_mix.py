"""window_mix's kernels in the emulator: what is asked of them alone."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from helpers.backends import AD102_SHARED, FEW_SMS, H200_SHARED
from helpers.cases import KERNEL_DTYPES
from helpers.compare import assert_close
from helpers.window_mix import WindowMixCase, check_window_mix, check_window_mix_of, window_mix_inputs

CASE = WindowMixCase("", (8, 12), (4, 3), 24, batch=2, dilated=True)


def _kernels(simt: Any) -> list[tuple[str, list[int]]]:
    """Names, without template arguments, and grids of what was launched, without the sums of columns."""
    found = [(launch["kernel"].split("<")[0], launch["grid"]) for launch in simt.launches()]
    return [each for each in found if not each[0].startswith("column_sum")]


@pytest.mark.parametrize("wrong", ({"dilated": False}, {"window_size": [3, 4]}, {"eps": 0.1}), ids=str)
def test_other_windows_are_caught(simt: Any, wrong: dict[str, Any]) -> None:
    """The kernels told something else than the oracle."""

    class Broken:
        @staticmethod
        def window_mix(*tensors: Any, **how: Any) -> Any:
            *tensors, window = tensors
            how |= wrong
            return simt.window_mix(*tensors, how.pop("window_size", window), **how)

        @staticmethod
        def window_mix_backward(*tensors: Any, **how: Any) -> Any:
            return simt.window_mix_backward(*tensors, **how)

    case = replace(CASE, grid=(12, 12))
    check_window_mix(simt, case, torch.bfloat16)
    with pytest.raises(AssertionError, match="largest error"):
        check_window_mix(Broken, case, torch.bfloat16)


def test_shares_follow_the_number_of_multiprocessors(simt: Any) -> None:
    """The gradient of the weight is a sum of one share, of a few, of one for every two tiles of columns."""
    x = window_mix_inputs(replace(CASE, channels=64, batch=3), torch.bfloat16)
    results = []
    for sm_count, shares in ((FEW_SMS, 2), (2, 4), (1024, 12)):
        simt.configure(1, sm_count, H200_SHARED)
        results.append(x.call(simt))
        assert ("window_mix_weight_gradient", [1, shares, 1]) in _kernels(simt)
        check_window_mix_of(simt, x)
    for i in (0, 1, 2, 3, 6, 7, 8):  # all but dweight and dbias
        assert all(torch.equal(r[i], results[0][i]) for r in results)


@pytest.mark.parametrize(
    ("channels", "dtype", "whole"),
    [
        (32, torch.float16, True), (64, torch.float16, True), (64, torch.float32, True), (7, torch.float32, True),
        (24, torch.float16, False), (48, torch.float32, False), (65, torch.float16, False), (128, torch.float32, False),
    ],
)  # fmt: skip
def test_launches(simt: Any, channels: int, dtype: torch.dtype, whole: bool) -> None:
    """Tokens that lie whole in a tile need no pass of their own before and behind; without a norm no token does."""
    case = WindowMixCase("", (4, 6), (2, 3), channels)
    for norm in ("both", None):
        x = window_mix_inputs(replace(case, norm=norm), dtype)
        simt.configure(1, FEW_SMS, H200_SHARED)
        _, mean, rstd = x.forward(simt)
        found = [name for name, _ in _kernels(simt)]
        apart = norm is not None and not whole
        assert found == ["window_mix_statistics"] * apart + ["window_mix_forward"]
        for gate in (x.gate, None):
            simt.configure(1, FEW_SMS, H200_SHARED)
            replace(x, gate=gate).backward(simt, mean, rstd)
            found = [name for name, _ in _kernels(simt)]
            expected = ["window_mix_gradient", "window_mix_weight_gradient"]
            assert found == expected + ["row_norm_backward_kernel"] * apart
            assert _kernels(simt)[0][1][1] == (1 if gate is None else 2)  # dx, and dgate


def test_windows_of_small_channels_share_a_tile(simt: Any) -> None:
    """A tile is 64 columns, of channels or of windows: none is filled up with zeros but the last."""
    for channels, dtype, tiles in (
        (8, torch.float16, 1),
        (16, torch.float16, 2),
        (32, torch.float32, 4),
        (40, torch.float16, 5),
    ):
        x = window_mix_inputs(WindowMixCase("", (8, 4), (2, 2), channels), dtype)
        simt.configure(1, FEW_SMS, H200_SHARED)
        x.forward(simt)
        assert _kernels(simt)[-1] == ("window_mix_forward", [tiles, 1, 1])


@pytest.mark.parametrize("channels", (24, 32, 48), ids=("kernel_before", "in_a_tile", "chunks_of_float32"))
def test_a_rounded_mean_is_taken_off_the_variance(simt: Any, channels: int) -> None:
    """The spread is 25 times the last digit of a mean: what rounding moved the mean by is no part of it."""
    x = window_mix_inputs(WindowMixCase("", (4, 6), (2, 3), channels), torch.float32)
    x.x = x.x * 0.05 + 20000
    _, mean, rstd = x.forward(simt)
    rows = x.x.double().flatten(0, 2)
    truth = 1 / torch.sqrt(rows.var(-1, unbiased=False) + x.case.eps)
    assert_close("rstd", rstd, truth, truth.float())
    rounded = 1 / torch.sqrt((rows - mean[:, None]).square().mean(-1) + x.case.eps)
    assert (rounded / truth - 1).abs().max() > 1e-4  # which is what it would be otherwise


def test_kernel_table_lists_what_runs(simt: Any) -> None:
    rows = [row for row in json.loads(simt._kernel_table()) if row["op"].startswith("window_mix")]
    assert {(row["op"], row["dtype"]) for row in rows} == {
        (op, str(dtype).removeprefix("torch."))
        for op in ("window_mix", "window_mix_backward")
        for dtype in KERNEL_DTYPES
    }
    for row in rows:
        assert row["window_tokens"] == {"max": 1024}
        assert row["parameter_dtypes"] == (["float32"] if row["dtype"] == "float32" else [row["dtype"], "float32"])


def test_the_largest_windows(simt: Any) -> None:
    """Up to 1024 tokens where shared memory holds a tile of them: 227 KiB hold 768 of float32."""
    for window, dtype, shared in (
        ((32, 32), torch.float16, H200_SHARED),
        ((24, 32), torch.float32, H200_SHARED),
        ((16, 16), torch.float32, AD102_SHARED),
    ):
        simt.configure(1, FEW_SMS, shared)
        window_mix_inputs(WindowMixCase("", window, window, 8, batch=0), dtype).call(simt)
    for window, dtype, shared in (
        ((25, 32), torch.float32, H200_SHARED),
        ((16, 17), torch.float32, AD102_SHARED),
        ((32, 32), torch.float16, AD102_SHARED),
    ):
        simt.configure(1, FEW_SMS, shared)
        x = window_mix_inputs(WindowMixCase("", window, window, 8, batch=0), dtype)
        with pytest.raises(RuntimeError, match="no kernel: the window needs more shared memory a block than this GPU"):
            x.call(simt)


def test_windows_of_many_blocks(simt: Any) -> None:
    """Five blocks of 64 places, the last one of 16: the slabs of the weight pass all stages of the pipeline."""
    case = WindowMixCase("", (16, 17), (16, 17), 8, dilated=True, wide_norm=True)
    for dtype in KERNEL_DTYPES:
        check_window_mix(simt, case, dtype)


HALF_X, N = torch.zeros(1, 4, 6, 8).half(), torch.zeros(8).half()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 6, 8)}, r"x must be of shape \[batch, height, width, channels\], got \[4, 6, 8\]"),
        ({"x": torch.zeros(1, 4, 6, 0)}, r"x must have at least 1 channel, got \[1, 4, 6, 0\]"),
        ({"x": torch.zeros(1, 4, 6, 8).int()}, "x must be float16, bfloat16, float32 or float64, got int32"),
        ({"window_size": [2]}, r"window_size must be an int or 2 of them, one for each axis, got \[2\]"),
        ({"window_size": [2, 0]}, r"window_size must be at least 1, got \[2, 0\]"),
        ({"window_size": [2, 2**15 + 1]}, r"window_size must be at most 2\^15 on every axis, got \[2, 32769\]"),
        ({"window_size": [3, 2]}, r"window_size must divide the height and width of x, \[1, 4, 6, 8\], got \[3, 2\]"),
        ({"window_size": [2, 4]}, r"window_size must divide the height and width of x, \[1, 4, 6, 8\], got \[2, 4\]"),
        ({"weight": torch.zeros(6, 5).half()}, r"weight must be of shape \[6, 6\], got \[6, 5\]"),
        ({"weight": torch.zeros(36).half()}, r"weight must be of shape \[6, 6\], got \[36\]"),
        ({"weight": torch.zeros(6, 6)}, "weight must be float16 as x is, got float32"),
        ({"bias": torch.zeros(8).half()}, r"bias must be of shape \[6\], got \[8\]"),
        ({"bias": torch.zeros(6)}, "bias must be float16 as x is, got float32"),
        ({"norm_weight": None}, "norm_bias must be None where norm_weight is None"),
        ({"norm_weight": torch.zeros(6)}, r"norm_weight must be of shape \[8\], got float32 of shape \[6\]"),
        ({"norm_weight": N.bfloat16()}, "norm_weight must be float16 as x is, or float32, got bfloat16"),
        ({"norm_bias": torch.zeros(8, 1)}, r"norm_bias must be of shape \[8\], got float32 of shape \[8, 1\]"),
        ({"norm_bias": torch.zeros(8)}, "norm_bias must be float16 as norm_weight is, got float32"),
        ({"gate": HALF_X[:, 1:]}, r"gate must be float16 of shape \[1, 4, 6, 8\] as x is, got float16 of shape \[1, 3"),
        ({"gate": HALF_X.float()}, r"gate must be float16 of shape \[1, 4, 6, 8\] as x is, got float32"),
    ],
)  # fmt: skip
def test_bad_input(simt: Any, change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": HALF_X, "weight": torch.zeros(6, 6).half(), "bias": torch.zeros(6).half(), "norm_weight": N,
        "norm_bias": N, "gate": HALF_X, "window_size": [2, 3],
    } | change  # fmt: skip
    with pytest.raises(RuntimeError, match=f"^window_mix: {message}"):
        simt.window_mix(**arguments)
    with pytest.raises(RuntimeError, match=f"^window_mix_backward: {message}"):
        simt.window_mix_backward(dout=HALF_X, mean=torch.zeros(24), rstd=torch.zeros(24), **arguments)


@pytest.mark.parametrize("eps", (-1e-6, float("nan"), float("inf")))
def test_bad_eps(simt: Any, eps: float) -> None:
    with pytest.raises(RuntimeError, match="window_mix: eps must (not be negative|be finite), got"):
        simt.window_mix(HALF_X, torch.zeros(6, 6).half(), None, None, None, None, [2, 3], eps=eps)


def test_bad_gradient_input(simt: Any) -> None:
    weight, rows, none = torch.zeros(6, 6).half(), torch.zeros(24), torch.zeros(0)
    for dout, norm, mean, rstd, message in (
        (HALF_X[:, 1:], N, rows, rows, r"dout must be float16 of shape \[1, 4, 6, 8\] as x is, got"),
        (HALF_X.float(), N, rows, rows, r"dout must be float16 of shape \[1, 4, 6, 8\] as x is, got"),
        (HALF_X, N, rows[1:], rows, r"mean must be float32 of shape \[24\], got float32 of shape \[23\]"),
        (HALF_X, N, rows, rows.half(), r"rstd must be float32 of shape \[24\], got float16 of shape \[24\]"),
        (HALF_X, None, rows, none, r"mean must be float32 of shape \[0\], got float32 of shape \[24\]"),
    ):
        with pytest.raises(RuntimeError, match=f"window_mix_backward: {message}"):
            simt.window_mix_backward(dout, HALF_X, weight, None, norm, None, None, mean, rstd, [2, 3])


def test_what_has_no_kernel(simt: Any) -> None:
    x, weight = torch.zeros(1, 2, 2, 8), torch.zeros(4, 4)
    with pytest.raises(RuntimeError, match="window_mix: no kernel: float64"):
        simt.window_mix(x.double(), weight.double(), None, None, None, None, [2, 2])
    x = torch.zeros(1, 1, 1025, 8)
    with pytest.raises(RuntimeError, match="window_mix: no kernel: a window of more than 1024 tokens"):
        simt.window_mix(x, torch.zeros(1025, 1025), None, None, None, None, [1, 1025])
    x, row = torch.zeros(1, 1, 1, 16385), torch.zeros(1)
    arguments = (x, torch.zeros(1, 1), None, torch.ones(16385), None, None)
    simt.window_mix(*arguments, [1, 1])
    with pytest.raises(
        RuntimeError, match="no kernel: rows of 16385 elements; the kernels of LayerNorm take up to 16384"
    ):
        simt.window_mix_backward(x, *arguments, row, row, [1, 1])
