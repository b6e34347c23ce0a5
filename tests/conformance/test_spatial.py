"""pool_mixer, depthwise_conv2d and their backwards on every backend."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from helpers import cases
from helpers import spatial as helpers
from helpers.backends import FEW_SMS, MANY_SMS, Backend, cpu, drawn_on, kernels, on, one_dtype, reference, same
from helpers.compare import assert_close
from helpers.spatial import DepthwiseCase, DepthwiseInputs, PoolMixerCase, PoolMixerInputs
from helpers.threads import assert_same_on_threads

REFERENCE = reference(examples=20)
CPU = cpu(cases.KERNEL_DTYPES, examples=40)
SIMT, GPU = kernels(cases.KERNEL_DTYPES, examples=(20, 100))
EVERY = (REFERENCE, CPU, SIMT, GPU)

# ---- against the oracle ----


@on(*EVERY, case=helpers.POOL_MIXER_CASES)
def test_cases_of_pool_mixer(backend: Backend, case: PoolMixerCase, dtype: torch.dtype) -> None:
    backend.configure(len(case.name), FEW_SMS if len(case.name) % 2 else MANY_SMS)
    helpers.check_pool_mixer(backend.library, case, dtype, backend.device)


@on(*EVERY, case=helpers.DEPTHWISE_CASES)
def test_cases_of_depthwise_conv2d(backend: Backend, case: DepthwiseCase, dtype: torch.dtype) -> None:
    backend.configure(len(case.name), FEW_SMS if len(case.name) % 2 else MANY_SMS)
    helpers.check_depthwise_conv2d(backend.library, case, dtype, backend.device)


@on(CPU, SIMT, GPU, case=helpers.POOL_MIXER_EDGES)
def test_pool_mixer_at_edges_of_tiles(backend: Backend, case: PoolMixerCase, dtype: torch.dtype) -> None:
    backend.configure(1, 2)
    helpers.check_pool_mixer(backend.library, case, dtype, backend.device)


@on(CPU, SIMT, GPU, case=helpers.DEPTHWISE_EDGES)
def test_depthwise_conv2d_at_edges_of_tiles(backend: Backend, case: DepthwiseCase, dtype: torch.dtype) -> None:
    backend.configure(1, 2)
    helpers.check_depthwise_conv2d(backend.library, case, dtype, backend.device)


@on(CPU, size=(3, 7), dtype=one_dtype)
def test_images_of_several_pieces(backend: Backend, size: int, dtype: torch.dtype) -> None:
    """CPU kernels cut an image of more than 65,536 elements by rows and channels: sums and halos cross the cuts."""
    for shape in ((1, 90, 30, 40), (2, 24, 60, 80)):
        helpers.check_pool_mixer(backend.library, PoolMixerCase("", shape, pool_size=size), dtype, backend.device)
        helpers.check_depthwise_conv2d(backend.library, DepthwiseCase("", shape, size=size), dtype, backend.device)


@drawn_on(*EVERY, case=helpers.pool_mixer_cases(), sm_count=st.sampled_from((FEW_SMS, 4, MANY_SMS)))
def test_drawn_pool_mixer(backend: Backend, case: PoolMixerCase, dtype: torch.dtype, sm_count: int, seed: int) -> None:
    backend.configure(seed, sm_count)
    helpers.check_pool_mixer(backend.library, case, dtype, backend.device)


@drawn_on(*EVERY, case=helpers.depthwise_cases(), sm_count=st.sampled_from((FEW_SMS, 4, MANY_SMS)))
def test_drawn_depthwise_conv2d(
    backend: Backend, case: DepthwiseCase, dtype: torch.dtype, sm_count: int, seed: int
) -> None:
    backend.configure(seed, sm_count)
    helpers.check_depthwise_conv2d(backend.library, case, dtype, backend.device)


# ---- rounding ----


@on(*EVERY, offset=(1e3, 1e5), pool_size=(3, 7))
def test_mean_far_from_zero(backend: Backend, offset: float, pool_size: int) -> None:
    """A mean of squares less the square of the mean would leave nothing of the variance; sums of such values, of u."""
    x = (offset + cases.random(2, 9, 10, 24, dtype=torch.float32)).to(backend.device)
    one, dout = torch.ones(24, device=backend.device), cases.random(2, 9, 10, 24, dtype=torch.float32)
    dout = dout.to(backend.device)
    _, mean, rstd = backend.library.pool_mixer(x, one, one, pool_size=pool_size, eps=0.0)
    exact, near = x.double(), x - offset  # which is so near to x that taking it off rounds nothing
    true_mean, true_rstd = helpers.statistics(exact, 0.0)
    assert (mean.double() - true_mean).abs().max() <= torch.finfo(torch.float32).eps * offset
    assert_close("rstd", rstd, true_rstd, helpers.statistics(near, 0.0)[1])
    found = backend.library.pool_mixer_backward(dout, x, one, one, mean, rstd, pool_size=pool_size)
    truths, yardsticks = (_gradients_of_pool_mixer(t, dout, pool_size) for t in (exact, near))
    for name, g, truth, yardstick in zip(("dx", "dweight", "dscale"), found, truths, yardsticks, strict=True):
        assert_close(name, g, truth, yardstick, gradient=True)


def _gradients_of_pool_mixer(x: Tensor, dout: Tensor, pool_size: int) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_(), *(torch.ones_like(x[0, 0, 0]).requires_grad_() for _ in range(2))]
    out = helpers.pool_mixer(*leaves, pool_size=pool_size, eps=0.0)
    return torch.autograd.grad((out * dout.to(x.dtype)).sum(), leaves)


@on(*EVERY)
def test_equal_values_stay(backend: Backend, dtype: torch.dtype) -> None:
    """A constant is its neighbours' mean: out is x, parameters have no gradient, and the variance has none either."""
    x = torch.full((2, 4, 8, 16), 0.5, dtype=dtype, device=backend.device)
    x[1] = -2.0
    weight, scale = (cases.random(16, dtype=dtype, device=backend.device) for _ in range(2))
    dout = torch.ones_like(x)
    out, mean, rstd = backend.library.pool_mixer(x, weight, scale, pool_size=3, eps=0.25)
    assert torch.equal(out, x) and mean.tolist() == [0.5, -2.0] and rstd.tolist() == [2.0, 2.0]
    dx, dweight, dscale = backend.library.pool_mixer_backward(dout, x, weight, scale, mean, rstd, pool_size=3)
    assert not dweight.any() and not dscale.any()
    # Two places from the edge all counts are 9, and P^T of equal values is these values.
    torch.testing.assert_close(dx[:, 2:-2, 2:-2], dout[:, 2:-2, 2:-2])


