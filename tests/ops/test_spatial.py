"""pool_mixer and depthwise_conv2d as functions: torch's own layers, gradients, autocast, errors, compile and export."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import opcheck

from helpers import spatial as helpers
from helpers.compilations import Compilations
from warpform import ops

OPS = torch.ops.warpform


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def agree(one: Tensor, other: Tensor) -> None:
    """Two computations in float64."""
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


# ---- what others call it ----


@pytest.mark.parametrize("scaled", (False, True), ids=("", "scaled"))
@pytest.mark.parametrize("pool_size", (1, 3, 5, 9))
def test_pool_mixer_is_a_group_norm_and_a_pool(pool_size: int, scaled: bool) -> None:
    """Also with a bias, which changes nothing and whose gradient is 0."""
    norm = torch.nn.GroupNorm(1, 6, eps=1e-3).double()
    pool = torch.nn.AvgPool2d(pool_size, stride=1, padding=pool_size // 2, count_include_pad=False)
    x, scale, weight = leaf(3, 7, 4, 6), leaf(6) if scaled else None, leaf(6)
    norm.weight = torch.nn.Parameter(weight.detach().clone())
    torch.nn.init.normal_(norm.bias)

    out = ops.pool_mixer(x, weight, scale, pool_size=pool_size, eps=1e-3)
    n = norm(x.permute(0, 3, 1, 2))
    mixed = (pool(n) - n).permute(0, 2, 3, 1)
    expected = x + (mixed if scale is None else scale * mixed)
    agree(out, expected)

    dout = torch.randn_like(out)
    others = [] if scale is None else [scale]
    found = torch.autograd.grad(out, [x, weight, *others], dout)
    truths = torch.autograd.grad(expected, [x, norm.weight, *others, norm.bias], dout)
    for one, other in zip(found, truths, strict=False):
        agree(one, other)
    assert truths[-1].abs().max() < 1e-12


@pytest.mark.slow
def test_pool_mixer_is_that_of_transformers() -> None:
    from transformers.models.poolformer import modeling_poolformer as published

    norm, pool = published.PoolFormerGroupNorm(8).double(), published.PoolFormerPooling(3)
    torch.nn.init.normal_(norm.weight)
    scale, x = torch.randn(8, dtype=torch.float64), torch.randn(2, 6, 5, 8, dtype=torch.float64)
    expected = x + (pool(norm(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)) * scale
    agree(ops.pool_mixer(x, norm.weight, scale, eps=norm.eps), expected)


@pytest.mark.parametrize("activation", helpers.ACTIVATIONS)
@pytest.mark.parametrize("size", (1, 3, 7))
@pytest.mark.parametrize("biased", (False, True), ids=("", "bias"))
def test_depthwise_conv2d_is_conv2d(size: int, activation: str, biased: bool) -> None:
    act = {"linear": lambda t: t, "gelu": torch.nn.functional.gelu, "relu": torch.nn.functional.relu}[activation]
    x, weight, bias = leaf(2, 6, 4, 5), leaf(5, size, size), leaf(5) if biased else None
    out = ops.depthwise_conv2d(x, weight, bias, activation=activation)
    convolved = torch.conv2d(x.permute(0, 3, 1, 2), weight.unsqueeze(1), bias, padding=size // 2, groups=5)
    expected = act(convolved).permute(0, 2, 3, 1)
    agree(out, expected)
    leaves = [t for t in (x, weight, bias) if t is not None]
    dout = torch.randn_like(out)
    for one, other in zip(*(torch.autograd.grad(o, leaves, dout) for o in (out, expected)), strict=True):
        agree(one, other)


@pytest.mark.slow
def test_depthwise_conv2d_is_that_of_segformer() -> None:
    from transformers.models.segformer.modeling_segformer import SegformerDepthWiseConv

    conv = SegformerDepthWiseConv(dim=12).double()
    x = torch.randn(2, 5, 6, 12, dtype=torch.float64)
    expected = torch.nn.functional.gelu(conv(x.flatten(1, 2), 5, 6)).view_as(x)
    agree(ops.depthwise_conv2d(x, conv.dwconv.weight.squeeze(1), conv.dwconv.bias, activation="gelu"), expected)


# ---- meaning ----


def test_a_sample_is_mixed_by_itself() -> None:
    x, weight = leaf(4, 5, 6, 3), leaf(3)
    whole = ops.pool_mixer(x, weight)
    for b in range(4):
        agree(whole[b : b + 1], ops.pool_mixer(x[b : b + 1], weight))


def test_turning_the_image_turns_the_result() -> None:
    """Pooling knows no direction; taps turned with the image give the turned convolution."""
    x, weight, taps = leaf(2, 5, 6, 3), leaf(3), leaf(3, 5, 5)
    agree(ops.pool_mixer(x.transpose(1, 2), weight), ops.pool_mixer(x, weight).transpose(1, 2))
    agree(ops.pool_mixer(x.flip(1), weight), ops.pool_mixer(x, weight).flip(1))
    agree(ops.depthwise_conv2d(x.flip(1), taps.flip(1)), ops.depthwise_conv2d(x, taps).flip(1))
    agree(ops.depthwise_conv2d(x.transpose(1, 2), taps.mT), ops.depthwise_conv2d(x, taps).transpose(1, 2))


def test_parameters_of_float32_beside_16_bits() -> None:
    x, weight, scale = torch.randn(2, 5, 6, 8).bfloat16(), torch.randn(8), torch.randn(8)
    leaves = [t.requires_grad_() for t in (x, weight, scale)]
    out = ops.pool_mixer(*leaves)
    assert out.dtype == torch.bfloat16
    gradients = torch.autograd.grad(out.float().square().sum(), leaves)
    assert [g.dtype for g in gradients] == [torch.bfloat16, torch.float32, torch.float32]
    # Rounded once: float32 inputs of the same values give the same numbers before that.
    torch.testing.assert_close(out.float(), ops.pool_mixer(x.float(), weight, scale).bfloat16().float())


# ---- gradients ----

Case = tuple[Callable[..., Tensor], tuple[tuple[int, ...] | None, ...], dict[str, Any]]
CALLS: dict[str, Case] = {
    "pool_mixer": (ops.pool_mixer, ((2, 3, 4, 2), (2,), (2,)), {"eps": 0.1}),
    "pool_mixer_unscaled": (ops.pool_mixer, ((2, 4, 2, 3), (3,)), {"pool_size": 5, "eps": 0.1}),
    "depthwise_conv2d": (ops.depthwise_conv2d, ((2, 3, 4, 2), (2, 3, 3), (2,)), {"activation": "gelu"}),
    "depthwise_conv2d_linear": (ops.depthwise_conv2d, ((1, 4, 2, 3), (3, 5, 5)), {}),
    "depthwise_conv2d_relu": (ops.depthwise_conv2d, ((2, 2, 3, 2), (2, 3, 3), (2,)), {"activation": "relu"}),
}
by_call = pytest.mark.parametrize("call", CALLS)


def tensors(call: str, dtype: torch.dtype = torch.float64, grad: bool = True) -> list[Tensor | None]:
    return [None if shape is None else torch.randn(*shape, dtype=dtype, requires_grad=grad) for shape in CALLS[call][1]]


@by_call
def test_gradcheck(call: str) -> None:
    function, _, how = CALLS[call]
    assert torch.autograd.gradcheck(lambda *t: function(*t, **how), tuple(tensors(call)))


@by_call
def test_only_gradients_that_are_needed(call: str) -> None:
    function, shapes, how = CALLS[call]
    for wanted in range(len(shapes)):
        inputs = tensors(call, grad=False)
        inputs[wanted].requires_grad_()
        function(*inputs, **how).square().sum().backward()
        assert [t.grad is not None for t in inputs] == [i == wanted for i in range(len(inputs))]


@pytest.mark.parametrize("call", ("pool_mixer", "depthwise_conv2d"))
def test_what_has_no_derivative_raises(call: str) -> None:
    function = CALLS[call][0]
    x, *rest = tensors(call)
    (g,) = torch.autograd.grad(function(x, *rest).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{call}: double backward is not implemented"):
        g.square().sum().backward()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=f"{call}: forward-mode"):
        function(forward_ad.make_dual(x.detach(), torch.ones_like(x)), *rest)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast(dtype: torch.dtype) -> None:
    """The mixer's parameters stay float32, as a norm's do; a convolution's are cast."""
    x, weight, scale = tensors("pool_mixer", torch.float32)
    image, taps, bias = tensors("depthwise_conv2d", torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        mixed, convolved = ops.pool_mixer(x, weight, scale), ops.depthwise_conv2d(image, taps, bias, activation="gelu")
        assert ops.pool_mixer(x.double(), weight.double()).dtype == torch.float64
        other = torch.bfloat16 if dtype == torch.float16 else torch.float16
        assert ops.pool_mixer(*(t.to(other) for t in (x, weight, scale))).dtype == dtype
    assert torch.equal(mixed, ops.pool_mixer(x.to(dtype), weight, scale)) and mixed.dtype == dtype
    half = [t.to(dtype) for t in (image, taps, bias)]
    assert torch.equal(convolved, ops.depthwise_conv2d(*half, activation="gelu")) and convolved.dtype == dtype
    (mixed.float().sum() + convolved.float().sum()).backward()
    assert {t.grad.dtype for t in (x, weight, scale, image, taps, bias)} == {torch.float32}


# ---- errors ----

X, W, TAPS = torch.randn(2, 4, 5, 6), torch.randn(6), torch.randn(6, 3, 3)
BAD_POOL: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": None}, TypeError, r"x must be a tensor, got None"),
    ({"weight": 1.0}, TypeError, r"weight must be a tensor, got 1.0 \(float\)"),
    ({"x": X.int()}, TypeError, r"x must be float16, bfloat16, float32 or float64, got int32 of shape \[2, 4, 5, 6\]"),
    ({"x": X[0]}, ValueError, r"x must be of shape \[batch, height, width, channels\], got \[4, 5, 6\]"),
    ({"weight": W[:5]}, ValueError, r"weight must be of shape \[6\], got float32 of shape \[5\]"),
    ({"weight": W.half()}, TypeError, r"weight must be float32 as x is, or float32, got float16"),
    ({"scale": W[:5]}, ValueError, r"scale must be of shape \[6\], got float32 of shape \[5\]"),
    ({"x": X.half(), "weight": W.half(), "scale": W}, TypeError, r"scale must be float16 as weight is, got float32"),
    ({"scale": W.to("meta")}, ValueError, r"scale must be on cpu as x is, got meta"),
    ({"pool_size": 4}, ValueError, r"pool_size must be odd and positive, got 4"),
    ({"pool_size": -3}, ValueError, r"pool_size must be odd and positive, got -3"),
    ({"pool_size": 3.0}, TypeError, r"pool_size must be an int, got 3.0"),
    ({"eps": -1.0}, ValueError, r"eps must not be negative, got -1"),
    ({"eps": float("nan")}, ValueError, r"eps must be .*, got nan"),
]
BAD_CONV: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": [1.0]}, TypeError, r"x must be a tensor, got \[1.0\] \(list\)"),
    ({"x": X.int()}, TypeError, r"x must be float16, bfloat16, float32 or float64, got int32"),
    ({"x": X[0]}, ValueError, r"x must be of shape \[batch, height, width, channels\], got \[4, 5, 6\]"),
    ({"weight": TAPS[:, None]}, ValueError, r"weight must be of shape \[6, k, k\] with an odd k, got \[6, 1, 3, 3\]"),
    ({"weight": TAPS[:, :2, :2]}, ValueError, r"weight must be of shape \[6, k, k\] with an odd k, got \[6, 2, 2\]"),
    ({"weight": TAPS[:, :1]}, ValueError, r"weight must be of shape \[6, k, k\] with an odd k, got \[6, 1, 3\]"),
    ({"weight": TAPS.half()}, TypeError, r"weight must be float32 as x is, got float16 of shape \[6, 3, 3\]"),
    ({"bias": TAPS}, ValueError, r"bias must be of shape \[6\], got \[6, 3, 3\]"),
    ({"bias": W.double()}, TypeError, r"bias must be float32 as x is, got float64 of shape \[6\]"),
    ({"bias": W.to("meta")}, ValueError, r"bias must be on cpu as x is, got meta"),
    ({"activation": "silu"}, ValueError, r"activation must be \"linear\", \"gelu\" or \"relu\", got 'silu'"),
]


