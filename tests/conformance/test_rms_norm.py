"""add_residual_rms_norm, rms_norm_gelu and their backwards on every backend."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from helpers import cases, oracle
from helpers.backends import HALF, Backend, cpu, drawn_on, kernels, on, reference, same
from helpers.compare import assert_close
from helpers.norm import (
    RMS_NORM_CASES,
    RMS_NORM_GELU_CASES,
    WIDTHS,
    RmsNormCase,
    RmsNormGeluCase,
    check_rms_norm,
    check_rms_norm_gelu,
    check_rms_norm_gelu_of,
    check_rms_norm_of,
    rms_norm_cases,
    rms_norm_gelu_cases,
    rms_norm_gelu_grid,
    rms_norm_gelu_inputs,
    rms_norm_grid,
    rms_norm_inputs,
    wide_dtype,
)
from helpers.threads import assert_same_on_threads

REFERENCE = reference(examples=20)
CPU = cpu(cases.KERNEL_DTYPES, examples=30)
SIMT, GPU = kernels(cases.KERNEL_DTYPES, examples=(30, 100))
EVERY = (REFERENCE, CPU, SIMT, GPU)
by_weight = pytest.mark.parametrize(("dtype", "wide"), cases.KERNEL_PARAMETERS, ids=cases.KERNEL_PARAMETER_IDS)
by_form = pytest.mark.parametrize("form", ("none", "tanh"))


def rms_norm_call(backend: Backend, case: RmsNormCase, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """out, sum, rstd, dx, dweight of fresh tensors, the same in every call."""
    torch.manual_seed(1)
    x, library = rms_norm_inputs(case, dtype, backend.device), backend.library
    out, total, rstd = library.add_residual_rms_norm(x.x, x.residual, x.weight, case.eps, return_sum=True)
    return out, total, rstd, *library.add_residual_rms_norm_backward(x.dout, x.dsum, total, x.weight, rstd)


def rms_norm_gelu_call(backend: Backend, case: RmsNormGeluCase, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """out and dx of fresh tensors, the same in every call."""
    torch.manual_seed(1)
    x, dout = rms_norm_gelu_inputs(case, dtype, backend.device)
    how = (case.scale, case.eps, case.approximate)
    return backend.library.rms_norm_gelu(x, *how), backend.library.rms_norm_gelu_backward(dout, x, *how)


# ---- against the oracle ----


@on(*EVERY, case=RMS_NORM_CASES)
def test_rms_norm_cases(backend: Backend, case: RmsNormCase, dtype: torch.dtype) -> None:
    check_rms_norm(backend.library, case, dtype, backend.device)


@on(*EVERY, case=RMS_NORM_GELU_CASES)
def test_rms_norm_gelu_cases(backend: Backend, case: RmsNormGeluCase, dtype: torch.dtype) -> None:
    check_rms_norm_gelu(backend.library, case, dtype, backend.device)


@pytest.mark.sampled
@on(CPU, SIMT, GPU, width=WIDTHS)
@by_weight
def test_widths(backend: Backend, width: int, dtype: torch.dtype, wide: bool) -> None:
    backend.configure(width, 1)  # one multiprocessor: blocks of the backward walk over several rows
    for case in rms_norm_grid(width, wide_weight=wide):
        check_rms_norm(backend.library, case, dtype, backend.device)
    for case in () if wide else rms_norm_gelu_grid(width):
        check_rms_norm_gelu(backend.library, case, dtype, backend.device)


@on(REFERENCE, CPU, width=(16385, 70001))
def test_rows_wider_than_a_gpu_takes(backend: Backend, width: int, dtype: torch.dtype) -> None:
    check_rms_norm(backend.library, RmsNormCase("", (3, width)), dtype, backend.device)
    check_rms_norm_gelu(backend.library, RmsNormGeluCase("", (3, width)), dtype, backend.device)


@drawn_on(*EVERY, case=rms_norm_cases(), sm_count=st.integers(1, 4))
def test_rms_norm_drawn(backend: Backend, case: RmsNormCase, dtype: torch.dtype, sm_count: int, seed: int) -> None:
    backend.configure(seed, sm_count)
    check_rms_norm(backend.library, case, dtype, backend.device)


@drawn_on(*EVERY, case=rms_norm_gelu_cases())
def test_rms_norm_gelu_drawn(backend: Backend, case: RmsNormGeluCase, dtype: torch.dtype, seed: int) -> None:
    backend.configure(seed)
    check_rms_norm_gelu(backend.library, case, dtype, backend.device)


# ---- against others ----


@pytest.mark.sampled
@on(*EVERY, width=(96, 333, 5000))
def test_rms_norm_is_that_of_torch(backend: Backend, width: int, dtype: torch.dtype) -> None:
    """torch.nn.functional.rms_norm in float64 is the truth, and in the dtype the yardstick; so are its gradients."""
    x = rms_norm_inputs(RmsNormCase("", (9, width), residual=False), dtype, backend.device)
    out, total, rstd = backend.library.add_residual_rms_norm(x.x, None, x.weight, 1e-5, return_sum=True)
    found = (out, *backend.library.add_residual_rms_norm_backward(x.dout, None, total, x.weight, rstd))
    results = []
    for computed_in in (torch.float64, dtype):
        leaves = [t.to(computed_in, copy=True).requires_grad_() for t in (x.x, x.weight)]
        other = F.rms_norm(leaves[0], (width,), leaves[1], 1e-5)
        results.append((other, *torch.autograd.grad(other, leaves, x.dout.to(computed_in))))
    for name, one, truth, eager in zip(("out", "dx", "dweight"), found, *results, strict=True):
        assert_close(name, one, truth, eager, gradient=name != "out")


@on(*EVERY, dtype=cases.KERNEL_DTYPES)  # theirs makes the statistic in float32, so in float64 it is no yardstick
def test_rms_norm_is_that_of_transformers(backend: Backend, dtype: torch.dtype) -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    x = rms_norm_inputs(RmsNormCase("", (9, 256), residual=False), dtype, backend.device)
    other = llama.LlamaRMSNorm(256, eps=1e-5).to(backend.device, dtype)
    with torch.no_grad():
        other.weight.copy_(x.weight)
        eager, out = other(x.x), backend.library.add_residual_rms_norm(x.x, None, x.weight, 1e-5)[0]
    truth = oracle.add_residual_rms_norm(x.x.double(), None, x.weight.double(), 1e-5)[0]
    assert_close("out", out, truth, eager)


@on(*EVERY, width=(96, 333))
@by_form
def test_rms_norm_gelu_is_made_of_torchs_functions(backend: Backend, width: int, dtype: torch.dtype, form: str) -> None:
    """torch.nn.functional.normalize and gelu, as TokenFormer's authors write it, in float64."""
    x, dout = rms_norm_gelu_inputs(RmsNormGeluCase("", (9, width)), dtype, backend.device)
    results = []
    for computed_in in (torch.float64, dtype):
        leaf = x.to(computed_in, copy=True).requires_grad_()
        other = F.gelu(F.normalize(leaf, dim=-1) * math.sqrt(width), approximate=form)
        results.append((other, torch.autograd.grad(other, leaf, dout.to(computed_in))[0]))
    out = backend.library.rms_norm_gelu(x, None, 0.0, form)
    assert_close("out", out, results[0][0], results[1][0])
    dx = backend.library.rms_norm_gelu_backward(dout, x, None, 0.0, form)
    assert_close("dx", dx, results[0][1], results[1][1], gradient=True)


