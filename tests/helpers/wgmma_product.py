"""Checks of torch.ops.warpform._wgmma_product, one product of a warpgroup in every layout of its operands.

Tests call `check`, on a GPU and in the emulator. `run` is what the GPU check's smoke stage calls, in a process of its
own, before any op whose kernels use such products; so this file imports nothing of the package.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

FAMILY = "wgmma_product"
DTYPES = (torch.float16, torch.bfloat16)
DEPTHS = (16, 32, 48, 64)
# The layouts that kernels use come first.
LAYOUTS = tuple(
    f"{left}_b_{right}_{swizzle}{way}"
    for swizzle in ("k128", "k64", "k32", "none")
    for way in ("", "_stores")
    for left in ("a_shared", "a_registers", "a_shared_outer")
    for right in ("depth", "outer")
)
EPS = torch.finfo(torch.float32).eps


def _placed(t: Tensor, offset: int) -> Tensor:
    """A contiguous copy that begins so many elements behind an address of torch's allocator, a multiple of 64 bytes."""
    copy = t.new_empty(offset + t.numel())[offset:].view(t.shape)
    copy.copy_(t)
    return copy


def multiply(library: Any, layout: str, a: Tensor, b: Tensor, offset: int = 0) -> Tensor:
    """a [64, depth] times b [depth, 64], laid out in memory as the layout's name says, `offset` elements off."""
    left = a.T if layout.startswith("a_shared_outer") else a
    right = b if "_b_outer" in layout else b.T
    out: Tensor = library._wgmma_product(_placed(left, offset), _placed(right, offset), layout)
    return out


def _compare(what: str, got: Tensor, expected: Tensor, bound: Tensor | None = None) -> None:
    """Raises AssertionError that says where the largest difference is. expected in float64, bound 0 if not given."""
    assert got.shape == (64, 64) and got.dtype == torch.float32
    apart = (got.double() - expected).abs().nan_to_num(nan=torch.inf)
    bad = apart > (0 if bound is None else bound)
    if bad.any():
        row, col = divmod(int(apart.argmax()), 64)
        value, wanted = float(got[row, col]), float(expected[row, col])
        raise AssertionError(f"{what}: {int(bad.sum())} of 4096 are wrong, at [{row}, {col}] {value} is not {wanted}")


def check(library: Any, layout: str, depth: int, dtype: torch.dtype, device: str, ulps: float) -> None:
    """Raises AssertionError where products differ from float64.

    ulps: how much of EPS each addition of a sum may be off: a half where it rounds, more on hardware, which cuts off.
    """
    generator = torch.Generator().manual_seed(depth)

    def draw(*sizes: int) -> Tensor:
        return torch.randint(-8, 9, sizes, generator=generator)

    # One term in each column and row of the result: what is read from a wrong place cannot cancel out.
    places = torch.randperm(64, generator=generator)[:depth], torch.randperm(64, generator=generator)[:depth]
    a, b = torch.zeros(64, depth), torch.zeros(depth, 64)
    a[places[0], torch.arange(depth)] = 1.0 + torch.arange(depth)
    b[torch.arange(depth), places[1]] = 2
    units = (a, b)
    # Whole numbers, whose sums are exact.
    whole = (draw(64, depth), draw(depth, 64))
    drawn = (torch.randn(64, depth, generator=generator), torch.randn(depth, 64, generator=generator))
    cases = (
        ("unit matrices", units, 0),
        ("whole numbers", whole, 0),
        ("whole numbers from 16 bytes behind a multiple of 64 on", whole, 8),
        ("normal numbers", drawn, 0),
    )
    for what, (a, b), offset in cases:
        left, right = a.to(device, dtype), b.to(device, dtype)
        exact, sizes = left.double() @ right.double(), left.double().abs() @ right.double().abs()
        bound = depth * ulps * EPS * sizes if what == "normal numbers" else None
        _compare(f"{layout}, depth {depth}, {what}", multiply(library, layout, left, right, offset), exact, bound)


def check_special_values(library: Any, layout: str, dtype: torch.dtype, device: str) -> None:
    """Infinity and NaN stay, and numbers below the smallest normal one count."""
    a, b = torch.ones(64, 32, dtype=dtype, device=device), torch.ones(32, 64, dtype=dtype, device=device)
    a[2, 3], a[50, 17] = torch.inf, torch.nan
    got = multiply(library, layout, a, b)
    rest = [row for row in range(64) if row not in (2, 50)]
    assert got[2].isposinf().all() and got[50].isnan().all() and got[rest].eq(32).all(), layout
    tiny = torch.finfo(dtype).smallest_normal / 4
    a, b = torch.full_like(a, tiny), torch.full_like(b, 2.0**14)
    assert multiply(library, layout, a, b).eq(32 * tiny * 2.0**14).all(), layout
    b = torch.full_like(b, torch.finfo(dtype).smallest_normal / 4)
    a = torch.full_like(a, 2.0**14)
    assert multiply(library, layout, a, b).eq(32 * tiny * 2.0**14).all(), layout


def families() -> dict[str, tuple[str, ...]]:
    """As warpform.cli.self_test has it: the layouts are the ops."""
    return {FAMILY: LAYOUTS}


def run(
    names: Sequence[str], *, device: str = "cuda", library: Any = None, dtypes: Sequence[str] | None = None
) -> Iterator[dict[str, Any]]:
    """As warpform.cli.self_test has it: a row before a layout is tested in a dtype, and one after."""
    if library is None:
        import warpform  # noqa: F401  registers the ops

        library = torch.ops.warpform
    for name in names:
        for dtype in DTYPES:
            text = str(dtype).removeprefix("torch.")
            if dtypes is not None and text not in dtypes:
                continue
            yield {"op": name, "dtype": text, "starting": True}
            begin, problem = time.perf_counter(), None
            try:
                for depth in DEPTHS:
                    check(library, name, depth, dtype, device, ulps=2.0)
                check_special_values(library, name, dtype, device)
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
            row = {"op": name, "device": device, "dtype": text, "direction": "forward", "ok": problem is None}
            yield {**row, "problem": problem, "ms": 1e3 * (time.perf_counter() - begin)}
