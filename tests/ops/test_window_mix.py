"""window_mix through its public function: gradients, meaning, errors, compilation and export."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from helpers.compilations import Compilations
from warpform import ops
from warpform.nn import WindowMix

OPS = torch.ops.warpform


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


# ---- gradients ----


@pytest.mark.parametrize("dilated", (False, True), ids=("block", "grid"))
def test_gradcheck(dilated: bool) -> None:
    tensors = (leaf(2, 4, 3, 5), leaf(6, 6), leaf(6), leaf(5), leaf(5), leaf(2, 4, 3, 5))

    def run(x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, gate: Tensor) -> Tensor:
        return ops.window_mix(
            x, weight, bias, window_size=(2, 3), dilated=dilated, norm_weight=norm_weight, norm_bias=norm_bias,
            eps=1e-2, gate=gate,
        )  # fmt: skip

    assert torch.autograd.gradcheck(run, tensors)


def test_gradcheck_of_the_product_alone() -> None:
    assert torch.autograd.gradcheck(lambda x, w: ops.window_mix(x, w, window_size=2), (leaf(1, 4, 2, 3), leaf(4, 4)))


def test_only_gradients_that_are_needed() -> None:
    x, weight, gate = leaf(1, 4, 4, 3), leaf(4, 4), leaf(1, 4, 4, 3)
    ops.window_mix(x.detach(), weight, window_size=2, gate=gate.detach()).sum().backward()
    assert x.grad is None and gate.grad is None and weight.grad is not None
    with torch.no_grad():
        assert not ops.window_mix(x, weight, window_size=2).requires_grad


def test_what_has_no_derivative_raises() -> None:
    x, weight = leaf(1, 4, 4, 3), leaf(4, 4)

    def run(x: Tensor) -> Tensor:
        return ops.window_mix(x, weight, window_size=2)

    (g,) = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="window_mix: double backward is not implemented"):
        g.square().sum().backward()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="window_mix: forward-mode"):
        run(forward_ad.make_dual(x.detach(), torch.ones_like(x)))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast(dtype: torch.dtype) -> None:
    """x, matrix, bias and gate are cast, the norm is not; float64 stays."""
    x, gate, weight, bias, norm, norm_bias = (
        leaf(*shape, dtype=torch.float32) for shape in ((2, 4, 6, 8), (2, 4, 6, 8), (6, 6), (6,), (8,), (8,))
    )
    how: dict[str, Any] = {"window_size": (2, 3), "norm_weight": norm, "norm_bias": norm_bias}
    with torch.autocast("cpu", dtype=dtype):
        out = ops.window_mix(x, weight, bias, gate=gate, **how)
        exact = ops.window_mix(x.double(), weight.double(), window_size=(2, 3))
    assert out.dtype == dtype and exact.dtype == torch.float64
    cast = [t.to(dtype) for t in (x, weight, bias, gate)]
    assert torch.equal(out, ops.window_mix(*cast[:3], gate=cast[3], **how))
    out.float().sum().backward()
    assert {t.grad.dtype for t in (x, gate, weight, bias, norm, norm_bias)} == {torch.float32}


def test_autocast_to_another_dtype_than_that_of_the_norm() -> None:
    x, weight, norm = (leaf(*shape, dtype=torch.float16) for shape in ((1, 4, 4, 8), (4, 4), (8,)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ops.window_mix(x, weight, window_size=2, norm_weight=norm)
    expected = ops.window_mix(x.bfloat16(), weight.bfloat16(), window_size=2, norm_weight=norm.float())
    assert torch.equal(out, expected)


# ---- meaning ----


def test_places_of_tokens() -> None:
    """A matrix with one entry moves one token of each window to the place of another."""
    x = torch.arange(4 * 6, dtype=torch.float32).view(1, 4, 6, 1)
    weight = torch.zeros(6, 6)
    weight[5, 1] = 1  # the second token of a window of 2 x 3 goes to the sixth
    block = ops.window_mix(x, weight, window_size=(2, 3))[0, :, :, 0]
    # Blocks of 2 x 3: from (0, 1) to (1, 2) of each.
    assert block.nonzero().tolist() == [[1, 2], [1, 5], [3, 2], [3, 5]]
    assert [block[1, 2], block[1, 5], block[3, 2], block[3, 5]] == [1, 4, 13, 16]
    grid = ops.window_mix(x, weight, window_size=(2, 3), dilated=True)[0, :, :, 0]
    # Cells of 2 x 2: from those of the first row and second column of cells to the last cell.
    assert grid[:2].count_nonzero() == 0 and torch.equal(grid[2:, 4:], x[0, :2, 2:4, 0])


def test_a_gate_gets_one_added() -> None:
    x, gate = torch.randn(1, 4, 4, 3), torch.randn(1, 4, 4, 3)
    weight, bias = torch.zeros(4, 4), torch.tensor([0.0, 1.0, -1.0, 2.0])
    out = ops.window_mix(x, weight, bias, window_size=2, gate=gate)
    assert torch.equal(out[:, ::2, ::2], gate[:, ::2, ::2])
    assert torch.equal(out[:, ::2, 1::2], 2 * gate[:, ::2, 1::2])
    assert not out[:, 1::2, ::2].any() and torch.equal(out[:, 1::2, 1::2], 3 * gate[:, 1::2, 1::2])


def test_a_window_as_large_as_the_grid_is_both() -> None:
    x, weight = torch.randn(2, 3, 5, 4), torch.randn(15, 15)
    one, other = (ops.window_mix(x, weight, window_size=(3, 5), dilated=dilated) for dilated in (False, True))
    assert torch.equal(one, other)
    torch.testing.assert_close(one, torch.einsum("ij,bjc->bic", weight, x.flatten(1, 2)).view_as(x))


def test_the_module_is_the_op() -> None:
    torch.manual_seed(0)
    module = WindowMix((2, 3), dilated=True, channels=5)
    assert module.weight.std() < 0.05 and not module.bias.any() and (module.norm_weight == 1).all()
    x, gate = torch.randn(1, 4, 6, 10).chunk(2, -1)
    expected = ops.window_mix(
        x, module.weight, module.bias, window_size=(2, 3), dilated=True, norm_weight=module.norm_weight,
        norm_bias=module.norm_bias, gate=gate,
    )  # fmt: skip
    assert torch.equal(module(x, gate), expected)
    bare = WindowMix((2, 2))
    assert [name for name, _ in bare.named_parameters()] == ["weight", "bias"]
    assert torch.equal(bare(x), ops.window_mix(x, bare.weight, bare.bias, window_size=2))


# ---- errors ----

X = torch.randn(1, 4, 6, 8)
W = torch.randn(4, 4)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": [1.0]}, TypeError, r"x must be a tensor, got \[1.0\] \(list\)"),
    ({"x": X.long()}, TypeError, r"x must be float16, bfloat16, float32 or float64, got int64"),
    ({"x": X[0]}, ValueError, r"x must be of shape \[batch, height, width, channels\], got \[4, 6, 8\]"),
    ({"x": X[..., :0]}, ValueError, r"x must have at least 1 channel"),
    ({"window_size": 2.0}, TypeError, r"window_size must be an int, got 2.0"),
    ({"window_size": (2, 2, 2)}, ValueError, r"window_size must be an int or 2 of them, .*got \[2, 2, 2\]"),
    ({"window_size": 0}, ValueError, r"window_size must be at least 1, got \[0, 0\]"),
    ({"window_size": 4}, ValueError, r"window_size must divide the height and width of x, .*got \[4, 4\]"),
    ({"weight": W[:3]}, ValueError, r"weight must be of shape \[4, 4\], got \[3, 4\]"),
    ({"weight": W.half()}, TypeError, r"weight must be float32 as x is, got float16"),
    ({"weight": None}, TypeError, r"weight must be a tensor, got None"),
    ({"bias": torch.ones(3)}, ValueError, r"bias must be of shape \[4\], got \[3\]"),
    ({"bias": torch.ones(4).to("meta")}, ValueError, r"bias must be on cpu as x is, got meta"),
    ({"norm_weight": torch.ones(7)}, ValueError, r"norm_weight must be of shape \[8\], got .*\[7\]"),
    ({"norm_weight": torch.ones(8).half()}, TypeError, r"norm_weight must be float32 as x is, or float32, got float16"),
    ({"norm_bias": torch.ones(8)}, ValueError, r"norm_bias must be None where norm_weight is None"),
    ({"norm_weight": torch.ones(8), "norm_bias": torch.ones(8).double()}, TypeError, r"norm_bias must be float32"),
    ({"gate": X[:, :2]}, ValueError, r"gate must be float32 of shape \[1, 4, 6, 8\] as x is, got .*\[1, 2, 6, 8\]"),
    ({"gate": X.half()}, (TypeError, ValueError), r"gate must .*got float16"),
    ({"eps": -1.0}, ValueError, r"eps must not be negative, got -1"),
]  # fmt: skip


@pytest.mark.parametrize(("changed", "error", "message"), BAD, ids=[m for _, _, m in BAD])
def test_bad_arguments(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^window_mix: {message}"):
        ops.window_mix(**{"x": X, "weight": W, "window_size": 2, **changed})


def test_a_gate_of_another_shape_is_refused_where_gradients_are_recorded() -> None:
    """A gate is not stretched to the shape of x, as a factor of torch would be."""
    x = leaf(1, 4, 6, 8, dtype=torch.float32)
    for gate in (X[:, :1], X[0, 0, 0], X.half(), X.double(), X.to("meta")):
        with pytest.raises((TypeError, ValueError), match="^window_mix: gate must "):
            ops.window_mix(x, W, window_size=2, gate=gate)


def test_a_gate_is_the_same_with_and_without_gradients() -> None:
    x, gate, weight = leaf(1, 4, 6, 8), leaf(1, 8, 4, 6).permute(0, 2, 3, 1), W.double()
    recorded = ops.window_mix(x, weight, window_size=2, gate=gate)
    assert recorded.is_contiguous()  # however the gate lies
    with torch.no_grad():
        torch.testing.assert_close(
            ops.window_mix(x, weight, window_size=2, gate=gate), recorded, atol=1e-14, rtol=1e-14
        )


def test_op_called_directly_checks_shapes() -> None:
    out, mean, rstd = OPS.window_mix(X, W, None, torch.ones(8), None, None, [2, 2])
    given = (X, W, None, torch.ones(8), None, None)
    for message, dout, statistics in (
        ("dout must", out[:, :2], (mean, rstd)),
        ("mean must be float32 of shape", out, (mean[:5], rstd)),
        ("rstd must be float32 of shape", out, (mean, rstd.half())),
    ):
        with pytest.raises(RuntimeError, match=rf"^window_mix_backward: {message}"):
            OPS.window_mix_backward(dout, *given, *statistics, [2, 2])


# ---- compile, export ----


class Layer(torch.nn.Module):
    """A product, its halves mixed and gated in blocks, and the result mixed across a grid."""

    def __init__(self) -> None:
        super().__init__()
        self.inwards = torch.nn.Linear(8, 16)
        self.block, self.grid = WindowMix((2, 3), channels=8), WindowMix((3, 2), dilated=True)

    def forward(self, x: Tensor) -> Tensor:
        gate, values = self.inwards(x).chunk(2, -1)
        return self.grid(self.block(values, gate))


SIZES = ((2, 12, 18), (3, 6, 12), (5, 12, 6))


def test_compile_once_for_all_sizes(fresh_dynamo: None) -> None:
    model, backend = Layer(), Compilations()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for size in SIZES:
        x = torch.randn(*size, 8)
        results = []
        for function in (model, compiled):
            out = function(x)
            results.append((out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)
    assert backend.count == 1


@pytest.mark.parametrize("strict", (False, pytest.param(True, marks=pytest.mark.slow)))
def test_export_with_dynamic_sizes(strict: bool, fresh_dynamo: None) -> None:
    model, auto = Layer(), torch.export.Dim.AUTO
    shapes = ({0: auto, 1: auto, 2: auto},)
    program = torch.export.export(model, (torch.randn(2, 12, 18, 8),), dynamic_shapes=shapes, strict=strict)
    for size in SIZES:
        x = torch.randn(*size, 8)
        torch.testing.assert_close(program.module()(x), model(x))
