"""Softcaps, scales, products and gates that are extreme but legal, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers import cases, checks, oracle, scales
from helpers.backends import FEW_SMS, HALF, Backend, kernels, on, reference
from helpers.cases import AttentionCase, WindowCase
from helpers.compare import assert_close
from helpers.hidden import HiddenCase, hidden_inputs

REFERENCE = reference(HALF)
SIMT, GPU = kernels(HALF)
EVERY = (REFERENCE, SIMT, GPU)


# ---- attention ----


@on(
    SIMT,
    GPU,
    softcap=(1e-300, 1e-8, 300.0, 1e4, 1e30, 1e300),
    head_dim=lambda backend: (8,) if backend is SIMT else (64, 128),
)
def test_softcap(backend: Backend, softcap: float, head_dim: int) -> None:
    scales.check_softcap(backend.library, softcap, 40 if backend is SIMT else 300, head_dim, backend.device)


@on(SIMT, softcap=(300.0, 1e4), head_dim=(64, 128))
def test_softcap_where_tiles_are_large(backend: Backend, head_dim: int, softcap: float) -> None:
    """On few multiprocessors one tile is many. Large tiles of 128 columns are for softcaps up to 256: these take small
    ones."""
    backend.configure(0, FEW_SMS)
    scales.check_softcap(backend.library, softcap, 130, head_dim, backend.device, backward=False)


@on(*EVERY, scale=(1e-30, 1e-4, 30.0))
@pytest.mark.parametrize("how", ({}, {"softcap": 30.0, "slopes": "heads"}), ids=("plain", "biased"))
def test_softmax_scale(backend: Backend, how: dict[str, Any], scale: float, dtype: torch.dtype) -> None:
    case = AttentionCase("", (40, 3), causal=True, head_dim=16, softmax_scale=scale, **how)
    checks.check_attention(backend.library, case, dtype, backend.device, backward=scale < 1)


@on(*EVERY)
@pytest.mark.parametrize("window", ((3, 3), (9, 9)), ids=("short", "long"))
@pytest.mark.parametrize(("scale", "mask_value"), ((0.0, -100.0), (-0.4, -1e30), (1e-30, float("-inf"))))
def test_window_attention(backend: Backend, scale: float, mask_value: float, window: tuple[int, ...]) -> None:
    case = WindowCase("", (10, 9), window, (1, 2), scale=scale, mask_value=mask_value, head_dim=16)
    checks.check_window_attention(backend.library, case, torch.float16, backend.device)


@on(*EVERY, size=(40.0, 200.0, 1000.0), head_dim=(64, 128))
def test_products_with_tables_that_pass_float16(backend: Backend, head_dim: int, size: float) -> None:
    scales.check_large_products(backend.library, head_dim, size, backend.device)


@on(*EVERY)
def test_small_products_with_tables_keep_their_bits(backend: Backend) -> None:
    """Tables of 2^-10: what products lose over a power of two is far below what float16 makes of the scores."""
    case = cases.DisentangledCase("", (70, 9), head_dim=64)
    x = cases.disentangled_inputs(case, torch.float16, backend.device)
    tables = [t / 1024 for t in (x.pos_key, x.pos_query)]
    out, lse = backend.library.disentangled_attention(x.q, x.k, x.v, *tables, x.cu_seqlens, x.max_seqlen, **x.options)
    tensors = (x.q, x.k, x.v, *tables)
    truth = oracle.disentangled_attention(*(t.double() for t in tensors), list(case.lengths), **x.options)
    eager = oracle.disentangled_attention(*tensors, list(case.lengths), **x.options)
    assert_close("out", out, truth[0], eager[0])
    assert_close("lse", lse, truth[1], eager[1])


# ---- gates ----


@on(*EVERY, size=(1e5, 2.0**-20, 1e-9, 1e12), tokens=(3, 140))
@pytest.mark.parametrize("routed_out", (False, True), ids=("gather", "scatter"))
def test_gates_of_any_size(backend: Backend, routed_out: bool, size: float, tokens: int) -> None:
    """The result for gates of ordinary size, times a power of two, divided out of what they multiply."""
    case = HiddenCase("", tokens, 3, 16, 24, "random", gates=True)
    x = hidden_inputs(case, torch.float16, backend.device, routed_out=routed_out)
    assert x.gates is not None
    plan = x.plan(backend.library)
    power = 2.0 ** round(torch.tensor(size).log2().item())

    def run(gates: torch.Tensor) -> torch.Tensor:
        if routed_out:
            return backend.library.hidden_scatter_linear(x.x, x.w, gates, None, False, *plan)[0]
        return backend.library.hidden_gather_linear(x.x, x.w, gates, None, *plan)

    plain, scaled = run(x.gates), run(x.gates * power)
    # float16 rounds and overflows at the end, and only there; a subnormal number has lost digits.
    expected = (plain.double() * power).half()
    bound = torch.finfo(torch.float16).smallest_normal
    ordinary = (torch.minimum(plain.abs(), expected.abs()) >= bound) & expected.isfinite()
    assert torch.equal(scaled[ordinary], expected[ordinary])
    assert torch.equal(scaled.isfinite(), expected.isfinite())


# Few tokens, and tiles of them.
@on(*EVERY, tokens=(2, 130))
def test_gates_whose_products_overflow_and_cancel(backend: Backend, tokens: int) -> None:
    scales.check_gates_whose_products_overflow(backend.library, tokens, backend.device)


@on(*EVERY, tokens=(2, 130))
def test_a_product_that_overflows_before_its_gate(backend: Backend, tokens: int) -> None:
    scales.check_product_that_overflows_before_its_gate(backend.library, tokens, backend.device)
