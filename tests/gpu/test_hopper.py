"""The kernels for compute capability 9.0 run on such a GPU, in every thread, and never where they are switched off.

Plans say what is chosen; whether the driver described the tensors, and did so in a thread that had no context yet, only
the GPU's own record of what ran can say.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import warpform
from warpform.ops import RoutingPlan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
        reason="needs wgmma: an H100 or H200",
    ),
]


def _half(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def _attention(head_dim: int) -> Callable[[], Any]:
    q, k, v = (_half(4096, 2048 // head_dim, head_dim) for _ in range(3))
    offsets = torch.tensor([0, 2048, 4096], dtype=torch.int32, device="cuda")
    return lambda: warpform.ops.varlen_attention(q, k, v, offsets, offsets, 2048, 2048, causal=True)


def _routed(layer: Callable[..., Any]) -> Callable[[], Any]:
    x, w = _half(4096, 2048), _half(2048, 2048)
    plan = RoutingPlan.from_topk(torch.zeros(4096, 1, dtype=torch.int64, device="cuda"), num_groups=16, num_shared=6)
    gates = torch.rand(4096, 16, device="cuda")
    return lambda: layer(x, w, plan, gates)


def _product() -> Callable[[], Any]:
    x, w = _half(8192, 4096), _half(4, 1024, 1024)
    return lambda: warpform.ops.blockdiag_multiply(x, w)


def _monarch() -> Callable[[], Any]:
    x, w1, w2 = _half(8192, 768), _half(4, 192, 192), _half(4, 768, 192)
    return lambda: warpform.ops.monarch_multiply(x, w1, w2)


CALLS: dict[str, Callable[[], Callable[[], Any]]] = {
    "attention_64": lambda: _attention(64),
    "attention_128": lambda: _attention(128),
    "blockdiag_multiply": _product,
    "monarch_multiply": _monarch,
    "hidden_gather_linear": lambda: _routed(warpform.ops.hidden_gather_linear),
    "hidden_scatter_linear": lambda: _routed(warpform.ops.hidden_scatter_linear),
}


def _ran(call: Callable[[], Any]) -> bool:
    """Whether a kernel for compute capability 9.0 was among those that the GPU ran."""
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        call()
        torch.cuda.synchronize()
    return any("_hopper" in event.key for event in recorded.key_averages())


@pytest.mark.parametrize("name", CALLS)
def test_they_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = CALLS[name]()
    monkeypatch.delenv("WARPFORM_HOPPER", raising=False)
    assert _ran(call)
    monkeypatch.setenv("WARPFORM_HOPPER", "0")
    assert not _ran(call)


def test_a_thread_that_never_called_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no context of the driver's, which a tensor map may need; the results show which kernel ran."""
    call = CALLS["attention_128"]()
    monkeypatch.setenv("WARPFORM_HOPPER", "0")
    other = call()
    monkeypatch.delenv("WARPFORM_HOPPER")
    here = call()
    assert not torch.equal(here, other)  # last bits differ
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    assert torch.equal(found[0], here)
