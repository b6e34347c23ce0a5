"""Products with block-diagonal and Monarch matrices, and Monarch Mixer's gated MLP."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._register import register_op
from .examples import monarch as examples
from .reference import monarch as reference


def _needed(ctx: Any, gradients: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    # A bias that was left out is no input.
    return tuple(g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad, strict=False))


def _bias_fake(w: Tensor, has_bias: bool) -> Tensor:
    return w.new_empty(w.size(0) * w.size(1) if has_bias else 0)


# ---- block-diagonal ----


def _blockdiag_fake(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], w.size(0) * w.size(1)))


def _blockdiag_backward_fake(dout: Tensor, x: Tensor, w: Tensor, has_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), w.new_empty(w.shape), _bias_fake(w, has_bias)


def _blockdiag_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w, bias = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, w)


def _blockdiag_gradient(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    return _needed(ctx, _blockdiag_multiply_backward(dout, *ctx.saved_tensors, ctx.has_bias))


_blockdiag_multiply_backward = register_op(
    "blockdiag_multiply_backward",
    reference=reference.blockdiag_multiply_backward,
    fake=_blockdiag_backward_fake,
    example=examples.blockdiag_multiply_backward,
)
_blockdiag_multiply = register_op(
    "blockdiag_multiply",
    reference=reference.blockdiag_multiply,
    fake=_blockdiag_fake,
    example=examples.blockdiag_multiply,
    backward=_blockdiag_gradient,
    setup_context=_blockdiag_setup,
    autocast=("x", "w", "bias"),
)


def blockdiag_multiply(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """Product with a block-diagonal matrix: out[..., b q + i] = sum_j w[b, i, j] x[..., b p + j] + bias[b q + i].

    Args:
        x: [..., n], float16, bfloat16, float32 or float64; its leading dimensions may be strided.
        w: [nb, q, p] with nb p = n, the blocks, in x's dtype.
        bias: [nb q] in x's dtype, or None.

    Returns:
        [..., nb q] like x. Gradients reach all three, are summed in float32 (float64 for float64) and are the same bit
        by bit in each run. Under autocast all three are cast.

    Raises:
        TypeError: an argument is not a tensor, or of a wrong dtype.
        ValueError: a wrong shape, or tensors on different devices.
    """
    return _blockdiag_multiply(x, w, bias)


# ---- Monarch ----


def _monarch_fake(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], w2.size(0) * w2.size(1)))


def _monarch_backward_fake(dout: Tensor, x: Tensor, w1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), w1.new_empty(w1.shape), w2.new_empty(w2.shape)


def _monarch_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _monarch_gradient(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    return _needed(ctx, _monarch_multiply_backward(dout, *ctx.saved_tensors))


_monarch_multiply_backward = register_op(
    "monarch_multiply_backward",
    reference=reference.monarch_multiply_backward,
    fake=_monarch_backward_fake,
    example=examples.monarch_multiply_backward,
)
_monarch_multiply = register_op(
    "monarch_multiply",
    reference=reference.monarch_multiply,
    fake=_monarch_fake,
    example=examples.monarch_multiply,
    backward=_monarch_gradient,
    setup_context=_monarch_setup,
    autocast=("x", "w1", "w2"),
)


def monarch_multiply(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """Product with a Monarch matrix (arXiv 2204.00595, section 3): two block-diagonal factors, each permuted.

    h[kappa q + theta] = sum_pi w1[kappa, theta, pi] x[kappa p + pi]
    y[sigma l + lambda] = sum_rho w2[lambda, sigma, rho] h[rho l + lambda]

    In the dense matrix of this, block (rows lambda::l, columns of kappa) is of rank q / l. What lies between the
    factors is in no memory that outlives the call, and is computed again for the gradients.

    Args:
        x: [..., n], float16, bfloat16, float32 or float64; its leading dimensions may be strided.
        w1: [k, q, p] with k p = n, in x's dtype.
        w2: [l, s, r] with l r = k q, in x's dtype. l need not divide q, nor equal k.

    Returns:
        [..., l s] like x. Sums are in float32 (float64 for float64) and repeat bit by bit, those of gradients too; h is
        rounded to x's dtype between the products. Under autocast all three are cast.

    Raises:
        TypeError: an argument is not a tensor, or of a wrong dtype.
        ValueError: a wrong shape, or tensors on different devices.
    """
    return _monarch_multiply(x, w1, w2)


# ---- gated MLP ----


def _glu_fake(x: Tensor, w_up: Tensor, w_down: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], w_down.size(0) * w_down.size(1)))


def _glu_backward_fake(
    dout: Tensor, x: Tensor, w_up: Tensor, w_down: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        w_up.new_empty(w_up.shape),
        w_down.new_empty(w_down.shape),
        _bias_fake(w_down, has_bias),
    )


def _glu_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, bias = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(*tensors)


def _glu_gradient(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    return _needed(ctx, _blockdiag_glu_backward(dout, *ctx.saved_tensors, ctx.has_bias))


_blockdiag_glu_backward = register_op(
    "blockdiag_glu_backward",
    reference=reference.blockdiag_glu_backward,
    fake=_glu_backward_fake,
    example=examples.blockdiag_glu_backward,
)
_blockdiag_glu = register_op(
    "blockdiag_glu",
    reference=reference.blockdiag_glu,
    fake=_glu_fake,
    example=examples.blockdiag_glu,
    backward=_glu_gradient,
    setup_context=_glu_setup,
    autocast=("x", "w_up", "w_down", "bias"),
)


def blockdiag_glu(x: Tensor, w_up: Tensor, w_down: Tensor, bias: Tensor | None = None) -> Tensor:
    """Monarch Mixer's gated MLP (arXiv 2310.12109, section 4.1), without its residual and norm.

    z = blockdiag_multiply(x, w_up), of width 2 f
    out = blockdiag_multiply(GELU(z[..., :f]) * z[..., f:], w_down) + bias, with the GELU of erf

    Args:
        x: [..., n], float16, bfloat16, float32 or float64; its leading dimensions may be strided.
        w_up: [nb, 2 f / nb, n / nb], in x's dtype; Monarch Mixer's f is 4 n.
        w_down: [nb', m / nb', f / nb'], in x's dtype, usually of as many blocks.
        bias: [m] in x's dtype, or None.

    Returns:
        [..., m] like x. Sums are in float32 (float64 for float64) and repeat bit by bit, those of gradients too; the
        gated product is rounded to x's dtype before w_down. Under autocast all four are cast.

    Raises:
        TypeError: an argument is not a tensor, or of a wrong dtype.
        ValueError: a wrong shape, or tensors on different devices.
    """
    return _blockdiag_glu(x, w_up, w_down, bias)
