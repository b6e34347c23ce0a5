"""PoolFormer's pooling mixer and the convolution of SegFormer's Mix-FFN, both ways, against torch's layers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import harness
import torch
import torch.nn.functional as F
from harness import Case, Session
from torch import Tensor

import warpform
from helpers import spatial as oracle
from helpers.compare import assert_close

PROVIDERS = ("warpform", "torch_compiled", "torch_channels_first", "torch_eager")
SIZE, EPS = 3, 1e-5

# The table of sizes: (batch, height, width, channels). Of the mixer the stages of PoolFormer-S12 at 224 x 224, of the
# convolution those of MiT-B5 and, behind them, of MiT-B0 at 512 x 512, where the width is four times the stage's.
Shape = tuple[int, int, int, int]
SIZES: dict[str, dict[str, tuple[Shape, ...]]] = {
    "tiny": {"pool_mixer": ((2, 5, 4, 8),), "depthwise_conv2d": ((2, 5, 4, 8),)},
    "cpu": {
        "pool_mixer": ((8, 56, 56, 64), (8, 14, 14, 320)),
        "depthwise_conv2d": ((1, 128, 128, 128), (1, 32, 32, 1280)),
    },
    "cuda": {
        "pool_mixer": ((128, 56, 56, 64), (128, 28, 28, 128), (128, 14, 14, 320), (128, 7, 7, 512)),
        "depthwise_conv2d": (
            *((8, 128, 128, 256), (8, 64, 64, 512), (8, 32, 32, 1280), (8, 16, 16, 2048)),
            *((8, 128, 128, 128), (8, 64, 64, 256), (8, 32, 32, 640), (8, 16, 16, 1024)),
        ),
    },
}
MAIN = ((128, 56, 56, 64), (8, 128, 128, 256))


@dataclass(frozen=True)
class Spec(harness.Spec):
    shape: Shape = (1, 1, 1, 1)

    family = "spatial"

    def work(self, itemsize: int) -> tuple[float, float]:
        """Products and sums of the taps, and bytes; an activation's operations are not counted.

        The mixer adds up SIZE rows and SIZE columns; forward reads x for the variance, x again and writes out, and
        backward reads x and dout twice and writes dx. The convolution reads x and writes out, and backward, which makes
        it again, reads x and dout and writes dx.
        """
        values, both = float(torch.Size(self.shape).numel()), self.direction == "forward+backward"
        if self.kernel == "pool_mixer":
            return values * (12 + 24 * both), values * itemsize * (3 + 5 * both)
        return values * 2 * SIZE**2 * (4 if both else 1), values * itemsize * (2 + 3 * both)

    def build(self, session: Session) -> SpatialCase:
        return SpatialCase(self, session)


def specs(session: Session) -> list[Spec]:
    found = []
    for kernel, shapes in SIZES["tiny" if session.tiny else session.device].items():
        for direction in ("forward", "forward+backward"):
            for shape in shapes:
                batch, height, width, channels = shape
                columns = {"batch": batch, "grid": f"{height}x{width}", "tokens": batch * height * width}
                main = harness.is_main(session, shape in MAIN)
                named = tuple({**columns, "hidden": channels}.items())
                found.append(Spec(kernel, direction, named, PROVIDERS, shape, main=main))
    return found


def eager_pool_mixer(x: Tensor, weight: Tensor, scale: Tensor, channels_first: bool = False) -> Tensor:
    """As the published model writes it, for x with its channels last; torch takes a permuted view as it is."""
    x = x if channels_first else x.permute(0, 3, 1, 2)
    n = F.group_norm(x, 1, weight, None, EPS)
    mixed = F.avg_pool2d(n, SIZE, 1, SIZE // 2, count_include_pad=False) - n
    out = x + mixed * scale[:, None, None]
    return out if channels_first else out.permute(0, 2, 3, 1)


def eager_depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor, channels_first: bool = False) -> Tensor:
    """The same of a Mix-FFN."""
    x = x if channels_first else x.permute(0, 3, 1, 2)
    out = F.gelu(F.conv2d(x, weight.unsqueeze(1), bias, padding=SIZE // 2, groups=x.size(1)))
    return out if channels_first else out.permute(0, 2, 3, 1)


EAGER: dict[str, Callable[..., Tensor]] = {
    "pool_mixer": eager_pool_mixer,
    "depthwise_conv2d": eager_depthwise_conv2d,
}
WARPFORM: dict[str, Callable[..., Tensor]] = {
    "pool_mixer": lambda *t: warpform.ops.pool_mixer(*t, pool_size=SIZE, eps=EPS),
    "depthwise_conv2d": lambda *t: warpform.ops.depthwise_conv2d(*t, activation="gelu"),
}
ORACLE: dict[str, Callable[..., Tensor]] = {
    "pool_mixer": lambda *t: oracle.pool_mixer(*t, pool_size=SIZE, eps=EPS),
    "depthwise_conv2d": lambda *t: oracle.depthwise_conv2d(*t, activation="gelu"),
}


class SpatialCase(Case):
    """x [batch, height, width, channels], and the parameters. Both ways with the gradients of all."""

    def __init__(self, spec: Spec, session: Session) -> None:
        self.spec, self.session = spec, session
        self.backward = spec.direction == "forward+backward"
        size, channels = session.dtype.itemsize, spec.shape[-1]
        self.flops, self.bytes = spec.work(size)
        make = functools.partial(torch.randn, device=session.device, dtype=session.dtype)
        first = (channels,) if spec.kernel == "pool_mixer" else (channels, SIZE, SIZE)
        self.inputs = []
        for _ in range(harness.copies(session.device, 2 * torch.Size(spec.shape).numel() * size)):
            self.inputs.append(([make(spec.shape), make(first), make(channels)], [make(spec.shape)]))

    def calls(self, function: Callable[..., Tensor], channels_first: bool = False) -> list[Callable[[], Any]]:
        return [self.call(function, *given, channels_first) for given in self.inputs]

    def call(
        self, function: Callable[..., Tensor], tensors: list[Tensor], douts: list[Tensor], channels_first: bool = False
    ) -> Callable[[], Any]:
        if channels_first:  # as a model would have them, if all of it were so
            tensors = [tensors[0].permute(0, 3, 1, 2).contiguous(), *tensors[1:]]
            douts = [douts[0].permute(0, 3, 1, 2).contiguous()]
        return harness.inference_or_step(function, tensors, douts, self.backward)

    def with_warpform(self) -> list[Callable[[], Any]]:
        return self.calls(WARPFORM[self.spec.kernel])

    def with_torch_eager(self) -> list[Callable[[], Any]]:
        return self.calls(EAGER[self.spec.kernel])

    def with_torch_channels_first(self) -> list[Callable[[], Any]]:
        return self.calls(functools.partial(EAGER[self.spec.kernel], channels_first=True), channels_first=True)

    def with_torch_compiled(self) -> list[Callable[[], Any]]:
        self.session.allow_compile()
        return self.calls(harness.compiled(EAGER[self.spec.kernel], False))  # at its best: code for each shape

    @functools.cached_property
    def truth(self) -> list[tuple[Tensor, ...]]:
        """In float64 and in the dtype itself, by the formula."""
        tensors, douts = self.inputs[0]
        results = []
        for dtype in (torch.float64, self.session.dtype):
            call = self.call(ORACLE[self.spec.kernel], [t.to(dtype) for t in tensors], [t.to(dtype) for t in douts])
            results.append(tuple(t.detach() for t in _as_tuple(call())))
        return results

    def check(self, provider: str, output: Any) -> None:
        exact, eager = self.truth
        found: Sequence[Tensor] = _as_tuple(output)
        assert len(found) == len(exact)
        names = ("out", "dx", "dweight", "dscale" if self.spec.kernel == "pool_mixer" else "dbias")
        for name, actual, wanted, plain in zip(names, found, exact, eager, strict=False):
            if provider == "torch_channels_first" and actual.dim() == 4:
                actual = actual.permute(0, 2, 3, 1)
            if provider == "warpform":
                assert_close(name, actual, wanted, plain, gradient=name.startswith("d"))
            else:
                # Gradients of parameters are small beside what they are sums of; peers add up in orders of their own.
                terms = self.inputs[0][1][0].double().abs().sum((0, 1, 2)).max().item()
                harness.assert_near(name, actual, wanted, plain, scale=terms if name in names[2:] else 0.0)


def _as_tuple(output: Any) -> tuple[Tensor, ...]:
    return (output,) if isinstance(output, Tensor) else tuple(output)


def test_spatial(spec: Spec, provider: str, measure: Callable[[harness.Spec, str], None]) -> None:
    measure(spec, provider)
