"""The encoder's ops, forward and backward, against eager and compiled torch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import harness
import torch
import torch.nn.functional as F
from harness import Case, Session
from torch import Tensor

import warpform
from helpers import oracle
from helpers.compare import assert_close

PROVIDERS = ("warpform", "torch_eager", "torch_compiled")
DIFFERENTIABLE = ("pack", "unpack", "add_bias_residual_layer_norm", "bias_gelu")

# The table of sizes: (sequences, longest, hidden, intermediate). Lengths are uniform on [0.2 S, S], as
# ByteTransformer's (average 0.6 S).
SIZES = {"tiny": (3, 8, 32, 64), "cpu": (8, 256, 768, 3072), "cuda": (16, 1024, 768, 3072)}


@dataclass(frozen=True)
class Spec(harness.Spec):
    lengths: tuple[int, ...] = ()
    seqlen: int = 1

    family = "encoder"

    def work(self, itemsize: int) -> tuple[float, float]:
        """Elementwise work is a handful of operations a value; these workloads are bound by bytes."""
        tokens, slots = sum(self.lengths), len(self.lengths) * self.seqlen
        row = dict(self.sizes)["hidden"] * itemsize
        packed, padded, backward = tokens * row, slots * row, self.direction == "backward"
        moved = {
            "packing_plan": slots * 5 + tokens * 16,
            "pack": (packed + padded if backward else 2 * packed) + tokens * 8,
            "unpack": (2 * packed if backward else packed + padded) + tokens * 8,
            "add_bias_residual_layer_norm": 3 * packed,
            "bias_gelu": 3 * packed if backward else 2 * packed,
        }
        return 0.0, moved[self.kernel]

    def build(self, session: Session) -> OpCase:
        return OpCase(self, session)


def specs(session: Session) -> list[Spec]:
    batch, seqlen, hidden, intermediate = SIZES["tiny" if session.tiny else session.device]
    lengths = harness.draw_lengths(batch, seqlen)
    found = []
    for op in ("packing_plan", *DIFFERENTIABLE):
        width = intermediate if op == "bias_gelu" else hidden
        columns = {"batch": batch, "seqlen": seqlen, "tokens": sum(lengths), "hidden": width}
        for direction in ("forward", "backward") if op in DIFFERENTIABLE else ("forward",):
            found.append(Spec(op, direction, tuple(columns.items()), PROVIDERS, lengths, seqlen, main=True))
    return found


def _same(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def eager_plan(mask: Tensor) -> tuple[Tensor, Tensor, int]:
    """Computes what padding-free code in transformers takes from a mask: offsets, indices, the longest length."""
    lengths = mask.sum(1, dtype=torch.int32)
    indices = mask.flatten().nonzero().flatten()
    return F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)), indices, int(lengths.max())


def eager_pack(x: Tensor, indices: Tensor) -> Tensor:
    return x.flatten(0, 1)[indices]


def eager_unpack(t: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    return t.new_zeros(batch * seqlen, t.size(1)).index_put((indices,), t).view(batch, seqlen, -1)


def eager_norm(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    ln_bias: Tensor,
    eps: float = 1e-5,
    *,
    return_sum: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """ops.add_bias_residual_layer_norm, with the same arguments, by torch's own operations."""
    total = x if bias is None else x + bias
    total = total if residual is None else total + residual
    out = F.layer_norm(total, (x.size(-1),), weight, ln_bias, eps)
    return (out, total) if return_sum else out


def eager_gelu(x: Tensor, bias: Tensor | None, approximate: str = "none") -> Tensor:
    return F.gelu(x if bias is None else x + bias, approximate=approximate)


