"""Block-diagonal and Monarch products: cases, inputs, oracles, and whole checks of one op on one case.

The oracles multiply by dense matrices, which are filled entry by entry from the formulas. `library` is
torch.ops.warpform or torch.ops.warpform_simt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from warpform.ops._example import nudged

from .cases import misaligned, random, strided
from .compare import assert_close, farthest

LAYOUTS = ("contiguous", "strided", "transposed", "misaligned")


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values in another layout of the leading dimensions; what lies between is NaN."""
    if layout == "strided":
        return strided(x) if x.dim() > 1 else x
    if layout == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() > 2 else x
    return misaligned(x) if layout == "misaligned" else x


# ---- cases ----


@dataclass(frozen=True)
class BlockdiagCase:
    """One call of blockdiag_multiply: x [*leading, nblocks * p], w [nblocks, q, p]."""

    name: str
    leading: tuple[int, ...]
    nblocks: int
    q: int
    p: int
    bias: bool = True
    layout: str = "contiguous"

    def __str__(self) -> str:
        return self.name

    @property
    def aligned(self) -> bool:
        """Whether rows of blocks are of whole 16 bytes in 16-bit dtypes, on both sides."""
        return self.q % 8 == 0 and self.p % 8 == 0


@dataclass(frozen=True)
class MonarchCase:
    """One call of monarch_multiply: x [*leading, k * p], w1 [k, q, p], w2 [l, s, r] with l * r = k * q."""

    name: str
    leading: tuple[int, ...]
    first: tuple[int, int, int]  # k, q, p
    second: tuple[int, int, int]  # l, s, r
    layout: str = "contiguous"

    def __post_init__(self) -> None:
        assert self.first[0] * self.first[1] == self.second[0] * self.second[2], self

    def __str__(self) -> str:
        return self.name

    @property
    def aligned(self) -> bool:
        """Whether rows of x, of the output and of both factors' blocks are of whole 16 bytes in 16-bit dtypes."""
        (_, _, p), (blocks, s, r) = self.first, self.second
        return p % 8 == 0 and r % 8 == 0 and blocks * s % 8 == 0


