"""attention_step's kernels in the emulator: what is asked of them alone."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.backends import AD102_SHARED, H200_SHARED
from helpers.cases import misaligned
from helpers.ring import StepCase, check_attention_step, step_inputs

# Several blocks of queries and of keys, with tails, in both buckets of head dimensions.
LONG_CASES = tuple(
    StepCase(f"d{head_dim}_{name}", (lq,) * batch, (lk,) * batch, head_dim=head_dim, **options)  # type: ignore[arg-type]
    for head_dim in (64, 72, 128)
    for name, lq, lk, batch, options in (
        ("plain", 145, 209, 1, {}),
        ("causal_gqa", 145, 145, 2, {"causal": True, "heads": 2, "heads_k": 1, "q_offset": 20}),
        ("striped", 270, 270, 1, {"causal": True, "q_stride": 8, "k_stride": 8, "k_offset": 5, "heads": 1}),
        ("window", 150, 300, 1, {"window": (90, 20), "q_offset": 100, "sliced": True, "heads": 1}),
        ("uneven_strides", 140, 300, 1, {"causal": True, "q_stride": 5, "k_stride": 3, "q_offset": 64, "heads": 1}),
    )
)


@pytest.mark.sampled
@pytest.mark.parametrize("case", LONG_CASES, ids=str)
def test_long(simt: Any, case: StepCase) -> None:
    simt.configure(len(case.name), 1, H200_SHARED)
    check_attention_step(simt, case, torch.bfloat16)


@pytest.mark.parametrize("case", [c for c in LONG_CASES if c.name.endswith(("gqa", "window"))], ids=str)
def test_with_little_shared_memory(simt: Any, case: StepCase) -> None:
    """99 KiB a block, as on sm_86 and sm_89: the backward at 128 columns takes the small tile."""
    simt.configure(3, 1, AD102_SHARED)
    check_attention_step(simt, case, torch.float16)


def test_sums_of_dq_follow_the_order_of_blocks(simt: Any) -> None:
    """The atomics of dQ add up the blocks of keys as they come, which deterministic=True is there to avoid."""
    x = step_inputs(StepCase("", (70,), (700,), heads=2, heads_k=1, head_dim=64), torch.float16)
    out, lse = simt.attention_step(x.q, x.k, x.v, x.out, x.lse, **x.options)
    delta = (x.dout * out).sum(-1).transpose(1, 2)
    runs = []
    for seed in (1, 2, 3):
        simt.configure(seed)
        runs.append(simt.attention_step_backward(x.dout, delta, x.q, x.k, x.v, lse, x.dq, x.dk, x.dv, **x.options))
    for i, name in enumerate(("dq", "dk", "dv")):
        assert all(torch.equal(runs[0][i], run[i]) for run in runs[1:]) == (name != "dq"), name


def test_positions_further_apart_than_the_kernels_count(simt: Any) -> None:
    stride = (2**29 - 1) // 9 + 1
    x = step_inputs(
        StepCase("", (10,), (10,), head_dim=8, causal=True, q_stride=stride, k_stride=stride), torch.float16
    )
    with pytest.raises(RuntimeError, match="no kernel: positions of one block more than 2.29 apart"):
        simt.attention_step(x.q, x.k, x.v, x.out, x.lse, **x.options)


# ---- what comes in ----


@pytest.mark.parametrize("offsets", ([0, 1000, 20], [5, -7, 40], [0, 30, 12], [2**31 - 1, -(2**31), 7], [3, 9, 20]))
def test_bad_offsets_stay_in_bounds(simt: Any, offsets: list[int]) -> None:
    """What cu_seqlens holds cannot be checked without waiting for the GPU; the emulator reports accesses outside."""
    bad = torch.tensor(offsets, dtype=torch.int32)
    for names in (("cu_seqlens_q",), ("cu_seqlens_k",), ("cu_seqlens_q", "cu_seqlens_k")):
        x = step_inputs(StepCase("", (20, 20), (20, 20), varlen=True, causal=True), torch.float16)
        x.options.update(dict.fromkeys(names, bad))
        _, lse = simt.attention_step(x.q, x.k, x.v, x.out, x.lse, **x.options)
        for deterministic in (False, True):
            simt.attention_step_backward(
                x.dout, lse, x.q, x.k, x.v, lse, x.dq, x.dk, x.dv, **x.options, deterministic=deterministic
            )


def test_offsets_may_lie_apart(simt: Any) -> None:
    x = step_inputs(StepCase("", (20, 7), (12, 20), varlen=True, causal=True), torch.float16)
    apart = {name: x.options[name].repeat_interleave(2)[::2] for name in ("cu_seqlens_q", "cu_seqlens_k")}
    assert not any(t.is_contiguous() for t in apart.values())
    results = []
    for options in (x.options, x.options | apart):
        out, lse = simt.attention_step(x.q, x.k, x.v, x.out, x.lse, **options)
        gradients = simt.attention_step_backward(
            x.dout, lse, x.q, x.k, x.v, lse, x.dq, x.dk, x.dv, **options, deterministic=True
        )
        results.append((out, lse, *gradients))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_kernel_table_lists_what_runs(simt: Any) -> None:
    rows = [row for row in json.loads(simt._kernel_table()) if row["op"].startswith("attention_step")]
    assert {(row["op"], row["dtype"]) for row in rows} == {
        (op, dtype) for op in ("attention_step", "attention_step_backward") for dtype in ("float16", "bfloat16")
    }
    for row in rows:
        step, most = row["head_dim"]["multiple_of"], row["head_dim"]["max"]
        for head_dim in range(step, most + 1, step):
            case = StepCase("", (5,), (6,), heads=1, head_dim=head_dim)
            check_attention_step(simt, case, getattr(torch, row["dtype"]), backward=row["op"].endswith("backward"))


def _zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


NO_STATE = {"out": None, "lse": None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (NO_STATE | {"q": _zeros(1, 9, 2, 7), "k": _zeros(1, 8, 2, 7), "v": _zeros(1, 8, 2, 7)},
         "no kernel: head_dim is not a multiple of 8"),
        (NO_STATE | {"q": _zeros(1, 9, 2, 136), "k": _zeros(1, 8, 2, 136), "v": _zeros(1, 8, 2, 136)},
         "no kernel: head_dim is not a multiple of 8 up to 128"),
        ({"softmax_scale": -1.0}, "no kernel: softmax_scale is not a positive float32"),
        ({"q": _zeros(9, 2, 16)}, r"q must be of shape \[batch, length, heads, head_dim\] without cu_seqlens, got"),
        ({"k": _zeros(2, 8, 2, 16)}, "k and v must be of one shape .*, batch and head_dim as q's"),
        ({"k": _zeros(1, 8, 2, 16, dtype=torch.float16)}, "k must be bfloat16 as q is, got float16"),
        ({"v": _zeros(1, 8, 2, 24)}, "k and v must be of one shape"),
        ({"k": _zeros(1, 8, 3, 16), "v": _zeros(1, 8, 3, 16)}, "the 2 heads of q must be a multiple of .*, got 3"),
        ({"k_stride": 0}, "q_stride and k_stride must be at least 1, got 1 and 0"),
        ({"q_offset": 2**62}, "offsets must be within 2.62"),
        ({"window_size_left": -2}, r"window_size must be at least -1, which is unbounded, got \(-2, -1\)"),
        ({"cu_seqlens_q": torch.zeros(2, dtype=torch.int32)}, "must both be given, or neither"),
        ({"lse": None}, "out and lse must both be given, or neither"),
        ({"out": _zeros(1, 9, 2, 16)}, "out must be float32 for q in bfloat16, got bfloat16"),
        ({"lse": _zeros(1, 9, 2, dtype=torch.float32)}, r"lse must be of shape \[1, 2, 9\], got .* \[1, 9, 2\]"),
        ({"q": misaligned(_zeros(1, 9, 2, 16))}, r"q must be 16-byte aligned, .* call \.clone\(\)"),
        ({"k": _zeros(1, 8, 2, 16, 2)[..., 0]}, "the last dimension of k must be contiguous, got stride 2"),
        ({"v": _zeros(1, 8, 2, 17)[..., :16]}, "v must be 16-byte aligned"),
    ],
)  # fmt: skip
def test_bad_input(simt: Any, change: dict[str, Any], message: str) -> None:
    x = step_inputs(StepCase("", (9,), (8,)), torch.bfloat16)
    arguments = {"q": x.q, "k": x.k, "v": x.v, "out": x.out, "lse": x.lse, **x.options} | change
    with pytest.raises(RuntimeError, match=f"attention_step: .*{message}"):
        simt.attention_step(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dout": _zeros(1, 9, 2, 16, dtype=torch.float32)}, "dout must be bfloat16 as q is, got float32"),
        ({"delta": _zeros(1, 2, 8, dtype=torch.float32)}, r"delta must be of shape \[1, 2, 9\]"),
        ({"lse": _zeros(1, 2, 9, dtype=torch.float64)}, "lse must be float32"),
        ({"dq": _zeros(1, 9, 2, 16)}, "dq must be float32"),
        ({"dk": _zeros(1, 9, 2, 16, dtype=torch.float32)}, r"dk must be of shape \[1, 8, 2, 16\]"),
        ({"dv": _zeros(1, 8, 2, 24, dtype=torch.float32)}, r"dv must be of shape \[1, 8, 2, 16\]"),
        ({"q_stride": -1}, "q_stride and k_stride must be at least 1"),
    ],
)
def test_bad_input_of_the_backward(simt: Any, change: dict[str, Any], message: str) -> None:
    x = step_inputs(StepCase("", (9,), (8,)), torch.bfloat16)
    arguments = {
        "dout": x.dout, "delta": torch.zeros(1, 2, 9), "q": x.q, "k": x.k, "v": x.v, "lse": torch.zeros(1, 2, 9),
        "dq": x.dq, "dk": x.dk, "dv": x.dv, **x.options,
    } | change  # fmt: skip
    with pytest.raises(RuntimeError, match=f"attention_step_backward: .*{message}"):
        simt.attention_step_backward(**arguments)
