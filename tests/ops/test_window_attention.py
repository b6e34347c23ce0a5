"""window_attention through its public function: gradients, meaning, errors, compilation and export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import oracle
from helpers.compilations import Compilations
from warpform import ops

OPS = torch.ops.warpform


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


# ---- gradients ----


@pytest.mark.sampled
@pytest.mark.parametrize("cosine", (False, True), ids=("scaled", "cosine"))
@pytest.mark.parametrize(
    ("grid", "window", "shift"),
    (((3, 3), (2, 2), (1, 1)), ((4, 2), (2, 3), (0, 2)), ((2, 3, 1), (2, 2, 1), (1, 0, 0))),
    ids=("padded", "uneven", "volume"),
)
def test_gradcheck(grid: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...], cosine: bool) -> None:
    entries = 1
    for w in window:
        entries *= 2 * w - 1
    inputs = (
        leaf(2, *grid, 3, 2, 2),
        leaf(entries, 2),
        torch.tensor([0.5, -0.3], dtype=torch.float64, requires_grad=True) if cosine else None,
        leaf(3, 2, 2),
    )

    def run(qkv: Tensor, table: Tensor, logit_scale: Tensor | None, qkv_bias: Tensor) -> Tensor:
        return ops.window_attention(
            qkv, table, window_size=window, shift_size=shift, logit_scale=logit_scale, qkv_bias=qkv_bias, mask_value=-1
        )

    assert torch.autograd.gradcheck(run, inputs)


def test_gradcheck_of_a_window_whose_lse_is_kept() -> None:
    qkv, table = leaf(1, 9, 8, 3, 1, 2), leaf(17 * 15, 1)
    assert torch.autograd.gradcheck(
        lambda *t: ops.window_attention(*t, window_size=(9, 8)), (qkv, table), fast_mode=True
    )


def test_only_gradients_that_are_needed() -> None:
    qkv, table = leaf(1, 4, 4, 3, 2, 4), leaf(9, 2)
    ops.window_attention(qkv.detach(), table, window_size=2).sum().backward()
    assert qkv.grad is None and table.grad is not None
    ops.window_attention(qkv, table.detach(), window_size=2).sum().backward()
    assert qkv.grad is not None
    with torch.no_grad():
        assert not ops.window_attention(qkv, table, window_size=2).requires_grad


FUNCTION: Callable[[Tensor], Tensor] = lambda qkv: ops.window_attention(qkv, window_size=2)  # noqa: E731


def test_what_has_no_derivative_raises() -> None:
    x = torch.randn(1, 4, 4, 3, 2, 4, requires_grad=True)
    (g,) = torch.autograd.grad(FUNCTION(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="window_attention: double backward is not implemented"):
        g.square().sum().backward()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="window_attention: forward-mode"):
        FUNCTION(forward_ad.make_dual(x.detach(), torch.ones_like(x)))
    with pytest.raises(NotImplementedError, match=r"window_attention: torch\.func transforms"):
        torch.func.grad(lambda x: FUNCTION(x).sum())(x)


class ArgumentDtypes(TorchDispatchMode):
    """The dtypes of the tensors that the first call of the op came with."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is OPS.window_attention.default and not self.dtypes:
            self.dtypes = [t.dtype for t in args[:4]]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast(dtype: torch.dtype) -> None:
    qkv, table, bias = (leaf(*shape, dtype=torch.float32) for shape in ((2, 5, 6, 3, 2, 8), (25, 2), (3, 2, 8)))
    scale = leaf(2, dtype=torch.float32)
    how = {"window_size": 3, "shift_size": 1}
    with torch.autocast("cpu", dtype=dtype), ArgumentDtypes() as seen:
        out = ops.window_attention(qkv, table, logit_scale=scale, qkv_bias=bias, **how)
        assert ops.window_attention(qkv.double(), **how).dtype == torch.float64
        # As in a model: the product is in half precision, the parameters are not.
        assert torch.equal(out, ops.window_attention(qkv.to(dtype), table, logit_scale=scale, qkv_bias=bias, **how))
    assert out.dtype == dtype
    # What kernels get: qkv and its bias alike, tables and scales as they are.
    assert seen.dtypes == [dtype, torch.float32, torch.float32, dtype]
    half = ops.window_attention(qkv.to(dtype), table, logit_scale=scale, qkv_bias=bias.to(dtype), **how)
    assert torch.equal(out, half)
    out.float().sum().backward()
    assert {t.grad.dtype for t in (qkv, table, bias, scale)} == {torch.float32}


