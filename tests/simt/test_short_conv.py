"""short_conv_gate's kernels in the emulator: what is asked of them alone."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import fft_conv as convolutions
from helpers.fft_conv import ShortConvCase


def test_table_of_configurations(simt: Any) -> None:
    ops = ("short_conv_gate", "short_conv_gate_backward")
    table = [entry for entry in json.loads(simt._kernel_table()) if entry["op"] in ops]
    assert {(entry["op"], entry["dtype"]) for entry in table} == {
        (op, dtype) for op in ops for dtype in ("float32", "float16", "bfloat16")
    }
    for entry in table:
        for taps in range(1, entry["max_taps"] + 1):
            case = ShortConvCase("", 1, 9, 3, taps=taps)
            backward = entry["op"].endswith("backward")
            convolutions.check_short_conv_gate(simt, case, getattr(torch, entry["dtype"]), backward=backward)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 5, 25)}, r"x must be of shape \[batch, seqlen, 3 channels\]"),
        ({"x": torch.zeros(5, 24)}, r"x must be of shape \[batch, seqlen, 3 channels\], got \[5, 24\]"),
        ({"x": torch.zeros(2, 5, 24).int()}, "x must be float16, bfloat16, float32 or float64, got int32"),
        ({"weight": torch.zeros(23, 3)}, r"weight must be of shape \[24, taps\], got \[23, 3\]"),
        ({"weight": torch.zeros(24, 0)}, r"weight must be of shape \[24, taps\], got \[24, 0\]"),
        ({"weight": torch.zeros(24, 1, 3)}, r"weight must be of shape \[24, taps\], got \[24, 1, 3\]"),
        ({"weight": torch.zeros(24, 3).half()}, r"weight must be float32 as x is, got float16 of shape \[24, 3\]"),
        ({"bias": torch.zeros(8)}, r"bias must be of shape \[24\], got \[8\]"),
        ({"bias": torch.zeros(24).half()}, r"bias must be float32 as x is, got float16 of shape \[24\]"),
        ({"weight": torch.zeros(24, 5)}, "no kernel: 5 taps; the kernels take up to 4"),
    ],
)  # fmt: skip
def test_bad_input(simt: Any, change: dict[str, Tensor], message: str) -> None:
    arguments = {"x": torch.zeros(2, 5, 24), "weight": torch.zeros(24, 3), "bias": torch.zeros(24)} | change
    with pytest.raises(RuntimeError, match=f"^short_conv_gate: {message}"):
        simt.short_conv_gate(**arguments)
    gradient = torch.zeros(2, 8, 5)
    with pytest.raises(RuntimeError, match=f"^short_conv_gate_backward: {message}"):
        simt.short_conv_gate_backward(gradient, gradient, **arguments)


def test_bad_gradient_input(simt: Any) -> None:
    x, weight, gradient = torch.zeros(2, 5, 24), torch.zeros(24, 3), torch.zeros(2, 8, 5)
    with pytest.raises(RuntimeError, match=r"dgated must be of shape \[2, 8, 5\], got \[2, 5, 8\]"):
        simt.short_conv_gate_backward(gradient.mT.contiguous(), gradient, x, weight, None)
    with pytest.raises(RuntimeError, match=r"dgate must be float32 as x is, got float16 of shape"):
        simt.short_conv_gate_backward(gradient, gradient.half(), x, weight, None)
    with pytest.raises(RuntimeError, match="short_conv_gate: no kernel: float64"):
        simt.short_conv_gate(x.double(), weight.double(), None)
