"""The routed layers on wgmma (compute capability 9.0) in the emulator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import hidden
from helpers.backends import AD102_SHARED, H200_SHARED, HALF
from helpers.hidden import HiddenCase, HiddenInputs, hidden_inputs, wrong_plans

WIDE, NARROW = "WarpgroupTile<256, 4", "WarpgroupTile<128, 6"

by_dtype = pytest.mark.parametrize("dtype", HALF, ids=lambda d: str(d).removeprefix("torch."))
by_direction = pytest.mark.parametrize("routed_out", (False, True), ids=("gather", "scatter"))


@pytest.fixture(autouse=True)
def _two_multiprocessors(simt: Any) -> Iterator[None]:
    simt.configure(1, 2, H200_SHARED)
    yield
    simt.claim()


def products(simt: Any) -> list[dict[str, Any]]:
    """The launches of products of the routed layers since the last configure, without those of weight gradients."""
    return [launch for launch in simt.launches() if launch["kernel"].startswith(("hidden_gather", "hidden_scatter"))]


def kernels(simt: Any, count: int) -> set[str]:
    """The names of the kernels of so many products."""
    launches = products(simt)
    assert len(launches) == count, launches
    return {launch["kernel"].split("<")[0] for launch in launches}


HOPPER = {"hidden_gather_hopper", "hidden_scatter_hopper"}
EVERY_GPU = {"hidden_gather", "hidden_scatter"}

# Tokens around a tile's 128 and a warpgroup's 64; widths around 64, 128 and 256 with tails of whole 16 bytes.
CASES = (
    HiddenCase("five_tokens", 5, 3, 64, 64),
    HiddenCase("half_a_tile", 64, 4, 64, 72, "random"),
    HiddenCase("one_token_less", 127, 3, 72, 64, "random", bias=False),
    HiddenCase("a_tile", 128, 4, 64, 128, "topk", num_shared=1),
    HiddenCase("one_token_more", 129, 3, 72, 72, "random"),
    HiddenCase("three_tiles", 300, 6, 64, 72, "topk", num_shared=2),
    HiddenCase("no_gates", 200, 4, 72, 136, "random", gates=False),
    HiddenCase("plain", 140, 4, 64, 64, "random", gates=False, bias=False),
    HiddenCase("ragged", 139, 4, 88, 200, "random"),
    HiddenCase("beyond_a_wide_tile", 70, 3, 72, 264, "random"),
    HiddenCase("wide_groups", 70, 2, 264, 72, "random"),
    HiddenCase("deeper_than_the_stages", 70, 2, 328, 456, "topk"),
    HiddenCase("distinct", 260, 6, 64, 64, "distinct"),
    HiddenCase("same", 140, 6, 72, 64, "same"),
    HiddenCase("all", 130, 3, 72, 64, "all"),
    HiddenCase("none", 70, 3, 64, 64, "none"),
    HiddenCase("unused_group", 150, 5, 64, 64, "unused"),
    HiddenCase("one_group", 90, 1, 136, 64, "random"),
    HiddenCase("64_groups", 131, 64, 64, 64, "random"),
    HiddenCase("classes", 300, 3, 64, 72, "random", num_classes=3),
    HiddenCase("classes_ragged", 140, 3, 72, 136, "random", num_classes=5, gates=False),
    HiddenCase("triangular", 140, 4, 72, 4 * 64, "all", num_out=4),
    HiddenCase("triangular_uneven", 135, 6, 64, 4 * 72, "random", num_out=4),
    HiddenCase("triangular_wide", 70, 2, 264, 3 * 136, "all", num_out=3, gates=False),
    HiddenCase("strided", 135, 3, 64, 72, layout="strided"),
    HiddenCase("misaligned", 135, 3, 64, 72, layout="misaligned"),
    HiddenCase("transposed", 135, 3, 72, 136, layout="transposed"),
    HiddenCase("transposed_classes", 150, 3, 88, 72, "random", num_classes=3, layout="transposed"),
    HiddenCase("transposed_parts", 130, 4, 72, 2 * 72, "all", num_out=2, layout="transposed"),
)


@by_direction
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(simt: Any, case: HiddenCase, routed_out: bool) -> None:
    """Forward and backward, which reads the weight the other way; NaN in what tokens do not use.

    One direction in each of the dtypes, in turn from case to case.
    """
    i = (CASES.index(case) + routed_out) % 2
    simt.configure(len(case.name), 2 + i, H200_SHARED)
    hidden.check_hidden(simt, case, HALF[i], routed_out=routed_out)
    assert kernels(simt, 3 if routed_out else 2) == HOPPER


@by_direction
def test_whatever_the_order_of_threads(simt: Any, seed: int, routed_out: bool) -> None:
    for name in ("ragged", "triangular_uneven"):
        simt.configure(seed, 1, H200_SHARED)
        case = next(case for case in CASES if case.name == name)
        hidden.check_hidden(simt, case, torch.float16, routed_out=routed_out)
        assert kernels(simt, 3 if routed_out else 2) == HOPPER


@by_direction
@pytest.mark.parametrize(("multiprocessors", "shares"), [(1, {1}), (5, {2, 3}), (1024, {4, 5})])
def test_walk(simt: Any, multiprocessors: int, shares: set[int], routed_out: bool) -> None:
    """A block of threads takes one tile of columns, several or all, and not all blocks as many."""
    case = HiddenCase("walk", 200, 3, 136, 3 * 136, "random")
    simt.configure(multiprocessors, multiprocessors, H200_SHARED)
    hidden.check_hidden(simt, case, torch.float16, routed_out=routed_out)
    assert kernels(simt, 3 if routed_out else 2) == HOPPER
    tiles = 3
    found = {launch["grid"][0] / tiles for launch in products(simt)}
    assert found <= shares, found


@pytest.mark.parametrize(
    ("width", "other", "multiprocessors", "gather", "scatter"),
    [
        (64, 128, 1, NARROW, WIDE),  # of gather 128 columns, of scatter 4 groups of 64
        (64, 256, 1, WIDE, WIDE),
        (64, 256, 8, NARROW, NARROW),  # all tiles at a time
        (128, 640, 1, WIDE, WIDE),
    ],
)
def test_tiles(simt: Any, width: int, other: int, multiprocessors: int, gather: str, scatter: str) -> None:
    for routed_out, tile in ((False, gather), (True, scatter)):
        simt.configure(1, multiprocessors, H200_SHARED)
        x = hidden_inputs(HiddenCase("", 128, 4, width, other, "all"), torch.bfloat16, routed_out=routed_out)
        product(simt, x, routed_out)
        assert kernels(simt, 1) <= HOPPER and tile in products(simt)[0]["kernel"], products(simt)


def product(simt: Any, x: HiddenInputs, routed_out: bool) -> Tensor:
    """The output of the layer."""
    plan = x.plan(simt)
    if routed_out:
        return simt.hidden_scatter_linear(x.x, x.w, x.gates, x.bias, False, *plan)[0]
    return simt.hidden_gather_linear(x.x, x.w, x.gates, x.bias, *plan)


@by_dtype
@by_direction
@pytest.mark.parametrize("layout", ["plain", "transposed"])
def test_nan_beside_a_group(simt: Any, layout: str, routed_out: bool, dtype: torch.dtype) -> None:
    """Boxes of the weight reach past a group's width: what lies there does not arrive."""
    case = HiddenCase("beside", 140, 6, 72, 88, "none", layout=layout)
    x = hidden_inputs(case, dtype, routed_out=routed_out)
    x.selected[:, [1, 4]] = True
    x.group_mask = hidden.bits(x.selected)
    mine = x.selected.repeat_interleave(72, 1)[0]
    x.x = torch.randn_like(x.x)
    assert x.gates is not None and x.bias is not None
    x.gates = torch.randn_like(x.gates)
    expected = product(simt, x, routed_out)
    x.gates[~x.selected] = torch.nan
    if routed_out:
        x.w[~mine] = torch.nan
        x.bias[~mine] = torch.nan
    else:
        x.w[:, ~mine] = torch.nan
        x.x[:, ~mine] = torch.nan
    found = product(simt, x, routed_out)
    assert found.isfinite().all() and torch.equal(found, expected)
    assert kernels(simt, 2) <= HOPPER


