"""Bad arguments: each gives one clear sentence which names the op, the argument, what was expected and what came."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from helpers import cases
from warpform import ops
from warpform.ops import _register

Q = torch.randn(7, 2, 8)
CU = cases.offsets([3, 4])
INT = torch.int32

ATTENTION = {"q": Q, "k": Q, "v": Q, "cu_seqlens_q": CU, "cu_seqlens_k": CU, "max_seqlen_q": 4, "max_seqlen_k": 4}
BAD_ATTENTION: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"q": [1.0]}, TypeError, r"q must be a tensor, got \[1.0\] \(list\)"),
    ({"q": Q[0]}, ValueError, r"q must be of shape \[total, heads, head_dim\], got float32 of shape \[2, 8\]"),
    (
        {"q": Q.int(), "k": Q.int(), "v": Q.int()},
        TypeError,
        r"q must be float16, bfloat16, float32 or float64, got int32",
    ),
    ({"k": Q.half()}, TypeError, r"k and v must be float32 as q is, got float16 and float32"),
    (
        {"v": Q[:, :, :4]},
        ValueError,
        r"k and v must both be of shape \[total_k, heads_k, 8\], got k .* v .*\[7, 2, 4\]",
    ),
    ({"k": Q[:, :, :4], "v": Q[:, :, :4]}, ValueError, r"k and v must both be of shape \[total_k, heads_k, 8\]"),
    ({"k": Q[:6]}, ValueError, r"k and v must both be"),
    ({"q": torch.randn(7, 3, 8)}, ValueError, r"the 3 heads of q must be a multiple of the heads of k and v, got 2"),
    ({"k": Q[:, :0], "v": Q[:, :0]}, ValueError, r"the 2 heads of q must be a multiple of the heads of k and v, got 0"),
    ({"v": torch.randn(7, 8, 2).mT}, ValueError, r"the last dimension of v must be contiguous, got stride 2"),
    ({"q": Q[:, :, :0], "k": Q[:, :, :0], "v": Q[:, :, :0]}, ValueError, r"head_dim must be at least 1"),
    (
        {"cu_seqlens_q": CU.long()},
        TypeError,
        r"cu_seqlens_q must be int32 of shape \[batch \+ 1\], got int64 of shape \[3\]",
    ),
    (
        {"cu_seqlens_k": CU[None]},
        ValueError,
        r"cu_seqlens_k must be int32 of shape \[batch \+ 1\], got int32 of shape \[1, 3\]",
    ),
    (
        {"cu_seqlens_k": CU[:0]},
        ValueError,
        r"cu_seqlens_k must be int32 of shape \[batch \+ 1\], got int32 of shape \[0\]",
    ),
    ({"cu_seqlens_k": cases.offsets([7])}, ValueError, r"cu_seqlens_k must be of shape \[3\] as cu_seqlens_q is"),
    ({"max_seqlen_q": 4.0}, TypeError, r"max_seqlen_q must be an int, got 4.0 \(float\)"),
    ({"max_seqlen_k": -1}, ValueError, r"max_seqlen_q and max_seqlen_k must not be negative, got 4, -1"),
    ({"max_seqlen_k": 3}, ValueError, r"max_seqlen_k must be at least the longest sequence of cu_seqlens_k, 4, got 3"),
    ({"window_size": 3}, TypeError, r"window_size must be \(left, right\), got 3"),
    ({"window_size": (1.5, 0)}, TypeError, r"window_size\[0\] must be an int"),
    ({"window_size": (0, -2)}, ValueError, r"window_size must be at least -1, which is unbounded, got \(0, -2\)"),
    ({"softcap": -1.0}, ValueError, r"softcap must not be negative, got -1.0"),
    (
        {"alibi_slopes": torch.ones(3)},
        ValueError,
        r"alibi_slopes must be of shape \[2\] or \[2, 2\], got float32 of shape \[3\]",
    ),
    ({"alibi_slopes": torch.ones(2).half()}, TypeError, r"alibi_slopes must be float32, got float16"),
    (
        {"cu_seqlens_q": torch.tensor([0, 5, 4], dtype=INT)},
        ValueError,
        r"cu_seqlens_q must not decrease, got 5 then 4 at \[2\]",
    ),
    (
        {"cu_seqlens_q": torch.tensor([0, 3, 9], dtype=INT)},
        ValueError,
        r"cu_seqlens_q must not pass the end .* of 7 rows, got 9",
    ),
    ({"cu_seqlens_k": torch.tensor([-1, 3, 7], dtype=INT)}, ValueError, r"cu_seqlens_k must begin with 0, got -1"),
    ({"cu_seqlens_q": CU.to("meta")}, ValueError, r"cu_seqlens_q must be on cpu as q is, got meta"),
    ({"k": Q.to("meta"), "v": Q.to("meta")}, ValueError, r"k must be on cpu as q is, got meta"),
]


@pytest.mark.parametrize(("changed", "error", "message"), BAD_ATTENTION, ids=[m for _, _, m in BAD_ATTENTION])
def test_varlen_attention(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^varlen_attention: {message}"):
        ops.varlen_attention(**{**ATTENTION, **changed})


@pytest.mark.parametrize("backend", ("auto", "reference"))
@pytest.mark.parametrize("values", ([0, 5, 4], [0, 3, 9], [-1, 3, 7], [0, 7, 7], [2, 3, 7], [0, -3, 4]), ids=str)
def test_op_called_directly_checks_offsets(values: list[int], backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels and references say the same."""
    monkeypatch.setenv("WARPFORM_BACKEND", backend)
    cu = torch.tensor(values, dtype=INT)
    if values != [0, 7, 7]:  # a step takes sequences of any length
        where = {"cu_seqlens_q": cu, "cu_seqlens_k": cu}
        with pytest.raises(RuntimeError, match=r"^attention_step: cu_seqlens_q must"):
            torch.ops.warpform.attention_step(Q, Q, Q, **where)
        with pytest.raises(RuntimeError, match=r"^attention_step_backward: cu_seqlens_q must"):
            lse = Q[:, :, 0].t().contiguous()
            torch.ops.warpform.attention_step_backward(Q, lse, Q, Q, Q, lse, **where)
    with pytest.raises(RuntimeError, match=r"^varlen_attention: (cu_seqlens_q|max_seqlen_q) must"):
        torch.ops.warpform.varlen_attention(Q, Q, Q, cu, cu, 4, 4)
    with pytest.raises(RuntimeError, match=r"^varlen_attention_backward: (cu_seqlens_q|max_seqlen_q) must"):
        torch.ops.warpform.varlen_attention_backward(Q, None, Q, Q, Q, Q, Q[:, :, 0].t(), cu, cu, 4, 4)
    with pytest.raises(RuntimeError, match=r"^disentangled_attention: (cu_seqlens|max_seqlen) must"):
        torch.ops.warpform.disentangled_attention(Q, Q, Q, None, None, cu, 4)
    with pytest.raises(RuntimeError, match=r"^disentangled_attention_backward: (cu_seqlens|max_seqlen) must"):
        torch.ops.warpform.disentangled_attention_backward(Q, Q, Q, Q, None, None, Q, Q[:, :, 0].t(), cu, 4)


