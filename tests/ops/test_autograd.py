"""Gradients through the public functions, and errors where there are none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from helpers import cases
from warpform import ops

CU = cases.offsets([3, 0, 4])
SLOPES = torch.tensor([0.5, 0.1])


def attend(q: Tensor, k: Tensor, v: Tensor, **how: object) -> tuple[Tensor, Tensor]:
    return ops.varlen_attention(q, k, v, CU, CU, 4, 4, return_lse=True, **how)


@pytest.mark.sampled
@pytest.mark.parametrize(
    "how",
    (
        {},
        {"causal": True},
        {"window_size": (1, 1)},
        {"softcap": 0.8},
        {"alibi_slopes": SLOPES, "causal": True},
        {"softmax_scale": 0.7, "softcap": 1.1, "window_size": (2, 0), "alibi_slopes": SLOPES},
    ),
    ids=("plain", "causal", "window", "softcap", "alibi", "everything"),
)
@pytest.mark.parametrize("kv_heads", (1, 2))
def test_gradcheck_of_attention_and_its_lse(how: dict[str, object], kv_heads: int) -> None:
    q = torch.randn(7, 2, 4, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(7, kv_heads, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda *qkv: attend(*qkv, **how), (q, k, v))


def test_gradcheck_of_lse_alone() -> None:
    q, k, v = (torch.randn(7, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradcheck(lambda q, k: attend(q, k, v.detach())[1], (q, k))


def attend_disentangled(
    q: Tensor, k: Tensor, v: Tensor, *tables: Tensor | None, **how: object
) -> tuple[Tensor, Tensor]:
    return ops.disentangled_attention(q, k, v, *(tables or (None, None)), CU, 4, return_lse=True, **how)


@pytest.mark.sampled
@pytest.mark.parametrize(
    "how",
    (
        {},
        {"position_buckets": 4, "max_relative_positions": 5},
        {"positions": torch.tensor([0, 2, 5, 1, 2, 6, 7]), "softmax_scale": 0.7},
    ),
    ids=("plain", "buckets", "positions"),
)
@pytest.mark.parametrize("terms", ("both", "key", "query", "neither"))
def test_gradcheck_of_disentangled_attention(how: dict[str, object], terms: str) -> None:
    q, k, v = (torch.randn(7, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    pos_key, pos_query = (torch.randn(6, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    tables = (
        pos_key if terms in ("both", "key") else None,
        pos_query if terms in ("both", "query") else None,
    )
    assert torch.autograd.gradcheck(lambda *t: attend_disentangled(*t, **how)[0], (q, k, v, *tables))


def test_lse_of_disentangled_attention_has_no_gradient() -> None:
    q = torch.randn(7, 2, 4, requires_grad=True)
    table = torch.randn(6, 2, 4, requires_grad=True)
    out, lse = attend_disentangled(q, q.detach(), q.detach(), table, None)
    assert out.requires_grad and not lse.requires_grad
    out.sum().backward()
    assert q.grad is not None and table.grad is not None


@pytest.mark.parametrize("return_sum", (False, True))
@pytest.mark.parametrize("given", ("all", "no bias", "no residual", "neither"))
def test_gradcheck_of_layer_norm(return_sum: bool, given: str) -> None:
    x, residual = (torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    bias, weight, ln_bias = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(3))
    inputs = (
        x,
        bias if given in ("all", "no residual") else None,
        residual if given in ("all", "no bias") else None,
        weight,
        ln_bias,
    )
    function = ops.add_bias_residual_layer_norm
    assert torch.autograd.gradcheck(lambda *t: function(*t, 1e-3, return_sum=return_sum), inputs)


def test_layer_norm_recomputes_a_sum_that_was_not_kept() -> None:
    tensors = [torch.randn(3, 5, requires_grad=True) for _ in range(2)]
    bias, weight, ln_bias = (torch.randn(5, requires_grad=True) for _ in range(3))
    inputs = (tensors[0], bias, tensors[1], weight, ln_bias)
    kept = ops.add_bias_residual_layer_norm(*inputs)
    again = torch.ops.warpform.add_bias_residual_layer_norm(*inputs)[0]
    dout = torch.randn(3, 5)
    for one, other in zip(*(torch.autograd.grad(out, inputs, dout) for out in (kept, again)), strict=True):
        torch.testing.assert_close(one, other)


def test_x_and_residual_of_layer_norm_share_no_gradient() -> None:
    """The formula hands one tensor to both, as that of torch's add does: leaves must not end up with one memory."""
    x, residual = (torch.randn(3, 5, requires_grad=True) for _ in range(2))
    weight = torch.randn(5)

    def backward() -> None:
        ops.add_bias_residual_layer_norm(x, None, residual, weight, weight).square().sum().backward()

    def gradients() -> tuple[Tensor, Tensor]:
        assert x.grad is not None and residual.grad is not None
        return x.grad, residual.grad

    backward()
    of_x, of_residual = gradients()
    once = of_x.clone()
    assert torch.equal(of_residual, once) and of_x.data_ptr() != of_residual.data_ptr()
    backward()  # adds in place
    assert torch.equal(gradients()[0], 2 * once) and torch.equal(gradients()[1], 2 * once)
    with torch.no_grad():
        gradients()[0].zero_()
    assert torch.equal(gradients()[1], 2 * once)


