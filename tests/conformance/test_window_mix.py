"""window_mix and window_mix_backward on every backend."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import cases
from helpers.backends import FEW_SMS, MANY_SMS, Backend, cpu, drawn_on, kernels, on, one_dtype, reference, same
from helpers.compare import assert_close, farthest
from helpers.threads import assert_same_on_threads
from helpers.window_mix import (
    NAMES,
    WINDOW_MIX_CASES,
    WindowMixCase,
    WindowMixInputs,
    check_window_mix,
    places,
    window_mix_cases,
    window_mix_inputs,
)

REFERENCE = reference()
CPU = cpu(cases.KERNEL_DTYPES, examples=40)
SIMT, GPU = kernels(cases.KERNEL_DTYPES, examples=(12, 60))
EVERY = (REFERENCE, CPU, SIMT, GPU)

BLOCK = WindowMixCase("block", (8, 12), (4, 4), 24, batch=2)
GRID = WindowMixCase("grid", (8, 12), (4, 4), 24, batch=2, dilated=True)
BOTH = (BLOCK, GRID)


# ---- against the oracle ----


@on(*EVERY, case=WINDOW_MIX_CASES)
def test_cases(backend: Backend, case: WindowMixCase, dtype: torch.dtype) -> None:
    for _ in backend.machines((0, FEW_SMS), (len(case.name), MANY_SMS)):
        check_window_mix(backend.library, case, dtype, backend.device)


@drawn_on(*EVERY, case=window_mix_cases())
def test_drawn(backend: Backend, case: WindowMixCase, dtype: torch.dtype, seed: int) -> None:
    backend.configure(seed)
    check_window_mix(backend.library, case, dtype, backend.device)


# ---- against torch's functions ----


def of_torch(x: WindowMixInputs, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """out and the gradients by layer_norm, unfold, linear and fold: a grid is a window whose taps are dilated."""
    case = x.case
    leaves = [None if t is None else t.detach().to(dtype, copy=True).requires_grad_() for t in x.tensors]
    rows, weight, bias, norm_weight, norm_bias, gate = leaves
    assert rows is not None and weight is not None
    if norm_weight is not None:
        rows = F.layer_norm(rows, (case.channels,), norm_weight, norm_bias, case.eps)
    cells = [size // w for size, w in zip(case.grid, case.window, strict=True)]
    how = {"dilation": cells, "stride": 1} if case.dilated else {"dilation": 1, "stride": case.window}
    windows = F.unfold(rows.permute(0, 3, 1, 2), case.window, **how)  # [B, C * n, windows]
    windows = windows.unflatten(1, (case.channels, case.tokens)).transpose(2, 3)
    mixed = F.linear(windows, weight, bias).transpose(2, 3).flatten(1, 2)
    out = F.fold(mixed, case.grid, case.window, **how).permute(0, 2, 3, 1)
    if gate is not None:
        out = gate * (out + 1)
    return out, *torch.autograd.grad(out, [t for t in leaves if t is not None], x.dout.to(dtype))


@on(*EVERY, case=(*BOTH, WindowMixCase("bare", (6, 10), (3, 5), 16, norm=None, bias=False, gate=False, dilated=True)))
def test_it_is_made_of_torchs_functions(backend: Backend, case: WindowMixCase, dtype: torch.dtype) -> None:
    x = window_mix_inputs(case, dtype, backend.device)
    out, _, _, *gradients = x.call(backend.library)
    given = ["out", *(name for name, t in zip(NAMES, x.tensors, strict=True) if t is not None)]
    found = [out, *(g for g, t in zip(gradients, x.tensors, strict=True) if t is not None)]
    for name, one, truth, eager in zip(given, found, of_torch(x, torch.float64), of_torch(x, dtype), strict=True):
        assert_close(name, one, truth, eager.to(one.dtype), gradient=name != "out")


# ---- which tokens meet, and what stays where ----


@on(*EVERY, dtype=one_dtype)
@pytest.mark.parametrize("dilated", (False, True), ids=("block", "grid"))
@pytest.mark.parametrize(
    ("grid", "window"), (((6, 10), (3, 5)), ((4, 4), (2, 2)), ((3, 8), (3, 2)), ((16, 32), (16, 16)))
)
def test_which_tokens_meet(
    backend: Backend, grid: tuple[int, int], window: tuple[int, int], dilated: bool, dtype: torch.dtype
) -> None:
    """A token that is one and a matrix whose entries are all different: each token gets the entry of the pair."""
    n, size = math.prod(window), math.prod(grid)
    # Whole numbers that bfloat16 holds, no two neighbours alike.
    weight = (1 + torch.arange(n * n) % 251).view(n, n).to(dtype)
    place = places(grid, window, dilated)
    chosen = torch.arange(0, size, max(1, size // 24))
    x = torch.zeros(1, size, len(chosen), dtype=dtype)
    x[0, chosen, torch.arange(len(chosen))] = 1
    expected = torch.zeros(size, len(chosen), dtype=dtype)
    for column, token in enumerate(chosen.tolist()):
        number, j = (place == token).nonzero()[0].tolist()
        expected[place[number], column] = weight[:, j]
    x, weight = x.view(1, *grid, -1).to(backend.device), weight.to(backend.device)
    out, _, _ = backend.library.window_mix(x, weight, None, None, None, None, list(window), dilated=dilated)
    assert torch.equal(out.view(size, -1).cpu(), expected)


@on(*EVERY, case=BOTH, dtype=one_dtype)
def test_exchanged_windows_are_exchanged(backend: Backend, case: WindowMixCase, dtype: torch.dtype) -> None:
    """Bit by bit, forward and backward: a window does not know where it is."""
    x = window_mix_inputs(case, dtype, backend.device)
    place = places(case.grid, case.window, case.dilated)
    moved = torch.arange(math.prod(case.grid))
    moved[place[1]], moved[place[4]] = place[4], place[1]

    def exchange(t: Tensor) -> Tensor:
        return t.flatten(1, 2)[:, moved.to(t.device)].view(t.shape)

    assert x.gate is not None
    other = replace(x, x=exchange(x.x), gate=exchange(x.gate), dout=exchange(x.dout))
    one, two = x.call(backend.library), other.call(backend.library)
    assert same([exchange(one[i]) for i in (0, 3, 8)], [two[i] for i in (0, 3, 8)])


@on(*EVERY, case=BOTH, dtype=one_dtype)
def test_bad_values_stay_in_their_window(backend: Backend, case: WindowMixCase, dtype: torch.dtype) -> None:
    """NaN in one token reaches the tokens of its window alone: all channels with the norm, its own without."""
    place = places(case.grid, case.window, case.dilated)
    for norm in ("both", None):
        x = window_mix_inputs(replace(case, norm=norm), dtype, backend.device)
        clean = x.call(backend.library)
        x.x[1].flatten(0, 1)[place[3, 5], 7] = float("nan")
        dirty = x.call(backend.library)
        hit = torch.zeros(x.x.shape, dtype=torch.bool)
        hit[1].flatten(0, 1)[place[3], :] = True
        if norm is None:
            hit[..., :7] = hit[..., 8:] = False
        hit = hit.to(backend.device)
        for i in (0, 8):  # out and dgate
            assert dirty[i][hit].isnan().all() and torch.equal(dirty[i][~hit], clean[i][~hit])
        token = torch.zeros(x.x.shape, dtype=torch.bool, device=backend.device)
        token[1].flatten(0, 1)[place[3, 5]] = True  # the gradient of x knows of x by the norm of the token alone
        assert torch.equal(dirty[3][~token], clean[3][~token])
        assert dirty[3][token].isnan().all() if norm else same([dirty[3]], [clean[3]])
        dout = x.dout.clone()
        x = window_mix_inputs(replace(case, norm=norm), dtype, backend.device)
        clean = x.call(backend.library)
        x.dout = dout
        x.dout[1].flatten(0, 1)[place[3, 5], 7] = float("nan")
        dirty_dx = x.call(backend.library)[3]
        assert dirty_dx[hit].isnan().all() and dirty_dx[~hit].isfinite().all()


@on(*EVERY, case=BOTH, dtype=one_dtype)
def test_one_matrix_gives_back_the_tokens(backend: Backend, case: WindowMixCase, dtype: torch.dtype) -> None:
    """The unit matrix without a norm is the identity, and zeros leave the gate."""
    x = window_mix_inputs(replace(case, norm=None, bias=False), dtype, backend.device)
    how = {"dilated": case.dilated}
    window, eye = list(case.window), torch.eye(case.tokens, dtype=dtype, device=backend.device)
    out, _, _ = backend.library.window_mix(x.x, eye, None, None, None, None, window, **how)
    assert torch.equal(out, x.x)
    zeros = torch.zeros_like(eye)
    out, _, _ = backend.library.window_mix(x.x, zeros, None, None, None, x.gate, window, **how)
    assert torch.equal(out, x.gate)


# ---- bits and layouts ----


@on(*EVERY, case=BOTH, dtype=one_dtype)
def test_results_repeat_bit_for_bit(backend: Backend, case: WindowMixCase, dtype: torch.dtype) -> None:
    """In any order of blocks and threads."""
    x = window_mix_inputs(replace(case, batch=3), dtype, backend.device)
    backend.assert_repeats(lambda: x.call(backend.library))


@on(CPU, case=BOTH, dtype=one_dtype)
def test_bits_do_not_depend_on_threads(backend: Backend, case: WindowMixCase, dtype: torch.dtype) -> None:
    """With so many windows that groups of them, and shares, are several."""
    x = window_mix_inputs(replace(case, grid=(40, 48), batch=3, channels=33), dtype, backend.device)
    assert_same_on_threads(lambda: x.call(backend.library))


@on(CPU, dtype=one_dtype)
def test_groups_and_shares_of_windows(backend: Backend, dtype: torch.dtype) -> None:
    """CPU kernels mix several windows in one product, and add the gradients of parameters over shares of the groups."""
    for name, grid, window, channels in (("a last group", (12, 20), (2, 2), 330), ("shares", (40, 48), (2, 4), 33)):
        for dilated in (False, True):
            case = WindowMixCase(name, grid, window, channels, batch=3, dilated=dilated)
            check_window_mix(backend.library, case, dtype, backend.device)


@on(*EVERY, case=BOTH, dtype=one_dtype)
def test_layouts_change_no_bit(backend: Backend, case: WindowMixCase, dtype: torch.dtype) -> None:
    """Halves of a product, tokens apart, channels first, an expanded gradient."""
    x = window_mix_inputs(case, dtype, backend.device)
    assert x.gate is not None
    x.dout = torch.ones((), dtype=dtype, device=backend.device).expand_as(x.x)
    expected = x.call(backend.library)
    for relay in (
        lambda t: t.contiguous(),
        cases.misaligned,
        cases.strided,
        lambda t: t.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        lambda t: F.pad(t, (3, 2), value=math.nan)[..., 3:-2],
        lambda t: F.pad(t, (0, 0, 0, 3), value=math.nan)[:, :, :-3],
    ):
        assert same(replace(x, x=relay(x.x), gate=relay(x.gate)).call(backend.library), expected)
    assert same(replace(x, gate=x.gate.contiguous()).call(backend.library), expected)
    assert same(replace(x, dout=x.dout.contiguous()).call(backend.library), expected)


@on(SIMT, GPU, case=BOTH, dtype=one_dtype, place=("weight", "norm_weight", "norm_bias", "dout"))
def test_misaligned_parameters(backend: Backend, case: WindowMixCase, dtype: torch.dtype, place: str) -> None:
    """Wherever a tensor begins, as parameters in a flat buffer do, the results are the same bits."""
    x = window_mix_inputs(case, dtype, backend.device)
    expected = x.call(backend.library)
    found = replace(x, **{place: cases.misaligned(getattr(x, place))}).call(backend.library)
    # The LayerNorm backward of rows adds up in another order where it cannot read vectors: dx, number 3.
    unchanged = [i for i in range(len(expected)) if i != 3 or place != "norm_weight"]
    assert same([found[i] for i in unchanged], [expected[i] for i in unchanged])
    assert found[3].isfinite().all()


@on(*EVERY, dtype=one_dtype)
def test_a_large_mean_costs_no_digits(backend: Backend, dtype: torch.dtype) -> None:
    """A mean of a hundred times the spread leaves the variance as exact as it does in torch's LayerNorm."""
    x = window_mix_inputs(replace(BLOCK, wide_norm=True), dtype, backend.device)
    x.x = (x.x.float() * 2 + 200).to(dtype)
    _, mean, rstd = x.forward(backend.library)
    rows = x.x.double().reshape(-1, BLOCK.channels)
    truth = 1 / torch.sqrt(rows.var(-1, unbiased=False) + BLOCK.eps)
    wide = rows.to(mean.dtype)
    eager = 1 / torch.sqrt((wide - wide.mean(-1, keepdim=True)).square().mean(-1) + BLOCK.eps)
    others = torch.native_layer_norm(wide, (BLOCK.channels,), None, None, BLOCK.eps)[2].flatten()
    assert_close("rstd", rstd, truth, farthest(truth, eager, others))
