"""The structured matrices nearest to a dense one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _check
from ._dtypes import accumulation_dtype


@torch.no_grad()
def project_to_blockdiag(dense: Tensor, nblocks: int) -> Tensor:
    """The block-diagonal matrix nearest to a dense one in the Frobenius norm: its blocks on the diagonal.

    Args:
        dense: [m, n] of any floating-point dtype.
        nblocks: divides m and n.

    Returns:
        w [nblocks, m / nblocks, n / nblocks] for `blockdiag_multiply`, like dense. No gradient flows through it.

    Raises:
        TypeError: dense is not a floating-point tensor, or nblocks not an int.
        ValueError: dense is not a matrix, or nblocks does not divide its sides.
    """
    op = "project_to_blockdiag"
    _check_dense(op, dense)
    _check_divides(op, "nblocks", nblocks, dense, "sides", dense.shape)
    q, p = (side // nblocks for side in dense.shape)
    return dense.reshape(nblocks, q, nblocks, p).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


@torch.no_grad()
def project_to_monarch(
    dense: Tensor,
    nblocks: int | None = None,
    *,
    k: int | None = None,
    q: int | None = None,
    l: int | None = None,  # noqa: E741 - the definition's name
) -> tuple[Tensor, Tensor]:
    """The Monarch matrix nearest to a dense one in the Frobenius norm (arXiv 2204.00595, section 3.3, for any shape).

    Where rows lambda::l of a Monarch matrix meet the columns of block kappa, it is of the rank |Theta|, with Theta =
    {theta < q : (kappa q + theta) mod l = lambda}, and any such matrix is one. So each of these parts of the dense
    matrix is replaced by its nearest of that rank: with the i-th singular triple (sigma_i, U_i, V_i) and the i-th
    theta_i of Theta,

        w1[kappa, theta_i] = sqrt(sigma_i) V_i,   w2[lambda, :, (kappa q + theta_i) // l] = sqrt(sigma_i) U_i

    Args:
        dense: [m, n] of any floating-point dtype; singular values are computed in float32 at least.
        nblocks: divides m and n: k = l = nblocks and q = min(m, n) / nblocks, as `nn.MonarchLinear` has it.
        k, q, l: all three in place of nblocks: k divides n, l divides m and k q. l need not divide q.

    Returns:
        w1 [k, q, n / k] and w2 [l, m / l, k q / l] for `monarch_multiply`, like dense. A Monarch matrix of these blocks
        gives factors of that same matrix, but for rounding. No gradient flows through it.

    Raises:
        TypeError: dense is not a floating-point tensor, or a count not an int.
        ValueError: dense is not a matrix, or counts do not divide what they have to.
    """
    op = "project_to_monarch"
    _check_dense(op, dense)
    m, n = dense.shape
    if nblocks is not None:
        if not (k is None and q is None and l is None):
            raise ValueError(f"{op}: k, q and l must be None where nblocks is given, got {k}, {q} and {l}")
        _check_divides(op, "nblocks", nblocks, dense, "sides", dense.shape)
        k, q, blocks = nblocks, min(m, n) // nblocks, nblocks
    elif k is None or q is None or l is None:
        raise ValueError(f"{op}: either nblocks or all of k, q and l must be given, got {k}, {q} and {l}")
    else:
        blocks = l
        _check.integer(op, "q", q)
        _check_divides(op, "k", k, dense, "columns", (n,))
        _check_divides(op, "l", blocks, dense, "rows", (m,))
        if q < 0 or k * q % blocks != 0:
            raise ValueError(f"{op}: l must divide k q = {k} * {q}, got {blocks}")
    s, p, r = m // blocks, n // k, k * q // blocks

    # The part of kappa and lambda, [k, l, s, p]; of its singular triples those of the largest values.
    parts = dense.reshape(s, blocks, k, p).permute(2, 1, 0, 3)
    dtype = accumulation_dtype(dense.dtype)
    ranks = -(-q // blocks)
    left, values, right = torch.linalg.svd(parts.to(dtype), full_matrices=False)
    kept = min(ranks, values.size(-1))
    root = values[..., :kept].sqrt()
    lefts, rights = (
        parts.new_zeros((k, blocks, ranks, s), dtype=dtype),
        parts.new_zeros((k, blocks, ranks, p), dtype=dtype),
    )
    lefts[:, :, :kept] = (left[..., :kept] * root.unsqueeze(-2)).mT
    rights[:, :, :kept] = right[..., :kept, :] * root.unsqueeze(-1)

    # Position kappa q + theta = rho l + lambda between the factors; it is the (theta // l)-th of its Theta.
    position = torch.arange(k * q, device=dense.device)
    where = position // max(q, 1), position % blocks, position % max(q, 1) // blocks
    w1 = rights[where].view(k, q, p)
    w2 = lefts[where].view(r, blocks, s).permute(1, 2, 0)
    return w1.to(dense.dtype), w2.to(dense.dtype).contiguous()


def _check_dense(op: str, dense: Any) -> None:
    _check.tensor(op, "dense", dense)
    _check.floating(op, "dense", dense)
    if dense.dim() != 2:
        raise ValueError(f"{op}: dense must be of shape [out, in], got {_check.describe(dense)}")


def _check_divides(op: str, name: str, count: Any, dense: Tensor, what: str, sides: tuple[int, ...]) -> None:
    _check.integer(op, name, count)
    if count < 1 or any(side % count for side in sides):
        raise ValueError(f"{op}: {name} must divide the {what} of dense {list(dense.shape)}, got {count}")
