"""Monarch products and Monarch Mixer's gated MLP, forward and both ways, against the same in torch."""

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

# "warpform_mma_sync": the kernels for every GPU where plain calls take kernels for Hopper. "dense" multiplies by the
# whole matrix, which holds more weights than the factors do.
PROVIDERS = ("warpform", "warpform_mma_sync", "dense", "dense_compiled", "two_bmm", "two_bmm_compiled")
GLU_PROVIDERS = ("warpform", "two_bmm", "two_bmm_compiled")
BLOCK_PROVIDERS = ("warpform", "warpform_mma_sync", "bmm", "bmm_compiled")

# The table of sizes. "monarch": (tokens, in, out, blocks), of equal blocks as nn.MonarchLinear makes them; "blocks":
# the same of one block-diagonal matrix, which is dense where it has one block; "glu": (tokens, width, blocks), four
# times as wide inside.
SIZES: dict[str, dict[str, tuple[tuple[int, ...], ...]]] = {
    "tiny": {"monarch": ((5, 16, 32, 4), (6, 16, 16, 4)), "blocks": ((5, 16, 32, 4),), "glu": ((5, 16, 4),)},
    "cpu": {
        "monarch": (
            (1024, 768, 3072, 4),
            (1024, 3072, 768, 4),
            (1024, 1024, 1024, 4),
            (1024, 1024, 1024, 32),
            (1024, 4096, 4096, 4),
            (1024, 4096, 4096, 64),
        ),
        "blocks": ((1024, 4096, 4096, 4),),
        "glu": ((1024, 768, 4),),
    },
    "cuda": {
        "monarch": (
            (16384, 768, 3072, 4),
            (16384, 3072, 768, 4),
            (16384, 1024, 1024, 4),
            (16384, 1024, 1024, 32),
            (16384, 4096, 4096, 4),
            (16384, 4096, 4096, 64),
        ),
        "blocks": ((16384, 4096, 4096, 4), (16384, 1024, 1024, 4), (8192, 8192, 8192, 1)),
        "glu": ((16384, 768, 4), (16384, 1792, 4)),
    },
}
# The main ones on a GPU, for each kernel the sizes that follow the tokens in the table.
MAIN: dict[str, tuple[tuple[int, ...], ...]] = {
    "monarch": ((768, 3072, 4), (1024, 1024, 4), (1024, 1024, 32)),
    "blocks": ((4096, 4096, 4),),
    "glu": ((768, 4),),
}
# Main ones forward alone. One block of 8192 squared is the product that cuBLAS does best: 600 TFLOP/s are aimed at.
MAIN_FORWARD: dict[str, tuple[tuple[int, ...], ...]] = {"blocks": ((8192, 8192, 1),)}


@dataclass(frozen=True)
class Spec(harness.Spec):
    tokens: int = 1
    shapes: tuple[tuple[int, int, int], ...] = ()  # of both weights

    family = "monarch"

    def __str__(self) -> str:
        shapes = "-".join("x".join(map(str, shape)) for shape in self.shapes)
        return f"{self.kernel}-{self.direction}-T{self.tokens}-{shapes}"

    def work(self, itemsize: int) -> tuple[float, float]:
        """The products of both factors. What lies between them stays on the chip, and is made again for the gradients:
        that product counts. Forward reads x and the weights and writes out; backward reads x, dout and the weights,
        writes dx and theirs."""
        weights = sum(math.prod(shape) for shape in self.shapes)
        n, m = (self.shapes[i][0] * self.shapes[i][j] for i, j in ((0, 2), (-1, 1)))
        if self.direction == "forward":
            return 2 * self.tokens * weights, (self.tokens * (n + m) + weights) * itemsize
        again = math.prod(self.shapes[0]) if len(self.shapes) > 1 else 0
        moved = self.tokens * (3 * n + 2 * m) + 3 * weights
        return 2 * self.tokens * (3 * weights + again), moved * itemsize

    def build(self, session: Session) -> MonarchCase:
        return MonarchCase(self, session)


