"""_wgmma_product in the emulator: every layout of the operands, brought by TMA and stored by threads."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.wgmma_product import DEPTHS, DTYPES, LAYOUTS, check, check_special_values


@pytest.mark.parametrize("layout", LAYOUTS)
def test_products(simt: Any, layout: str) -> None:
    at = LAYOUTS.index(layout)
    for i, depth in enumerate(DEPTHS):
        check(simt, layout, depth, DTYPES[(at + i) % 2], "cpu", ulps=0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_orders_of_threads(simt: Any, seed: int, dtype: torch.dtype) -> None:
    for layout in ("a_shared_b_depth_k128", "a_registers_b_outer_k128", "a_shared_outer_b_outer_none_stores"):
        check(simt, layout, 64, dtype, "cpu", ulps=0.5)


@pytest.mark.parametrize("layout", ["a_shared_b_depth_k128", "a_registers_b_outer_k64", "a_shared_outer_b_depth_none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(simt: Any, layout: str, dtype: torch.dtype) -> None:
    check_special_values(simt, layout, dtype, "cpu")


def test_what_it_refuses(simt: Any) -> None:
    a = torch.ones(64, 32, dtype=torch.bfloat16)
    name = "a_shared_b_depth_k128"
    with pytest.raises(ValueError, match="layout must be a_shared, .* got a_shared_b_depth_k129"):
        simt._wgmma_product(a, a, "a_shared_b_depth_k129")
    with pytest.raises(Exception, match="a must be float16 or bfloat16, got float32"):
        simt._wgmma_product(a.float(), a, name)
    with pytest.raises(ValueError, match=r"a must be of shape \[64, depth\], depth 16, 32, 48 or 64, got .*\[64, 80\]"):
        simt._wgmma_product(torch.ones(64, 80, dtype=torch.bfloat16), a, name)
    with pytest.raises(ValueError, match="b must have the depth 32 that a has"):
        simt._wgmma_product(a, torch.ones(64, 16, dtype=torch.bfloat16), name)
    with pytest.raises(ValueError, match="a must be contiguous"):
        simt._wgmma_product(torch.ones(64, 64, dtype=torch.bfloat16)[:, ::2], a, name)


def test_other_machines_have_no_such_kernel(simt: Any) -> None:
    a = torch.ones(64, 32, dtype=torch.bfloat16)
    try:
        for facts, reason in (
            ({"capability": 80}, "the GPU's compute capability is not 9.0"),
            ({"tensor_maps": False}, "the driver has no cuTensorMapEncodeTiled"),
        ):
            simt.claim(**facts)
            with pytest.raises(RuntimeError, match=f"_wgmma_product: no kernel: {reason}"):
                simt._wgmma_product(a, a, "a_shared_b_depth_k128")
    finally:
        simt.claim()


def test_it_can_be_switched_off(simt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    a = torch.ones(64, 32, dtype=torch.bfloat16)
    monkeypatch.setenv("WARPFORM_HOPPER", "0")
    with pytest.raises(RuntimeError, match="_wgmma_product: no kernel: WARPFORM_HOPPER=0"):
        simt._wgmma_product(a, a, "a_shared_b_depth_k128")
