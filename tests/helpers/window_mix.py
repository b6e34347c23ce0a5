"""Mixing the tokens of windows: cases, inputs, the oracle, and whole checks of the op and its backward on one case.

`library` is torch.ops.warpform or torch.ops.warpform_simt.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from .cases import misaligned, random, strided
from .compare import assert_close

NAMES = ("x", "weight", "bias", "norm_weight", "norm_bias", "gate")


# ---- cases ----


@dataclass(frozen=True)
class WindowMixCase:
    """Shape and optional inputs of one call of window_mix."""

    name: str
    grid: tuple[int, int]
    window: tuple[int, int]
    channels: int
    batch: int = 1
    dilated: bool = False
    bias: bool = True
    norm: str | None = "both"  # "weight": without its bias; None: there is none
    gate: bool = True
    wide_norm: bool = False  # float32 whatever x is
    eps: float = 1e-6
    layout: str = "halves"  # x and gate are halves of one product; or "contiguous", "strided", "misaligned"

    @property
    def tokens(self) -> int:
        """n, the tokens of a window."""
        return math.prod(self.window)

    def __str__(self) -> str:
        return self.name


WINDOW_MIX_CASES = (
    WindowMixCase("block_8x8", (16, 24), (8, 8), 32, wide_norm=True),
    WindowMixCase("grid_8x8", (24, 16), (8, 8), 40, dilated=True),
    WindowMixCase("block_16x16", (16, 32), (16, 16), 16, layout="contiguous"),
    WindowMixCase("grid_16x16", (32, 16), (16, 16), 8, dilated=True, wide_norm=True),
    WindowMixCase("a_tile_of_channels", (8, 12), (4, 4), 64, batch=2),
    WindowMixCase("wide_channels", (8, 4), (4, 4), 136, batch=2, dilated=True),
    WindowMixCase("odd_window", (9, 10), (3, 5), 24, batch=2),
    WindowMixCase("odd_window_grid", (9, 10), (3, 5), 24, batch=2, dilated=True, wide_norm=True),
    WindowMixCase("odd_channels", (6, 8), (3, 4), 7, batch=3),
    WindowMixCase("odd_channels_grid", (6, 8), (2, 4), 33, batch=2, dilated=True, layout="contiguous"),
    WindowMixCase("one_channel", (4, 6), (2, 3), 1, batch=2, norm=None),
    WindowMixCase("one_token", (5, 7), (1, 1), 16, batch=2),
    WindowMixCase("one_window", (7, 9), (7, 9), 16, batch=3),
    WindowMixCase("one_window_grid", (7, 9), (7, 9), 16, dilated=True),
    WindowMixCase("rows", (6, 12), (1, 12), 16, batch=2),
    WindowMixCase("columns", (12, 3), (6, 1), 16, batch=2, dilated=True),
    WindowMixCase("no_gate", (8, 12), (4, 4), 32, gate=False),
    WindowMixCase("no_bias", (8, 12), (4, 4), 32, bias=False, wide_norm=True),
    WindowMixCase("no_norm", (8, 12), (4, 4), 32, dilated=True, norm=None),
    WindowMixCase("norm_without_bias", (8, 12), (4, 4), 32, norm="weight"),
    WindowMixCase("bare", (8, 12), (4, 4), 32, dilated=True, norm=None, bias=False, gate=False),
    WindowMixCase("cross_gating", (8, 16), (8, 8), 32, dilated=True, norm=None, gate=False),
    WindowMixCase("large_eps", (8, 8), (4, 4), 16, eps=2.0),
    WindowMixCase("strided", (8, 8), (4, 4), 16, batch=3, layout="strided"),
    WindowMixCase("misaligned", (8, 8), (4, 4), 16, layout="misaligned"),
    WindowMixCase("no_batch", (8, 8), (4, 4), 16, batch=0),
    WindowMixCase("no_rows", (0, 8), (4, 4), 16, dilated=True),
)


@st.composite
def window_mix_cases(draw: st.DrawFn) -> WindowMixCase:
    """Any shape and options, small ones."""
    window = draw(
        st.one_of(
            st.tuples(st.integers(1, 6), st.integers(1, 7)),
            st.sampled_from(((8, 8), (4, 4), (8, 16), (16, 16), (5, 13))),
        )
    )
    few = math.prod(window) > 64
    channels = draw(st.one_of(st.integers(1, 40), st.sampled_from((8, 16, 32, 48)))) if few else None
    if channels is None:
        channels = draw(st.one_of(st.integers(1, 70), st.integers(1, 18).map(lambda c: 8 * c)))
    most = 2 if few else 3
    grid = tuple(w * draw(st.integers(1, most)) for w in window)
    return WindowMixCase(
        "drawn",
        (grid[0], grid[1]),
        window,
        channels,
        batch=draw(st.integers(1, 2)),
        dilated=draw(st.booleans()),
        bias=draw(st.booleans()),
        # Of one channel, or of two, all that the norm leaves is a sign.
        norm=draw(st.sampled_from(("both", "weight", None))) if channels > 4 else None,
        gate=draw(st.booleans()),
        wide_norm=draw(st.booleans()),
        eps=draw(st.sampled_from((1e-6, 1e-3, 1.0))),
        layout=draw(st.sampled_from(("halves", "contiguous", "strided", "misaligned"))),
    )


# ---- inputs ----


@dataclass
class WindowMixInputs:
    """Tensors of one WindowMixCase, and the gradient that comes back."""

    case: WindowMixCase
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    gate: Tensor | None
    dout: Tensor

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Those that have a gradient, in the order of the schema."""
        return tuple(getattr(self, name) for name in NAMES)

    def forward(self, library: Any) -> tuple[Tensor, Tensor, Tensor]:
        """out, mean, rstd."""
        case = self.case
        found: tuple[Tensor, Tensor, Tensor] = library.window_mix(
            *self.tensors, list(case.window), dilated=case.dilated, eps=case.eps
        )
        return found

    def backward(self, library: Any, mean: Tensor, rstd: Tensor) -> tuple[Tensor, ...]:
        """The gradients of `tensors`, empty for those that are None."""
        case = self.case
        found: tuple[Tensor, ...] = library.window_mix_backward(
            self.dout, *self.tensors, mean, rstd, list(case.window), dilated=case.dilated
        )
        return found

    def call(self, library: Any) -> tuple[Tensor, ...]:
        """out, mean, rstd and the gradients."""
        out, mean, rstd = self.forward(library)
        return out, mean, rstd, *self.backward(library, mean, rstd)


