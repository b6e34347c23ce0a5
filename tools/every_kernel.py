"""Calls that together launch every kernel of the library, in shapes alone: their tensors are on the meta device.

gates.py plans them with `warpform._C.launch_plan`. The examples of the ops, which the self-test runs, are small; these
are the sizes that other tiles, widths and passes are for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

Call = tuple[str, tuple[Any, ...], dict[str, Any]]

SIXTEEN_BIT = (torch.float16, torch.bfloat16)
FLOATING = (*SIXTEEN_BIT, torch.float32)


def _empty(*sizes: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*sizes, dtype=dtype, device="meta")


def _floats(*sizes: int) -> Tensor:
    return _empty(*sizes, dtype=torch.float32)


def _offsets(batch: int) -> Tensor:
    return _empty(batch + 1, dtype=torch.int32)


def every_call() -> Iterator[Call]:
    """The examples of all ops in each dtype that has kernels, then the calls of this file."""
    yield from _examples()
    for calls in (
        _attention, _steps, _windows, _mixes, _packing, _norm, _monarch, _fft_conv, _spatial, _routing
    ):  # fmt: skip
        yield from calls()


def _examples() -> Iterator[Call]:
    import warpform._C as module
    import warpform.ops  # noqa: F401 (registers them)
    from warpform.ops._register import ops

    rows = module.kernel_table()
    for name, op in ops().items():
        found = {str(row.get("dtype", "any")) for row in rows if row["op"] == name}
        for dtype in FLOATING:
            if {"any", str(dtype).removeprefix("torch.")} & found:
                for call in op.calls(dtype):
                    yield name, call.args, call.kwargs


def _attention() -> Iterator[Call]:
    for dtype in SIXTEEN_BIT:
        for head_dim in (32, 64, 96, 128, 256):
            for seqlen, softcap in (
                (64, 0.0), (64, 30.0), (64, 500.0), (256, 0.0), (4096, 0.0), (4096, 30.0), (4096, 500.0),
            ):  # fmt: skip
                q = _empty(8 * seqlen, 16, head_dim, dtype=dtype)
                cu = _offsets(8)
                sizes = (cu, cu, seqlen, seqlen)
                lse = _floats(16, 8 * seqlen)
                yield "varlen_attention", (q, q, q, *sizes), {"softcap": softcap}
                for deterministic in (False, True):
                    options = {"softcap": softcap, "deterministic": deterministic}
                    yield "varlen_attention_backward", (q, None, q, q, q, q, lse, *sizes), options


def _steps() -> Iterator[Call]:
    for dtype in SIXTEEN_BIT:
        for head_dim in (64, 128):
            for seqlen in (64, 4096):
                q = _empty(1, seqlen, 16, head_dim, dtype=dtype)
                lse = _floats(1, 16, seqlen)
                yield "attention_step", (q, q, q), {}
                for deterministic in (False, True):
                    yield "attention_step_backward", (q, lse, q, q, q, lse), {"deterministic": deterministic}


def _windows() -> Iterator[Call]:
    for dtype in SIXTEEN_BIT:
        for head_dim in (32, 64, 128):
            for side in (7, 12):
                out = _empty(8, 8 * side, 8 * side, 4 * head_dim, dtype=dtype)
                qkv = _empty(8, 8 * side, 8 * side, 3, 4, head_dim, dtype=dtype)
                lse = _floats(8, 64, 4, side * side) if side * side > 64 else _floats(0)
                windows = ([side, side], [side // 2, side // 2])
                for table_dtype in (dtype, torch.float32):
                    table = _empty((2 * side - 1) ** 2, 4, dtype=table_dtype)
                    yield "window_attention", (qkv, table, None, None, *windows), {}
                    yield "window_attention_backward", (out, qkv, table, None, None, out, lse, *windows), {}


def _mixes() -> Iterator[Call]:
    """Tokens that lie whole in a tile, and others; windows of several tiles, up to what every GPU has memory for."""
    for dtype in FLOATING:
        for side, channels in ((8, 32), (8, 256), (16, 64), (16, 96)):
            x = _empty(2, 4 * side, 4 * side, channels, dtype=dtype)
            weight, bias = _empty(side**2, side**2, dtype=dtype), _empty(side**2, dtype=dtype)
            norm, row = _floats(channels), _floats(2 * 16 * side**2)
            for gate in (None, x):
                tensors = (x, weight, bias, norm, norm, gate)
                yield "window_mix", (*tensors, [side, side]), {}
                yield "window_mix_backward", (x, *tensors, row, row, [side, side]), {}


def _packing() -> Iterator[Call]:
    for dtype in (torch.bool, torch.int32, torch.int64):
        for seqlen in (512, 4096):
            yield "packing_plan", (_empty(16, seqlen, dtype=dtype), 16 * seqlen), {}
    for dtype, widths in (
        (torch.uint8, (3, 999)),
        (torch.float16, (3, 999)),
        (torch.float32, (3, 999)),
        (torch.float64, (3, 999)),
        (torch.float32, (8, 1024)),
    ):
        for width in widths:
            indices, ranks = _empty(100, dtype=torch.int64), _empty(16, 16, dtype=torch.int32)
            yield "pack", (_empty(16, 16, width, dtype=dtype), indices, ranks), {}
            yield "unpack", (_empty(100, width, dtype=dtype), indices, ranks), {}


def _norm() -> Iterator[Call]:
    for dtype in FLOATING:
        for width in (128, 192, 256, 512, 768, 1024, 2048, 4096, 8192, 16384, 1021, 4093, 8191):
            x, weight, row = _empty(4096, width, dtype=dtype), _empty(width, dtype=dtype), _floats(4096)
            yield "add_bias_residual_layer_norm", (x, weight, x, weight, weight), {}
            yield "add_bias_residual_layer_norm_backward", (x, None, x, weight, row, row), {}
            yield "add_residual_rms_norm", (x, x, weight), {}
            yield "add_residual_rms_norm_backward", (x, None, x, weight, row), {}
            for approximate in ("none", "tanh"):
                yield "rms_norm_gelu", (x, None, 0.0, approximate), {}
                yield "rms_norm_gelu_backward", (x, x, None, 0.0, approximate), {}


def _monarch() -> Iterator[Call]:
    for dtype in SIXTEEN_BIT:
        for rows, nblocks, width in (
            (64, 4, 192),
            (64, 16, 64),
            (64, 8, 512),
            (8192, 4, 192),
            (8192, 4, 256),
            (8192, 8, 128),
            (8192, 4, 512),
            (8192, 32, 32),
        ):
            x = _empty(rows, nblocks * width, dtype=dtype)
            square = _empty(nblocks, width, width, dtype=dtype)
            yield "blockdiag_multiply", (x, square), {}
            yield "blockdiag_multiply_backward", (x, x, square, True), {}
            yield "monarch_multiply", (x, square, square), {}
            yield "monarch_multiply_backward", (x, x, square, square), {}
            up = _empty(nblocks, 4 * width, width, dtype=dtype)
            # The second pair of factors has no fused kernel: blocks of the one are not those of the other.
            for down in (
                _empty(nblocks, width, 2 * width, dtype=dtype),
                _empty(nblocks // 2, 2 * width, 4 * width, dtype=dtype),
            ):
                yield "blockdiag_glu", (x, up, down), {}
                yield "blockdiag_glu_backward", (x, x, up, down, True), {}


def _fft_conv() -> Iterator[Call]:
    for dtype in SIXTEEN_BIT:
        for points in (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536):
            u = _empty(4, 64, points // 2, dtype=dtype)
            spectrum, skip = _floats(64, points // 2 + 1, 2), _floats(64)
            yield "spectral_conv", (u, spectrum, skip, u, u), {}
            yield "spectral_conv_backward", (u, u, spectrum, skip, u, u), {}


def _spatial() -> Iterator[Call]:
    """The stages of PoolFormer at 224 x 224 and of MiT at 512 x 512."""
    for dtype in FLOATING:
        for size in (3, 5, 7):
            for side, channels in ((56, 64), (7, 512)):
                x, row = _empty(32, side, side, channels, dtype=dtype), _empty(channels, dtype=dtype)
                yield "pool_mixer", (x, row, row), {"pool_size": size}
                yield "pool_mixer_backward", (x, x, row, row, _floats(32), _floats(32)), {"pool_size": size}
            for side, channels in ((128, 256), (16, 2048)):
                x, row = _empty(4, side, side, channels, dtype=dtype), _empty(channels, dtype=dtype)
                taps = _empty(channels, size, size, dtype=dtype)
                for activation in ("linear", "gelu"):
                    yield "depthwise_conv2d", (x, taps, row), {"activation": activation}
                    yield "depthwise_conv2d_backward", (x, x, taps, row), {"activation": activation}


def _routing() -> Iterator[Call]:
    """Up to the most groups, whose gates take the most shared memory, and the longest list of tiles of a split."""
    tile, dense = 128, 1024
    for dtype in SIXTEEN_BIT:
        for tokens, groups in ((1, 16), (4, 16), (256, 16), (4096, 16), (4096, 64), (1_000_000, 64)):
            tiles, hidden = -(-tokens // tile) + 1, 64 * groups
            mask, inverse = _empty(tokens, dtype=torch.int64), _empty(tokens, dtype=torch.int32)
            perm, tile_class = _empty(tiles * tile, dtype=torch.int32), _empty(tiles, dtype=torch.int32)
            tile_mask = _empty(tiles, dtype=torch.int64)
            plan = (mask, perm, inverse, tile_mask, tile_class, None, groups, 1)
            routed, full = _empty(tokens, hidden, dtype=dtype), _empty(tokens, dense, dtype=dtype)
            gather, scatter = _empty(dense, hidden, dtype=dtype), _empty(hidden, dense, dtype=dtype)
            yield "routing_plan", (mask, None, groups, 1, tile), {}
            for gates in (None, _floats(tokens, groups)):
                ungated = None if gates is None else routed
                yield "hidden_gather_linear", (routed, gather, gates, None, *plan), {}
                yield "hidden_gather_linear_backward", (full, routed, gather, gates, *plan), {}
                yield "hidden_scatter_linear", (full, scatter, gates, None, gates is not None, *plan), {}
                yield "hidden_scatter_linear_backward", (routed, ungated, scatter, gates, *plan), {}
                for routed_out, x, dy in ((False, routed, full), (True, full, routed)):
                    yield "hidden_weight_grad", (x, dy, gates, routed_out, *plan), {}
