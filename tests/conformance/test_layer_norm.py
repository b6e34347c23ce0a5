"""add_bias_residual_layer_norm and its backward on every backend."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st

from helpers import cases, checks, oracle
from helpers.backends import HALF, Backend, cpu, drawn_on, kernels, on, reference, same
from helpers.cases import LAYER_NORM_CASES, LayerNormCase
from helpers.compare import assert_close
from helpers.threads import assert_same_on_threads

REFERENCE = reference()
CPU = cpu(cases.KERNEL_DTYPES)
SIMT, GPU = kernels(cases.KERNEL_DTYPES)
EVERY = (REFERENCE, CPU, SIMT, GPU)
by_parameters = pytest.mark.parametrize(("dtype", "wide"), cases.KERNEL_PARAMETERS, ids=cases.KERNEL_PARAMETER_IDS)


# ---- against the oracle ----


@on(*EVERY, case=LAYER_NORM_CASES)
def test_cases(backend: Backend, case: LayerNormCase, dtype: torch.dtype) -> None:
    checks.check_layer_norm(backend.library, case, dtype, backend.device)


@pytest.mark.sampled
@on(CPU, SIMT, GPU, width=cases.LAYER_NORM_WIDTHS)
@by_parameters
def test_widths(backend: Backend, width: int, dtype: torch.dtype, wide: bool) -> None:
    backend.configure(width, 1)  # one multiprocessor: blocks walk over several rows
    for case in cases.layer_norm_grid(width, wide_parameters=wide):
        # Two columns of opposite sign have a gradient of zero, which only its rounding tells from another.
        checks.check_layer_norm(backend.library, case, dtype, backend.device, backward=width > 2)


@on(REFERENCE, CPU, width=(16385, 70001))
def test_rows_wider_than_a_gpu_takes(backend: Backend, width: int, dtype: torch.dtype) -> None:
    checks.check_layer_norm(backend.library, LayerNormCase("", (3, width)), dtype, backend.device)


@on(CPU, rows=(5, 67, 1300), width=(33, 96, 768))
@by_parameters
def test_many_rows_on_any_number_of_threads(
    backend: Backend, rows: int, width: int, dtype: torch.dtype, wide: bool
) -> None:
    case = LayerNormCase("", (rows, width), wide_parameters=wide)
    checks.check_layer_norm(backend.library, case, dtype, backend.device)
    x = cases.layer_norm_inputs(case, dtype, backend.device)

    def call() -> tuple[torch.Tensor, ...]:
        forward = backend.library.add_bias_residual_layer_norm(
            x.x, x.bias, x.residual, x.weight, x.ln_bias, return_sum=True
        )
        _, total, mean, rstd = forward
        return *forward, *backend.library.add_bias_residual_layer_norm_backward(
            x.dout, x.dsum, total, x.weight, mean, rstd
        )

    assert_same_on_threads(call)


@drawn_on(
    *EVERY,
    case=lambda backend: cases.few_rows(LayerNormCase) if backend is REFERENCE else cases.layer_norm_cases(),
    sm_count=st.integers(1, 4),
)
def test_drawn(backend: Backend, case: LayerNormCase, dtype: torch.dtype, sm_count: int, seed: int) -> None:
    backend.configure(seed, sm_count)
    checks.check_layer_norm(backend.library, case, dtype, backend.device)


# ---- what is rounded ----


@on(CPU, SIMT, GPU)  # PyTorch's LayerNorm, which the reference calls, loses digits there
@pytest.mark.parametrize("width", (33, 768, 4096))
@pytest.mark.parametrize("offset", (1e3, 1e5))
def test_mean_far_from_zero(backend: Backend, width: int, offset: float) -> None:
    # The mean of squares less the square of the mean would leave nothing of a variance of 1.
    case = cases.LayerNormCase("far", (5, width), bias=False, residual=False, offset=offset)
    checks.check_layer_norm(backend.library, case, torch.float32, backend.device, backward=False)
    x = offset + cases.random(5, width, dtype=torch.float32, device=backend.device)
    one, zero = torch.ones_like(x[0]), torch.zeros_like(x[0])
    out, _, mean, rstd = backend.library.add_bias_residual_layer_norm(x, None, None, one, zero, 0.0)
    truth = x.double()
    deviation = truth.std(-1, correction=0)
    # As good as float32 is without the offset, which is so near to x that taking it off rounds nothing.
    near = x - offset
    assert_close("rstd", rstd, 1 / deviation, 1 / near.std(-1, correction=0))
    assert (mean.double() - truth.mean(-1)).abs().max() <= torch.finfo(torch.float32).eps * offset
    expected = (truth - truth.mean(-1, keepdim=True)) / deviation[:, None]
    assert_close("out", out, expected, torch.nn.functional.layer_norm(near, (width,), eps=0.0))


@on(*EVERY, dtype=lambda backend: HALF if backend is REFERENCE else backend.dtypes)
def test_sum_is_not_rounded_before_it_is_normalised(backend: Backend, dtype: torch.dtype) -> None:
    # 4096 + 1 is 4096 in 16 bits, and in float32 not: the bias must survive in the output.
    x = torch.full((2, 64), 4096.0, dtype=dtype, device=backend.device)
    bias = (torch.arange(64, device=backend.device) % 2).to(dtype)
    one, zero = torch.ones_like(bias), torch.zeros_like(bias)
    out, total, mean, _ = backend.library.add_bias_residual_layer_norm(x, bias, None, one, zero, 0.0, return_sum=True)
    assert (mean == 4096.5).all()
    assert torch.equal(out, (2 * bias - 1).expand(2, 64))
    assert torch.equal(total, x + bias)


@on(*EVERY)
def test_sum_is_rounded_once(backend: Backend, dtype: torch.dtype) -> None:
    # 2048 + 1 - 2049 in float16: rounded after the first addition it gives -1 or 1, not 0.
    x = torch.full((1, 4), 2048.0, dtype=dtype, device=backend.device)
    residual = torch.tensor([[-2048.0, -2046.0, -2044.0, -2040.0]]).to(backend.device, dtype)
    one = torch.ones_like(x[0])
    _, total, _, _ = backend.library.add_bias_residual_layer_norm(x, one, residual, one, one, return_sum=True)
    expected = x.double() + 1 + residual.double()
    assert torch.equal(total, expected.to(dtype))


@on(*EVERY)
def test_constant_rows(backend: Backend, dtype: torch.dtype) -> None:
    x = torch.tensor([[3.7], [-1e4], [0.0]]).to(backend.device, dtype).expand(3, 100).contiguous()
    weight, ln_bias = (cases.random(100, dtype=dtype, device=backend.device) for _ in range(2))
    out, _, mean, rstd = backend.library.add_bias_residual_layer_norm(x, None, None, weight, ln_bias, 1e-5)
    assert torch.equal(mean, x[:, 0].to(mean.dtype))
    eps = torch.full((3,), 1e-5, device=backend.device)
    assert_close("rstd", rstd, eps.double().rsqrt(), eps.rsqrt())
    assert torch.equal(out, ln_bias.expand(3, 100))


@on(*EVERY)
def test_not_a_number_stays_in_its_row(backend: Backend, dtype: torch.dtype) -> None:
    x = cases.random(40, 48, dtype=dtype, device=backend.device)
    x[7, 5], x[20, 40] = float("nan"), float("inf")
    weight, ln_bias = cases.random(2, 48, dtype=dtype, device=backend.device)
    out, total, mean, rstd = backend.library.add_bias_residual_layer_norm(
        x, None, None, weight, ln_bias, 1e-5, return_sum=True
    )
    bad = torch.zeros(40, dtype=torch.bool, device=backend.device)
    bad[[7, 20]] = True
    assert out[bad].isnan().all() and out[~bad].isfinite().all()
    assert torch.equal(mean.isfinite(), ~bad) and rstd[bad].isnan().all()
    ones = torch.ones_like(x)
    dx = backend.library.add_bias_residual_layer_norm_backward(ones, None, total, weight, mean, rstd)[0]
    assert dx[bad].isnan().all() and dx[~bad].isfinite().all()


# ---- layouts, sizes ----


@on(*EVERY, width=(64, 1024))
@by_parameters
def test_misaligned_tensors(backend: Backend, width: int, dtype: torch.dtype, wide: bool) -> None:
    inputs = cases.layer_norm_inputs(cases.LayerNormCase("", (5, width), wide_parameters=wide), dtype, backend.device)
    names = ("x", "bias", "residual", "weight", "ln_bias")
    arguments = {name: getattr(inputs, name) for name in names}
    exact = {name: t.double() for name, t in arguments.items()}
    truth, rows = oracle.add_bias_residual_layer_norm(**exact, eps=1e-5)
    truths = (truth, rows.mean(-1), (rows.var(-1, correction=0) + 1e-5).rsqrt())
    expected = backend.library.add_bias_residual_layer_norm(**arguments, return_sum=True)
    for name in names:
        moved = {**arguments, name: cases.misaligned(arguments[name])}
        out, total, mean, rstd = backend.library.add_bias_residual_layer_norm(**moved, return_sum=True)
        assert torch.equal(total, expected[1])
        # Lanes hold other columns then, so sums are made in another order: no worse than in the first.
        assert_close(f"out, misaligned {name}", out, truths[0], expected[0])
        assert_close(f"mean, misaligned {name}", mean, truths[1], expected[2], scale=float(rows.abs().max()))
        assert_close(f"rstd, misaligned {name}", rstd, truths[2], expected[3])

    # The statistics of the sum as it was rounded: then the gradient is that of the sum alone.
    total = expected[1]
    _, _, mean, rstd = backend.library.add_bias_residual_layer_norm(total, None, None, inputs.weight, inputs.ln_bias)
    names = ("dout", "dsum", "sum", "weight", "mean", "rstd")
    arguments = dict(zip(names, (inputs.dout, inputs.dsum, total, inputs.weight, mean, rstd), strict=True))
    leaves = [t.double().requires_grad_() for t in (total, inputs.weight, inputs.ln_bias)]
    out, _ = oracle.add_bias_residual_layer_norm(leaves[0], None, None, *leaves[1:], 1e-5)
    loss = (out * inputs.dout.double()).sum() + (leaves[0] * inputs.dsum.double()).sum()
    dx, *of_parameters = torch.autograd.grad(loss, leaves)
    truths = (dx, dx.sum(0), *of_parameters)
    expected = backend.library.add_bias_residual_layer_norm_backward(**arguments)
    for name in names:
        moved = {**arguments, name: cases.misaligned(arguments[name])}
        for got, truth, other in zip(
            backend.library.add_bias_residual_layer_norm_backward(**moved), truths, expected, strict=True
        ):
            assert_close(f"backward, misaligned {name}", got, truth, other, gradient=True)


@pytest.mark.sampled
@on(*EVERY, width=(100, 768, 2048, 8192, 513))
def test_results_repeat_bit_for_bit(backend: Backend, width: int, dtype: torch.dtype) -> None:
    """In any order of blocks and threads. On another GPU, with more blocks, only sums over rows may change theirs."""
    case = LayerNormCase("", (45 if width < 1000 else 7, width))
    x = cases.layer_norm_inputs(case, dtype, backend.device)
    library = backend.library

    def call() -> tuple[torch.Tensor, ...]:
        forward = library.add_bias_residual_layer_norm(x.x, None, None, x.weight, x.ln_bias, return_sum=True)
        _, total, mean, rstd = forward
        backward = library.add_bias_residual_layer_norm_backward(x.dout, None, total, x.weight, mean, rstd)
        return *forward, *backward

    one, three = (backend.assert_repeats(call, [(seed, sms) for seed in (0, 5, 11)]) for sms in (1, 3))
    assert same(one[:5], three[:5])


@on(*EVERY)
@by_parameters
def test_nothing_to_do(backend: Backend, dtype: torch.dtype, wide: bool) -> None:
    parameters = torch.float32 if wide else dtype
    for shape in ((0, 48), (0, 16384), (3, 0, 7), (0,), (5, 0)):
        x = torch.zeros(shape, dtype=dtype, device=backend.device)
        weight = torch.ones(shape[-1], dtype=parameters, device=backend.device)
        out, total, mean, rstd = backend.library.add_bias_residual_layer_norm(
            x, weight, x, weight, weight, return_sum=True
        )
        assert out.shape == total.shape == shape and mean.shape == rstd.shape == (0,)
        dx, *gradients = backend.library.add_bias_residual_layer_norm_backward(x, x, total, weight, mean, rstd)
        assert dx.shape == shape
        for g in gradients:
            assert g.dtype == parameters and torch.equal(g, torch.zeros_like(weight))