def test_autocast_to_another_dtype_than_that_of_the_parameters() -> None:
    qkv, table, bias = (leaf(*shape, dtype=torch.float16) for shape in ((2, 5, 6, 3, 2, 8), (25, 2), (3, 2, 8)))
    scale = leaf(2, dtype=torch.float16)
    how = {"window_size": 3, "shift_size": 1}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ops.window_attention(qkv, table, logit_scale=scale, qkv_bias=bias, **how)
        # float64 stays, and padding is as exact.
        exact = ops.window_attention(qkv.double(), qkv_bias=bias.float(), **how)
    with torch.no_grad():
        cast = [t.bfloat16() for t in (qkv, bias)]
        wide = ops.window_attention(cast[0], table.float(), logit_scale=scale.float(), qkv_bias=cast[1], **how)
        assert torch.equal(out, wide)
        assert torch.equal(exact, ops.window_attention(qkv.double(), qkv_bias=bias.double(), **how))
    out.float().sum().backward()
    assert {t.grad.dtype for t in (qkv, table, bias, scale)} == {torch.float16}


# ---- meaning ----


def attended(grid: tuple[int, int], window: int, shift: int) -> dict[tuple[int, int], set[tuple[int, int]]]:
    """Which tokens each token attends to: v is one-hot, so out shows the probabilities, and masked ones are 0."""
    places = [(y, x) for y in range(grid[0]) for x in range(grid[1])]
    qkv = torch.zeros(1, *grid, 3, 1, len(places))
    for number, (y, x) in enumerate(places):
        qkv[0, y, x, 2, 0, number] = 1
    out = ops.window_attention(qkv, window_size=window, shift_size=shift, mask_value=-1e4)[0]
    return {(y, x): {places[i] for i in out[y, x].nonzero().flatten().tolist()} for y, x in places}


def test_windows_of_a_plain_grid() -> None:
    seen = attended((4, 5), 2, 0)  # one more column than windows hold
    assert seen[0, 0] == {(0, 0), (0, 1), (1, 0), (1, 1)} == seen[1, 1]
    assert seen[3, 4] == {(2, 4), (3, 4)}


def test_shifted_windows_do_not_reach_across_the_edge() -> None:
    seen = attended((4, 4), 2, 1)
    assert seen[1, 1] == {(1, 1), (1, 2), (2, 1), (2, 2)}
    # The last window holds what is left at the four corners, each of which sees itself alone.
    assert seen[0, 0] == {(0, 0)} and seen[3, 3] == {(3, 3)} and seen[0, 3] == {(0, 3)}
    assert seen[0, 1] == {(0, 1), (0, 2)}


def test_grid_is_padded_before_it_is_rolled() -> None:
    # 3 columns padded to 4 and rolled by 1: columns 1, 2 | padding, 0.
    seen = attended((2, 3), 2, 1)
    assert seen[0, 1] == {(0, 1), (0, 2)} and seen[0, 0] == {(0, 0)}


def test_padded_positions_are_the_bias_and_not_masked() -> None:
    qkv = torch.zeros(1, 1, 1, 3, 1, 2)
    qkv[..., 2, :, :] = torch.tensor([1.0, 2.0])
    bias = torch.zeros(3, 1, 2)
    bias[2] = torch.tensor([9.0, -2.0])
    # One real token and three of padding, all scores 0.
    found = ops.window_attention(qkv, window_size=2, qkv_bias=bias)[0, 0, 0]
    torch.testing.assert_close(found, (torch.tensor([1.0, 2.0]) + 3 * bias[2, 0]) / 4)
    found = ops.window_attention(qkv, window_size=2)[0, 0, 0]
    torch.testing.assert_close(found, torch.tensor([1.0, 2.0]) / 4)


def test_gradient_of_the_bias_is_of_padding_only() -> None:
    bias = leaf(3, 2, 4)
    qkv = torch.randn(1, 4, 6, 3, 2, 4, dtype=torch.float64)
    ops.window_attention(qkv, window_size=2, shift_size=1, qkv_bias=bias).sum().backward()
    assert not bias.grad.any()
    ops.window_attention(qkv[:, :, :5], window_size=2, shift_size=1, qkv_bias=bias).square().sum().backward()
    # What a padded position would give out is dropped, so its query matters to nothing.
    assert not bias.grad[0].any() and bias.grad[1].all() and bias.grad[2].all()


