"""Softcaps, products and gates that are extreme but legal, on the GPU."""

from __future__ import annotations

import pytest
import torch

from helpers import scales

pytestmark = pytest.mark.gpu

OPS = torch.ops.warpform
by_tokens = pytest.mark.parametrize("tokens", (2, 130), ids=("few", "tiles"))


@pytest.mark.parametrize("softcap", (1e-300, 1e-8, 300.0, 1e4, 1e30, 1e300))
@pytest.mark.parametrize("head_dim", (64, 128))
def test_softcap(head_dim: int, softcap: float) -> None:
    scales.check_softcap(OPS, softcap, 300, head_dim, "cuda")


@pytest.mark.parametrize("size", (40.0, 200.0, 1000.0))
@pytest.mark.parametrize("head_dim", (64, 128))
def test_products_with_tables_that_pass_float16(head_dim: int, size: float) -> None:
    scales.check_large_products(OPS, head_dim, size, "cuda")


@by_tokens
def test_gates_whose_products_overflow_and_cancel(tokens: int) -> None:
    scales.check_gates_whose_products_overflow(OPS, tokens, "cuda")


@by_tokens
def test_a_product_that_overflows_before_its_gate(tokens: int) -> None:
    scales.check_product_that_overflows_before_its_gate(OPS, tokens, "cuda")
