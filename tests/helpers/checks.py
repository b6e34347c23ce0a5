"""Whole checks of one op on one case. `library` is torch.ops.warpform or torch.ops.warpform_simt.

Forward and backward are called as ops, so an implementation without autograd is checked by the same lines.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import cases, oracle
from .compare import assert_close


def _largest(t: Tensor) -> float:
    return float(t.abs().max()) if t.numel() else 0.0


def check_packing_plan(
    library: Any, case: cases.MaskCase, device: str = "cpu", dtype: torch.dtype = torch.bool
) -> None:
    """packing_plan against a plan made token by token."""
    mask = case.mask(device)
    capacity = mask.numel() if case.capacity is None else case.capacity
    expected = oracle.packing_plan(mask.tolist(), capacity)
    plan = library.packing_plan(mask.to(dtype), capacity)
    dtypes = (torch.int32, torch.int32, torch.int64, torch.int64, torch.int32, torch.int64)
    for (name, value), tensor, expected_dtype in zip(expected.items(), plan, dtypes, strict=True):
        assert tensor.dtype == expected_dtype and tensor.is_contiguous(), name
        assert tensor.tolist() == value, name


def check_pack(library: Any, case: cases.MaskCase, rows: cases.RowCase, device: str = "cpu") -> None:
    """pack and unpack, bit by bit; whatever masked places hold goes nowhere."""
    mask = case.mask(device)
    capacity = mask.numel() if case.capacity is None else case.capacity
    plan = oracle.packing_plan(mask.tolist(), capacity)
    indices = torch.tensor(plan["indices"], dtype=torch.int64, device=device)
    ranks = torch.tensor(plan["ranks"], dtype=torch.int32, device=device).view(mask.shape)
    x = (100 * cases.random(*mask.shape, *rows.trailing, dtype=torch.float32, device=device)).to(rows.dtype)
    if rows.dtype.is_floating_point:
        x[mask == 0] = float("nan")

    packed = library.pack(x, indices, ranks)
    assert torch.equal(packed, oracle.pack(x, plan["indices"]))
    restored = library.unpack(packed, indices, ranks)
    kept = (ranks >= 0).view(*mask.shape, *[1] * len(rows.trailing))
    assert torch.equal(restored, torch.where(kept, x, torch.zeros((), dtype=x.dtype, device=device)))
    assert packed.is_contiguous() and restored.is_contiguous()


def check_attention(
    library: Any, case: cases.AttentionCase, dtype: torch.dtype, device: str = "cpu", *, backward: bool = True
) -> None:
    """varlen_attention and, with and without a gradient of lse, its backward."""
    inputs = cases.attention_inputs(case, dtype, device)
    arguments = (inputs.cu_seqlens_q, inputs.cu_seqlens_k, inputs.max_seqlen_q, inputs.max_seqlen_k)
    out, lse = library.varlen_attention(inputs.q, inputs.k, inputs.v, *arguments, **inputs.options)
    assert out.is_contiguous() and out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)

    expected = _attention_oracle(case, inputs, torch.float64)
    eager = _attention_oracle(case, inputs, dtype)
    assert_close("out", out, expected[0], eager[0])
    assert_close("lse", lse, expected[1], eager[1])
    if not backward:
        return

    cancelled: list[bool] = []
    for dlse in (None, inputs.dlse):
        gradients = library.varlen_attention_backward(
            inputs.dout, dlse, inputs.q, inputs.k, inputs.v, out, lse, *arguments, **inputs.options
        )
        truths = _attention_gradients(case, inputs, dlse)
        clean = [torch.nan_to_num(t) for t in (inputs.dout, inputs.q, inputs.k, inputs.v)]
        yardsticks = oracle.varlen_attention_gradients(
            clean[0], dlse, *clean[1:], list(case.lengths_q), list(case.keys), **inputs.oracle_options
        )
        # P = exp(score - lse) has a relative error of eps(lse) * (|score| + |lse|). Where every query sees one key, the
        # eager one is exact by luck and the part of dq, dk that comes from out cancels to zero, so the size of the
        # largest gradient stands for theirs.
        finite = expected[1][expected[1].isfinite()]
        growth = 1 + 2 * _largest(finite) * torch.finfo(lse.dtype).eps / torch.finfo(dtype).eps
        sizes = [_largest(t) for t in truths]
        if dlse is None:
            cancelled = [size == 0 for size in sizes]
        sizes = [max(sizes) if zero else size for size, zero in zip(sizes, cancelled, strict=True)]
        results = zip(("dq", "dk", "dv"), gradients, truths, yardsticks, sizes, strict=True)
        for name, g, truth, yardstick, size in results:
            assert g.dtype == dtype and g.is_contiguous(), name
            name = f"{name} ({'with' if dlse is not None else 'without'} dlse)"
            assert_close(name, g, truth, yardstick, gradient=True, scale=growth * size)


def _attention_oracle(
    case: cases.AttentionCase, inputs: cases.AttentionInputs, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    tensors = (t.detach().to(dtype) for t in (inputs.q, inputs.k, inputs.v))
    return oracle.varlen_attention(*tensors, list(case.lengths_q), list(case.keys), **inputs.oracle_options)


def _attention_gradients(
    case: cases.AttentionCase, inputs: cases.AttentionInputs, dlse: Tensor | None
) -> tuple[Tensor, ...]:
    """dq, dk, dv in float64, by autograd through the oracle."""
    leaves = [t.detach().to(torch.float64, copy=True).requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
    out, lse = oracle.varlen_attention(*leaves, list(case.lengths_q), list(case.keys), **inputs.oracle_options)
    rows = sum(case.lengths_q)
    loss = (out[:rows] * inputs.dout[:rows].double()).sum()
    if dlse is not None:
        alive = lse.isfinite()
        loss = loss + (lse[alive] * dlse.double()[alive]).sum()
    if not loss.requires_grad:
        return tuple(torch.zeros_like(leaf) for leaf in leaves)
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    return tuple(torch.zeros_like(leaf) if g is None else g for g, leaf in zip(gradients, leaves, strict=True))


# Equal lengths side by side and apart, so that grouping could mix them up.
LENGTHS_ALIKE = (5, 20, 3, 20, 3, 40)


def check_bad_values_stay(
    inputs: tuple[Tensor, Tensor, Tensor], bad: float, call: Callable[..., tuple[Tensor, ...]]
) -> None:
    """Puts `bad` into the second of sequences of LENGTHS_ALIKE and into the two rows past the end.

    Args:
        inputs: q, k, v [93, H, D] as call() has them; they are written to.
        call: called with the changed q, k and v by name; returns out, lse, dq, dk, dv and more that is not looked at.
    """
    q, k, v = inputs
    end, total = sum(LENGTHS_ALIKE), q.size(0)
    clean = call()
    for t in inputs:
        t[5:25] = bad
        t[end:] = bad
    dirty = call(q=q, k=k, v=v)
    rows = torch.ones(total, dtype=torch.bool, device=q.device)
    rows[5:25] = False
    for before, after in zip((clean[0], clean[1].T, *clean[2:5]), (dirty[0], dirty[1].T, *dirty[2:5]), strict=True):
        assert torch.equal(before[rows], after[rows])
    for t in (dirty[0], *dirty[2:5]):
        assert (t[end:] == 0).all()


def check_disentangled_attention(
    library: Any, case: cases.DisentangledCase, dtype: torch.dtype, device: str = "cpu", *, backward: bool = True
) -> None:
    """disentangled_attention and its backward, all five gradients."""
    x = cases.disentangled_inputs(case, dtype, device)
    arguments = (x.q, x.k, x.v, x.pos_key, x.pos_query)
    where = (x.cu_seqlens, x.max_seqlen)
    out, lse = library.disentangled_attention(*arguments, *where, **x.options)
    assert out.is_contiguous() and out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)

    lengths = list(case.lengths)
    exact = [None if t is None else t.detach().to(torch.float64, copy=True).requires_grad_() for t in arguments]
    expected = oracle.disentangled_attention(*exact, lengths, **x.options)
    eager = oracle.disentangled_attention(*arguments, lengths, **x.options)
    assert_close("out", out, expected[0], eager[0])
    assert_close("lse", lse, expected[1], eager[1])
    if not backward:
        return

    gradients = library.disentangled_attention_backward(x.dout, *arguments, out, lse, *where, **x.options)
    leaves = [t for t in exact if t is not None]
    tokens = sum(lengths)
    loss = (expected[0][:tokens] * x.dout[:tokens].double()).sum()
    found = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else [None] * len(leaves)
    truths = {id(leaf): torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)}
    yardsticks = oracle.disentangled_attention_gradients(x.dout, *arguments, lengths, **x.options)
    # As in check_attention: P = exp(score - lse), and gradients that cancel to zero.
    finite = expected[1].detach()[expected[1].isfinite()]
    growth = 1 + 2 * _largest(finite) * torch.finfo(lse.dtype).eps / torch.finfo(dtype).eps
    largest = max(_largest(t) for t in truths.values())
    names = ("dq", "dk", "dv", "dpos_key", "dpos_query")
    for name, leaf, g, yardstick in zip(names, exact, gradients, yardsticks, strict=True):
        assert g.dtype == dtype and g.is_contiguous(), name
        if leaf is None:
            assert g.shape == (0,), name
            continue
        truth = truths[id(leaf)]
        assert_close(name, g, truth, yardstick, gradient=True, scale=growth * (_largest(truth) or largest))


def check_window_attention(
    library: Any, case: cases.WindowCase, dtype: torch.dtype, device: str = "cpu", *, backward: bool = True
) -> None:
    """window_attention and its backward, every gradient by itself."""
    inputs = cases.window_inputs(case, dtype, device)
    out, lse = library.window_attention(*inputs.tensors, **inputs.options)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert out.dtype == dtype and out.is_contiguous() and lse.dtype == wide and lse.is_contiguous()

    truth, truths = window_oracle(inputs, torch.float64, backward)
    eager, yardsticks = window_oracle(inputs, dtype, backward)
    # A score is rounded to eps(score) * |score|, and out inherits it: cosines times 100 are as large as scores get.
    largest_lse = _largest(truth[1][truth[1].isfinite()])  # rows that see no key have -inf
    growth = 1 + 2 * largest_lse * torch.finfo(wide).eps / torch.finfo(dtype).eps
    assert_close("out", out, truth[0], eager[0], scale=growth * _largest(truth[0]) if case.cosine else 0.0)
    if case.tokens > 64:
        assert_close("lse", lse, truth[1], eager[1])
    else:
        assert lse.shape == (0,)
    if not backward:
        return

    dqkv, *others = library.window_attention_backward(inputs.dout, *inputs.tensors, out, lse, **inputs.options)
    assert dqkv.dtype == dtype and dqkv.is_contiguous()
    gradients = dict(zip(("dq", "dk", "dv"), dqkv.unbind(-3), strict=True))
    for name, g, given in zip(("dtable", "dlogit_scale", "dqkv_bias"), others, inputs.tensors[1:], strict=True):
        if given is None:
            assert g.shape == (0,), name
        else:
            assert g.dtype == given.dtype and g.is_contiguous(), name
            gradients[name] = g
    # As in check_attention: probabilities that are made again from lse, and gradients that cancel to zero, of one token
    # a window for instance.
    largest = max(_largest(t) for t in truths.values())
    sizes = {name: _largest(t) or largest for name, t in truths.items()}
    if case.cosine:
        sizes["dlogit_scale"] = max(sizes["dlogit_scale"], _window_logit_terms(case, inputs))
    scales = {name: growth * size for name, size in sizes.items()}
    if case.tokens > 64:
        scales["dq"] += _largest(window_error_inherited_by_dq(inputs, out, truth[0])) / torch.finfo(dtype).eps
    for name, g in gradients.items():
        assert_close(name, g, truths[name], yardsticks[name], gradient=True, scale=scales[name])


def window_error_inherited_by_dq(inputs: cases.WindowInputs, out: Tensor, exact: Tensor) -> Tensor:
    """The error of dq, [batch, *grid, heads, head_dim], that begins in the output as saved and not in the backward.

    dS = P (dP - delta), delta = rowsum(dout * out). An output that is off by r makes delta of a query off by
    e = rowsum(dout * r), its row of dS by -e P, and its dq by -e sum_j P_ij d(score_ij)/dq = -e d(lse)/dq. All of it is
    known, and a backward that reads no output only has that much more room.
    """
    qkv, *others = (None if t is None else t.detach().double() for t in inputs.tensors)
    assert qkv is not None
    qkv.requires_grad_()
    _, lse = oracle.window_attention(qkv, *others, **inputs.options)
    (gradient,) = torch.autograd.grad(lse.sum(), qkv)  # a query is in its own row's lse alone
    dq = gradient.unbind(-3)[0]
    e = (inputs.dout.double() * (out.double() - exact)).view(*dq.shape).sum(-1, keepdim=True)
    return -e * dq


def _window_logit_terms(case: cases.WindowCase, inputs: cases.WindowInputs) -> float:
    """The root of the sum of squares of what a head's gradient of logit_scale adds up.

    It is one number for thousands of scores, of either sign: their rounding errors add up to this times that of one,
    whatever is left of the sum itself.
    """
    tensors = [None if t is None else t.detach().double() for t in inputs.tensors]
    assert tensors[2] is not None
    shape = (case.batch, case.windows, case.heads, case.tokens, case.tokens)
    tensors[2] = tensors[2][:, None, None].expand(shape).clone().requires_grad_()
    out, _ = oracle.window_attention(*tensors, **inputs.options)
    (terms,) = torch.autograd.grad((out * inputs.dout.double()).sum(), tensors[2])
    return _largest(terms.square().sum((0, 1, 3, 4)).sqrt())


def window_oracle(
    inputs: cases.WindowInputs, dtype: torch.dtype, backward: bool
) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
    """out and lse, and the gradients by name."""
    tensors = [None if t is None else t.detach().to(dtype, copy=True) for t in inputs.tensors]
    leaves = [t.requires_grad_(backward) for t in tensors if t is not None]
    out, lse = oracle.window_attention(*tensors, **inputs.options)
    result = out.detach(), lse.detach()
    if not backward:
        return result, {}
    found = iter(torch.autograd.grad((out * inputs.dout.to(dtype)).sum(), leaves, allow_unused=True))
    dqkv, dtable, dlogit_scale, dqkv_bias = (
        None if t is None else torch.zeros_like(t) if (g := next(found)) is None else g for t in tensors
    )
    assert dqkv is not None
    named = {"dtable": dtable, "dlogit_scale": dlogit_scale, "dqkv_bias": dqkv_bias}
    gradients = dict(zip(("dq", "dk", "dv"), dqkv.unbind(-3), strict=True))
    return result, gradients | {name: g for name, g in named.items() if g is not None}


def check_layer_norm(
    library: Any, case: cases.LayerNormCase, dtype: torch.dtype, device: str = "cpu", *, backward: bool = True
) -> None:
    """add_bias_residual_layer_norm, its sum and statistics, and its backward with and without a gradient of the sum."""
    inputs = cases.layer_norm_inputs(case, dtype, device)
    arguments = (inputs.x, inputs.bias, inputs.residual, inputs.weight, inputs.ln_bias)
    out, total, mean, rstd = library.add_bias_residual_layer_norm(*arguments, case.eps, return_sum=True)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = _layer_norm_oracle(case, inputs, torch.float64)
    eager = _layer_norm_oracle(case, inputs, dtype)
    assert out.dtype == total.dtype == dtype and out.is_contiguous() and total.is_contiguous()
    assert mean.dtype == rstd.dtype == wide
    rows = expected[1].reshape(out.numel() // case.shape[-1], case.shape[-1])
    eager_rows = _layer_norm_oracle(case, inputs, wide)[1].reshape(rows.shape)
    centred = (r - r.mean(-1, keepdim=True) for r in (rows, eager_rows))
    truth, yardstick = (1 / torch.sqrt((c * c).mean(-1) + case.eps) for c in centred)
    # Rounding of the mean reaches rstd, and (sum - mean) * rstd, as eps(mean) * |sum| * rstd; out adds such terms up.
    steepness = _largest(rows) * _largest(truth)
    finer = torch.finfo(wide).eps / torch.finfo(dtype).eps
    growth = 1 + steepness * finer
    terms = steepness * _largest(inputs.weight) + _largest(inputs.ln_bias)
    assert_close("out", out, expected[0], eager[0], scale=_largest(expected[0]) + finer * terms)
    assert_close("sum", total, expected[1], eager[1])
    assert_close("mean", mean, rows.mean(-1), eager_rows.mean(-1), scale=_largest(rows))
    assert_close("rstd", rstd, truth, yardstick, scale=_largest(truth) * max(1.0, steepness))

    without = library.add_bias_residual_layer_norm(*arguments, case.eps)
    assert torch.equal(without[0], out) and without[1].shape == (0,) and without[1].dtype == dtype
    # Where the variance of a row is nothing but rounding, so is the gradient.
    if not backward or case.no_variance:
        return

    # The gradient is a function of the sum as it was rounded, so the statistics are that sum's here.
    _, _, mean, rstd = library.add_bias_residual_layer_norm(total, None, None, inputs.weight, inputs.ln_bias, case.eps)
    rows = total.double().reshape(rows.shape)
    centre = rows - rows.mean(-1, keepdim=True)
    steepest = 1 / torch.sqrt((centre * centre).mean(-1, keepdim=True) + case.eps)
    growth = 1 + _largest(rows) * _largest(steepest) * finer
    # What is added up may cancel: dx with two columns, sums over rows with few rows; these are made in the wide dtype.
    dout = inputs.dout.double().reshape(rows.shape)
    terms = (dout * inputs.weight.double() * steepest).abs()
    summed = (terms, dout * centre * steepest, dout)
    sizes = (_largest(terms), *(finer * _largest(t.abs().sum(0)) for t in summed))
    for dsum in (None, inputs.dsum):
        gradients = library.add_bias_residual_layer_norm_backward(inputs.dout, dsum, total, inputs.weight, mean, rstd)
        truths = _layer_norm_gradients(case, inputs, total, dsum, torch.float64)
        yardsticks = _layer_norm_gradients(case, inputs, total, dsum, dtype)
        names = ("dx", "dbias", "dweight", "dln_bias")
        for name, g, truth, yardstick, size in zip(names, gradients, truths, yardsticks, sizes, strict=True):
            assert g.dtype == (dtype if name == "dx" else inputs.weight.dtype), name
            assert g.is_contiguous(), name
            name = f"{name} ({'with' if dsum is not None else 'without'} dsum)"
            assert_close(name, g, truth, yardstick, gradient=True, scale=growth * max(_largest(truth), size))


def _layer_norm_oracle(
    case: cases.LayerNormCase, inputs: cases.LayerNormInputs, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    tensors = (inputs.x, inputs.bias, inputs.residual, inputs.weight, inputs.ln_bias)
    return oracle.add_bias_residual_layer_norm(*(None if t is None else t.to(dtype) for t in tensors), case.eps)


def _layer_norm_gradients(
    case: cases.LayerNormCase, inputs: cases.LayerNormInputs, total: Tensor, dsum: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    # The backward is a function of the sum as it was saved, rounded: that is where both start from.
    total = total.detach().to(dtype, copy=True).requires_grad_()
    bias, weight, ln_bias = (
        t.detach().to(dtype, copy=True).requires_grad_()
        for t in (torch.zeros_like(inputs.weight), inputs.weight, inputs.ln_bias)
    )
    out, total_again = oracle.add_bias_residual_layer_norm(total, bias, None, weight, ln_bias, case.eps)
    loss = (out * inputs.dout.to(dtype)).sum()
    if dsum is not None:
        loss = loss + (total_again * dsum.to(dtype)).sum()
    return torch.autograd.grad(loss, (total, bias, weight, ln_bias))


def check_gelu(
    library: Any,
    case: cases.GeluCase,
    approximate: str,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    backward: bool = True,
) -> None:
    """bias_gelu and its backward."""
    x, bias, dout = cases.gelu_inputs(case, dtype, device)
    out = library.bias_gelu(x, bias, approximate)
    results = []
    for computed_in in (torch.float64, dtype):
        leaves = [t.detach().to(computed_in, copy=True).requires_grad_() for t in (x, bias) if t is not None]
        result = oracle.bias_gelu(leaves[0], leaves[1] if bias is not None else None, approximate)
        gradients = torch.autograd.grad((result * dout.to(computed_in)).sum(), leaves)
        results.append((result, *gradients))
    assert out.dtype == dtype and out.is_contiguous()
    assert_close("out", out, results[0][0], results[1][0])
    if not backward:
        return
    dx, dbias = library.bias_gelu_backward(dout, x, bias, approximate)
    assert dx.dtype == dtype and dx.is_contiguous()
    assert_close("dx", dx, results[0][1], results[1][1], gradient=True)
    if bias is None:
        assert dbias.shape == (0,)
    else:
        assert dbias.dtype == bias.dtype
        # The sum over rows may cancel; it is made in float32 at least.
        finer = torch.finfo(dtype).eps if dtype == torch.float64 else torch.finfo(torch.float32).eps
        terms = results[0][1].reshape(-1, x.size(-1)).abs().sum(0)
        scale = _largest(terms) * finer / torch.finfo(dtype).eps
        assert_close("dbias", dbias, results[0][2], results[1][2], gradient=True, scale=scale)