def test_gradients_of_layer_norm_add_up_where_residual_goes_on() -> None:
    """The gradient of x goes through a layer whose gradient comes back to residual."""
    x, residual = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(5, dtype=torch.float64)

    def function(x: Tensor, residual: Tensor) -> Tensor:
        hidden = ops.add_bias_residual_layer_norm(residual.sin() * x, None, residual, weight, weight)
        return ops.add_bias_residual_layer_norm(hidden, None, hidden, weight, weight)

    assert torch.autograd.gradcheck(function, (x, residual))


@pytest.mark.parametrize("return_sum", (False, True))
@pytest.mark.parametrize("with_residual", (False, True))
def test_gradcheck_of_rms_norm(return_sum: bool, with_residual: bool) -> None:
    x, residual = (torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    inputs = (x, residual if with_residual else None, torch.randn(5, dtype=torch.float64, requires_grad=True))
    function = ops.add_residual_rms_norm
    assert torch.autograd.gradcheck(lambda *t: function(*t, 1e-3, return_sum=return_sum), inputs)


def test_rms_norm_recomputes_a_sum_that_was_not_kept() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        shapes = ((3, 5), (3, 5), (5,))
        inputs = tuple(torch.randn(shape).to(dtype).requires_grad_() for shape in shapes)
        kept = ops.add_residual_rms_norm(*inputs)
        again = torch.ops.warpform.add_residual_rms_norm(*inputs)[0]
        dout = torch.randn(3, 5).to(dtype)
        for one, other in zip(*(torch.autograd.grad(out, inputs, dout) for out in (kept, again)), strict=True):
            torch.testing.assert_close(one, other)


def test_a_sum_alone_has_a_gradient() -> None:
    """Of a pre-norm layer whose normalised output is not used: the gradient of the sum is that of both terms."""
    x, residual = (torch.randn(3, 5, requires_grad=True) for _ in range(2))
    with torch.no_grad():
        x[1, 2] = torch.nan  # the norm of this row is NaN, the gradient of its sum is not
    weight = torch.randn(5, requires_grad=True)
    _, total = ops.add_residual_rms_norm(x, residual, weight, return_sum=True)
    dsum = torch.randn(3, 5)
    *found, none = torch.autograd.grad(total, (x, residual, weight), dsum, allow_unused=True)
    assert none is None
    for g in found:
        assert torch.equal(g, dsum)


@pytest.mark.parametrize("approximate", ("none", "tanh"))
@pytest.mark.parametrize(("scale", "eps"), ((None, 0.0), (2.0, 0.3), (-1.5, 0.0), (0.0, 0.0)))
def test_gradcheck_of_rms_norm_gelu(approximate: str, scale: float | None, eps: float) -> None:
    x = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.rms_norm_gelu(x, scale, eps, approximate), x)


@pytest.mark.parametrize("approximate", ("none", "tanh"))
@pytest.mark.parametrize("with_bias", (False, True))
def test_gradcheck_of_gelu(approximate: str, with_bias: bool) -> None:
    x = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True) if with_bias else None
    assert torch.autograd.gradcheck(lambda x, bias: ops.bias_gelu(x, bias, approximate), (x, bias))


def test_gradcheck_of_packing() -> None:
    mask = torch.tensor([[1, 0, 1], [0, 1, 1]])
    _, _, indices, _, ranks, _ = ops.packing_plan(mask, 6)
    x = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    t = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.pack(x, indices, ranks), x)
    assert torch.autograd.gradcheck(lambda t: ops.unpack(t, indices, ranks), t)
    assert torch.autograd.gradgradcheck(lambda x: ops.pack(x, indices, ranks).sin(), x)


def test_only_gradients_that_are_needed() -> None:
    q, k, v = (torch.randn(7, 2, 4) for _ in range(3))
    out, lse = attend(q, k.requires_grad_(), v)
    assert out.requires_grad and lse.requires_grad
    out.sum().backward()
    assert k.grad is not None and q.grad is None and v.grad is None
    with torch.no_grad():
        assert not attend(q, k, v)[0].requires_grad


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "varlen_attention": lambda q: attend(q, q, q)[0],
    "disentangled_attention": lambda q: attend_disentangled(q, q, q, q[:6], q[:6])[0],
    "add_bias_residual_layer_norm": lambda x: ops.add_bias_residual_layer_norm(x, None, x, x[0, 0], x[0, 0]),
    "add_residual_rms_norm": lambda x: ops.add_residual_rms_norm(x, x, x[0, 0]),
    "rms_norm_gelu": ops.rms_norm_gelu,
    "bias_gelu": lambda x: ops.bias_gelu(x, None),
}
each_function = pytest.mark.parametrize("name", FUNCTIONS)


