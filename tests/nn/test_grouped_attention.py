"""Attention in groups of adjacent tokens against its formula: groups, permutations, and heads that are widened."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.compare import assert_close
from helpers.identities import assert_same
from warpform.nn import GroupedAttention, mixers


def made(width: int = 12, heads: int = 2, groups: Any = (4, 2), **options: Any) -> GroupedAttention:
    torch.manual_seed(0)
    attention = GroupedAttention(width, heads, groups, **options)
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.5)
    return attention.double()


def formula(attention: GroupedAttention, x: Tensor, groups: int, order: Tensor | None = None) -> Tensor:
    """Pairs of one group by a mask over all pairs: token order[i] is in group i // (tokens / groups)."""
    rows = x.flatten(1, -2)
    batch, tokens, width = rows.shape
    order = torch.arange(tokens) if order is None else order
    group = torch.empty(tokens, dtype=torch.int64)
    group[order] = torch.arange(tokens) // (tokens // groups)
    q, k, v = attention.qkv(rows).view(batch, tokens, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    scores = q @ k.mT / (width // attention.num_heads) ** 0.5
    scores = scores.masked_fill(group.unsqueeze(1) != group, -torch.inf)
    out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return attention.out(out).view_as(x)


def whole(attention: GroupedAttention, x: Tensor, **options: Any) -> Tensor:
    out, bias = attention(x, **options)
    return out if bias is None else out + bias


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("width", "heads"), [(12, 2), (16, 2), (126, 3)])
def test_it_is_the_formula(width: int, heads: int, bias: bool) -> None:
    """Heads of 6, 8 and 42 dimensions; the grid is 4 x 6, so that groups are parts of rows, rows, or several."""
    attention = made(width, heads, (8, 6, 2, 1), permute="never", qkv_bias=bias)
    x = torch.randn(2, 4, 6, width, dtype=torch.float64, requires_grad=True)
    parameters = [x, *attention.parameters()]
    assert attention.qkv.weight.shape == (3 * width, width) and attention.out.weight.shape == (width, width)
    for run, groups in enumerate(attention.groups):
        out, expected = whole(attention, x, run=run), formula(attention, x, groups)
        assert_same(out, expected)
        weight = torch.randn_like(out)
        for found, other in zip(
            torch.autograd.grad(out, parameters, weight), torch.autograd.grad(expected, parameters, weight), strict=True
        ):
            assert_same(found, other)


def test_tokens_see_their_group_alone() -> None:
    attention = made(groups=3)
    x = torch.randn(1, 2, 6, 12, dtype=torch.float64, requires_grad=True)
    for token in range(12):
        (seen,) = torch.autograd.grad(whole(attention, x).flatten(1, 2)[0, token].sum(), x)
        found = (seen.flatten(1, 2)[0].abs().sum(1) > 0).nonzero().flatten().tolist()
        assert found == list(range(token // 4 * 4, token // 4 * 4 + 4))


def test_permutations() -> None:
    attention = made(groups=(4, 2, 1), permute="always")
    x = torch.randn(2, 2, 4, 12, dtype=torch.float64)
    order = torch.randperm(8)
    assert_same(whole(attention, x, run=1, permutation=order), formula(attention, x, 2, order))
    assert_same(whole(attention, x, permutation=order), formula(attention, x, 4, order))
    # Drawn: as torch.randperm with that generator, in runs after the first with more than one group.
    found = whole(attention, x, run=1, generator=torch.Generator().manual_seed(7))
    order = torch.randperm(8, generator=torch.Generator().manual_seed(7))
    assert_same(found, formula(attention, x, 2, order))
    cpu = torch.device("cpu")
    assert attention.permutation(8, 0, cpu) is None and attention.permutation(8, 2, cpu) is None
    for permute, in_training, in_eval in (("always", True, True), ("train", True, False), ("never", False, False)):
        attention = made(permute=permute)
        assert (attention.train().permutation(8, 1, cpu) is not None) == in_training
        assert (attention.eval().permutation(8, 1, cpu) is not None) == in_eval


def test_long_groups_are_sequences(monkeypatch: Any) -> None:
    """Window attention has no kernels for them."""
    attention = made(126, 3, (2, 1), permute="never")
    x = torch.randn(3, 2, 8, 126, dtype=torch.float64)
    seen = []
    for name in ("window_attention", "varlen_attention"):
        op = getattr(mixers.ops, name)
        monkeypatch.setattr(mixers.ops, name, lambda *a, op=op, name=name, **k: (seen.append(name), op(*a, **k))[1])
    monkeypatch.setattr(mixers, "LONGEST_RUN", 8)
    for run, groups in enumerate((2, 1)):
        assert_same(whole(attention, x, run=run), formula(attention, x, groups))
    assert seen == ["window_attention", "varlen_attention"]
    assert whole(attention, x[:0], run=1).shape == (0, 2, 8, 126)


def test_what_takes_the_place_of_a_product_is_called() -> None:
    """An adapter, or a hook: heads are then widened behind it."""
    attention = made()
    x = torch.randn(2, 2, 4, 12, dtype=torch.float64)
    expected, seen = whole(attention, x), []
    for part in (attention.qkv, attention.out):
        part.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    assert_same(whole(attention, x), expected)
    assert seen == [(2, 8, 36), (2, 8, 12)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    attention = made(126, 3, (2,))
    x = torch.randn(4, 2, 8, 126, dtype=torch.float64)
    attention.to(dtype)
    x = x.to(dtype)
    eager = formula(attention, x, 2)
    out = whole(attention, x)
    assert_close("out", out, formula(attention.double(), x.double(), 2), eager)


def test_bad_arguments() -> None:
    for arguments, message in (
        ((12, 5, 2), "num_heads must divide hidden_size 12, got 5"),
        ((12, 2, (2, 0)), r"groups must be at least 1 in each run, got \(2, 0\)"),
        ((12, 2, ()), r"groups must be at least 1 in each run, got \(\)"),
    ):
        with pytest.raises(ValueError, match=f"^GroupedAttention: {message}"):
            GroupedAttention(*arguments)
    with pytest.raises(ValueError, match=r"permute must be one of always, train, never, got 'often'"):
        GroupedAttention(12, 2, 2, permute="often")
    with pytest.raises(ValueError, match=r"hidden must have a number of tokens that 4 groups divide, got 6"):
        made()(torch.zeros(1, 2, 3, 12).double())
