"""RMSNorm with its residual, and RMSNorm with GELU, forward and backward, against torch's and transformers' own."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import harness
import torch
import torch.nn.functional as F
from harness import Case, Missing, Session
from torch import Tensor

import warpform
from helpers import oracle
from helpers.compare import assert_close

# What each op is compared with: transformers has the first alone.
PROVIDERS = {
    "add_residual_rms_norm": ("warpform", "torch_compiled", "torch_eager", "transformers"),
    "rms_norm_gelu": ("warpform", "torch_compiled", "torch_eager"),
}
EPS = 1e-6

# The table of sizes: (rows, columns).
SIZES: dict[str, dict[str, tuple[tuple[int, int], ...]]] = {
    "tiny": {"add_residual_rms_norm": ((7, 32),), "rms_norm_gelu": ((7, 32),)},
    "cpu": {"add_residual_rms_norm": ((1358, 768), (512, 4096)), "rms_norm_gelu": ((1358, 768), (1358, 3072))},
    "cuda": {
        "add_residual_rms_norm": ((9531, 768), (8192, 2048), (8192, 4096), (4096, 8192)),
        "rms_norm_gelu": ((9531, 768), (9531, 3072), (8192, 12288)),
    },
}
MAIN = ((9531, 768), (8192, 4096), (9531, 3072))


@dataclass(frozen=True)
class Spec(harness.Spec):
    shape: tuple[int, int] = (1, 1)

    family = "norm"

    def work(self, itemsize: int) -> tuple[float, float]:
        """A handful of operations a value: these workloads are bound by bytes.

        RMSNorm reads x and residual and writes out and sum; its backward reads two gradients and the sum and writes dx.
        With GELU it reads x and writes out, and reads dout and x and writes dx.
        """
        tensors = 4 if self.kernel == "add_residual_rms_norm" else 3 if self.direction == "backward" else 2
        return 0.0, float(tensors * self.shape[0] * self.shape[1] * itemsize)

    def build(self, session: Session) -> NormCase:
        return NormCase(self, session)


def specs(session: Session) -> list[Spec]:
    found = []
    for kernel, shapes in SIZES["tiny" if session.tiny else session.device].items():
        for direction in ("forward", "backward"):
            for shape in shapes:
                columns = {"tokens": shape[0], "hidden": shape[1]}
                main = harness.is_main(session, shape in MAIN)
                found.append(Spec(kernel, direction, tuple(columns.items()), PROVIDERS[kernel], shape, main=main))
    return found


def eager_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return F.rms_norm(total, (x.size(-1),), weight, EPS), total


def eager_rms_norm_gelu(x: Tensor) -> Tensor:
    """As the authors of TokenFormer write it."""
    return F.gelu(x / torch.linalg.vector_norm(x, dim=-1, keepdim=True) * math.sqrt(x.size(-1)))


EAGER: dict[str, Callable[..., Any]] = {
    "add_residual_rms_norm": eager_rms_norm,
    "rms_norm_gelu": eager_rms_norm_gelu,
}
WARPFORM: dict[str, Callable[..., Any]] = {
    "add_residual_rms_norm": lambda *t: warpform.ops.add_residual_rms_norm(*t, EPS, return_sum=True),
    "rms_norm_gelu": lambda x: warpform.ops.rms_norm_gelu(x),
}
ORACLE: dict[str, Callable[..., Any]] = {
    "add_residual_rms_norm": lambda *t: oracle.add_residual_rms_norm(*t, EPS),
    "rms_norm_gelu": lambda x: oracle.rms_norm_gelu(x, None, 0.0, "none"),
}


class NormCase(Case):
    """x and residual [rows, columns] and a weight, or x alone. Backward is timed alone, over a forward done before."""

    def __init__(self, spec: Spec, session: Session) -> None:
        self.spec, self.session = spec, session
        self.backward = spec.direction == "backward"
        self.flops, self.bytes = spec.work(session.dtype.itemsize)
        make = functools.partial(torch.randn, device=session.device, dtype=session.dtype)
        residual = spec.kernel == "add_residual_rms_norm"
        shapes: list[tuple[int, ...]] = [spec.shape, spec.shape, spec.shape[1:]] if residual else [spec.shape]
        count = harness.copies(session.device, self.bytes)
        self.inputs = [[make(shape) for shape in shapes] for _ in range(count)]
        self.douts = [[make(spec.shape) for _ in range(1 + residual)] for _ in range(count if self.backward else 0)]

    def calls(self, function: Callable[..., Any]) -> list[Callable[[], Any]]:
        if not self.backward:
            return [harness.inference_or_step(function, given, [], False) for given in self.inputs]
        found: list[Callable[[], Any]] = []
        for given, douts in zip(self.inputs, self.douts, strict=True):
            leaves = [t.detach().requires_grad_() for t in given]
            found.append(functools.partial(torch.autograd.grad, function(*leaves), leaves, douts, retain_graph=True))
        return found

    def with_warpform(self) -> list[Callable[[], Any]]:
        return self.calls(WARPFORM[self.spec.kernel])

    def with_torch_eager(self) -> list[Callable[[], Any]]:
        return self.calls(EAGER[self.spec.kernel])

    def with_torch_compiled(self) -> list[Callable[[], Any]]:
        self.session.allow_compile()
        return self.calls(harness.compiled(EAGER[self.spec.kernel]))

    def with_transformers(self) -> list[Callable[[], Any]]:
        try:
            from transformers.models.llama.modeling_llama import LlamaRMSNorm
        except ImportError as error:
            raise Missing(f"transformers has no LlamaRMSNorm: {error}") from error
        norm = LlamaRMSNorm(self.spec.shape[1], EPS)

        def layer(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            total = x + residual
            return torch.func.functional_call(norm, {"weight": weight}, total), total

        return self.calls(layer)

    @functools.cached_property
    def truth(self) -> list[tuple[Tensor, ...]]:
        """In float64 and in the dtype itself, by the formula."""
        results = []
        for dtype in (torch.float64, self.session.dtype):
            leaves = [t.detach().to(dtype).requires_grad_(self.backward) for t in self.inputs[0]]
            found = ORACLE[self.spec.kernel](*leaves)
            if self.backward:
                found = torch.autograd.grad(found, leaves, [t.to(dtype) for t in self.douts[0]])
            results.append((found,) if isinstance(found, Tensor) else tuple(found))
        return results

    def check(self, provider: str, output: Sequence[Tensor]) -> None:
        exact, eager = self.truth
        assert len(output) == len(exact)
        names = ("dx", "dresidual", "dweight") if self.backward else ("out", "sum")
        for name, actual, wanted, plain in zip(names, output, exact, eager, strict=False):
            if provider == "warpform":
                assert_close(name, actual, wanted, plain, gradient=self.backward)
            else:
                harness.assert_near(name, actual, wanted, plain)


def test_norm(spec: harness.Spec, provider: str, measure: Callable[[harness.Spec, str], None]) -> None:
    measure(spec, provider)
