"""torch.compile without breaks or recompilation, torch.export with dynamic sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import warpform
from helpers.compilations import Compilations
from warpform import Packing, ops

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def encode(x: Tensor, weight: Tensor, packing: Packing) -> Tensor:
    """Every op once, as an encoder layer calls them."""
    hidden = packing.pack(x)
    heads = ops.bias_gelu(hidden, weight).unflatten(1, (2, -1))
    out, lse = ops.varlen_attention(
        heads,
        heads,
        heads,
        packing.cu_seqlens,
        packing.cu_seqlens,
        packing.max_seqlen,
        packing.max_seqlen,
        causal=True,
        return_lse=True,
    )
    table = (weight * torch.arange(6).unsqueeze(1)).view(6, 2, 8)
    out = out + ops.disentangled_attention(
        heads,
        heads,
        heads,
        table,
        table,
        packing.cu_seqlens,
        packing.max_seqlen,
        positions=packing.position_ids,
        position_buckets=4,
        max_relative_positions=8,
    )
    lse = torch.where(lse.isfinite(), lse, 0).mean(0)
    hidden, total = ops.add_bias_residual_layer_norm(out.flatten(1), weight, hidden, weight, weight, return_sum=True)
    hidden, total = ops.add_residual_rms_norm(hidden + lse.unsqueeze(1), total, weight, return_sum=True)
    return packing.unpack(ops.rms_norm_gelu(hidden) + total)


def inputs_of(lengths: list[int], seqlen: int, capacity: int | None = None) -> tuple[Tensor, Tensor, Packing]:
    x = torch.randn(len(lengths), seqlen, 16, requires_grad=True)
    weight = torch.randn(16, requires_grad=True)
    return x, weight, Packing.from_lengths(lengths, seqlen=seqlen, capacity=capacity)


BATCHES = (([3, 5, 2], 6), ([7, 1, 4, 9], 9), ([2, 2], 11), ([13, 8, 5, 3, 3], 14), ([6, 10, 4], 12))


@pytest.mark.parametrize("capacity", (None, pytest.param(60, marks=pytest.mark.slow)))
def test_compile_once_for_all_sizes(capacity: int | None) -> None:
    backend = Compilations()
    compiled = torch.compile(encode, fullgraph=True, dynamic=True, backend=backend)
    for lengths, seqlen in BATCHES:
        x, weight, packing = inputs_of(lengths, seqlen, capacity)
        results = []
        for function in (encode, compiled):
            out = function(x, weight, packing)
            results.append((out, *torch.autograd.grad(out.square().sum(), (x, weight))))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)
    assert backend.count == 1


def test_compile_of_default_settings_settles() -> None:
    # dynamic=None: the first new size makes sizes dynamic, and after that nothing is compiled again.
    backend = Compilations()
    compiled = torch.compile(encode, fullgraph=True, backend=backend)
    counts = []
    for lengths, seqlen in BATCHES:
        x, weight, packing = inputs_of(lengths, seqlen)
        torch.testing.assert_close(compiled(x, weight, packing), encode(x, weight, packing))
        counts.append(backend.count)
    assert counts[1:] == [2] * (len(BATCHES) - 1)


def test_compile_with_packing_inside() -> None:
    def run(x: Tensor, mask: Tensor) -> Tensor:
        return encode(x, x.new_ones(16), Packing.from_mask(mask, capacity=64))

    backend = Compilations()
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=backend)
    for lengths, seqlen in BATCHES:
        x = torch.randn(len(lengths), seqlen, 16)
        mask = torch.rand(len(lengths), seqlen) > 0.4
        torch.testing.assert_close(compiled(x, mask), run(x, mask))
    assert backend.count == 1


def test_compile_with_lengths_inside() -> None:
    def run(x: Tensor, lengths: Tensor) -> Tensor:
        packing = Packing.from_lengths(lengths, seqlen=x.size(1), capacity=64)
        return packing.unpack(packing.pack(x) + 1)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths, seqlen in BATCHES:
        x = torch.randn(len(lengths), seqlen, 16)
        torch.testing.assert_close(compiled(x, torch.tensor(lengths)), run(x, torch.tensor(lengths)))


@pytest.mark.slow
def test_compile_with_inductor() -> None:
    x, weight, packing = inputs_of([3, 5, 2], 6)
    compiled = torch.compile(encode, fullgraph=True, dynamic=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, weight, packing), encode(x, weight, packing))


class Encoder(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        return encode(x, self.weight, packing)


@pytest.mark.parametrize("strict", (False, True))
def test_export_with_dynamic_sizes(strict: bool, tmp_path: Any) -> None:
    model = Encoder()
    x, _, packing = inputs_of([3, 5, 2, 4], 7)
    auto = torch.export.Dim.AUTO
    shapes = {
        "x": {0: auto, 1: auto},
        "packing": [{0: auto}, {0: auto}, {0: auto}, {0: auto}, {0: auto, 1: auto}, auto],
    }
    program = torch.export.export(model, (x.detach(), packing), dynamic_shapes=shapes, strict=strict)
    file = tmp_path / "model.pt2"
    torch.export.save(program, file)
    loaded = torch.export.load(file).module()
    for lengths, seqlen in BATCHES[:3]:
        x, _, packing = inputs_of(lengths, seqlen)
        torch.testing.assert_close(loaded(x.detach(), packing), model(x.detach(), packing))


def test_packing_is_a_pytree() -> None:
    packing = Packing.from_lengths([2, 0, 3])
    leaves, spec = torch.utils._pytree.tree_flatten(packing)
    assert len(leaves) == 6
    again = torch.utils._pytree.tree_unflatten(leaves, spec)
    assert isinstance(again, warpform.Packing) and again.max_seqlen == 3 and again.total == 5
    dumped = torch.utils._pytree.treespec_dumps(spec)
    assert torch.utils._pytree.treespec_loads(dumped) == spec
