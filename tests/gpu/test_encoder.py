"""The encoder without attention on the GPU: long cases, and what only hardware shows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import warpform
from helpers import cases, checks, norm
from warpform import _library

pytestmark = pytest.mark.gpu

OPS: Any = torch.ops.warpform
by_dtype = pytest.mark.parametrize("dtype", cases.KERNEL_DTYPES, ids=lambda d: str(d).removeprefix("torch."))
by_form = pytest.mark.parametrize("approximate", ("none", "tanh"))


# ---- packing ----


@pytest.mark.huge(gigabytes=16)
def test_pack_more_elements_than_32_bits_count() -> None:
    batch, seqlen, width = 3000, 700, 1040
    mask = torch.rand(batch, seqlen, device="cuda") < 0.99
    p = warpform.Packing.from_mask(mask)
    x = torch.randn(batch, seqlen, 1, device="cuda").half().expand(batch, seqlen, width).contiguous()
    packed = OPS.pack(x, p.indices, p.ranks)
    assert packed.numel() > 2**31
    assert torch.equal(packed[-9:], x.flatten(0, 1)[p.indices[-9:]])
    assert torch.equal(OPS.unpack(packed, p.indices, p.ranks)[-1], x[-1] * mask[-1, :, None])


# ---- LayerNorm ----

# Enough rows that every block walks over several, for each shape of kernel.
LONG_LAYER_NORMS = tuple(
    cases.LayerNormCase(f"{rows}x{width}", (rows, width), wide_parameters=wide)
    for rows, width in ((20000, 24), (9001, 384), (9001, 333), (4099, 768), (2050, 3072), (700, 16384), (333, 16383))
    for wide in (False, True)
)


@by_dtype
@pytest.mark.parametrize("case", LONG_LAYER_NORMS, ids=str)
def test_long_layer_norm(case: cases.LayerNormCase, dtype: torch.dtype) -> None:
    checks.check_layer_norm(OPS, case, dtype, "cuda")


@by_dtype
@pytest.mark.parametrize("width", (333, 768, 3072, 16384))
def test_layer_norm_gradients_repeat_bit_for_bit(width: int, dtype: torch.dtype) -> None:
    x, dout = (cases.random(1500, width, dtype=dtype, device="cuda") for _ in range(2))
    weight = torch.ones(width, dtype=dtype, device="cuda")
    _, total, mean, rstd = OPS.add_bias_residual_layer_norm(x, None, None, weight, weight, return_sum=True)
    runs = [OPS.add_bias_residual_layer_norm_backward(dout, None, total, weight, mean, rstd) for _ in range(5)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.huge(gigabytes=26)
def test_layer_norm_of_more_elements_than_32_bits_count() -> None:
    rows, width = 2**31 // 1024 + 5, 1024
    x = torch.empty(rows, width, dtype=torch.float16, device="cuda").normal_()
    weight = torch.ones(width, dtype=torch.float16, device="cuda")
    out, _, mean, rstd = OPS.add_bias_residual_layer_norm(x, None, None, weight, weight)
    alone = OPS.add_bias_residual_layer_norm(x[-7:], None, None, weight, weight)
    assert torch.equal(out[-7:], alone[0]) and torch.equal(mean[-7:], alone[2])
    dx = OPS.add_bias_residual_layer_norm_backward(out, None, x, weight, mean, rstd)[0]
    alone = OPS.add_bias_residual_layer_norm_backward(out[-7:], None, x[-7:], weight, mean[-7:], rstd[-7:])
    assert torch.equal(dx[-7:], alone[0])


# ---- RMSNorm ----

LONG_ROWS = ((20000, 24), (9001, 384), (9001, 333), (4099, 768), (2050, 3072), (700, 16384), (333, 16383))


@by_dtype
@pytest.mark.parametrize("wide", (False, True))
@pytest.mark.parametrize("shape", LONG_ROWS, ids=str)
def test_long_rms_norm(shape: tuple[int, int], wide: bool, dtype: torch.dtype) -> None:
    norm.check_rms_norm(OPS, norm.RmsNormCase("", shape, wide_weight=wide), dtype, "cuda")


@by_dtype
@pytest.mark.parametrize("approximate", ("none", "tanh"))
@pytest.mark.parametrize("shape", LONG_ROWS, ids=str)
def test_long_rms_norm_gelu(shape: tuple[int, int], approximate: str, dtype: torch.dtype) -> None:
    norm.check_rms_norm_gelu(OPS, norm.RmsNormGeluCase("", shape, approximate=approximate), dtype, "cuda")


@by_dtype
@pytest.mark.parametrize("width", (333, 768, 3072, 16384))
def test_rms_norm_gradients_repeat_bit_for_bit(width: int, dtype: torch.dtype) -> None:
    x, dout = (cases.random(1500, width, dtype=dtype, device="cuda") for _ in range(2))
    weight = torch.ones(width, dtype=dtype, device="cuda")
    _, total, rstd = OPS.add_residual_rms_norm(x, None, weight, return_sum=True)
    runs = [OPS.add_residual_rms_norm_backward(dout, None, total, weight, rstd) for _ in range(5)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.huge(gigabytes=26)
def test_rms_norm_of_more_elements_than_32_bits_count() -> None:
    rows, width = 2**31 // 1024 + 5, 1024
    x = torch.empty(rows, width, dtype=torch.float16, device="cuda").normal_()
    weight = torch.ones(width, dtype=torch.float16, device="cuda")
    out, _, rstd = OPS.add_residual_rms_norm(x, None, weight)
    alone = OPS.add_residual_rms_norm(x[-7:], None, weight)
    assert torch.equal(out[-7:], alone[0]) and torch.equal(rstd[-7:], alone[2])
    dx = OPS.add_residual_rms_norm_backward(out, None, x, weight, rstd)[0]
    assert torch.equal(dx[-7:], OPS.add_residual_rms_norm_backward(out[-7:], None, x[-7:], weight, rstd[-7:])[0])
    del dx
    assert torch.equal(OPS.rms_norm_gelu(x)[-7:], OPS.rms_norm_gelu(x[-7:]))
    assert torch.equal(OPS.rms_norm_gelu_backward(out, x)[-7:], OPS.rms_norm_gelu_backward(out[-7:], x[-7:]))


# ---- GELU ----

LONG_GELUS = tuple(
    cases.GeluCase(f"{rows}x{width}{'-bias' * bias}", (rows, width), bias=bias, wide_bias=wide)
    for rows, width in ((50001, 5), (9001, 100), (4099, 3072), (333, 16383))
    for bias, wide in ((False, False), (True, False), (True, True))
)


@by_dtype
@by_form
@pytest.mark.parametrize("case", LONG_GELUS, ids=lambda case: f"{case}{'-wide' * case.wide_bias}")
def test_long_gelu(case: cases.GeluCase, approximate: str, dtype: torch.dtype) -> None:
    checks.check_gelu(OPS, case, approximate, dtype, "cuda")


@by_dtype
def test_gelu_gradients_repeat_bit_for_bit(dtype: torch.dtype) -> None:
    x, bias, dout = cases.gelu_inputs(cases.GeluCase("", (3001, 768)), dtype, "cuda")
    runs = [OPS.bias_gelu_backward(dout, x, bias) for _ in range(5)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.huge(gigabytes=20)
@pytest.mark.parametrize("with_bias", (False, True))
def test_gelu_of_more_elements_than_32_bits_count(with_bias: bool) -> None:
    rows, width = 2**31 // 3072 + 5, 3072
    x = torch.empty(rows, width, dtype=torch.float16, device="cuda").normal_()
    bias = torch.ones(width, dtype=torch.float16, device="cuda") if with_bias else None
    assert torch.equal(OPS.bias_gelu(x, bias)[-7:], OPS.bias_gelu(x[-7:], bias))
    assert torch.equal(OPS.bias_gelu_backward(x, x, bias)[0][-7:], OPS.bias_gelu_backward(x[-7:], x[-7:], bias)[0])


# ---- all of them ----


def test_every_configuration_of_the_table_has_a_kernel() -> None:
    """Under WARPFORM_STRICT an op that went to its reference would raise."""
    # Rows of other families hold other fields; some have no dtype.
    floating = ("add_bias_residual_layer_norm", "bias_gelu", "add_residual_rms_norm", "rms_norm_gelu")
    family = ("packing_plan", "pack", "unpack", *floating)
    table = [entry for entry in _library.kernel_table() if entry["op"].removesuffix("_backward") in family]
    seen = set()
    for entry in table:
        seen.add((entry["op"], entry["dtype"]))
        if entry["op"] == "packing_plan":
            OPS.packing_plan(torch.ones(2, 3, device="cuda").to(getattr(torch, entry["dtype"])), 6)
        elif entry["op"].startswith("add_bias_residual_layer_norm"):
            for parameters in entry["parameter_dtypes"]:
                x = torch.ones(2, entry["max_cols"], dtype=getattr(torch, entry["dtype"]), device="cuda")
                weight = torch.ones(entry["max_cols"], dtype=getattr(torch, parameters), device="cuda")
                _, total, mean, rstd = OPS.add_bias_residual_layer_norm(x, weight, x, weight, weight, return_sum=True)
                OPS.add_bias_residual_layer_norm_backward(x, x, total, weight, mean, rstd)
        elif entry["op"].startswith("add_residual_rms_norm"):
            for parameters in entry["parameter_dtypes"]:
                x = torch.ones(2, entry["max_cols"], dtype=getattr(torch, entry["dtype"]), device="cuda")
                weight = torch.ones(entry["max_cols"], dtype=getattr(torch, parameters), device="cuda")
                _, total, rstd = OPS.add_residual_rms_norm(x, x, weight, return_sum=True)
                OPS.add_residual_rms_norm_backward(x, x, total, weight, rstd)
        elif entry["op"].startswith("rms_norm_gelu"):
            x = torch.ones(2, entry["max_cols"], dtype=getattr(torch, entry["dtype"]), device="cuda")
            for approximate in entry["approximate"]:
                OPS.rms_norm_gelu(x, None, 0.0, approximate)
                OPS.rms_norm_gelu_backward(x, x, None, 0.0, approximate)
        elif entry["op"].startswith("bias_gelu"):
            x = torch.ones(2, 24, dtype=getattr(torch, entry["dtype"]), device="cuda")
            for parameters in entry["parameter_dtypes"]:
                bias = torch.ones(24, dtype=getattr(torch, parameters), device="cuda")
                for approximate in entry["approximate"]:
                    OPS.bias_gelu(x, bias, approximate)
                    OPS.bias_gelu_backward(x, x, bias, approximate)
    for name in (*floating, *(f"{op}_backward" for op in floating)):
        assert {(name, dtype) for dtype in ("float32", "float16", "bfloat16")} <= seen
    assert {("pack", "any"), ("unpack", "any"), ("packing_plan", "bool")} <= seen


def test_what_has_no_kernel_is_refused_under_strict() -> None:
    x = torch.randn(2, 8, dtype=torch.float64, device="cuda")
    weight = torch.ones(8, dtype=torch.float64, device="cuda")
    with pytest.raises(RuntimeError, match="float64"):
        OPS.add_bias_residual_layer_norm(x, None, None, weight, weight)
    with pytest.raises(RuntimeError, match="float64"):
        OPS.bias_gelu(x, None)
    with pytest.raises(RuntimeError, match="float64"):
        OPS.add_residual_rms_norm(x, None, weight)
    with pytest.raises(RuntimeError, match="float64"):
        OPS.rms_norm_gelu(x)
    wide, weight = torch.randn(2, 16385, device="cuda"), torch.ones(16385, device="cuda")
    with pytest.raises(RuntimeError, match="rows of 16385 elements"):
        OPS.add_bias_residual_layer_norm(wide, None, None, weight, weight)
    with pytest.raises(RuntimeError, match="rows of 16385 elements"):
        OPS.rms_norm_gelu(wide)


def test_tensors_of_two_devices_are_refused() -> None:
    x, weight = torch.randn(2, 8, device="cuda"), torch.ones(8)
    with pytest.raises(RuntimeError, match="weight must be on cuda:0 as x is, got cpu"):
        OPS.add_bias_residual_layer_norm(x, None, None, weight, weight)
    with pytest.raises(RuntimeError, match="bias must be on cuda:0 as x is, got cpu"):
        OPS.bias_gelu(x, weight)


def test_a_captured_graph_replays_all_ops() -> None:
    """Nothing is read back by the host, and workspaces live in the graph's pool."""
    batch, seqlen, width = 4, 50, 384
    mask = torch.rand(batch, seqlen, device="cuda") < 0.6
    x, dout = (torch.randn(batch, seqlen, width, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    weight, bias = torch.randn(2, width, dtype=torch.bfloat16, device="cuda")

    def run() -> list[torch.Tensor]:
        _, _, indices, _, ranks, _ = OPS.packing_plan(mask, batch * seqlen)
        packed, gradient = OPS.pack(x, indices, ranks), OPS.pack(dout, indices, ranks)
        out, total, mean, rstd = OPS.add_bias_residual_layer_norm(packed, bias, packed, weight, bias, return_sum=True)
        gradients = [*OPS.add_bias_residual_layer_norm_backward(gradient, None, total, weight, mean, rstd)]
        activated = OPS.bias_gelu(out, bias, "none")
        normal, total, rstd = OPS.add_residual_rms_norm(out, total, weight, return_sum=True)
        gradients += OPS.add_residual_rms_norm_backward(gradient, None, total, weight, rstd)
        gradients += [OPS.rms_norm_gelu(normal), OPS.rms_norm_gelu_backward(gradient, normal)]
        return [OPS.unpack(activated, indices, ranks), *gradients, *OPS.bias_gelu_backward(gradient, out, bias, "none")]

    with torch.inference_mode():
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        for _ in range(2):
            mask.copy_(torch.rand(batch, seqlen, device="cuda") < 0.5)
            x.normal_()
            graph.replay()
            assert all(torch.equal(a, b) for a, b in zip(captured, run(), strict=True))


def test_a_side_stream_is_used() -> None:
    """Kernels are queued behind the work of the current stream, not of the default one."""
    x = torch.randn(512, 768, device="cuda")
    weight = torch.ones(768, device="cuda")
    expected = OPS.bias_gelu(OPS.add_bias_residual_layer_norm(x, None, x, weight, weight)[0], weight)
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        out = OPS.bias_gelu(OPS.add_bias_residual_layer_norm(late, None, late, weight, weight)[0], weight)
    torch.cuda.synchronize()
    assert torch.equal(out, expected)
