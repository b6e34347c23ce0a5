"""Products on a CPU: oneDNN, the way through float32 and the kernel for few rows, against F.linear and float64."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from helpers.compare import assert_close
from warpform import _hardware, _library, _torch_private
from warpform.nn import _product
from warpform.nn.feed_forward import FeedForward

# [rows, in, out]: odd ones, those that are rounded up to multiples of 16 and of 64, and more rows than are rounded.
SIZES = ((16, 8, 8), (17, 33, 5), (100, 48, 50), (300, 40, 24), (512, 16, 16), (515, 24, 40))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
needs_onednn = pytest.mark.skipif(_torch_private.onednn_linear() is None, reason="this torch has no oneDNN")
needs_kernels = pytest.mark.skipif(not _library.cpu_isa(), reason="there are no kernels for this CPU")


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """Forces the products of this file to be ours; the shapes of x of those that were, as they are computed."""
    monkeypatch.setenv("WARPFORM_ONEDNN", "1")
    monkeypatch.setattr(_product, "_lacks_products", lambda dtype: True)
    seen: list[tuple[int, ...]] = []
    multiply = _product._multiply

    def watched(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(tuple(x.shape))
        return multiply(x, *args, **kwargs)

    monkeypatch.setattr(_product, "_multiply", watched)
    yield seen


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """Products of few rows go to the kernel on any CPU, for weights of any size; the shapes of x of those."""
    for name in ("WARPFORM_ONEDNN", "WARPFORM_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(_product, "_is_amd", lambda: True)
    monkeypatch.setattr(_product, "_lacks_products", lambda dtype: True)
    monkeypatch.setattr(_product, "LEAST_WEIGHT", 1)
    monkeypatch.setattr(_product, "LEAST_WIDTH", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    seen: list[tuple[int, ...]] = []
    multiply = _product._multiply_few

    def watched(x: Tensor, *args: Any) -> Tensor:
        seen.append(tuple(x.shape))
        return multiply(x, *args)

    monkeypatch.setattr(_product, "_multiply_few", watched)
    yield seen


def draw(rows: int, width: int, out: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + width + out)
    shapes = ((rows, width), (out, width), (out,))
    x, weight, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return x, weight, bias


def gradients(function: Callable[..., Tensor], *tensors: Tensor | None, dout: Tensor) -> tuple[Tensor, ...]:
    """The result, and the gradients of the tensors that there are."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    out = function(*leaves)
    return (out.detach(), *torch.autograd.grad(out, [t for t in leaves if t is not None], dout.to(out.dtype)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("with_bias", (True, False))
def test_agrees_with_float64(
    size: tuple[int, int, int], dtype: torch.dtype, with_bias: bool, taken: list[tuple[int, ...]]
) -> None:
    x, weight, bias = draw(*size, dtype)
    given = (x, weight, bias if with_bias else None)
    dout = torch.randn(size[0], size[2], generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        out = _product.linear(*given)
    assert taken == [(size[0], size[1])] and out._base is None and out.is_contiguous()
    oracle = gradients(F.linear, *(None if t is None else t.double() for t in given), dout=dout)
    eager = gradients(F.linear, *given, dout=dout)
    ours = gradients(_product.linear, *given, dout=dout)
    assert_close("out", out, oracle[0], eager[0])
    assert_close("recorded out", ours[0], oracle[0], eager[0])
    for name, actual, exact, same in zip(("dx", "dweight", "dbias"), ours[1:], oracle[1:], eager[1:], strict=False):
        assert actual.dtype == dtype
        assert_close(name, actual, exact, same, gradient=True)


@needs_onednn
def test_float32_is_onednn_s(taken: list[tuple[int, ...]]) -> None:
    x, weight, bias = draw(100, 48, 50)
    product = _torch_private.onednn_linear()
    assert product is not None
    rounded = F.pad(x, (0, 0, 0, 12))
    assert torch.equal(_product.linear(x, weight, bias), product(rounded, weight, bias)[:100])


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_16_bits_are_rounded_once(dtype: torch.dtype, taken: list[tuple[int, ...]]) -> None:
    x, weight, bias = draw(64, 256, 16, dtype)
    out = _product.linear(x, weight, bias)
    exact = F.linear(x.double(), weight.double(), bias.double())
    half_unit = torch.finfo(dtype).eps * exact.abs() / 2
    assert ((out - exact).abs() <= half_unit * 1.01 + 1e-4).all()


def test_a_bias_with_strides(taken: list[tuple[int, ...]]) -> None:
    x, weight, _ = draw(64, 24, 40)
    for bias in (torch.arange(80.0)[::2], torch.ones(1).expand(40)):
        exact, eager = F.linear(x.double(), weight.double(), bias.double()), F.linear(x, weight, bias)
        with torch.inference_mode():
            assert_close("inference", _product.linear(x, weight, bias), exact, eager)
        assert_close("training", _product.linear(x, nn.Parameter(weight), bias).detach(), exact, eager)
    assert taken


@pytest.mark.parametrize("shape", ((2, 50, 24), (3, 2, 20, 24), (4, 4, 24)), ids=str)
def test_leading_axes(shape: tuple[int, ...], taken: list[tuple[int, ...]]) -> None:
    x, weight, bias = torch.randn(shape, generator=torch.Generator().manual_seed(0)), *draw(1, 24, 7)[1:]
    dout = torch.ones(*shape[:-1], 7)
    ours, eager = (gradients(f, x, weight, bias, dout=dout) for f in (_product.linear, F.linear))
    oracle = gradients(F.linear, x.double(), weight.double(), bias.double(), dout=dout)
    for name, actual, exact, same in zip(("out", "dx", "dweight", "dbias"), ours, oracle, eager, strict=True):
        assert_close(name, actual, exact, same, gradient=True)
    with torch.inference_mode():
        out = _product.linear(x, weight, bias)
    assert out.shape == dout.shape and taken
    assert_close("inference", out, oracle[0], eager[0])


def test_strided_operands(taken: list[tuple[int, ...]]) -> None:
    base = torch.randn(40, 60, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(40, 9, generator=torch.Generator().manual_seed(1)).t()
    for x in (base.t(), base.t()[:33], base[:, :40], base[:1].expand(30, 60)[:, 3:43]):
        before = len(taken)
        dout = torch.ones(()).expand(x.shape[0], 9)
        ours, eager = (gradients(f, x, weight, None, dout=dout) for f in (_product.linear, F.linear))
        oracle = gradients(F.linear, x.double(), weight.double(), None, dout=dout)
        assert len(taken) > before
        for name, actual, exact, same in zip(("out", "dx", "dweight"), ours, oracle, eager, strict=True):
            assert_close(name, actual, exact, same, gradient=True)


@pytest.mark.parametrize("wanted", range(8))
def test_computes_the_gradients_that_are_needed(wanted: int, taken: list[tuple[int, ...]]) -> None:
    tensors = [t.requires_grad_(bool(wanted >> i & 1)) for i, t in enumerate(draw(32, 24, 20))]
    out = _product.linear(*tensors)
    assert out.requires_grad == bool(wanted)
    if wanted:
        saved = [t for t in out.grad_fn.saved_tensors if t is not None]
        assert len(saved) == (wanted & 1) + (wanted >> 1 & 1)
        out.sum().backward()
    assert [t.grad is not None for t in tensors] == [bool(wanted >> i & 1) for i in range(3)]
    # The forward product, and one for each of dx and dweight.
    assert len(taken) == 1 + (wanted & 1) + (wanted >> 1 & 1)


def test_has_gradients_of_gradients(taken: list[tuple[int, ...]]) -> None:
    def second(function: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [t.to(dtype).requires_grad_() for t in draw(32, 24, 20)]
        first = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    ours = second(_product.linear, torch.float32)
    eager, oracle = (second(F.linear, dtype) for dtype in (torch.float32, torch.float64))
    assert len(taken) > 3
    for name, actual, exact, same in zip(("x", "weight", "bias"), ours, oracle, eager, strict=True):
        assert_close(name, actual, exact, same, gradient=True)


def test_hooks_of_a_parameter(taken: list[tuple[int, ...]]) -> None:
    x, weight, bias = draw(32, 24, 20)
    parameter, seen = nn.Parameter(weight), []
    parameter.register_hook(lambda grad: 2 * grad)
    parameter.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    _product.linear(x, parameter, bias).sum().backward()
    assert taken and len(seen) == 1
    assert_close("grad", seen[0], 2 * x.double().sum(0).expand(20, 24), 2 * x.sum(0).expand(20, 24), gradient=True)


def test_a_change_of_the_weight_before_the_backward_is_noticed(taken: list[tuple[int, ...]]) -> None:
    x, weight, bias = draw(32, 24, 20)
    x.requires_grad_()
    out = _product.linear(x, weight, bias)
    weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_results_may_be_changed_in_place(taken: list[tuple[int, ...]]) -> None:
    x, weight, bias = draw(33, 24, 20)
    scale = torch.ones(20, requires_grad=True)
    with torch.no_grad():
        outs = [_product.linear(x, weight, bias), _product.linear(x.view(3, 11, 24), weight, bias)]
    for out in outs:
        out.mul_(scale).sum().backward()
    parameter = weight.clone().requires_grad_()
    _product.linear(x.view(3, 11, 24), parameter, bias).mul_(2).sum().backward()
    assert scale.grad is not None and parameter.grad is not None


def test_under_activation_checkpointing(taken: list[tuple[int, ...]]) -> None:
    x, weight, bias = draw(32, 24, 20)
    plain = gradients(_product.linear, x, weight, bias, dout=torch.ones(32, 20))
    for reentrant in (False, True):
        again = gradients_of_checkpoint(x, weight, bias, reentrant)
        assert all(torch.equal(a, b) for a, b in zip(plain[1:], again, strict=True))


def gradients_of_checkpoint(x: Tensor, weight: Tensor, bias: Tensor, reentrant: bool) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    checkpoint(_product.linear, *leaves, use_reentrant=reentrant).sum().backward()
    return [t.grad for t in leaves]  # type: ignore[misc]


class Wrapped(torch.Tensor):
    """A subclass, as quantisation and sharding bring."""


class WrappedParameter(nn.Parameter):
    pass


@pytest.mark.parametrize(
    "case",
    (
        "fewer rows",
        "one row",
        "float64",
        "subclass",
        "parameter subclass",
        "autocast",
        "modes",
        "vmap",
        "forward mode",
        "traced",
        "compiled",
        "exported",
        "off",
        "torch's switch",
        "empty",
    ),
)
def test_leaves_the_rest_to_torch(case: str, taken: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = draw(32, 24, 20)
    linear = _product.linear
    if case == "fewer rows":
        x = x[:15]
    elif case == "one row":
        x = x[0]
    elif case == "float64":
        x, weight, bias = x.double(), weight.double(), bias.double()
    elif case == "subclass":
        weight = weight.as_subclass(Wrapped)
    elif case == "parameter subclass":
        weight = WrappedParameter(weight)
    elif case == "off":
        monkeypatch.setenv("WARPFORM_ONEDNN", "0")
        assert torch.equal(linear(x.half(), weight.half()), F.linear(x.half(), weight.half()))
    elif case == "empty":
        weight, bias = weight[:0], bias[:0]
    expected = F.linear(x, weight, bias)
    if case == "autocast":
        with torch.autocast("cpu"):
            out, expected = linear(x, weight, bias), F.linear(x, weight, bias)
        assert out.dtype == torch.bfloat16
    elif case == "modes":
        with FlopCounterMode(display=False) as counter:
            out = linear(x, weight, bias)
        assert counter.get_total_flops() == 2 * 32 * 24 * 20
    elif case == "vmap":
        out = torch.vmap(lambda one: linear(one, weight, bias))(x.expand(2, 32, 24))[1]
    elif case == "forward mode":
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            out, tangent = torch.autograd.forward_ad.unpack_dual(linear(dual, weight, bias))
        assert tangent is not None
    elif case == "traced":
        out = torch.jit.trace(lambda one: linear(one, weight, bias), x, check_trace=False)(x)
    elif case == "compiled":
        out = torch.compile(lambda one: linear(one, weight, bias), backend="eager", fullgraph=True)(x)
    elif case == "exported":
        module = FeedForward(24, 20)
        graph = torch.export.export(module, (x,)).graph_module
        names = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
        assert any("linear" in name for name in names) and not any("mkldnn" in name for name in names)
        out = expected
    elif case == "torch's switch":
        with torch.backends.mkldnn.flags(enabled=False):
            out = linear(x, weight, bias)
    else:
        out = linear(x, weight, bias)
    assert not taken
    assert torch.equal(torch.Tensor(out) if case == "subclass" else out, expected)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", range(1, 9))
@pytest.mark.parametrize("size", ((1, 1), (33, 5), (520, 70)), ids=str)
def test_few_rows_agree_with_float64(
    rows: int, size: tuple[int, int], dtype: torch.dtype, few: list[tuple[int, ...]]
) -> None:
    x, weight, bias = draw(rows, *size, dtype)
    for given in ((x, weight, bias), (x, weight, None)):
        with torch.inference_mode():
            out = _product.linear(*given)
        oracle = F.linear(*(None if t is None else t.double() for t in given))
        assert few.pop() == (rows, size[0]) and out._base is None and out.is_contiguous() and out.dtype == dtype
        assert_close("out", out, oracle, F.linear(*given))


@needs_kernels
def test_few_rows_in_any_layout(few: list[tuple[int, ...]]) -> None:
    generator = torch.Generator().manual_seed(0)
    base, large = torch.randn(40, 60, generator=generator), torch.randn(90, 64, generator=generator)
    for x, weight, bias in (
        (base[:4, :24].unflatten(0, (2, 2)), large[:50, 3:27], large[:50, 0]),
        (base.t()[:3, :33], large[::2, :33], large[0, :1].expand(45)),
        (base[:1].expand(6, 60)[:, 3:43], large[:7, :40], None),
        (base[::20].view(2, 1, 1, 60), large[:, :60], large.view(-1)[::64]),
    ):
        with torch.no_grad():
            out = _product.linear(x, weight, bias)
        assert few.pop() == (x.shape.numel() // x.shape[-1], x.shape[-1])
        assert out.shape == (*x.shape[:-1], weight.shape[0])
        exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        assert_close("out", out, exact, F.linear(x, weight, bias))
        # The result is no view: it may be changed in place where gradients are recorded.
        scale = torch.ones((), requires_grad=True)
        out.mul_(scale).sum().backward()


@needs_kernels
@pytest.mark.parametrize(
    "case",
    (
        "nine rows",
        "no row",
        "one dimension",
        "gradient of x",
        "gradient of weight",
        "gradient of bias",
        "small weight",
        "few columns",
        "few outputs",
        "one row in one thread",
        "not AMD",
        "transposed weight",
        "float64",
        "subclass",
        "autocast",
        "modes",
        "compiled",
        "reference",
        "off",
        "no kernels",
        "own products",
    ),
)
def test_leaves_other_few_rows_to_torch(case: str, few: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = draw(9 if case == "nine rows" else 4, 24, 20)
    dtype = torch.float32
    if case == "no row":
        x = x[:0]
    elif case == "one dimension":
        x = x[0]
    elif case.startswith("gradient"):
        {"x": x, "weight": weight, "bias": bias}[case.split()[-1]].requires_grad_()
    elif case == "small weight":
        monkeypatch.setattr(_product, "LEAST_WEIGHT", 24 * 20 + 1)
    elif case == "few columns":
        monkeypatch.setattr(_product, "LEAST_WIDTH", 21)
        x, weight, bias = draw(4, 20, 24)
    elif case == "few outputs":
        monkeypatch.setattr(_product, "LEAST_WIDTH", 21)
    elif case == "one row in one thread":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        x = x[:1]
    elif case == "not AMD":
        monkeypatch.setattr(_product, "_is_amd", lambda: False)
    elif case == "transposed weight":
        weight = weight.t().contiguous().t()
    elif case == "float64":
        dtype = torch.float64
    elif case == "subclass":
        weight = weight.as_subclass(Wrapped)
    elif case == "reference":
        monkeypatch.setenv("WARPFORM_BACKEND", "reference")
    elif case == "off":
        monkeypatch.setenv("WARPFORM_ONEDNN", "0")
    elif case == "no kernels":
        monkeypatch.setattr(_product, "_has_kernels", lambda: False)
    elif case == "own products":
        monkeypatch.setattr(_product, "_lacks_products", lambda dtype: False)
        dtype = torch.bfloat16
    x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)

    def call(function: Callable[..., Tensor]) -> Tensor:
        if case == "compiled":
            return torch.compile(function, backend="eager", fullgraph=True)(x, weight, bias)
        with contextlib.ExitStack() as stack:
            if case == "autocast":
                stack.enter_context(torch.autocast("cpu"))
            elif case == "modes":
                stack.enter_context(FlopCounterMode(display=False))
            return function(x, weight, bias)

    out, expected = call(_product.linear), call(F.linear)
    assert not few
    assert out.requires_grad == expected.requires_grad == case.startswith("gradient")
    assert torch.equal(out.as_subclass(Tensor), expected.as_subclass(Tensor))


@needs_kernels
def test_few_rows_of_which_nothing_is_recorded_go_to_the_kernel(
    few: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `test_leaves_other_few_rows_to_torch` changes is what keeps the kernel away."""
    x, weight, bias = draw(4, 24, 20)
    _product.linear(x, weight, bias)
    monkeypatch.setattr(_product, "LEAST_WEIGHT", 24 * 20)
    monkeypatch.setattr(_product, "LEAST_WIDTH", 20)
    with torch.no_grad():
        _product.linear(x, nn.Parameter(weight), bias)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        _product.linear(x[:2], weight, bias)
    assert few == [(4, 24), (4, 24), (2, 24)]


@needs_onednn
def test_onednn_gets_no_columns_of_a_wider_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU with AVX2 it would multiply them a thousand times slower."""
    monkeypatch.setenv("WARPFORM_ONEDNN", "1")
    product, weights = _torch_private.onednn_linear(), []

    def watched(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        weights.append(weight)
        return product(x, weight, bias)

    monkeypatch.setattr(_torch_private, "onednn_linear", lambda: watched)
    x, wide, dout = torch.randn(32, 24), torch.randn(20, 48).requires_grad_(), torch.randn(32, 20)
    for own in (wide[:, :24], wide[:, 24:]):
        gradients(_product.linear, x, own, None, dout=dout)
    columns = x.repeat(1, 2)[:, 12:36]
    (found,) = torch.autograd.grad(_product.linear(columns, wide[:, :24]), wide, dout)
    exact = dout.double().t() @ columns.double()
    assert_close("dweight", found[:, :24], exact, dout.t() @ columns, gradient=True)
    assert len(weights) == 2 * 3 + 2
    assert all(weight.is_contiguous() or weight.t().is_contiguous() for weight in weights)


def test_wrong_arguments_get_torch_s_errors(taken: list[tuple[int, ...]]) -> None:
    x, weight, bias = draw(32, 24, 20)
    for args in ((x[:, :20], weight, bias), (x, weight, bias[:7]), (x, weight.double(), bias), (x, weight[None], bias)):
        with pytest.raises(RuntimeError) as expected:
            F.linear(*args)
        with pytest.raises(RuntimeError) as found:
            _product.linear(*args)
        assert str(found.value) == str(expected.value)
    assert not taken


def test_gradients_of_several_outputs_at_once(taken: list[tuple[int, ...]]) -> None:
    x, weight, bias = draw(32, 24, 20)
    x.requires_grad_()
    douts = torch.eye(20)[:3, None].expand(3, 32, 20)
    (found,) = torch.autograd.grad(_product.linear(x, weight, bias), x, douts, is_grads_batched=True)
    assert torch.allclose(found, weight[:3, None].expand(3, 32, 24))


def test_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    amd, intel = ("AuthenticAMD", frozenset({"avx2", "avx512f"})), ("GenuineIntel", frozenset({"avx2", "avx512f"}))
    for features, setting, expected in (
        (amd, "", True),
        (amd, "auto", True),
        (amd, "0", False),
        (intel, "", False),
        (intel, "1", _torch_private.onednn_linear() is not None),
        (("AuthenticAMD", frozenset({"avx2"})), "", False),
        (("", frozenset()), "", False),
    ):
        _product._has_faster_onednn.cache_clear()
        monkeypatch.setattr(_hardware, "cpu_features", lambda features=features: features)
        monkeypatch.setenv("WARPFORM_ONEDNN", setting)
        assert _product.takes_onednn() == (expected and _torch_private.onednn_linear() is not None)
    _product._has_faster_onednn.cache_clear()


@pytest.mark.parametrize(
    ("features", "float16", "bfloat16"),
    (
        (("avx2",), True, True),
        (("avx2", "avx512f", "avx512_bf16"), True, False),
        (("avx2", "avx512_fp16", "avx512_bf16"), False, False),
        (("amx_bf16", "avx2"), True, False),
        ((), False, False),
    ),
)
def test_16_bits_go_through_float32_where_the_cpu_lacks_them(
    features: tuple[str, ...], float16: bool, bfloat16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WARPFORM_ONEDNN", raising=False)
    monkeypatch.setattr(_hardware, "cpu_features", lambda: ("any", frozenset(features)))
    _product._lacks_products.cache_clear()
    assert _product._through_float32(torch.float16) is float16
    assert _product._through_float32(torch.bfloat16) is bfloat16
    monkeypatch.setenv("WARPFORM_ONEDNN", "0")
    assert not _product._through_float32(torch.float16)
    _product._lacks_products.cache_clear()


def test_modules_go_the_same_way(taken: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    x, module = torch.randn(600, 24), FeedForward(24, 20)
    wide = copy.deepcopy(module).double()
    recorded, _ = module(x)
    # Both products, with all rows at once where gradients are recorded, and in blocks where not.
    assert taken == [(600, 24), (600, 20)]
    taken.clear()
    with torch.no_grad():
        out, _ = module(x)
        eager = F.linear(F.gelu(F.linear(x, module.up.weight, module.up.bias)), module.down.weight, module.down.bias)
        oracle, _ = wide(x.double())
    assert taken == [(512, 24), (512, 20), (88, 24), (88, 20)]
    assert_close("inference", out, oracle, eager)
    assert_close("recorded", recorded, oracle, eager)
    taken.clear()
    linear = nn.Linear(24, 20)
    _product.product(x, linear), _product.apply_linear(x, linear), _product.product_with_bias(x, linear, None)
    assert len(taken) == 3
    linear.register_forward_hook(lambda module, args, out: None)
    _product.product(x, linear), _product.apply_linear(x, linear), _product.product_with_bias(x, linear, None)
    assert len(taken) == 3


def test_an_op_with_another_schema_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    _torch_private.onednn_linear.cache_clear()
    monkeypatch.setattr(_torch_private, "_LINEAR_ARGUMENTS", ["Tensor"])
    assert _torch_private.onednn_linear() is None
    _torch_private.onednn_linear.cache_clear()