# ---- the same bits ----


def _call_pool_mixer(backend: Backend, x: PoolMixerInputs, pool_size: int = 3) -> tuple[Tensor, ...]:
    """out, dx, dweight, dscale, mean, rstd."""
    out, mean, rstd = backend.library.pool_mixer(*x.tensors, pool_size=pool_size, eps=1e-5)
    gradients = backend.library.pool_mixer_backward(x.dout, *x.tensors, mean, rstd, pool_size=pool_size)
    return out, *gradients, mean, rstd


def _call_depthwise(backend: Backend, x: DepthwiseInputs, activation: str = "gelu") -> tuple[Tensor, ...]:
    """out, dx, dweight, dbias."""
    out = backend.library.depthwise_conv2d(*x.tensors, activation=activation)
    return out, *backend.library.depthwise_conv2d_backward(x.dout, *x.tensors, activation=activation)


@on(*EVERY)
def test_results_repeat_bit_for_bit(backend: Backend, dtype: torch.dtype) -> None:
    """In any order of blocks and threads; with other blocks only sums over positions may change."""
    pooled = helpers.pool_mixer_inputs(PoolMixerCase("", (2, 17, 19, 40)), dtype, backend.device)
    convolved = helpers.depthwise_inputs(DepthwiseCase("", (2, 17, 19, 40)), dtype, backend.device)
    found = []
    for sms in (1, 3):
        machines = [(0, sms), (5, sms)]
        backend.assert_repeats(lambda: _call_pool_mixer(backend, pooled), machines)
        found.append(backend.assert_repeats(lambda: _call_depthwise(backend, convolved), machines))
    assert same(found[0][:2], found[1][:2])


