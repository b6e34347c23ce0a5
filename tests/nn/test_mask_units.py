"""Attention in mask units against a literal formula in float64: outputs, and each gradient by itself."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from helpers.compare import assert_close
from warpform import Packing
from warpform.nn import MaskUnitAttention, mixers


def literal(module: MaskUnitAttention, hidden: Tensor, images: list[list[int]]) -> Tensor:
    """hidden [units, n, C] -> [units, n / pool, out]: one query after another. images: the units of each image."""
    units, tokens, _ = hidden.shape
    weight, bias = module.qkv.weight, module.qkv.bias
    heads, d, pool = module.num_heads, module.head_dim, module.pool
    q, k, v = (hidden @ weight.t() + bias).view(units, tokens, 3, heads, d).unbind(2)
    rows: dict[tuple[int, int], Tensor] = {}
    for members in images:
        for unit in members:
            for place in range(tokens // pool):
                if module.run is None:
                    keys, values = k[members].flatten(0, 1), v[members].flatten(0, 1)
                else:
                    first = place * pool // module.run * module.run
                    keys, values = (x[unit, first : first + module.run] for x in (k, v))
                mixed = []
                for head in range(heads):
                    best = q[unit, place * pool, head]
                    for other in range(1, pool):
                        candidate = q[unit, place * pool + other, head]
                        best = torch.where(candidate > best, candidate, best)
                    scores = keys[:, head] @ best / math.sqrt(d)
                    mixed.append(torch.softmax(scores, 0) @ values[:, head])
                rows[unit, place] = torch.cat(mixed)
    stacked = [torch.stack([rows[unit, place] for place in range(tokens // pool)]) for unit in range(units)]
    return torch.stack(stacked) @ module.out.weight.t() + module.out.bias


def run(module: MaskUnitAttention, hidden: Tensor, packing: Packing | None = None) -> Tensor:
    out, bias = module(hidden, packing)
    return out if bias is None else out + bias


CASES = {
    "units": (8, 1, 8, None),
    "part_of_a_unit": (4, 1, 8, None),
    "global": (None, 1, 8, None),
    "units_pooled": (8, 4, 12, None),
    "global_pooled": (None, 4, 12, None),
    "global_packed": (None, 1, 8, [2, 0, 3, 1]),
    "global_packed_pooled": (None, 2, 12, [1, 3, 2]),
    "units_packed_pooled": (8, 2, 8, [2, 1, 3]),
}


@pytest.mark.parametrize("longest", (1024, 7), ids=("window_op", "varlen_op"))
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_is_the_formula(
    case: tuple[int | None, int, int, list[int] | None], longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixers, "LONGEST_RUN", longest)
    run_length, pool, out_size, lengths = case
    torch.manual_seed(0)
    module = MaskUnitAttention(6, 2, run_length, out_size=out_size, pool=pool).double()
    if lengths is None:
        hidden, packing, images = torch.randn(2, 3, 8, 6).double(), None, [[0, 1, 2], [3, 4, 5]]
    else:
        packing = Packing.from_lengths(lengths)
        ends = torch.tensor(lengths).cumsum(0).tolist()
        images = [list(range(end - length, end)) for end, length in zip(ends, lengths, strict=True)]
        hidden = torch.randn(1, sum(lengths), 8, 6).double()
    hidden.requires_grad_()
    out, truth = run(module, hidden, packing), literal(module, hidden.flatten(0, 1), images)
    truth = truth.view(*hidden.shape[:2], 8 // pool, out_size)
    assert_close("out", out, truth, truth)
    dout = torch.randn_like(out)
    names, leaves = ["hidden", *dict(module.named_parameters())], [hidden, *module.parameters()]
    own, theirs = (torch.autograd.grad(x, leaves, dout) for x in (out, truth))
    for name, gradient, true in zip(names, own, theirs, strict=True):
        assert_close(name, gradient, true, true, gradient=True)


@pytest.mark.parametrize("run_length", (8, None), ids=("units", "global"))
def test_the_first_of_equal_queries_gets_the_gradient(run_length: int | None) -> None:
    torch.manual_seed(0)
    module = MaskUnitAttention(4, 1, run_length, pool=4).double()
    hidden = torch.randn(1, 2, 8, 4).double()
    hidden[:, :, 1:4] = hidden[:, :, :1]
    hidden.requires_grad_()
    out = run(module, hidden)
    (gradient,) = torch.autograd.grad(out, hidden, torch.randn_like(out))
    # Equal tokens have equal keys and values, and equal gradients through them.
    first, *others = gradient[:, :, :4].unbind(2)
    for other in others[1:]:
        assert_close("others", other, others[0], others[0], gradient=True)
    assert (first - others[0]).abs().amax(-1).min() > 1e-3


def test_the_first_of_equal_tokens_is_the_largest() -> None:
    x = torch.tensor([[1.0, 5.0], [3.0, 5.0], [3.0, 2.0], [0.0, 5.0]], requires_grad=True)
    pooled = mixers.max_of_runs(x, 4)
    (gradient,) = torch.autograd.grad(pooled, x, torch.tensor([[1.0, 2.0]]))
    assert pooled.tolist() == [[3.0, 5.0]]
    assert gradient.tolist() == [[0.0, 2.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_lower_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = MaskUnitAttention(16, 2, 8, pool=4).to(dtype)
    hidden, images = torch.randn(2, 1, 8, 16, dtype=dtype), [[0], [1]]
    truth = literal(copy.deepcopy(module).double(), hidden.double().flatten(0, 1), images)
    eager = literal(module, hidden.flatten(0, 1), images)
    assert_close("out", run(module, hidden).flatten(0, 1), truth, eager)
    with torch.autocast("cpu", torch.bfloat16):
        assert run(module.float(), hidden.float()).dtype == torch.bfloat16


def test_empty_batches() -> None:
    for run_length in (8, None):
        for pool in (1, 4):
            module = MaskUnitAttention(6, 2, run_length, out_size=10, pool=pool)
            assert run(module, torch.randn(0, 3, 8, 6)).shape == (0, 3, 8 // pool, 10)
            packing = Packing.from_lengths([0, 0])
            assert run(module, torch.randn(1, 0, 8, 6), packing).shape == (1, 0, 8 // pool, 10)


def test_arguments() -> None:
    with pytest.raises(ValueError, match="MaskUnitAttention: num_heads must divide out_size 9, got 2"):
        MaskUnitAttention(8, 2, 4, out_size=9)
    with pytest.raises(ValueError, match="pool must be at least 1 and divide run 6, got 4"):
        MaskUnitAttention(8, 2, 6, pool=4)
    for module, shape, text in (
        (
            MaskUnitAttention(8, 2, 4),
            (2, 3, 6, 8),
            "hidden must have a number of tokens a unit that run 4 divides, got 6",
        ),
        (
            MaskUnitAttention(8, 2, 4, pool=2),
            (2, 2, 6, 8),
            "hidden must have a number of tokens a unit that run 4 divides, got 6",
        ),
        (
            MaskUnitAttention(8, 2, pool=4),
            (2, 2, 6, 8),
            "hidden must have a number of tokens a unit that pool 4 divides, got 6",
        ),
        (MaskUnitAttention(8, 2, 4), (2, 8, 8), r"hidden must be \[batch, units, n, channels\], got shape \[2, 8, 8\]"),
    ):
        with pytest.raises(ValueError, match=f"MaskUnitAttention: {text}"):
            module(torch.randn(shape))
