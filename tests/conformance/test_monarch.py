"""Block-diagonal and Monarch products and their gradients on every backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from helpers import cases, monarch
from helpers.backends import (
    AD102_SHARED,
    FEW_SMS,
    H200_SHARED,
    HALF,
    MANY_SMS,
    Backend,
    cpu,
    drawn_on,
    kernels,
    on,
    one_dtype,
    reference,
)
from helpers.compare import assert_close
from helpers.monarch import (
    BLOCKDIAG_CASES,
    BLOCKDIAG_TILES,
    GLU_CASES,
    GLU_TILES,
    MONARCH_CASES,
    MONARCH_TILES,
    BlockdiagCase,
    GluCase,
    MonarchCase,
)
from helpers.threads import assert_same_on_threads

REFERENCE = reference()
# Float32 blocks of 256 x 256 elements and more are left to torch; in monarch_multiply 512 x 512. No case is as large.
CPU = cpu(cases.KERNEL_DTYPES, examples=60)
# Blocks whose sides are multiples of 8.
SIMT, GPU = kernels(HALF, has_kernel=lambda case: case.aligned, examples=(40, 100))
EVERY = (REFERENCE, CPU, SIMT, GPU)


def with_tiles(cases: tuple[Any, ...], tiles: tuple[Any, ...]) -> Callable[[Backend], tuple[Any, ...]]:
    """The cases, and for kernels those of every tile."""
    return lambda backend: cases if backend is REFERENCE else cases + tiles


def has_backward(backend: Backend, case: MonarchCase) -> bool:
    """Whether the backend has the backward pass of a case that it has the forward pass of."""
    return backend in (REFERENCE, CPU) or monarch.backward_aligned(case)


# ---- against the oracle ----

# On few multiprocessors a block of threads walks over many blocks, tiles are large and rows are summed in few ranges;
# on many, the other way round.


@on(*EVERY, case=with_tiles(BLOCKDIAG_CASES, BLOCKDIAG_TILES))
def test_blockdiag_cases(backend: Backend, case: BlockdiagCase, dtype: torch.dtype) -> None:
    for _ in backend.machines((0, FEW_SMS), (len(case.name), MANY_SMS)):
        for _ in backend.kernel_sets():
            monarch.check_blockdiag_multiply(backend.library, case, dtype, backend.device)


@on(*EVERY, case=with_tiles(MONARCH_CASES, MONARCH_TILES))
def test_monarch_cases(backend: Backend, case: MonarchCase, dtype: torch.dtype) -> None:
    for _ in backend.machines((0, FEW_SMS), (len(case.name), MANY_SMS)):
        backward = has_backward(backend, case)
        for _ in backend.kernel_sets():
            monarch.check_monarch_multiply(backend.library, case, dtype, backend.device, backward=backward)


@on(*EVERY, case=with_tiles(GLU_CASES, GLU_TILES))
def test_glu_cases(backend: Backend, case: GluCase, dtype: torch.dtype) -> None:
    for _ in backend.machines((0, FEW_SMS), (len(case.name), MANY_SMS)):
        monarch.check_blockdiag_glu(backend.library, case, dtype, backend.device)


SM_COUNTS = st.sampled_from((1, 4, 1024))


@drawn_on(
    *EVERY,
    case=lambda b: monarch.blockdiag_cases(aligned=b in (SIMT, GPU)),
    sm_count=SM_COUNTS,
    hopper=st.booleans(),
)
def test_drawn_blockdiag(
    backend: Backend, case: BlockdiagCase, dtype: torch.dtype, seed: int, sm_count: int, hopper: bool
) -> None:
    backend.configure(seed, sm_count)
    with backend.hopper(hopper):
        monarch.check_blockdiag_multiply(backend.library, case, dtype, backend.device)


@drawn_on(
    *EVERY,
    case=lambda b: monarch.monarch_cases(aligned=b in (SIMT, GPU)),
    shared=st.sampled_from((AD102_SHARED, H200_SHARED)),
    sm_count=SM_COUNTS,
    hopper=st.booleans(),
)
def test_drawn_monarch(
    backend: Backend, case: MonarchCase, dtype: torch.dtype, shared: int, seed: int, sm_count: int, hopper: bool
) -> None:
    backend.configure(seed, sm_count, shared)
    backward = has_backward(backend, case)
    with backend.hopper(hopper):
        monarch.check_monarch_multiply(backend.library, case, dtype, backend.device, backward=backward)


@drawn_on(*EVERY, case=lambda b: monarch.glu_cases(aligned=b in (SIMT, GPU)), sm_count=SM_COUNTS)
def test_drawn_glu(backend: Backend, case: GluCase, dtype: torch.dtype, seed: int, sm_count: int) -> None:
    backend.configure(seed, sm_count)
    monarch.check_blockdiag_glu(backend.library, case, dtype, backend.device)


@on(*EVERY, dtype=one_dtype)
def test_glu_of_two_counts_of_blocks(backend: Backend, dtype: torch.dtype) -> None:
    """w_up and w_down need not have the same number: such a product goes in three steps."""
    x, bias = torch.randn(21, 64), torch.randn(48)
    w_up, w_down = torch.randn(4, 32, 16) / 4, torch.randn(2, 24, 32) / 6
    tensors = tuple(t.to(backend.device, dtype) for t in (x, w_up, w_down, bias))
    truth = monarch.blockdiag_glu(*(t.double() for t in tensors))
    assert_close("out", backend.library.blockdiag_glu(*tensors), truth, monarch.blockdiag_glu(*tensors))


# ---- what repeats, and what stays where ----

Calls = Callable[[Backend, monarch.Inputs], list[Tensor]]


def _blockdiag(backend: Backend, x: monarch.Inputs) -> list[Tensor]:
    out = backend.library.blockdiag_multiply(x.x, *x.weights, x.bias)
    return [out, *backend.library.blockdiag_multiply_backward(x.dout, x.x, *x.weights, x.has_bias)]


def _monarch(backend: Backend, x: monarch.Inputs) -> list[Tensor]:
    out = backend.library.monarch_multiply(x.x, *x.weights)
    return [out, *backend.library.monarch_multiply_backward(x.dout, x.x, *x.weights)]


def _glu(backend: Backend, x: monarch.Inputs) -> list[Tensor]:
    out = backend.library.blockdiag_glu(x.x, *x.weights, x.bias)
    return [out, *backend.library.blockdiag_glu_backward(x.dout, x.x, *x.weights, x.has_bias)]


REPEATED: dict[Calls, tuple[Callable[..., monarch.Inputs], Any]] = {
    _blockdiag: (monarch.blockdiag_inputs, BlockdiagCase("", (1100,), 3, 40, 72)),
    _monarch: (monarch.monarch_inputs, MonarchCase("", (67,), (16, 16, 16), (8, 24, 32))),
    _glu: (monarch.glu_inputs, GluCase("", (133,), 4, 96, 160, 128)),
}


@on(*EVERY, calls=tuple(REPEATED), dtype=one_dtype)
def test_results_repeat_bit_for_bit(backend: Backend, calls: Calls, dtype: torch.dtype) -> None:
    """In any order of blocks and threads, since sums have an order of their own."""
    inputs, case = REPEATED[calls]
    if backend is REFERENCE:
        case = replace(case, leading=(700,))  # more than it takes at one time
    x = inputs(case, dtype, backend.device)
    backend.assert_repeats(lambda: calls(backend, x), [(seed, 5) for seed in (1, 2, 3)])


@on(CPU, calls=tuple(REPEATED))
def test_threads_change_no_bit(backend: Backend, calls: Calls, dtype: torch.dtype) -> None:
    inputs, case = REPEATED[calls]
    x = inputs(replace(case, leading=(700,)), dtype, backend.device)
    assert_same_on_threads(lambda: calls(backend, x))


@on(CPU, dtype=(torch.float32,))
def test_large_blocks_are_left_to_torch(backend: Backend, dtype: torch.dtype) -> None:
    x, w = torch.randn(3, 512, dtype=dtype), torch.randn(2, 256, 256, dtype=dtype)
    with pytest.raises(Exception, match="large blocks"):
        backend.library.blockdiag_multiply(x, w)
    backend.library.monarch_multiply(x, w, w)
    with pytest.raises(Exception, match="large blocks"):
        backend.library.monarch_multiply(x, torch.randn(1, 512, 512), w)


@on(*EVERY)
def test_bad_values_stay_in_their_row_and_block(backend: Backend) -> None:
    """NaN in one block of one row of x reaches what the blocks make of it, and no other row, forward and backward."""
    library = backend.library
    x = monarch.blockdiag_inputs(BlockdiagCase("", (70,), 4, 24, 40), torch.bfloat16, backend.device)
    clean = library.blockdiag_multiply(x.x, *x.weights, x.bias)
    x.x[65, 40:80] = float("nan")
    dirty = library.blockdiag_multiply(x.x, *x.weights, x.bias)
    hit = torch.zeros_like(clean, dtype=torch.bool)
    hit[65, 24:48] = True
    assert dirty[hit].isnan().all() and torch.equal(dirty[~hit], clean[~hit])
    dx, *_ = library.blockdiag_multiply_backward(x.dout, x.x, *x.weights, True)
    assert dx.isfinite().all()

    # One row of the second factor's lambdas: infinities of h are in columns beside those of other lambdas.
    x = monarch.monarch_inputs(MonarchCase("", (70,), (4, 24, 16), (4, 16, 24)), torch.float16, backend.device)
    clean = library.monarch_multiply(x.x, *x.weights)
    x.weights[0][1, 6] = float("inf")  # theta = 6 of kappa = 1: rho 7 of lambda 2
    dirty = library.monarch_multiply(x.x, *x.weights)
    hit = torch.zeros_like(clean, dtype=torch.bool).view(70, 16, 4)
    hit[..., 2] = True
    hit = hit.view(70, 64)
    assert (~dirty[hit].isfinite()).all() and torch.equal(dirty[~hit], clean[~hit])

    # Block 1 of x feeds halves 2 and 3: the gates of output blocks 2 and 3.
    x = monarch.glu_inputs(GluCase("", (70,), 4, 32, 64, 32), torch.bfloat16, backend.device)
    clean = library.blockdiag_glu(x.x, *x.weights, x.bias)
    x.x[3, 8:16] = float("nan")
    dirty = library.blockdiag_glu(x.x, *x.weights, x.bias)
    hit = torch.zeros_like(clean, dtype=torch.bool)
    hit[3, 16:] = True
    assert dirty[hit].isnan().all() and torch.equal(dirty[~hit], clean[~hit])


@on(*EVERY)
def test_rows_that_are_expanded(backend: Backend, dtype: torch.dtype) -> None:
    """A leading dimension without a stride, as the gradient of a sum over it has."""
    torch.manual_seed(0)
    w1, w2 = (torch.randn(4, 16, 16).to(backend.device, dtype) for _ in range(2))
    for shape in ((3, 1, 64), (1, 5, 64)):
        x, dout = (torch.randn(shape).to(backend.device, dtype).expand(3, 5, 64) for _ in range(2))
        library, whole, dense = backend.library, x.contiguous(), dout.contiguous()
        assert torch.equal(library.blockdiag_multiply(x, w1), library.blockdiag_multiply(whole, w1))
        assert torch.equal(library.monarch_multiply(x, w1, w2), library.monarch_multiply(whole, w1, w2))
        for one, other in zip(
            (
                *library.blockdiag_multiply_backward(dout, x, w1, True),
                *library.monarch_multiply_backward(dout, x, w1, w2),
            ),
            (
                *library.blockdiag_multiply_backward(dense, whole, w1, True),
                *library.monarch_multiply_backward(dense, whole, w1, w2),
            ),
            strict=True,
        ):
            assert_close("gradient", one, other.double(), other, gradient=True)


@on(*EVERY)
def test_nothing_to_multiply(backend: Backend, dtype: torch.dtype) -> None:
    """Blocks without columns give the bias, or zeros."""
    library = backend.library

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=backend.device)

    bias = torch.randn(16).to(backend.device, dtype)
    x, w = zeros(5, 0), zeros(2, 8, 0)
    assert torch.equal(library.blockdiag_multiply(x, w, bias), bias.expand(5, 16))
    dx, dw, dbias = library.blockdiag_multiply_backward(zeros(5, 16) + 1, x, w, True)
    assert dx.shape == x.shape and dw.shape == w.shape and (dbias == 5).all()
    assert torch.equal(library.monarch_multiply(x, zeros(2, 8, 0), zeros(2, 8, 8)), zeros(5, 16))
    w1, w2 = zeros(2, 0, 8), zeros(2, 8, 0)
    x = torch.randn(5, 16).to(backend.device, dtype)
    assert torch.equal(library.monarch_multiply(x, w1, w2), zeros(5, 16))
    dx, dw1, dw2 = library.monarch_multiply_backward(x, x, w1, w2)
    assert (dx == 0).all() and dw1.numel() == 0 and dw2.numel() == 0
