"""M2-GPT against the same written plainly from its formulas: causal, the same token by token, and able to learn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import plain_m2 as plain
from helpers.compare import assert_close
from helpers.compilations import Compilations
from helpers.parity import randomise
from helpers.training import train
from warpform.models import M2GPTConfig, M2GPTForCausalLM

TINY = {
    "vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "max_position_embeddings": 24, "filter_order": 16,
    "monarch_block": 4, "intermediate_size": 24,
}  # fmt: skip
KINDS = {
    "monarch": {},
    "plain convolutions": {"monarch": False},
    "with MLPs": {"use_mlp": True},
    "one convolution": {"residual_long_conv": False, "monarch_block": None},
}


def make_model(**fields: Any) -> Any:
    torch.manual_seed(0)
    model = randomise(M2GPTForCausalLM(M2GPTConfig(**{**TINY, **fields})), 0.2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "filter_fn" in name:
                parameter.mul_(3)
    return model


def plain_gpt(weights: Mapping[str, Tensor], config: M2GPTConfig, ids: Tensor) -> Tensor:
    """Logits [batch, seqlen, vocab]."""
    eps = config.layer_norm_eps
    x = weights["tokens.weight"][ids]
    for i in range(config.num_hidden_layers):
        layer = plain.under(weights, f"layers.{i}.")
        normal = plain.layer_norm(plain.under(layer, "mixer_norm."), x, eps)
        x = x + plain.mixer(plain.under(layer, "mixer."), normal)
        if config.use_mlp:
            normal = plain.layer_norm(plain.under(layer, "mlp_norm."), x, eps)
            x = x + plain.mlp(plain.under(layer, "mlp."), normal, None)
    return plain.layer_norm(plain.under(weights, "norm."), x, eps) @ weights["tokens.weight"].T


@pytest.mark.sampled
@pytest.mark.parametrize("kind", KINDS)
def test_parity_with_the_formulas(kind: str) -> None:
    """Logits, the loss of the next tokens, and the gradient of every parameter by itself."""
    model = make_model(**KINDS[kind])
    batches = torch.randint(30, (8, 3, 24))
    labels = batches.clone()
    labels[:, 0, :5] = -100
    outs = [model(ids, asked) for ids, asked in zip(batches, labels, strict=True)]
    runs, losses = [], []
    for dtype in (torch.float64, torch.float32):
        weights = plain.weights_of(model, dtype)
        runs.append(torch.stack([plain_gpt(weights, model.config, ids) for ids in batches]))
        pairs = zip(runs[-1][:, :, :-1].flatten(1, 2), labels[:, :, 1:].flatten(1, 2), strict=True)
        losses.append((weights, [torch.nn.functional.cross_entropy(logits, asked) for logits, asked in pairs]))
    assert_close("logits", torch.stack([out.logits for out in outs]), *runs)
    assert_close("loss", *(torch.stack(one) for one in ([out.loss for out in outs], losses[0][1], losses[1][1])))
    plain.check_gradients(model, [out.loss for out in outs], *losses)


@pytest.mark.parametrize("kind", KINDS)
def test_later_tokens_change_nothing(kind: str) -> None:
    model = make_model(**KINDS[kind]).double()
    ids = torch.randint(30, (2, 24))
    later = torch.cat([ids[:, :13], (ids[:, 13:] + 7) % 30], dim=1)
    logits = model(ids).logits
    difference = (model(later).logits - logits).abs().amax((0, 2))
    assert difference[:13].max() < 1e-12 * logits.abs().max()
    assert difference[13] > 1e-3
    torch.testing.assert_close(model(ids[:, :13]).logits, logits[:, :13], atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_generation_is_that_of_full_passes(kind: str) -> None:
    """The likeliest token, found by a pass over everything each time."""
    model = make_model(**KINDS[kind]).double()
    prompt = torch.randint(30, (3, 5))
    ids = prompt
    with torch.no_grad():
        for _ in range(19):
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(1)[:, None]], dim=1)
    assert torch.equal(model.generate(prompt, 19), ids)
    assert len({tuple(row) for row in ids[:, 5:].tolist()}) > 1  # not the same whatever the prompt


def test_sampling() -> None:
    """Draws follow the softmax of logits over temperature, among the top_k."""
    model = make_model()
    prompt = torch.randint(30, (1, 6))
    logits = model(prompt).logits[0, -1].detach()
    many = prompt.expand(4000, -1)
    for temperature, top_k in ((1.0, None), (2.0, 5)):
        drawn = model.generate(
            many, 1, temperature=temperature, top_k=top_k, generator=torch.Generator().manual_seed(1)
        )
        kept = logits.topk(30 if top_k is None else top_k)
        expected = torch.zeros(30).scatter(0, kept.indices, (kept.values / temperature).softmax(0))
        counts = drawn[:, -1].bincount(minlength=30) / 4000
        assert (counts - expected).abs().max() < 5 * (expected.max() / 4000).sqrt()
        assert (counts[expected == 0] == 0).all()
    same = [model.generate(prompt, 8, temperature=1.0, generator=torch.Generator().manual_seed(2)) for _ in range(2)]
    assert torch.equal(*same)


def test_generation_ends() -> None:
    """Each sequence after its own end token; as far as that, draws are those of generation without an end."""
    model = make_model()
    prompt = torch.randint(30, (6, 4))

    def drawn(**how: Any) -> Tensor:
        return model.generate(prompt, 12, temperature=3.0, generator=torch.Generator().manual_seed(3), **how)

    free = drawn()
    end = int(free[0, 6])
    ended = drawn(eos_token_id=end)
    assert not torch.equal(ended, free[:, : ended.shape[1]])
    for row, all_tokens in zip(ended, free, strict=True):
        places = (all_tokens[4:] == end).nonzero().flatten()
        stop = 4 + int(places[0]) + 1 if len(places) else ended.shape[1]
        assert torch.equal(row[:stop], all_tokens[:stop]) and (row[stop:] == end).all()
    assert torch.equal(model.generate(prompt, 0), prompt)


def test_bad_input() -> None:
    model = make_model()
    ids = torch.randint(30, (2, 9))
    for call, message in (
        (lambda: model(ids[0]), r"input_ids must be \[batch, seqlen\], got \[9\]"),
        (lambda: model(ids.repeat(1, 3)), "at most max_position_embeddings = 24 long, got 27 tokens"),
        (lambda: model(ids, ids[:, 1:]), r"labels must have shape \[2, 9\], got \[2, 8\]"),
        (lambda: model.generate(ids, 16), "at most max_position_embeddings = 24 long, got 9 tokens and 16 new ones"),
        (lambda: model.generate(ids[:, :0], 3), "input_ids must have at least one token"),
        (lambda: model.generate(ids, 3, temperature=-1.0), "temperature must be at least 0"),
        (lambda: model.generate(ids, 3, top_k=0), "top_k at least 1"),
        (lambda: M2GPTConfig(vocab_size=0), "vocab_size must be at least 1, got 0"),
        (lambda: M2GPTConfig(hidden_size=10, use_mlp=True), "nblocks must divide hidden_size 10, got 4"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.slow
def test_compiles_as_one_graph_for_all_batch_sizes() -> None:
    model = make_model(num_hidden_layers=1)
    backend = Compilations()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for batch in (2, 3, 5):
            ids = torch.randint(30, (batch, 24))
            torch.testing.assert_close(compiled(ids).logits, model(ids).logits)
    assert backend.count == 1


@pytest.mark.slow
def test_learns_to_repeat() -> None:
    """Eight tokens at random, again and again: the loss of those that can be known falls from ln 12 to below 0.2."""
    torch.manual_seed(0)
    config = M2GPTConfig(
        vocab_size=12, hidden_size=32, num_hidden_layers=2, max_position_embeddings=24, filter_order=16
    )
    model = M2GPTForCausalLM(config).train()

    def sequences(count: int) -> tuple[Tensor, Tensor]:
        ids = torch.randint(12, (count, 8)).repeat(1, 3)
        return ids, ids.index_fill(1, torch.arange(8), -100)

    held_out = sequences(64)
    with torch.inference_mode():
        before = model(*held_out).loss.item()
    train(model, lambda: model(*sequences(32)).loss, steps=150, rate=1e-2)
    model.eval()
    with torch.inference_mode():
        after = model(*held_out).loss.item()
    assert before > 2.3 and after < 0.2, (before, after)
    ids = held_out[0][:8]
    assert (model.generate(ids[:, :10], 14) == ids).float().mean() > 0.95