def specs(session: Session) -> list[Spec]:
    sizes = SIZES["tiny" if session.tiny else session.device]
    found = []
    for direction in ("forward", "forward+backward"):
        for tokens, n, m, blocks in sizes["monarch"]:
            inner = min(n, m) // blocks
            shapes = ((blocks, inner, n // blocks), (blocks, m // blocks, inner))
            columns = {"tokens": tokens, "hidden": n, "grid": f"{n} to {m} in {blocks} blocks"}
            main = harness.is_main(session, (n, m, blocks) in MAIN["monarch"])
            found.append(
                Spec("monarch_multiply", direction, tuple(columns.items()), PROVIDERS, tokens, shapes, main=main)
            )
        for tokens, n, m, blocks in sizes["blocks"]:
            columns = {"tokens": tokens, "hidden": n, "grid": f"{n} to {m} in {blocks} blocks"}
            block = ((blocks, m // blocks, n // blocks),)
            listed = MAIN["blocks"] + (MAIN_FORWARD["blocks"] if direction == "forward" else ())
            main = harness.is_main(session, (n, m, blocks) in listed)
            found.append(
                Spec("blockdiag_multiply", direction, tuple(columns.items()), BLOCK_PROVIDERS, tokens, block, main=main)
            )
        for tokens, width, blocks in sizes["glu"]:
            part = width // blocks
            columns = {"tokens": tokens, "hidden": width, "grid": f"{width} to {8 * width} and back in {blocks} blocks"}
            shapes = ((blocks, 8 * part, part), (blocks, part, 4 * part))
            main = harness.is_main(session, (width, blocks) in MAIN["glu"])
            found.append(
                Spec("blockdiag_glu", direction, tuple(columns.items()), GLU_PROVIDERS, tokens, shapes, main=main)
            )
    return found


def _blockdiag(x: Tensor, w: Tensor) -> Tensor:
    """x [tokens, n] times w [blocks, q, p]: [blocks, tokens, q]."""
    return torch.bmm(x.view(x.size(0), w.size(0), w.size(2)).transpose(0, 1), w.mT)


def one_bmm(x: Tensor, w: Tensor) -> Tensor:
    return _blockdiag(x, w).transpose(0, 1).reshape(x.size(0), -1)


def two_bmm(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """Multiplies as the published code does: a batched product, a permutation, another product, another permutation."""
    blocks, _, r = w2.shape
    h = _blockdiag(x, w1).transpose(0, 1).reshape(x.size(0), r, blocks)
    return torch.bmm(h.permute(2, 0, 1), w2.mT).permute(1, 2, 0).reshape(x.size(0), -1)


def two_bmm_glu(x: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    left, right = _blockdiag(x, w_up).transpose(0, 1).reshape(x.size(0), -1).chunk(2, 1)
    return _blockdiag(F.gelu(left) * right, w_down).transpose(0, 1).reshape(x.size(0), -1)


def dense(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w)


class MonarchCase(Case):
    """x [tokens, n] and the weights. With backward, the gradients of all, and the forward before them."""

    def __init__(self, spec: Spec, session: Session) -> None:
        self.spec, self.session, self.device = spec, session, session.device
        self.backward = spec.direction == "forward+backward"
        self.ours = getattr(warpform.ops, spec.kernel)
        self.theirs = {"blockdiag_multiply": one_bmm, "blockdiag_glu": two_bmm_glu}.get(spec.kernel, two_bmm)
        (k, _, p), (blocks, s, _) = spec.shapes[0], spec.shapes[-1]
        tokens, n, m = spec.tokens, k * p, blocks * s
        weights = sum(math.prod(shape) for shape in spec.shapes)
        size = session.dtype.itemsize
        self.flops, self.bytes = spec.work(size)
        make = functools.partial(torch.randn, device=self.device, dtype=session.dtype)
        self.inputs = []
        for _ in range(harness.copies(self.device, (tokens * (n + m) + weights) * size)):
            factors = [make(*shape) * shape[-1] ** -0.5 for shape in spec.shapes]
            self.inputs.append(([make(tokens, n), *factors], make(tokens, m)))

    def calls(self, function: Callable[..., Tensor], whole: bool = False) -> list[Callable[[], Any]]:
        """Prepares the calls. whole: function multiplies by the whole matrix, not by its factors."""
        return [self.call(function, [x[0], _whole(*x[1:])] if whole else x, dout) for x, dout in self.inputs]

    def call(self, function: Callable[..., Tensor], tensors: list[Tensor], dout: Tensor) -> Callable[[], Any]:
        return harness.inference_or_step(function, tensors, [dout], self.backward)

    def with_warpform(self) -> list[Callable[[], Any]]:
        return self.calls(self.ours)

    def with_warpform_mma_sync(self) -> list[Callable[[], Any]]:
        return harness.on_mma_sync(self.session, self.with_warpform)

    def with_two_bmm(self) -> list[Callable[[], Any]]:
        return self.calls(self.theirs)

    def with_two_bmm_compiled(self) -> list[Callable[[], Any]]:
        self.session.allow_compile()
        return self.calls(harness.compiled(self.theirs, False))  # at its best: code for each shape

    with_bmm, with_bmm_compiled = with_two_bmm, with_two_bmm_compiled  # of one factor

    def with_dense(self) -> list[Callable[[], Any]]:
        return self.calls(dense, whole=True)

    def with_dense_compiled(self) -> list[Callable[[], Any]]:
        self.session.allow_compile()
        return self.calls(harness.compiled(dense, False), whole=True)

    @functools.cached_property
    def truth(self) -> list[dict[str, Tensor]]:
        """In float64 and in the dtype itself."""
        x, dout = self.inputs[0]
        results = []
        for dtype in (torch.float64, self.session.dtype):
            output = self.call(self.theirs, [t.to(dtype) for t in x], dout.to(dtype))()
            results.append(dict(zip(("out", "dx", "first weight", "second weight"), output, strict=False)))
        return results

    def check(self, provider: str, output: Sequence[Tensor]) -> None:
        """out, dx and the gradients of both weights; of the whole matrix's gradient only that it is finite."""
        exact, eager = self.truth
        if provider.startswith("dense") and self.backward:
            *output, gradient = output
            assert torch.isfinite(gradient).all(), "not finite"
        for (name, wanted), actual in zip(exact.items(), output, strict=False):
            ours = provider.startswith("warpform")
            judge = assert_close if ours else harness.assert_near
            how = {"gradient": name != "out"} if ours else {}
            judge(name, actual, wanted, eager[name], **how)
        assert provider.startswith("dense") or len(output) == len(exact)


def _whole(w1: Tensor, w2: Tensor) -> Tensor:
    """The matrix of both factors, [m, n]."""
    identity = torch.eye(w1.size(0) * w1.size(2), dtype=torch.float32, device=w1.device)
    return two_bmm(identity, w1.float(), w2.float()).t().to(w1.dtype).contiguous()


def test_monarch(spec: Spec, provider: str, measure: Callable[[harness.Spec, str], None]) -> None:
    measure(spec, provider)
