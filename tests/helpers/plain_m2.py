"""Monarch Mixer written once more from its formulas, with dense matrices and convolutions as matrices of all pairs.

Weights are mappings from the published names; everything is differentiable by torch's own operations. In float64 that
is the oracle. In float32 it is the eager computation, with FFTs and torch's LayerNorm, which round otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .compare import assert_close
from .fft_conv import points_of

Weights = Mapping[str, Tensor]


def under(weights: Weights, prefix: str) -> dict[str, Tensor]:
    """The weights whose names begin so, without that beginning."""
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}


def monarch_matrix(w1: Tensor, w2: Tensor) -> Tensor:
    """The dense matrix [l s, k p] of the factors w1 [k, q, p] and w2 [l, s, r], filled block by block."""
    (k, q, p), (blocks, s, r) = w1.shape, w2.shape
    rows = []
    for sigma in range(s):
        for lam in range(blocks):
            row = w1.new_zeros(k * p)
            for rho in range(r):
                kappa, theta = divmod(rho * blocks + lam, q)
                row[kappa * p : (kappa + 1) * p] += w2[lam, sigma, rho] * w1[kappa, theta]
            rows.append(row)
    return torch.stack(rows)


def convolution_matrix(k: Tensor, k_reverse: Tensor | None, seqlen: int) -> Tensor:
    """[channels, seqlen, seqlen]: out[i] = sum_{j <= i} k[i - j] v[j] + sum_{j > i} k_reverse[j - i - 1] v[j]."""
    behind = torch.arange(seqlen)[:, None] - torch.arange(seqlen)

    def gathered(taps: Tensor, place: Tensor) -> Tensor:
        known = (place >= 0) & (place < taps.shape[1])
        return torch.where(known, taps[:, place.clamp(0, taps.shape[1] - 1)], taps.new_zeros(()))

    matrix = gathered(k, behind)
    return matrix if k_reverse is None else matrix + gathered(k_reverse, -behind - 1)


def convolved(k: Tensor, k_reverse: Tensor | None, v: Tensor) -> Tensor:
    """v: [batch, seqlen, channels], convolved as `convolution_matrix` says."""
    seqlen = v.shape[1]
    if v.dtype == torch.float64:
        return torch.einsum("dij,bjd->bid", convolution_matrix(k, k_reverse, seqlen), v)
    points = points_of(seqlen)
    spectrum = torch.fft.rfft(k, points)
    if k_reverse is not None:
        spectrum = spectrum + torch.fft.rfft(F.pad(k_reverse.flip(1), (points - k_reverse.shape[1], 0)), points)
    return torch.fft.irfft(torch.fft.rfft(v.transpose(1, 2), points) * spectrum, points)[..., :seqlen].transpose(1, 2)


def taps(weights: Weights, seqlen: int, rev: str = "") -> Tensor:
    """[channels, taps] of an implicit filter, from its trained positions; rev: "_rev" for the other direction."""
    z, t = (weights[f"pos_emb.{name}"][0, :seqlen] for name in ("z", "t"))
    sin = weights["implicit_filter.1.freq"]
    for i in (0, 2, 4):
        mlp = f"implicit_filter{rev}.{i}"
        z = torch.sin(sin * (z @ weights[f"{mlp}.weight"].T + weights[f"{mlp}.bias"]))
    return (z @ weights[f"implicit_filter{rev}.6.weight"].T * torch.exp(-t * weights["modulation.deltas"][0].abs())).T


def long_convolution(weights: Weights, v: Tensor) -> Tensor:
    """conv(v) + D v; v: [batch, seqlen, channels]."""
    seqlen = v.shape[1]
    reverse = taps(weights, seqlen, "_rev") if "implicit_filter_rev.0.weight" in weights else None
    return convolved(taps(weights, seqlen), reverse, v) + weights["bias"] * v


def short_convolution(weights: Weights, x: Tensor) -> Tensor:
    """Causal, three taps a channel; x: [batch, seqlen, channels]."""
    padded = F.pad(x, (0, 0, 2, 0))
    w = weights["weight"][:, 0]
    return sum(w[:, j] * padded[:, j : j + x.shape[1]] for j in range(3)) + weights["bias"]  # type: ignore[return-value]


def layer_norm(weights: Weights, x: Tensor, eps: float) -> Tensor:
    if x.dtype != torch.float64:
        return F.layer_norm(x, x.shape[-1:], weights["weight"], weights["bias"], eps)
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weights["weight"] + weights["bias"]


def linear(weights: Weights, x: Tensor) -> Tensor:
    out = x @ weights["weight"].T
    return out + weights["bias"] if "bias" in weights else out


def mixer(weights: Weights, u: Tensor) -> Tensor:
    """[batch, seqlen, hidden] through in_linear, the short convolution, gates, long convolutions and out_linear."""
    if "layernorm.weight" in weights:
        u = layer_norm(under(weights, "layernorm."), u, 1e-5)
    x1, x2, v = short_convolution(under(weights, "short_filter."), linear(under(weights, "in_linear."), u)).chunk(3, -1)
    y = x2 * gated_convolution(weights, x1 * v)
    if "filter_fn2.bias" in weights:
        y = y + long_convolution(under(weights, "filter_fn2."), u)
    return linear(under(weights, "out_linear."), y)


def gated_convolution(weights: Weights, v: Tensor) -> Tensor:
    """The first long convolution, between causal Monarch matrices where there are any."""
    filters = under(weights, "filter_fn.")
    if "monarch.q0.outer" not in weights:
        return long_convolution(filters, v)
    return monarch_convolution(under(weights, "monarch."), taps(filters, v.shape[1]), v) + filters["bias"] * v


def monarch_convolution(weights: Weights, k: Tensor, v: Tensor) -> Tensor:
    """Q0^-1 [(Q1 v) * (Q2 k)]; v: [batch, seqlen, channels], k: [channels, seqlen]."""
    seqlen = v.shape[1]
    q0, q1, q2 = (triangular(weights[f"{q}.outer"], weights[f"{q}.inner"], seqlen) for q in ("q0", "q1", "q2"))
    w = convolved(k @ q2.T, None, q1 @ v)
    if v.dtype == torch.float64:
        return torch.linalg.inv(q0) @ w
    return torch.linalg.solve_triangular(q0, w, upper=False, unitriangular=True)


def triangular(outer: Tensor, inner: Tensor, seqlen: int) -> Tensor:
    """Q[d + m e, a + m b] = L[d, a] C_a[e, b], entry by entry; what is on and above the diagonals of L and C is I."""
    m = outer.shape[0]
    factor = outer.tril(-1) + torch.eye(m, dtype=outer.dtype)
    blocks = inner.tril(-1) + torch.eye(inner.shape[1], dtype=inner.dtype)
    place = torch.arange(seqlen)
    d, e = place % m, place // m
    return factor[d[:, None], d] * blocks[d[None, :], e[:, None], e]


def mlp(weights: Weights, x: Tensor, eps: float | None) -> Tensor:
    """LayerNorm(x + wo(GELU(a) * b)) with dense matrices; eps None: wo(...) alone."""
    up, down = torch.block_diag(*weights["gated_layers.weight"]), torch.block_diag(*weights["wo.weight"])
    a, b = (x @ up.T).chunk(2, -1)
    gelu = a * (1 + torch.erf(a / math.sqrt(2))) / 2
    out = (gelu * b) @ down.T + weights["wo.bias"]
    return out if eps is None else layer_norm(under(weights, "layernorm."), x + out, eps)


def bert(weights: Weights, ids: Tensor, types: Tensor | None = None, eps: float = 1e-12) -> Tensor:
    """M2-BERT's hidden states, [batch, seqlen, hidden]; names begin as in the model without a head."""
    tables = under(weights, "embeddings.")
    x = tables["word_embeddings.weight"][ids] + tables["position_embeddings.weight"][: ids.shape[1]]
    x = x + tables["token_type_embeddings.weight"][torch.zeros_like(ids) if types is None else types]
    x = layer_norm(under(tables, "LayerNorm."), x, eps)
    for i in range(len({name.split(".")[2] for name in weights if name.startswith("encoder.layer.")})):
        layer = under(weights, f"encoder.layer.{i}.")
        x = mlp(under(layer, "mlp."), mixer(under(layer, "attention."), x), eps)
    return x