@by_direction
@pytest.mark.parametrize("width", [64, 72, 264])
def test_nan_in_a_part(simt: Any, width: int, routed_out: bool) -> None:
    """NaN meets the groups and parts that out_mask joins, and no others, in the same tile or not."""
    case = HiddenCase("part", 130, 4, width, 4 * 72, "all", num_out=4, gates=False, bias=False)
    x = hidden_inputs(case, torch.float16, routed_out=routed_out)
    assert x.out_mask is not None
    expected = product(simt, x, routed_out)
    joined = torch.tensor([[bool(m >> g & 1) for g in range(4)] for m in x.out_mask.tolist()])  # [parts, groups]
    for bad in range(4):
        step, other_step = (72, width) if routed_out else (width, 72)
        y = replace(x, x=x.x.clone())
        y.x[:, bad * step : (bad + 1) * step] = torch.nan
        found = product(simt, y, routed_out)
        meets = (joined[bad] if routed_out else joined[:, bad]).repeat_interleave(other_step)
        assert found[:, meets].isnan().all() and torch.equal(found[:, ~meets], expected[:, ~meets])
    assert kernels(simt, 5) <= HOPPER


@by_direction
def test_gates_of_any_size(simt: Any, routed_out: bool) -> None:
    """What gates multiply overflows only where it is stored."""
    case = HiddenCase("sizes", 140, 4, 64, 64, "topk", bias=False)
    x = hidden_inputs(case, torch.float16, routed_out=routed_out)
    assert x.gates is not None
    x.gates = torch.where(x.selected, torch.randn_like(x.gates), torch.nan)
    expected = product(simt, x, routed_out)
    for scale in (2.0**-100, 2.0**100):
        y = replace(x, gates=x.gates * scale)
        found = product(simt, y, routed_out)
        if scale < 1:
            assert not found.any()  # too small for 16 bits, and no NaN
        else:
            assert found[expected.float().abs() > 1e-3].isinf().all() and not found.isnan().any()
    assert kernels(simt, 3) <= HOPPER


