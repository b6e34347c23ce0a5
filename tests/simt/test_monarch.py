"""Block-diagonal and Monarch products and their backwards: the CUDA kernels, run in the emulator."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers import monarch
from helpers.monarch import BlockdiagCase, GluCase, Inputs, MonarchCase

DTYPES = (torch.float16, torch.bfloat16)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))

# On few multiprocessors a CTA walks over many blocks and rows are summed in few ranges; on many, the other way round.
FEW_SMS, MANY_SMS = 1, 1024
H200_SHARED, AD102_SHARED = 232_448, 101_376


def _backward_aligned(case: MonarchCase) -> bool:
    return case.aligned and case.first[1] % 8 == 0 and case.second[1] % 8 == 0


@by_dtype
@pytest.mark.parametrize("case", [c for c in monarch.BLOCKDIAG_CASES if c.aligned], ids=str)
def test_blockdiag_cases(simt: Any, case: BlockdiagCase, dtype: torch.dtype) -> None:
    for seed, sm_count in ((0, FEW_SMS), (len(case.name), MANY_SMS)):
        simt._configure(seed, sm_count, H200_SHARED)
        monarch.check_blockdiag_multiply(simt, case, dtype)


@by_dtype
@pytest.mark.parametrize("case", [c for c in monarch.MONARCH_CASES if c.aligned], ids=str)
def test_monarch_cases(simt: Any, case: MonarchCase, dtype: torch.dtype) -> None:
    for seed, sm_count in ((0, FEW_SMS), (len(case.name), MANY_SMS)):
        simt._configure(seed, sm_count, H200_SHARED)
        monarch.check_monarch_multiply(simt, case, dtype, backward=_backward_aligned(case))


@by_dtype
@pytest.mark.parametrize("case", [c for c in monarch.GLU_CASES if c.aligned], ids=str)
def test_glu_cases(simt: Any, case: GluCase, dtype: torch.dtype) -> None:
    for seed, sm_count in ((0, FEW_SMS), (len(case.name), MANY_SMS)):
        simt._configure(seed, sm_count, H200_SHARED)
        monarch.check_blockdiag_glu(simt, case, dtype)