def weights_of(module: torch.nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """A module's parameters, leaves that want gradients, and its floating-point buffers, copied in another dtype."""
    weights = {name: p.detach().to(dtype).requires_grad_() for name, p in module.named_parameters()}
    return weights | {name: b.to(dtype) for name, b in module.named_buffers() if b.is_floating_point()}


def check_gradients(
    module: torch.nn.Module,
    losses: Sequence[Tensor],
    oracle: tuple[Weights, Sequence[Tensor]],
    eager: tuple[Weights, Sequence[Tensor]],
) -> None:
    """The gradient of every parameter by itself, by the rule of helpers.compare; none may be left out.

    Those of several losses stand side by side: in a deep model a gradient of few numbers has the rounding of a few
    before it, and which of two computations is luckier in one draw says nothing.
    """
    names = [name for name, _ in module.named_parameters()]

    def gradients(outs: Sequence[Tensor], weights: Weights) -> list[Tensor]:
        of_each = [torch.autograd.grad(out, [weights[name] for name in names], retain_graph=True) for out in outs]
        return [torch.stack(same) for same in zip(*of_each, strict=True)]

    ours = gradients(losses, dict(module.named_parameters()))
    truth, yardstick = (gradients(outs, weights) for weights, outs in (oracle, eager))
    for name, *tensors in zip(names, ours, truth, yardstick, strict=True):
        assert tensors[1].abs().max() > 0, f"{name}: the oracle's gradient is 0, which would show nothing"
        assert_close(name, *tensors, gradient=True)