def test_table_is_read_by_query_minus_key() -> None:
    # One head of one dimension, scores from the table alone: row a - b + w - 1, the last axis fastest.
    table = torch.full((3 * 5, 1), -1e4)
    table[(0 - 1 + 1) * 5 + (2 - 0 + 2)] = 0.0  # query one row above its key, two columns to the right of it
    qkv = torch.zeros(1, 2, 3, 3, 1, 6)
    qkv[0, :, :, 2, 0] = torch.eye(6).view(2, 3, 6)
    out = ops.window_attention(qkv, table, window_size=(2, 3))
    assert out[0, 0, 2].tolist() == [0, 0, 0, 1, 0, 0]  # (0, 2) sees (1, 0)
    torch.testing.assert_close(out[0, 1, 1], torch.full((6,), 1 / 6))  # no pair of its own: all alike


def test_mask_value_is_added_once() -> None:
    qkv, table = torch.randn(1, 4, 4, 3, 1, 4, dtype=torch.float64), torch.randn(9, 1, dtype=torch.float64)
    how = {"window_size": [2, 2], "shift_size": [1, 1]}
    for value in (0.0, -3.0, -200.0):
        found = ops.window_attention(qkv, table, mask_value=value, **how)
        torch.testing.assert_close(found, oracle.window_attention(qkv, table, None, None, mask_value=value, **how)[0])


def test_what_is_kept_of_a_grid_serves_every_mode() -> None:
    qkv, table = torch.randn(1, 13, 11, 3, 2, 8), leaf(49, 2, dtype=torch.float32)
    how = {"window_size": 4, "shift_size": 1}
    with torch.inference_mode(), torch.device("meta"):  # where tensors have no version and, by default, no values
        first = ops.window_attention(qkv, table, **how)
    out = ops.window_attention(qkv.requires_grad_(), table, **how)
    out.sum().backward()
    assert torch.equal(first, out) and qkv.grad.isfinite().all() and table.grad.any()


def test_one_int_stands_for_all_axes_and_strides_do_not_matter() -> None:
    qkv = torch.randn(1, 3, 6, 7, 4, 8, 3).movedim(-1, 4)[..., 1:3, :]
    assert not qkv.is_contiguous()
    one = ops.window_attention(qkv.contiguous(), window_size=3, shift_size=1)
    assert torch.equal(one, ops.window_attention(qkv, window_size=(3, 3, 3), shift_size=[1, 1, 1]))
    assert one.shape == (1, 3, 6, 7, 16) and one.is_contiguous()


# ---- errors ----

QKV = torch.randn(1, 4, 4, 3, 2, 8)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"qkv": [1.0]}, TypeError, r"qkv must be a tensor, got \[1.0\] \(list\)"),
    ({"qkv": QKV.long()}, TypeError, r"qkv must be float16, bfloat16, float32 or float64, got int64"),
    (
        {"qkv": QKV[0]},
        ValueError,
        r"qkv must be of shape \[batch, height, width, 3, heads, head_dim\], .*got \[4, 4, 3, 2, 8\]",
    ),
    ({"qkv": QKV[:, :, :, :2]}, ValueError, r"qkv must be of shape .*got \[1, 4, 4, 2, 2, 8\]"),
    ({"qkv": QKV[..., :0]}, ValueError, r"head_dim must be at least 1"),
    ({"window_size": 2.0}, TypeError, r"window_size must be an int, got 2.0"),
    (
        {"window_size": (2, 2, 2)},
        ValueError,
        r"window_size must be an int or 2 of them, one for each axis, got \[2, 2, 2\]",
    ),
    ({"window_size": 0}, ValueError, r"window_size must be at least 1, got \[0, 0\]"),
    ({"shift_size": 2}, ValueError, r"shift_size must be at least 0 and below window_size \[2, 2\], got \[2, 2\]"),
    ({"shift_size": (0, -1)}, ValueError, r"shift_size must be at least 0 .*got \[0, -1\]"),
    (
        {"relative_position_bias_table": torch.ones(4, 2)},
        ValueError,
        r"relative_position_bias_table must be of shape \[9, 2\], got \[4, 2\]",
    ),
    (
        {"relative_position_bias_table": torch.ones(9, 2).half()},
        TypeError,
        r"relative_position_bias_table must be float32 as qkv is, or float32, got float16 of shape \[9, 2\]",
    ),
    ({"relative_position_bias_table": [1]}, TypeError, r"relative_position_bias_table must be a tensor"),
    ({"logit_scale": torch.ones(2, 1, 1)}, ValueError, r"logit_scale must be of shape \[2\], got \[2, 1, 1\]"),
    ({"qkv_bias": torch.ones(48)}, ValueError, r"qkv_bias must be of shape \[3, 2, 8\], got \[48\]"),
    ({"qkv_bias": torch.ones(3, 2, 8).to("meta")}, ValueError, r"qkv_bias must be on cpu as qkv is, got meta"),
    (
        {"scale": 0.5, "logit_scale": torch.ones(2)},
        ValueError,
        r"scale must be None where logit_scale is given, got 0.5",
    ),
    ({"scale": float("inf")}, ValueError, r"scale must be finite, got inf"),
    ({"mask_value": float("inf")}, ValueError, r"mask_value must be finite, got inf"),
    ({"mask_value": float("nan")}, ValueError, r"mask_value must be finite, got nan"),
    ({"mask_value": "0"}, TypeError, r"mask_value must be a number, got '0' \(str\)"),
    (
        {"window_size": (1, 2**20 + 1)},
        ValueError,
        r"window_size must be at most 2\^20 on every axis, got \[1, 1048577\]",
    ),
    ({"logit_scale": torch.ones(2).double()}, TypeError, r"logit_scale must be float32 as qkv is, or float32, got"),
    ({"qkv_bias": torch.ones(3, 2, 8).half()}, TypeError, r"qkv_bias must be float32 as qkv is, or float32, got"),
    ({"qkv_bias": 1.0}, TypeError, r"qkv_bias must be a tensor, got 1.0 \(float\)"),
    ({"qkv_bias": torch.ones(3, 2, 8).int()}, TypeError, r"qkv_bias must be float32 as qkv is, .* got int32"),
]


