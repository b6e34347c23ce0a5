"""Numbers, windows and head sizes as callers of flash-attn and of torch pass them, and whose name errors carry."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers import oracle
from helpers.compare import assert_close
from helpers.compilations import Compilations
from warpform.compat import _attention, flash_attn, torch_varlen

FIVE: dict[str, Any] = {
    "numpy": np.int32(5),
    "numpy int64": np.int64(5),
    "numpy array": np.array([5]),
    "0-d tensor": torch.tensor(5),
    "0-d int32 tensor": torch.tensor(5, dtype=torch.int32),
    "tensor of one": torch.tensor([5]),
}
NOT_INTEGERS = [5.0, np.float32(5), torch.tensor(5.0), torch.tensor([5, 5]), True, torch.tensor(True), "5", None]
WINDOWS: dict[str, Any] = {
    "list": [2, 1],
    "tensor": torch.tensor([2, 1]),
    "numpy": np.array([2, 1]),
    "numpy integers": (np.int64(2), np.int32(1)),
    "tensors": (torch.tensor(2), torch.tensor([1])),
}


def rows(seed: int, head_dim: int = 8, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 2, head_dim, generator=generator).to(dtype) for _ in "qkv"]


LENGTHS = [5, 3]
CU = torch.tensor([0, 5, 8], dtype=torch.int32)


@pytest.mark.parametrize("five", FIVE.values(), ids=FIVE)
def test_max_seqlen(five: Any) -> None:
    q, k, v = rows(1)
    expected = flash_attn.flash_attn_varlen_func(q, k, v, CU, CU, 5, 5)
    assert torch.equal(flash_attn.flash_attn_varlen_func(q, k, v, CU, CU, five, five), expected)
    assert torch.equal(
        flash_attn.flash_attn_varlen_kvpacked_func(q, torch.stack([k, v], 1), CU, CU, five, five), expected
    )
    assert torch.equal(flash_attn.flash_attn_varlen_qkvpacked_func(torch.stack([q, k, v], 1), CU, five), expected)
    assert torch.equal(torch_varlen.varlen_attn(q, k, v, CU, CU, five, five), expected)


@pytest.mark.parametrize("wrong", NOT_INTEGERS, ids=repr)
def test_max_seqlen_that_is_no_integer(wrong: Any) -> None:
    q, k, v = rows(1)
    with pytest.raises(TypeError, match="flash_attn_varlen_func: max_seqlen_q must be an int, got"):
        flash_attn.flash_attn_varlen_func(q, k, v, CU, CU, wrong, 5)
    with pytest.raises(TypeError, match="flash_attn_varlen_qkvpacked_func: max_seqlen must be an int, got"):
        flash_attn.flash_attn_varlen_qkvpacked_func(torch.stack([q, k, v], 1), CU, wrong)
    with pytest.raises(TypeError, match="varlen_attn: max_k must be an int, got"):
        torch_varlen.varlen_attn(q, k, v, CU, CU, 5, wrong)
    with pytest.raises(TypeError, match=r"window_size\[0\] must be an int, got"):
        flash_attn.flash_attn_varlen_func(q, k, v, CU, CU, 5, 5, window_size=(wrong, 0))


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_window_size(window: Any) -> None:
    q, k, v = rows(2)
    expected = flash_attn.flash_attn_varlen_func(q, k, v, CU, CU, 5, 5, window_size=(2, 1))
    assert not torch.equal(flash_attn.flash_attn_varlen_func(q, k, v, CU, CU, 5, 5), expected)
    assert torch.equal(flash_attn.flash_attn_varlen_func(q, k, v, CU, CU, 5, 5, window_size=window), expected)
    assert torch.equal(torch_varlen.varlen_attn(q, k, v, CU, CU, 5, 5, window_size=window), expected)


@pytest.mark.parametrize("wrong", [3, (1,), [1, 2, 3], torch.tensor(3), torch.tensor([1.0, 2.0]), "12"], ids=repr)
def test_window_size_that_is_none(wrong: Any) -> None:
    q, k, v = rows(2)
    with pytest.raises(TypeError, match="flash_attn_varlen_func: window_size must be .left, right., got"):
        flash_attn.flash_attn_varlen_func(q, k, v, CU, CU, 5, 5, window_size=wrong)
    with pytest.raises(TypeError, match="varlen_attn: window_size must be .left, right., got"):
        torch_varlen.varlen_attn(q, k, v, CU, CU, 5, 5, window_size=wrong)


@pytest.mark.parametrize(
    "scale", [np.float32(0.25), np.float64(0.25), torch.tensor(0.25), torch.tensor([0.25])], ids=repr
)
def test_numbers(scale: Any) -> None:
    q, k, v = rows(3)
    expected = flash_attn.flash_attn_varlen_func(q, k, v, CU, CU, 5, 5, softmax_scale=0.25)
    none = 0 * scale
    found = flash_attn.flash_attn_varlen_func(q, k, v, CU, CU, 5, 5, none, scale, np.False_, softcap=none)
    assert torch.equal(found, expected)
    assert torch.equal(torch_varlen.varlen_attn(q, k, v, CU, CU, 5, 5, scale=scale), expected)
    capped = flash_attn.flash_attn_varlen_func(q, k, v, CU, CU, 5, 5, causal=True, softcap=0.25)
    found = flash_attn.flash_attn_varlen_func(q, k, v, CU, CU, 5, 5, causal=torch.tensor(True), softcap=scale)
    assert torch.equal(found, capped)


def test_numbers_that_are_none() -> None:
    q, k, v = rows(3)
    for wrong in ("1", [1.0], torch.ones(2), True, 1j):
        for name in ("softmax_scale", "softcap", "dropout_p"):
            with pytest.raises(TypeError, match=f"flash_attn_varlen_func: {name} must be a number, got"):
                flash_attn.flash_attn_varlen_func(q, k, v, CU, CU, 5, 5, **{name: wrong})
    with pytest.raises(ValueError, match="softmax_scale has no gradient"):
        flash_attn.flash_attn_varlen_func(q, k, v, CU, CU, 5, 5, softmax_scale=torch.ones((), requires_grad=True))
    with pytest.raises(NotImplementedError, match="dropout_p must be 0, got 0.5"):
        flash_attn.flash_attn_varlen_func(q, k, v, CU, CU, 5, 5, dropout_p=torch.tensor(0.5))


@pytest.mark.parametrize("softcap", [0, -1.0, np.float32(-2), torch.tensor(0.0)], ids=repr)
def test_softcap_that_is_not_positive_is_off(softcap: Any) -> None:
    q, k, v = rows(4)
    expected = flash_attn.flash_attn_varlen_func(q, k, v, CU, CU, 5, 5)
    assert torch.equal(flash_attn.flash_attn_varlen_func(q, k, v, CU, CU, 5, 5, softcap=softcap), expected)


def test_slopes_may_be_strided() -> None:
    q, k, v = rows(5)
    slopes = torch.tensor([[0.5, 0.1], [0.2, 0.3]]).t()
    expected = flash_attn.flash_attn_varlen_func(q, k, v, CU, CU, 5, 5, alibi_slopes=slopes.contiguous())
    assert torch.equal(flash_attn.flash_attn_varlen_func(q, k, v, CU, CU, 5, 5, alibi_slopes=slopes), expected)


def test_errors_name_the_function_that_was_called() -> None:
    """What only the op finds out comes in the words of the function, those found in its values too."""
    q, k, v = rows(6)
    three = torch.randn(8, 3, 8)
    dense = three[None]
    with pytest.raises(ValueError, match="^flash_attn_func: the 2 heads of q must be a multiple of the heads"):
        flash_attn.flash_attn_func(q[None], dense, dense)
    with pytest.raises(ValueError, match="^flash_attn_varlen_func: the 2 heads of q must be a multiple of the heads"):
        flash_attn.flash_attn_varlen_func(q, three, three, CU, CU, 5, 5)
    with pytest.raises(TypeError, match="^flash_attn_kvpacked_func: k and v must be float32 as q is"):
        flash_attn.flash_attn_kvpacked_func(q[None], torch.stack([k, v], 1)[None].half())
    with pytest.raises(TypeError, match="^flash_attn_varlen_qkvpacked_func: cu_seqlens must be int32 of shape"):
        flash_attn.flash_attn_varlen_qkvpacked_func(torch.stack([q, k, v], 1), CU.long(), 5)
    with pytest.raises(ValueError, match="^flash_attn_varlen_func: max_seqlen_q must be at least the longest"):
        flash_attn.flash_attn_varlen_func(q, k, v, CU, CU, 4, 5)
    with pytest.raises(TypeError, match="^flash_attn_qkvpacked_func: q must be float16, bfloat16"):
        flash_attn.flash_attn_qkvpacked_func(torch.stack([q, k, v], 1)[None].long())
    with pytest.raises(TypeError, match="^varlen_attn: cu_seq_k must be int32 of shape"):
        torch_varlen.varlen_attn(q, k, v, CU, CU.long(), 5, 5)
    with pytest.raises(ValueError, match="^varlen_attn: max_q must be at least the longest sequence of cu_seq_q, 5"):
        torch_varlen.varlen_attn(q, k, v, CU, CU, 4, 5)
    with pytest.raises(ValueError, match=r"^varlen_attn: key and value must both be of shape .* got key float32"):
        torch_varlen.varlen_attn(q, k[..., :4], v, CU, CU, 5, 5)


@pytest.mark.parametrize(("dtype", "head_dim", "seen"), [
    (torch.bfloat16, 12, 16), (torch.float16, 1, 8), (torch.float16, 24, 24), (torch.bfloat16, 250, 256),
    (torch.bfloat16, 260, 260), (torch.float32, 12, 12),
])  # fmt: skip
def test_head_sizes_that_kernels_do_not_take(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, head_dim: int, seen: int
) -> None:
    """The op sees a head size that its kernels take; results and gradients are those of the size given."""
    shapes: list[torch.Size] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, *args: Any, **how: Any) -> Any:
        shapes.extend(t.shape for t in (q, k, v))
        return inner(q, k, v, *args, **how)

    inner = _attention.varlen_attention
    monkeypatch.setattr(_attention, "varlen_attention", spy)
    inputs = [t.requires_grad_() for t in rows(7, head_dim, dtype)]
    out, lse, _ = flash_attn.flash_attn_varlen_func(*inputs, CU, CU, 5, 5, causal=True, return_attn_probs=True)
    assert [shape[-1] for shape in shapes] == [seen] * 3
    assert out.shape == inputs[0].shape and out.is_contiguous()
    torch_out = torch_varlen.varlen_attn(*inputs, CU, CU, 5, 5, window_size=(-1, 0))
    assert torch.equal(torch_out, out)
    dense = flash_attn.flash_attn_func(*(t[None, :5] for t in inputs), causal=True)
    assert shapes[-1][-1] == seen and dense.shape == (1, 5, 2, head_dim)
    truth = [t.detach().double().requires_grad_() for t in inputs]
    plain = [t.detach() for t in inputs]
    out64, lse64 = oracle.varlen_attention(*truth, LENGTHS, LENGTHS, causal=True)
    eager, eager_lse = oracle.varlen_attention(*plain, LENGTHS, LENGTHS, causal=True)
    assert_close("out", out, out64, eager)
    assert_close("lse", lse, lse64, eager_lse.float())
    dout = torch.ones_like(out)
    expected = torch.autograd.grad(out64, truth, dout.double())
    gradients = oracle.varlen_attention_gradients(dout, None, *plain, LENGTHS, LENGTHS, causal=True)
    for name, *grads in zip("qkv", torch.autograd.grad(out, inputs, dout), expected, gradients, strict=True):
        assert_close(f"d{name}", *grads, gradient=True)


def test_head_size_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast brings float32 to the kernels' dtypes inside of the op."""
    shapes: list[torch.Size] = []
    inner = _attention.varlen_attention
    monkeypatch.setattr(
        _attention, "varlen_attention", lambda q, *args, **how: (shapes.append(q.shape), inner(q, *args, **how))[1]
    )
    with torch.autocast("cpu", torch.bfloat16):
        out = flash_attn.flash_attn_varlen_func(*rows(8, 12), CU, CU, 5, 5)
    assert out.dtype == torch.bfloat16 and out.shape[-1] == 12 and shapes[0][-1] == 16


def test_compiled_whole() -> None:
    """One graph, with a head size that is filled up, numpy integers, and max_seqlen as a tensor."""
    q, k, v = rows(9, 12, torch.bfloat16)
    expected = flash_attn.flash_attn_varlen_func(q, k, v, CU, CU, 5, 5, causal=True)

    def call(longest: Any) -> Tensor:
        return flash_attn.flash_attn_varlen_func(q, k, v, CU, CU, longest, longest, causal=True, window_size=[-1, -1])

    def torch_call(longest: Any) -> Tensor:
        return torch_varlen.varlen_attn(q, k, v, CU, CU, longest, longest, window_size=(-1, 0))

    for function, longest in ((call, torch.tensor(5)), (torch_call, np.int64(5))):
        torch.compiler.reset()
        counter = Compilations()
        compiled = torch.compile(function, fullgraph=True, backend=counter)
        assert torch.equal(compiled(longest), expected) and counter.count == 1
