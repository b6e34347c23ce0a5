"""Softcaps, scales, products and gates that are extreme but legal, in the CUDA kernels, run in the emulator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import cases, checks, hidden, oracle, scales
from helpers.cases import AttentionCase, WindowCase
from helpers.compare import assert_close
from helpers.hidden import HiddenCase, hidden_inputs

DTYPES = (torch.float16, torch.bfloat16)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@pytest.mark.parametrize("softcap", (1e-300, 1e-8, 300.0, 1e4, 1e30, 1e300))
def test_softcap(simt: Any, softcap: float) -> None:
    scales.check_softcap(simt, softcap, 40, 8)


@pytest.mark.parametrize("softcap", (300.0, 1e4))
@pytest.mark.parametrize("head_dim", (64, 128))
def test_softcap_where_tiles_are_large(simt: Any, head_dim: int, softcap: float) -> None:
    """With one SM one tile is many. Large tiles of 128 columns are for softcaps up to 256: these take small ones."""
    simt._configure(0, 1)
    scales.check_softcap(simt, softcap, 130, head_dim, backward=False)


@by_dtype
@pytest.mark.parametrize("scale", (1e-30, 1e-4, 30.0))
@pytest.mark.parametrize("how", ({}, {"softcap": 30.0, "slopes": "heads"}), ids=("plain", "biased"))
def test_softmax_scale(simt: Any, how: dict[str, Any], scale: float, dtype: torch.dtype) -> None:
    case = AttentionCase("", (40, 3), causal=True, head_dim=16, softmax_scale=scale, **how)
    checks.check_attention(simt, case, dtype, backward=scale < 1)


@pytest.mark.parametrize("window", ((3, 3), (9, 9)), ids=("short", "long"))
@pytest.mark.parametrize(("scale", "mask_value"), ((0.0, -100.0), (-0.4, -1e30), (1e-30, float("-inf"))))
def test_window_attention(simt: Any, scale: float, mask_value: float, window: tuple[int, ...]) -> None:
    case = WindowCase("", (10, 9), window, (1, 2), scale=scale, mask_value=mask_value, head_dim=16)
    checks.check_window_attention(simt, case, torch.float16)


@pytest.mark.parametrize("size", (40.0, 200.0, 1000.0))
@pytest.mark.parametrize("head_dim", (64, 128))
def test_products_with_tables_that_pass_float16(simt: Any, head_dim: int, size: float) -> None:
    scales.check_large_products(simt, head_dim, size)


def test_small_products_with_tables_keep_their_bits(simt: Any) -> None:
    """Tables of 2^-10: what products lose over a power of two is far below what float16 makes of the scores."""
    case = cases.DisentangledCase("", (70, 9), head_dim=64)
    x = cases.disentangled_inputs(case, torch.float16)
    tables = [t / 1024 for t in (x.pos_key, x.pos_query)]
    out, lse = simt.disentangled_attention(x.q, x.k, x.v, *tables, x.cu_seqlens, x.max_seqlen, **x.options)
    tensors = (x.q, x.k, x.v, *tables)
    truth = oracle.disentangled_attention(*(t.double() for t in tensors), list(case.lengths), **x.options)
    eager = oracle.disentangled_attention(*tensors, list(case.lengths), **x.options)
    assert_close("out", out, truth[0], eager[0])
    assert_close("lse", lse, truth[1], eager[1])


# ---- gates ----


def _gated(case: HiddenCase, size: float, *, routed_out: bool) -> tuple[hidden.HiddenInputs, Tensor]:
    """Inputs, and gates of about that size; what they or their products overflow is brought back by a small weight."""
    x = hidden_inputs(case, torch.float16, routed_out=routed_out)
    assert x.gates is not None
    x.gates.mul_(size)
    return x, x.gates


@pytest.mark.parametrize("tokens", (3, 140), ids=("few", "tiles"))
@pytest.mark.parametrize("size", (1e5, 2.0**-20, 1e-9, 1e12))
@pytest.mark.parametrize("routed_out", (False, True), ids=("gather", "scatter"))
def test_gates_of_any_size(simt: Any, routed_out: bool, size: float, tokens: int) -> None:
    """The result for gates of ordinary size, times a power of two, divided out of what they multiply."""
    case = HiddenCase("", tokens, 3, 16, 24, "random", gates=True)
    x, gates = _gated(case, 1.0, routed_out=routed_out)
    plan = x.plan(simt)
    power = 2.0 ** round(torch.tensor(size).log2().item())
    op = simt.hidden_scatter_linear if routed_out else simt.hidden_gather_linear
    keep = (False,) if routed_out else ()
    plain = op(x.x, x.w, gates, None, *keep, *plan)
    scaled = op(x.x, x.w, gates * power, None, *keep, *plan)
    plain, scaled = (t[0] if routed_out else t for t in (plain, scaled))
    # float16 rounds and overflows at the end, and only there.
    expected = (plain.double() * power).half()
    bound = torch.finfo(torch.float16).smallest_normal
    ordinary = (expected.abs() >= bound) & expected.isfinite()
    assert torch.equal(scaled[ordinary], expected[ordinary])
    assert torch.equal(scaled.isfinite(), expected.isfinite())


@pytest.mark.parametrize("tokens", (2, 130), ids=("few", "tiles"))
def test_gates_whose_products_overflow_and_cancel(simt: Any, tokens: int) -> None:
    scales.check_gates_whose_products_overflow(simt, tokens)


@pytest.mark.parametrize("tokens", (2, 130), ids=("few", "tiles"))
def test_a_product_that_overflows_before_its_gate(simt: Any, tokens: int) -> None:
    scales.check_product_that_overflows_before_its_gate(simt, tokens)
