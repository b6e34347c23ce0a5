"""Long convolutions, plain and gated, forward and both ways, against torch.fft.

Of a forward alone the filter's spectrum is there already, for all of them, as at inference; both ways begin with taps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import harness
import torch
from harness import Case, Session
from torch import Tensor

import warpform
from helpers.compare import assert_close
from helpers.fft_conv import eager_spectral_conv

PROVIDERS = ("warpform", "torch_fft_compiled", "torch_fft")

# The table of sizes: (batch, channels, seqlen).
SIZES: dict[str, tuple[tuple[int, int, int], ...]] = {
    "tiny": ((2, 3, 20),),
    "cpu": ((16, 768, 256), (8, 768, 1024), (2, 768, 4096), (1, 768, 8192), (1, 192, 32768)),
    "cuda": tuple((64, 768, seqlen) for seqlen in (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)),
}

# Main ones: lengths of a forward; both ways the second alone, which is the FlashFFTConv paper's shape.
MAIN = (256, 4096, 32768)


@dataclass(frozen=True)
class Spec(harness.Spec):
    shape: tuple[int, int, int] = (1, 1, 1)

    family = "fft_conv"

    def work(self, itemsize: int) -> tuple[float, float]:
        """Every tensor once, and the transforms."""
        batch, channels, seqlen = self.shape
        gates = 2 if self.kernel == "gated_fft_conv" else 0
        both = self.direction == "forward+backward"
        elements, points = batch * channels * seqlen, 2 * seqlen
        # The spectrum, float32, is read once; both ways write and read it and its gradient, and the taps, once more.
        spectrum = 8 * channels * (points // 2 + 1)
        # Forward reads u and gates and writes y; backward reads those and dout and writes gradients of u and gates.
        moved = (2 + gates) * elements * itemsize + spectrum
        # A real FFT of n points takes some 2.5 n log2 n operations; a bin's complex product six.
        transforms = 2
        if both:
            moved += (3 + 2 * gates) * elements * itemsize + 3 * spectrum + 8 * channels * seqlen
            transforms = 5 + (1 if gates else 0)  # of v and d, and back; with a gate after it, the output again
        each = points * (transforms * 2.5 * math.log2(points) + 3 * (3 if both else 1))
        return batch * channels * each, moved

    def build(self, session: Session) -> ConvCase:
        return ConvCase(self, session)


def specs(session: Session) -> list[Spec]:
    found = []
    for kernel in ("fft_conv", "gated_fft_conv"):
        for direction in ("forward", "forward+backward"):
            for shape in SIZES["tiny" if session.tiny else session.device]:
                batch, channels, seqlen = shape
                columns = {"batch": batch, "seqlen": seqlen, "tokens": batch * seqlen, "hidden": channels}
                main = harness.is_main(session, seqlen in (MAIN if direction == "forward" else MAIN[1:2]))
                found.append(Spec(kernel, direction, tuple(columns.items()), PROVIDERS, shape, main=main))
    return found


def with_torch_fft(u: Tensor, filters: Tensor, skip: Tensor, *gates: Tensor, taps: bool) -> Tensor:
    """filters: taps, or their spectrum."""
    if taps:
        # The least points with which nothing wraps: a power of two for the lengths here.
        filters = torch.view_as_real(torch.fft.rfft(filters, 2 * u.size(-1)))
    return eager_spectral_conv(u, filters, skip, *gates)


def with_warpform(u: Tensor, filters: Tensor, skip: Tensor, *gates: Tensor, taps: bool) -> Tensor:
    if taps:
        return warpform.ops.fft_conv(u, filters, skip, *gates)
    return warpform.ops.fft_conv(u, None, skip, *gates, spectrum=filters)


class ConvCase(Case):
    """u, gates [batch, channels, seqlen], taps [channels, seqlen], skip [channels]."""

    def __init__(self, spec: Spec, session: Session) -> None:
        self.spec, self.session, self.device = spec, session, session.device
        self.backward = spec.direction == "forward+backward"
        batch, channels, seqlen = spec.shape
        gates = 2 if spec.kernel == "gated_fft_conv" else 0
        elements, size = batch * channels * seqlen, session.dtype.itemsize
        self.flops, self.bytes = spec.work(size)
        make = functools.partial(torch.randn, device=self.device, dtype=session.dtype)
        self.inputs = []
        for _ in range(harness.copies(self.device, (2 + gates) * elements * size)):
            k = torch.randn(channels, seqlen, device=self.device) * seqlen**-0.5
            if not self.backward:
                k = warpform.ops.fft_conv_spectrum(k, seqlen=seqlen)
            tensors = [make(*spec.shape), k, torch.randn(channels, device=self.device)]
            self.inputs.append(([*tensors, *(make(*spec.shape) for _ in range(gates))], make(*spec.shape)))

    def calls(self, function: Callable[..., Tensor]) -> list[Callable[[], Any]]:
        return [self.call(functools.partial(function, taps=self.backward), *given) for given in self.inputs]

    def call(self, function: Callable[..., Tensor], tensors: list[Tensor], dout: Tensor) -> Callable[[], Any]:
        return harness.inference_or_step(function, tensors, [dout], self.backward)

    def with_warpform(self) -> list[Callable[[], Any]]:
        return self.calls(with_warpform)

    def with_torch_fft(self) -> list[Callable[[], Any]]:
        return self.calls(with_torch_fft)

    def with_torch_fft_compiled(self) -> list[Callable[[], Any]]:
        self.session.allow_compile()
        return self.calls(harness.compiled(with_torch_fft, False))

    @functools.cached_property
    def compared(self) -> Tensor:
        """The channels that are compared; no other one enters them."""
        return torch.arange(0, self.spec.shape[1], max(1, self.spec.shape[1] // 3), device=self.device)

    @functools.cached_property
    def truth(self) -> list[tuple[Tensor, ...]]:
        """In float64, and with torch.fft in the dtype itself, of some channels."""
        given = [t.index_select(_axis(t), self.compared) for t in (*self.inputs[0][0], self.inputs[0][1])]
        results = []
        for dtype in (torch.float64, None):
            *tensors, dout = (t.to(dtype or t.dtype) for t in given)
            output = self.call(functools.partial(with_torch_fft, taps=self.backward), tensors, dout)()
            results.append(tuple(t.detach() for t in output))
        return results

    @functools.cached_property
    def staged(self) -> tuple[Tensor, ...]:
        """The standard for 16-bit kernels: the same stages run eagerly, each rounded (docs/numerics.md)."""
        from helpers import staged_fft

        (u, k, skip, *gates), dout = self.inputs[0]
        gates = gates or [None, None]
        u, skip, dout, *gates = (
            None if t is None else t.index_select(_axis(t), self.compared) for t in (u, skip, dout, *gates)
        )
        k = k[self.compared].requires_grad_(self.backward)
        spectrum = warpform.ops.fft_conv_spectrum(k, seqlen=u.size(-1)) if self.backward else k
        y = staged_fft.spectral_conv(u, spectrum.detach(), skip, *gates)
        if not self.backward:
            return (y,)
        du, dspectrum, *others = staged_fft.spectral_conv_backward(dout, u, spectrum.detach(), skip, *gates)
        (dk,) = torch.autograd.grad(spectrum, k, dspectrum)
        return (y, du, dk, *(t for t in others if t is not None and t.numel()))

    def check(self, provider: str, output: Sequence[Tensor]) -> None:
        exact, eager = self.truth
        assert len(output) == len(exact)
        if provider == "warpform" and self.session.dtype.itemsize == 2:
            eager = self.staged
        names = ("y", "du", "dk", "dskip", "dpregate", "dpostgate")
        for name, actual, wanted, near in zip(names, output, exact, eager, strict=False):
            assert torch.isfinite(actual).all(), f"{name}: not finite"
            actual = actual.detach().index_select(_axis(actual), self.compared)
            if provider == "warpform":
                near = near.to(self.session.dtype)
                assert_close(name, actual, wanted, near, gradient=name != "y", scale=self.terms(name))
            else:
                harness.assert_near(name, actual, wanted, near, scale=self.chain * self.terms(name))

    @property
    def chain(self) -> float:
        """A factor of `terms` for peers, which may add n of them in one chain.

        Such a chain is off by some sqrt(n / 24) eps of the root of the sum of squares. `assert_near` allows 4 eps of
        the scale, which is thus 2.4 times as much.
        """
        batch, _, seqlen = self.spec.shape
        return max(1.0, math.sqrt(batch * seqlen) / 8)

    def terms(self, name: str) -> float:
        """The gradient of skip adds up a channel's products, of either sign: the root of the sum of their squares."""
        if name != "dskip":
            return 0.0
        (u, _, _, *gates), dout = self.inputs[0]
        factors = (t.index_select(1, self.compared).double() for t in (u, dout, *gates))
        return float(functools.reduce(torch.mul, factors).square().sum((0, 2)).max().sqrt())


def _axis(t: Tensor) -> int:
    """Which one the channels are along: the second of u, the first of taps and skip."""
    return 1 if t.dim() == 3 and t.size(2) != 2 else 0


def test_fft_conv(spec: Spec, provider: str, measure: Callable[[harness.Spec, str], None]) -> None:
    measure(spec, provider)
