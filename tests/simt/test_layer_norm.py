"""The kernels of add_bias_residual_layer_norm in the emulator: what is asked of them alone."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from helpers import cases, checks


def test_many_blocks(simt: Any) -> None:
    # 42 blocks leave partial sums: more than the second stage has warps.
    simt.configure(1, 42)
    checks.check_layer_norm(simt, cases.LayerNormCase("", (660, 24)), torch.float32)


def test_table_of_configurations(simt: Any) -> None:
    ops = ("add_bias_residual_layer_norm", "add_bias_residual_layer_norm_backward")
    table = [entry for entry in json.loads(simt._kernel_table()) if entry.get("op") in ops]
    assert {(entry["op"], entry["dtype"]) for entry in table} == {
        (op, dtype) for op in ops for dtype in ("float32", "float16", "bfloat16")
    }
    for entry in table:
        for parameters in entry["parameter_dtypes"]:
            x = torch.ones(1, entry["max_cols"], dtype=getattr(torch, entry["dtype"]))
            weight = torch.ones(entry["max_cols"], dtype=getattr(torch, parameters))
            _, total, mean, rstd = simt.add_bias_residual_layer_norm(x, None, None, weight, weight, return_sum=True)
            simt.add_bias_residual_layer_norm_backward(x, None, total, weight, mean, rstd)


def test_no_kernel(simt: Any) -> None:
    # On a GPU these go to the reference, which says why; here there is none.
    x, weight = torch.randn(2, 16385), torch.ones(16385)
    with pytest.raises(RuntimeError, match="no kernel: rows of 16385 elements; the kernels take up to 16384"):
        simt.add_bias_residual_layer_norm(x, None, None, weight, weight)
    with pytest.raises(RuntimeError, match="no kernel: rows of 16385 elements; the kernels take up to 16384"):
        simt.add_bias_residual_layer_norm_backward(x, None, x, weight, torch.zeros(2), torch.ones(2))
    x, weight = torch.randn(2, 8).double(), torch.ones(8).double()
    with pytest.raises(RuntimeError, match="no kernel: float64"):
        simt.add_bias_residual_layer_norm(x, None, None, weight, weight)


FORWARD_ERRORS = {
    "x must be float16, bfloat16, float32 or float64, got int64 of shape [3, 8]": {
        "x": torch.zeros(3, 8, dtype=torch.int64)
    },
    "x must be of shape [..., width], got float32 of shape []": {"x": torch.tensor(1.0)},
    "residual must be of shape [3, 8], got float32 of shape [8, 3]": {"residual": torch.zeros(8, 3)},
    "residual must be float32 as x is, got float16 of shape [3, 8]": {"residual": torch.zeros(3, 8).half()},
    "weight must be of shape [8], got float32 of shape [7]": {"weight": torch.ones(7)},
    "bias must be of shape [8], got float32 of shape [1, 8]": {"bias": torch.ones(1, 8)},
    "bias, weight and ln_bias must all be float32 as x is, or all float32, got ln_bias float16 of shape [8]": {
        "ln_bias": torch.ones(8).half()
    },
    "bias, weight and ln_bias must all be float16 as x is, or all float32, got bias float32 of shape [8]": {
        "x": torch.zeros(3, 8).half(),
        "residual": None,
        "weight": torch.ones(8).half(),
        "ln_bias": torch.ones(8).half(),
    },
    "eps must be finite, got inf": {"eps": float("inf")},
    "eps must not be negative, got -0.5": {"eps": -0.5},
}


@pytest.mark.parametrize("message", FORWARD_ERRORS)
def test_bad_input(simt: Any, message: str) -> None:
    good = {"x": torch.zeros(3, 8), "bias": torch.zeros(8), "residual": torch.zeros(3, 8)}
    good |= {"weight": torch.ones(8), "ln_bias": torch.zeros(8)}
    with pytest.raises(RuntimeError) as error:
        simt.add_bias_residual_layer_norm(**(good | FORWARD_ERRORS[message]))
    assert str(error.value).startswith("add_bias_residual_layer_norm: " + message)


BACKWARD_ERRORS = {
    "dout must be float32 of shape [3, 8] as sum is, got float32 of shape [24]": {"dout": torch.zeros(24)},
    "dsum must be float32 of shape [3, 8] as sum is, got float64 of shape [3, 8]": {"dsum": torch.zeros(3, 8).double()},
    "weight must be of shape [8], got float32 of shape [3, 8]": {"weight": torch.ones(3, 8)},
    "weight must be float32 as sum is, or float32, got float16 of shape [8]": {"weight": torch.ones(8).half()},
    "mean must be float32 of shape [3], got float32 of shape [3, 1]": {"mean": torch.zeros(3, 1)},
    "rstd must be float32 of shape [3], got float16 of shape [3]": {"rstd": torch.zeros(3).half()},
}


@pytest.mark.parametrize("message", BACKWARD_ERRORS)
def test_bad_input_of_the_backward(simt: Any, message: str) -> None:
    good = {"dout": torch.zeros(3, 8), "dsum": torch.zeros(3, 8), "sum": torch.zeros(3, 8), "weight": torch.ones(8)}
    good |= {"mean": torch.zeros(3), "rstd": torch.ones(3)}
    with pytest.raises(RuntimeError) as error:
        simt.add_bias_residual_layer_norm_backward(**(good | BACKWARD_ERRORS[message]))
    assert str(error.value).startswith("add_bias_residual_layer_norm_backward: " + message)
