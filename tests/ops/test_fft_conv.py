"""Long and short convolutions through their public functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import opcheck

from helpers import cases
from helpers import fft_conv as helpers
from helpers.compare import assert_close, poisoned
from helpers.compilations import Compilations
from warpform import ops
from warpform.ops.reference import fft_conv as reference

OPS = torch.ops.warpform
floats = pytest.mark.parametrize("dtype", cases.FLOATS, ids=lambda d: str(d).removeprefix("torch."))


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


# ---- definitions ----


@pytest.mark.parametrize("case", helpers.FFT_CONV_CASES[::3], ids=str)
def test_spectral_conv_some_rows_at_a_time(case: helpers.FftConvCase, monkeypatch: pytest.MonkeyPatch) -> None:
    for points in (1, 3 * 512):
        monkeypatch.setattr(reference, "_POINTS_AT_A_TIME", points)
        monkeypatch.setattr(reference, "_LEAST_ROWS", 1)
        with poisoned():
            helpers.check_spectral_conv(OPS, case, torch.float32)


@floats
@pytest.mark.parametrize("case", [c for c in helpers.FFT_CONV_CASES if 1 < c.seqlen <= 400], ids=str)
def test_fft_conv(case: helpers.FftConvCase, dtype: torch.dtype) -> None:
    """From the taps, gradients by autograd, against the sum over all pairs of positions."""
    x = helpers.fft_conv_inputs(case, dtype)
    given = {"u": x.u, "k": x.k, "skip": x.skip, "pregate": x.pregate, "postgate": x.postgate, "k_reverse": x.k_reverse}

    def run(function: Callable[..., Tensor], computed_in: torch.dtype | None) -> tuple[Tensor, dict[str, Tensor]]:
        named = {
            name: t.detach().to(computed_in or t.dtype, copy=True).requires_grad_()
            for name, t in given.items()
            if t is not None
        }
        out = function(**named)
        found = torch.autograd.grad((out * x.dout.to(out.dtype)).sum(), list(named.values()), allow_unused=True)
        return out, {
            name: torch.zeros_like(t) if g is None else g for (name, t), g in zip(named.items(), found, strict=True)
        }

    def eager(u: Tensor, k: Tensor, k_reverse: Tensor | None = None, **how: Tensor) -> Tensor:
        if u.numel() == 0:
            return helpers.fft_conv(u, k.to(u.dtype), k_reverse=None, **how)
        points = helpers.points_of(case.seqlen)
        circle = torch.nn.functional.pad(k, (0, points - k.size(1)))
        if k_reverse is not None:
            circle = circle + torch.nn.functional.pad(k_reverse.flip(1), (points - k_reverse.size(1), 0))
        return helpers.eager_spectral_conv(u, torch.view_as_real(torch.fft.rfft(circle)), **how)

    (out, found), (truth, truths) = run(ops.fft_conv, None), run(helpers.fft_conv, torch.float64)
    yardstick, yardsticks = run(eager, None)
    assert out.dtype == dtype
    assert_close("out", out, truth, yardstick)
    for name, g in found.items():
        scale = helpers.skip_terms(x) if name == "skip" else 0.0
        assert_close(name, g, truths[name], yardsticks[name].to(dtype), gradient=True, scale=scale)


@pytest.mark.parametrize("seqlen", (1, 2, 255, 256, 257, 1000, 1024, 1025))
def test_points_of_a_spectrum(seqlen: int) -> None:
    for k_reverse in (None, torch.randn(2, seqlen)):
        k = torch.randn(2, seqlen)
        spectrum = ops.fft_conv_spectrum(k, k_reverse, seqlen=seqlen)
        assert spectrum.shape == (2, helpers.points_of(seqlen) // 2 + 1, 2) and spectrum.dtype == torch.float32
        torch.testing.assert_close(spectrum, helpers.spectrum_of(k, k_reverse, seqlen), atol=1e-4, rtol=1e-4)


def test_a_kept_spectrum_gives_the_same() -> None:
    u, k, k_reverse, skip = torch.randn(2, 3, 300), torch.randn(3, 300), torch.randn(3, 200), torch.randn(3)
    expected = ops.fft_conv(u, k, skip, u, u, k_reverse)
    spectrum = ops.fft_conv_spectrum(k, k_reverse, seqlen=300)
    assert torch.equal(ops.fft_conv(u, None, skip, u, u, spectrum=spectrum), expected)
    longer = ops.fft_conv_spectrum(k, k_reverse, seqlen=2000)
    torch.testing.assert_close(ops.fft_conv(u, None, skip, u, u, spectrum=longer), expected, atol=1e-4, rtol=1e-5)
    # It is of the longer one that a shorter sequence may take it, filters being the same for both.
    short = ops.fft_conv(u[..., :100], k[:, :100], k_reverse=k_reverse[:, :100])
    torch.testing.assert_close(ops.fft_conv(u[..., :100], None, spectrum=spectrum), short, atol=1e-4, rtol=1e-5)


def test_a_causal_filter_sees_nothing_that_comes_later() -> None:
    u, k = torch.randn(1, 2, 90, dtype=torch.float64), torch.randn(2, 90, dtype=torch.float64)
    changed = u.clone()
    changed[..., 50:] += 1e3
    before, after = ops.fft_conv(u, k), ops.fft_conv(changed, k)
    assert (before - after)[..., :50].abs().max() < 1e-9 < (before - after)[..., 50:].abs().min()


def test_short_convolution_is_conv1d() -> None:
    conv = torch.nn.Conv1d(24, 24, 3, groups=24, padding=2).double()
    x = torch.randn(2, 11, 24, dtype=torch.float64)
    gated, gate = ops.short_conv_gate(x, conv.weight.squeeze(1), conv.bias)
    first, second, value = conv(x.mT)[..., :11].chunk(3, 1)
    torch.testing.assert_close(gated, value * first)
    torch.testing.assert_close(gate, second)


# ---- gradients ----

Call = tuple[Callable[..., Any], tuple[tuple[int, ...] | None, ...]]
CALLS: dict[str, Call] = {
    "fft_conv": (ops.fft_conv, ((2, 3, 7), (3, 7))),
    "fft_conv_everything": (ops.fft_conv, ((2, 3, 7), (3, 4), (3,), (2, 3, 7), (2, 3, 7), (3, 6))),
    "fft_conv_two_sided": (ops.fft_conv, ((1, 2, 8), (2, 8), None, None, None, (2, 8))),
    "spectral_conv": (OPS.spectral_conv.default, ((2, 3, 7), (3, 9, 2))),
    "spectral_conv_everything": (OPS.spectral_conv.default, ((2, 3, 7), (3, 6, 2), (3,), (2, 3, 7), (2, 3, 7))),
    "spectral_conv_postgate": (OPS.spectral_conv.default, ((2, 3, 7), (3, 6, 2), None, None, (2, 3, 7))),
    "short_conv_gate": (ops.short_conv_gate, ((2, 7, 12), (12, 3))),
    "short_conv_gate_bias": (ops.short_conv_gate, ((2, 3, 6), (6, 4), (6,))),
}
by_call = pytest.mark.parametrize("call", CALLS)


def tensors(call: str, dtype: torch.dtype = torch.float64, grad: bool = True) -> list[Tensor | None]:
    return [None if shape is None else torch.randn(*shape, dtype=dtype, requires_grad=grad) for shape in CALLS[call][1]]


def summed(out: Any) -> Tensor:
    return out.square().sum() if isinstance(out, Tensor) else out[0].square().sum() + out[1].sin().sum()


@by_call
def test_gradcheck(call: str) -> None:
    assert torch.autograd.gradcheck(CALLS[call][0], tuple(tensors(call)))


@by_call
def test_only_gradients_that_are_needed(call: str) -> None:
    for wanted, shape in enumerate(CALLS[call][1]):
        if shape is None:
            continue
        inputs = tensors(call, grad=False)
        inputs[wanted].requires_grad_()
        summed(CALLS[call][0](*inputs)).backward()
        assert [t is not None and t.grad is not None for t in inputs] == [i == wanted for i in range(len(inputs))]


def test_gradient_of_one_output_alone() -> None:
    x, weight = leaf(2, 5, 6), leaf(6, 3)
    for output in (0, 1):
        out = ops.short_conv_gate(x, weight)[output]
        found = torch.autograd.grad(out.sin().sum(), (x, weight))
        expected = torch.autograd.grad(helpers.short_conv_gate(x, weight, None)[output].sin().sum(), (x, weight))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("call", "name"), (("fft_conv", "spectral_conv"), ("short_conv_gate", "short_conv_gate")), ids=("fft", "short")
)
def test_what_has_no_derivative_raises(call: str, name: str) -> None:
    function = CALLS[call][0]
    x, *rest = tensors(call)
    (g,) = torch.autograd.grad(summed(function(x, *rest)), x, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{name}: double backward is not implemented"):
        g.square().sum().backward()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=f"{name}: forward-mode"):
        function(forward_ad.make_dual(x.detach(), torch.ones_like(x)), *rest)
    with pytest.raises(NotImplementedError, match=rf"{name}: torch\.func transforms"):
        torch.func.grad(lambda x: summed(function(x, *rest)))(x)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast(dtype: torch.dtype) -> None:
    u, k, skip, pregate, postgate, k_reverse = leaves = tensors("fft_conv_everything", torch.float32)
    more = tensors("short_conv_gate_bias", torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        out = ops.fft_conv(*leaves)
        gated, gate = ops.short_conv_gate(*more)
        assert ops.fft_conv(u.double(), k.double()).dtype == torch.float64
        # As in a model: what products give is in half precision, parameters are not.
        assert torch.equal(out, ops.fft_conv(u.to(dtype), k, skip, pregate.to(dtype), postgate, k_reverse))
        kept = ops.fft_conv_spectrum(k, k_reverse, seqlen=7)
        assert kept.dtype == torch.float32
        assert torch.equal(out, ops.fft_conv(u, None, skip, pregate, postgate, spectrum=kept))
    assert {t.dtype for t in (out, gated, gate)} == {dtype}
    half = ops.fft_conv(u.to(dtype), k, skip, pregate.to(dtype), postgate.to(dtype), k_reverse)
    assert torch.equal(out, half)
    for one, other in zip((gated, gate), ops.short_conv_gate(*(t.to(dtype) for t in more)), strict=True):
        assert torch.equal(one, other)
    (summed(out.float()) + summed((gated.float(), gate.float()))).backward()
    assert {t.grad.dtype for t in (*leaves, *more)} == {torch.float32}


def test_taps_in_half_precision_are_transformed_in_float32() -> None:
    u, k = torch.randn(2, 3, 50).bfloat16(), torch.randn(3, 50).bfloat16()
    assert torch.equal(ops.fft_conv(u, k), ops.fft_conv(u, k.float()))
    assert torch.equal(ops.fft_conv_spectrum(k, seqlen=50), ops.fft_conv_spectrum(k.float(), seqlen=50))


# ---- errors ----

U, K = torch.randn(2, 3, 16), torch.randn(3, 16)
S = ops.fft_conv_spectrum(K, seqlen=16)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"u": [1.0]}, TypeError, r"u must be a tensor, got \[1.0\] \(list\)"),
    ({"u": U.long()}, TypeError, r"u must be float16, bfloat16, float32 or float64, got int64"),
    ({"u": U[0]}, ValueError, r"u must be of shape \[batch, channels, seqlen\], got float32 of shape \[3, 16\]"),
    ({"k": None}, TypeError, r"k must be a tensor where spectrum is None, got None"),
    ({"k": K[0]}, ValueError, r"k must be of shape \[3, taps\], got float32 of shape \[16\]"),
    ({"k": K[:2]}, ValueError, r"k must be of shape \[3, taps\], got float32 of shape \[2, 16\]"),
    ({"k": torch.randn(3, 17)}, ValueError, r"k must have at most the 16 taps that seqlen allows, got 17"),
    ({"k": K.half()}, TypeError, r"k must be float32 as u is, or float32, got float16 of shape \[3, 16\]"),
    ({"k": K.to("meta")}, ValueError, r"k must be on cpu as u is, got meta"),
    ({"k_reverse": K[:1]}, ValueError, r"k_reverse must be of shape \[3, taps\], got float32 of shape \[1, 16\]"),
    ({"k_reverse": torch.randn(3, 17)}, ValueError, r"k_reverse must have at most the 16 taps that seqlen allows"),
    ({"skip": K}, ValueError, r"skip must be of shape \[3\], got float32 of shape \[3, 16\]"),
    ({"skip": K[:, 0].double()}, TypeError, r"skip must be float32 as u is, or float32, got float64 of shape \[3\]"),
    ({"pregate": U[:1]}, ValueError, r"pregate must be of shape \[2, 3, 16\], got float32 of shape \[1, 3, 16\]"),
    ({"postgate": U.double()}, TypeError, r"postgate must be float32 as u is, got float64 of shape \[2, 3, 16\]"),
    ({"spectrum": S}, ValueError, r"k and k_reverse must be None where spectrum is given"),
    ({"k": None, "spectrum": S[0]}, ValueError, r"spectrum must be of shape \[3, n / 2 \+ 1, 2\], n at least 2, got"),
    ({"k": None, "spectrum": S[:, :8]}, ValueError, r"spectrum must be of at least the 16 points that u has, got 14"),
    ({"k": None, "spectrum": S.double()}, TypeError, r"spectrum must be torch.float32 where u is torch.float32, got"),
    ({"k": None, "spectrum": S, "u": [1.0]}, TypeError, r"u must be a tensor, got \[1.0\] \(list\)"),
    ({"k": None, "spectrum": S, "u": U[0]}, ValueError, r"u must be of shape \[batch, channels, seqlen\], got"),
    (
        {"k": None, "spectrum": S, "u": U.long()},
        TypeError,
        r"u must be float16, bfloat16, float32 or float64, got int64",
    ),
    ({"k": None, "spectrum": 1.0}, TypeError, r"spectrum must be a tensor, got 1.0 \(float\)"),
    ({"skip": [1.0]}, TypeError, r"skip must be a tensor, got \[1.0\] \(list\)"),
    ({"skip": K[:, 0].to("meta")}, ValueError, r"skip must be on cpu as u is, got meta"),
    ({"k": None, "spectrum": S.to("meta")}, ValueError, r"spectrum must be on cpu as u is, got meta"),
]


@pytest.mark.parametrize(("changed", "error", "message"), BAD, ids=[m for _, _, m in BAD])
def test_bad_arguments(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^fft_conv: {message}"):
        ops.fft_conv(**{"u": U, "k": K, **changed})


X, W = torch.randn(2, 5, 6), torch.randn(6, 3)
BAD_SHORT: list[tuple[tuple[Any, ...], type[Exception], str]] = [
    ((None, W), TypeError, r"x must be a tensor, got None"),
    ((X, None), TypeError, r"weight must be a tensor, got None"),
    ((X, W, 1.0), TypeError, r"bias must be a tensor, got 1.0 \(float\)"),
    ((X.int(), W), TypeError, r"x must be float16, bfloat16, float32 or float64, got int32 of shape \[2, 5, 6\]"),
    ((X, W.half()), TypeError, r"weight must be float32 as x is, got float16 of shape \[6, 3\]"),
    ((X[0], W), ValueError, r"x must be of shape \[batch, seqlen, 3 channels\], got \[5, 6\]"),
    ((X[..., :5], W), ValueError, r"x must be of shape \[batch, seqlen, 3 channels\], got \[2, 5, 5\]"),
    ((X, W[:, None]), ValueError, r"weight must be of shape \[6, taps\], got \[6, 1, 3\]"),
    ((X, W[:, :0]), ValueError, r"weight must be of shape \[6, taps\], got \[6, 0\]"),
    ((X, W, W), ValueError, r"bias must be of shape \[6\], got \[6, 3\]"),
    ((X, W, W[:, 0].double()), TypeError, r"bias must be float32 as x is, got float64 of shape \[6\]"),
    ((X, W.to("meta")), ValueError, r"weight must be on cpu as x is, got meta"),
    ((X, W, W[:, 0].to("meta")), ValueError, r"bias must be on cpu as x is, got meta"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_SHORT, ids=[m for _, _, m in BAD_SHORT])
def test_bad_arguments_of_the_short_one(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^short_conv_gate: {message}"):
        ops.short_conv_gate(*arguments)


def test_bad_arguments_of_a_spectrum() -> None:
    for taps, how, error, message in (
        (None, {"seqlen": 4}, TypeError, "k must be a tensor, got None"),
        (K, {"seqlen": 4.0}, TypeError, "seqlen must be an int, got 4.0"),
        (K, {"seqlen": 4}, ValueError, "k must have at most the 4 taps that seqlen allows, got 16"),
        (K, {"seqlen": 16, "k_reverse": K[:2]}, ValueError, r"k_reverse must be of shape \[3, taps\]"),
        (K, {"seqlen": 16, "k_reverse": K.double()}, TypeError, "k_reverse must be float32 as k is, got float64"),
    ):
        with pytest.raises(error, match=f"^fft_conv_spectrum: {message}"):
            ops.fft_conv_spectrum(taps, **how)


def test_ops_called_directly_check_shapes() -> None:
    for call, message in (
        (lambda: OPS.spectral_conv(U, S[:2]), "spectral_conv: spectrum must be of shape"),
        (lambda: OPS.spectral_conv(U, S, K), "spectral_conv: skip must be of shape"),
        (lambda: OPS.spectral_conv_backward(U[:1], U, S, None, None, None), "spectral_conv_backward: dout must be"),
        (
            lambda: OPS.spectral_conv_backward(U.double(), U, S, None, None, None),
            "spectral_conv_backward: dout must be float32 as u is, got float64",
        ),
    ):
        with pytest.raises(RuntimeError, match=f"^{message}"):
            call()
    # This one is made of others in Python.
    with pytest.raises(ValueError, match="^fft_conv: k must have at most the 16 taps"):
        OPS.fft_conv(U, torch.randn(3, 20))
    with pytest.raises(ValueError, match=r"^fft_conv: skip must be of shape \[3\], got float32 of shape \[3, 16\]"):
        OPS.fft_conv(U, K, K)


def test_the_short_one_called_directly_checks_its_arguments() -> None:
    gated, _ = ops.short_conv_gate(X, W)
    for call, message in (
        (lambda: OPS.short_conv_gate(X, W[:5]), r"short_conv_gate: weight must be of shape \[6, taps\], got \[5, 3\]"),
        (lambda: OPS.short_conv_gate_backward(gated, X, X, W, None), r"\w+: dgate must be of shape \[2, 2, 5\], got"),
        (lambda: OPS.short_conv_gate_backward(gated.half(), gated, X, W, None), r"\w+: dgated must be float32 as x is"),
        (lambda: OPS.short_conv_gate_backward(gated, gated, X, W[:5], None), r"\w+: weight must be of shape"),
    ):
        with pytest.raises(RuntimeError, match=f"^{message}"):
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
    function = CALLS[call][0]
    op = function if isinstance(function, torch._ops.OpOverload) else getattr(OPS, function.__name__).default
    opcheck(op, tuple(tensors(call, torch.float32, grad)))


class Layer(torch.nn.Module):
    """A projection's short convolution, and the long one."""

    def __init__(self, longest: int, kept: bool = False) -> None:
        super().__init__()
        self.weight, self.bias = torch.nn.Parameter(torch.randn(12, 3)), torch.nn.Parameter(torch.randn(12))
        self.taps = torch.nn.Parameter(torch.randn(2, 4, longest) / longest)
        self.skip = torch.nn.Parameter(torch.randn(4))
        spectrum = ops.fft_conv_spectrum(*self.taps.detach(), seqlen=longest) if kept else None
        self.register_buffer("spectrum", spectrum)

    def forward(self, x: Tensor) -> Tensor:
        gated, gate = ops.short_conv_gate(x, self.weight, self.bias)
        if self.spectrum is not None:
            return ops.fft_conv(gated, None, self.skip, postgate=gate, spectrum=self.spectrum).mT
        k, k_reverse = self.taps[:, :, : x.size(1)]
        y = ops.fft_conv(gated, k, self.skip, postgate=gate, k_reverse=k_reverse)
        spectrum = ops.fft_conv_spectrum(k, seqlen=x.size(1))
        return (y + ops.fft_conv(gated, None, pregate=gate, spectrum=spectrum)).mT


