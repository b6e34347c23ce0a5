"""Modules of the padding-free encoder, apart from any architecture."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import pytest
import torch
from hypothesis import strategies as st

import warpform
from helpers.compare import assert_close
from helpers.drawn import drawn
from warpform.models import BertConfig, BertModel
from warpform.nn import Embeddings, Encoder, EncoderLayer, FeedForward, SelfAttention, first_tokens, mean_pool
from warpform.nn._product import CPU_ROWS


def layer(**options) -> EncoderLayer:
    torch.manual_seed(0)
    module = EncoderLayer(32, 4, 64, **options).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module


@drawn(40, lengths=st.lists(st.integers(0, 20), max_size=6), capacity=st.none() | st.integers(0, 9))
def test_mean_pool_and_first_tokens(lengths: list[int], capacity: int | None) -> None:
    total = sum(lengths)
    packing = warpform.Packing.from_lengths(lengths, capacity=None if capacity is None else total + capacity)
    hidden = torch.randn(packing.total, 7)
    hidden[total:] = float("nan")  # rows past the last sequence hold no token
    rows = list(hidden[:total].split(lengths)) if lengths else []
    means = [r.double().mean(0) if len(r) else torch.zeros(7, dtype=torch.float64) for r in rows]
    firsts = [r[0] if len(r) else torch.zeros(7) for r in rows]
    pooled, first = mean_pool(hidden, packing), first_tokens(hidden, packing)
    assert pooled.shape == first.shape == (len(lengths), 7)
    if rows:
        eager = [r.mean(0) if len(r) else torch.zeros(7) for r in rows]
        assert_close("pooled", pooled, torch.stack(means), torch.stack(eager))
        assert torch.equal(first, torch.stack(firsts))


def test_pooling_has_gradients() -> None:
    packing = warpform.Packing.from_lengths([3, 0, 2], capacity=7)
    hidden = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h: mean_pool(h, packing), hidden)
    assert torch.autograd.gradcheck(lambda h: first_tokens(h, packing), hidden)


def test_mean_pool_sums_in_float32() -> None:
    packing = warpform.Packing.from_lengths([5000])
    hidden = torch.full((5000, 2), 1.0, dtype=torch.bfloat16)
    assert torch.equal(mean_pool(hidden, packing), torch.ones(1, 2, dtype=torch.bfloat16))


def test_sequences_do_not_see_each_other() -> None:
    module = layer()
    texts = [torch.randn(n, 32) for n in (5, 1, 12, 5)]
    packing = warpform.Packing.from_lengths([len(t) for t in texts])
    out = module(torch.cat(texts), packing)
    oracle = copy.deepcopy(module).double()
    for text, rows in zip(texts, out.split([len(t) for t in texts]), strict=True):
        alone = warpform.Packing.from_lengths([len(text)])
        assert_close("rows", rows, oracle(text.double(), alone), module(text, alone))


def test_attention_takes_slices_of_one_product_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SelfAttention(32, 4).eval()
    packing = warpform.Packing.from_lengths([3, 4])
    seen = []
    attention = warpform.ops.varlen_attention

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: object, **options: object) -> object:
        seen.extend((q, k, v))
        return attention(q, k, v, *rest, **options)

    monkeypatch.setattr(warpform.ops, "varlen_attention", spy)
    module(torch.randn(7, 32), packing)
    assert len({t.untyped_storage().data_ptr() for t in seen}) == 1
    assert [t.storage_offset() for t in seen] == [0, 32, 64]


def test_blocks_of_rows_change_nothing() -> None:
    torch.manual_seed(0)
    module = FeedForward(16, 40)
    x = torch.randn(2 * CPU_ROWS + 77, 16)
    whole, bias = module._block(x)
    with torch.no_grad():
        blocks, no_bias = module(x)
    assert bias is None and no_bias is None  # on a CPU the product has added it
    module.double()
    with torch.no_grad():
        oracle = module._block(x.double())[0]
    assert_close("blocks", blocks, oracle, whole)


def test_embeddings_without_token_types() -> None:
    module = Embeddings(11, 8, 5, type_vocab_size=0)
    assert module.token_types is None
    ids, positions = torch.tensor([3, 1]), torch.tensor([0, 4])
    expected = torch.nn.functional.layer_norm(module.tokens(ids) + module.positions(positions), (8,), eps=1e-12)
    torch.testing.assert_close(module(ids, positions), expected)


def test_no_token_type_ids_mean_type_zero() -> None:
    module = Embeddings(11, 8, 5, type_vocab_size=3)
    ids, positions = torch.tensor([3, 1]), torch.tensor([0, 4])
    torch.testing.assert_close(module(ids, positions), module(ids, positions, torch.zeros(2, dtype=torch.long)))


def test_hidden_states_on_request() -> None:
    encoder = Encoder([layer(), layer()])
    packing = warpform.Packing.from_lengths([3])
    x = torch.randn(3, 32)
    last, states = encoder(x, packing, output_hidden_states=True)
    assert states is not None and len(states) == 3 and states[0] is x and states[2] is last
    assert encoder(x, packing)[1] is None


def test_no_rows() -> None:
    packing = warpform.Packing.from_lengths([0, 0])
    assert layer()(torch.zeros(0, 32), packing).shape == (0, 32)
    assert layer()(torch.zeros(0, 32), warpform.Packing.from_lengths([])).shape == (0, 32)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="num_attention_heads must divide hidden_size 32, got 5"):
        SelfAttention(32, 5)
    with pytest.raises(ValueError, match="hidden_act must be one of gelu, .* got 'glu'"):
        FeedForward(32, 64, "glu")
    module = layer(attention_dropout=0.1).train()
    with pytest.raises(NotImplementedError, match=r"attention_probs_dropout_prob is 0\.1"):
        module(torch.randn(3, 32), warpform.Packing.from_lengths([3]))


def fastest(function: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest call, which what else the machine does disturbs least."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def test_packing_costs_little() -> None:
    """Packing once and unpacking once takes under 2 % of a forward, at the shape of MiniLM."""
    config = BertConfig(
        vocab_size=1000, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    model = BertModel(config).eval()
    lengths = [8, 70, 33, 120, 15, 40, 64, 20]
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)).long()
    ids = torch.randint(0, 1000, mask.shape)
    hidden = torch.randn(sum(lengths), 384)

    def packing_only() -> None:
        packing = warpform.Packing.from_mask(mask)
        packing.pack(ids)
        packing.unpack(hidden)

    # Threads that wait for each other would measure what else the machine does.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            packing, forward = fastest(packing_only, 30), fastest(lambda: model(ids, mask), 8)
    finally:
        torch.set_num_threads(threads)
    assert packing < 0.02 * forward, f"{packing / forward:.1%}"
