"""What the modes of attention mean, by examples small enough to see; what must not leak; what repeats bit by bit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from helpers import cases
from warpform import ops


def seen_keys(sq: int, sk: int, **how: object) -> list[list[int]]:
    """Which keys each query of one sequence attends to: v is the identity, so out shows the probabilities."""
    q, k = torch.randn(sq, 1, sk), torch.randn(sk, 1, sk)
    v = torch.eye(sk).unsqueeze(1)
    out = ops.varlen_attention(q, k, v, cases.offsets([sq]), cases.offsets([sk]), sq, sk, **how)
    return [row.nonzero().flatten().tolist() for row in out.squeeze(1)]


def test_causal_is_aligned_at_the_end() -> None:
    assert seen_keys(2, 4, causal=True) == [[0, 1, 2], [0, 1, 2, 3]]
    assert seen_keys(4, 2, causal=True) == [[], [], [0], [0, 1]]
    assert seen_keys(3, 3, causal=True) == [[0], [0, 1], [0, 1, 2]]


def test_windows_include_both_ends() -> None:
    assert seen_keys(4, 4, window_size=(1, 0)) == [[0], [0, 1], [1, 2], [2, 3]]
    assert seen_keys(4, 4, window_size=(0, 1)) == [[0, 1], [1, 2], [2, 3], [3]]
    assert seen_keys(2, 4, window_size=(1, 1)) == [[1, 2, 3], [2, 3]]
    assert seen_keys(4, 2, window_size=(1, 0)) == [[], [], [0], [0, 1]]
    assert seen_keys(3, 3, window_size=(-1, 0)) == [[0], [0, 1], [0, 1, 2]]
    assert seen_keys(3, 3, window_size=(1, 5), causal=True) == [[0], [0, 1], [1, 2]]


@pytest.mark.parametrize(
    "how", ({}, {"softcap": 3.0}, {"alibi_slopes": torch.tensor([0.5, 0.1])}), ids=("", "cap", "alibi")
)
def test_queries_that_see_nothing(how: dict[str, object]) -> None:
    # Sequences: 5 queries on 2 keys, causal, so 3 queries see nothing; 2 queries on no key; 3 rows in no sequence.
    q, k, v = (torch.randn(n, 2, 8, requires_grad=True) for n in (10, 4, 4))
    cu_q, cu_k = cases.offsets([5, 2]), cases.offsets([2, 0])
    out, lse = ops.varlen_attention(q, k, v, cu_q, cu_k, 5, 2, causal=True, return_lse=True, **how)
    nothing = torch.tensor([0, 1, 2, 5, 6, 7, 8, 9])
    assert (out[nothing] == 0).all() and (lse[:, nothing] == -math.inf).all()
    assert lse[:, 3:5].isfinite().all()
    (out.sum() + lse[:, 3:5].sum()).backward()
    assert (q.grad[nothing] == 0).all() and (k.grad[2:] == 0).all() and (v.grad[2:] == 0).all()
    assert all(t.grad.isfinite().all() and t.grad.any() for t in (q, k, v))


def test_softcap_comes_before_alibi() -> None:
    q, k, v = (torch.randn(6, 2, 8, dtype=torch.float64) for _ in range(3))
    slopes = torch.tensor([0.7, 0.2])
    cu = cases.offsets([6])
    _, lse = ops.varlen_attention(q, k, v, cu, cu, 6, 6, softcap=1.3, alibi_slopes=slopes, return_lse=True)
    score = 1.3 * torch.tanh(torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(8) / 1.3)
    place = torch.arange(6)
    score = score - slopes.double()[:, None, None] * (place[:, None] - place).abs()
    torch.testing.assert_close(lse, score.logsumexp(-1))


def test_heads_read_their_group() -> None:
    q, k, v = torch.randn(5, 6, 8), torch.randn(5, 2, 8), torch.randn(5, 2, 8)
    cu = cases.offsets([2, 3])
    out = ops.varlen_attention(q, k, v, cu, cu, 3, 3)
    for head in range(6):
        one = ops.varlen_attention(q[:, [head]], k[:, [head // 3]], v[:, [head // 3]], cu, cu, 3, 3)
        torch.testing.assert_close(out[:, [head]], one)


MODES = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (3, 2)},
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25])},
}


@pytest.mark.parametrize("how", MODES.values(), ids=MODES.keys())
@pytest.mark.parametrize("bad", (math.nan, math.inf))
def test_a_sequence_keeps_its_nan_to_itself(how: dict[str, object], bad: float) -> None:
    # Equal lengths side by side and apart, so that grouping could mix them up.
    lengths = [5, 5, 3, 5, 3, 40]
    cu = cases.offsets(lengths)
    qkv = torch.randn(sum(lengths) + 2, 3, 2, 16)
    dout = torch.randn(sum(lengths) + 2, 2, 16)

    def run(values: Tensor) -> tuple[Tensor, Tensor]:
        values = values.clone().requires_grad_()
        out = ops.varlen_attention(*values.unbind(1), cu, cu, 40, 40, **how)
        return out.detach(), torch.autograd.grad(out, values, dout)[0]

    clean = run(qkv)
    poisoned = qkv.clone()
    poisoned[cu[1] : cu[2]] = bad  # the second sequence, and the rows past the last one
    poisoned[cu[-1] :] = bad
    rows = torch.ones(len(qkv), dtype=torch.bool)
    rows[cu[1] : cu[2]] = False
    for one, other in zip(clean, run(poisoned), strict=True):
        assert torch.equal(one[rows], other[rows])
        assert (other[cu[-1] :] == 0).all()


@pytest.mark.parametrize("how", MODES.values(), ids=MODES.keys())
def test_a_sequence_does_not_depend_on_its_neighbours(how: dict[str, object]) -> None:
    lengths = [4, 9, 4, 70, 9, 4]
    cu = cases.offsets(lengths)
    q, k, v = torch.randn(sum(lengths), 3, 2, 16, dtype=torch.float64).unbind(1)
    out, lse = ops.varlen_attention(q, k, v, cu, cu, 70, 70, return_lse=True, **how)
    for b, length in enumerate(lengths):
        rows = slice(int(cu[b]), int(cu[b + 1]))
        own = cases.offsets([length])
        one, one_lse = ops.varlen_attention(q[rows], k[rows], v[rows], own, own, length, length, return_lse=True, **how)
        torch.testing.assert_close(out[rows], one)
        torch.testing.assert_close(lse[:, rows], one_lse)


def test_thousands_of_short_sequences_are_few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    from warpform.ops.reference import attention as reference

    calls = []
    flash = reference._flash
    monkeypatch.setattr(reference, "_flash", lambda *args, **how: calls.append(args[0].shape) or flash(*args, **how))
    lengths = torch.randint(1, 5, (3000,)).tolist()
    cu = cases.offsets(lengths)
    qkv = torch.randn(sum(lengths), 3, 2, 16)
    ops.varlen_attention(*qkv.unbind(1), cu, cu, 4, 4)
    assert len(calls) == 4
    assert sum(n * s for n, _, s, _ in calls) == sum(lengths)  # and nothing is padded


def test_results_repeat_bit_by_bit() -> None:
    lengths = [40, 3, 40, 3, 100]
    cu = cases.offsets(lengths)
    qkv = torch.randn(sum(lengths), 3, 4, 32, requires_grad=True)
    x = torch.randn(50, 64, requires_grad=True)
    weight = torch.randn(64, requires_grad=True)

    def run() -> tuple[Tensor, ...]:
        out, lse = ops.varlen_attention(*qkv.unbind(1), cu, cu, 100, 100, causal=True, return_lse=True)
        normal = ops.bias_gelu(ops.add_bias_residual_layer_norm(x, weight, x, weight, weight), weight)
        gradients = torch.autograd.grad(out.sum() + lse.sum() + normal.sum(), (qkv, x, weight))
        return (out, lse, normal, *gradients)

    assert all(torch.equal(one, other) for one, other in zip(run(), run(), strict=True))


def test_outputs_do_not_alias_inputs() -> None:
    x = torch.randn(4, 8)
    weight = torch.ones(8)
    for bias, residual in ((None, None), (weight, None), (None, x)):
        before = x.clone()
        out, total, _, _ = torch.ops.warpform.add_bias_residual_layer_norm(
            x, bias, residual, weight, weight, 1e-5, return_sum=True
        )
        gelu = ops.bias_gelu(x, bias)
        for result in (out, total, gelu):
            assert result.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
        assert torch.equal(x, before)


def test_sum_of_half_precision_is_rounded_once() -> None:
    # 2048 + 1 - 2049 in float16: rounded after the first addition it gives -1 or 1, not 0.
    x = torch.full((1, 4), 2048.0, dtype=torch.float16)
    bias = torch.ones(4, dtype=torch.float16)
    residual = torch.tensor([[-2048.0, -2046.0, -2044.0, -2040.0]], dtype=torch.float16)
    weight = torch.ones(4, dtype=torch.float16)
    _, total = ops.add_bias_residual_layer_norm(x, bias, residual, weight, weight, return_sum=True)
    assert total.tolist() == [[1.0, 3.0, 5.0, 9.0]]
