"""Scales, softcaps and masks that are extreme but legal, and those that are not."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import cases, checks, oracle
from helpers.cases import AttentionCase, DisentangledCase, WindowCase, offsets, random
from helpers.compare import assert_close
from warpform import ops

OPS = torch.ops.warpform
by_dtype = pytest.mark.parametrize("dtype", cases.FLOATS, ids=lambda d: str(d).removeprefix("torch."))
# Not positive, and positive, but 0 as a float32.
by_scale = pytest.mark.parametrize("scale", (0.0, -0.4, 1e-50))
by_two_dtypes = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))

MASKS = (
    AttentionCase("plain", (9, 33)),
    AttentionCase("causal", (4, 33, 33, 70), causal=True, head_dim=8),
    AttentionCase("causal_shared_keys", (40,), causal=True, heads=4, heads_k=1),
    AttentionCase("causal_fewer_keys", (40, 5), (30, 9), causal=True),
    AttentionCase("window", (40,), window=(5, 2)),
    AttentionCase("causal_window", (40,), window=(5, 0), causal=True),
    AttentionCase("alibi", (40, 3), slopes="batch"),
    AttentionCase("causal_alibi", (40, 3), causal=True, slopes="heads"),
    AttentionCase("causal_softcap", (40,), causal=True, softcap=3.0),
)


@pytest.mark.parametrize("case", MASKS, ids=str)
@by_scale
@by_two_dtypes
def test_attention(case: AttentionCase, scale: float, dtype: torch.dtype) -> None:
    checks.check_attention(OPS, replace(case, softmax_scale=scale), dtype)


@by_dtype
def test_causal_attention_of_scale_0_is_a_running_mean(dtype: torch.dtype) -> None:
    q, k, v = random(3, 4, 1, 8, dtype=dtype).unbind(0)
    cu = offsets([4])
    out = ops.varlen_attention(q, k, v, cu, cu, 4, 4, softmax_scale=0.0, causal=True)
    mean = v.double().cumsum(0) / torch.arange(1, 5).view(4, 1, 1)
    # A sum of 4 terms and a quotient of numbers that were not rounded, then one rounding.
    assert (out.double() - mean).abs().max() <= 4 * torch.finfo(dtype).eps * v.double().abs().max()


@pytest.mark.parametrize(
    ("mask", "stride"), (({}, 1), ({"causal": True}, 1), ({"causal": True, "window": (5, 0)}, 1), ({"causal": True}, 3))
)
@by_scale
def test_attention_step(mask: dict[str, Any], stride: int, scale: float) -> None:
    """Two steps, the second one causal, and their backward: rows `stride` apart see what their neighbours would."""
    length, half = 66, 33
    q, k, v, dout = random(4, length, 2, 8, dtype=torch.float32).unbind(0)
    window = mask.get("window", (-1, -1))
    how = {"softmax_scale": scale, "causal": mask.get("causal", False), "q_stride": stride, "k_stride": stride}
    how["window_size"] = (window[0] * stride if window[0] > 0 else -1, -1)
    out = lse = None
    batch = [t.unsqueeze(0) for t in (q, k, v, dout)]
    for first in (0, half):
        block = [t[:, first : first + half] for t in batch[1:3]]
        out, lse = ops.attention_step(batch[0], *block, out, lse, k_offset=first * stride, **how)
    options = {"softmax_scale": scale, **mask}
    truth = oracle.varlen_attention(*(t.double() for t in (q, k, v)), [length], [length], **options)
    eager = oracle.varlen_attention(q, k, v, [length], [length], **options)
    assert out is not None and lse is not None
    assert_close("out", out[0], truth[0], eager[0])
    assert_close("lse", lse[0], truth[1], eager[1])
    delta = (batch[3] * out).sum(-1).transpose(1, 2).contiguous()
    found = ops.attention_step_backward(batch[3], delta, *batch[:3], lse, **how)
    tensors = (dout, None, q, k, v)
    truths = oracle.varlen_attention_gradients(
        *(t if t is None else t.double() for t in tensors), [length], [length], **options
    )
    yardsticks = oracle.varlen_attention_gradients(*tensors, [length], [length], **options)
    largest = max(t.abs().max().item() for t in truths)
    for name, g, one, yardstick in zip(("dq", "dk", "dv"), found, truths, yardsticks, strict=True):
        assert_close(name, g[0], one, yardstick, gradient=True, scale=largest)


@by_scale
@by_two_dtypes
def test_disentangled_attention(scale: float, dtype: torch.dtype) -> None:
    case = DisentangledCase("", (20, 1, 7), softmax_scale=scale, head_dim=8)
    checks.check_disentangled_attention(OPS, case, dtype)


@pytest.mark.parametrize("mask_value", (-100.0, -1e30, -math.inf, 0.0))
@pytest.mark.parametrize("scale", (0.0, -0.4))
@by_two_dtypes
def test_window_attention(scale: float, mask_value: float, dtype: torch.dtype) -> None:
    case = WindowCase("", (6, 7), (4, 4), (2, 1), scale=scale, mask_value=mask_value, head_dim=8)
    checks.check_window_attention(OPS, case, dtype)


def test_a_mask_that_only_a_double_holds_masks() -> None:
    qkv = random(1, 6, 6, 3, 1, 8, dtype=torch.float32)
    how = {"window_size": 4, "shift_size": 2}
    masked = ops.window_attention(qkv, mask_value=-math.inf, **how)
    assert torch.equal(ops.window_attention(qkv, mask_value=-1e300, **how), masked)


@pytest.mark.parametrize("softcap", (1e-300, 1e-40, 1e-8, 1e4, 1e30, 1e300))
@by_two_dtypes
def test_softcap(softcap: float, dtype: torch.dtype) -> None:
    """At most 1e-8, scores are 0 beside 1; from 1e4 on, those of a few units are what they are without (the difference
    is score^3 / softcap^2 / 3, below an eps of float32; the case's float64 is held to the definition)."""
    q, k, v, dout = random(4, 40, 1, 8, dtype=dtype).unbind(0)
    cu = offsets([40])
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    out, lse = ops.varlen_attention(*leaves, cu, cu, 40, 40, causal=True, softcap=softcap, return_lse=True)
    dq, dk, dv = torch.autograd.grad(out, leaves, dout)
    tensors = [t.double().requires_grad_() for t in (q, k, v)]
    truth = oracle.varlen_attention(*tensors, [40], [40], causal=True, softcap=softcap)
    truths = torch.autograd.grad(truth[0], tensors, dout.double())
    same: dict[str, Any] = {"softmax_scale": 0.0} if softcap < 1 else {}
    eager = oracle.varlen_attention(q, k, v, [40], [40], causal=True, **same)
    yardsticks = oracle.varlen_attention_gradients(dout, None, q, k, v, [40], [40], causal=True, **same)
    assert_close("out", out, truth[0], eager[0])
    assert_close("lse", lse, truth[1], eager[1])
    largest = max(t.abs().max().item() for t in truths)
    for name, g, one, yardstick in zip(("dq", "dk", "dv"), (dq, dk, dv), truths, yardsticks, strict=True):
        assert_close(name, g, one, yardstick, gradient=True, scale=largest)


@pytest.mark.parametrize("eps", (1e-12, 1.0, 1e30))
def test_layer_norm_of_a_constant_row_is_its_bias(eps: float) -> None:
    x, weight, bias = torch.full((2, 8), 3.0), random(8, dtype=torch.float32), random(8, dtype=torch.float32)
    assert torch.equal(ops.add_bias_residual_layer_norm(x, None, None, weight, bias, eps), bias.expand(2, 8))


def _attention(**how: Any) -> Tensor:
    q, cu = torch.randn(4, 1, 8), offsets([4])
    return ops.varlen_attention(q, q, q, cu, cu, 4, 4, **how)


def _step(**how: Any) -> Any:
    q = torch.randn(1, 4, 1, 8)
    return ops.attention_step(q, q, q, **how)


def _step_backward(**how: Any) -> Any:
    q, rows = torch.randn(1, 4, 1, 8), torch.randn(1, 1, 4)
    return ops.attention_step_backward(q, rows, q, q, q, rows, **how)


def _disentangled(**how: Any) -> Tensor:
    q, table = torch.randn(4, 1, 8), torch.randn(6, 1, 8)
    return ops.disentangled_attention(q, q, q, table, table, offsets([4]), 4, **how)


def _window(**how: Any) -> Tensor:
    return ops.window_attention(torch.randn(1, 4, 4, 3, 1, 8), window_size=2, shift_size=1, **how)


def _layer_norm(**how: Any) -> Any:
    x = torch.randn(2, 8)
    return ops.add_bias_residual_layer_norm(x, None, None, x[0], x[1], **how)


def _rms_norm(**how: Any) -> Any:
    x = torch.randn(2, 8)
    return ops.add_residual_rms_norm(x, None, x[0], **how)


def _rms_norm_gelu(**how: Any) -> Any:
    return ops.rms_norm_gelu(torch.randn(2, 8), **how)


@pytest.mark.parametrize(
    ("call", "name", "value", "expected"),
    [
        *(
            (call, name, value, "finite")
            for call, name in (
                (_attention, "softmax_scale"),
                (_attention, "softcap"),
                (_step, "softmax_scale"),
                (_step_backward, "softmax_scale"),
                (_disentangled, "softmax_scale"),
                (_window, "scale"),
                (_layer_norm, "eps"),
                (_rms_norm, "eps"),
                (_rms_norm_gelu, "eps"),
            )
            for value in (math.nan, math.inf, -math.inf)
        ),
        (_window, "mask_value", math.nan, "finite"),
        (_window, "mask_value", math.inf, "finite"),
        (_attention, "softcap", -1.0, "negative"),
        (_layer_norm, "eps", -1e-5, "negative"),
        (_rms_norm, "eps", -1e-5, "negative"),
        (_rms_norm_gelu, "eps", -1e-5, "negative"),
        *((_rms_norm_gelu, "scale", value, "from -1e10 to 1e10") for value in (math.nan, math.inf, -math.inf)),
    ],
)
def test_what_is_not_legal_is_refused(call: Callable[..., Any], name: str, value: float, expected: str) -> None:
    with pytest.raises(ValueError, match=rf"^\w+: {name} must (be|not be) {expected}, got {value}"):
        call(**{name: value})