TABLE = torch.randn(6, 2, 8)
DISENTANGLED = {"q": Q, "k": Q, "v": Q, "pos_key": TABLE, "pos_query": TABLE, "cu_seqlens": CU, "max_seqlen": 4}
BAD_DISENTANGLED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"k": [1.0]}, TypeError, r"k must be a tensor, got \[1.0\] \(list\)"),
    ({"q": Q[0]}, ValueError, r"q must be of shape \[total, heads, head_dim\], got float32 of shape \[2, 8\]"),
    ({"pos_key": TABLE[0]}, ValueError, r"pos_key must be of shape \[2 \* span, heads, head_dim\], got .* \[2, 8\]"),
    ({"q": Q.int()}, TypeError, r"q must be float16, bfloat16, float32 or float64, got int32"),
    ({"v": torch.randn(7, 8, 2).mT}, ValueError, r"the last dimension of v must be contiguous, got stride 2"),
    ({"q": Q[:, :, :0]}, ValueError, r"head_dim must be at least 1, got q float32 of shape \[7, 2, 0\]"),
    ({"k": Q[:6]}, ValueError, r"k must be of shape \[7, 2, 8\] as q is, got float32 of shape \[6, 2, 8\]"),
    ({"v": Q[:, :1]}, ValueError, r"v must be of shape \[7, 2, 8\] as q is, got float32 of shape \[7, 1, 8\]"),
    (
        {"pos_query": TABLE[:5]},
        ValueError,
        r"pos_query must be of shape \[2 \* span, 2, 8\] with span at least 1, got float32 of shape \[5, 2, 8\]",
    ),
    ({"pos_key": TABLE[:0]}, ValueError, r"pos_key must be of shape .* span at least 1, got .* \[0, 2, 8\]"),
    ({"pos_key": TABLE[:, :1]}, ValueError, r"pos_key must be of shape \[2 \* span, 2, 8\] with .* \[6, 1, 8\]"),
    (
        {"pos_query": TABLE[:4]},
        ValueError,
        r"pos_query must be of shape \[6, 2, 8\] as pos_key is, got float32 of shape \[4, 2, 8\]",
    ),
    ({"v": Q.half()}, TypeError, r"v must be float32 as q is, got float16 of shape \[7, 2, 8\]"),
    ({"pos_key": TABLE.double()}, TypeError, r"pos_key must be float32 as q is, got float64 of shape \[6, 2, 8\]"),
    ({"pos_key": TABLE.to("meta")}, ValueError, r"pos_key must be on cpu as q is, got meta"),
    (
        {"cu_seqlens": CU.long()},
        TypeError,
        r"cu_seqlens must be int32 of shape \[batch \+ 1\], got int64 of shape \[3\]",
    ),
    ({"cu_seqlens": CU[:0]}, ValueError, r"cu_seqlens must be int32 of shape \[batch \+ 1\], got int32 of shape \[0\]"),
    ({"cu_seqlens": CU.to("meta")}, ValueError, r"cu_seqlens must be on cpu as q is, got meta"),
    ({"cu_seqlens": cases.offsets([3, 5])}, ValueError, r"cu_seqlens must not pass the end .* of 7 rows, got 8"),
    ({"max_seqlen": 4.0}, TypeError, r"max_seqlen must be an int, got 4.0 \(float\)"),
    ({"max_seqlen": -1}, ValueError, r"max_seqlen must not be negative, got -1"),
    ({"max_seqlen": 3}, ValueError, r"max_seqlen must be at least the longest sequence of cu_seqlens, 4, got 3"),
    ({"positions": [0]}, TypeError, r"positions must be a tensor"),
    ({"positions": torch.arange(7).int()}, TypeError, r"positions must be int64, got int32 of shape \[7\]"),
    (
        {"positions": torch.arange(6)},
        ValueError,
        r"positions must be of shape \[7\], the rows of q, got int64 .* \[6\]",
    ),
    ({"positions": torch.arange(7, device="meta")}, ValueError, r"positions must be on cpu as q is, got meta"),
    ({"position_buckets": 1}, ValueError, r"position_buckets must be 0 or at least 2, got 1"),
    ({"position_buckets": -4}, ValueError, r"position_buckets must be 0 or at least 2, got -4"),
    ({"position_buckets": 2.0}, TypeError, r"position_buckets must be an int, got 2.0 \(float\)"),
    (
        {"position_buckets": 8, "max_relative_positions": 5},
        ValueError,
        r"max_relative_positions must be at least 6 with 8 position_buckets, got 5",
    ),
    ({"max_relative_positions": 5.5}, TypeError, r"max_relative_positions must be an int, got 5.5 \(float\)"),
    ({"pos_query": [1.0]}, TypeError, r"pos_query must be a tensor, got \[1.0\] \(list\)"),
    ({"pos_query": torch.randn(6, 8, 2).mT}, ValueError, r"the last dimension of pos_query must be contiguous"),
    ({"softmax_scale": float("inf")}, ValueError, r"softmax_scale must be finite, got inf"),
    ({"softmax_scale": "1"}, TypeError, r"softmax_scale must be a number, got '1' \(str\)"),
]


