"""warpform.compat.flash_attn: flash-attn 2's signatures, and its results by the oracle."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor

from helpers import oracle
from helpers.compare import assert_close
from warpform.compat import flash_attn
from warpform.compat.flash_attn import bert_padding

TAIL = "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
TAIL += "deterministic=False, return_attn_probs=False"
SIGNATURES = {
    "flash_attn_func": "q, k, v, " + TAIL,
    "flash_attn_kvpacked_func": "q, kv, " + TAIL,
    "flash_attn_qkvpacked_func": "qkv, " + TAIL,
    "flash_attn_varlen_func": "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, "
    + TAIL
    + ", block_table=None",
    "flash_attn_varlen_kvpacked_func": "q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, " + TAIL,
    "flash_attn_varlen_qkvpacked_func": "qkv, cu_seqlens, max_seqlen, " + TAIL,
    "flash_attn_with_kvcache": "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, "
    "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, "
    "window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, "
    "return_softmax_lse=False",
}
# Modes of attention: the arguments of flash-attn, and those of the oracle.
MODES = {
    "plain": ({}, {}),
    "causal": ({"causal": True}, {"causal": True}),
    "scale": ({"softmax_scale": 0.3}, {"softmax_scale": 0.3}),
    "window": ({"window_size": (2, 1)}, {"window": (2, 1)}),
    "window, unbounded on one side": ({"window_size": (3, -5)}, {"window": (3, -1)}),
    "softcap": ({"softcap": 1.5, "causal": True}, {"softcap": 1.5, "causal": True}),
    "alibi": ({"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.05])}, {"slopes": torch.tensor([0.5, 0.25, 0.1, 0.05])}),
    "deterministic": ({"deterministic": True}, {}),
}


def written(function) -> str:
    """A signature without annotations."""
    parameters = inspect.signature(function).parameters.values()
    return ", ".join(str(p.replace(annotation=inspect.Parameter.empty)) for p in parameters)


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def check(found, inputs: list[Tensor], lengths_q: list[int], lengths_k: list[int], how: dict) -> None:
    """out [Tq, H, D], lse [H, Tq] and the gradients of q, k, v, which `found` computed from inputs."""
    out, lse, none = found
    assert none is None
    truth = [t.detach().double().requires_grad_() for t in inputs]
    out64, lse64 = oracle.varlen_attention(*truth, lengths_q, lengths_k, **how)
    plain = [t.detach() for t in inputs]
    out32, lse32 = oracle.varlen_attention(*plain, lengths_q, lengths_k, **how)
    assert lse.dtype == torch.float32
    assert_close("out", out, out64, out32)
    assert_close("lse", lse, lse64, lse32)
    dout = torch.randn_like(out)
    expected = torch.autograd.grad(out64, truth, dout.double())
    eager = oracle.varlen_attention_gradients(dout, None, *plain, lengths_q, lengths_k, **how)
    for name, *grads in zip("qkv", torch.autograd.grad(out, inputs, dout), expected, eager, strict=True):
        assert_close(f"d{name}", *grads, gradient=True)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    function = getattr(flash_attn, name)
    assert written(function) == SIGNATURES[name]
    assert name in flash_attn.__all__ and function.__doc__


def test_names_that_callers_import() -> None:
    from warpform.compat.flash_attn.flash_attn_interface import flash_attn_varlen_func

    assert flash_attn_varlen_func is flash_attn.flash_attn_varlen_func
    for name in SIGNATURES:
        assert getattr(flash_attn.flash_attn_interface, name) is getattr(flash_attn, name)
    assert [int(part) for part in flash_attn.__version__.split(".")] >= [2, 8, 0]


def test_signatures_of_bert_padding() -> None:
    assert written(bert_padding.index_put_first_axis) == "values, indices, first_axis_dim"
    assert written(bert_padding.index_first_axis_residual) == "input, indices"
    assert written(bert_padding.unpad_input_for_concatenated_sequences) == "hidden_states, attention_mask_in_length"
    assert written(bert_padding.unpad_input) == "hidden_states, attention_mask, unused_mask=None"
    assert written(bert_padding.pad_input) == "hidden_states, indices, batch, seqlen"
    assert written(bert_padding.index_first_axis) == "input, indices"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(6, 6), (3, 7), (7, 3)])
@pytest.mark.parametrize("heads_k", [4, 2])
def test_flash_attn_func(mode: str, seqlen_q: int, seqlen_k: int, heads_k: int) -> None:
    """Causal is aligned at the end; with more queries than keys the first ones see nothing."""
    how, oracle_how = MODES[mode]
    batch, heads, head_dim = 2, 4, 8
    q = torch.randn(batch, seqlen_q, heads, head_dim)
    k, v = torch.randn(2, batch, seqlen_k, heads_k, head_dim)
    flat = [t.flatten(0, 1).requires_grad_() for t in (q, k, v)]
    q, k, v = flat[0].view_as(q), flat[1].view_as(k), flat[2].view_as(v)
    out, lse, none = flash_attn.flash_attn_func(q, k, v, return_attn_probs=True, **how)
    assert out.shape == q.shape and lse.shape == (batch, heads, seqlen_q) and lse.is_contiguous()
    assert torch.equal(out, flash_attn.flash_attn_func(q, k, v, **how))
    assert torch.equal(out, flash_attn.flash_attn_kvpacked_func(q, torch.stack([k, v], 2), **how))
    if k.shape == q.shape:
        assert torch.equal(out, flash_attn.flash_attn_qkvpacked_func(torch.stack([q, k, v], 2), **how))
    found = out.flatten(0, 1), lse.transpose(0, 1).flatten(1), none
    check(found, flat, [seqlen_q] * batch, [seqlen_k] * batch, oracle_how)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("heads_k", [4, 1])
def test_flash_attn_varlen_func(mode: str, heads_k: int) -> None:
    how, oracle_how = MODES[mode]
    lengths_q, lengths_k = [5, 0, 1, 3, 4], [5, 2, 4, 0, 2]
    q = torch.randn(sum(lengths_q), 4, 8, requires_grad=True)
    k, v = (torch.randn(sum(lengths_k), heads_k, 8, requires_grad=True) for _ in "kv")
    places = offsets(lengths_q), offsets(lengths_k), 5, 5
    found = flash_attn.flash_attn_varlen_func(q, k, v, *places, return_attn_probs=True, **how)
    assert found[1].shape == (4, sum(lengths_q))
    assert torch.equal(found[0], flash_attn.flash_attn_varlen_func(q, k, v, *places, **how))
    packed = flash_attn.flash_attn_varlen_kvpacked_func(q, torch.stack([k, v], 1), *places, **how)
    assert torch.equal(found[0], packed)
    check(found, [q, k, v], lengths_q, lengths_k, oracle_how)


def test_flash_attn_varlen_qkvpacked_func() -> None:
    lengths = [3, 0, 6]
    qkv = torch.randn(9, 3, 4, 8, requires_grad=True)
    out = flash_attn.flash_attn_varlen_qkvpacked_func(qkv, offsets(lengths), 6, causal=True)
    expected, _ = oracle.varlen_attention(*qkv.double().unbind(1), lengths, lengths, causal=True)
    eager, _ = oracle.varlen_attention(*qkv.unbind(1), lengths, lengths, causal=True)
    assert_close("out", out, expected, eager)
    dout = torch.randn_like(out)
    (found,) = torch.autograd.grad(out, qkv, dout)
    (truth,) = torch.autograd.grad(expected, qkv, dout.double())
    plain = oracle.varlen_attention_gradients(dout, None, *qkv.detach().unbind(1), lengths, lengths, causal=True)
    for i, name in enumerate("qkv"):
        assert_close(f"d{name}", found[:, i], truth[:, i], plain[i], gradient=True)


def test_alibi_slopes_per_sequence() -> None:
    q, k, v = torch.randn(3, 2, 5, 4, 8)
    slopes = torch.rand(2, 4)
    out = flash_attn.flash_attn_func(q, k, v, alibi_slopes=slopes, causal=True)
    flat = [t.flatten(0, 1) for t in (q, k, v)]
    how = {"slopes": slopes, "causal": True}
    truth, _ = oracle.varlen_attention(*(t.double() for t in flat), [5, 5], [5, 5], **how)
    assert_close("out", out.flatten(0, 1), truth, oracle.varlen_attention(*flat, [5, 5], [5, 5], **how)[0])


def test_any_stride_is_taken() -> None:
    """As flash-attn does, it copies where the last dimension is not contiguous."""
    q, k, v = torch.randn(3, 2, 5, 8, 4).transpose(-1, -2)
    expected = flash_attn.flash_attn_func(q.contiguous(), k.contiguous(), v.contiguous())
    assert torch.equal(flash_attn.flash_attn_func(q, k, v), expected)


@pytest.mark.parametrize("shape", [(0, 5, 4, 8), (2, 0, 4, 8)])
def test_empty(shape: tuple[int, ...]) -> None:
    q = torch.randn(shape)
    out, lse, _ = flash_attn.flash_attn_func(q, q, q, return_attn_probs=True)
    assert out.shape == shape and lse.shape == (shape[0], shape[2], shape[1])


def test_what_is_unsupported_says_so() -> None:
    q = torch.randn(2, 5, 4, 8)
    flat, places = q.flatten(0, 1), (offsets([5, 5]), offsets([5, 5]), 5, 5)
    with pytest.raises(NotImplementedError, match="flash_attn_func: dropout is not supported, dropout_p must be 0"):
        flash_attn.flash_attn_func(q, q, q, dropout_p=0.1)
    for call in (
        lambda: flash_attn.flash_attn_kvpacked_func(q, torch.stack([q, q], 2), 0.1),
        lambda: flash_attn.flash_attn_qkvpacked_func(torch.stack([q, q, q], 2), 0.1),
        lambda: flash_attn.flash_attn_varlen_func(flat, flat, flat, *places, 0.1),
        lambda: flash_attn.flash_attn_varlen_kvpacked_func(flat, torch.stack([flat, flat], 1), *places, 0.1),
        lambda: flash_attn.flash_attn_varlen_qkvpacked_func(torch.stack([flat] * 3, 1), places[0], 5, 0.1),
    ):
        with pytest.raises(NotImplementedError, match="dropout is not supported"):
            call()
    with pytest.raises(NotImplementedError, match="block_table .a paged KV cache. is not supported"):
        table = torch.zeros(2, 1, dtype=torch.int32)
        flash_attn.flash_attn_varlen_func(flat, flat, flat, *places, block_table=table)


def test_bad_input() -> None:
    q = torch.randn(2, 5, 4, 8)
    with pytest.raises(ValueError, match=r"q must be of shape \[batch, seqlen, heads, head_dim\], got float32"):
        flash_attn.flash_attn_func(q[0], q, q)
    with pytest.raises(ValueError, match="k and v must both be of shape"):
        flash_attn.flash_attn_func(q, q[:1], q[:1])
    with pytest.raises(ValueError, match=r"qkv must be of shape \[batch, seqlen, 3, heads, head_dim\], got"):
        flash_attn.flash_attn_qkvpacked_func(q)
    with pytest.raises(ValueError, match=r"kv must be of shape \[total_k, 2, heads, head_dim\], got"):
        flash_attn.flash_attn_varlen_kvpacked_func(q[0], q, offsets([5]), offsets([5]), 5, 5)
    with pytest.raises(TypeError, match="q must be a tensor"):
        flash_attn.flash_attn_func(None, q, q)
    with pytest.raises(ValueError, match="must be on"):
        flash_attn.flash_attn_func(q, q.to("meta"), q.to("meta"))
    with pytest.raises(TypeError, match="window_size must be"):
        flash_attn.flash_attn_func(q, q, q, window_size=3)


def test_unpad_and_pad() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 1]])
    x = torch.randn(3, 4, 2, 5, requires_grad=True)
    rows, indices, cu_seqlens, longest, used = bert_padding.unpad_input(x, mask)
    assert torch.equal(rows, x[mask.bool()])
    assert indices.tolist() == [0, 1, 9, 11] and indices.dtype == torch.int64
    assert cu_seqlens.tolist() == [0, 2, 2, 4] and cu_seqlens.dtype == torch.int32
    assert longest == 2 and isinstance(longest, int)
    assert used.tolist() == [2, 0, 2] and used.dtype == torch.int32
    back = bert_padding.pad_input(rows, indices, 3, 4)
    assert torch.equal(back, x * mask[:, :, None, None])
    weight = torch.randn_like(back)
    (grad,) = torch.autograd.grad(back, x, weight)
    assert torch.equal(grad, weight * mask[:, :, None, None])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_unused_mask(dtype: torch.dtype) -> None:
    """Places that are kept, but do not count as used."""
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]]).to(dtype)
    unused = torch.tensor([[0, 0, 1, 0], [0, 1, 1, 0]]).to(dtype)
    rows, indices, cu_seqlens, longest, used = bert_padding.unpad_input(torch.arange(8.0).view(2, 4, 1), mask, unused)
    assert rows.flatten().tolist() == indices.tolist() == [0, 1, 2, 4, 5, 6]
    assert cu_seqlens.tolist() == [0, 3, 6] and longest == 3 and used.tolist() == [2, 1]


def test_index_first_axis() -> None:
    x, indices = torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True), torch.tensor([4, 0, 5])
    assert torch.equal(bert_padding.index_first_axis(x, indices), x[indices])
    assert torch.autograd.gradcheck(lambda x: bert_padding.index_first_axis(x, indices), x)
    with pytest.raises(ValueError, match="indices must be of shape"):
        bert_padding.index_first_axis(x, indices[None])
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        bert_padding.index_first_axis(x[:, 0, 0], indices)


def test_index_put_first_axis() -> None:
    x, indices = torch.randn(3, 2, dtype=torch.float64, requires_grad=True), torch.tensor([4, 0, 5])
    expected = torch.zeros(6, 2, dtype=torch.float64)
    expected[indices] = x.detach()
    for total in (6, torch.tensor(6)):
        assert torch.equal(bert_padding.index_put_first_axis(x, indices, total), expected)
    assert torch.equal(bert_padding.IndexPutFirstAxis.apply(x, indices.int(), 6), expected)
    assert torch.autograd.gradcheck(lambda x: bert_padding.index_put_first_axis(x, indices, 6), x)
    with pytest.raises(ValueError, match="^index_put_first_axis: indices must be of shape"):
        bert_padding.index_put_first_axis(x, indices[:2], 6)
    with pytest.raises(TypeError, match="^index_put_first_axis: first_axis_dim must be an int"):
        bert_padding.index_put_first_axis(x, indices, 6.0)


def test_index_first_axis_residual() -> None:
    """Both results send their gradients back: chosen rows get both."""
    x, indices = torch.randn(4, 2, dtype=torch.float64, requires_grad=True), torch.tensor([3, 1])
    for function in (bert_padding.index_first_axis_residual, bert_padding.IndexFirstAxisResidual.apply):
        chosen, residual = function(x, indices)
        assert torch.equal(chosen, x[indices]) and torch.equal(residual, x)
        assert torch.autograd.gradcheck(lambda x, f=function: f(x, indices), x)
    assert torch.equal(bert_padding.IndexFirstAxis.apply(x, indices), x[indices])
    with pytest.raises(ValueError, match="^index_first_axis_residual: input must have at least 2 dimensions"):
        bert_padding.index_first_axis_residual(x[:, 0], indices)


def test_concatenated_sequences() -> None:
    """Each row holds several sequences; a row may be full, or empty."""
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 1, 0, 0, 0], [0] * 6, [6, 0, 0, 0, 0, 0]])
    x = torch.randn(4, 6, 2, requires_grad=True)
    rows, indices, cu_seqlens, longest = bert_padding.unpad_input_for_concatenated_sequences(x, lengths)
    assert indices.tolist() == [*range(5), *range(6, 12), *range(18, 24)] and indices.dtype == torch.int64
    assert cu_seqlens.tolist() == [0, 2, 5, 8, 10, 11, 17] and cu_seqlens.dtype == torch.int32
    assert longest == 6 and isinstance(longest, int)
    assert torch.equal(rows, x.flatten(0, 1)[indices])
    (gradient,) = torch.autograd.grad(rows.sum(), x)
    assert torch.equal(gradient.flatten(0, 1)[:, 0] > 0, torch.zeros(24).index_fill(0, indices, 1.0) > 0)
    *_, longest = bert_padding.unpad_input_for_concatenated_sequences(x, lengths * 0)
    assert longest == 0
    with pytest.raises(ValueError, match=r"^unpad_input_for_concatenated_sequences: .* must be of shape \[4, 6\]"):
        bert_padding.unpad_input_for_concatenated_sequences(x, lengths[:2])
    with pytest.raises(TypeError, match="must be integers"):
        bert_padding.unpad_input_for_concatenated_sequences(x, lengths > 0)


def test_bad_masks() -> None:
    x = torch.randn(2, 4, 3)
    with pytest.raises(ValueError, match=r"unpad_input: attention_mask must be of shape \[2, 4\]"):
        bert_padding.unpad_input(x, torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"unpad_input: unused_mask must be of shape \[2, 4\]"):
        bert_padding.unpad_input(x, torch.ones(2, 4), torch.ones(4))
    with pytest.raises(ValueError, match="indices must be of shape"):
        bert_padding.pad_input(x, torch.tensor([0]), 2, 4)


def test_as_transformers_uses_it() -> None:
    """transformers' own version of these functions agrees, value for value."""
    utils = pytest.importorskip("transformers.modeling_flash_attention_utils")
    mask = torch.rand(4, 9) < 0.6
    x = torch.randn(4, 9, 2, 3)
    ours, theirs = bert_padding.unpad_input(x, mask), utils._unpad_input(x, mask)
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(ours, theirs, strict=True))
    padded = utils._pad_input(theirs[0], theirs[1], 4, 9)
    assert torch.equal(bert_padding.pad_input(ours[0], ours[1], 4, 9), padded)
