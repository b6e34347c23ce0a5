"""Products with structured matrices through their public functions, and the projections."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from helpers import cases
from helpers import monarch as helpers
from helpers.compilations import Compilations
from helpers.drawn import drawn
from warpform import ops

OPS = torch.ops.warpform
floats = pytest.mark.parametrize("dtype", cases.FLOATS, ids=lambda d: str(d).removeprefix("torch."))


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


# ---- definitions ----


@pytest.mark.parametrize(("k", "q", "p", "count", "s"), ((4, 6, 3, 4, 5), (2, 4, 3, 8, 2), (3, 8, 2, 6, 3)))
def test_entries_of_the_dense_matrix(k: int, q: int, p: int, count: int, s: int) -> None:
    """Number by number, from the two sums."""
    w1, w2 = torch.randn(k, q, p).double(), torch.randn(count, s, k * q // count).double()
    dense = torch.zeros(count * s, k * p, dtype=torch.float64)
    for kappa in range(k):
        for theta in range(q):
            rho, lam = divmod(kappa * q + theta, count)
            for sigma in range(s):
                for pi in range(p):
                    dense[sigma * count + lam, kappa * p + pi] += w2[lam, sigma, rho] * w1[kappa, theta, pi]
    x = torch.randn(7, k * p).double()
    torch.testing.assert_close(ops.monarch_multiply(x, w1, w2), x @ dense.t())
    torch.testing.assert_close(helpers.dense_monarch(w1, w2), dense)


def test_blocks_of_different_counts_up_and_down() -> None:
    x, w_up, w_down, bias = leaf(5, 12), leaf(3, 16, 4), leaf(2, 5, 12), leaf(10)
    torch.testing.assert_close(ops.blockdiag_glu(x, w_up, w_down, bias), helpers.blockdiag_glu(x, w_up, w_down, bias))
    assert torch.autograd.gradcheck(ops.blockdiag_glu, (x, w_up, w_down, bias))


# ---- gradients ----

Arguments = dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]]
CALLS: Arguments = {
    "blockdiag": (ops.blockdiag_multiply, ((3, 2, 6), (3, 4, 2))),
    "blockdiag_bias": (ops.blockdiag_multiply, ((5, 6), (2, 4, 3), (8,))),
    "monarch": (ops.monarch_multiply, ((5, 6), (2, 6, 3), (3, 2, 4))),
    "monarch_uneven": (ops.monarch_multiply, ((2, 2, 6), (2, 6, 3), (4, 2, 3))),
    "glu": (ops.blockdiag_glu, ((5, 8), (4, 6, 2), (4, 2, 3))),
    "glu_bias": (ops.blockdiag_glu, ((2, 3, 4), (2, 6, 2), (2, 2, 3), (4,))),
}
by_call = pytest.mark.parametrize("call", CALLS)


@by_call
def test_gradcheck(call: str) -> None:
    function, shapes = CALLS[call]
    assert torch.autograd.gradcheck(function, tuple(leaf(*shape) for shape in shapes))


@by_call
def test_only_gradients_that_are_needed(call: str) -> None:
    function, shapes = CALLS[call]
    for wanted in range(len(shapes)):
        inputs = [leaf(*shape).requires_grad_(i == wanted) for i, shape in enumerate(shapes)]
        function(*inputs).sum().backward()
        assert [t.grad is not None for t in inputs] == [i == wanted for i in range(len(shapes))]
    with torch.no_grad():
        assert not function(*(leaf(*shape) for shape in shapes)).requires_grad


@by_call
def test_what_has_no_derivative_raises(call: str) -> None:
    function, shapes = CALLS[call]
    x, *rest = (leaf(*shape) for shape in shapes)
    (g,) = torch.autograd.grad(function(x, *rest).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{function.__name__}: double backward is not implemented"):
        g.square().sum().backward()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=f"{function.__name__}: forward-mode"):
        function(forward_ad.make_dual(x.detach(), torch.ones_like(x)), *rest)
    with pytest.raises(NotImplementedError, match=rf"{function.__name__}: torch\.func transforms"):
        torch.func.grad(lambda x: function(x, *rest).sum())(x)


@by_call
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast(call: str, dtype: torch.dtype) -> None:
    function, shapes = CALLS[call]
    inputs = [leaf(*shape, dtype=torch.float32) for shape in shapes]
    with torch.autocast("cpu", dtype=dtype):
        out = function(*inputs)
        assert function(*(t.double() for t in inputs)).dtype == torch.float64
        assert torch.equal(out, function(inputs[0].to(dtype), *inputs[1:]))
    assert out.dtype == dtype
    assert torch.equal(out, function(*(t.to(dtype) for t in inputs)))
    out.float().sum().backward()
    assert {t.grad.dtype for t in inputs} == {torch.float32}


# ---- projections ----


@pytest.mark.parametrize("case", helpers.MONARCH_CASES, ids=str)
def test_projection_is_exact_on_monarch_matrices(case: helpers.MonarchCase) -> None:
    dense = helpers.dense_monarch(*helpers.monarch_inputs(case, torch.float64).weights)
    w1, w2 = ops.project_to_monarch(dense, k=case.first[0], q=case.first[1], l=case.second[0])
    assert w1.shape == case.first and w2.shape == case.second
    assert (helpers.dense_monarch(w1, w2) - dense).abs().max() < 1e-13


@drawn(40, case=helpers.monarch_cases())
def test_projection_of_drawn_monarch_matrices(case: helpers.MonarchCase) -> None:
    dense = helpers.dense_monarch(*helpers.monarch_inputs(case, torch.float64).weights)
    w1, w2 = ops.project_to_monarch(dense, k=case.first[0], q=case.first[1], l=case.second[0])
    assert (helpers.dense_monarch(w1, w2) - dense).abs().max() < 1e-13


@pytest.mark.parametrize(
    ("k", "q", "p", "count", "s"), ((4, 8, 8, 4, 8), (2, 3, 20, 2, 9), (8, 6, 3, 4, 10), (6, 7, 5, 21, 2))
)
def test_projection_is_nearest_in_every_part(k: int, q: int, p: int, count: int, s: int) -> None:
    """The theorem of Eckart and Young: what is left of a part is its smaller singular values, no more and no less."""
    dense = torch.randn(count * s, k * p, dtype=torch.float64)
    w1, w2 = ops.project_to_monarch(dense, k=k, q=q, l=count)
    left = dense - helpers.dense_monarch(w1, w2)
    for kappa in range(k):
        for lam in range(count):
            columns = slice(kappa * p, (kappa + 1) * p)
            rank = sum((kappa * q + theta) % count == lam for theta in range(q))
            expected = torch.linalg.svdvals(dense[lam::count, columns])[rank:]
            found = left[lam::count, columns].square().sum()
            torch.testing.assert_close(found, expected.square().sum(), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("m", "n"), ((12, 12), (24, 8), (8, 36)))
def test_projection_by_a_number_of_blocks(m: int, n: int) -> None:
    dense = torch.randn(m, n, dtype=torch.float64)
    w1, w2 = ops.project_to_monarch(dense, nblocks=4)
    inner = min(m, n) // 4
    assert w1.shape == (4, inner, n // 4) and w2.shape == (4, m // 4, inner)
    same = ops.project_to_monarch(dense, k=4, q=inner, l=4)
    assert torch.equal(w1, same[0]) and torch.equal(w2, same[1])
    x = torch.randn(3, n, dtype=torch.float64)
    error = torch.linalg.vector_norm(ops.monarch_multiply(x, w1, w2) - x @ dense.t())
    assert error < torch.linalg.vector_norm(x @ dense.t())


@floats
def test_projection_keeps_dtype_and_takes_strided_matrices(dtype: torch.dtype) -> None:
    dense = torch.randn(16, 24).to(dtype).t()
    w1, w2 = ops.project_to_monarch(dense, 4)
    assert w1.dtype == w2.dtype == dtype and w1.is_contiguous() and w2.is_contiguous()
    again = ops.project_to_monarch(helpers.dense_monarch(w1.double(), w2.double()), 4)
    torch.testing.assert_close(helpers.dense_monarch(*again), helpers.dense_monarch(w1.double(), w2.double()))


def test_projection_to_the_blocks_on_the_diagonal() -> None:
    w = torch.randn(3, 4, 5)
    dense = helpers.dense_blockdiag(w)
    assert torch.equal(ops.project_to_blockdiag(dense, 3), w)
    assert torch.equal(ops.project_to_blockdiag(dense + (dense == 0), 3), w)


# ---- errors ----

X, W = torch.randn(3, 8), torch.randn(2, 6, 4)
BAD: list[tuple[Callable[..., Any], tuple[Any, ...], type[Exception], str]] = [
    (ops.blockdiag_multiply, ([1.0], W), TypeError, r"x must be a tensor, got \[1.0\] \(list\)"),
    (ops.blockdiag_multiply, (X.long(), W), TypeError, r"x must be float16, bfloat16, float32 or float64, got int64"),
    (ops.blockdiag_multiply, (X, None), TypeError, r"w must be a tensor, got None"),
    (ops.blockdiag_multiply, (X, W.half()), TypeError, r"w must be float32 as x is, got float16 of shape \[2, 6, 4\]"),
    (ops.blockdiag_multiply, (X, W[0]), ValueError, r"w must be of shape \[nblocks, .*got \[6, 4\]"),
    (ops.blockdiag_multiply, (X, W[:0]), ValueError, r"w must be of shape \[nblocks, .*got \[0, 6, 4\]"),
    (ops.blockdiag_multiply, (X[:, :7], W), ValueError, r"x must be of shape \[..., 8\] as w has it, got \[3, 7\]"),
    (ops.blockdiag_multiply, (X[0, 0], W), ValueError, r"x must be of shape \[..., 8\] as w has it, got \[\]"),
    (ops.blockdiag_multiply, (X, W, X[0]), ValueError, r"bias must be of shape \[12\], got \[8\]"),
    (ops.blockdiag_multiply, (X, W.to("meta")), ValueError, r"w must be on cpu as x is, got meta"),
    (ops.blockdiag_multiply, (X, W, torch.ones(12).half()), TypeError, r"bias must be float32 as x is, got float16 of"),
    (ops.blockdiag_multiply, (X, W, torch.ones(12).to("meta")), ValueError, r"bias must be on cpu as x is, got meta"),
    (ops.blockdiag_multiply, (X, W, 1.0), TypeError, r"bias must be a tensor, got 1.0 \(float\)"),
    (ops.monarch_multiply, (X, W, None), TypeError, r"w2 must be a tensor, got None"),
    (ops.monarch_multiply, (X, W, torch.randn(2, 3, 5)), ValueError, r"w2 must take the 12 rows that w1 \[2, 6, 4\] "),
    (ops.monarch_multiply, (X[:, :6], W, W), ValueError, r"x must be of shape \[..., 8\] as w1 has it, got \[3, 6\]"),
    (ops.monarch_multiply, (X, W, W[0]), ValueError, r"w2 must be of shape \[nblocks, "),
    (ops.blockdiag_glu, (X, W, torch.randn(2, 4, 6)), ValueError, r"w_up must give twice the 12 columns that w_down "),
    (ops.blockdiag_glu, (X, W, torch.randn(2, 4, 3), X[0, :6]), ValueError, r"bias must be of shape \[8\], got \[6\]"),
    (ops.blockdiag_glu, (X, W, torch.randn(2, 4, 3).double()), TypeError, r"w_down must be float32 as x is"),
    (ops.project_to_monarch, (X[0], 2), ValueError, r"dense must be of shape \[out, in\], got float32 of shape \[8\]"),
    (ops.project_to_monarch, (X.long(), 1), TypeError, r"dense must be float16, bfloat16, float32 or float64"),
    (ops.project_to_monarch, (X, 2), ValueError, r"nblocks must divide the sides of dense \[3, 8\], got 2"),
    (ops.project_to_monarch, (X, 0), ValueError, r"nblocks must divide the sides of dense \[3, 8\], got 0"),
    (ops.project_to_monarch, (X, 1.0), TypeError, r"nblocks must be an int, got 1.0"),
    (ops.project_to_monarch, (X,), ValueError, r"either nblocks or all of k, q and l must be given"),
    (ops.project_to_blockdiag, (X, 2), ValueError, r"nblocks must divide the sides of dense \[3, 8\], got 2"),
]


@pytest.mark.parametrize(("function", "arguments", "error", "message"), BAD, ids=[m for *_, m in BAD])
def test_bad_arguments(
    function: Callable[..., Any], arguments: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{function.__name__}: {message}"):
        function(*arguments)


@pytest.mark.parametrize(
    ("counts", "message"),
    (
        ({"nblocks": 2, "k": 2}, r"k, q and l must be None where nblocks is given, got 2, None and None"),
        ({"k": 3, "q": 2, "l": 2}, r"k must divide the columns of dense \[6, 8\], got 3"),
        ({"k": 2, "q": 2, "l": 4}, r"l must divide the rows of dense \[6, 8\], got 4"),
        ({"k": 2, "q": 2, "l": 3}, r"l must divide k q = 2 \* 2, got 3"),
    ),
)
def test_bad_counts_of_a_projection(counts: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"^project_to_monarch: {message}"):
        ops.project_to_monarch(torch.randn(6, 8), **counts)


def test_ops_called_directly_check_shapes() -> None:
    out = torch.randn(3, 12)
    for call, message in (
        (lambda: OPS.blockdiag_multiply(X[:, :6], W), "blockdiag_multiply: x must be of shape"),
        (lambda: OPS.blockdiag_multiply_backward(out[:2], X, W, True), "blockdiag_multiply_backward: dout must be of"),
        (
            lambda: OPS.blockdiag_multiply_backward(out.half(), X, W, True),
            "blockdiag_multiply_backward: dout must be fl",
        ),
        (
            lambda: OPS.blockdiag_multiply_backward(out, X, W.half(), True),
            "blockdiag_multiply_backward: w must be floa",
        ),
        (lambda: OPS.monarch_multiply(X, W, W[:, :, :3]), "monarch_multiply: w2 must take"),
        (lambda: OPS.monarch_multiply_backward(X, X, W, torch.randn(3, 4, 4)), "monarch_multiply_backward: dout must"),
        (lambda: OPS.blockdiag_glu(X, W, W), "blockdiag_glu: w_up must give twice"),
        (lambda: OPS.blockdiag_glu_backward(X, X, W, torch.randn(2, 6, 3), False), "blockdiag_glu_backward: dout must"),
    ):
        with pytest.raises(RuntimeError, match=f"^{message}"):
            call()


# ---- compile, export ----


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Layer(torch.nn.Module):
    """Every product once."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {"w": (4, 6, 4), "bias": (24,), "w1": (4, 4, 6), "w2": (2, 8, 8), "up": (2, 24, 8), "down": (2, 8, 12)}
        self.weights = torch.nn.ParameterDict({k: torch.nn.Parameter(torch.randn(*v)) for k, v in shapes.items()})

    def forward(self, x: Tensor) -> Tensor:
        w = self.weights
        hidden = ops.monarch_multiply(ops.blockdiag_multiply(x, w["w"], w["bias"]), w["w1"], w["w2"])
        return ops.blockdiag_glu(hidden, w["up"], w["down"]) + x


SIZES = ((3, 5), (2, 9), (7, 5), (4, 300))


def test_compile_once_for_all_sizes(fresh_dynamo: None) -> None:
    model, backend = Layer(), Compilations()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for size in SIZES:
        x = torch.randn(*size, 16, requires_grad=True)
        results = []
        for function in (model, compiled):
            out = function(x)
            results.append((out, *torch.autograd.grad(out.square().sum(), [x, *model.parameters()])))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)
    assert backend.count == 1


@pytest.mark.slow
def test_compile_with_inductor(fresh_dynamo: None) -> None:
    model, x = Layer(), torch.randn(2, 9, 16)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x))


@pytest.mark.parametrize("strict", (False, True))
def test_export_with_dynamic_sizes(strict: bool, fresh_dynamo: None) -> None:
    model = Layer()
    auto = torch.export.Dim.AUTO
    program = torch.export.export(model, (torch.randn(3, 6, 16),), dynamic_shapes=({0: auto, 1: auto},), strict=strict)
    for size in SIZES:
        x = torch.randn(*size, 16)
        torch.testing.assert_close(program.module()(x), model(x))
