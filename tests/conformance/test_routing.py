"""Hidden routing, its plans, its two routed products and their gradients, on every backend."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from helpers import cases as common
from helpers import hidden
from helpers.backends import HALF, Backend, cpu, drawn_on, kernels, on, one_dtype, reference
from helpers.hidden import HIDDEN_CASES, HiddenCase, HiddenInputs, hidden_inputs
from helpers.threads import assert_same_on_threads

REFERENCE = reference(examples=60)
CPU = cpu(common.KERNEL_DTYPES)
SIMT, GPU = kernels(HALF, examples=(12, 100))
EVERY = (REFERENCE, CPU, SIMT, GPU)
by_direction = pytest.mark.parametrize("routed_out", (False, True), ids=("gather", "scatter"))


def for_backend(backend: Backend, case: HiddenCase) -> HiddenCase:
    """The reference and CPU kernels take every case."""
    return case if backend in (REFERENCE, CPU) else hidden.with_kernel(case)


WIDE = (
    HiddenCase("wide_groups", 150, 3, 200, 136, "random"),
    HiddenCase("wide_other", 140, 4, 64, 264, "topk", num_shared=1),
    HiddenCase("many_tokens", 900, 8, 16, 16, "topk", num_shared=2),
)
# Longer than one block ranks, of several blocks of the sort; of groups with more than one digit.
PLANS = (
    HiddenCase("sorted", 2500, 16, 8, 8, num_shared=6),
    HiddenCase("sorted_one_digit", 300, 5, 8, 8, "random"),
    HiddenCase("sorted_64_groups", 1500, 64, 8, 8, "random"),
    HiddenCase("sorted_classes", 2100, 9, 8, 8, "random", num_classes=4),
    HiddenCase("sorted_alike", 700, 16, 8, 8, "same"),
    HiddenCase("small_tiles", 600, 12, 8, 8, "random", num_classes=2, tile=16),
    HiddenCase("200_classes", 300, 3, 8, 8, "random", num_classes=200, tile=8),
)


def cases(*more: HiddenCase) -> Callable[[Backend], list[HiddenCase]]:
    """HIDDEN_CASES for a backend, and more of them for kernels."""
    return lambda backend: [
        for_backend(backend, case) for case in (HIDDEN_CASES if backend is REFERENCE else HIDDEN_CASES + more)
    ]


# ---- plans ----


@on(*EVERY, case=cases(*PLANS))
def test_plan(backend: Backend, case: HiddenCase) -> None:
    hidden.check_routing_plan(backend.library, case, backend.device)


@on(*EVERY, dtype=(torch.int64, torch.int32))
def test_mask(backend: Backend, dtype: torch.dtype) -> None:
    """An index that is out of range is dropped; shared groups are always on."""
    idx = torch.tensor([[1, 5, 1], [63, 0, 2], [-1, 64, 7]], dtype=dtype, device=backend.device)
    library = backend.library
    found = library.routing_mask(idx, 64, 2)
    assert [m % 2**64 for m in found.tolist()] == [3 | 1 << 5, 3 | 1 << 63 | 1 << 2, 3 | 1 << 7]
    assert library.routing_mask(idx[:, :0], 8, 8).tolist() == [255] * 3
    assert library.routing_mask(idx[1:, ::2] + 2, 8, 0).tolist() == [1 << 4, 1 << 1]


# ---- products ----


@by_direction
@on(*EVERY, case=cases(*WIDE))
def test_cases(backend: Backend, case: HiddenCase, dtype: torch.dtype, routed_out: bool) -> None:
    for _ in backend.kernel_sets():
        hidden.check_hidden(backend.library, case, dtype, backend.device, routed_out=routed_out)


@drawn_on(*EVERY, case=hidden.hidden_cases(), routed_out=st.booleans(), hopper=st.booleans())
def test_drawn(backend: Backend, case: HiddenCase, dtype: torch.dtype, routed_out: bool, hopper: bool) -> None:
    case = for_backend(backend, case)
    hidden.check_routing_plan(backend.library, case, backend.device)
    with backend.hopper(hopper):
        hidden.check_hidden(backend.library, case, dtype, backend.device, routed_out=routed_out)


def _call(backend: Backend, x: HiddenInputs, routed_out: bool) -> list[Tensor]:
    """Output, weight gradient, other gradients. What a token does not use may hold anything, NaN too."""
    library = backend.library
    plan = x.plan(library)
    dw = library.hidden_weight_grad(x.x, x.dout, x.gates, routed_out, *plan)
    if routed_out:
        out, ungated = library.hidden_scatter_linear(x.x, x.w, x.gates, x.bias, True, *plan)
        results = (out, ungated, dw, *library.hidden_scatter_linear_backward(x.dout, ungated, x.w, x.gates, *plan))
    else:
        out = library.hidden_gather_linear(x.x, x.w, x.gates, x.bias, *plan)
        results = (out, dw, *library.hidden_gather_linear_backward(x.dout, x.x, x.w, x.gates, *plan))
    return [t.nan_to_num(7.0) for t in results]


@by_direction
@on(
    *EVERY,
    case=(
        HiddenCase("split", 1300, 4, 16, 24, "topk", num_shared=1),
        HiddenCase("classes", 300, 8, 8, 64, "random", num_classes=3),
    ),
    dtype=one_dtype,
)
def test_results_repeat_bit_for_bit(backend: Backend, case: HiddenCase, dtype: torch.dtype, routed_out: bool) -> None:
    """In any order of blocks and threads. With more blocks than tiles of the weight the tokens of its gradient are
    split, and the parts added in a fixed order."""
    x = hidden_inputs(case, dtype, backend.device, routed_out=routed_out)
    backend.assert_repeats(lambda: _call(backend, x, routed_out), machines=((0, 64), (5, 64)))


@by_direction
@on(CPU)
def test_threads_change_no_bit(backend: Backend, dtype: torch.dtype, routed_out: bool) -> None:
    case = HiddenCase("threads", 700, 6, 24, 40, "random", num_classes=2)
    x = hidden_inputs(case, dtype, backend.device, routed_out=routed_out)
    assert_same_on_threads(lambda: [*x.plan(backend.library)[1:5], *_call(backend, x, routed_out)])