# ---- sizes of numbers ----

# Squares of the first overflow float16, and of others come near the ends of float32.
MAGNITUDES = {torch.float16: (2e4, 1e-3), torch.bfloat16: (1e15, 1e-15)}


@pytest.mark.sampled
@on(*EVERY, large=(True, False), width=(64, 777, 4096))
def test_magnitudes(backend: Backend, large: bool, width: int, dtype: torch.dtype) -> None:
    """Statistics are in float32: a row of any size gives the same, and its gradient is divided by that size."""
    size = MAGNITUDES.get(dtype, (1e15, 1e-15))[0 if large else 1]
    x = rms_norm_inputs(RmsNormCase("", (5, width), residual=False), dtype, backend.device)
    # Gradients as large as the rows, so that they too are numbers of ordinary size.
    x.x, x.dout = (x.x.clamp(-3, 3) * size).to(dtype), (x.dout * min(size, 1e3)).to(dtype)
    check_rms_norm_of(backend.library, x, 0.0, computed_in=wide_dtype(dtype))
    check_rms_norm_gelu_of(backend.library, x.x, x.dout, (None, 0.0, "none"), computed_in=wide_dtype(dtype))


@on(*EVERY, dtype=lambda backend: HALF if backend is REFERENCE else backend.dtypes)
def test_sum_is_not_rounded_before_it_is_normalised(backend: Backend, dtype: torch.dtype) -> None:
    # 4096 + 1 is 4096 in 16 bits, and in float32 not. The statistic is that of the unrounded sum.
    x = torch.full((2, 64), 4096.0, dtype=dtype, device=backend.device)
    residual = torch.ones_like(x)
    _, total, rstd = backend.library.add_residual_rms_norm(x, residual, x[0], 0.0, return_sum=True)
    truth = torch.full((2,), 1 / 4097, dtype=torch.float64, device=backend.device)
    assert_close("rstd", rstd, truth, truth.float())
    assert torch.equal(total, x + residual)


