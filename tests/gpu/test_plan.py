"""Plans on a GPU: they say what an SM takes, and leave kernels as they were."""

from __future__ import annotations

import pytest
import torch

from warpform import _direct

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(_direct.why_not() is not None, reason=f"there are no direct calls: {_direct.why_not()}"),
]


def test_a_plan_leaves_a_kernel_its_shared_memory() -> None:
    import warpform._C as module

    def arguments(width: int) -> tuple[torch.Tensor, ...]:
        def draw(*sizes: int) -> torch.Tensor:
            return torch.randn(*sizes, device="cuda", dtype=torch.bfloat16)

        return draw(20000, 4 * width), draw(4, 512, width), draw(4, width, 256)

    glu = torch.ops.warpform.blockdiag_glu
    large, small = arguments(256), arguments(64)
    expected = glu(*large)
    plan = module.launch_plan("blockdiag_glu", *small)
    assert plan["registers_counted"] and plan["shared_bytes"] > 48 * 1024
    assert torch.equal(glu(*large), expected)
    assert plan["shared_bytes"] < module.launch_plan("blockdiag_glu", *large)["shared_bytes"]


def test_supported_asks_the_gpu() -> None:
    import warpform._C as module

    assert module.supported("pack", None, "cuda:0") is None
    assert "no GPU 63" in module.supported("pack", None, "cuda:63")
