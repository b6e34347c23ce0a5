"""What references do elsewhere than on a CPU, and where memory is short; the rest of them is in tests/conformance."""

from __future__ import annotations

import pytest
import torch

from helpers import cases, checks
from helpers.compare import poisoned
from warpform.ops.reference import attention
from warpform.ops.reference import window as window_reference

OPS = torch.ops.warpform


@pytest.fixture(autouse=True)
def _references_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WARPFORM_BACKEND", "reference")


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


floats = pytest.mark.parametrize("dtype", cases.FLOATS, ids=dtype_id)


@pytest.mark.sampled
@floats
@pytest.mark.parametrize("case", cases.DISENTANGLED_CASES, ids=str)
def test_disentangled_attention_in_blocks(
    case: cases.DisentangledCase, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Few scores at a time, made one by one: groups are split, and sequences taken some queries at a time.
    monkeypatch.setattr(attention, "_SCORES_AT_A_TIME", 160)
    monkeypatch.setattr(attention, "_flash", None)
    with poisoned():
        checks.check_disentangled_attention(OPS, case, dtype)


@floats
@pytest.mark.parametrize("case", cases.WINDOW_CASES[::3], ids=str)
def test_window_attention_where_it_is_not_a_cpus(
    case: cases.WindowCase, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(window_reference, "_flash", None)
    checks.check_window_attention(OPS, case, dtype)