@dataclass(frozen=True)
class GluCase:
    """One call of blockdiag_glu: d -> 2 inner -> out, all of nblocks blocks."""

    name: str
    leading: tuple[int, ...]
    nblocks: int
    d: int
    inner: int
    out: int
    bias: bool = True
    layout: str = "contiguous"

    def __post_init__(self) -> None:
        assert not any(n % self.nblocks for n in (self.d, 2 * self.inner, self.inner, self.out)), self

    def __str__(self) -> str:
        return self.name

    @property
    def aligned(self) -> bool:
        """Whether rows of blocks are of whole 16 bytes in 16-bit dtypes."""
        return all(n // self.nblocks % 8 == 0 for n in (self.d, self.inner, self.out))


BLOCKDIAG_CASES = (
    BlockdiagCase("square", (37,), 4, 32, 32),
    BlockdiagCase("wider", (3, 11), 4, 64, 16, bias=False),
    BlockdiagCase("narrower", (5, 9), 4, 16, 64),
    BlockdiagCase("one_block", (21,), 1, 48, 80),
    BlockdiagCase("one_token", (1,), 4, 24, 40),
    BlockdiagCase("no_leading_dimension", (), 2, 16, 24),
    BlockdiagCase("no_tokens", (0,), 4, 16, 16),
    BlockdiagCase("no_tokens_in_the_middle", (2, 0, 3), 2, 8, 16, bias=False),
    BlockdiagCase("many_blocks", (19,), 32, 8, 8),
    BlockdiagCase("tails", (67,), 2, 40, 72),
    BlockdiagCase("beyond_a_tile", (131,), 2, 136, 104),
    BlockdiagCase("tile_exactly", (128,), 1, 128, 64),
    BlockdiagCase("many_tokens", (1000,), 2, 16, 16),
    BlockdiagCase("strided", (33,), 3, 24, 16, layout="strided"),
    BlockdiagCase("transposed", (5, 7), 2, 16, 32, layout="transposed", bias=False),
    BlockdiagCase("misaligned", (13,), 2, 16, 16, layout="misaligned"),
    BlockdiagCase("odd", (17,), 3, 5, 7),
    BlockdiagCase("odd_in", (9,), 2, 16, 12),
    BlockdiagCase("odd_out", (9,), 2, 12, 16, bias=False),
    BlockdiagCase("width_one", (6,), 5, 1, 1),
)

MONARCH_CASES = (
    MonarchCase("square", (37,), (4, 16, 16), (4, 16, 16)),
    MonarchCase("wider", (3, 11), (4, 16, 16), (4, 48, 16)),
    MonarchCase("narrower", (21,), (4, 16, 48), (4, 16, 16)),
    MonarchCase("rank_one", (19,), (8, 8, 8), (8, 8, 8)),
    MonarchCase("rank_one_wider", (35,), (16, 16, 16), (16, 24, 16)),
    MonarchCase("unequal_counts", (23,), (2, 32, 24), (8, 16, 8)),
    MonarchCase("more_in_the_first", (23,), (8, 4, 16), (2, 24, 16)),
    MonarchCase("l_does_not_divide_q", (18,), (8, 6, 8), (4, 10, 12)),
    MonarchCase("l_does_not_divide_q_aligned", (18,), (4, 12, 16), (3, 24, 16)),
    MonarchCase("l_beyond_q", (18,), (8, 6, 16), (6, 16, 8)),
    MonarchCase("first_of_one_block", (9,), (1, 32, 24), (4, 16, 8)),
    MonarchCase("second_of_one_block", (9,), (4, 8, 16), (1, 24, 32)),
    MonarchCase("one_block_each", (9,), (1, 24, 40), (1, 16, 24)),
    MonarchCase("inner_one", (9,), (2, 4, 8), (8, 8, 1)),
    MonarchCase("one_token", (1,), (4, 16, 24), (4, 24, 16)),
    MonarchCase("no_leading_dimension", (), (4, 8, 8), (4, 8, 8)),
    MonarchCase("no_tokens", (0,), (4, 8, 8), (4, 8, 8)),
    MonarchCase("no_tokens_in_the_middle", (2, 0, 3), (2, 8, 8), (2, 8, 8)),
    MonarchCase("beyond_a_tile", (131,), (2, 72, 40), (3, 40, 48)),
    MonarchCase("many_tokens", (700,), (2, 8, 16), (2, 16, 8)),
    MonarchCase("strided", (33,), (4, 8, 16), (4, 16, 8), layout="strided"),
    MonarchCase("transposed", (5, 7), (2, 16, 16), (2, 16, 16), layout="transposed"),
    MonarchCase("misaligned", (13,), (2, 16, 16), (2, 16, 16), layout="misaligned"),
    MonarchCase("odd", (17,), (3, 5, 7), (5, 7, 3)),
    MonarchCase("width_one", (4,), (3, 1, 1), (3, 1, 1)),
)

GLU_CASES = (
    GluCase("plain", (37,), 4, 32, 128, 32),
    GluCase("without_bias", (3, 11), 4, 64, 64, 64, bias=False),
    GluCase("two_blocks", (21,), 2, 48, 96, 48),
    GluCase("one_block", (21,), 1, 24, 48, 24),
    GluCase("eight_blocks", (9,), 8, 64, 128, 64),
    GluCase("three_blocks", (12,), 3, 24, 48, 24),
    GluCase("other_width_out", (19,), 4, 32, 96, 64),
    GluCase("one_token", (1,), 4, 32, 128, 32),
    GluCase("no_leading_dimension", (), 4, 32, 64, 32),
    GluCase("no_tokens", (0,), 4, 32, 64, 32),
    GluCase("tails", (67,), 2, 48, 144, 80),
    GluCase("beyond_a_tile", (133,), 4, 160, 320, 160),
    GluCase("many_tokens", (600,), 2, 16, 32, 16),
    GluCase("strided", (33,), 4, 32, 64, 32, layout="strided"),
    GluCase("transposed", (5, 7), 2, 16, 32, 16, layout="transposed"),
    GluCase("misaligned", (13,), 2, 32, 32, 32, layout="misaligned"),
    GluCase("odd", (11,), 2, 6, 10, 14),
)

# Of a few values all errors may be ten times another's by chance: the rule wants some tokens, and some columns.
_LEADING = st.one_of(st.tuples(st.integers(5, 70)), st.tuples(st.integers(0, 5), st.integers(5, 30)))
_WIDTH = st.integers(1, 7).map(lambda n: 8 * n)


# For kernels: every tile of each, with more than one step each way and tails.
BLOCKDIAG_TILES = (
    BlockdiagCase("large_tiles", (139,), 2, 200, 152),
    BlockdiagCase("split_rows", (1100,), 2, 24, 40),
    BlockdiagCase("split_rows_of_large_tiles", (1030,), 1, 136, 72),
)
MONARCH_TILES = (
    MonarchCase("several_tiles_of_each_product", (70,), (4, 160, 72), (4, 136, 160)),
    MonarchCase("three_lambdas", (33,), (5, 24, 72), (3, 144, 40)),
    MonarchCase("two_lambdas", (33,), (2, 40, 16), (2, 24, 40)),
    MonarchCase("chunks_of_lambdas", (40,), (16, 32, 16), (16, 40, 32)),
    MonarchCase("a_last_chunk_of_fewer", (40,), (6, 64, 8), (12, 24, 32)),
    MonarchCase("wide_runs_of_many_lambdas", (20,), (2, 640, 8), (8, 16, 160)),
    MonarchCase("rank_one_of_odd_counts", (20,), (27, 8, 8), (27, 8, 8)),
    MonarchCase("runs_across_kappas", (20,), (9, 40, 8), (15, 8, 24)),
)
GLU_TILES = (
    GluCase("blocks_of_256", (131,), 2, 2 * 136, 2 * 72, 2 * 200),
    GluCase("blocks_of_512", (70,), 2, 2 * 264, 2 * 40, 2 * 328),
    GluCase("blocks_beyond_the_registers", (20,), 2, 2 * 24, 2 * 24, 2 * 520),
    GluCase("an_odd_number_of_blocks", (20,), 3, 3 * 136, 3 * 8, 3 * 40),
)


def backward_aligned(case: MonarchCase) -> bool:
    """Whether the kernels have the backward pass, too, which has rows of the blocks of h and of dout."""
    return case.aligned and case.first[1] % 8 == 0 and case.second[1] % 8 == 0


@st.composite
def blockdiag_cases(draw: st.DrawFn, aligned: bool = False) -> BlockdiagCase:
    """Any shape; with `aligned` rows of blocks are of whole 16 bytes."""
    width = _WIDTH if aligned else st.one_of(_WIDTH, st.integers(4, 40))
    return BlockdiagCase(
        "drawn",
        draw(_LEADING),
        draw(st.integers(1, 9)),
        draw(width),
        draw(width),
        bias=draw(st.booleans()),
        layout=draw(st.sampled_from(LAYOUTS)),
    )


@st.composite
def monarch_cases(draw: st.DrawFn, aligned: bool = False) -> MonarchCase:
    """Any block counts: l need neither equal k nor divide q."""
    k, q = draw(st.integers(1, 9)), draw(st.integers(4, 24))
    if aligned:
        q *= 8
    divisors = [n for n in range(1, k * q + 1) if k * q % n == 0 and (not aligned or k * q // n % 8 == 0)]
    blocks = draw(st.sampled_from([n for n in divisors if n <= 32]))
    width = _WIDTH if aligned else st.integers(4, 30)
    return MonarchCase(
        "drawn",
        draw(_LEADING),
        (k, q, draw(width)),
        (blocks, draw(width), k * q // blocks),
        layout=draw(st.sampled_from(LAYOUTS)),
    )


@st.composite
def glu_cases(draw: st.DrawFn, aligned: bool = False) -> GluCase:
    """Any widths of one count of blocks."""
    nblocks = draw(st.sampled_from((1, 2, 4, 6)) if aligned else st.integers(1, 6))
    width = _WIDTH if aligned else st.integers(4, 30)
    d, inner, out = (nblocks * draw(width) for _ in range(3))
    return GluCase(
        "drawn", draw(_LEADING), nblocks, d, inner, out, bias=draw(st.booleans()), layout=draw(st.sampled_from(LAYOUTS))
    )


# ---- inputs ----


@dataclass
class Inputs:
    """The op's tensors in the schema's order, their names, and the gradient that comes back."""

    x: Tensor
    weights: tuple[Tensor, ...]
    bias: Tensor | None
    dout: Tensor
    names: tuple[str, ...]  # of the weights

    @property
    def has_bias(self) -> bool:
        """Whether there is a bias."""
        return self.bias is not None


def _weight(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return random(*shape, dtype=torch.float32, device=device).mul_(shape[-1] ** -0.5).to(dtype)


def blockdiag_inputs(case: BlockdiagCase, dtype: torch.dtype, device: str = "cpu") -> Inputs:
    """Fresh random tensors."""
    x = laid_out(random(*case.leading, case.nblocks * case.p, dtype=dtype, device=device), case.layout)
    w = _weight(case.nblocks, case.q, case.p, dtype=dtype, device=device)
    width = case.nblocks * case.q
    bias = random(width, dtype=dtype, device=device) if case.bias else None
    return Inputs(x, (w,), bias, random(*case.leading, width, dtype=dtype, device=device), ("w",))


def monarch_inputs(case: MonarchCase, dtype: torch.dtype, device: str = "cpu") -> Inputs:
    """Fresh random tensors."""
    x = laid_out(random(*case.leading, case.first[0] * case.first[2], dtype=dtype, device=device), case.layout)
    weights = tuple(_weight(*shape, dtype=dtype, device=device) for shape in (case.first, case.second))
    dout = random(*case.leading, case.second[0] * case.second[1], dtype=dtype, device=device)
    return Inputs(x, weights, None, dout, ("w1", "w2"))


def glu_inputs(case: GluCase, dtype: torch.dtype, device: str = "cpu") -> Inputs:
    """Fresh random tensors; the gate's arguments reach into both tails of GELU."""
    x = laid_out(random(*case.leading, case.d, dtype=dtype, device=device), case.layout)
    nb = case.nblocks
    w_up = _weight(nb, 2 * case.inner // nb, case.d // nb, dtype=dtype, device=device)
    w_down = _weight(nb, case.out // nb, case.inner // nb, dtype=dtype, device=device)
    bias = random(case.out, dtype=dtype, device=device) if case.bias else None
    dout = random(*case.leading, case.out, dtype=dtype, device=device)
    return Inputs(x, (w_up, w_down), bias, dout, ("w_up", "w_down"))


# ---- oracles ----


def _places(w: Tensor) -> list[Tensor]:
    """The three indices of every entry of w, in order."""
    axes = (torch.arange(n, device=w.device) for n in w.shape)
    return [t.flatten() for t in torch.meshgrid(*axes, indexing="ij")]


def dense_blockdiag(w: Tensor) -> Tensor:
    """The matrix [nb q, nb p]: entry (b q + i, b p + j) is w[b, i, j], all others are 0."""
    nb, q, p = w.shape
    b, i, j = _places(w)
    return w.new_zeros(nb * q, nb * p).index_put((b * q + i, b * p + j), w.flatten())


def dense_strided(w: Tensor) -> Tensor:
    """The matrix [l s, l r] of a Monarch matrix's second factor: entry (sigma l + lambda, rho l + lambda) is
    w[lambda, sigma, rho], all others are 0."""
    count, s, r = w.shape
    lam, sigma, rho = _places(w)
    return w.new_zeros(count * s, count * r).index_put((sigma * count + lam, rho * count + lam), w.flatten())


def dense_monarch(w1: Tensor, w2: Tensor) -> Tensor:
    """The matrix [l s, k p] of both factors."""
    return dense_strided(w2) @ dense_blockdiag(w1)


def blockdiag_multiply(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """By the dense matrix."""
    out = x @ dense_blockdiag(w).t()
    return out if bias is None else out + bias


def monarch_multiply(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """By the two dense matrices, one after the other."""
    return x @ dense_blockdiag(w1).t() @ dense_strided(w2).t()


def blockdiag_glu(x: Tensor, w_up: Tensor, w_down: Tensor, bias: Tensor | None = None) -> Tensor:
    """By dense matrices, GELU written out."""
    z = x @ dense_blockdiag(w_up).t()
    inner = z.size(-1) // 2
    left, right = z[..., :inner], z[..., inner:]
    gate = left * 0.5 * (1 + torch.erf(left * 2**-0.5))
    out = (gate * right) @ dense_blockdiag(w_down).t()
    return out if bias is None else out + bias


def _oracle(definition: Callable[..., Tensor], inputs: Inputs, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """out and the gradients by name, computed in dtype."""
    tensors = [t.detach().to(dtype, copy=True).contiguous() for t in _tensors(inputs)]
    leaves = [t.requires_grad_() for t in tensors]
    out = definition(*leaves)
    gradients = torch.autograd.grad((out * inputs.dout.to(dtype)).sum(), leaves)
    return out.detach(), dict(zip(_names(inputs), gradients, strict=True))


def _tensors(inputs: Inputs) -> list[Tensor]:
    return [inputs.x, *inputs.weights, *(() if inputs.bias is None else (inputs.bias,))]


def _names(inputs: Inputs) -> list[str]:
    return [f"d{name}" for name in ("x", *inputs.names, *(("bias",) if inputs.has_bias else ()))]


# ---- checks ----


def check_blockdiag_multiply(
    library: Any, case: BlockdiagCase, dtype: torch.dtype, device: str = "cpu", *, backward: bool = True
) -> None:
    """blockdiag_multiply and its backward, every gradient by itself."""
    inputs = blockdiag_inputs(case, dtype, device)
    out = library.blockdiag_multiply(inputs.x, *inputs.weights, inputs.bias)
    gradients = None
    if backward:
        gradients = library.blockdiag_multiply_backward(inputs.dout, inputs.x, *inputs.weights, inputs.has_bias)
    _check(blockdiag_multiply, inputs, out, gradients, optional_bias=True)


def check_monarch_multiply(
    library: Any, case: MonarchCase, dtype: torch.dtype, device: str = "cpu", *, backward: bool = True
) -> None:
    """monarch_multiply and its backward, every gradient by itself."""
    inputs = monarch_inputs(case, dtype, device)
    out = library.monarch_multiply(inputs.x, *inputs.weights)
    gradients = None
    if backward:
        gradients = library.monarch_multiply_backward(inputs.dout, inputs.x, *inputs.weights)
    _check(monarch_multiply, inputs, out, gradients, optional_bias=False)


def check_blockdiag_glu(
    library: Any, case: GluCase, dtype: torch.dtype, device: str = "cpu", *, backward: bool = True
) -> None:
    """blockdiag_glu and its backward, every gradient by itself."""
    inputs = glu_inputs(case, dtype, device)
    out = library.blockdiag_glu(inputs.x, *inputs.weights, inputs.bias)
    gradients = None
    if backward:
        gradients = library.blockdiag_glu_backward(inputs.dout, inputs.x, *inputs.weights, inputs.has_bias)
    _check(blockdiag_glu, inputs, out, gradients, optional_bias=True)


def _check(
    definition: Callable[..., Tensor],
    inputs: Inputs,
    out: Tensor,
    gradients: Sequence[Tensor] | None,
    *,
    optional_bias: bool,
) -> None:
    dtype = inputs.x.dtype
    truth, truths = _oracle(definition, inputs, torch.float64)
    eager, yardsticks = _oracle(definition, inputs, dtype)
    assert out.dtype == dtype and out.is_contiguous()
    yardstick = eager
    if dtype == torch.float32:
        # Gates have errors of their own, and of few products the eager sum may be off by nothing.
        generator = torch.Generator().manual_seed(0)
        moved = definition(*(nudged(t.detach(), generator) for t in _tensors(inputs)))
        yardstick = farthest(truth, eager, moved)
    assert_close("out", out, truth, yardstick)
    if gradients is None:
        return
    found = dict(zip(("dx", *(f"d{name}" for name in inputs.names), "dbias"), gradients, strict=False))
    assert len(gradients) == len(inputs.names) + 1 + optional_bias
    if optional_bias and not inputs.has_bias:
        assert found.pop("dbias").shape == (0,)
    for name, g in found.items():
        assert g.dtype == dtype and g.is_contiguous(), name
        assert_close(name, g, truths[name], yardsticks[name], gradient=True, scale=_summed(name, inputs, dtype))


def _summed(name: str, inputs: Inputs, dtype: torch.dtype) -> float:
    """Sums over tokens may cancel; they are made in float32 at least: the size of their terms, in units of dtype."""
    if name != "dbias" or inputs.dout.numel() == 0:
        return 0.0
    finer = torch.finfo(dtype).eps if dtype == torch.float64 else torch.finfo(torch.float32).eps
    terms = inputs.dout.double().reshape(math.prod(inputs.dout.shape[:-1]), -1).abs().sum(0)
    return float(terms.max()) * finer / torch.finfo(dtype).eps
