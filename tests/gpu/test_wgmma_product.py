"""One product of a warpgroup in every layout of its operands: does the hardware read them as device/wgmma.cuh says?"""

from __future__ import annotations

import pytest
import torch

from helpers.wgmma_product import DEPTHS, DTYPES, LAYOUTS, check, check_special_values

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
        reason="needs wgmma: an H100 or H200",
    ),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products(layout: str, dtype: torch.dtype) -> None:
    for depth in DEPTHS:
        check(torch.ops.warpform, layout, depth, dtype, "cuda", ulps=2.0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(layout: str, dtype: torch.dtype) -> None:
    check_special_values(torch.ops.warpform, layout, dtype, "cuda")


def test_another_layout_is_another_result() -> None:
    """The test above can fail: what one layout stores, read as another, is not the product."""
    a, b = torch.randn(64, 64, device="cuda").bfloat16(), torch.randn(64, 64, device="cuda").bfloat16()
    right = torch.ops.warpform._wgmma_product(a, b, "a_shared_b_depth_k128")
    wrong = torch.ops.warpform._wgmma_product(a, b, "a_shared_b_outer_k128")
    assert (right - wrong).abs().max() > 1
