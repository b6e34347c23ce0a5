"""RMSNorm and RMSNorm with GELU: cases, inputs, and whole checks of one op on one case.

`library` is torch.ops.warpform or torch.ops.warpform_simt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from . import oracle
from .cases import random, strided
from .compare import assert_close

# ---- cases ----


@dataclass(frozen=True)
class RmsNormCase:
    """Shape and optional inputs of one call of add_residual_rms_norm."""

    name: str
    shape: tuple[int, ...]
    residual: bool = True
    eps: float = 1e-6
    wide_weight: bool = False  # float32 whatever x is
    strided: bool = False

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class RmsNormGeluCase:
    """Shape and numbers of one call of rms_norm_gelu."""

    name: str
    shape: tuple[int, ...]
    scale: float | None = None
    eps: float = 0.0
    approximate: str = "none"
    strided: bool = False

    def __str__(self) -> str:
        return self.name


RMS_NORM_CASES = (
    RmsNormCase("plain", (37, 384)),
    RmsNormCase("wide_weight", (37, 384), wide_weight=True),
    RmsNormCase("no_residual", (5, 7, 96), residual=False),
    RmsNormCase("no_eps", (19, 768), eps=0.0),
    RmsNormCase("large_eps", (19, 64), eps=3.0, residual=False),
    RmsNormCase("odd_width", (11, 333)),
    RmsNormCase("one_wide_row", (1, 5000)),
    RmsNormCase("width_one", (6, 1)),
    RmsNormCase("vector", (48,)),
    RmsNormCase("no_rows", (0, 32)),
    RmsNormCase("no_rows_in_the_middle", (3, 0, 32)),
    RmsNormCase("strided", (9, 128), strided=True),
)

RMS_NORM_GELU_CASES = (
    RmsNormGeluCase("plain", (37, 384)),
    RmsNormGeluCase("tanh", (37, 96), approximate="tanh"),
    RmsNormGeluCase("scale", (5, 7, 96), scale=3.0),
    RmsNormGeluCase("negative_scale", (19, 64), scale=-8.0, approximate="tanh"),
    RmsNormGeluCase("no_scale", (19, 64), scale=0.0),
    RmsNormGeluCase("eps", (19, 768), eps=100.0),
    RmsNormGeluCase("odd_width", (11, 333)),
    RmsNormGeluCase("one_wide_row", (1, 5000), approximate="tanh"),
    RmsNormGeluCase("width_one", (6, 1)),
    RmsNormGeluCase("vector", (48,)),
    RmsNormGeluCase("no_rows", (0, 32)),
    RmsNormGeluCase("no_rows_in_the_middle", (3, 0, 32)),
    RmsNormGeluCase("strided", (9, 128), strided=True),
)

# The last column of shapes of kernels and one more; what is no multiple of 16 bytes is loaded element by element.
WIDTHS = (2, 7, 8, 31, 256, 264, 512, 513, 768, 1024, 1032, 4096, 4104, 5001, 16383, 16384)


def _rows(width: int) -> int:
    """More rows than one block takes at a time."""
    return 21 if width <= 513 else 11 if width <= 1032 else 3


def rms_norm_grid(width: int, *, wide_weight: bool) -> tuple[RmsNormCase, ...]:
    """With and without a residual."""
    return tuple(
        RmsNormCase("", (_rows(width), width), residual=residual, wide_weight=wide_weight) for residual in (False, True)
    )


def rms_norm_gelu_grid(width: int) -> tuple[RmsNormGeluCase, ...]:
    """Both forms."""
    return tuple(RmsNormGeluCase("", (_rows(width), width), approximate=form) for form in ("none", "tanh"))


@st.composite
def _shapes(draw: st.DrawFn) -> tuple[int, ...]:
    """Several rows or none: of a single row all errors are one, and may be ten times another's by chance."""
    width = draw(st.one_of(st.integers(2, 70), st.integers(2, 1200), st.integers(1, 160).map(lambda n: 8 * n)))
    rows = draw(st.sampled_from((0, 5, 8, 40) if width < 300 else (0, 5, 6)))
    return (rows, width) if draw(st.booleans()) else (1, rows, width)


