"""Softcaps, products and gates that are extreme but legal, for the emulator and the GPU."""

from __future__ import annotations

from typing import Any

import torch

from . import oracle
from .cases import offsets, random
from .compare import assert_close
from .hidden import HiddenCase, hidden_inputs


def check_softcap(
    library: Any, softcap: float, length: int, head_dim: int, device: str = "cpu", *, backward: bool = True
) -> None:
    """lse is float32 and shows what of a score was lost; from 1e4 on scores are what they are without a softcap."""
    q, k, v, dout = random(4, length, 1, head_dim, dtype=torch.float16, device=device).unbind(0)
    cu = offsets([length], device)
    arguments, how = (cu, cu, length, length), {"causal": True, "softcap": softcap}
    out, lse = library.varlen_attention(q, k, v, *arguments, **how)
    tensors = [t.double().requires_grad_() for t in (q, k, v)]
    truth = oracle.varlen_attention(*tensors, [length], [length], causal=True, softcap=softcap)
    same: dict[str, Any] = {"softmax_scale": 0.0} if softcap < 1 else {} if softcap > 1000 else {"softcap": softcap}
    eager = oracle.varlen_attention(q.float(), k.float(), v.float(), [length], [length], causal=True, **same)
    assert_close("lse", lse, truth[1], eager[1])
    assert_close("out", out, truth[0], eager[0].half())
    if not backward:
        return
    truths = torch.autograd.grad(truth[0], tensors, dout.double())
    found = library.varlen_attention_backward(dout, None, q, k, v, out, lse, *arguments, **how)
    yardsticks = oracle.varlen_attention_gradients(dout, None, q, k, v, [length], [length], causal=True, **same)
    largest = max(t.abs().max().item() for t in truths)
    for name, g, one, yardstick in zip(("dq", "dk", "dv"), found, truths, yardsticks, strict=True):
        assert_close(name, g, one, yardstick, gradient=True, scale=largest)


def check_large_products(library: Any, head_dim: int, size: float, device: str = "cpu") -> None:
    """q . pos_key is size^2 head_dim for every pair, of which no softmax sees anything: out is the mean of v."""
    length = 20
    q, table = (torch.full((rows, 1, head_dim), size, dtype=torch.float16, device=device) for rows in (length, 8))
    k, (v, dout) = torch.zeros_like(q), random(2, length, 1, head_dim, dtype=torch.float16, device=device).unbind(0)
    cu = offsets([length], device)
    for pos_key, pos_query, one, other in ((table, None, q, k), (None, table, k, q), (table, table, q, k)):
        out, lse = library.disentangled_attention(one, other, v, pos_key, pos_query, cu, length)
        mean = v.double().mean(0).expand_as(out)
        assert_close("out", out, mean, v.mean(0).expand_as(out))
        gradients = library.disentangled_attention_backward(
            dout, one, other, v, pos_key, pos_query, out, lse, cu, length
        )
        assert all(g.isfinite().all() for g in gradients)
        dv = dout.double().mean(0).expand_as(out)
        # As in check_attention: P = exp(score - lse).
        growth = 1 + 2 * lse.abs().max().item() * torch.finfo(torch.float32).eps / torch.finfo(torch.float16).eps
        scale = growth * dv.abs().max().item()
        assert_close("dv", gradients[2], dv, dout.mean(0).expand_as(out), gradient=True, scale=scale)


def check_gates_whose_products_overflow(library: Any, tokens: int, device: str = "cpu") -> None:
    """Two groups, x of 2 and gates of 10^5: each product is 2 10^5, times a weight of 2^-6 and minus that of 2^-7."""
    plan_of = hidden_inputs(HiddenCase("", tokens, 2, 8, 8, "all", gates=True), torch.float16, device, routed_out=False)
    plan = plan_of.plan(library)
    x, gates = torch.full((tokens, 16), 2.0, device=device).half(), torch.full((tokens, 2), 1e5, device=device)
    w = torch.zeros(8, 16, device=device).half()
    w[:, 0], w[:, 8] = 2.0**-6, -(2.0**-7)
    out = library.hidden_gather_linear(x, w, gates, None, *plan)
    # The gate over its power of two, 2^17, is rounded once to float16 with x.
    assert ((out.double() - 1562.5).abs() <= 1562.5 * 2 * torch.finfo(torch.float16).eps).all()
    # dout times its gate, likewise, on the way back through the layer that scatters.
    dx, _ = library.hidden_scatter_linear_backward(x, None, w.t().contiguous(), gates, *plan)
    assert ((dx.double() - 1562.5).abs() <= 1562.5 * 2 * torch.finfo(torch.float16).eps).all()


def check_product_that_overflows_before_its_gate(library: Any, tokens: int, device: str = "cpu") -> None:
    """W x is 2^17, which no float16 is, and its gate 2^-10."""
    plan_of = hidden_inputs(HiddenCase("", tokens, 2, 8, 8, "all", gates=True), torch.float16, device, routed_out=True)
    x, w = (torch.full((rows, 8), 128.0, device=device).half() for rows in (tokens, 16))
    gates = torch.full((tokens, 2), 2.0**-10, device=device)
    out, _ = library.hidden_scatter_linear(x, w, gates, None, False, *plan_of.plan(library))
    assert (out == 128).all()