@on(CPU, shape=((3, 20, 14, 200), (1, 37, 40, 24), (9, 3, 2, 7)))
def test_threads_change_no_bit(backend: Backend, dtype: torch.dtype, shape: helpers.Shape) -> None:
    pooled = helpers.pool_mixer_inputs(PoolMixerCase("", shape), dtype, backend.device)
    convolved = helpers.depthwise_inputs(DepthwiseCase("", shape), dtype, backend.device)
    assert_same_on_threads(lambda: (*_call_pool_mixer(backend, pooled), *_call_depthwise(backend, convolved)))


@on(*EVERY, place=("x", "weight", "dout"))
def test_misaligned_tensors(backend: Backend, dtype: torch.dtype, place: str) -> None:
    """Wherever a tensor begins, the results are the same bits."""
    for inputs, call in (
        (helpers.pool_mixer_inputs(PoolMixerCase("", (2, 5, 6, 16)), dtype, backend.device), _call_pool_mixer),
        (helpers.depthwise_inputs(DepthwiseCase("", (2, 5, 6, 16)), dtype, backend.device), _call_depthwise),
    ):
        expected = call(backend, inputs)
        setattr(inputs, place, cases.misaligned(getattr(inputs, place)))
        assert same(call(backend, inputs), expected)


@on(SIMT, GPU, CPU, dtype=one_dtype)
def test_batch_changes_no_bit(backend: Backend, dtype: torch.dtype) -> None:
    """A sample's result does not depend on its neighbours."""
    pooled = helpers.pool_mixer_inputs(PoolMixerCase("", (3, 7, 18, 24)), dtype, backend.device)
    convolved = helpers.depthwise_inputs(DepthwiseCase("", (3, 7, 18, 24)), dtype, backend.device)
    for call, x, count in ((_call_pool_mixer, pooled, 2), (_call_depthwise, convolved, 2)):
        whole = call(backend, x)
        for b in range(3):
            x_of_sample, dout = x.x[b : b + 1], x.dout[b : b + 1]
            alone = call(backend, type(x)(x_of_sample, *x.tensors[1:], dout))
            for one, other in zip(whole[:count], alone[:count], strict=True):
                assert torch.equal(one[b : b + 1], other)


# ---- bad values ----