@st.composite
def rms_norm_cases(draw: st.DrawFn) -> RmsNormCase:
    """Any shape and options."""
    shape = draw(_shapes())
    return RmsNormCase(
        "drawn",
        shape,
        residual=draw(st.booleans()),
        eps=draw(st.sampled_from((1e-6, 0.0, 0.1))),
        wide_weight=draw(st.booleans()),
        strided=math.prod(shape) > 0 and draw(st.booleans()),
    )


@st.composite
def rms_norm_gelu_cases(draw: st.DrawFn) -> RmsNormGeluCase:
    """Any shape and numbers."""
    shape = draw(_shapes())
    return RmsNormGeluCase(
        "drawn",
        shape,
        scale=draw(st.sampled_from((None, None, 1.0, -3.5, 20.0))),
        eps=draw(st.sampled_from((0.0, 1e-6, 3.0))),
        approximate=draw(st.sampled_from(("none", "tanh"))),
        strided=math.prod(shape) > 0 and draw(st.booleans()),
    )


# ---- inputs ----


@dataclass
class RmsNormInputs:
    """Tensors of one RmsNormCase, and the gradients that come back."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor
    dout: Tensor
    dsum: Tensor


def rms_norm_inputs(case: RmsNormCase, dtype: torch.dtype, device: str = "cpu") -> RmsNormInputs:
    """Fresh random tensors."""
    x, dout, dsum = (random(*case.shape, dtype=dtype, device=device) for _ in range(3))
    residual = random(*case.shape, dtype=dtype, device=device) if case.residual else None
    if case.strided:
        x, residual = strided(x), None if residual is None else strided(residual)
    weight_dtype = torch.float32 if case.wide_weight else dtype
    return RmsNormInputs(x, residual, random(case.shape[-1], dtype=weight_dtype, device=device), dout, dsum)


def rms_norm_gelu_inputs(case: RmsNormGeluCase, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """x and dout, fresh and random."""
    x, dout = (random(*case.shape, dtype=dtype, device=device) for _ in range(2))
    return strided(x) if case.strided else x, dout


# ---- checks ----


def _largest(t: Tensor) -> float:
    return float(t.abs().max()) if t.numel() else 0.0


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics."""
    return torch.promote_types(dtype, torch.float32)


def check_rms_norm(
    library: Any, case: RmsNormCase, dtype: torch.dtype, device: str = "cpu", *, computed_in: torch.dtype | None = None
) -> None:
    """add_residual_rms_norm, its sum and statistic, and its backward with and without a gradient of the sum."""
    check_rms_norm_of(library, rms_norm_inputs(case, dtype, device), case.eps, computed_in)