@pytest.mark.parametrize(("changed", "error", "message"), BAD_DISENTANGLED, ids=[m for _, _, m in BAD_DISENTANGLED])
def test_disentangled_attention(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^disentangled_attention: {message}"):
        ops.disentangled_attention(**{**DISENTANGLED, **changed})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dout": Q[:6]}, r"dout must have the shape and dtype of q, float32 of shape \[7, 2, 8\], got .* \[6, 2, 8\]"),
        ({"out": Q.half()}, r"out must have the shape and dtype of q, float32 .*, got float16 of shape \[7, 2, 8\]"),
        ({"k": Q[:6]}, r"k must be of shape \[7, 2, 8\] as q is"),
    ],
)
def test_disentangled_attention_backward_called_directly(changed: dict[str, Any], message: str) -> None:
    arguments = {"dout": Q, **DISENTANGLED, "out": Q, "lse": torch.zeros(2, 7)} | changed
    with pytest.raises(RuntimeError, match=f"^disentangled_attention_backward: {message}"):
        torch.ops.warpform.disentangled_attention_backward(**arguments)


X = torch.randn(2, 3, 8)
W = torch.ones(8)
BAD_LAYER_NORM: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": None}, TypeError, r"x must be a tensor, got None \(NoneType\)"),
    ({"x": torch.tensor(1.0)}, ValueError, r"x must be of shape \[..., width\], got float32 of shape \[\]"),
    ({"x": X.long()}, TypeError, r"x must be float16, bfloat16, float32 or float64, got int64 of shape \[2, 3, 8\]"),
    ({"weight": None}, TypeError, r"weight must be a tensor"),
    ({"x": [1.0]}, TypeError, r"x must be a tensor, got \[1.0\] \(list\)"),
    ({"bias": 1}, TypeError, r"bias must be a tensor, got 1 \(int\)"),
    ({"weight": W[:4]}, ValueError, r"weight must be of shape \[8\], got float32 of shape \[4\]"),
    ({"bias": W[None]}, ValueError, r"bias must be of shape \[8\], got float32 of shape \[1, 8\]"),
    (
        {"ln_bias": W.half()},
        TypeError,
        r"bias, weight and ln_bias must all be float32 as x is, or all float32, got ln_bias float16",
    ),
    (
        {"x": X.half(), "residual": X.half(), "bias": W.half()},
        TypeError,
        r"bias, weight and ln_bias must all be float16",
    ),
    ({"residual": X[:, :2]}, ValueError, r"residual must be of shape \[2, 3, 8\], got float32 of shape \[2, 2, 8\]"),
    ({"residual": X.double()}, TypeError, r"residual must be float32 as x is, got float64"),
    ({"residual": X.to("meta")}, ValueError, r"residual must be on cpu as x is, got meta"),
    ({"ln_bias": W.to("meta")}, ValueError, r"ln_bias must be on cpu as x is, got meta"),
    ({"eps": float("nan")}, ValueError, r"eps must be finite, got nan"),
    ({"eps": -0.5}, ValueError, r"eps must not be negative, got -0.5"),
    ({"eps": "small"}, TypeError, r"eps must be a number, got 'small' \(str\)"),
]