def window_mix_inputs(case: WindowMixCase, dtype: torch.dtype, device: str = "cpu") -> WindowMixInputs:
    """Fresh random tensors. Rows of the matrix are of unit length, so that y is of the size of x."""
    make = functools.partial(random, dtype=dtype, device=device)
    shape, n = (case.batch, *case.grid, case.channels), case.tokens
    if case.layout == "halves":
        gate, x = make(*shape[:3], 2 * case.channels).split(case.channels, -1)
    else:
        relaid = {"contiguous": lambda t: t, "strided": strided, "misaligned": misaligned}[case.layout]
        gate, x = relaid(make(*shape)), relaid(make(*shape))
    norm_dtype = torch.promote_types(dtype, torch.float32) if case.wide_norm else dtype
    weight = (random(n, n, dtype=torch.float64) * n**-0.5).to(device, dtype)
    norm_weight, norm_bias = (random(case.channels, dtype=norm_dtype, device=device) for _ in range(2))
    return WindowMixInputs(
        case,
        x,
        weight,
        make(n) if case.bias else None,
        norm_weight if case.norm else None,
        norm_bias if case.norm == "both" else None,
        gate if case.gate else None,
        make(*shape),
    )


# ---- the oracle ----


@functools.cache
def places(grid: tuple[int, int], window: tuple[int, int], dilated: bool) -> Tensor:
    """int64 [windows, n], the number in the grid, row by row, of each token of each window, from the definition."""
    (high, wide), (rows, columns) = grid, window
    down, across = high // rows, wide // columns
    found = []
    for p in range(down):
        for q in range(across):
            for a in range(rows):
                for b in range(columns):
                    i, j = (a * down + p, b * across + q) if dilated else (p * rows + a, q * columns + b)
                    found.append(i * wide + j)
    with torch.inference_mode(False):  # what is kept serves every mode
        return torch.tensor(found, dtype=torch.int64).view(-1, rows * columns)


def window_mix_oracle(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    gate: Tensor | None,
    *,
    window: tuple[int, int],
    dilated: bool,
    eps: float,
) -> Tensor:
    """out, computed in the dtype of x: tokens are gathered by `places`, mixed, and gathered back."""
    batch, high, wide, channels = x.shape
    place = places((high, wide), window, dilated).to(x.device)
    if norm_weight is not None:
        centred = x - x.mean(-1, keepdim=True)
        x = centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + eps) * norm_weight
        x = x if norm_bias is None else x + norm_bias
    tokens = x.reshape(batch, high * wide, channels)[:, place]  # [batch, windows, n, channels]
    y = torch.einsum("ij,bwjc->bwic", weight, tokens)
    y = y if bias is None else y + bias[:, None]
    back = place.flatten().argsort()
    y = y.reshape(batch, high * wide, channels)[:, back].view(batch, high, wide, channels)
    return y if gate is None else gate * (y + 1)