@by_direction
@pytest.mark.parametrize("layout", ["plain", "transposed"])
def test_a_wrong_plan_stays_within_its_tensors(simt: Any, layout: str, routed_out: bool) -> None:
    """Whatever the plan's tensors hold, the kernels read and write nothing else: the emulator would say so."""
    case = HiddenCase("wrong", 140, 4, 64, 72, "random", num_classes=2, layout=layout)
    x = hidden_inputs(case, torch.bfloat16, routed_out=routed_out)
    for bad in wrong_plans(x.plan(simt)):
        if routed_out:
            simt.hidden_scatter_linear(x.x, x.w, x.gates, x.bias, True, *bad)
        else:
            simt.hidden_gather_linear(x.x, x.w, x.gates, x.bias, *bad)
    assert kernels(simt, 3) <= HOPPER


@by_direction
def test_one_weight_for_all_classes(simt: Any, routed_out: bool) -> None:
    """Classes that share their memory, and such as no tensor map describes."""
    case = HiddenCase("expanded", 140, 3, 64, 72, "random", num_classes=2)
    x = hidden_inputs(case, torch.float16, routed_out=routed_out)
    size_out, size_in = x.w.shape[-2:]
    one = x.w[0]
    x.w = one.expand(2, -1, -1)
    expected = product(simt, x, routed_out)
    x.w = torch.stack((one, one))
    assert torch.equal(product(simt, x, routed_out), expected)
    assert kernels(simt, 2) <= HOPPER
    apart = size_out * size_in + 8
    storage = torch.zeros(2 * apart, dtype=torch.float16)
    x.w = storage.as_strided((2, size_out, size_in), (apart, size_in, 1))
    x.w.copy_(one)
    simt.configure(1, 2, H200_SHARED)
    torch.testing.assert_close(product(simt, x, routed_out), expected)
    assert kernels(simt, 1) <= EVERY_GPU


# ---- what takes mma.sync ----

FALLS_BACK = HiddenCase("falls_back", 139, 3, 72, 136, "random")


def check_without(simt: Any, case: HiddenCase = FALLS_BACK) -> None:
    for routed_out in (False, True):
        hidden.check_hidden(simt, case, torch.bfloat16, routed_out=routed_out)
    assert kernels(simt, 5) == EVERY_GPU


def test_switched_off(simt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WARPFORM_HOPPER", "0")
    check_without(simt)


@pytest.mark.parametrize("facts", [{"capability": 80}, {"capability": 100}, {"tensor_maps": False}], ids=str)
def test_other_machines(simt: Any, facts: dict[str, Any]) -> None:
    simt.claim(**facts)
    check_without(simt)


@pytest.mark.parametrize(("width", "other"), [(56, 136), (136, 56)])
def test_narrow_layers(simt: Any, width: int, other: int) -> None:
    check_without(simt, replace(FALLS_BACK, width=width, other=other))


def test_less_shared_memory(simt: Any) -> None:
    simt.configure(1, 2, AD102_SHARED)
    case = replace(FALLS_BACK, gates=False)
    for routed_out in (False, True):
        product(simt, hidden_inputs(case, torch.bfloat16, routed_out=routed_out), routed_out)
    assert kernels(simt, 2) == EVERY_GPU


def test_few_tokens_take_gemv(simt: Any) -> None:
    for routed_out in (False, True):
        product(simt, hidden_inputs(replace(FALLS_BACK, tokens=4), torch.float16, routed_out=routed_out), routed_out)
    assert kernels(simt, 2) == {"hidden_gather_gemv", "hidden_scatter_gemv"}


@by_dtype
@by_direction
def test_same_results(simt: Any, monkeypatch: pytest.MonkeyPatch, routed_out: bool, dtype: torch.dtype) -> None:
    """Both kernels round the same products at the same places, and add them in float32."""
    x = hidden_inputs(FALLS_BACK, dtype, routed_out=routed_out)
    plan = x.plan(simt)

    def all_outputs() -> list[Tensor]:
        if routed_out:
            out, ungated = simt.hidden_scatter_linear(x.x, x.w, x.gates, x.bias, True, *plan)
            return [out, ungated, *simt.hidden_scatter_linear_backward(x.dout, ungated, x.w, x.gates, *plan)]
        out = simt.hidden_gather_linear(x.x, x.w, x.gates, x.bias, *plan)
        return [out, *simt.hidden_gather_linear_backward(x.dout, x.x, x.w, x.gates, *plan)]

    with_wgmma = all_outputs()
    assert kernels(simt, 2) == HOPPER
    monkeypatch.setenv("WARPFORM_HOPPER", "0")
    simt.configure(1, 2, H200_SHARED)
    for found, other in zip(with_wgmma, all_outputs(), strict=True):
        unit = torch.finfo(dtype).eps * other.abs().max()
        assert (found - other).abs().max() <= unit
    assert kernels(simt, 2) == EVERY_GPU
