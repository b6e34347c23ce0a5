"""Definitions of block-diagonal and Monarch products (arXiv 2204.00595; Monarch Mixer, arXiv 2310.12109).

A block-diagonal matrix is given by its blocks, w [nblocks, out / nblocks, in / nblocks]. A Monarch matrix is two of
them with a permutation in between and one after: with w1 [k, q, p], w2 [l, s, r] and l r = k q,

    h[kappa q + theta] = sum_pi w1[kappa, theta, pi] x[kappa p + pi]
    y[sigma l + lambda] = sum_rho w2[lambda, sigma, rho] h[rho l + lambda]

On a CPU the batched products read and write strided views, so that blocks are never gathered, and tokens are taken some
at a time, so that what lies between two products stays in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# Tokens that are taken at one time on a CPU. Fewer would read the weights too often, more would fill the cache.
_TOKENS_AT_A_TIME = 256
# Below this, a batched product into a contiguous tensor and a copy are faster than one that writes a strided tensor.
_TOKENS_TO_COPY = 256


def _wide(t: Tensor) -> Tensor:
    """float16 as float32 on a CPU, which multiplies that ten times as fast; everything else as it is."""
    return t.float() if t.dtype == torch.float16 and t.device.type == "cpu" else t


def _column(t: Tensor) -> Tensor:
    """A right factor, contiguous where it is a single column: torch 2.10 multiplies 16-bit matrices by a strided one
    wrongly on some CPUs."""
    return t.contiguous() if t.size(-1) == 1 else t


def _rows(x: Tensor) -> Tensor:
    """[..., n] -> [tokens, n]; a view where strides allow."""
    return x.reshape(math.prod(x.shape[:-1]), x.size(-1))


def _tokens(count: int, device: torch.device) -> Iterator[slice]:
    """Slices of the tokens, each to be taken at one time."""
    step = _TOKENS_AT_A_TIME if device.type == "cpu" else max(1, count)
    for first in range(0, count, step):
        yield slice(first, min(first + step, count))


def _multiply(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [tokens, n] times the block-diagonal w [nb, q, p]: [tokens, nb * q], contiguous."""
    tokens, (nb, q, p) = x.size(0), w.shape
    blocks = x.view(tokens, nb, p).transpose(0, 1)  # [nb, tokens, p]
    w = _column(w.mT)  # [nb, p, q]
    added = None if bias is None else bias.view(nb, 1, q)
    if tokens < _TOKENS_TO_COPY:
        out = torch.bmm(blocks, w) if added is None else torch.baddbmm(added, blocks, w)
        return out.transpose(0, 1).reshape(tokens, nb * q).contiguous()  # q = 1: reshape gives a view
    out = torch.empty((tokens, nb, q), dtype=x.dtype, device=x.device)
    if added is None:
        torch.bmm(blocks, w, out=out.transpose(0, 1))
    else:
        torch.baddbmm(added, blocks, w, out=out.transpose(0, 1))
    return out.view(tokens, nb * q)


