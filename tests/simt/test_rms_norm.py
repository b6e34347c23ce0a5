"""The kernels of RMSNorm, with and without GELU, in the emulator: what is asked of them alone."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from helpers.norm import RmsNormCase, RmsNormGeluCase, check_rms_norm, check_rms_norm_gelu

OPS = ("add_residual_rms_norm", "rms_norm_gelu")


def test_many_blocks(simt: Any) -> None:
    # 42 blocks leave partial sums: more than the second stage has warps.
    simt.configure(1, 42)
    check_rms_norm(simt, RmsNormCase("", (700, 24)), torch.float32)


def test_table_of_configurations(simt: Any) -> None:
    names = {name for op in OPS for name in (op, f"{op}_backward")}
    table = [entry for entry in json.loads(simt._kernel_table()) if entry.get("op") in names]
    assert {(entry["op"], entry["dtype"]) for entry in table} == {
        (op, dtype) for op in names for dtype in ("float32", "float16", "bfloat16")
    }
    for entry in table:
        dtype, shape = getattr(torch, entry["dtype"]), (1, entry["max_cols"])
        for parameters in entry.get("parameter_dtypes", ()):
            check_rms_norm(simt, RmsNormCase("", shape, wide_weight=parameters != entry["dtype"]), dtype)
        for approximate in entry.get("approximate", ()):
            check_rms_norm_gelu(simt, RmsNormGeluCase("", shape, approximate=approximate), dtype)


def test_no_kernel(simt: Any) -> None:
    # On a GPU these go to the reference, which says why; here there is none.
    x, weight, rows = torch.randn(2, 16385), torch.ones(16385), torch.ones(2)
    y = torch.randn(2, 8).double()
    for op, wide, double in (
        (simt.add_residual_rms_norm, (x, None, weight), (y, None, y[0])),
        (simt.add_residual_rms_norm_backward, (x, None, x, weight, rows), (y, None, y, y[0], rows.double())),
        (simt.rms_norm_gelu, (x,), (y,)),
        (simt.rms_norm_gelu_backward, (x, x), (y, y)),
    ):
        with pytest.raises(RuntimeError, match="no kernel: rows of 16385 elements; the kernels take up to 16384"):
            op(*wide)
        with pytest.raises(RuntimeError, match="no kernel: float64"):
            op(*double)


X, W = torch.zeros(3, 8), torch.ones(8)
ERRORS: dict[str, tuple[str, dict[str, Any]]] = {
    "x must be float16, bfloat16, float32 or float64, got int64 of shape [3, 8]": (OPS[0], {"x": X.long()}),
    "x must be of shape [..., width], got float32 of shape []": (OPS[1], {"x": torch.tensor(1.0)}),
    "residual must be of shape [3, 8], got float32 of shape [8, 3]": (OPS[0], {"residual": torch.zeros(8, 3)}),
    "residual must be float32 as x is, got float16 of shape [3, 8]": (OPS[0], {"residual": X.half()}),
    "weight must be of shape [8], got float32 of shape [7]": (OPS[0], {"weight": W[:7]}),
    "weight must be float32 as x is, or float32, got float16 of shape [8]": (OPS[0], {"weight": W.half()}),
    "eps must be finite, got inf": (OPS[0], {"eps": float("inf")}),
    "eps must not be negative, got -0.5": (OPS[1], {"eps": -0.5}),
    "scale must be from -1e10 to 1e10, got nan": (OPS[1], {"scale": float("nan")}),
    'approximate must be "none" or "tanh", got \'fast\'': (OPS[1], {"approximate": "fast"}),
    "dout must be float32 of shape [3, 8] as sum is, got float32 of shape [24]": (
        "add_residual_rms_norm_backward",
        {"dout": torch.zeros(24)},
    ),
    "dsum must be float32 of shape [3, 8] as sum is, got float64 of shape [3, 8]": (
        "add_residual_rms_norm_backward",
        {"dsum": X.double()},
    ),
    "rstd must be float32 of shape [3], got float32 of shape [3, 1]": (
        "add_residual_rms_norm_backward",
        {"rstd": torch.zeros(3, 1)},
    ),
    "dout must be float32 of shape [3, 8] as x is, got float16 of shape [3, 8]": (
        "rms_norm_gelu_backward",
        {"dout": X.half()},
    ),
}
GOOD: dict[str, dict[str, Any]] = {
    "add_residual_rms_norm": {"x": X, "residual": X, "weight": W},
    "add_residual_rms_norm_backward": {"dout": X, "dsum": X, "sum": X, "weight": W, "rstd": torch.ones(3)},
    "rms_norm_gelu": {"x": X},
    "rms_norm_gelu_backward": {"dout": X, "x": X},
}


@pytest.mark.parametrize("message", ERRORS)
def test_bad_input(simt: Any, message: str) -> None:
    op, changed = ERRORS[message]
    with pytest.raises(RuntimeError) as error:
        getattr(simt, op)(**(GOOD[op] | changed))
    assert str(error.value).startswith(f"{op}: {message}")