@on(*EVERY, dtype=(torch.float16,))
def test_a_sum_that_float16_cannot_hold(backend: Backend, dtype: torch.dtype) -> None:
    x = torch.full((2, 32), 60000.0, dtype=dtype, device=backend.device)
    out, total, _ = backend.library.add_residual_rms_norm(x, x, torch.ones_like(x[0]), return_sum=True)
    assert total.isinf().all() and torch.equal(out, torch.ones_like(out))


@on(*EVERY)
def test_rows_of_zeros(backend: Backend, dtype: torch.dtype) -> None:
    """Without eps they give zeros, and gradients of zero, beside rows that are as they are alone."""
    x = cases.random(9, 40, dtype=dtype, device=backend.device)
    zeros = torch.tensor([0, 3, 8], device=backend.device)
    x[zeros] = 0
    dout, dsum = (cases.random(9, 40, dtype=dtype, device=backend.device) for _ in range(2))
    weight = cases.random(40, dtype=dtype, device=backend.device)
    out, _, rstd = backend.library.add_residual_rms_norm(x, None, weight, 0.0)
    dx, dweight = backend.library.add_residual_rms_norm_backward(dout, dsum, x, weight, rstd)
    assert (out[zeros] == 0).all() and (rstd[zeros] == 0).all() and torch.equal(dx[zeros], dsum[zeros])
    assert out.isfinite().all() and dx.isfinite().all() and dweight.isfinite().all()
    for form in ("none", "tanh"):
        out = backend.library.rms_norm_gelu(x, None, 0.0, form)
        dx = backend.library.rms_norm_gelu_backward(dout, x, None, 0.0, form)
        for t in (out, dx):
            assert (t[zeros] == 0).all() and t.isfinite().all()
        others = torch.ones(9, dtype=torch.bool, device=backend.device).index_fill(0, zeros, False)
        assert torch.equal(out[others], backend.library.rms_norm_gelu(x[others], None, 0.0, form))
        assert torch.equal(dx[others], backend.library.rms_norm_gelu_backward(dout[others], x[others], None, 0.0, form))


