"""Ladder residual against LLaMA's own modules called in ladder order: logits, every gradient, hybrids, generation."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.llama import exact_llama, next_token_mean, real_rows
from helpers.parity import make_mask, randomise
from helpers.training import train
from warpform import Packing, models
from warpform.models import DecoderConfig, DecoderForCausalLM, LadderConfig, LadderForCausalLM

TINY: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def model_of(layers: Any = None, **fields: Any) -> LadderForCausalLM:
    model = LadderForCausalLM(LadderConfig(**{**TINY, "ladder_layers": layers, **fields})).double()
    randomise(model, std=0.2)
    return model


def dense_of(model: LadderForCausalLM) -> DecoderForCausalLM:
    dense = DecoderForCausalLM(DecoderConfig(**model.config.dense_fields())).double().eval()
    dense.load_state_dict(model.state_dict())
    return dense


def in_ladder_order(hf: Any, ids: Tensor, places: Tensor, late: tuple[int, ...]) -> Tensor:
    """x_i = x_{i-1} + h_i(x_{i-2}) in late layers, x_{i-1} + h_i(x_{i-1}) in others, of LLaMA's modules."""
    x = hf.model.embed_tokens(ids)
    tables, causal = hf.model.rotary_emb(x, places), torch.full((ids.shape[1],) * 2, -torch.inf).double().triu(1)
    streams = [x, x]
    for number, layer in enumerate(hf.model.layers):
        source = streams[-2 if number in late else -1]
        normed = layer.input_layernorm(source)
        out = layer.self_attn(hidden_states=normed, position_embeddings=tables, attention_mask=causal[None, None])[0]
        streams.append(streams[-1] + out)
        source = streams[-2 if number in late else -1]
        streams.append(streams[-1] + layer.mlp(layer.post_attention_layernorm(source)))
    return hf.lm_head(hf.model.norm(streams[-1]))[0]


def batch() -> tuple[Tensor, Tensor]:
    mask = make_mask("holes", (11, 7, 2, 5), 11)
    return torch.randint(TINY["vocab_size"], mask.shape), mask


LATE = {
    "all": (None, (0, 1, 2, 3)),
    "last": (2, (2, 3)),
    "some": ((2, 0), (0, 2)),
    "inner": ((1,), (1,)),
    "none": (0, ()),
}


@pytest.mark.parametrize("case", LATE)
def test_logits_and_gradients_are_those_of_llamas_modules_in_ladder_order(case: str) -> None:
    layers, late = LATE[case]
    model, (ids, mask) = model_of(layers), batch()
    assert model.config.late_layers == late
    dense = dense_of(model)
    hf, rows = exact_llama(dense), real_rows(ids, mask)
    expected = [in_ladder_order(hf, row, places, late) for row, places in rows]
    out = model(ids, mask, labels=ids)
    found, truth = out.logits[mask.bool()], torch.cat(expected)
    assert float((found - truth).detach().abs().max()) < 1e-12 * float(truth.detach().abs().max())
    theirs = dict(hf.named_parameters())
    loss = next_token_mean(expected, [row[0] for row, _ in rows])
    truths = dict(zip(theirs, torch.autograd.grad(loss, list(theirs.values())), strict=True))
    out.loss.backward()
    for name, parts in dense.weight_names().items():
        own = model.get_parameter(name).grad
        for part, chunk in zip(parts, dense.split_weight(name, own) if len(parts) > 1 else (own,), strict=True):
            assert float((chunk - truths[part]).abs().max()) < 1e-12 * float(truths[part].abs().max()), part


def test_no_late_layer_is_the_dense_decoder_bit_for_bit() -> None:
    model, (ids, mask) = model_of(0), batch()
    results = []
    for one in (model, dense_of(model)):
        out = one(ids, mask, labels=ids)
        results.append((out.loss, out.logits, *torch.autograd.grad(out.loss, list(one.parameters()))))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    late = model_of(1)
    late.load_state_dict(model.state_dict())
    assert not torch.allclose(late(ids, mask).logits, results[0][1])


@pytest.mark.parametrize("layers", (None, 2), ids=("all", "last"))
def test_generation_with_caches_is_generation_without(layers: int | None) -> None:
    model = model_of(layers)
    texts = [torch.randint(TINY["vocab_size"], (n,)) for n in (3, 9, 1)]
    found = model.generate(texts, 8)
    for text, whole in zip(texts, found, strict=True):
        for _ in range(8):
            text = torch.cat((text, model(text[None]).logits[0, -1:].argmax(1)))
        assert torch.equal(text, whole)


