"""GPUs and drivers on which the kernels cannot run: every op goes to its reference, with a reason that says what to do.

In the emulator the way to the reference is an error that holds the reason.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from warpform import _sources

OLD_GPU = "this GPU has compute capability 7.5, and the kernels were built for 8.0 and later"


def _calls(simt: Any) -> dict[str, tuple[Any, ...]]:
    """The smallest arguments of every op that a kernel takes."""
    half = torch.float16
    q = torch.randn(5, 2, 16, dtype=half)
    lse = torch.zeros(2, 5)
    cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32)
    calls: dict[str, tuple[Any, ...]] = {
        "varlen_attention": (q, q, q, cu_seqlens, cu_seqlens, 3, 3),
        "varlen_attention_backward": (q, None, q, q, q, q, lse, cu_seqlens, cu_seqlens, 3, 3),
        "disentangled_attention": (q, q, q, None, None, cu_seqlens, 3),
        "disentangled_attention_backward": (q, q, q, q, None, None, q, lse, cu_seqlens, 3),
        "attention_step": (q[None], q[None], q[None]),
        "attention_step_backward": (q[None], lse[None], q[None], q[None], q[None], lse[None]),
    }

    indices, ranks = torch.arange(6), torch.arange(6, dtype=torch.int32).view(2, 3)
    x, vector, rows = torch.randn(6, 8), torch.ones(8), torch.ones(6)
    calls |= {
        "packing_plan": (torch.ones(2, 3, dtype=torch.bool), 6),
        "pack": (x.view(2, 3, 8), indices, ranks),
        "unpack": (x, indices, ranks),
        "add_bias_residual_layer_norm": (x, None, None, vector, vector),
        "add_bias_residual_layer_norm_backward": (x, None, x, vector, rows, rows),
        "add_residual_rms_norm": (x, None, vector),
        "add_residual_rms_norm_backward": (x, None, x, vector, rows),
        "rms_norm_gelu": (x,),
        "rms_norm_gelu_backward": (x, x),
        "bias_gelu": (x, vector),
        "bias_gelu_backward": (x, x, vector),
    }

    qkv, out = torch.randn(1, 4, 4, 3, 2, 16, dtype=half), torch.randn(1, 4, 4, 32, dtype=half)
    calls |= {
        "window_attention": (qkv, None, None, None, [2, 2], [0, 0]),
        "window_attention_backward": (out, qkv, None, None, None, out, torch.empty(0), [2, 2], [0, 0]),
    }

    x, w = torch.randn(1, 2, 2, 8), torch.randn(4, 4)
    calls |= {
        "window_mix": (x, w, None, None, None, None, [2, 2]),
        "window_mix_backward": (x, x, w, None, None, None, None, torch.empty(0), torch.empty(0), [2, 2]),
    }

    x, w, w_up = torch.randn(4, 16, dtype=half), torch.randn(2, 8, 8, dtype=half), torch.randn(2, 16, 8, dtype=half)
    calls |= {
        "blockdiag_multiply": (x, w),
        "blockdiag_multiply_backward": (x, x, w, False),
        "monarch_multiply": (x, w, w),
        "monarch_multiply_backward": (x, x, w, w),
        "blockdiag_glu": (x, w_up, w),
        "blockdiag_glu_backward": (x, x, w_up, w, False),
    }

    u, spectrum = torch.randn(1, 2, 8, dtype=half), torch.randn(2, 257, 2)
    projected, taps = torch.randn(1, 8, 6), torch.randn(6, 3)
    calls |= {
        "spectral_conv": (u, spectrum),
        "spectral_conv_backward": (u, u, spectrum, None, None, None),
        "short_conv_gate": (projected, taps),
        "short_conv_gate_backward": (torch.randn(1, 2, 8), torch.randn(1, 2, 8), projected, taps, None),
    }

    grid, eight, square, two = torch.randn(2, 3, 4, 8), torch.ones(8), torch.randn(8, 3, 3), torch.ones(2)
    calls |= {
        "pool_mixer": (grid, eight),
        "pool_mixer_backward": (grid, grid, eight, None, two, two),
        "depthwise_conv2d": (grid, square),
        "depthwise_conv2d_backward": (grid, grid, square, None),
    }

    mask = torch.tensor([1, 3, 2, 1])
    plan = (mask, *simt.routing_plan(mask, None, 2, 1, 128), None, 2, 1)
    gates = torch.ones(4, 2)
    calls |= {
        "routing_mask": (torch.tensor([[0, 1], [1, 1]]), 2, 0),
        "routing_plan": (mask, None, 2, 1, 128),
        "hidden_gather_linear": (x, w_up[0].view(8, 16), None, None, *plan),
        "hidden_gather_linear_backward": (x[:, :8], x, w_up[0].view(8, 16), gates, *plan),
        "hidden_scatter_linear": (x[:, :8], w_up[0], None, None, False, *plan),
        "hidden_scatter_linear_backward": (x, x, w_up[0], gates, *plan),
        "hidden_weight_grad": (x, x[:, :8], None, False, *plan),
    }
    return calls


def _ops() -> list[str]:
    """Every op of the emulator's library that has a kernel."""
    registered = torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
    return sorted(name.split("::")[1] for name in registered if name.startswith("warpform_simt::"))