@on(*EVERY)
def test_not_a_number_stays_in_its_row(backend: Backend, dtype: torch.dtype) -> None:
    x = cases.random(40, 48, dtype=dtype, device=backend.device)
    x[7, 5] = float("nan")
    weight, ones = cases.random(48, dtype=dtype, device=backend.device), torch.ones_like(x)
    bad = torch.arange(40, device=backend.device) == 7
    out, total, rstd = backend.library.add_residual_rms_norm(x, None, weight, return_sum=True)
    dx, dweight = backend.library.add_residual_rms_norm_backward(ones, None, total, weight, rstd)
    assert torch.equal(rstd.isfinite(), ~bad) and dweight.isnan().all()
    gelu = backend.library.rms_norm_gelu(x), backend.library.rms_norm_gelu_backward(ones, x)
    for t in (out, dx, *gelu):
        assert t[bad].isnan().all() and t[~bad].isfinite().all()


# ---- layouts, sizes ----


@pytest.mark.sampled
@on(*EVERY, width=(64, 1024, 8192))
def test_misaligned_tensors(backend: Backend, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    x = rms_norm_inputs(RmsNormCase("", (5, width)), dtype, backend.device)
    for name in ("x", "residual", "weight", "dout", "dsum"):
        moved = rms_norm_inputs(RmsNormCase("", (5, width)), dtype, backend.device)
        setattr(moved, name, cases.misaligned(getattr(moved, name)))
        check_rms_norm_of(backend.library, moved, 1e-6)
    check_rms_norm_gelu_of(backend.library, cases.misaligned(x.x), x.dout, (None, 0.0, "none"))
    check_rms_norm_gelu_of(backend.library, x.x, cases.misaligned(x.dout), (None, 0.0, "none"))


@pytest.mark.sampled
@on(*EVERY, width=(100, 768, 2048, 8192, 513))
def test_results_repeat_bit_for_bit(backend: Backend, width: int, dtype: torch.dtype) -> None:
    """In any order of blocks and threads. On another GPU, with more blocks, only sums over rows may change theirs."""
    shape = (45 if width < 1000 else 7, width)
    machines = [[(seed, sms) for seed in (0, 5, 11)] for sms in (1, 3)]
    one, three = (
        backend.assert_repeats(lambda: rms_norm_call(backend, RmsNormCase("", shape), dtype), some) for some in machines
    )
    assert same(one[:4], three[:4])
    case = RmsNormGeluCase("", shape)
    one, three = (backend.assert_repeats(lambda: rms_norm_gelu_call(backend, case, dtype), some) for some in machines)
    assert same(one, three)


@on(CPU, rows=(5, 1300), width=(33, 768))
def test_threads_change_no_bit(backend: Backend, rows: int, width: int, dtype: torch.dtype) -> None:
    check_rms_norm(backend.library, RmsNormCase("", (rows, width)), dtype, backend.device)
    assert_same_on_threads(lambda: rms_norm_call(backend, RmsNormCase("", (rows, width)), dtype))
    assert_same_on_threads(lambda: rms_norm_gelu_call(backend, RmsNormGeluCase("", (rows, width)), dtype))


@on(*EVERY)
@by_weight
def test_nothing_to_do(backend: Backend, dtype: torch.dtype, wide: bool) -> None:
    for shape in ((0, 48), (0, 16384), (3, 0, 7), (0,), (5, 0)):
        x = torch.zeros(shape, dtype=dtype, device=backend.device)
        weight = torch.ones(shape[-1], dtype=torch.float32 if wide else dtype, device=backend.device)
        out, total, rstd = backend.library.add_residual_rms_norm(x, x, weight, return_sum=True)
        assert out.shape == total.shape == shape and rstd.shape == (0,)
        dx, dweight = backend.library.add_residual_rms_norm_backward(x, x, total, weight, rstd)
        assert dx.shape == shape and dweight.dtype == weight.dtype and torch.equal(dweight, torch.zeros_like(weight))
        assert backend.library.rms_norm_gelu(x).shape == shape
        assert backend.library.rms_norm_gelu_backward(x, x).shape == shape
