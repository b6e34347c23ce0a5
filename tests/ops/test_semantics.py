"""What the modes of attention mean, by examples small enough to see; what must not leak; what repeats bit by bit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from helpers import cases
from warpform import ops
from warpform.ops.reference.disentangled_attention import _sums_in_order, _unpick, relative_index


def seen_keys(sq: int, sk: int, **how: object) -> list[list[int]]:
    """Which keys each query of one sequence attends to: v is the identity, so out shows the probabilities."""
    q, k = torch.randn(sq, 1, sk), torch.randn(sk, 1, sk)
    v = torch.eye(sk).unsqueeze(1)
    out = ops.varlen_attention(q, k, v, cases.offsets([sq]), cases.offsets([sk]), sq, sk, **how)
    return [row.nonzero().flatten().tolist() for row in out.squeeze(1)]


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

    monkeypatch.setenv("WARPFORM_BACKEND", "reference")
    calls = []
    flash = reference._flash
    monkeypatch.setattr(reference, "_flash", lambda *args, **how: calls.append(args[0].shape) or flash(*args, **how))
    lengths = torch.randint(1, 5, (3000,)).tolist()
    cu = cases.offsets(lengths)
    qkv = torch.randn(sum(lengths), 3, 2, 16)
    ops.varlen_attention(*qkv.unbind(1), cu, cu, 4, 4)
    assert len(calls) == 4
    assert sum(n * s for n, _, s, _ in calls) == sum(lengths)  # and nothing is padded


def apart(values: Tensor, tables: Tensor, lengths: list[int], **how: object) -> tuple[Tensor, Tensor]:
    """disentangled_attention of values [T, 3, H, D] with tables [2 * span, 2, H, D]."""
    how = {"position_buckets": 8, "max_relative_positions": 20, **how}
    return ops.disentangled_attention(
        *values.unbind(1), *tables.unbind(1), cases.offsets(lengths), max(lengths), return_lse=True, **how
    )


@pytest.mark.parametrize(
    ("buckets", "farthest"), ((256, 512), (32, 128), (64, 256), (256, 1024), (20, 271), (48, 300)), ids=str
)
def test_log_buckets_are_those_of_transformers(buckets: int, farthest: int) -> None:
    transformers = pytest.importorskip("transformers.models.deberta_v2.modeling_deberta_v2")
    distance = torch.arange(-4096, 4097)
    expected = transformers.make_log_bucket_position(distance, buckets, farthest).long()
    for span in (5000, buckets, 7):
        rows = relative_index(distance, span, buckets, farthest)
        assert torch.equal(rows, (expected + span).clamp(0, 2 * span - 1))
        # Both terms read one index: a key's distance to a query is the query's to it, negated.
        assert torch.equal((-expected + span).flip(0), expected + span)


def test_positions_are_those_of_the_padded_row() -> None:
    # The same tokens with masked ones between them, whose values and scores are then left out by hand.
    mask = torch.rand(1, 41) > 0.4
    mask[0, [0, -1]] = True
    values, tables = torch.randn(41, 3, 2, 16, dtype=torch.float64), torch.randn(8, 2, 2, 16, dtype=torch.float64)
    place = mask[0].nonzero().flatten()
    out, lse = apart(values[place], tables, [len(place)], positions=place)
    q, k, v = values.unbind(1)
    r = relative_index(torch.arange(41).unsqueeze(1) - torch.arange(41), 4, 8, 20)
    pos_key, pos_query = tables[r].unbind(2)  # [i, j, H, D]
    score = torch.einsum("ihd,jhd->hij", q, k) + torch.einsum("ihd,ijhd->hij", q, pos_key)
    score = (score + torch.einsum("jhd,ijhd->hij", k, pos_query)) / math.sqrt(3 * 16)
    score = score.masked_fill(~mask[0], -math.inf)
    torch.testing.assert_close(out, torch.einsum("hij,jhd->ihd", score.softmax(-1), v)[place])
    torch.testing.assert_close(lse, score.logsumexp(-1)[:, place])


def test_disentangled_attention_without_tables_is_attention() -> None:
    lengths = [5, 5, 3, 60, 3]
    cu = cases.offsets(lengths)
    q, k, v = torch.randn(sum(lengths) + 1, 3, 2, 16).unbind(1)
    out, lse = ops.disentangled_attention(q, k, v, None, None, cu, 60, return_lse=True)
    expected = ops.varlen_attention(q, k, v, cu, cu, 60, 60, return_lse=True)
    torch.testing.assert_close(out, expected[0])
    torch.testing.assert_close(lse, expected[1])


@pytest.mark.parametrize("shape", ((2, 3, 5, 7), (1, 1, 1, 1)), ids=str)
def test_sums_by_index_do_not_depend_on_how_they_are_made(shape: tuple[int, ...]) -> None:
    values, index = torch.randn(shape, dtype=torch.float64), torch.randint(0, 6, (shape[0], 1, *shape[2:]))
    sums = _unpick(values, index, 6)
    assert torch.equal(sums, _sums_in_order(values, index, 6))
    one_hot = torch.nn.functional.one_hot(index, 6).double()  # [n, 1, a, b, 6]
    torch.testing.assert_close(sums, (values.unsqueeze(-1) * one_hot).sum(-2))


@pytest.mark.parametrize("shape", ((5, 0), (0,), (0, 48), (3, 0, 7)), ids=str)
def test_fake_tensors_have_the_shapes_of_a_layer_norm_of_nothing(shape: tuple[int, ...]) -> None:
    def shapes() -> list[torch.Size]:
        x, weight = torch.zeros(shape), torch.ones(shape[-1])
        return [t.shape for t in torch.ops.warpform.add_bias_residual_layer_norm(x, None, None, weight, weight)]

    with FakeTensorMode():
        fake = shapes()
    assert fake == shapes()


@pytest.mark.parametrize("shape", ((5, 0), (0,), (0, 48), (3, 0, 7), (2, 3, 8)), ids=str)
@pytest.mark.parametrize("return_sum", (False, True))
def test_fake_tensors_have_the_shapes_of_an_rms_norm(shape: tuple[int, ...], return_sum: bool) -> None:
    def shapes() -> list[torch.Size]:
        x, weight = torch.zeros(shape), torch.ones(shape[-1])
        out, total, rstd = torch.ops.warpform.add_residual_rms_norm(x, x, weight, return_sum=return_sum)
        gradients = torch.ops.warpform.add_residual_rms_norm_backward(x, None, x, weight, rstd)
        gelu = torch.ops.warpform.rms_norm_gelu(x), torch.ops.warpform.rms_norm_gelu_backward(x, x)
        return [t.shape for t in (out, total, rstd, *gradients, *gelu)]

    with FakeTensorMode():
        fake = shapes()
    assert fake == shapes()


def test_outputs_do_not_alias_inputs() -> None:
    x = torch.randn(4, 8)
    weight = torch.ones(8)
    for bias, residual in ((None, None), (weight, None), (None, x)):
        before = x.clone()
        out, total, _, _ = torch.ops.warpform.add_bias_residual_layer_norm(
            x, bias, residual, weight, weight, 1e-5, return_sum=True
        )
        gelu = ops.bias_gelu(x, bias)
        rms, rms_total, _ = torch.ops.warpform.add_residual_rms_norm(x, residual, weight, return_sum=True)
        for result in (out, total, gelu, rms, rms_total, ops.rms_norm_gelu(x)):
            assert result.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
        assert torch.equal(x, before)