@pytest.mark.parametrize(("changed", "error", "message"), BAD, ids=[m for _, _, m in BAD])
def test_bad_arguments(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^window_attention: {message}"):
        ops.window_attention(**{"qkv": QKV, "window_size": 2, **changed})


def test_op_called_directly_checks_shapes() -> None:
    with pytest.raises(RuntimeError, match=r"^window_attention: shift_size must"):
        OPS.window_attention(QKV, None, None, None, [2, 2], [2, 0])
    out, lse = OPS.window_attention(QKV, None, None, None, [2, 2], [0, 0])
    with pytest.raises(
        RuntimeError, match=r"^window_attention_backward: relative_position_bias_table must be of shape"
    ):
        OPS.window_attention_backward(out, QKV, torch.ones(8, 2), None, None, out, lse, [2, 2], [0, 0])
    with pytest.raises(
        RuntimeError, match=r"^window_attention_backward: dout must have the shape and dtype of the out"
    ):
        OPS.window_attention_backward(out.half(), QKV, None, None, None, out, lse, [2, 2], [0, 0])


# ---- compile, export ----


class Layer(torch.nn.Module):
    """A product, attention in shifted windows, and what the gradients of all four tensors go through."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(16, 48)
        self.table = torch.nn.Parameter(torch.randn((2 * window - 1) ** 2, 2))
        self.logit_scale = torch.nn.Parameter(torch.ones(2))
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, 2, 8))
        how = {"window_size": self.window, "shift_size": self.window // 2, "qkv_bias": self.qkv.bias.view(3, 2, 8)}
        plain = ops.window_attention(qkv, self.table, **how)
        return plain + ops.window_attention(qkv, self.table, logit_scale=self.logit_scale, **how)


SIZES = ((2, 10, 8), (3, 10, 8), (5, 12, 20), (2, 19, 7))  # tracing makes a size of 1, of windows too, a constant


@pytest.mark.parametrize("window", (4, pytest.param(9, marks=pytest.mark.slow)))
def test_compile_once_for_all_sizes(window: int, fresh_dynamo: None) -> None:
    model, backend = Layer(window), Compilations()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for size in SIZES:
        x = torch.randn(*size, 16)
        results = []
        for function in (model, compiled):
            out = function(x)
            results.append((out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)
    assert backend.count == 1


@pytest.mark.slow
def test_compile_with_inductor(fresh_dynamo: None) -> None:
    model, x = Layer(4), torch.randn(2, 9, 8, 16)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x))


@pytest.mark.parametrize("strict", (False, True))
def test_export_with_dynamic_sizes(strict: bool, fresh_dynamo: None) -> None:
    model = Layer(9)
    auto = torch.export.Dim.AUTO
    shapes = ({0: auto, 1: auto, 2: auto},)
    program = torch.export.export(model, (torch.randn(2, 10, 13, 16),), dynamic_shapes=shapes, strict=strict)
    for size in SIZES:
        x = torch.randn(*size, 16)
        torch.testing.assert_close(program.module()(x), model(x))
