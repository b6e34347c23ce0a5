"""short_conv_gate and its backward on every backend."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from helpers import cases
from helpers.backends import FEW_SMS, MANY_SMS, Backend, cpu, drawn_on, kernels, on, reference, same
from helpers.fft_conv import (
    SHORT_CONV_CASES,
    ShortConvCase,
    ShortConvInputs,
    check_short_conv_gate,
    short_conv_cases,
    short_conv_inputs,
)
from helpers.threads import assert_same_on_threads

REFERENCE = reference()
CPU = cpu(cases.KERNEL_DTYPES)
SIMT, GPU = kernels(cases.KERNEL_DTYPES, examples=(30, 100))
EVERY = (REFERENCE, CPU, SIMT, GPU)

# A tile is 64 times by 64 channels (float32: 32 by 32), 16 bytes 8 (4) of them.
EDGES = tuple(
    ShortConvCase(f"{seqlen}x{channels}", 2, seqlen, channels, taps=taps)
    for seqlen, channels, taps in (
        (63, 64, 3), (64, 8, 3), (65, 63, 3), (128, 65, 4), (72, 72, 2), (136, 4, 3), (129, 12, 4), (62, 130, 1)
    )
)  # fmt: skip


# ---- against the oracle ----


@on(*EVERY, case=SHORT_CONV_CASES)
def test_cases(backend: Backend, case: ShortConvCase, dtype: torch.dtype) -> None:
    backend.configure(len(case.name), FEW_SMS if len(case.name) % 2 else MANY_SMS)
    check_short_conv_gate(backend.library, case, dtype, backend.device)


@on(CPU, SIMT, GPU, case=EDGES)
def test_edges_of_tiles(backend: Backend, case: ShortConvCase, dtype: torch.dtype) -> None:
    backend.configure(1, 2)
    check_short_conv_gate(backend.library, case, dtype, backend.device)


@drawn_on(*EVERY, case=short_conv_cases(), sm_count=st.sampled_from((FEW_SMS, 4, MANY_SMS)))
def test_drawn(backend: Backend, case: ShortConvCase, dtype: torch.dtype, sm_count: int, seed: int) -> None:
    backend.configure(seed, sm_count)
    check_short_conv_gate(backend.library, case, dtype, backend.device)


def _call(backend: Backend, x: ShortConvInputs) -> tuple[Tensor, ...]:
    """gated, gate, dx, dweight, dbias."""
    library, arguments = backend.library, (x.x, x.weight, x.bias)
    return *library.short_conv_gate(*arguments), *library.short_conv_gate_backward(x.dgated, x.dgate, *arguments)


@on(*EVERY)
def test_results_repeat_bit_for_bit(backend: Backend, dtype: torch.dtype) -> None:
    """In any order of blocks and threads; with other blocks only sums over time may change."""
    x = short_conv_inputs(ShortConvCase("", 2, 140, 20), dtype, backend.device)
    one, three = (backend.assert_repeats(lambda: _call(backend, x), [(0, sms), (5, sms)]) for sms in (1, 3))
    assert same(one[:3], three[:3])


@on(CPU)
def test_threads_change_no_bit(backend: Backend, dtype: torch.dtype) -> None:
    x = short_conv_inputs(ShortConvCase("", 3, 70, 200), dtype, backend.device)
    assert_same_on_threads(lambda: _call(backend, x))


# ---- layouts, bad values ----


@on(*EVERY, place=("x", "dgated", "dgate"))
def test_misaligned_tensors(backend: Backend, dtype: torch.dtype, place: str) -> None:
    """Wherever a tensor begins, the results are the same bits."""
    x = short_conv_inputs(ShortConvCase("", 1, 72, 16), dtype, backend.device)
    expected = _call(backend, x)
    setattr(x, place, cases.misaligned(getattr(x, place)))
    assert same(_call(backend, x), expected)


@on(*EVERY, bad=(math.nan, math.inf))
def test_bad_values_stay_where_the_filter_ends(backend: Backend, dtype: torch.dtype, bad: float) -> None:
    """One at t = 60 reaches the times 60 to 62 of its channel forward, and 58 to 62 backward."""
    x = short_conv_inputs(ShortConvCase("", 2, 70, 8), dtype, backend.device)
    clean = _call(backend, x)
    for t in (60, 69):
        for part in range(3):
            x.x[0, t, part * 8 + 3] = bad
        dirty = _call(backend, x)
        for before, after in zip(clean[:2], dirty[:2], strict=True):
            hit = torch.zeros_like(before, dtype=torch.bool)
            hit[0, 3, t : t + 3] = True
            assert not after[0, 3, t].isfinite() and torch.equal(before[~hit], after[~hit])
        hit = torch.zeros_like(clean[2], dtype=torch.bool)
        hit[0, t - 2 : t + 3, 3::8] = True
        assert torch.equal(clean[2][~hit], dirty[2][~hit])
        assert torch.equal(clean[3].view(3, 8, 3)[:, :3], dirty[3].view(3, 8, 3)[:, :3])
        x.x[0, t, 3::8] = 0
        clean = _call(backend, x)


@on(*EVERY, dtype=(torch.float32, torch.bfloat16))
def test_an_overflow_behind_the_end_is_nobodys(backend: Backend, dtype: torch.dtype) -> None:
    """The filter goes on for two times behind the sequence; what it would be there meets no gradient."""
    x = short_conv_inputs(ShortConvCase("", 1, 35, 8), dtype, backend.device)
    x.weight[:] = torch.tensor([0.0, 2, 0])
    x.x[0, -1] = 3e38
    assert all(t.isfinite().all() for t in (*_call(backend, x)[:3], _call(backend, x)[4]))


@on(*EVERY)
def test_fewer_taps_leave_the_others_out(backend: Backend) -> None:
    """A filter of two taps is one of four that begins with zeros, but for infinities: 0 times those is not 0."""
    x = short_conv_inputs(ShortConvCase("", 1, 40, 8, taps=2), torch.float32, backend.device)
    short = _call(backend, x)
    long = ShortConvInputs(x.x, torch.cat([torch.zeros_like(x.weight), x.weight], 1), x.bias, x.dgated, x.dgate)
    expected = _call(backend, long)
    for i in (0, 1, 2, 4):
        assert torch.equal(short[i], expected[i])
    assert torch.equal(short[3], expected[3][:, 2:])
    x.x[0, 20, 0] = math.inf
    assert backend.library.short_conv_gate(x.x, x.weight, x.bias)[0].isfinite()[0, 0].tolist() == [
        t not in (20, 21) for t in range(40)
    ]