def check_rms_norm_of(library: Any, x: RmsNormInputs, eps: float, computed_in: torch.dtype | None = None) -> None:
    """The same of given tensors. The yardstick is the eager computation in `computed_in`, or in their dtype."""
    dtype, width = x.x.dtype, x.x.size(-1)
    eager_dtype = computed_in or dtype
    out, total, rstd = library.add_residual_rms_norm(x.x, x.residual, x.weight, eps, return_sum=True)
    truth, rows = _rms_norm(x, eps, torch.float64)
    eager, eager_rows = _rms_norm(x, eps, eager_dtype)
    assert out.dtype == total.dtype == dtype and out.is_contiguous() and total.is_contiguous()
    assert rstd.dtype == wide_dtype(dtype) and rstd.is_contiguous()
    assert_close("out", out, truth, eager.to(dtype))
    if total.isfinite().all():
        assert_close("sum", total, rows, eager_rows.to(dtype))
    _, wide_rows = _rms_norm(x, eps, wide_dtype(dtype))
    inverse = [1 / torch.sqrt((t * t).mean(-1).flatten() + eps) for t in (rows, wide_rows)]
    assert_close("rstd", rstd, *inverse)
    without = library.add_residual_rms_norm(x.x, x.residual, x.weight, eps)
    assert torch.equal(without[0], out) and torch.equal(without[2], rstd)
    assert without[1].shape == (0,) and without[1].dtype == dtype
    if not total.isfinite().all():
        return

    # The gradient is a function of the sum as it was rounded, so the statistic is that sum's here.
    rstd = library.add_residual_rms_norm(total, None, x.weight, eps)[2]
    # What is added up may cancel: dx of one column, sums over rows with few rows; these are made in the wide dtype.
    exact, dout = total.double().reshape(-1, width), x.dout.double().reshape(-1, width)
    inverse_lengths = 1 / torch.sqrt((exact * exact).mean(-1, keepdim=True) + eps)
    finer = torch.finfo(wide_dtype(dtype)).eps / torch.finfo(dtype).eps
    of_dx = _largest(dout * x.weight.double() * inverse_lengths)
    of_dweight = finer * _largest((dout * exact * inverse_lengths).abs().sum(0))
    for dsum in (None, x.dsum):
        found = library.add_residual_rms_norm_backward(x.dout, dsum, total, x.weight, rstd)
        truths = _rms_norm_gradients(x, total, dsum, eps, torch.float64)
        yardsticks = _rms_norm_gradients(x, total, dsum, eps, eager_dtype)
        for name, g, true, yardstick, size in zip(
            ("dx", "dweight"), found, truths, yardsticks, (of_dx, of_dweight), strict=True
        ):
            assert g.dtype == (dtype if name == "dx" else x.weight.dtype) and g.is_contiguous(), name
            name = f"{name} ({'with' if dsum is not None else 'without'} dsum)"
            assert_close(name, g, true, yardstick.to(g.dtype), gradient=True, scale=size)


def _rms_norm(x: RmsNormInputs, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    residual = None if x.residual is None else x.residual.to(dtype)
    return oracle.add_residual_rms_norm(x.x.to(dtype), residual, x.weight.to(dtype), eps)


def _rms_norm_gradients(
    x: RmsNormInputs, total: Tensor, dsum: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    total, weight = (t.detach().to(dtype, copy=True).requires_grad_() for t in (total, x.weight))
    loss = (oracle.add_residual_rms_norm(total, None, weight, eps)[0] * x.dout.to(dtype)).sum()
    if dsum is not None:
        loss = loss + (total * dsum.to(dtype)).sum()
    return torch.autograd.grad(loss, (total, weight))


def check_rms_norm_gelu(
    library: Any,
    case: RmsNormGeluCase,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    computed_in: torch.dtype | None = None,
) -> None:
    """rms_norm_gelu and its backward."""
    x, dout = rms_norm_gelu_inputs(case, dtype, device)
    check_rms_norm_gelu_of(library, x, dout, (case.scale, case.eps, case.approximate), computed_in)


def check_rms_norm_gelu_of(
    library: Any, x: Tensor, dout: Tensor, how: tuple[float | None, float, str], computed_in: torch.dtype | None = None
) -> None:
    """The same of given tensors. The yardstick is the eager computation in `computed_in`, or in their dtype."""
    dtype = x.dtype
    out = library.rms_norm_gelu(x, *how)
    dx = library.rms_norm_gelu_backward(dout, x, *how)
    assert out.dtype == dx.dtype == dtype and out.is_contiguous() and dx.is_contiguous()
    (truth, true_dx), (eager, eager_dx) = (
        _rms_norm_gelu(x, dout, how, d) for d in (torch.float64, computed_in or dtype)
    )
    assert_close("out", out, truth, eager.to(dtype))
    # Where g is along the row, as with one column, dx is what g and its part along the row leave.
    scale, eps, _ = how
    gain = (math.sqrt(x.size(-1)) if scale is None else scale) / torch.sqrt(
        x.double().square().sum(-1, keepdim=True) + eps
    )
    assert_close("dx", dx, true_dx, eager_dx.to(dtype), gradient=True, scale=_largest(gain * dout.double()))


def _rms_norm_gelu(
    x: Tensor, dout: Tensor, how: tuple[float | None, float, str], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    leaf = x.detach().to(dtype, copy=True).requires_grad_()
    out = oracle.rms_norm_gelu(leaf, *how)
    return out.detach(), torch.autograd.grad((out * dout.to(dtype)).sum(), leaf)[0]