class OpCase(Case):
    """One op on packed or padded rows. Backward is timed alone, over a forward that was done before."""

    EPS = 1e-12

    def __init__(self, spec: Spec, session: Session) -> None:
        self.spec, self.session, self.device = spec, session, session.device
        self.backward = spec.direction == "backward"
        batch, seqlen, width = len(spec.lengths), spec.seqlen, dict(spec.sizes)["hidden"]
        self.batch, self.tokens = batch, sum(spec.lengths)
        self.packing = warpform.Packing.from_lengths(spec.lengths, seqlen, device=self.device)
        op = spec.kernel
        self.flops, self.bytes = spec.work(session.dtype.itemsize)
        rows, grid, line = (self.tokens, width), (batch, seqlen, width), (width,)
        shapes = {
            "packing_plan": (),
            "pack": (grid,),
            "unpack": (rows,),
            "add_bias_residual_layer_norm": (rows, line, rows, line, line),
            "bias_gelu": (rows, line),
        }[op]
        out = {"pack": rows, "unpack": grid}.get(op, rows)
        make = functools.partial(torch.randn, device=self.device, dtype=session.dtype)
        mask = self.packing.ranks >= 0
        count = harness.copies(self.device, self.bytes)
        if op == "packing_plan":
            self.inputs = [[mask.clone()] for _ in range(count)]
        else:
            self.inputs = [[make(shape) for shape in shapes] for _ in range(count)]
        self.douts = [make(out) for _ in range(count)] if self.backward else []

    def calls(self, op: Callable[..., Any]) -> list[Callable[[], Any]]:
        found: list[Callable[[], Any]] = []
        for i, inputs in enumerate(self.inputs):
            if not self.backward:
                found.append(functools.partial(_infer, op, inputs))
                continue
            leaves = [t.detach().requires_grad_() for t in inputs]
            found.append(functools.partial(torch.autograd.grad, op(*leaves), leaves, self.douts[i], retain_graph=True))
        return found

    def eager(self, wrap: Callable[..., Any] = _same) -> Callable[..., Any]:
        """torch's composition; with `wrap`, what that makes of it (torch.compile)."""
        indices, batch, seqlen = self.packing.indices, self.batch, self.spec.seqlen
        table: dict[str, Callable[..., Any]] = {"packing_plan": wrap(eager_plan), "bias_gelu": wrap(eager_gelu)}
        pack, unpack, layer_norm = wrap(eager_pack), wrap(eager_unpack), wrap(eager_norm)
        table["pack"] = lambda x: pack(x, indices)
        table["unpack"] = lambda t: unpack(t, indices, batch, seqlen)
        table["add_bias_residual_layer_norm"] = lambda *tensors: layer_norm(*tensors, self.EPS)
        return table[self.spec.kernel]

    def with_warpform(self) -> list[Callable[[], Any]]:
        ops, packing = warpform.ops, self.packing
        table: dict[str, Callable[..., Any]] = {
            "packing_plan": warpform.Packing.from_mask,
            "pack": packing.pack,
            "unpack": packing.unpack,
            "add_bias_residual_layer_norm": lambda *tensors: ops.add_bias_residual_layer_norm(*tensors, self.EPS),
            "bias_gelu": lambda x, bias: ops.bias_gelu(x, bias),
        }
        return self.calls(table[self.spec.kernel])

    def with_torch_eager(self) -> list[Callable[[], Any]]:
        return self.calls(self.eager())

    def with_torch_compiled(self) -> list[Callable[[], Any]]:
        self.session.allow_compile()
        return self.calls(self.eager(harness.compiled))

    def check(self, provider: str, output: Any) -> None:
        inputs = self.inputs[0]
        if self.spec.kernel == "packing_plan":
            offsets, indices, longest = eager_plan(*inputs)
            if isinstance(output, warpform.Packing):
                output = (output.cu_seqlens, output.indices, output.max_seqlen)
            assert torch.equal(output[0], offsets) and torch.equal(output[1], indices) and output[2] == longest
            return
        names = [f"gradient {i}" for i in range(len(inputs))] if self.backward else ["out"]
        outputs = output if self.backward else [output]
        eager = self.run(self.eager(), inputs)
        if self.spec.kernel in ("pack", "unpack"):
            for name, actual, wanted in zip(names, outputs, eager, strict=True):
                assert torch.equal(actual, wanted), f"{name}: values were moved to other places, or changed"
            return
        if self.spec.kernel == "bias_gelu":
            truth = self.run(lambda x, b: oracle.bias_gelu(x, b, "none"), [t.double() for t in inputs])
        else:
            doubles = [t.double() for t in inputs]
            truth = self.run(lambda *t: oracle.add_bias_residual_layer_norm(*t, self.EPS)[0], doubles)
        for name, actual, wanted, plain in zip(names, outputs, truth, eager, strict=True):
            if provider == "warpform":
                assert_close(name, actual, wanted, plain, gradient=self.backward)
            else:
                harness.assert_near(name, actual, wanted, plain)

    def run(self, op: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
        """The output, or the gradients, of `op` in the dtype of the inputs."""
        if not self.backward:
            return [_infer(op, inputs)]
        leaves = [t.detach().clone().requires_grad_() for t in inputs]
        return list(torch.autograd.grad(op(*leaves), leaves, self.douts[0].to(leaves[0].dtype)))


def _infer(function: Callable[..., Any], inputs: list[Tensor]) -> Any:
    with torch.inference_mode():
        return function(*inputs)


def test_encoder(spec: harness.Spec, provider: str, measure: Callable[[harness.Spec, str], None]) -> None:
    measure(spec, provider)