@pytest.mark.parametrize(("changed", "error", "message"), BAD_POOL, ids=[m for _, _, m in BAD_POOL])
def test_bad_arguments_of_pool_mixer(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^pool_mixer: {message}"):
        ops.pool_mixer(**{"x": X, "weight": W, **changed})


@pytest.mark.parametrize(("changed", "error", "message"), BAD_CONV, ids=[m for _, _, m in BAD_CONV])
def test_bad_arguments_of_depthwise_conv2d(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^depthwise_conv2d: {message}"):
        ops.depthwise_conv2d(**{"x": X, "weight": TAPS, **changed})


def test_backwards_called_directly_check_their_arguments() -> None:
    statistic = torch.ones(2)
    for call, message in (
        (lambda: OPS.pool_mixer_backward(X[:1], X, W, None, statistic, statistic), r"dout must be .*as x is"),
        (lambda: OPS.pool_mixer_backward(X, X, W, None, statistic[:1], statistic), r"mean must be float32 of shape"),
        (lambda: OPS.pool_mixer_backward(X, X, W, None, statistic, statistic.half()), r"rstd must be float32 of"),
        (lambda: OPS.depthwise_conv2d_backward(X.half(), X, TAPS, None), r"dout must be float32 .*as x is"),
        (lambda: OPS.depthwise_conv2d_backward(X, X, TAPS[:5], None), r"weight must be of shape \[6, k, k\]"),
    ):
        with pytest.raises(RuntimeError, match=rf"^\w+_backward: {message}"):
            call()


# ---- opcheck, compile, export ----


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("grad", (False, True), ids=("", "grad"))
@by_call
def test_opcheck(call: str, grad: bool) -> None:
    function, _, how = CALLS[call]
    opcheck(getattr(OPS, function.__name__).default, tuple(tensors(call, torch.float32, grad)), how)


class Layer(torch.nn.Module):
    """A mixer and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale = (torch.nn.Parameter(torch.randn(8)) for _ in range(2))
        self.taps, self.bias = torch.nn.Parameter(torch.randn(8, 3, 3)), torch.nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        x = ops.pool_mixer(x, self.weight, self.scale, pool_size=3)
        return ops.depthwise_conv2d(x, self.taps, self.bias, activation="gelu")


def test_compile_once_for_all_sizes(fresh_dynamo: None) -> None:
    model, backend = Layer(), Compilations()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, dynamic=True, backend=backend)
    for shape in ((2, 5, 6, 8), (3, 7, 4, 8), (2, 9, 9, 8)):
        x = torch.randn(*shape, requires_grad=True)
        results = []
        for function in (model, compiled):
            out = function(x)
            results.append((out, *torch.autograd.grad(out.square().sum(), (x, *function.parameters()))))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)
    assert backend.count == 1


@pytest.mark.slow
def test_export_with_dynamic_sizes() -> None:
    model, x = Layer().eval(), torch.randn(2, 6, 7, 8)
    sizes = dict.fromkeys((0, 1, 2), torch.export.Dim.AUTO)
    program = torch.export.export(model, (x,), dynamic_shapes=(sizes,))
    for shape in ((2, 6, 7, 8), (3, 5, 9, 8)):
        other = torch.randn(*shape)
        torch.testing.assert_close(program.module()(other), model(other))


@pytest.mark.parametrize("shape", ((0, 4, 5, 8), (2, 0, 5, 8), (2, 4, 0, 8), (2, 4, 5, 0)), ids=str)
def test_empty_images(shape: tuple[int, ...]) -> None:
    x = torch.randn(*shape, requires_grad=True)
    weight, taps = torch.randn(shape[-1], requires_grad=True), torch.randn(shape[-1], 3, 3, requires_grad=True)
    out = ops.pool_mixer(x, weight, weight) + ops.depthwise_conv2d(x, taps, weight, activation="gelu")
    assert out.shape == shape
    out.sum().backward()
    assert x.grad.shape == shape and not weight.grad.any() and not taps.grad.any()
