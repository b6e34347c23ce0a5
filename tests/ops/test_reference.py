"""Every op's reference against the float64 oracle, forward and backward, on the cases that kernels are tried on too."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st

from helpers import cases, checks
from helpers.compare import poisoned
from helpers.drawn import drawn
from warpform.ops.reference import attention
from warpform.ops.reference import window as window_reference

OPS = torch.ops.warpform


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


floats = pytest.mark.parametrize("dtype", cases.FLOATS, ids=dtype_id)


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


@floats
@pytest.mark.parametrize("case", cases.LAYER_NORM_CASES, ids=str)
def test_add_bias_residual_layer_norm(case: cases.LayerNormCase, dtype: torch.dtype) -> None:
    with poisoned():
        checks.check_layer_norm(OPS, case, dtype)


@floats
@pytest.mark.parametrize("approximate", ("none", "tanh"))
@pytest.mark.parametrize("case", cases.GELU_CASES, ids=str)
def test_bias_gelu(case: cases.GeluCase, approximate: str, dtype: torch.dtype) -> None:
    with poisoned():
        checks.check_gelu(OPS, case, approximate, dtype)


@drawn(
    40,
    # Of a single row all errors are one, and may be ten times another's by chance: the rule wants a few.
    shape=st.tuples(st.sampled_from(((0,), (3, 0), (17,), (5, 7), (2, 3, 4), (41,))), st.integers(8, 130)).map(
        lambda drawn: (*drawn[0], drawn[1])
    ),
    bias=st.booleans(),
    residual=st.booleans(),
    dtype=st.sampled_from(cases.FLOATS),
)
def test_rowwise_ops_on_drawn_shapes(shape: tuple[int, ...], bias: bool, residual: bool, dtype: torch.dtype) -> None:
    checks.check_layer_norm(OPS, cases.LayerNormCase("drawn", shape, bias, residual), dtype)
    checks.check_gelu(OPS, cases.GeluCase("drawn", shape, bias), "tanh" if residual else "none", dtype)
