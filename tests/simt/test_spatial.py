"""The kernels of pool_mixer and depthwise_conv2d in the emulator: what is asked of them alone."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import cases
from helpers import spatial as helpers
from helpers.compare import assert_close
from helpers.spatial import DepthwiseCase, PoolMixerCase
from warpform.ops.reference import spatial as reference

OPS = ("pool_mixer", "pool_mixer_backward", "depthwise_conv2d", "depthwise_conv2d_backward")
by_size = pytest.mark.parametrize("size", helpers.SIZES)
by_bad_value = pytest.mark.parametrize("bad", [math.inf, pytest.param(math.nan, marks=pytest.mark.slow)])


def test_table_of_configurations(simt: Any) -> None:
    table = [entry for entry in json.loads(simt._kernel_table()) if entry["op"] in OPS]
    assert {(entry["op"], entry["dtype"]) for entry in table} == {
        (op, dtype) for op in OPS for dtype in ("float32", "float16", "bfloat16")
    }
    for entry in table:
        dtype, backward = getattr(torch, entry["dtype"]), entry["op"].endswith("backward")
        if entry["op"].startswith("pool"):
            for size in range(3, entry["max_pool_size"] + 1, 2):
                for wide in (False, True):
                    case = PoolMixerCase("", (1, 3, 4, 6), pool_size=size, wide_parameters=wide)
                    helpers.check_pool_mixer(simt, case, dtype, backward=backward)
        else:
            for size in range(3, entry["max_kernel_size"] + 1, 2):
                helpers.check_depthwise_conv2d(
                    simt, DepthwiseCase("", (1, 3, 4, 6), size=size), dtype, backward=backward
                )


# ---- more than one block, chunk, group ----


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 24, 24, 40), torch.bfloat16),  # two chunks of statistics, of which the second is not full
        ((2, 17, 20, 61), torch.float32),  # three, of samples that begin at odd elements
    ],
)
def test_large_samples(simt: Any, shape: helpers.Shape, dtype: torch.dtype) -> None:
    simt.configure(3, 4)
    helpers.check_pool_mixer(simt, PoolMixerCase("", shape, offset=2.0), dtype)


def test_a_sample_of_many_tiles(simt: Any) -> None:
    """272 tiles: more than four to a group of the backward pass, whose groups are at most 64 a sample."""
    x = helpers.pool_mixer_inputs(PoolMixerCase("", (1, 129, 241, 1)), torch.float32)
    found, truth, eager = [], [], []
    for results, how, dtype in (
        (found, simt, torch.float32),
        (truth, reference, torch.float64),
        (eager, reference, torch.float32),
    ):
        dout, *tensors = (t.to(dtype) for t in (x.dout, *x.tensors))
        out, mean, rstd = how.pool_mixer(*tensors)
        results += [out, *how.pool_mixer_backward(dout, *tensors, mean, rstd)]
    terms = float(x.dout.abs().sum() * x.x.abs().max())
    for name, *values in zip(("out", "dx", "dweight", "dscale"), found, truth, eager, strict=True):
        assert_close(name, *values, gradient=name != "out", scale=terms if name[1:] in ("weight", "scale") else 0.0)


def test_statistics_do_not_depend_on_alignment_or_gpu(simt: Any) -> None:
    """Chunks and groups follow from the shape: every GPU gives the same bits, of gradients too."""
    x = helpers.pool_mixer_inputs(PoolMixerCase("", (2, 20, 33, 30)), torch.float16)
    found = []
    for sms in (1, 7, 132):
        simt.configure(sms, sms)
        if sms == 7:
            x.x = cases.misaligned(x.x)
        out, mean, rstd = simt.pool_mixer(*x.tensors)
        found.append((out, mean, rstd, *simt.pool_mixer_backward(x.dout, *x.tensors, mean, rstd)))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@by_size
def test_many_tiles_a_block(simt: Any, size: int) -> None:
    """A block of the sums of taps walks over tiles of several samples, its last one not full."""
    simt.configure(2, 1)
    case = DepthwiseCase("", (3, 10, 35, 12), size=size, activation="relu")
    helpers.check_depthwise_conv2d(simt, case, torch.float16)


@by_size
def test_which_kernels_run(simt: Any, size: int) -> None:
    """dpre is made where the activation bends; dx by itself where its walk does not give the sums of taps."""
    x = helpers.depthwise_inputs(DepthwiseCase("", (1, 3, 4, 8), size=size), torch.float16)
    for activation, of_activation in (("linear", 0), ("gelu", 1), ("relu", 1)):
        simt.configure(0, 4)
        simt.depthwise_conv2d_backward(x.dout, *x.tensors, activation=activation)
        names = [launch["kernel"].split("<")[0] for launch in simt.launches()]
        assert names.count("depthwise_conv2d_kernel") == of_activation + (size != 3)
        assert names.count("depthwise_conv2d_backward_kernel") == 1


# ---- bad values ----


@by_size
@by_bad_value
def test_a_bad_tap_stays_in_its_reach(simt: Any, size: int, bad: float) -> None:
    """Positions whose neighbour for that tap is beyond the grid keep their bits, and so do other channels."""
    shape = (2, 9, 17, 6)
    x = helpers.depthwise_inputs(DepthwiseCase("", shape, size=size), torch.float32)
    clean = simt.depthwise_conv2d(*x.tensors)
    clean_dx = simt.depthwise_conv2d_backward(x.dout, *x.tensors)[0]
    for i, j in ((0, 0), (0, size - 1), (size // 2, 0), (size - 1, size // 2), (size - 1, size - 1)):
        kept = x.weight[2, i, j].item()
        x.weight[2, i, j] = 0
        without = simt.depthwise_conv2d(*x.tensors)
        without_dx = simt.depthwise_conv2d_backward(x.dout, *x.tensors)[0]
        x.weight[2, i, j] = bad
        out = simt.depthwise_conv2d(*x.tensors)
        dx = simt.depthwise_conv2d_backward(x.dout, *x.tensors)[0]
        x.weight[2, i, j] = kept
        for found, before, zero, down, right in (
            (out, clean, without, i - size // 2, j - size // 2),
            (dx, clean_dx, without_dx, size // 2 - i, size // 2 - j),
        ):
            rows, cols = torch.arange(9) + down, torch.arange(17) + right
            hit = ((rows >= 0) & (rows < 9))[:, None] & ((cols >= 0) & (cols < 17))
            assert not found[:, hit][..., 2].isfinite().any() and torch.equal(
                found[:, ~hit][..., 2], zero[:, ~hit][..., 2]
            )
            others = torch.arange(6) != 2
            assert torch.equal(found[..., others], before[..., others])


@by_size
@by_bad_value
@pytest.mark.parametrize("name", ["x", "dout"])
def test_a_bad_value_reaches_the_taps_that_meet_it(simt: Any, size: int, bad: float, name: str) -> None:
    """One in a corner meets a quarter of the taps; the others keep the bits that they have with a 0 there."""
    x = helpers.depthwise_inputs(DepthwiseCase("", (2, 10, 18, 5), size=size), torch.bfloat16)
    for row, col in ((0, 0), (0, 17), (9, 0), (9, 17)):
        t = getattr(x, name)
        kept, found = t[1, row, col, 3].item(), []
        for value in (0.0, bad):
            t[1, row, col, 3] = value
            found.append(simt.depthwise_conv2d_backward(x.dout, *x.tensors)[1])
        t[1, row, col, 3] = kept
        zero, dirty = found
        offsets = torch.arange(size) - size // 2
        sign = -1 if name == "x" else 1  # dweight[t] sums x[i] dout[i - t]
        rows, cols = row + sign * offsets, col + sign * offsets
        hit = ((rows >= 0) & (rows < 10))[:, None] & ((cols >= 0) & (cols < 18))
        assert not dirty[3][hit].isfinite().any() and torch.equal(dirty[3][~hit], zero[3][~hit])
        assert torch.equal(dirty[:3], zero[:3]) and torch.equal(dirty[4], zero[4])


# ---- errors ----

GRID, ROW, TAPS = torch.zeros(2, 5, 4, 8), torch.zeros(8), torch.zeros(8, 3, 3)
POOL_ERRORS: list[tuple[str, Any, str]] = [
    ("weight", torch.zeros(7), r"weight must be of shape \[8\], got float32 of shape \[7\]"),
    ("weight", ROW.half(), "weight must be float32 as x is, or float32, got float16"),
    ("scale", torch.zeros(8, 1), r"scale must be of shape \[8\], got float32 of shape \[8, 1\]"),
    ("scale", ROW.half(), "scale must be float32 as x is, or float32, got float16"),
    ("pool_size", 2, "pool_size must be odd and positive, got 2"),
    ("pool_size", -3, "pool_size must be odd and positive, got -3"),
    ("pool_size", 9, "no kernel: the kernels take stencils of 3, 5 or 7 positions a side"),
    ("pool_size", 1, "no kernel: the kernels take stencils of 3, 5 or 7 positions a side"),
]
DEPTHWISE_ERRORS: list[tuple[str, Any, str]] = [
    ("weight", torch.zeros(7, 3, 3), r"weight must be of shape \[8, k, k\] with an odd k, got \[7, 3, 3\]"),
    ("weight", torch.zeros(8, 3, 5), r"weight must be of shape \[8, k, k\] with an odd k, got \[8, 3, 5\]"),
    ("weight", torch.zeros(8, 4, 4), r"weight must be of shape \[8, k, k\] with an odd k, got \[8, 4, 4\]"),
    ("weight", torch.zeros(8, 9), r"weight must be of shape \[8, k, k\] with an odd k, got \[8, 9\]"),
    ("weight", TAPS.half(), "weight must be float32 as x is, got float16"),
    ("weight", torch.zeros(8, 9, 9), "no kernel: the kernels take stencils of 3, 5 or 7 positions a side"),
    ("weight", torch.zeros(8, 1, 1), "no kernel: the kernels take stencils of 3, 5 or 7 positions a side"),
    ("bias", torch.zeros(3), r"bias must be of shape \[8\], got \[3\]"),
    ("bias", ROW.half(), "bias must be float32 as x is, got float16"),
    ("activation", "silu", 'activation must be "linear", "gelu" or "relu", got \'silu\''),
]
GRID_ERRORS: list[tuple[str, Any, str]] = [
    ("x", torch.zeros(2, 5, 8), r"x must be of shape \[batch, height, width, channels\], got \[2, 5, 8\]"),
    ("x", GRID.int(), "x must be float16, bfloat16, float32 or float64, got int32"),
]


@pytest.mark.parametrize(("name", "value", "message"), [*GRID_ERRORS, *POOL_ERRORS])
def test_bad_input_of_pool_mixer(simt: Any, name: str, value: Any, message: str) -> None:
    arguments: dict[str, Any] = {"x": GRID, "weight": ROW, "scale": ROW} | {name: value}
    with pytest.raises(RuntimeError, match=f"^pool_mixer: {message}"):
        simt.pool_mixer(**arguments)
    with pytest.raises(RuntimeError, match=f"^pool_mixer_backward: {message}"):
        simt.pool_mixer_backward(arguments["x"], **arguments, mean=torch.zeros(2), rstd=torch.ones(2))


@pytest.mark.parametrize(("name", "value", "message"), [*GRID_ERRORS, *DEPTHWISE_ERRORS])
def test_bad_input_of_depthwise_conv2d(simt: Any, name: str, value: Any, message: str) -> None:
    arguments: dict[str, Any] = {"x": GRID, "weight": TAPS, "bias": ROW} | {name: value}
    with pytest.raises(RuntimeError, match=f"^depthwise_conv2d: {message}"):
        simt.depthwise_conv2d(**arguments)
    with pytest.raises(RuntimeError, match=f"^depthwise_conv2d_backward: {message}"):
        simt.depthwise_conv2d_backward(arguments["x"], **arguments)


def test_other_bad_input(simt: Any) -> None:
    half, two = GRID.half(), torch.zeros(2)
    with pytest.raises(RuntimeError, match="scale must be float16 as weight is, got float32"):
        simt.pool_mixer(half, ROW.half(), ROW)
    with pytest.raises(RuntimeError, match=r"eps must not be negative, got -1\.0"):
        simt.pool_mixer(GRID, ROW, eps=-1.0)
    with pytest.raises(RuntimeError, match="no kernel: float64"):
        simt.pool_mixer(GRID.double(), ROW.double())
    with pytest.raises(RuntimeError, match="no kernel: float64"):
        simt.depthwise_conv2d(GRID.double(), TAPS.double())
    for name, change in (("dout", {"dout": GRID[:1]}), ("mean", {"mean": ROW}), ("rstd", {"rstd": two.half()})):
        arguments: dict[str, Tensor] = {"dout": GRID, "x": GRID, "weight": ROW, "mean": two, "rstd": two} | change
        with pytest.raises(RuntimeError, match=f"^pool_mixer_backward: {name} must be float32 of shape"):
            simt.pool_mixer_backward(**arguments, scale=None)
    with pytest.raises(RuntimeError, match=r"dout must be float32 of shape \[2, 5, 4, 8\] as x is, got float16"):
        simt.depthwise_conv2d_backward(half, GRID, TAPS, None)