@pytest.mark.parametrize(("changed", "error", "message"), BAD_LAYER_NORM, ids=[m for _, _, m in BAD_LAYER_NORM])
def test_add_bias_residual_layer_norm(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"x": X, "bias": W, "residual": X, "weight": W, "ln_bias": W, **changed}
    with pytest.raises(error, match=f"^add_bias_residual_layer_norm: {message}"):
        ops.add_bias_residual_layer_norm(**arguments)


BAD_RMS_NORM: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": None}, TypeError, r"x must be a tensor, got None \(NoneType\)"),
    ({"x": torch.tensor(1.0)}, ValueError, r"x must be of shape \[..., width\], got float32 of shape \[\]"),
    ({"x": X.long()}, TypeError, r"x must be float16, bfloat16, float32 or float64, got int64 of shape \[2, 3, 8\]"),
    ({"weight": None}, TypeError, r"weight must be a tensor, got None \(NoneType\)"),
    ({"weight": W[:4]}, ValueError, r"weight must be of shape \[8\], got float32 of shape \[4\]"),
    ({"weight": W.half()}, TypeError, r"weight must be float32 as x is, or float32, got float16 of shape \[8\]"),
    ({"weight": W.to("meta")}, ValueError, r"weight must be on cpu as x is, got meta"),
    ({"residual": 1}, TypeError, r"residual must be a tensor, got 1 \(int\)"),
    ({"residual": X[:, :2]}, ValueError, r"residual must be of shape \[2, 3, 8\], got float32 of shape \[2, 2, 8\]"),
    ({"residual": X.double()}, TypeError, r"residual must be float32 as x is, got float64 of shape \[2, 3, 8\]"),
    ({"residual": X.to("meta")}, ValueError, r"residual must be on cpu as x is, got meta"),
    ({"eps": float("nan")}, ValueError, r"eps must be finite, got nan"),
    ({"eps": -0.5}, ValueError, r"eps must not be negative, got -0.5"),
    ({"eps": "small"}, TypeError, r"eps must be a number, got 'small' \(str\)"),
]


