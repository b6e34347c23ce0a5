"""warpform.compat.torch_varlen: torch's signature, and its results by the oracle."""

from __future__ import annotations

import inspect

import pytest
import torch

from helpers import oracle
from helpers.compare import assert_close
from warpform.compat.torch_varlen import AuxRequest, varlen_attn, varlen_attn_out

LENGTHS_Q, LENGTHS_K = [24, 0, 1, 36], [24, 12, 25, 13]
CU_Q, CU_K = (torch.tensor([0, *lengths]).cumsum(0).to(torch.int32) for lengths in (LENGTHS_Q, LENGTHS_K))
MODES = {
    "plain": ({}, {}),
    "causal": ({"window_size": (-1, 0)}, {"causal": True}),
    "window": ({"window_size": (2, 0)}, {"causal": True, "window": (2, -1)}),
    "scale": ({"scale": 0.2}, {"softmax_scale": 0.2}),
}


@pytest.mark.parametrize("ours", [varlen_attn, varlen_attn_out])
def test_signature_is_torchs(ours) -> None:
    theirs = getattr(pytest.importorskip("torch.nn.attention.varlen"), ours.__name__, None)
    if theirs is None or "num_splits" not in inspect.signature(theirs).parameters:
        pytest.skip("an older torch, with another signature")
    expected, found = (inspect.signature(f).parameters for f in (theirs, ours))
    assert [(p.name, p.kind, p.default) for p in found.values()] == [
        (p.name, p.kind, p.default) for p in expected.values()
    ]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("heads_k", [4, 2])
def test_results(mode: str, heads_k: int) -> None:
    how, oracle_how = MODES[mode]
    q = torch.randn(sum(LENGTHS_Q), 4, 16, requires_grad=True)
    k, v = (torch.randn(sum(LENGTHS_K), heads_k, 16, requires_grad=True) for _ in "kv")
    how = {**how, "enable_gqa": heads_k != 4}
    out, lse = varlen_attn(q, k, v, CU_Q, CU_K, max(LENGTHS_Q), max(LENGTHS_K), return_aux=AuxRequest(lse=True), **how)
    for request in (None, AuxRequest()):
        assert torch.equal(
            varlen_attn(q, k, v, CU_Q, CU_K, max(LENGTHS_Q), max(LENGTHS_K), return_aux=request, **how), out
        )
    truth = [t.detach().double().requires_grad_() for t in (q, k, v)]
    plain = [t.detach() for t in (q, k, v)]
    out64, lse64 = oracle.varlen_attention(*truth, LENGTHS_Q, LENGTHS_K, **oracle_how)
    out32, lse32 = oracle.varlen_attention(*plain, LENGTHS_Q, LENGTHS_K, **oracle_how)
    assert_close("out", out, out64, out32)
    assert_close("lse", lse, lse64, lse32)
    dout = torch.randn_like(out)
    expected = torch.autograd.grad(out64, truth, dout.double())
    eager = oracle.varlen_attention_gradients(dout, None, *plain, LENGTHS_Q, LENGTHS_K, **oracle_how)
    for name, *grads in zip("qkv", torch.autograd.grad(out, (q, k, v), dout), expected, eager, strict=True):
        assert_close(f"d{name}", *grads, gradient=True)


def test_torchs_own_request_is_taken() -> None:
    request = pytest.importorskip("torch.nn.attention.varlen").AuxRequest(lse=True)
    q = torch.randn(10, 2, 8)
    cu = torch.tensor([0, 10], dtype=torch.int32)
    _, lse = varlen_attn(q, q, q, cu, cu, 10, 10, return_aux=request)
    assert lse.shape == (2, 10)


def test_out_is_written() -> None:
    """out comes back itself, in any layout, and carries gradients where the inputs have them."""
    q, k, v = (torch.randn(10, 2, 8, requires_grad=True) for _ in "qkv")
    cu = torch.tensor([0, 4, 10], dtype=torch.int32)
    expected, expected_lse = varlen_attn(q, k, v, cu, cu, 6, 6, return_aux=AuxRequest(lse=True))
    whole = torch.full((10, 2, 16), torch.nan)
    with torch.no_grad():
        out = whole[..., :8]
        assert varlen_attn_out(out, q, k, v, cu, cu, 6, 6) is out
        assert torch.equal(whole[..., :8], expected) and whole[..., 8:].isnan().all()
        found, lse = varlen_attn_out(out.zero_(), q, k, v, cu, cu, 6, 6, return_aux=AuxRequest(lse=True))
    assert found is out and torch.equal(out, expected) and torch.equal(lse, expected_lse)
    found = varlen_attn_out(torch.empty_like(q), q, k, v, cu, cu, 6, 6)
    for ours, theirs in zip(*(torch.autograd.grad(t.sum(), (q, k, v)) for t in (found, expected)), strict=True):
        assert torch.equal(ours, theirs)


def test_out_that_does_not_fit() -> None:
    q, cu = torch.randn(10, 2, 8), torch.tensor([0, 10], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^varlen_attn_out: out must be of shape \[10, 2, 8\] as query is"):
        varlen_attn_out(q[:5], q, q, q, cu, cu, 10, 10)
    with pytest.raises(TypeError, match="^varlen_attn_out: out must be float32 as query is"):
        varlen_attn_out(q.half(), q, q, q, cu, cu, 10, 10)
    with pytest.raises(TypeError, match="^varlen_attn_out: max_q must be an int"):
        varlen_attn_out(q.clone(), q, q, q, cu, cu, 10.0, 10)
    with pytest.raises(NotImplementedError, match="^varlen_attn_out: num_splits is not supported"):
        varlen_attn_out(q.clone(), q, q, q, cu, cu, 10, 10, num_splits=1)


@pytest.mark.parametrize("name", ["seqused_k", "block_table", "num_splits"])
def test_what_is_unsupported_says_so(name: str) -> None:
    q, cu = torch.randn(10, 2, 8), torch.tensor([0, 10], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match=f"varlen_attn: {name} is not supported"):
        varlen_attn(q, q, q, cu, cu, 10, 10, **{name: 1 if name == "num_splits" else cu})


def test_bad_input() -> None:
    q, cu = torch.randn(10, 2, 8), torch.tensor([0, 10], dtype=torch.int32)
    with pytest.raises(ValueError, match="must have the 2 heads of query unless enable_gqa=True"):
        varlen_attn(q, q[:, :1], q[:, :1], cu, cu, 10, 10)
    with pytest.raises(TypeError, match="cu_seq_k must be a tensor, got None"):
        varlen_attn(q, q, q, cu, None, 10, 10)
    with pytest.raises(ValueError, match=r"query must be of shape \[total, heads, head_dim\]"):
        varlen_attn(q[0], q, q, cu, cu, 10, 10)