def test_packed_embedded_and_saved_models_agree(tmp_path: Path) -> None:
    model, (ids, mask) = model_of((1, 2)), batch()
    packing = Packing.from_mask(mask)
    padded = model(ids, mask, labels=ids)
    packed = model(packing.pack(ids), labels=packing.pack(ids), packing=packing)
    assert torch.equal(packing.pack(padded.logits), packed.logits) and torch.equal(padded.loss, packed.loss)
    embedded = model(inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask, labels=ids)
    assert torch.equal(embedded.loss, padded.loss)
    model.save_pretrained(tmp_path)
    read = models.from_pretrained(tmp_path)
    assert isinstance(read, LadderForCausalLM) and read.config == model.config
    assert read.stack.lags == [0, 0, 1, 1, 1, 1, 0, 0]
    assert float((read(ids, mask).logits - padded.logits).detach().abs().max()) < 1e-12
    other = LadderForCausalLM.from_pretrained(tmp_path, ladder_layers=3)
    assert other.stack.lags == [0, 0, 1, 1, 1, 1, 1, 1]


def test_checkpointing_and_half_precision() -> None:
    model, (ids, mask) = model_of(2).train(), batch()
    wanted = torch.autograd.grad(model(ids, mask, labels=ids).loss, list(model.parameters()))
    model.stack.gradient_checkpointing = True
    found = torch.autograd.grad(model(ids, mask, labels=ids).loss, list(model.parameters()))
    assert all(float((one - other).abs().max()) < 1e-12 for one, other in zip(found, wanted, strict=True))
    half = model.bfloat16()
    half(ids, mask, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in half.parameters())


@pytest.mark.slow
def test_compiled() -> None:
    model, (ids, mask) = model_of(2), batch()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert float((compiled(ids, mask).logits - model(ids, mask).logits).detach().abs().max()) < 1e-12


@pytest.mark.parametrize(
    ("size", "count"),
    (("1b", 1_283_581_440), ("3b", 3_624_065_280), ("8b", 8_030_261_248), ("70b", 70_553_706_496)),
)
def test_sizes(size: str, count: int) -> None:
    with torch.device("meta"):
        model = LadderForCausalLM(LadderConfig.preset(size))
    assert sum(p.numel() for p in model.parameters()) == count
    assert set(model.stack.lags) == {1} and len(model.stack.lags) == 2 * model.config.num_hidden_layers


def test_bad_arguments() -> None:
    wanted = r"LadderConfig: ladder_layers must be None, a number from 0 to 4, or different layers from 0 to 3, got "
    for layers, got in (
        (5, "5"),
        (-1, "-1"),
        ((0, 4), r"\(0, 4\)"),
        ((1, 1), r"\(1, 1\)"),
        (True, "True"),
        ("3", "'3'"),
    ):
        with pytest.raises(ValueError, match=wanted + got):
            LadderConfig(**TINY, ladder_layers=layers)
    assert LadderConfig(**TINY, ladder_layers=range(1, 3)) == LadderConfig(**TINY, ladder_layers=(1, 2))
    with pytest.raises(ValueError, match="size must be one of 1b, 3b, 8b, 70b, got '7b'"):
        LadderConfig.preset("7b")


@pytest.mark.slow
@pytest.mark.parametrize("layers", (None, 1), ids=("all", "last"))
def test_it_learns_text(layers: int | None) -> None:
    """Bytes of CPython's help topics, far below what the frequency of bytes alone gives."""
    text = torch.tensor(list("\n".join(topics[name] for name in sorted(topics)).encode()))
    known, held_out = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2}
    model = LadderForCausalLM(LadderConfig(**{**TINY, **sizes, "ladder_layers": layers, "max_position_embeddings": 96}))
    counts = known.bincount(minlength=256).float() + 1
    by_frequency = -(counts / counts.sum())[held_out].log().mean().item()

    def loss() -> Tensor:
        ids = known[torch.randint(len(known) - 96, (16, 1)) + torch.arange(96)]
        return model(ids, labels=ids).loss

    train(model, loss, steps=200, rate=6e-3)
    evaluation = held_out[: 64 * 60].view(-1, 64)
    with torch.inference_mode():
        after = float(model.eval()(evaluation, labels=evaluation).loss)
    assert after < by_frequency - 0.7, (after, by_frequency)