@pytest.mark.parametrize(("changed", "error", "message"), BAD_RMS_NORM, ids=[m for _, _, m in BAD_RMS_NORM])
def test_add_residual_rms_norm(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^add_residual_rms_norm: {message}"):
        ops.add_residual_rms_norm(**{"x": X, "residual": X, "weight": W, **changed})


BAD_RMS_NORM_GELU: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": None}, TypeError, r"x must be a tensor, got None \(NoneType\)"),
    ({"x": torch.tensor(1.0)}, ValueError, r"x must be of shape \[..., width\], got float32 of shape \[\]"),
    ({"x": X.long()}, TypeError, r"x must be float16, bfloat16, float32 or float64, got int64 of shape \[2, 3, 8\]"),
    ({"scale": "root"}, TypeError, r"scale must be a number, got 'root' \(str\)"),
    ({"scale": float("inf")}, ValueError, r"scale must be from -1e10 to 1e10, got inf"),
    ({"scale": -2e10}, ValueError, r"scale must be from -1e10 to 1e10, got -2e\+10"),
    ({"eps": float("inf")}, ValueError, r"eps must be finite, got inf"),
    ({"eps": -1.0}, ValueError, r"eps must not be negative, got -1"),
    ({"approximate": "fast"}, ValueError, r"approximate must be \"none\" or \"tanh\", got 'fast'"),
    ({"approximate": 3}, TypeError, r"approximate must be a string, got 3 \(int\)"),
]


