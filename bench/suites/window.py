"""Attention within windows, forward and both ways, against what computes it in torch.

What peers need besides attention counts: they move the block's input [B, *grid, C] into windows, as models do before
the QKV product, and the output back. QKV itself they get in windows, and warpform as the product leaves it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import harness
import torch
from harness import Case, Missing, Session
from torch import Tensor

import warpform
from helpers import oracle
from helpers.compare import assert_close
from suites.torch_windows import Sizes, Windows, eager_block, flex_block, sdpa_block

PROVIDERS = ("warpform", "eager", "sdpa", "eager_compiled", "sdpa_compiled", "flex_compiled")

# The table of sizes: (batch, grid, window, shift, heads, head_dim), all windows whole. On a GPU the stages of Swin-T at
# 224, then first stages: of Swin V2-T at 256 with windows of 8, of Swin-B at 384, of Swin V2-T with windows of 16, of
# DiT-3D-S and of Video Swin-T.
SIZES: dict[str, tuple[tuple[int, Sizes, Sizes, Sizes, int, int], ...]] = {
    "tiny": ((2, (6, 9), (3, 3), (1, 1), 2, 16), (2, (4, 4, 2), (2, 2, 2), (0, 0, 0), 1, 16)),
    "cpu": (
        (8, (56, 56), (7, 7), (3, 3), 3, 32),
        (8, (28, 28), (7, 7), (3, 3), 6, 32),
        (8, (14, 14), (7, 7), (3, 3), 12, 32),
        (8, (7, 7), (7, 7), (0, 0), 24, 32),
        (4, (64, 64), (8, 8), (4, 4), 3, 32),
        (1, (96, 96), (12, 12), (6, 6), 4, 32),
        (2, (64, 64), (16, 16), (8, 8), 3, 32),
        (8, (8, 8, 8), (4, 4, 4), (0, 0, 0), 6, 64),
        (1, (8, 28, 28), (8, 7, 7), (0, 3, 3), 3, 32),
    ),
    "cuda": (
        (128, (56, 56), (7, 7), (3, 3), 3, 32),
        (128, (28, 28), (7, 7), (3, 3), 6, 32),
        (128, (14, 14), (7, 7), (3, 3), 12, 32),
        (128, (7, 7), (7, 7), (0, 0), 24, 32),
        (128, (64, 64), (8, 8), (4, 4), 3, 32),
        (32, (96, 96), (12, 12), (6, 6), 4, 32),
        (64, (64, 64), (16, 16), (8, 8), 3, 32),
        (64, (8, 8, 8), (4, 4, 4), (0, 0, 0), 6, 64),
        (8, (16, 56, 56), (8, 7, 7), (4, 3, 3), 3, 32),
    ),
}

# The windows of main workloads. Of each window the workload with the most tokens is a main one.
MAIN = ((7, 7), (16, 16), (8, 7, 7))


@dataclass(frozen=True)
class Spec(harness.Spec):
    batch: int = 1
    grid: Sizes = ()
    window: Sizes = ()
    shift: Sizes = ()
    heads: int = 1
    head_dim: int = 32

    family = "window"

    def __str__(self) -> str:
        where = f"B{self.batch}-{_by(self.grid)}-W{_by(self.window)}-S{_by(self.shift)}"
        return f"{self.kernel}-{self.direction}-{where}-H{self.heads}-D{self.head_dim}"

    def work(self, itemsize: int) -> tuple[float, float]:
        """Two products forward and five backward, of 2 operations for each of N keys of a token.

        A token has heads * head_dim values in each of q, k, v and out. Forward reads three and writes one; backward
        reads q, k, v and dout and writes dq, dk and dv, for the rows of a window fit on the chip and are made again.
        The table is read twice, its gradient written once.
        """
        width, tokens = self.heads * self.head_dim, self.batch * math.prod(self.grid)
        entries = math.prod(2 * w - 1 for w in self.window)
        products, values, tables = (7, 4 + 7, 3) if self.direction == "forward+backward" else (2, 4, 1)
        flops = 2 * products * tokens * math.prod(self.window) * width
        return flops, (values * tokens * width + tables * entries * self.heads) * itemsize

    def build(self, session: Session) -> WindowCase:
        return WindowCase(self, session)


def _by(sizes: Sizes) -> str:
    return "x".join(map(str, sizes))


def specs(session: Session) -> list[Spec]:
    shapes = list(SIZES["tiny" if session.tiny else session.device])
    if session.everything:  # every other block of a model does not shift
        shapes += [(b, g, w, (0,) * len(w), *rest) for b, g, w, s, *rest in shapes if any(s)]
    found = []
    for batch, grid, window, shift, heads, head_dim in shapes:
        columns = {
            "batch": batch, "tokens": batch * math.prod(grid), "heads": heads, "head_dim": head_dim,
            "grid": _by(grid), "window": _by(window), "shift": _by(shift),
        }  # fmt: skip
        shape = (batch, grid, window, shift, heads, head_dim)
        main = window in MAIN and any(shift) and not any(s.window == window for s in found)
        main = harness.is_main(session, main)
        for direction in ("forward", "forward+backward"):
            found.append(Spec("window_attention", direction, tuple(columns.items()), PROVIDERS, *shape, main=main))
    return found


class WindowCase(Case):
    """qkv [B, *grid, 3, heads, d] and a table. With backward, the gradients of both, and the forward before them."""

    # Bytes of float64 scores that the check makes at a time.
    SCORES = 1e9

    def __init__(self, spec: Spec, session: Session) -> None:
        self.spec, self.session, self.device = spec, session, session.device
        self.backward = spec.direction == "forward+backward"
        width, tokens = spec.heads * spec.head_dim, spec.batch * math.prod(spec.grid)
        self.tokens = math.prod(spec.window)
        entries = math.prod(2 * w - 1 for w in spec.window)
        size = session.dtype.itemsize
        self.flops, self.bytes = spec.work(size)
        make = functools.partial(torch.randn, device=self.device, dtype=session.dtype)
        self.inputs = []
        for _ in range(harness.copies(self.device, 4 * tokens * width * size)):
            qkv = make(spec.batch, *spec.grid, 3, spec.heads, spec.head_dim)
            self.inputs.append([qkv, make(entries, spec.heads), make(spec.batch, *spec.grid, width)])
        self.windows = Windows.make(spec.grid, spec.window, spec.shift, self.device, session.dtype)

    # ---- what each provider calls ----

    def with_warpform(self) -> list[Callable[[], Any]]:
        how = {"window_size": self.spec.window, "shift_size": self.spec.shift}

        def attention(qkv: Tensor, table: Tensor) -> tuple[Tensor]:
            return (warpform.ops.window_attention(qkv, table, **how),)

        return [self.call(attention, [qkv, table], [dout]) for qkv, table, dout in self.inputs]

    def blocks(self, block: Callable[..., tuple[Tensor, Tensor]]) -> list[Callable[[], Any]]:
        """Calls of a peer on QKV in windows, and on the input of the block, which it has to move there."""
        found = []
        for qkv, table, dout in self.inputs:
            x, moved = torch.randn_like(dout), self.windows.cut(qkv)
            dmoved = torch.randn_like(self.windows.cut(dout))
            found.append(self.call(block, [x, moved, table], [dmoved, dout], self.windows))
            if len(found) == 1:
                self.x, self.dmoved = x, dmoved  # for the check
        return found

    def call(
        self, function: Callable[..., tuple[Tensor, ...]], tensors: list[Tensor], douts: list[Tensor], *rest: Any
    ) -> Callable[[], Any]:
        return harness.inference_or_step(lambda *leaves: function(*leaves, *rest), tensors, douts, self.backward)

    def with_eager(self) -> list[Callable[[], Any]]:
        return self.blocks(eager_block)

    def with_sdpa(self) -> list[Callable[[], Any]]:
        return self.blocks(sdpa_block)

    def with_eager_compiled(self) -> list[Callable[[], Any]]:
        self.session.allow_compile()
        return self.blocks(harness.compiled(eager_block, False))  # at its best: code for each shape

    def with_sdpa_compiled(self) -> list[Callable[[], Any]]:
        self.session.allow_compile()
        return self.blocks(harness.compiled(sdpa_block, False))

    def with_flex_compiled(self) -> list[Callable[[], Any]]:
        if self.device == "cpu" and self.backward:
            raise Missing("FlexAttention has no backward on a CPU")
        self.session.allow_compile()
        return self.blocks(harness.compiled(flex_block, False))

    # ---- what has to come out ----

    @functools.cached_property
    def compared(self) -> list[int]:
        """The images that are compared; no other one enters their output."""
        return sorted({0, self.spec.batch - 1})

    @functools.cached_property
    def truth(self) -> list[dict[str, Tensor]]:
        """In float64 and in the dtype itself: out and dqkv of `compared`, and dtable of all."""
        qkv, table, dout = self.inputs[0]
        how = {"window_size": list(self.spec.window), "shift_size": list(self.spec.shift)}
        per_image = 8 * math.prod(self.spec.grid) * self.tokens * self.spec.heads
        chunk = max(1, int((self.SCORES if self.device == "cuda" else self.SCORES / 8) / per_image))
        chunks = torch.arange(self.spec.batch).split(chunk) if self.backward else torch.tensor(self.compared).split(1)
        results = []
        for dtype in (torch.float64, self.session.dtype):
            parts: dict[str, list[Tensor]] = {"out": [], "dqkv": []}
            dtable = torch.zeros_like(table, dtype=torch.float64)
            for rows in chunks:
                kept = torch.isin(rows, torch.tensor(self.compared))
                leaves = [t.to(dtype).detach().requires_grad_() for t in (qkv[rows], table)]
                with torch.set_grad_enabled(self.backward):
                    out, _ = oracle.window_attention(*leaves, None, None, **how)
                parts["out"].append(out.detach()[kept])
                if self.backward:
                    dqkv, part = torch.autograd.grad(out, leaves, dout[rows].to(dtype))
                    parts["dqkv"].append(dqkv[kept])
                    dtable += part
            found = {name: torch.cat(tensors) for name, tensors in parts.items() if tensors}
            results.append({**found, "dtable": dtable} if self.backward else found)
        return results

    def check(self, provider: str, output: Sequence[Tensor]) -> None:
        """warpform gives out, dqkv, dtable; peers x in windows, out, dx, dqkv in windows, dtable."""
        for tensor in output:
            assert torch.isfinite(tensor).all(), "not finite"
        if provider != "warpform":
            moved, *output = output
            if self.backward:
                dx = output.pop(1)
                assert torch.equal(self.windows.cut(dx), self.dmoved), "dx: not what came back from the windows"
            assert torch.equal(self.windows.join(moved), self.x), "x: not what was moved into windows"
        found = dict(zip(("out", "dqkv", "dtable"), output, strict=False))
        if "dqkv" in found and provider != "warpform":
            found["dqkv"] = self.windows.join(found["dqkv"].flatten(2)).view(self.inputs[0][0].shape)
        exact, eager = self.truth
        assert found.keys() == exact.keys()
        for name, wanted in exact.items():
            actual = found[name] if name == "dtable" else found[name][self.compared]
            if provider == "warpform":
                assert_close(name, actual, wanted, eager[name].to(actual.dtype), gradient=name != "out")
            else:
                harness.assert_near(name, actual, wanted, eager[name].to(actual.dtype))


def test_window(spec: Spec, provider: str, measure: Callable[[harness.Spec, str], None]) -> None:
    measure(spec, provider)
