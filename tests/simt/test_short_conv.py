"""short_conv_gate and its backward: the CUDA kernels, run in the emulator."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from helpers import cases
from helpers import fft_conv as convolutions
from helpers.drawn import drawn
from helpers.fft_conv import ShortConvCase, ShortConvInputs, short_conv_inputs

by_dtype = pytest.mark.parametrize("dtype", cases.KERNEL_DTYPES, ids=lambda d: str(d).removeprefix("torch."))

# On one multiprocessor a block walks over many tiles and adds up over them; on many, every tile has its own.
FEW_SMS, MANY_SMS = 1, 1024


@by_dtype
@pytest.mark.parametrize("case", convolutions.SHORT_CONV_CASES, ids=str)
def test_cases(simt: Any, case: ShortConvCase, dtype: torch.dtype) -> None:
    simt._configure(len(case.name), FEW_SMS if len(case.name) % 2 else MANY_SMS)
    convolutions.check_short_conv_gate(simt, case, dtype)


# A tile is 64 times by 64 channels (float32: 32 by 32), 16 bytes 8 (4) of them.
EDGES = tuple(
    ShortConvCase(f"{seqlen}x{channels}", 2, seqlen, channels, taps=taps)
    for seqlen, channels, taps in (
        (63, 64, 3), (64, 8, 3), (65, 63, 3), (128, 65, 4), (72, 72, 2), (136, 4, 3), (129, 12, 4), (62, 130, 1)
    )
)  # fmt: skip


@by_dtype
@pytest.mark.parametrize("case", EDGES, ids=str)
def test_edges_of_tiles(simt: Any, case: ShortConvCase, dtype: torch.dtype) -> None:
    simt._configure(1, 2)
    convolutions.check_short_conv_gate(simt, case, dtype)


@drawn(
    30,
    case=convolutions.short_conv_cases(),
    dtype=st.sampled_from(cases.KERNEL_DTYPES),
    sm_count=st.sampled_from((FEW_SMS, 4, MANY_SMS)),
)
def test_drawn(simt: Any, case: ShortConvCase, dtype: torch.dtype, sm_count: int, seed: int) -> None:
    simt._configure(seed, sm_count)
    convolutions.check_short_conv_gate(simt, case, dtype)


def _call(simt: Any, x: ShortConvInputs) -> tuple[Tensor, ...]:
    """gated, gate, dx, dweight, dbias."""
    arguments = (x.x, x.weight, x.bias)
    return *simt.short_conv_gate(*arguments), *simt.short_conv_gate_backward(x.dgated, x.dgate, *arguments)


@by_dtype
def test_results_repeat_bit_for_bit(simt: Any, dtype: torch.dtype) -> None:
    """In any order of blocks and threads; with other blocks only sums over time may change."""
    x = short_conv_inputs(ShortConvCase("", 2, 140, 20), dtype)
    runs = {}
    for sm_count in (1, 3):
        for seed in (0, 5):
            simt._configure(seed, sm_count)
            runs[sm_count, seed] = _call(simt, x)
            assert all(torch.equal(a, b) for a, b in zip(runs[sm_count, seed], runs[sm_count, 0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(runs[1, 0][:3], runs[3, 0][:3], strict=True))


@by_dtype
@pytest.mark.parametrize("place", ("x", "dgated", "dgate"))
def test_misaligned_tensors(simt: Any, dtype: torch.dtype, place: str) -> None:
    """Wherever a tensor begins, the results are the same bits."""
    x = short_conv_inputs(ShortConvCase("", 1, 72, 16), dtype)
    expected = _call(simt, x)
    setattr(x, place, cases.misaligned(getattr(x, place)))
    assert all(torch.equal(a, b) for a, b in zip(_call(simt, x), expected, strict=True))


@by_dtype
@pytest.mark.parametrize("bad", (math.nan, math.inf))
def test_bad_values_stay_where_the_filter_ends(simt: Any, dtype: torch.dtype, bad: float) -> None:
    """One at t = 60 reaches the times 60 to 62 of its channel forward, and 58 to 62 backward."""
    x = short_conv_inputs(ShortConvCase("", 2, 70, 8), dtype)
    clean = _call(simt, x)
    for t in (60, 69):
        for part in range(3):
            x.x[0, t, part * 8 + 3] = bad
        dirty = _call(simt, x)
        for before, after in zip(clean[:2], dirty[:2], strict=True):
            hit = torch.zeros_like(before, dtype=torch.bool)
            hit[0, 3, t : t + 3] = True
            assert not after[0, 3, t].isfinite() and torch.equal(before[~hit], after[~hit])
        hit = torch.zeros_like(clean[2], dtype=torch.bool)
        hit[0, t - 2 : t + 3, 3::8] = True
        assert torch.equal(clean[2][~hit], dirty[2][~hit])
        assert torch.equal(clean[3].view(3, 8, 3)[:, :3], dirty[3].view(3, 8, 3)[:, :3])
        x.x[0, t, 3::8] = 0
        clean = _call(simt, x)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_an_overflow_behind_the_end_is_nobodys(simt: Any, dtype: torch.dtype) -> None:
    """The filter goes on for two times behind the sequence; what it would be there meets no gradient."""
    x = short_conv_inputs(ShortConvCase("", 1, 35, 8), dtype)
    x.weight[:] = torch.tensor([0.0, 2, 0])
    x.x[0, -1] = 3e38
    assert all(t.isfinite().all() for t in (*_call(simt, x)[:3], _call(simt, x)[4]))


def test_fewer_taps_leave_the_others_out(simt: Any) -> None:
    """A filter of two taps is one of four that begins with zeros, but for infinities: 0 times those is not 0."""
    x = short_conv_inputs(ShortConvCase("", 1, 40, 8, taps=2), torch.float32)
    short = _call(simt, x)
    long = ShortConvInputs(x.x, torch.cat([torch.zeros(24, 2), x.weight], 1), x.bias, x.dgated, x.dgate)
    expected = _call(simt, long)
    for i in (0, 1, 2, 4):
        assert torch.equal(short[i], expected[i])
    assert torch.equal(short[3], expected[3][:, 2:])
    x.x[0, 20, 0] = math.inf
    assert simt.short_conv_gate(x.x, x.weight, x.bias)[0].isfinite()[0, 0].tolist() == [
        t not in (20, 21) for t in range(40)
    ]


def test_table_of_configurations(simt: Any) -> None:
    ops = ("short_conv_gate", "short_conv_gate_backward")
    table = [entry for entry in json.loads(simt._kernel_table()) if entry["op"] in ops]
    assert {(entry["op"], entry["dtype"]) for entry in table} == {
        (op, dtype) for op in ops for dtype in ("float32", "float16", "bfloat16")
    }
    for entry in table:
        for taps in range(1, entry["max_taps"] + 1):
            case = ShortConvCase("", 1, 9, 3, taps=taps)
            backward = entry["op"].endswith("backward")
            convolutions.check_short_conv_gate(simt, case, getattr(torch, entry["dtype"]), backward=backward)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 5, 25)}, r"x must be floating-point of shape \[batch, seqlen, 3 \* channels\]"),
        ({"x": torch.zeros(5, 24)}, r"x must be floating-point of shape \[batch, seqlen, 3 \* channels\]"),
        ({"x": torch.zeros(2, 5, 24).int()}, r"x must be floating-point of shape \[batch, seqlen, 3 \* channels\]"),
        ({"weight": torch.zeros(23, 3)}, r"weight must be float32 of shape \[24, taps\], got float32 of shape \[23"),
        ({"weight": torch.zeros(24, 0)}, r"weight must be float32 of shape \[24, taps\], got float32 of shape \[24, 0"),
        ({"weight": torch.zeros(24, 1, 3)}, r"weight must be float32 of shape \[24, taps\], got float32 of shape"),
        ({"weight": torch.zeros(24, 3).half()}, r"weight must be float32 of shape \[24, taps\], got float16 of shape"),
        ({"bias": torch.zeros(8)}, r"bias must be float32 of shape \[24\], got float32 of shape \[8\]"),
        ({"bias": torch.zeros(24).half()}, r"bias must be float32 of shape \[24\], got float16 of shape \[24\]"),
        ({"weight": torch.zeros(24, 5)}, "no kernel: 5 taps; the kernels take up to 4"),
    ],
)  # fmt: skip
def test_bad_input(simt: Any, change: dict[str, Tensor], message: str) -> None:
    arguments = {"x": torch.zeros(2, 5, 24), "weight": torch.zeros(24, 3), "bias": torch.zeros(24)} | change
    with pytest.raises(RuntimeError, match=f"^short_conv_gate: {message}"):
        simt.short_conv_gate(**arguments)
    gradient = torch.zeros(2, 8, 5)
    with pytest.raises(RuntimeError, match=f"^short_conv_gate_backward: {message}"):
        simt.short_conv_gate_backward(gradient, gradient, **arguments)


def test_bad_gradient_input(simt: Any) -> None:
    x, weight, gradient = torch.zeros(2, 5, 24), torch.zeros(24, 3), torch.zeros(2, 8, 5)
    with pytest.raises(
        RuntimeError, match=r"dgated must be float32 of shape \[2, 8, 5\], got float32 of shape \[2, 5, 8"
    ):
        simt.short_conv_gate_backward(gradient.mT.contiguous(), gradient, x, weight, None)
    with pytest.raises(RuntimeError, match=r"dgate must be float32 of shape \[2, 8, 5\], got float16 of shape"):
        simt.short_conv_gate_backward(gradient, gradient.half(), x, weight, None)
    with pytest.raises(RuntimeError, match="short_conv_gate: no kernel: float64"):
        simt.short_conv_gate(x.double(), weight.double(), None)
