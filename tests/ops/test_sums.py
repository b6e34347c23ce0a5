"""Sums over many rows of 16-bit tensors are made in float32 and rounded once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.cases import offsets
from warpform import ops
from warpform.ops import RoutingPlan

ROWS = 32768
# 0.1 is 0.10009765625 as a bfloat16: ROWS times that is 3280, and both are exact in bfloat16 and in float32.
TENTH, SUM = 0.1, 3280.0
DTYPE = torch.bfloat16


def full(*shape: int, value: float = 1.0) -> Tensor:
    return torch.full(shape, value, dtype=DTYPE)


def gradients(out: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, leaves, torch.full_like(out, TENTH))


@pytest.mark.parametrize("heads", (1, 4))
@pytest.mark.parametrize(
    "how",
    ({}, {"window_size": (ROWS, ROWS)}, {"softcap": 5.0}, {"alibi_slopes": 0.0}, {"softmax_scale": 0.0}),
    ids=lambda how: "".join(how) or "plain",
)
def test_values_of_attention(how: dict[str, Any], heads: int) -> None:
    """All queries see one key: dv is the sum of dout, over the heads that share the key too."""
    rows = ROWS // heads
    if "alibi_slopes" in how:
        how = {"alibi_slopes": torch.zeros(heads)}
    q, k, v = full(rows, heads, 8), full(1, 1, 8), full(1, 1, 8).requires_grad_()
    out = ops.varlen_attention(q, k, v, offsets([rows]), offsets([1]), rows, 1, **how)
    (dv,) = gradients(out, v)
    assert (dv == SUM).all()


def test_values_of_causal_attention() -> None:
    """All queries see the first key, and by their scores no other: e^-200 is 0."""
    rows = 4096
    q, k = full(rows, 1, 8), full(rows, 1, 8, value=-100.0)
    k[0] = 0
    v = full(rows, 1, 8).requires_grad_()
    cu = offsets([rows])
    out = ops.varlen_attention(q, k, v, cu, cu, rows, rows, softmax_scale=1.0, causal=True)
    (dv,) = gradients(out, v)
    assert (dv[0] == SUM * rows / ROWS).all()


def test_keys_of_attention() -> None:
    """Two keys of equal scores, values 1 and -1 in one column: every query adds (dout / 2) q to one dk, and takes it
    from the other."""
    q, k, v = full(ROWS, 1, 8), full(2, 1, 8).requires_grad_(), full(2, 1, 8, value=0.0)
    v[0, 0, 0], v[1, 0, 0] = 1, -1
    out = ops.varlen_attention(q, k, v, offsets([ROWS]), offsets([2]), ROWS, 2, softmax_scale=1.0)
    (dk,) = gradients(out, k)
    assert (dk[0] == SUM / 2).all() and (dk[1] == -SUM / 2).all()


def test_values_of_a_step() -> None:
    q, k, dout = full(1, ROWS, 1, 8), full(1, 1, 1, 8), full(1, ROWS, 1, 8, value=TENTH)
    out, lse = ops.attention_step(q, k, k)
    delta = (dout.float() * out).sum(-1).transpose(1, 2).contiguous()
    _, _, dv = ops.attention_step_backward(dout, delta, q, k, k, lse)
    assert (dv == SUM).all()


def test_disentangled_attention() -> None:
    """Sequences of two tokens, values 1 and -1 in one column: distance 1 gets (dout / 2) q from every sequence."""
    batch = ROWS // 4
    q, k, v = full(2 * batch, 1, 8), full(2 * batch, 1, 8, value=0.0), full(2 * batch, 1, 8, value=0.0)
    v[0::2, 0, 0], v[1::2, 0, 0] = 1, -1
    table = full(4, 1, 8, value=0.0).requires_grad_()
    cu = 2 * torch.arange(batch + 1, dtype=torch.int32)
    out = ops.disentangled_attention(q, k, v, table, None, cu, 2, softmax_scale=1.0)
    (dtable,) = gradients(out, table)
    assert (dtable[1] == -SUM / 8).all() and (dtable[3] == SUM / 8).all()


def test_parameters_of_window_attention() -> None:
    """One row of windows of two tokens: the same as above, for the table of biases."""
    qkv = full(1, 1, 2 * ROWS, 3, 1, 8, value=0.0)
    qkv[:, :, 0::2, 2, :, 0], qkv[:, :, 1::2, 2, :, 0] = 1, -1
    table = full(3, 1, value=0.0).requires_grad_()
    (dtable,) = gradients(ops.window_attention(qkv, table, window_size=(1, 2)), table)
    assert dtable[0] == -SUM / 2 and dtable[2] == SUM / 2


def _layer_norm() -> tuple[Tensor, tuple[Tensor, ...]]:
    weight, bias = full(8).requires_grad_(), full(8).requires_grad_()
    x = full(ROWS, 8)
    x[:, 1::2] = -1
    return ops.add_bias_residual_layer_norm(x, None, None, weight, bias, 0.0), (bias,)


def _rms_norm() -> tuple[Tensor, tuple[Tensor, ...]]:
    weight = full(8).requires_grad_()
    return ops.add_residual_rms_norm(full(ROWS, 8), None, weight, 0.0), (weight,)


def _gelu() -> tuple[Tensor, tuple[Tensor, ...]]:
    bias = full(8, value=64.0).requires_grad_()  # where the derivative is 1
    return ops.bias_gelu(full(ROWS, 8), bias), (bias,)


def _blockdiag() -> tuple[Tensor, tuple[Tensor, ...]]:
    w, bias = full(2, 1, 3).requires_grad_(), full(2).requires_grad_()
    return ops.blockdiag_multiply(full(ROWS, 6), w, bias), (w, bias)


def _monarch() -> tuple[Tensor, tuple[Tensor, ...]]:
    w1, w2 = full(2, 1, 1).requires_grad_(), full(1, 1, 2).requires_grad_()
    return ops.monarch_multiply(full(ROWS, 2), w1, w2), (w1, w2)


def _glu() -> tuple[Tensor, tuple[Tensor, ...]]:
    bias = full(2).requires_grad_()
    return ops.blockdiag_glu(full(ROWS, 2), full(2, 2, 1), full(2, 1, 1), bias), (bias,)


def _hidden(function: Callable[..., Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    plan = RoutingPlan.from_mask(torch.ones(ROWS, 2, dtype=torch.bool))
    w, bias = full(2, 2).requires_grad_(), full(2).requires_grad_()
    return function(full(ROWS, 2), w, plan, None, bias), (w, bias)


@pytest.mark.parametrize(
    "call",
    (
        _layer_norm,
        _rms_norm,
        _gelu,
        _blockdiag,
        _monarch,
        _glu,
        lambda: _hidden(ops.hidden_gather_linear),
        lambda: _hidden(ops.hidden_scatter_linear),
    ),
    ids=("layer_norm", "rms_norm", "gelu", "blockdiag", "monarch", "glu", "hidden_gather", "hidden_scatter"),
)
def test_parameters(call: Callable[[], tuple[Tensor, tuple[Tensor, ...]]]) -> None:
    """Every row adds a tenth to every gradient."""
    out, parameters = call()
    for gradient in gradients(out, *parameters):
        assert (gradient == SUM).all()


def test_parameters_of_a_short_convolution() -> None:
    """Taps of 0 and a bias of 1: the gates are 1, and each of the three parts of the bias gets a tenth a token."""
    weight, bias = full(3, 2, value=0.0).requires_grad_(), full(3).requires_grad_()
    gated, gate = ops.short_conv_gate(full(2, ROWS // 2, 3), weight, bias)
    dbias, dweight = torch.autograd.grad(
        (gated, gate), (bias, weight), (torch.full_like(gated, TENTH), torch.full_like(gate, TENTH))
    )
    assert (dbias == SUM).all() and (dweight[:, 1] == SUM).all()