@each_function
def test_double_backward_raises(name: str) -> None:
    x = torch.randn(7, 2, 4, requires_grad=True)
    (g,) = torch.autograd.grad(FUNCTIONS[name](x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{name}: double backward is not implemented"):
        (g * g).sum().backward()


@each_function
def test_forward_mode_raises(name: str) -> None:
    x = torch.randn(7, 2, 4)
    with forward_ad.dual_level():
        FUNCTIONS[name](x)  # no tangent, no objection
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        for run in (FUNCTIONS[name], torch.no_grad()(FUNCTIONS[name])):
            with pytest.raises(NotImplementedError, match=f"{name}: forward-mode"):
                run(dual)


@each_function
def test_func_transforms_raise(name: str) -> None:
    x = torch.randn(7, 2, 4)
    with pytest.raises(NotImplementedError, match=f"{name}: torch.func transforms"):
        torch.func.grad(lambda x: FUNCTIONS[name](x).sum())(x)
    with pytest.raises(NotImplementedError, match=f"{name}: forward-mode|{name}: torch.func"):
        torch.func.jvp(FUNCTIONS[name], (x,), (x,))


def test_slopes_have_no_gradient() -> None:
    q = torch.randn(7, 2, 4)
    slopes = SLOPES.clone().requires_grad_()
    with pytest.raises(ValueError, match=r"alibi_slopes has no gradient; pass alibi_slopes.detach\(\)"):
        attend(q, q, q, alibi_slopes=slopes)
    with pytest.raises(ValueError, match="alibi_slopes has no gradient"):
        torch.ops.warpform.varlen_attention(q, q, q, CU, CU, 4, 4, alibi_slopes=slopes)


@pytest.mark.parametrize("asked", ("argument", "torch"))
def test_determinism_is_passed_on(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from warpform.ops import attention

    seen = []
    for name in ("_varlen_attention", "_varlen_attention_backward"):
        op = getattr(attention, name)
        monkeypatch.setattr(
            attention, name, lambda *a, op=op, **how: seen.append(how["deterministic"]) or op(*a, **how)
        )
    q = torch.randn(7, 2, 4, requires_grad=True)
    attend(q, q, q)[0].sum().backward()
    assert seen == [False, False]
    if asked == "argument":
        attend(q, q, q, deterministic=True)[0].sum().backward()
    else:
        out = attend(q, q, q)[0].sum()
        torch.use_deterministic_algorithms(True)
        try:
            out.backward()
            attend(q, q, q)
        finally:
            torch.use_deterministic_algorithms(False)
        seen.pop(2)  # the forward before it was asked for
    assert seen[2:] == [True, True]


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast(dtype: torch.dtype) -> None:
    q = torch.randn(7, 2, 4, requires_grad=True)
    x, residual = torch.randn(3, 8), torch.randn(3, 8, dtype=dtype)
    weight, bias = torch.randn(8, requires_grad=True), torch.randn(8, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        out, lse = attend(q, q, q, alibi_slopes=SLOPES)
        normal = ops.add_bias_residual_layer_norm(x, bias, residual, weight, weight)
        gelu = ops.bias_gelu(x, bias)
        rms = ops.add_residual_rms_norm(x, residual, weight)
        rms_gelu = ops.rms_norm_gelu(x)
        apart, apart_lse = attend_disentangled(q, q, q.to(dtype), q[:6], q[:6])
        assert attend(*(t.double() for t in (q, q, q)))[0].dtype == torch.float64
        mixed, _ = attend(q, q.to(dtype), q)
    assert out.dtype == mixed.dtype == normal.dtype == gelu.dtype == apart.dtype == dtype
    assert lse.dtype == apart_lse.dtype == torch.float32
    low = q.to(dtype)
    assert torch.equal(apart, attend_disentangled(low, low, low, low[:6], low[:6])[0])
    half = attend(*(t.to(dtype) for t in (q, q, q)), alibi_slopes=SLOPES)[0]
    assert torch.equal(out, half)
    assert torch.equal(gelu, ops.bias_gelu(x.to(dtype), bias))
    assert rms.dtype == rms_gelu.dtype == dtype
    assert torch.equal(rms, ops.add_residual_rms_norm(x.to(dtype), residual, weight))
    assert torch.equal(rms_gelu, ops.rms_norm_gelu(x.to(dtype)))
    sum(t.float().sum() for t in (out, normal, gelu, apart)).backward()
    assert q.grad.dtype == weight.grad.dtype == bias.grad.dtype == torch.float32
