"""Mixing the tokens of windows by a matrix, with norm and gate, forward and both ways, beside torch's composition.

Inputs are the halves of one product, as MAXIM's gated MLP has them. Peers move both into windows and the result back.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import harness
import torch
import torch.nn.functional as F
from harness import Case, Session
from torch import Tensor

import warpform
from helpers.compare import assert_close
from helpers.window_mix import window_mix_oracle

PROVIDERS = ("warpform", "torch_compiled", "torch_eager")
EPS = 1e-6

# The table of sizes: (batch, side of the grid, channels, side of a window). On a GPU and on a CPU the levels and the
# bottom of MAXIM-S at 256 x 256.
SIZES: dict[str, tuple[tuple[int, int, int, int], ...]] = {
    "tiny": ((2, 8, 8, 2),),
    "cpu": ((1, 256, 32, 16), (1, 128, 64, 16), (1, 64, 128, 8), (1, 32, 128, 8)),
    "cuda": ((1, 256, 32, 16), (8, 256, 32, 16), (8, 128, 64, 16), (8, 64, 128, 8), (8, 32, 128, 8)),
}
MAIN = (8, 256, 32, 16)


@dataclass(frozen=True)
class Spec(harness.Spec):
    shape: tuple[int, int, int, int] = (1, 1, 1, 1)
    dilated: bool = False

    family = "window_mix"

    def work(self, itemsize: int) -> tuple[float, float]:
        """A product of n operations' pairs for each value; both ways three more: y again, and two gradients.

        Forward reads x and the gate and writes out. Backward reads those and dout and writes two gradients. The matrix
        is read once in each direction, and its gradient written.
        """
        batch, side, channels, window = self.shape
        values, n, both = batch * side * side * channels, window * window, self.direction == "forward+backward"
        flops = 2 * n * values * (4 if both else 1)
        return flops, ((8 if both else 3) * values + (3 if both else 1) * n * n) * itemsize

    def build(self, session: Session) -> WindowMixCase:
        return WindowMixCase(self, session)


def specs(session: Session) -> list[Spec]:
    found = []
    for dilated in (False, True):
        for direction in ("forward", "forward+backward"):
            for shape in SIZES["tiny" if session.tiny else session.device]:
                batch, side, channels, window = shape
                columns = {
                    "batch": batch, "tokens": batch * side * side, "hidden": channels, "grid": f"{side}x{side}",
                    "window": f"{window}x{window}", "shift": "0x0",
                }  # fmt: skip
                main = harness.is_main(session, shape == MAIN)
                name = "window_mix_dilated" if dilated else "window_mix"
                found.append(Spec(name, direction, tuple(columns.items()), PROVIDERS, shape, dilated, main=main))
    return found


def windows_of(x: Tensor, window: int, dilated: bool) -> Tensor:
    """x [B, H, W, C] as a view [B, rows and columns of windows, rows and columns of a window, C]."""
    if dilated:
        return x.unflatten(2, (window, -1)).unflatten(1, (window, -1)).permute(0, 2, 4, 1, 3, 5)
    return x.unflatten(2, (-1, window)).unflatten(1, (-1, window)).permute(0, 1, 3, 2, 4, 5)


def with_torch(
    x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, window: int, dilated: bool
) -> tuple[Tensor]:
    """As the release does it: into windows, LayerNorm, a product over tokens, the gate, and back."""
    view = windows_of(x, window, dilated)
    normal = F.layer_norm(view.reshape(-1, window * window, x.shape[-1]), (x.shape[-1],), scale, shift, EPS)
    y = torch.einsum("ij,wjc->wic", weight, normal) + bias[:, None]
    out = (windows_of(gate, window, dilated).reshape(y.shape) * (y + 1)).view(view.shape)
    order = (0, 3, 1, 4, 2, 5) if dilated else (0, 1, 3, 2, 4, 5)
    return (out.permute(order).reshape(x.shape),)


class WindowMixCase(Case):
    """x and gate [B, H, W, C], halves of one tensor; the matrix, its bias, the norm. Both ways with all gradients."""

    def __init__(self, spec: Spec, session: Session) -> None:
        self.spec, self.session = spec, session
        self.backward = spec.direction == "forward+backward"
        batch, side, channels, window = spec.shape
        n, size = window * window, session.dtype.itemsize
        self.flops, self.bytes = spec.work(size)
        make = functools.partial(torch.randn, device=session.device, dtype=session.dtype)
        self.inputs = []
        for _ in range(harness.copies(session.device, 3 * batch * side * side * channels * size)):
            gate, x = make(batch, side, side, 2 * channels).chunk(2, -1)
            tensors = [x, gate, make(n, n) * n**-0.5, make(n), make(channels), make(channels)]
            self.inputs.append((tensors, [make(batch, side, side, channels)]))

    def calls(self, function: Callable[..., tuple[Tensor]]) -> list[Callable[[], Any]]:
        return [self.call(function, *given) for given in self.inputs]

    def call(
        self, function: Callable[..., tuple[Tensor]], tensors: list[Tensor], douts: list[Tensor]
    ) -> Callable[[], tuple[Tensor, ...]]:
        how = (self.spec.shape[3], self.spec.dilated)
        return harness.inference_or_step(lambda *given: function(*given, *how), tensors, douts, self.backward)

    def with_warpform(self) -> list[Callable[[], Any]]:
        return self.calls(with_op)

    def with_torch_eager(self) -> list[Callable[[], Any]]:
        return self.calls(with_torch)

    def with_torch_compiled(self) -> list[Callable[[], Any]]:
        self.session.allow_compile()
        return self.calls(harness.compiled(with_torch, False))  # at its best: code for each shape

    @functools.cached_property
    def truth(self) -> list[tuple[Tensor, ...]]:
        """In float64 and in the dtype itself, by the oracle of the tests."""
        tensors, douts = self.inputs[0]
        results = []
        for dtype in (torch.float64, self.session.dtype):
            output = self.call(with_oracle, [t.to(dtype) for t in tensors], [t.to(dtype) for t in douts])()
            results.append(tuple(t.detach() for t in output))
        return results

    def check(self, provider: str, output: Sequence[Tensor]) -> None:
        exact, eager = self.truth
        assert len(output) == len(exact)
        names = ("out", "dx", "dgate", "dweight", "dbias", "dnorm_weight", "dnorm_bias")
        # Sums of many terms may cancel; random ones of this size grow with the root of their number.
        terms = self.spec.shape[0] * math.prod(self.spec.shape[1:3]) * self.spec.shape[1]
        for name, actual, wanted, plain in zip(names, output, exact, eager, strict=False):
            of_parameter = name in names[3:]
            if provider == "warpform":
                scale = terms**0.5 if of_parameter else 0.0
                assert_close(name, actual, wanted, plain, gradient=name.startswith("d"), scale=scale)
            else:  # which add up in orders of their own
                harness.assert_near(name, actual, wanted, plain, scale=float(terms) if of_parameter else 0.0)


def with_op(
    x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, window: int, dilated: bool
) -> tuple[Tensor]:
    """warpform's op."""
    return (
        warpform.ops.window_mix(
            x, weight, bias, window_size=window, dilated=dilated, norm_weight=scale, norm_bias=shift, eps=EPS, gate=gate
        ),
    )


def with_oracle(
    x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, window: int, dilated: bool
) -> tuple[Tensor]:
    """The oracle of the tests."""
    how: dict[str, Any] = {"window": (window, window), "dilated": dilated, "eps": EPS}
    return (window_mix_oracle(x, weight, bias, scale, shift, gate, **how),)


def test_window_mix(spec: Spec, provider: str, measure: Callable[[harness.Spec, str], None]) -> None:
    measure(spec, provider)