@pytest.fixture
def claim(simt: Any) -> Iterator[Callable[..., None]]:
    """What the machine says about itself, for one test."""
    yield simt.claim
    simt.claim()


def test_every_op_goes_to_its_reference(simt: Any, claim: Callable[..., None], monkeypatch: Any) -> None:
    monkeypatch.delenv("WARPFORM_BACKEND", raising=False)
    torch.manual_seed(0)
    calls = _calls(simt)
    assert sorted(calls) == _ops()
    for name, arguments in calls.items():
        op = getattr(simt, name)
        claim()
        op(*arguments)  # a kernel runs
        claim(capability=75)
        with pytest.raises(RuntimeError) as caught:
            op(*arguments)
        assert str(caught.value) == f"{name}: no kernel: {OLD_GPU}"
        claim()
        monkeypatch.setenv("WARPFORM_BACKEND", "reference")
        with pytest.raises(RuntimeError) as caught:
            op(*arguments)
        assert str(caught.value) == f"{name}: no kernel: WARPFORM_BACKEND=reference"
        monkeypatch.delenv("WARPFORM_BACKEND")


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"capability": 75}, OLD_GPU),
        (
            {"capability": 61, "code": "none"},
            "this GPU has compute capability 6.1, and the kernels were built for 8.0 and",
        ),
        ({"capability": 80, "code": "none"}, "this GPU has compute capability 8.0, and the kernels were built for "),
        ({"capability": 103, "code": "none"}, ": build warpform with WARPFORM_CUDA_ARCHS=103"),
        (
            {"driver": 12040, "code": "unknown", "capability": 0},  # nothing else can be asked
            "the driver serves CUDA 12.4, and these kernels need 13.0: update the driver to 580 or later, or build "
            "warpform with CUDA 12.4",
        ),
        (
            {"capability": 120, "code": "unreadable"},
            "which serves CUDA 13.0, cannot compile the kernels for it from PTX",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_reasons(simt: Any, claim: Callable[..., None], facts: dict[str, Any], reason: str) -> None:
    claim(**facts)
    with pytest.raises(RuntimeError) as caught:
        simt.bias_gelu(torch.randn(2, 8), None)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    "facts",
    [
        {"driver": 13020},  # newer drivers serve older runtimes
        {"driver": 14000},
        {"capability": 80},
        {"capability": 120},
        {"code": "unknown"},  # what asking met is left to the launch, which meets it again
    ],
    ids=str,
)
def test_usable(simt: Any, claim: Callable[..., None], facts: dict[str, Any]) -> None:
    claim(**facts)
    simt.bias_gelu(torch.randn(2, 8), None)


@pytest.mark.parametrize(
    ("facts", "setting", "reason"),
    [
        ({}, "", ""),
        ({}, "1", ""),
        ({}, "0", "WARPFORM_HOPPER=0"),
        ({"capability": 80}, "", "the GPU's compute capability is not 9.0"),
        ({"capability": 100}, "", "the GPU's compute capability is not 9.0"),
        ({"capability": 75}, "", OLD_GPU),
        ({"tensor_maps": False}, "", "the driver has no cuTensorMapEncodeTiled, with which kernels for Hopper "),
    ],
    ids=str,
)
def test_why_kernels_for_hopper_do_not_run(simt, claim, monkeypatch, facts, setting, reason) -> None:
    claim(**facts)
    monkeypatch.setenv("WARPFORM_HOPPER", setting)
    found = simt._hopper_kernels_missing(-1)
    assert found.startswith(reason) and bool(found) is bool(reason)
    if facts.get("capability", 90) == 90:
        monkeypatch.setenv("WARPFORM_BACKEND", "reference")
        assert simt._hopper_kernels_missing(-1) == "WARPFORM_BACKEND=reference"


def test_facts_of_the_build(simt: Any) -> None:
    info = json.loads(simt._build_info())
    assert info["cuda_runtime"] == "13.0" and info["hopper"] == "90a"
    csrc = Path(__file__).parents[2] / "csrc"
    if csrc.is_dir():
        assert info["sources"] == _sources.sources_hash(csrc), "built from other sources; run make build"