def _weight_gradient(dout: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """dw [nb, q, p] from dout [tokens, nb * q] and x [tokens, n]."""
    tokens, (nb, q, p) = x.size(0), w.shape
    return torch.bmm(dout.view(tokens, nb, q).permute(1, 2, 0), _column(x.view(tokens, nb, p).transpose(0, 1)))


# ---- block-diagonal ----


def blockdiag_multiply(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """out[..., b q + i] = sum_j w[b, i, j] x[..., b p + j] + bias[b q + i]."""
    bias = None if bias is None else _wide(bias)
    return _multiply(_wide(_rows(x)), _wide(w), bias).to(x.dtype).view(*x.shape[:-1], w.size(0) * w.size(1))


def blockdiag_multiply_backward(dout: Tensor, x: Tensor, w: Tensor, has_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    """dx = dout times w transposed; dw sums dout x over tokens, dbias sums dout."""
    drows, rows, blocks = map(_wide, (_rows(dout), _rows(x), w))
    dx = _multiply(drows, blocks.mT)
    dw = _weight_gradient(drows, rows, blocks)
    return dx.to(x.dtype).view(x.shape), dw.to(w.dtype), _bias_gradient(drows, w, has_bias)


def _bias_gradient(drows: Tensor, w: Tensor, has_bias: bool) -> Tensor:
    return drows.sum(0).to(w.dtype) if has_bias else w.new_empty(0)


# ---- Monarch ----


def _between(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """h of x [tokens, n], transposed, as the second factor takes it: [l, r, tokens].

    With tokens last, both permutations are of whole rows: strides say where they are, and nothing moves.
    """
    (k, _, p), (lambdas, _, r) = w1.shape, w2.shape
    h = torch.bmm(w1, _column(x.view(x.size(0), k, p).permute(1, 2, 0)))  # [k, q, tokens]
    return _column(h.view(r, lambdas, x.size(0)).transpose(0, 1))


def monarch_multiply(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """y[sigma l + lambda] = sum_rho w2[lambda, sigma, rho] h[rho l + lambda], h = x times the block-diagonal w1."""
    rows, w1, w2 = map(_wide, (_rows(x), w1, w2))
    lambdas, s, _ = w2.shape
    out = torch.empty((rows.size(0), lambdas * s), dtype=x.dtype, device=x.device)
    for some in _tokens(rows.size(0), x.device):
        h = _between(rows[some], w1, w2)
        y = torch.empty((s, lambdas, h.size(2)), dtype=h.dtype, device=x.device)
        torch.bmm(w2, h, out=y.transpose(0, 1))
        out[some] = y.view(s * lambdas, h.size(2)).t()
    return out.view(*x.shape[:-1], lambdas * s)


def monarch_multiply_backward(dout: Tensor, x: Tensor, w1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dw2 = dy h^T by lambda; dh = w2^T dy; dw1 = dh x^T by kappa; dx = w1^T dh. h is made again."""
    drows, rows, first, second = map(_wide, (_rows(dout), _rows(x), w1, w2))
    (k, q, p), (lambdas, s, r), tokens = w1.shape, w2.shape, rows.size(0)
    h = _between(rows, first, second)  # [l, r, tokens]
    dy = _column(drows.t().contiguous().view(s, lambdas, tokens).transpose(0, 1))  # [l, s, tokens]
    dw2 = torch.bmm(dy, _column(h.mT))
    dh = torch.empty((r, lambdas, tokens), dtype=rows.dtype, device=x.device)
    torch.bmm(second.mT, dy, out=dh.transpose(0, 1))
    dh = dh.view(k, q, tokens)
    dw1 = torch.bmm(dh, _column(rows.view(tokens, k, p).transpose(0, 1)))
    dx = torch.empty((tokens, k, p), dtype=rows.dtype, device=x.device)
    torch.bmm(dh.mT, _column(first), out=dx.transpose(0, 1))
    return dx.to(x.dtype).view(x.shape), dw1.to(w1.dtype), dw2.to(w2.dtype)


# ---- gated MLP ----


def blockdiag_glu(x: Tensor, w_up: Tensor, w_down: Tensor, bias: Tensor | None = None) -> Tensor:
    """z = x times w_up, [..., 2 f]; out = (GELU(z[..., :f]) * z[..., f:]) times w_down, + bias."""
    rows, w_up, w_down = map(_wide, (_rows(x), w_up, w_down))
    bias = None if bias is None else _wide(bias)
    width = w_down.size(0) * w_down.size(1)
    out = torch.empty((rows.size(0), width), dtype=x.dtype, device=x.device)
    for some in _tokens(rows.size(0), x.device):
        left, right = _multiply(rows[some], w_up).chunk(2, 1)
        out[some] = _multiply(F.gelu(left).mul_(right), w_down, bias)
    return out.view(*x.shape[:-1], width)


def blockdiag_glu_backward(
    dout: Tensor, x: Tensor, w_up: Tensor, w_down: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """With z = (a, b), g = GELU(a) b and dg = dout times w_down transposed: da = dg b GELU'(a), db = dg GELU(a)."""
    drows, rows, up, down = map(_wide, (_rows(dout), _rows(x), w_up, w_down))
    z = _multiply(rows, up)
    left, right = z.chunk(2, 1)
    gate = F.gelu(left)
    dg = _multiply(drows, down.mT)
    dz = torch.empty_like(z)
    dleft, dright = dz.chunk(2, 1)
    torch.mul(dg, gate, out=dright)
    dw_down = _weight_gradient(drows, gate.mul_(right), down)
    dleft.copy_(torch.ops.aten.gelu_backward(dg.mul_(right), left))
    dw_up = _weight_gradient(dz, rows, up)
    dx = _multiply(dz, up.mT)
    return (
        dx.to(x.dtype).view(x.shape),
        dw_up.to(w_up.dtype),
        dw_down.to(w_down.dtype),
        _bias_gradient(drows, w_down, has_bias),
    )
