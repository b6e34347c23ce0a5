"""add_bias_residual_layer_norm and its backward: the CUDA kernels, run in the emulator."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from helpers import cases, checks, oracle
from helpers.compare import assert_close
from helpers.drawn import drawn

by_dtype = pytest.mark.parametrize("dtype", cases.KERNEL_DTYPES, ids=lambda d: str(d).removeprefix("torch."))
by_parameters = pytest.mark.parametrize(("dtype", "wide"), cases.KERNEL_PARAMETERS, ids=cases.KERNEL_PARAMETER_IDS)


@by_dtype
@pytest.mark.parametrize("case", cases.LAYER_NORM_CASES, ids=str)
def test_cases(simt: Any, case: cases.LayerNormCase, dtype: torch.dtype) -> None:
    checks.check_layer_norm(simt, case, dtype)


@by_parameters
@pytest.mark.parametrize("width", cases.LAYER_NORM_WIDTHS)
def test_widths(simt: Any, width: int, dtype: torch.dtype, wide: bool) -> None:
    simt._configure(width, 1)  # one multiprocessor: blocks walk over several rows
    for case in cases.layer_norm_grid(width, wide_parameters=wide):
        # Two columns of opposite sign have a gradient of zero, which only its rounding tells from another.
        checks.check_layer_norm(simt, case, dtype, backward=width > 2)


@drawn(
    60,
    case=cases.layer_norm_cases(),
    dtype=st.sampled_from(cases.KERNEL_DTYPES),
    sm_count=st.integers(1, 4),
)
def test_drawn_shapes(simt: Any, case: cases.LayerNormCase, dtype: torch.dtype, sm_count: int, seed: int) -> None:
    simt._configure(seed, sm_count)
    checks.check_layer_norm(simt, case, dtype)


def test_many_blocks(simt: Any) -> None:
    # 42 blocks leave partial sums: more than the second stage has warps.
    simt._configure(1, 42)
    checks.check_layer_norm(simt, cases.LayerNormCase("", (660, 24)), torch.float32)


@pytest.mark.parametrize("width", (33, 768, 4096))
@pytest.mark.parametrize("offset", (1e3, 1e5))
def test_mean_far_from_zero(simt: Any, width: int, offset: float) -> None:
    # The mean of squares less the square of the mean would leave nothing of a variance of 1.
    case = cases.LayerNormCase("far", (5, width), bias=False, residual=False, offset=offset)
    checks.check_layer_norm(simt, case, torch.float32, backward=False)
    x = offset + torch.randn(5, width)
    one, zero = torch.ones(width), torch.zeros(width)
    out, _, mean, rstd = simt.add_bias_residual_layer_norm(x, None, None, one, zero, 0.0)
    truth = x.double()
    deviation = truth.std(-1, correction=0)
    # As good as float32 is without the offset, which is so near to x that taking it off rounds nothing.
    near = x - offset
    assert_close("rstd", rstd, 1 / deviation, 1 / near.std(-1, correction=0))
    assert (mean.double() - truth.mean(-1)).abs().max() <= torch.finfo(torch.float32).eps * offset
    expected = (truth - truth.mean(-1, keepdim=True)) / deviation[:, None]
    assert_close("out", out, expected, torch.nn.functional.layer_norm(near, (width,), eps=0.0))


@by_dtype
def test_sum_is_not_rounded_before_it_is_normalised(simt: Any, dtype: torch.dtype) -> None:
    # 4096 + 1 is 4096 in 16 bits, and in float32 not: the bias must survive in the output.
    x = torch.full((2, 64), 4096.0, dtype=dtype)
    bias = (torch.arange(64) % 2).to(dtype)
    one, zero = torch.ones(64, dtype=dtype), torch.zeros(64, dtype=dtype)
    out, total, mean, _ = simt.add_bias_residual_layer_norm(x, bias, None, one, zero, 0.0, return_sum=True)
    assert torch.equal(mean, torch.full((2,), 4096.5))
    assert torch.equal(out, (2 * bias - 1).expand(2, 64))
    assert torch.equal(total, x + bias)


@by_dtype
def test_constant_rows(simt: Any, dtype: torch.dtype) -> None:
    x = torch.tensor([[3.7], [-1e4], [0.0]]).to(dtype).expand(3, 100).contiguous()
    weight, ln_bias = torch.randn(100, dtype=dtype), torch.randn(100, dtype=dtype)
    out, _, mean, rstd = simt.add_bias_residual_layer_norm(x, None, None, weight, ln_bias, 1e-5)
    assert torch.equal(mean, x[:, 0].float())
    assert_close("rstd", rstd, torch.full((3,), 1e-5).double().rsqrt(), torch.full((3,), 1e-5).rsqrt())
    assert torch.equal(out, ln_bias.expand(3, 100))


@by_dtype
def test_not_a_number_stays_in_its_row(simt: Any, dtype: torch.dtype) -> None:
    x = torch.randn(40, 48).to(dtype)
    x[7, 5], x[20, 40] = float("nan"), float("inf")
    weight, ln_bias = torch.randn(2, 48).to(dtype)
    out, total, mean, rstd = simt.add_bias_residual_layer_norm(x, None, None, weight, ln_bias, 1e-5, return_sum=True)
    bad = torch.zeros(40, dtype=torch.bool)
    bad[[7, 20]] = True
    assert out[bad].isnan().all() and out[~bad].isfinite().all()
    assert torch.equal(mean.isfinite(), ~bad) and rstd[bad].isnan().all()
    dx = simt.add_bias_residual_layer_norm_backward(torch.ones_like(x), None, total, weight, mean, rstd)[0]
    assert dx[bad].isnan().all() and dx[~bad].isfinite().all()


@by_parameters
@pytest.mark.parametrize("width", (64, 1024))
def test_misaligned_tensors(simt: Any, width: int, dtype: torch.dtype, wide: bool) -> None:
    inputs = cases.layer_norm_inputs(cases.LayerNormCase("", (5, width), wide_parameters=wide), dtype)
    names = ("x", "bias", "residual", "weight", "ln_bias")
    arguments = {name: getattr(inputs, name) for name in names}
    exact = {name: t.double() for name, t in arguments.items()}
    truth, rows = oracle.add_bias_residual_layer_norm(**exact, eps=1e-5)
    truths = (truth, rows.mean(-1), (rows.var(-1, correction=0) + 1e-5).rsqrt())
    expected = simt.add_bias_residual_layer_norm(**arguments, return_sum=True)
    for name in names:
        moved = {**arguments, name: cases.misaligned(arguments[name])}
        out, total, mean, rstd = simt.add_bias_residual_layer_norm(**moved, return_sum=True)
        assert torch.equal(total, expected[1])
        # Lanes hold other columns then, so sums are made in another order: no worse than in the first.
        assert_close(f"out, misaligned {name}", out, truths[0], expected[0])
        assert_close(f"mean, misaligned {name}", mean, truths[1], expected[2], scale=float(rows.abs().max()))
        assert_close(f"rstd, misaligned {name}", rstd, truths[2], expected[3])

    # The statistics of the sum as it was rounded: then the gradient is that of the sum alone.
    total = expected[1]
    _, _, mean, rstd = simt.add_bias_residual_layer_norm(total, None, None, inputs.weight, inputs.ln_bias)
    names = ("dout", "dsum", "sum", "weight", "mean", "rstd")
    arguments = dict(zip(names, (inputs.dout, inputs.dsum, total, inputs.weight, mean, rstd), strict=True))
    leaves = [t.double().requires_grad_() for t in (total, inputs.weight, inputs.ln_bias)]
    out, _ = oracle.add_bias_residual_layer_norm(leaves[0], None, None, *leaves[1:], 1e-5)
    loss = (out * inputs.dout.double()).sum() + (leaves[0] * inputs.dsum.double()).sum()
    dx, *of_parameters = torch.autograd.grad(loss, leaves)
    truths = (dx, dx.sum(0), *of_parameters)
    expected = simt.add_bias_residual_layer_norm_backward(**arguments)
    for name in names:
        moved = {**arguments, name: cases.misaligned(arguments[name])}
        for got, truth, other in zip(
            simt.add_bias_residual_layer_norm_backward(**moved), truths, expected, strict=True
        ):
            assert_close(f"backward, misaligned {name}", got, truth, other, gradient=True)


@by_dtype
@pytest.mark.parametrize("width", (100, 768, 2048, 8192, 513))
def test_repeatable(simt: Any, width: int, dtype: torch.dtype) -> None:
    # The same bits in every order of threads. On another GPU, with more blocks, only sums over rows may change theirs.
    inputs = cases.layer_norm_inputs(cases.LayerNormCase("", (45 if width < 1000 else 7, width)), dtype)
    one, zero = torch.ones(width, dtype=dtype), torch.zeros(width, dtype=dtype)
    _, total, mean, rstd = simt.add_bias_residual_layer_norm(inputs.x, None, None, one, zero, return_sum=True)
    results = {}
    for sm_count in (1, 3):
        for seed in (0, 5, 11):
            simt._configure(seed, sm_count)
            gradients = simt.add_bias_residual_layer_norm_backward(inputs.dout, None, total, inputs.weight, mean, rstd)
            results[sm_count, seed] = gradients
            for got, first in zip(gradients, results[sm_count, 0], strict=True):
                assert torch.equal(got, first)
    assert torch.equal(results[1, 0][0], results[3, 0][0])


@by_parameters
def test_nothing_to_do(simt: Any, dtype: torch.dtype, wide: bool) -> None:
    parameters = torch.float32 if wide else dtype
    for shape in ((0, 48), (0, 16384), (3, 0, 7), (0,), (5, 0)):
        x, weight = torch.zeros(shape, dtype=dtype), torch.ones(shape[-1], dtype=parameters)
        out, total, mean, rstd = simt.add_bias_residual_layer_norm(x, weight, x, weight, weight, return_sum=True)
        assert out.shape == total.shape == shape and mean.shape == rstd.shape == (0,)
        dx, *gradients = simt.add_bias_residual_layer_norm_backward(x, x, total, weight, mean, rstd)
        assert dx.shape == shape
        for g in gradients:
            assert g.dtype == parameters and torch.equal(g, torch.zeros_like(weight))


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
    "x must be a floating-point tensor of shape [..., hidden], got int64 of shape [3, 8]": {
        "x": torch.zeros(3, 8, dtype=torch.int64)
    },
    "x must be a floating-point tensor of shape [..., hidden], got float32 of shape []": {"x": torch.tensor(1.0)},
    "residual must be float32 of shape [3, 8] as x is, got float32 of shape [8, 3]": {"residual": torch.zeros(8, 3)},
    "residual must be float32 of shape [3, 8] as x is, got float16 of shape [3, 8]": {
        "residual": torch.zeros(3, 8).half()
    },
    "weight must be float32 of shape [8], got float32 of shape [7]": {"weight": torch.ones(7)},
    "bias must be float32 of shape [8], got float32 of shape [1, 8]": {"bias": torch.ones(1, 8)},
    "ln_bias must be float32 of shape [8], got float16 of shape [8]": {"ln_bias": torch.ones(8).half()},
    "weight, ln_bias and bias must be of one dtype, got float16, float16 and float32": {
        "x": torch.zeros(3, 8).half(),
        "residual": None,
        "weight": torch.ones(8).half(),
        "ln_bias": torch.ones(8).half(),
    },
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
    "weight must be float32 of shape [8], got float32 of shape [3, 8]": {"weight": torch.ones(3, 8)},
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
