"""Monarch Mixer's short convolution with its split and first gate, forward and both ways, against torch's Conv1d."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import harness
import torch
from harness import Case, Session
from torch import Tensor

import warpform
from helpers.compare import assert_close
from helpers.fft_conv import short_conv_gate

PROVIDERS = ("warpform", "torch_compiled", "torch_eager")
TAPS = 3

# The table of sizes: (batch, seqlen, channels).
SIZES: dict[str, tuple[tuple[int, int, int], ...]] = {
    "tiny": ((2, 20, 8),),
    "cpu": ((2, 1024, 768),),
    "cuda": ((32, 1024, 768), (128, 128, 768)),
}
MAIN = (32, 1024, 768)


@dataclass(frozen=True)
class Spec(harness.Spec):
    shape: tuple[int, int, int] = (1, 1, 1)

    family = "short_conv"

    def work(self, itemsize: int) -> tuple[float, float]:
        """Three products and sums of TAPS terms a channel and position, and a gate; backward those of both gradients.

        Forward reads x of 3 D channels and writes two tensors of D; backward reads x and two gradients and writes dx.
        """
        batch, seqlen, channels = self.shape
        values, both = batch * seqlen * channels, self.direction == "forward+backward"
        return (3 if both else 1) * values * (2 * 3 * TAPS + 1), (5 + 8 * both) * values * itemsize

    def build(self, session: Session) -> ShortConvCase:
        return ShortConvCase(self, session)


def specs(session: Session) -> list[Spec]:
    found = []
    for direction in ("forward", "forward+backward"):
        for shape in SIZES["tiny" if session.tiny else session.device]:
            batch, seqlen, channels = shape
            columns = {"batch": batch, "seqlen": seqlen, "tokens": batch * seqlen, "hidden": channels}
            main = harness.is_main(session, shape == MAIN)
            found.append(Spec("short_conv_gate", direction, tuple(columns.items()), PROVIDERS, shape, main=main))
    return found


def with_conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The published code's way: a transposition, torch's depthwise convolution, a cut, a split, a product."""
    c = torch.conv1d(x.mT, weight.unsqueeze(1), bias, padding=weight.size(1) - 1, groups=x.size(2))
    first, gate, value = c[..., : x.size(1)].chunk(3, 1)
    return value * first, gate


class ShortConvCase(Case):
    """x [batch, seqlen, 3 channels], weight [3 channels, TAPS], bias. Both ways with the gradients of all."""

    def __init__(self, spec: Spec, session: Session) -> None:
        self.session = session
        self.backward = spec.direction == "forward+backward"
        batch, seqlen, channels = spec.shape
        size = session.dtype.itemsize
        self.flops, self.bytes = spec.work(size)
        make = functools.partial(torch.randn, device=session.device, dtype=session.dtype)
        self.inputs = []
        for _ in range(harness.copies(session.device, 5 * batch * seqlen * channels * size)):
            tensors = [make(batch, seqlen, 3 * channels), make(3 * channels, TAPS), make(3 * channels)]
            self.inputs.append((tensors, [make(batch, channels, seqlen) for _ in range(2)]))

    def calls(self, function: Callable[..., tuple[Tensor, Tensor]]) -> list[Callable[[], Any]]:
        return [self.call(function, *given) for given in self.inputs]

    def call(
        self, function: Callable[..., tuple[Tensor, Tensor]], tensors: list[Tensor], douts: list[Tensor]
    ) -> Callable[[], tuple[Tensor, ...]]:
        return harness.inference_or_step(function, tensors, douts, self.backward)

    def with_warpform(self) -> list[Callable[[], Any]]:
        return self.calls(warpform.ops.short_conv_gate)

    def with_torch_eager(self) -> list[Callable[[], Any]]:
        return self.calls(with_conv1d)

    def with_torch_compiled(self) -> list[Callable[[], Any]]:
        self.session.allow_compile()
        return self.calls(harness.compiled(with_conv1d, False))  # at its best: code for each shape

    @functools.cached_property
    def truth(self) -> list[tuple[Tensor, ...]]:
        """In float64 and in the dtype itself, tap by tap."""
        tensors, douts = self.inputs[0]
        results = []
        for dtype in (torch.float64, self.session.dtype):
            output = self.call(short_conv_gate, [t.to(dtype) for t in tensors], [t.to(dtype) for t in douts])()
            results.append(tuple(t.detach() for t in output))
        return results

    def check(self, provider: str, output: Sequence[Tensor]) -> None:
        exact, eager = self.truth
        assert len(output) == len(exact)
        names = ("gated", "gate", "dx", "dweight", "dbias")
        for name, actual, wanted, plain in zip(names, output, exact, eager, strict=False):
            if provider == "warpform":
                assert_close(name, actual, wanted, plain, gradient=name.startswith("d"))
            else:
                harness.assert_near(name, actual, wanted, plain)


def test_short_conv(spec: Spec, provider: str, measure: Callable[[harness.Spec, str], None]) -> None:
    measure(spec, provider)