@pytest.mark.parametrize(("changed", "error", "message"), BAD_RMS_NORM_GELU, ids=[m for _, _, m in BAD_RMS_NORM_GELU])
def test_rms_norm_gelu(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^rms_norm_gelu: {message}"):
        ops.rms_norm_gelu(**{"x": X, **changed})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    (
        ((X.int(), None), TypeError, r"x must be float16"),
        ((X, W[:3]), ValueError, r"bias must be of shape \[8\], got float32 of shape \[3\]"),
        ((torch.tensor(1.0), W), ValueError, r"bias must be of shape"),
        ((X, W.half()), TypeError, r"bias must be float32 as x is, or float32, got float16"),
        ((X, None, "fast"), ValueError, r"approximate must be \"none\" or \"tanh\", got 'fast'"),
        ((X, W.to("meta")), ValueError, r"bias must be on cpu as x is, got meta"),
        ((None, None), TypeError, r"x must be a tensor, got None"),
        ((X, 1.0), TypeError, r"bias must be a tensor, got 1.0 \(float\)"),
        ((X, W, 3), TypeError, r"approximate must be a string, got 3 \(int\)"),
    ),
)
def test_bias_gelu(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^bias_gelu: {message}"):
        ops.bias_gelu(*arguments)


def test_bias_gelu_takes_a_number() -> None:
    x = torch.tensor(0.5, requires_grad=True)
    out = ops.bias_gelu(x, None)
    assert out.shape == () and torch.equal(out, torch.nn.functional.gelu(x))
    out.backward()
    assert x.grad is not None and x.grad.shape == ()


STATISTICS = torch.zeros(6)
BAD_BACKWARD: list[tuple[str, dict[str, Any], str]] = [
    ("layer_norm", {"sum": X.int()}, r"sum must be float16, bfloat16, float32 or float64, got int32"),
    ("layer_norm", {"sum": torch.tensor(1.0)}, r"sum must be of shape \[..., width\], got float32 of shape \[\]"),
    ("layer_norm", {"dout": X[0]}, r"dout must be float32 of shape \[2, 3, 8\] as sum is, got .* \[3, 8\]"),
    ("layer_norm", {"dsum": X.half()}, r"dsum must be float32 of shape \[2, 3, 8\] as sum is, got float16"),
    ("layer_norm", {"weight": W[:4]}, r"weight must be of shape \[8\], got float32 of shape \[4\]"),
    ("layer_norm", {"weight": W.half()}, r"weight must be float32 as sum is, or float32, got float16"),
    ("layer_norm", {"mean": STATISTICS[:5]}, r"mean must be float32 of shape \[6\], got float32 of shape \[5\]"),
    ("layer_norm", {"rstd": STATISTICS.double()}, r"rstd must be float32 of shape \[6\], got float64"),
    ("rms_norm", {"sum": torch.tensor(1.0)}, r"sum must be of shape \[..., width\], got float32 of shape \[\]"),
    ("rms_norm", {"dout": X[0]}, r"dout must be float32 of shape \[2, 3, 8\] as sum is, got .* \[3, 8\]"),
    ("rms_norm", {"dsum": X.half()}, r"dsum must be float32 of shape \[2, 3, 8\] as sum is, got float16"),
    ("rms_norm", {"weight": W.half()}, r"weight must be float32 as sum is, or float32, got float16"),
    ("rms_norm", {"rstd": STATISTICS[:5]}, r"rstd must be float32 of shape \[6\], got float32 of shape \[5\]"),
    ("rms_norm_gelu", {"dout": X.half()}, r"dout must be float32 of shape \[2, 3, 8\] as x is, got float16"),
    ("rms_norm_gelu", {"x": X.int()}, r"x must be float16, bfloat16, float32 or float64, got int32"),
    ("rms_norm_gelu", {"scale": float("nan")}, r"scale must be from -1e10 to 1e10, got nan"),
    ("gelu", {"x": X.int()}, r"x must be float16, bfloat16, float32 or float64, got int32"),
    ("gelu", {"dout": X.half()}, r"dout must be float32 of shape \[2, 3, 8\] as x is, got float16"),
    ("gelu", {"bias": W[:3]}, r"bias must be of shape \[8\], got float32 of shape \[3\]"),
    ("gelu", {"bias": W.half()}, r"bias must be float32 as x is, or float32, got float16"),
    ("gelu", {"approximate": "fast"}, r"approximate must be \"none\" or \"tanh\", got 'fast'"),
]


@pytest.mark.parametrize(("name", "changed", "message"), BAD_BACKWARD, ids=[f"{n}: {m}" for n, _, m in BAD_BACKWARD])
def test_backward_of_the_encoder_called_directly(name: str, changed: dict[str, Any], message: str) -> None:
    op, arguments = {
        "layer_norm": (
            "add_bias_residual_layer_norm_backward",
            {"dout": X, "dsum": X, "sum": X, "weight": W, "mean": STATISTICS, "rstd": STATISTICS},
        ),
        "rms_norm": (
            "add_residual_rms_norm_backward",
            {"dout": X, "dsum": X, "sum": X, "weight": W, "rstd": STATISTICS},
        ),
        "rms_norm_gelu": ("rms_norm_gelu_backward", {"dout": X, "x": X}),
        "gelu": ("bias_gelu_backward", {"dout": X, "x": X, "bias": W}),
    }[name]
    with pytest.raises(RuntimeError, match=f"^{op}: {message}"):
        getattr(torch.ops.warpform, op)(**{**arguments, **changed})


INDICES, RANKS = torch.arange(6), torch.arange(6, dtype=INT).view(2, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    (
        ((X.tolist(), INDICES, RANKS), TypeError, "x must be a tensor"),
        (
            (X[:1], INDICES, RANKS),
            ValueError,
            r"x must be of shape \[2, 3, '...'\] as the mask was, got float32 of shape \[1, 3, 8\]",
        ),
        ((X[0, 0], INDICES, RANKS), ValueError, r"x must be of shape"),
        ((X, INDICES.int(), RANKS), ValueError, r"indices must be int64 of shape \[total\], got int32"),
        ((X, INDICES, RANKS.long()), ValueError, r"ranks must be int32 of shape \[batch, seqlen\], got int64"),
        ((X, INDICES, RANKS.to("meta")), ValueError, r"ranks must be on cpu as x is, got meta"),
        ((X, INDICES.to("meta"), RANKS), ValueError, r"indices must be on cpu as x is, got meta"),
        (
            (X, INDICES[None], RANKS),
            ValueError,
            r"indices must be int64 of shape \[total\], got int64 of shape \[1, 6\]",
        ),
        (
            (X, INDICES, RANKS[0]),
            ValueError,
            r"ranks must be int32 of shape \[batch, seqlen\], got int32 of shape \[3\]",
        ),
        ((X, INDICES, None), TypeError, "ranks must be a tensor, got None"),
    ),
)
def test_pack(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^pack: {message}"):
        ops.pack(*arguments)


def test_unpack() -> None:
    with pytest.raises(ValueError, match=r"^unpack: t must be of shape \[6, '...'\], the packed rows, got .* \[5, 8\]"):
        ops.unpack(torch.randn(5, 8), INDICES, RANKS)
    with pytest.raises(ValueError, match="^unpack: ranks must be on cpu as t is, got meta"):
        ops.unpack(torch.randn(6, 8), INDICES, RANKS.to("meta"))


@pytest.mark.parametrize(
    "dtype", (torch.bool, torch.uint16, torch.uint64, torch.complex64, torch.float8_e5m2, torch.float8_e8m0fnu), ids=str
)
def test_pack_takes_any_dtype_and_layout(dtype: torch.dtype) -> None:
    x = torch.arange(6).view(2, 3, 1).to(dtype)
    ranks, indices = RANKS.t().contiguous().t(), torch.arange(12)[::2] // 2
    packed = ops.pack(x, indices, ranks)
    assert packed.dtype == dtype
    wide = torch.complex128 if dtype.is_complex else torch.float64
    assert torch.equal(packed.to(wide), x.view(6, 1).to(wide))
    assert torch.equal(ops.unpack(packed, indices, ranks).to(wide), x.to(wide))


@pytest.mark.parametrize("op", ("pack", "unpack"))
def test_indices_out_of_range_read_nothing(op: str) -> None:
    indices = torch.tensor([0, 6, -5, 1 << 40, 5])
    ranks = torch.tensor([[0, 5, -7], [1 << 30, 4, -1]], dtype=INT)
    x = X if op == "pack" else torch.randn(5, 8)
    out = getattr(ops, op)(x, indices, ranks).flatten(0, -2)
    assert [row for row in range(len(out)) if out[row].any()] == [0, 4]


@pytest.mark.parametrize(
    ("mask", "capacity", "error", "message"),
    (
        (torch.ones(3), 1, ValueError, r"mask must be of shape \[batch, seqlen\], got float32 of shape \[3\]"),
        (torch.ones(3, 2), 1, TypeError, r"mask must be bool or integer, got float32 of shape \[3, 2\]"),
        (torch.ones(3, 2).int(), -1, ValueError, r"capacity must not be negative, got -1"),
        (torch.ones(3, 2).int(), 1.0, TypeError, r"capacity must be an int"),
        ([[1]], 1, TypeError, r"mask must be a tensor"),
        (None, 1, TypeError, r"mask must be a tensor, got None"),
        (torch.ones(3, 2).cfloat(), 1, TypeError, r"mask must be bool or integer, got complex64 of shape \[3, 2\]"),
        (torch.ones(3, 2).bool(), 1 << 31, ValueError, r"mask and capacity must count at most 2\^31 - 1 tokens"),
    ),
)
def test_packing_plan(mask: Any, capacity: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^packing_plan: {message}"):
        ops.packing_plan(mask, capacity)


def _away_from_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reference says why it runs, as it does on a GPU. On a CPU it is no surprise."""
    monkeypatch.setattr(_register, "_on_cpu", lambda args: False)


def test_reference_op_is_silent_on_a_cpu(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    monkeypatch.setenv("WARPFORM_STRICT", "1")
    torch.ops.warpform.bias_gelu_reference("no kernel on a CPU", X, W)
    assert not recwarn.list


def test_reference_op_warns_once_for_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    op = torch.ops.warpform.bias_gelu_reference
    with monkeypatch.context() as patch:
        patch.setenv("WARPFORM_BACKEND", "reference")
        expected = ops.bias_gelu(X, W)
    _away_from_cpus(monkeypatch)
    with pytest.warns(
        UserWarning, match="bias_gelu: the PyTorch reference runs instead of a kernel: no kernel for this test"
    ):
        assert torch.equal(op("no kernel for this test", X, W), expected)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        op("no kernel for this test", X, W)
        op("WARPFORM_BACKEND=reference", X, W)
    with pytest.warns(UserWarning, match="another reason"):
        op("another reason", X, W)
    monkeypatch.setenv("WARPFORM_STRICT", "1")
    with pytest.raises(RuntimeError, match=r"bias_gelu: no kernel runs this \(another reason\), and WARPFORM_STRICT=1"):
        op("another reason", X, W)
    assert torch.equal(op("WARPFORM_BACKEND=reference", X, W), expected)


def test_every_op_has_a_reference_op(monkeypatch: pytest.MonkeyPatch) -> None:
    library = torch.ops.warpform
    for name in (
        "packing_plan",
        "pack",
        "unpack",
        "varlen_attention",
        "varlen_attention_backward",
        "disentangled_attention",
        "disentangled_attention_backward",
        "window_attention",
        "window_attention_backward",
        "bias_gelu",
        "add_bias_residual_layer_norm",
        "add_bias_residual_layer_norm_backward",
        "bias_gelu_backward",
        "add_residual_rms_norm",
        "add_residual_rms_norm_backward",
        "rms_norm_gelu",
        "rms_norm_gelu_backward",
    ):
        op, reference = getattr(library, name).default._schema, getattr(library, f"{name}_reference").default._schema
        assert [a.name for a in reference.arguments] == ["reason", *(a.name for a in op.arguments)]
    monkeypatch.setenv("WARPFORM_BACKEND", "reference")
    _away_from_cpus(monkeypatch)
    with pytest.warns(UserWarning, match="varlen_attention: .* for the sake of it"):
        out, _ = library.varlen_attention_reference("for the sake of it", Q, Q, Q, CU, CU, 4, 4, causal=True)
    assert torch.equal(out, ops.varlen_attention(Q, Q, Q, CU, CU, 4, 4, causal=True))


def test_log(monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("warpform")
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "level", logging.DEBUG)
    ops.bias_gelu(X, W)
    assert not messages
    monkeypatch.setenv("WARPFORM_LOG", "debug")
    ops.varlen_attention(Q, Q, Q, CU, CU, 4, 4, causal=True)
    ops.pack(X, INDICES, RANKS)
    assert "varlen_attention(q=float32[7, 2, 8]@cpu" in messages[0] and "causal=True" in messages[0]
    assert "pack(x=float32[2, 3, 8]@cpu" in messages[1]


def test_positions_that_do_not_increase(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(5, 1, 8)
    arguments = (q, q, q, torch.randn(4, 1, 8), None, torch.tensor([0, 3, 5], dtype=torch.int32), 3)
    monkeypatch.setenv("WARPFORM_VALIDATE", "1")
    ops.disentangled_attention(*arguments, positions=torch.tensor([1, 4, 6, 0, 2]))
    with pytest.raises(ValueError, match="positions must increase within a sequence, got 4 and then 4 at row 2"):
        ops.disentangled_attention(*arguments, positions=torch.tensor([1, 4, 4, 0, 2]))
