"""Softcaps, scales, products and gates that are extreme but legal, in the CUDA kernels, run in the emulator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import cases, checks, hidden, oracle
from helpers.cases import AttentionCase, WindowCase, offsets, random
from helpers.compare import assert_close
from helpers.hidden import HiddenCase, hidden_inputs

DTYPES = (torch.float16, torch.bfloat16)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def _check_softcap(simt: Any, softcap: float, length: int, head_dim: int, *, backward: bool) -> None:
    """lse is float32 and shows what of a score was lost; from 1e4 on scores are what they are without a softcap."""
    q, k, v, dout = random(4, length, 1, head_dim, dtype=torch.float16).unbind(0)
    cu = offsets([length])
    arguments, how = (cu, cu, length, length), {"causal": True, "softcap": softcap}
    out, lse = simt.varlen_attention(q, k, v, *arguments, **how)
    tensors = [t.double().requires_grad_() for t in (q, k, v)]
    truth = oracle.varlen_attention(*tensors, [length], [length], causal=True, softcap=softcap)
    same: dict[str, Any] = {"softmax_scale": 0.0} if softcap < 1 else {} if softcap > 1000 else {"softcap": softcap}
    eager = oracle.varlen_attention(q.float(), k.float(), v.float(), [length], [length], causal=True, **same)
    assert_close("lse", lse, truth[1], eager[1])
    assert_close("out", out, truth[0], eager[0].half())
    if not backward:
        return
    truths = torch.autograd.grad(truth[0], tensors, dout.double())
    found = simt.varlen_attention_backward(dout, None, q, k, v, out, lse, *arguments, **how)
    yardsticks = oracle.varlen_attention_gradients(dout, None, q, k, v, [length], [length], causal=True, **same)
    largest = max(t.abs().max().item() for t in truths)
    for name, g, one, yardstick in zip(("dq", "dk", "dv"), found, truths, yardsticks, strict=True):
        assert_close(name, g, one, yardstick, gradient=True, scale=largest)


@pytest.mark.parametrize("softcap", (1e-300, 1e-8, 300.0, 1e4, 1e30, 1e300))
def test_softcap(simt: Any, softcap: float) -> None:
    _check_softcap(simt, softcap, 40, 8, backward=True)


@pytest.mark.parametrize("softcap", (300.0, 1e4))
@pytest.mark.parametrize("head_dim", (64, 128))
def test_softcap_where_tiles_are_large(simt: Any, head_dim: int, softcap: float) -> None:
    """With one SM one tile is many. Large tiles of 128 columns are for softcaps up to 256: these take small ones."""
    simt._configure(0, 1)
    _check_softcap(simt, softcap, 130, head_dim, backward=False)


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
    """q . pos_key is size^2 head_dim for every pair, of which no softmax sees anything: out is the mean of v."""
    length = 20
    q, table = torch.full((length, 1, head_dim), size).half(), torch.full((8, 1, head_dim), size).half()
    k, (v, dout) = torch.zeros_like(q), random(2, length, 1, head_dim, dtype=torch.float16).unbind(0)
    cu = offsets([length])
    for pos_key, pos_query, one, other in ((table, None, q, k), (None, table, k, q), (table, table, q, k)):
        out, lse = simt.disentangled_attention(one, other, v, pos_key, pos_query, cu, length)
        mean = v.double().mean(0).expand_as(out)
        assert_close("out", out, mean, v.mean(0).expand_as(out))
        gradients = simt.disentangled_attention_backward(dout, one, other, v, pos_key, pos_query, out, lse, cu, length)
        assert all(g.isfinite().all() for g in gradients)
        dv = dout.double().mean(0).expand_as(out)
        # As in check_attention: P = exp(score - lse).
        growth = 1 + 2 * lse.abs().max().item() * torch.finfo(torch.float32).eps / torch.finfo(torch.float16).eps
        scale = growth * dv.abs().max().item()
        assert_close("dv", gradients[2], dv, dout.mean(0).expand_as(out), gradient=True, scale=scale)


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
    """Two groups, x of 2 and gates of 10^5: each product is 2 10^5, times a weight of 2^-6 and minus that of 2^-7."""
    plan_of = hidden_inputs(HiddenCase("", tokens, 2, 8, 8, "all", gates=True), torch.float16, routed_out=False)
    plan = plan_of.plan(simt)
    x, gates = torch.full((tokens, 16), 2.0).half(), torch.full((tokens, 2), 1e5)
    w = torch.zeros(8, 16).half()
    w[:, 0], w[:, 8] = 2.0**-6, -(2.0**-7)
    out = simt.hidden_gather_linear(x, w, gates, None, *plan)
    # The gate over its power of two, 2^17, is rounded once to float16 with x.
    assert ((out.double() - 1562.5).abs() <= 1562.5 * 2 * torch.finfo(torch.float16).eps).all()
    # dout times its gate, likewise, on the way back through the layer that scatters.
    dx, _ = simt.hidden_scatter_linear_backward(x, None, w.t().contiguous(), gates, *plan)
    assert ((dx.double() - 1562.5).abs() <= 1562.5 * 2 * torch.finfo(torch.float16).eps).all()


@pytest.mark.parametrize("tokens", (2, 130), ids=("few", "tiles"))
def test_a_product_that_overflows_before_its_gate(simt: Any, tokens: int) -> None:
    """W x is 2^17, which no float16 is, and its gate 2^-10."""
    plan_of = hidden_inputs(HiddenCase("", tokens, 2, 8, 8, "all", gates=True), torch.float16, routed_out=True)
    x, w = torch.full((tokens, 8), 128.0).half(), torch.full((16, 8), 128.0).half()
    gates = torch.full((tokens, 2), 2.0**-10)
    out, _ = simt.hidden_scatter_linear(x, w, gates, None, False, *plan_of.plan(simt))
    assert (out == 128).all()
