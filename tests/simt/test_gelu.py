"""bias_gelu's kernels in the emulator: what is asked of them alone."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from helpers import cases, checks


def test_many_blocks(simt: Any) -> None:
    # 47 blocks leave partial sums: more than the second stage has warps.
    simt.configure(1, 40)
    checks.check_gelu(simt, cases.GeluCase("", (1500, 5)), "none", torch.float32)


def test_table_of_configurations(simt: Any) -> None:
    ops = ("bias_gelu", "bias_gelu_backward")
    table = [entry for entry in json.loads(simt._kernel_table()) if entry.get("op") in ops]
    assert {(entry["op"], entry["dtype"]) for entry in table} == {
        (op, dtype) for op in ops for dtype in ("float32", "float16", "bfloat16")
    }
    for entry in table:
        x = torch.ones(2, 24, dtype=getattr(torch, entry["dtype"]))
        for parameters in entry["parameter_dtypes"]:
            for approximate in entry["approximate"]:
                bias = torch.ones(24, dtype=getattr(torch, parameters))
                simt.bias_gelu(x, bias, approximate)
                simt.bias_gelu_backward(x, x, bias, approximate)


def test_bad_input(simt: Any) -> None:
    x, bias = torch.zeros(3, 8), torch.zeros(8)
    for message, arguments in {
        "x must be float16, bfloat16, float32 or float64, got bool of shape [3, 8]": (x.bool(), bias),
        "bias must be of shape [8], got float32 of shape [9]": (x, torch.zeros(9)),
        "bias must be float16 as x is, or float32, got bfloat16 of shape [8]": (x.half(), bias.bfloat16()),
        'approximate must be "none" or "tanh", got \'erf\'': (x, bias, "erf"),
    }.items():
        with pytest.raises(RuntimeError) as error:
            simt.bias_gelu(*arguments)
        assert str(error.value).startswith("bias_gelu: " + message)
        with pytest.raises(RuntimeError) as error:
            simt.bias_gelu_backward(arguments[0], *arguments)
        assert str(error.value).startswith("bias_gelu_backward: " + message)
    with pytest.raises(RuntimeError, match=r"bias_gelu_backward: dout must be float32 of shape \[3, 8\] as x is, got"):
        simt.bias_gelu_backward(torch.zeros(8, 3), x, bias)
    with pytest.raises(RuntimeError, match="bias_gelu: no kernel: float64"):
        simt.bias_gelu(x.double(), None)