def compare(model: Layer, compiled: Callable[[Tensor], Tensor], seqlen: int) -> None:
    x = torch.randn(2 + seqlen % 3, seqlen, 12, requires_grad=True)
    leaves = [x, *model.parameters()]
    results = []
    for function in (model, compiled):
        out = function(x)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_compile_once_for_all_sizes_of_a_power_of_two(fresh_dynamo: None) -> None:
    model, backend = Layer(1024), Compilations()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for seqlen, count in ((20, 1), (130, 1), (256, 1), (300, 2), (511, 2), (257, 2), (600, 3), (20, 3)):
        compare(model, compiled, seqlen)
        assert backend.count == count


def test_compile_once_for_all_sizes_with_a_kept_spectrum(fresh_dynamo: None) -> None:
    model, backend = Layer(600, kept=True), Compilations()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for seqlen in (20, 130, 257, 300, 512, 600):
        compare(model, compiled, seqlen)
    assert backend.count == 1


@pytest.mark.slow
def test_compile_with_inductor(fresh_dynamo: None) -> None:
    model, x = Layer(300), torch.randn(2, 290, 12)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("strict", (False, True))
@pytest.mark.parametrize("kept", (False, True), ids=("taps", "spectrum"))
def test_export_with_dynamic_sizes(kept: bool, strict: bool, fresh_dynamo: None) -> None:
    model = Layer(600, kept)
    auto = torch.export.Dim.AUTO
    program = torch.export.export(
        model, (torch.randn(3, 100, 12),), dynamic_shapes=({0: auto, 1: auto},), strict=strict
    )
    for seqlen in (20, 256, 600) if kept else (20, 130, 250):
        x = torch.randn(2, seqlen, 12)
        torch.testing.assert_close(program.module()(x), model(x), atol=1e-4, rtol=1e-4)
