"""bias_gelu and its backward on every backend."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import strategies as st

from helpers import cases, checks, oracle
from helpers.backends import Backend, cpu, drawn_on, kernels, on, reference
from helpers.cases import GELU_CASES, GeluCase
from helpers.compare import assert_close
from helpers.gelu import check_gelu_everywhere

REFERENCE = reference()
CPU = cpu(cases.KERNEL_DTYPES)
SIMT, GPU = kernels(cases.KERNEL_DTYPES)
EVERY = (REFERENCE, CPU, SIMT, GPU)
by_parameters = pytest.mark.parametrize(("dtype", "wide"), cases.KERNEL_PARAMETERS, ids=cases.KERNEL_PARAMETER_IDS)
by_form = pytest.mark.parametrize("approximate", ("none", "tanh"))


# ---- against the oracle ----


@by_form
@on(*EVERY, case=GELU_CASES)
def test_cases(backend: Backend, case: GeluCase, approximate: str, dtype: torch.dtype) -> None:
    checks.check_gelu(backend.library, case, approximate, dtype, backend.device)


@on(CPU, SIMT, GPU, width=cases.GELU_WIDTHS)
@by_parameters
def test_widths(backend: Backend, width: int, dtype: torch.dtype, wide: bool) -> None:
    backend.configure(width, 1)  # one multiprocessor: blocks walk over several rows
    for case in cases.gelu_grid(width, wide_bias=wide):
        for approximate in ("none", "tanh"):
            checks.check_gelu(backend.library, case, approximate, dtype, backend.device)


@drawn_on(
    *EVERY,
    case=lambda backend: cases.few_rows(GeluCase) if backend is REFERENCE else cases.gelu_cases(),
    approximate=st.sampled_from(("none", "tanh")),
    sm_count=st.integers(1, 4),
)
def test_drawn(
    backend: Backend, case: GeluCase, dtype: torch.dtype, approximate: str, sm_count: int, seed: int
) -> None:
    backend.configure(seed, sm_count)
    checks.check_gelu(backend.library, case, approximate, dtype, backend.device)


@by_form
@on(CPU, SIMT, GPU)
def test_everywhere(backend: Backend, approximate: str) -> None:
    """By bounds that are counted along the kernels' formulas."""
    steps = 4001 if backend is SIMT else 100001
    check_gelu_everywhere(backend.library, approximate, steps, backend.device, quotient=backend is CPU)


# ---- bad values, layouts, sizes ----


@by_form
@on(CPU, SIMT, GPU, dtype=(torch.float32, torch.bfloat16))
def test_huge_and_not_a_number(backend: Backend, dtype: torch.dtype, approximate: str) -> None:
    x = torch.tensor([1e20, -1e20, 3e38, -3e38, 0.0, float("nan")], dtype=dtype, device=backend.device)
    out = backend.library.bias_gelu(x, None, approximate)
    assert torch.equal(out[:5], x[:5].relu()) and out[5].isnan()
    dx, _ = backend.library.bias_gelu_backward(torch.ones_like(x), x, None, approximate)
    assert dx[[0, 2, 4]].tolist() == [1, 1, 0.5] and dx[5].isnan()
    if approximate == "none":
        assert dx[[1, 3]].tolist() == [0, 0]
        return
    # The derivative is that of -10 from there on: nearer to 0 than the truth at -9, which tanh itself would round away.
    leaf = torch.tensor(-9.0, dtype=torch.float64, requires_grad=True)
    value = leaf * torch.sigmoid(math.sqrt(8 / math.pi) * (leaf + 0.044715 * leaf**3))
    (derivative,) = torch.autograd.grad(value, leaf)
    assert (dx[[1, 3]].abs() <= float(derivative.abs())).all()


@on(*EVERY)
@by_parameters
def test_misaligned_tensors(backend: Backend, dtype: torch.dtype, wide: bool) -> None:
    x, bias, dout = cases.gelu_inputs(cases.GeluCase("", (9, 64), wide_bias=wide), dtype, backend.device)
    leaf = bias.double().requires_grad_()
    exact = oracle.bias_gelu(x.double(), leaf, "none")
    (truth,) = torch.autograd.grad((exact * dout.double()).sum(), leaf)
    for without in (False, True):
        names = {"dout": dout, "x": x} if without else {"dout": dout, "x": x, "bias": bias}
        arguments = {"dout": dout, "x": x, "bias": None if without else bias}
        out = backend.library.bias_gelu(x, arguments["bias"])
        expected = backend.library.bias_gelu_backward(**arguments)
        for name in names:
            moved = arguments | {name: cases.misaligned(arguments[name])}
            assert torch.equal(backend.library.bias_gelu(moved["x"], moved["bias"]), out)
            dx, dbias = backend.library.bias_gelu_backward(**moved)
            assert torch.equal(dx, expected[0])
            assert_close("dbias", dbias, truth[:0] if without else truth, expected[1], gradient=True)


@on(*EVERY, width=(5, 100, 768, 3072))
def test_results_repeat_bit_for_bit(backend: Backend, width: int, dtype: torch.dtype) -> None:
    """In any order of blocks and threads. On another GPU, with more blocks, only sums over rows may change theirs."""
    x, bias, dout = cases.gelu_inputs(GeluCase("", (1500 if width == 5 else 40, width)), dtype, backend.device)

    def call() -> list[torch.Tensor]:
        return [*backend.library.bias_gelu_backward(dout, x, bias), backend.library.bias_gelu(x, bias)]

    one, four = (backend.assert_repeats(call, [(seed, sms) for seed in (0, 5, 11)]) for sms in (1, 4))
    assert torch.equal(one[0], four[0]) and torch.equal(one[2], four[2])


@on(*EVERY)
@by_parameters
def test_nothing_to_do(backend: Backend, dtype: torch.dtype, wide: bool) -> None:
    for shape in ((0, 48), (3, 0, 7), (0,), (5, 0)):
        x = torch.zeros(shape, dtype=dtype, device=backend.device)
        bias = torch.ones(shape[-1], dtype=torch.float32 if wide else dtype, device=backend.device)
        assert backend.library.bias_gelu(x, bias).shape == shape
        dx, dbias = backend.library.bias_gelu_backward(x, x, bias)
        assert dx.shape == shape and dbias.dtype == bias.dtype
        assert torch.equal(dbias, torch.zeros_like(bias))
        assert backend.library.bias_gelu_backward(x, x, None)[1].shape == (0,)