def _of_oracle(x: WindowMixInputs, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """out and the gradient of each tensor, in a dtype."""
    case = x.case
    leaves = [None if t is None else t.detach().to(dtype, copy=True).requires_grad_() for t in x.tensors]
    out = window_mix_oracle(*leaves, window=case.window, dilated=case.dilated, eps=case.eps)  # type: ignore[arg-type]
    found = iter(torch.autograd.grad(out, [t for t in leaves if t is not None], x.dout.to(dtype)))
    return out.detach(), tuple(None if t is None else next(found) for t in leaves)


# ---- checks ----


def check_window_mix(library: Any, case: WindowMixCase, dtype: torch.dtype, device: str = "cpu") -> None:
    """window_mix, its statistics, and each gradient."""
    check_window_mix_of(library, window_mix_inputs(case, dtype, device))


def check_window_mix_of(library: Any, x: WindowMixInputs) -> None:
    """The same of given tensors."""
    case, dtype = x.case, x.x.dtype
    wide = torch.promote_types(dtype, torch.float32)
    out, mean, rstd = x.forward(library)
    assert out.dtype == dtype and out.is_contiguous() and mean.dtype == rstd.dtype == wide
    if x.x.numel():
        (truth, gradients), (eager, eager_gradients) = (_of_oracle(x, d) for d in (torch.float64, dtype))
        assert_close("out", out, truth, eager)
        _check_statistics(x, mean, rstd)
    else:
        assert out.shape == x.x.shape
        gradients = eager_gradients = tuple(None if t is None else torch.zeros_like(t).double() for t in x.tensors)
    found = x.backward(library, mean, rstd)
    assert len(found) == len(NAMES)
    sizes = _summed(x)
    for name, tensor, g, true, rough in zip(NAMES, x.tensors, found, gradients, eager_gradients, strict=True):
        assert g.is_contiguous(), name
        if tensor is None:
            assert g.shape == (0,), name
            continue
        assert true is not None and rough is not None
        assert g.dtype == tensor.dtype and g.shape == tensor.shape, name
        if x.x.numel() == 0:
            assert torch.equal(g, torch.zeros_like(g)), name
        else:
            assert_close(f"d{name}", g, true, rough.to(g.dtype), gradient=True, scale=sizes[name])
    assert case.norm is not None or mean.shape == rstd.shape == (0,)


def _summed(x: WindowMixInputs) -> dict[str, float]:
    """The size of what is added up in each gradient, which may cancel, in units of the dtype of x.

    Sums are made in the wide dtype: an error in its last digit is that much less of a unit.
    """
    if x.x.numel() == 0:
        return dict.fromkeys(NAMES, 0.0)
    case = x.case
    how: dict[str, Any] = {"window": case.window, "dilated": case.dilated, "eps": case.eps}
    rows, weight, bias, norm_weight, norm_bias, gate = (None if t is None else t.double() for t in x.tensors)
    assert rows is not None and weight is not None
    d = x.dout.double().abs() if gate is None else (x.dout.double() * gate).abs()
    centred, factor = rows, torch.ones_like(rows)
    normal = rows.abs()
    if norm_weight is not None:
        centred = rows - rows.mean(-1, keepdim=True)
        rstd = 1 / torch.sqrt(centred.square().mean(-1, keepdim=True) + case.eps)
        centred, factor = (centred * rstd).abs(), (norm_weight * rstd).abs()
        normal = centred * norm_weight.abs() + (0 if norm_bias is None else norm_bias.abs())
    back = window_mix_oracle(d, weight.abs().t(), None, None, None, None, **how)
    mixed = window_mix_oracle(normal, weight.abs(), None if bias is None else bias.abs(), None, None, None, **how)
    place = places(case.grid, case.window, case.dilated).to(d.device)
    d, normal = (t.flatten(1, 2)[:, place] for t in (d, normal))
    sums = {
        "x": back * factor,
        "weight": torch.einsum("bwic,bwjc->ij", d, normal),
        "bias": d.sum((0, 1, 3)),
        "norm_weight": (back * centred).sum((0, 1, 2)),
        "norm_bias": back.sum((0, 1, 2)),
        "gate": x.dout.double().abs() * (mixed + 1),
    }
    dtype = x.x.dtype
    finer = torch.finfo(torch.promote_types(dtype, torch.float32)).eps / torch.finfo(dtype).eps
    return {name: finer * float(t.max()) for name, t in sums.items()}


def _check_statistics(x: WindowMixInputs, mean: Tensor, rstd: Tensor) -> None:
    if x.norm_weight is None:
        return
    results = []
    for dtype in (torch.float64, mean.dtype):
        rows = x.x.to(dtype).reshape(-1, x.case.channels)
        average = rows.mean(-1)
        variance = (rows - average[:, None]).square().mean(-1)
        results.append((average, 1 / torch.sqrt(variance + x.case.eps)))
    for name, one, truth, eager in zip(("mean", "rstd"), (mean, rstd), *results, strict=True):
        assert one.is_contiguous()
        # A mean may cancel.
        size = float(x.x.double().abs().mean(-1).max()) if name == "mean" else 0.0
        assert_close(name, one, truth, eager, scale=size)