def _reach(shape: helpers.Shape, place: tuple[int, int, int, int], size: int, device: str) -> Tensor:
    """Where a stencil of this size has `place` in its window."""
    b, h, w, c = place
    hit = torch.zeros(shape, dtype=torch.bool, device=device)
    hit[b, max(0, h - size // 2) : h + size // 2 + 1, max(0, w - size // 2) : w + size // 2 + 1, c] = True
    return hit


# Corners, beside which the next row or sample lies in memory, and the middle.
PLACES = ((0, 0, 0, 3), (0, 8, 17, 7), (1, 0, 17, 0), (1, 8, 0, 5), (0, 4, 9, 2), (1, 3, 16, 6))


@pytest.mark.parametrize("size", helpers.SIZES)
@on(*EVERY, bad=(math.nan, math.inf), dtype=one_dtype)
def test_a_bad_value_stays_in_reach_of_the_taps(backend: Backend, bad: float, dtype: torch.dtype, size: int) -> None:
    """Of x and of dout, in its own channel; gradients of other channels' taps and biases keep their bits."""
    shape = (2, 9, 18, 8)
    x = helpers.depthwise_inputs(DepthwiseCase("", shape, size=size), dtype, backend.device)
    clean = _call_depthwise(backend, x, "linear")
    for place in PLACES:
        others = torch.arange(8, device=backend.device) != place[3]
        hit = _reach(shape, place, size, backend.device)
        for name, results in (("x", clean[:1]), ("dout", clean[1:2])):
            t = getattr(x, name)
            kept, t[place] = t[place].item(), bad
            dirty = _call_depthwise(backend, x, "linear")
            t[place] = kept
            for before, after in zip(results, dirty[0 if name == "x" else 1 :], strict=False):
                assert not after[hit].isfinite().any() and torch.equal(before[~hit], after[~hit])
            for i in (2, 3):
                assert torch.equal(clean[i][others], dirty[i][others])
            assert not dirty[2][place[3], size // 2, size // 2].isfinite()


@on(*EVERY, dtype=one_dtype)
def test_padding_is_left_out(backend: Backend, dtype: torch.dtype) -> None:
    """An infinite tap meets no zero of a margin: 0 times infinity would be NaN."""
    x = helpers.depthwise_inputs(DepthwiseCase("", (1, 6, 20, 8)), dtype, backend.device)
    x.weight[3, 0, 0] = math.inf  # of the neighbour above and to the left
    x.x.abs_()
    out, dx, _, _ = _call_depthwise(backend, x, "linear")
    finite = torch.ones_like(out, dtype=torch.bool)
    finite[:, 1:, 1:, 3] = False
    assert torch.equal(out.isfinite(), finite)
    finite = torch.ones_like(out, dtype=torch.bool)
    finite[:, :-1, :-1, 3] = False
    assert torch.equal(dx.isfinite(), finite)


@on(*EVERY, bad=(math.nan, math.inf), dtype=one_dtype)
def test_a_bad_value_stays_in_its_sample(backend: Backend, bad: float, dtype: torch.dtype) -> None:
    """It reaches a sample's variance, and so all of it, but no other sample."""
    x = helpers.pool_mixer_inputs(PoolMixerCase("", (3, 9, 17, 8)), dtype, backend.device)
    clean = _call_pool_mixer(backend, x)
    for place in ((1, 0, 0, 3), (1, 8, 16, 7), (1, 4, 9, 0)):
        kept, x.x[place] = x.x[place].item(), bad
        dirty = _call_pool_mixer(backend, x)
        assert dirty[0][1].isnan().any() and not (dirty[5][1].isfinite() and dirty[5][1] != 0)
        for i in (0, 1, 4, 5):
            assert torch.equal(clean[i][::2], dirty[i][::2])
        x.x[place] = kept
        kept, x.dout[place] = x.dout[place].item(), bad
        dirty = _call_pool_mixer(backend, x)
        x.dout[place] = kept
        others = torch.arange(8, device=backend.device) != place[3]
        assert torch.equal(clean[1][::2], dirty[1][::2]) and not dirty[1][1].isfinite().any()
        for i in (2, 3):
            assert torch.equal(clean[i][others], dirty[i][others]) and not dirty[i][place[3]].isfinite()


@on(*EVERY, dtype=one_dtype)
def test_activations_keep_nan(backend: Backend, dtype: torch.dtype) -> None:
    x = helpers.depthwise_inputs(DepthwiseCase("", (1, 3, 4, 16)), dtype, backend.device)
    x.x[0, 1, 1, 5] = math.nan
    for activation in helpers.ACTIVATIONS:
        out = backend.library.depthwise_conv2d(*x.tensors, activation=activation)
        hit = _reach((1, 3, 4, 16), (0, 1, 1, 5), 3, backend.device)
        assert torch.equal(out.isnan(), hit), activation


@on(*EVERY)
def test_a_window_of_fewer_taps(backend: Backend) -> None:
    """Taps of 3 x 3 are the middle of 5 x 5 taps whose margin is zero."""
    x = helpers.depthwise_inputs(DepthwiseCase("", (2, 6, 7, 12)), torch.float32, backend.device)
    small = _call_depthwise(backend, x)
    x.weight = torch.nn.functional.pad(x.weight, (1, 1, 1, 1))
    large = _call_depthwise(backend, x)
    for one, other in zip(
        (*small[:2], small[2], small[3]), (*large[:2], large[2][:, 1:-1, 1:-1], large[3]), strict=True
    ):
        torch.testing.assert_close(one, other)
