"""bias_gelu and its backward: the CUDA kernels, run in the emulator."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from helpers import cases, checks, oracle
from helpers.compare import assert_close
from helpers.drawn import drawn
from helpers.gelu import check_gelu_everywhere

by_dtype = pytest.mark.parametrize("dtype", cases.KERNEL_DTYPES, ids=lambda d: str(d).removeprefix("torch."))
by_parameters = pytest.mark.parametrize(("dtype", "wide"), cases.KERNEL_PARAMETERS, ids=cases.KERNEL_PARAMETER_IDS)
by_form = pytest.mark.parametrize("approximate", ("none", "tanh"))


@by_dtype
@by_form
@pytest.mark.parametrize("case", cases.GELU_CASES, ids=str)
def test_cases(simt: Any, case: cases.GeluCase, approximate: str, dtype: torch.dtype) -> None:
    checks.check_gelu(simt, case, approximate, dtype)


@by_parameters
@pytest.mark.parametrize("width", cases.GELU_WIDTHS)
def test_widths(simt: Any, width: int, dtype: torch.dtype, wide: bool) -> None:
    simt._configure(width, 1)  # one multiprocessor: blocks walk over several rows
    for case in cases.gelu_grid(width, wide_bias=wide):
        for approximate in ("none", "tanh"):
            checks.check_gelu(simt, case, approximate, dtype)


@drawn(
    60,
    case=cases.gelu_cases(),
    dtype=st.sampled_from(cases.KERNEL_DTYPES),
    approximate=st.sampled_from(("none", "tanh")),
    sm_count=st.integers(1, 4),
)
def test_drawn_shapes(
    simt: Any, case: cases.GeluCase, dtype: torch.dtype, approximate: str, sm_count: int, seed: int
) -> None:
    simt._configure(seed, sm_count)
    checks.check_gelu(simt, case, approximate, dtype)


def test_many_blocks(simt: Any) -> None:
    # 47 blocks leave partial sums: more than the second stage has warps.
    simt._configure(1, 40)
    checks.check_gelu(simt, cases.GeluCase("", (1500, 5)), "none", torch.float32)


@by_form
def test_everywhere(simt: Any, approximate: str) -> None:
    check_gelu_everywhere(simt, approximate, 4001)


@by_form
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_huge_and_not_a_number(simt: Any, dtype: torch.dtype, approximate: str) -> None:
    x = torch.tensor([1e20, -1e20, 3e38, -3e38, 0.0, float("nan")], dtype=dtype)
    out = simt.bias_gelu(x, None, approximate)
    assert torch.equal(out[:5], x[:5].relu()) and out[5].isnan()
    dx, _ = simt.bias_gelu_backward(torch.ones_like(x), x, None, approximate)
    assert dx[[0, 2, 4]].tolist() == [1, 1, 0.5] and dx[5].isnan()
    if approximate == "none":
        assert dx[[1, 3]].tolist() == [0, 0]
        return
    # The derivative is that of -10 from there on: nearer to 0 than the truth at -9, which tanh itself would round away.
    leaf = torch.tensor(-9.0, dtype=torch.float64, requires_grad=True)
    value = leaf * torch.sigmoid(math.sqrt(8 / math.pi) * (leaf + 0.044715 * leaf**3))
    (derivative,) = torch.autograd.grad(value, leaf)
    assert (dx[[1, 3]].abs() <= derivative.abs()).all()


@by_parameters
def test_misaligned_tensors(simt: Any, dtype: torch.dtype, wide: bool) -> None:
    x, bias, dout = cases.gelu_inputs(cases.GeluCase("", (9, 64), wide_bias=wide), dtype)
    leaf = bias.double().requires_grad_()
    exact = oracle.bias_gelu(x.double(), leaf, "none")
    (truth,) = torch.autograd.grad((exact * dout.double()).sum(), leaf)
    for without in (False, True):
        names = {"dout": dout, "x": x} if without else {"dout": dout, "x": x, "bias": bias}
        arguments = {"dout": dout, "x": x, "bias": None if without else bias}
        out = simt.bias_gelu(x, arguments["bias"])
        expected = simt.bias_gelu_backward(**arguments)
        for name in names:
            moved = arguments | {name: cases.misaligned(arguments[name])}
            assert torch.equal(simt.bias_gelu(moved["x"], moved["bias"]), out)
            dx, dbias = simt.bias_gelu_backward(**moved)
            assert torch.equal(dx, expected[0])
            assert_close("dbias", dbias, truth[:0] if without else truth, expected[1], gradient=True)


@by_dtype
@pytest.mark.parametrize("width", (5, 100, 768, 3072))
def test_repeatable(simt: Any, width: int, dtype: torch.dtype) -> None:
    # The same bits in every order of threads. On another GPU, with more blocks, only sums over rows may change theirs.
    x, bias, dout = cases.gelu_inputs(cases.GeluCase("", (1500 if width == 5 else 40, width)), dtype)
    results = {}
    for sm_count in (1, 4):
        for seed in (0, 5, 11):
            simt._configure(seed, sm_count)
            results[sm_count, seed] = simt.bias_gelu_backward(dout, x, bias)
            for got, first in zip(results[sm_count, seed], results[sm_count, 0], strict=True):
                assert torch.equal(got, first)
    assert torch.equal(results[1, 0][0], results[4, 0][0])


@by_parameters
def test_nothing_to_do(simt: Any, dtype: torch.dtype, wide: bool) -> None:
    for shape in ((0, 48), (3, 0, 7), (0,), (5, 0)):
        x = torch.zeros(shape, dtype=dtype)
        bias = torch.ones(shape[-1], dtype=torch.float32 if wide else dtype)
        assert simt.bias_gelu(x, bias).shape == shape
        dx, dbias = simt.bias_gelu_backward(x, x, bias)
        assert dx.shape == shape and dbias.dtype == bias.dtype
        assert torch.equal(dbias, torch.zeros_like(bias))
        assert simt.bias_gelu_backward(x, x, None)[1].shape == (0,)


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
        "x must be a floating-point tensor of shape [..., hidden], got bool of shape [3, 8]": (x.bool(), bias),
        "bias must be float32 of shape [8], got float32 of shape [9]": (x, torch.zeros(9)),
        "bias must be float16 or float32 of shape [8], got bfloat16 of shape [8]": (x.half(), bias.bfloat16()),
        'approximate must be "none" or "tanh", got "erf"': (x, bias, "erf"),
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
