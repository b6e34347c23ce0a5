"""Chain-of-Model: one chain is a LLaMA, the first of several is one within it, and nothing of later ones reaches it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.training import train
from warpform import Packing, models
from warpform.models import CoLMConfig, CoLMForCausalLM
from warpform.nn import ChainLinear
from warpform.nn.cache import KeyValueCache
from warpform.nn.chain import ChainEmbedding

TINY: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 64, "chains": (2, 6),
}  # fmt: skip
AIR: dict[str, Any] = {"share_kv": True, "num_key_value_heads": 2}
by_air = pytest.mark.parametrize("air", ({}, AIR), ids=("colm", "air"))


def model_of(**fields: Any) -> CoLMForCausalLM:
    """Weights as large as a trained model's, so that an error anywhere is seen in the logits."""
    model = CoLMForCausalLM(CoLMConfig(**{**TINY, **fields})).double()
    return sharpen(model)


def sharpen(model: Any) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.5 if parameter.dim() == 1 else 2 * parameter.size(1) ** -0.5)
    return model


def largest(t: Tensor) -> float:
    return float(t.detach().abs().max())


def same(one: Tensor, other: Tensor, name: str = "") -> None:
    assert one.shape == other.shape and largest(one - other) <= 1e-12 * max(1.0, largest(other)), name


def batch() -> tuple[Tensor, Tensor]:
    """ids and a mask with padding on the left, on the right, and a hole."""
    mask = torch.ones(4, 13, dtype=torch.int64)
    mask[1, :5], mask[2, 9:], mask[3, 4:6] = 0, 0, 0
    return torch.randint(TINY["vocab_size"], mask.shape), mask


def in_double(llama: Any) -> Any:
    """A LLaMA of transformers that computes all in float64, as its weights are: rotary tables and norms too."""

    def tables(x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        dim = llama.config.hidden_size // llama.config.num_attention_heads
        angles = position_ids.unsqueeze(-1) * 10_000 ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles = torch.cat((angles, angles), -1)
        return angles.cos(), angles.sin()

    llama.model.rotary_emb.forward = tables
    for module in llama.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            weight, eps = module.weight, module.variance_epsilon
            module.forward = lambda x, weight=weight, eps=eps: F.rms_norm(x, weight.shape, weight, eps)
    return llama


def dense_gradients(llama: Any, loss: Tensor) -> dict[str, Tensor]:
    parameters = dict(llama.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def chain_of_one(gradients: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """What are weights of transformers' LLaMA, or gradients of them, under the names of one chain."""
    named = {"tokens": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
    found = {f"{ours}.weights.0": gradients[f"{theirs}.weight"] for ours, theirs in named.items()}
    for layer in range(layers):
        for place, norm, parts, out in (
            (2 * layer, "input_layernorm", [f"self_attn.{kind}_proj" for kind in "qkv"], "self_attn.o_proj"),
            (2 * layer + 1, "post_attention_layernorm", ["mlp.gate_proj", "mlp.up_proj"], "mlp.down_proj"),
        ):
            ours, theirs = f"stack.branches.{place}", f"model.layers.{layer}"
            found[f"{ours}.norm.weights.0"] = gradients[f"{theirs}.{norm}.weight"]
            found[f"{ours}.inwards.weights.0"] = torch.cat([gradients[f"{theirs}.{part}.weight"] for part in parts])
            found[f"{ours}.outwards.weights.0"] = gradients[f"{theirs}.{out}.weight"]
    return found


# ---- a definition without fused products, per head, in float64 ----


def rotated(x: Tensor) -> Tensor:
    """x [L, D]: pairs (x_i, x_{i + D / 2}) as complex numbers, turned by position * frequency."""
    half = x.size(1) // 2
    angles = torch.arange(len(x)).unsqueeze(1) * 10_000 ** -(torch.arange(half, dtype=torch.float64) / half)
    turned = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), 1)


def definition(model: CoLMForCausalLM, ids: Tensor) -> list[Tensor]:
    """The logits of every chain for one sequence, [L, vocab] each."""
    config = model.config
    dim, total = config.hidden_size // config.num_attention_heads, sum(config.chains)
    heads = [c * config.num_attention_heads // total for c in config.chains]
    keys = [c * config.kv_heads // total for c in config.chains]
    if config.share_kv:
        keys = [config.kv_heads, *[0] * (len(heads) - 1)]
    xs = [F.embedding(ids, weight) for weight in model.tokens.weights]

    def normed(norm: Any) -> list[Tensor]:
        return [
            x / (x.square().mean(1, keepdim=True) + config.rms_norm_eps).sqrt() * weight
            for x, weight in zip(xs, norm.weights, strict=True)
        ]

    def product(parts: Sequence[Tensor], layer: Any) -> list[Tensor]:
        return [torch.cat(tuple(parts[: i + 1]), 1) @ weight.t() for i, weight in enumerate(layer.weights)]

    future = torch.ones(len(ids), len(ids)).triu(1).bool()
    branches: list[Any] = list(model.stack.branches)
    for attention, feed_forward in zip(branches[::2], branches[1::2], strict=True):
        split = [
            part.split([q * dim, kv * dim, kv * dim], 1)
            for part, q, kv in zip(product(normed(attention.norm), attention.inwards), heads, keys, strict=True)
        ]
        outs = []
        for i, count in enumerate(heads):
            read = []
            for r in range(count):
                of, g = (0, r % config.kv_heads) if config.share_kv else (i, r // (count // keys[i]))
                query, key, value = (
                    part[:, n * dim : (n + 1) * dim]
                    for part, n in ((split[i][0], r), (split[of][1], g), (split[of][2], g))
                )
                scores = rotated(query) @ rotated(key).t() / dim**0.5
                read.append(scores.masked_fill(future, -torch.inf).softmax(1) @ value)
            outs.append(torch.cat(read, 1))
        xs = [x + out for x, out in zip(xs, product(outs, attention.outwards), strict=True)]
        inner = []
        for part in product(normed(feed_forward.norm), feed_forward.inwards):
            gate, up = part.chunk(2, 1)
            inner.append(gate * gate.sigmoid() * up)
        xs = [x + out for x, out in zip(xs, product(inner, feed_forward.outwards), strict=True)]
    each = [x @ weight.t() for x, weight in zip(normed(model.norm), model.head.weights, strict=True)]
    return [sum(each[1 : i + 1], each[0]) for i in range(len(each))]


@by_air
@pytest.mark.parametrize("chains", ((2, 6), (4, 4), (2, 2, 4)), ids=str)
def test_every_chain_is_what_its_definition_says(chains: tuple[int, ...], air: dict[str, Any]) -> None:
    """The logits of all chains, padded, and the gradient of every parameter of their mean loss."""
    model, (ids, mask) = model_of(chains=chains, **air), batch()
    out = model(ids, mask, labels=ids, all_chains=True)
    losses, tokens = torch.zeros(len(chains), dtype=torch.float64), 0
    for row, (text, kept) in enumerate(zip(ids, mask.bool(), strict=True)):
        # Positions count padding, but a softmax sees their differences alone: where there is a hole they differ.
        if row == 3:
            continue
        found = definition(model, text[kept])
        for logits, expected in zip(out.chain_logits, found, strict=True):
            same(logits[row, kept], expected)
        losses = losses + torch.stack(
            [F.cross_entropy(logits[:-1], text[kept][1:], reduction="sum") for logits in found]
        )
        tokens += int(kept.sum()) - 1
    rows = model(ids[:3], mask[:3], labels=ids[:3], all_chains=True)
    same(rows.chain_losses, losses / tokens)
    same(rows.loss, losses.mean() / tokens)
    assert torch.equal(out.logits, out.chain_logits[-1]) and not out.logits[mask == 0].any()
    parameters = dict(model.named_parameters())
    gradients = [torch.autograd.grad(loss, list(parameters.values())) for loss in (rows.loss, losses.mean() / tokens)]
    for name, one, other in zip(parameters, *gradients, strict=True):
        same(one, other, name)


# ---- LLaMA ----


@by_air
@pytest.mark.parametrize("chains", (1, 2))
def test_the_first_chain_is_llama(chains: int, air: dict[str, Any]) -> None:
    """One chain, and the first of two: logits, loss, and the gradient of every parameter. No other has one."""
    pytest.importorskip("transformers")
    model = model_of(chains=(8,) if chains == 1 else (4, 4), **air)
    first = model if chains == 1 else model.submodel(1)
    llama = in_double(first.to_transformers())
    assert type(llama).__name__ == "LlamaForCausalLM" and llama.config.hidden_size == 32 // chains
    ids, mask = (t[[0, 2]] for t in batch())
    labels = ids.masked_fill(mask == 0, -100)
    theirs = llama(ids, attention_mask=mask)
    # Their own loss is in float32.
    their_loss = F.cross_entropy(theirs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    expected = chain_of_one(dense_gradients(llama, their_loss), 2)
    if air:
        expected = from_dense_order(expected, first.config)
    alone = model(ids, mask, labels=labels, chains=1)
    whole = model(ids, mask, labels=labels, all_chains=True)
    same(alone.logits[mask == 1], theirs.logits[mask == 1])
    same(alone.loss, their_loss)
    same(whole.chain_logits[0][mask == 1], theirs.logits[mask == 1])
    for loss, none in ((alone.loss, True), (whole.chain_losses[0], False)):
        model.zero_grad()
        loss.backward()
        for name, parameter in model.named_parameters():
            if name in expected:
                same(parameter.grad, expected[name], name)
            else:
                # The head of a later chain is in no sum of this one; its products have outputs that nothing reads.
                assert parameter.grad is None or (not none and not parameter.grad.any()), name


def from_dense_order(gradients: dict[str, Tensor], config: CoLMConfig) -> dict[str, Tensor]:
    """Heads of queries in the order of LLaMA, those of a key together, into that of Air, one of each key in turn."""
    heads, keys, dim = config.num_attention_heads, config.kv_heads, config.heads_dim
    place = [(r % keys) * (heads // keys) + r // keys for r in range(heads)]
    rows = torch.tensor([h * dim + d for h in place for d in range(dim)])
    found = dict(gradients)
    for layer in range(config.num_hidden_layers):
        inwards, outwards = (f"stack.branches.{2 * layer}.{part}.weights.0" for part in ("inwards", "outwards"))
        found[inwards] = torch.cat((gradients[inwards][rows], gradients[inwards][len(rows) :]))
        found[outwards] = gradients[outwards][:, rows]
    return found


@by_air
def test_a_llama_becomes_one_chain_and_grows(air: dict[str, Any], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    fields = {name: value for name, value in TINY.items() if name != "chains"}
    config = transformers.LlamaConfig(**fields, attention_bias=True, mlp_bias=True)
    llama = sharpen(transformers.LlamaForCausalLM(config).double())
    ids = torch.randint(61, (2, 9))
    model = CoLMForCausalLM.from_decoder(models.from_transformers(llama), share_kv=bool(air))
    expected = in_double(llama)(ids).logits
    same(model(ids).logits, expected)
    same(in_double(model.to_transformers())(ids).logits, expected)
    grown = model.expand((8, 4))
    assert (
        grown.config.chains == (8, 8, 4)
        and grown.config.hidden_size == 80
        and grown.config.kv_heads == (4 if air else 10)
    )
    same(grown(ids).logits, model(ids).logits)
    grown.save_pretrained(tmp_path)
    again = CoLMForCausalLM.from_pretrained(tmp_path)
    assert again.config == grown.config
    same(again(ids).logits, model(ids).logits)
    same(in_double(again.submodel(1).to_transformers())(ids).logits, expected)


# ---- chains within chains ----


@by_air
def test_the_first_chains_are_a_model_by_themselves(air: dict[str, Any], tmp_path: Path) -> None:
    """chains=k, the copy of them, and their logits in the whole, with the same gradients."""
    model, (ids, mask) = model_of(chains=(2, 2, 4), **air), batch()
    whole = model(ids, mask, all_chains=True)
    for k in (1, 2, 3):
        part = model.submodel(k)
        part.save_pretrained(tmp_path)
        for one in (part, models.from_pretrained(tmp_path)):
            assert one.config.chains == (2, 2, 4)[:k] and one.config.hidden_size == (8, 16, 32)[k - 1]
            same(one(ids, mask).logits, whole.chain_logits[k - 1])
        found, alone = model(ids, mask, labels=ids, chains=k), part(ids, mask, labels=ids)
        same(found.logits, alone.logits)
        assert found.chain_losses is None
        model.zero_grad()
        found.loss.backward()
        alone.loss.backward()
        own = dict(part.named_parameters())
        for name, parameter in model.named_parameters():
            if name in own:
                same(parameter.grad, own[name].grad, name)
            else:
                assert parameter.grad is None, name
        # A copy: it may be trained.
        assert not {p.data_ptr() for p in part.parameters()} & {p.data_ptr() for p in model.parameters()}
    some = model(ids, mask, labels=ids, chains=2, all_chains=True)
    assert len(some.chain_losses) == len(some.chain_logits) == 2 and torch.equal(some.loss, some.chain_losses.mean())


@by_air
def test_nothing_of_later_chains_reaches_earlier_ones(air: dict[str, Any]) -> None:
    """NaN in every parameter and every hidden dimension of the last chain."""
    model, (ids, mask) = model_of(chains=(2, 2, 4), **air), batch()
    embeds = torch.cat(list(model.tokens.weights), 1).detach()[ids]
    before = model(inputs_embeds=embeds, attention_mask=mask, all_chains=True).chain_logits
    assert all(map(torch.equal, before, model(ids, mask, all_chains=True).chain_logits))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".2"):
                parameter.fill_(torch.nan)
    embeds[..., 16:] = torch.nan
    after = model(inputs_embeds=embeds, attention_mask=mask, all_chains=True).chain_logits
    assert torch.equal(after[0], before[0]) and torch.equal(after[1], before[1])
    assert after[2][mask == 1].isnan().all()
    same(model(inputs_embeds=embeds, attention_mask=mask, chains=2).logits, before[1])


@by_air
@pytest.mark.parametrize("tied", (False, True), ids=("untied", "tied"))
def test_expansion_keeps_the_logits_and_trains_further(tied: bool, air: dict[str, Any]) -> None:
    model, ids = model_of(tie_word_embeddings=tied, **air), batch()[0]
    grown = model.expand(4)
    assert grown.config.chains == (2, 6, 4) and grown.config.num_attention_heads == 12
    assert grown.config.intermediate_size == 72 and grown.config.kv_heads == (2 if air else 6)
    out = grown(ids, labels=ids, all_chains=True)
    for logits, expected in zip(
        out.chain_logits, (*model(ids, all_chains=True).chain_logits, model(ids).logits), strict=True
    ):
        same(logits, expected)
    assert not grown.head.weights[2].any() and bool(grown.tokens.weights[2].any()) is not tied
    # Chain Tuning: the old chains are frozen, have no gradient, and stay what they are.
    for name, parameter in grown.named_parameters():
        parameter.requires_grad_(name.endswith(".2"))
    optimizer = torch.optim.AdamW(grown.parameters(), 1e-2)
    first = float(grown(ids, labels=ids).loss.detach())
    for _ in range(3):
        optimizer.zero_grad()
        grown(ids, labels=ids).loss.backward()
        optimizer.step()
    for name, parameter in grown.named_parameters():
        assert (parameter.grad is not None) == name.endswith(".2"), name
    assert float(grown(ids, labels=ids).loss.detach()) < first
    same(grown(ids, chains=2).logits, model(ids).logits)
    assert largest(grown(ids).logits - model(ids).logits) > 1e-3


# ---- calls ----


@by_air
def test_packed_and_padded_agree(air: dict[str, Any]) -> None:
    model, (ids, mask) = model_of(**air), batch()
    packing = Packing.from_mask(mask)
    padded = model(ids, mask, labels=ids, all_chains=True)
    packed = model(packing.pack(ids), labels=packing.pack(ids), packing=packing, all_chains=True)
    assert torch.equal(packing.pack(padded.logits), packed.logits) and torch.equal(padded.loss, packed.loss)
    assert torch.equal(packing.pack(padded.chain_logits[0]), packed.chain_logits[0])
    embeds = torch.cat(list(model.tokens.weights), 1)[ids]
    same(model(inputs_embeds=embeds, attention_mask=mask, chains=1).logits, padded.chain_logits[0])


def continued(model: CoLMForCausalLM, texts: Sequence[Tensor], count: int, chains: int | None = None) -> list[Tensor]:
    found = []
    for text in texts:
        for _ in range(count):
            text = torch.cat((text, model(text[None], chains=chains).logits[0, -1:].argmax(1)))
        found.append(text)
    return found


@by_air
@pytest.mark.parametrize("prompts", ((5,), (3, 9, 1)), ids=("one", "ragged"))
def test_generation_with_a_cache_is_generation_without(prompts: tuple[int, ...], air: dict[str, Any]) -> None:
    model = model_of(**air)
    texts = [torch.randint(TINY["vocab_size"], (n,)) for n in prompts]
    for chains in (None, 1):
        expected = continued(model, texts, 8, chains)
        found = model.generate(texts, 8, chains=chains)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("prompts", ((5,), (3, 9, 1), (1, 1)), ids=str)
def test_air_prefilled_with_its_first_chain_generates_the_same(prompts: tuple[int, ...]) -> None:
    model = model_of(chains=(2, 2, 4), **AIR)
    texts = [torch.randint(TINY["vocab_size"], (n,)) for n in prompts]
    expected = model.generate(texts, 8)
    widths: list[tuple[int, int]] = []
    for layer in model.modules():
        if isinstance(layer, ChainLinear | ChainEmbedding):
            layer.register_forward_hook(lambda m, x, out: widths.append((len(out), sum(m.count(x[1]) * [1]))))
    for k in (1, 2, 3):
        widths.clear()
        found = model.generate(texts, 8, prefill_chains=k)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        # Prompts but for their last tokens go through k chains alone.
        assert {chains for rows, chains in widths if rows == sum(prompts) - len(prompts)} <= {k}
        assert {chains for rows, chains in widths if rows == len(prompts)} == {3}
    drawn = [
        model.generate(texts, 4, temperature=1.0, top_k=5, generator=torch.Generator().manual_seed(1), prefill_chains=p)
        for p in (None, 1)
    ]
    assert all(torch.equal(one, other) for one, other in zip(*drawn, strict=True))


@by_air
def test_caches_hold_the_keys_there_are(air: dict[str, Any]) -> None:
    caches = model_of(**air).caches(3, 10)
    kept = [part for part in caches.parts if part is not None]
    assert len(kept) == 2 and all(isinstance(part, KeyValueCache) for part in kept)
    assert kept[0].keys.shape == kept[0].values.shape == (3, 10, 2 if air else 4, 4)


@by_air
def test_layers_computed_again_give_the_same_gradients(air: dict[str, Any]) -> None:
    model, (ids, mask) = model_of(**air), batch()
    runs = []
    for again in (False, True):
        if again:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model.train()(ids, mask, labels=ids, all_chains=True).loss.backward()
        runs.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


@pytest.mark.slow
def test_compiles_whole(fresh_dynamo: None) -> None:
    model, (ids, mask) = model_of(num_hidden_layers=1, **AIR), batch()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    parameters = list(model.parameters())
    for options in ({"chains": 1}, {"all_chains": True}):
        out, expected = (m(ids, mask, labels=ids, **options) for m in (compiled, model))
        same(out.logits, expected.logits)
        runs = [torch.autograd.grad(o.loss, parameters, allow_unused=True) for o in (out, expected)]
        for one, other in zip(*runs, strict=True):
            same(*(torch.zeros(1) if t is None else t for t in (one, other)))


def test_bfloat16_and_initial_weights() -> None:
    model = CoLMForCausalLM(CoLMConfig(**TINY, initializer_range=0.3, mlp_bias=True))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert bool((parameter == 1).all()), name
        elif "biases" in name:
            assert not parameter.any(), name
        else:
            assert abs(float(parameter.detach().std()) / 0.3 - 1) < 5 * (2 * parameter.numel()) ** -0.5, name
    ids, mask = batch()
    low = copy.deepcopy(model).bfloat16()
    out = low(ids, mask, labels=ids, all_chains=True)
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16 and out.loss.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in low.parameters())
    assert len(low.generate([ids[0, :3], ids[1, :5]], 2)[1]) == 7


# ---- sizes ----


@pytest.mark.parametrize("air", (False, True), ids=("colm", "air"))
@pytest.mark.parametrize("chains", ((32,), (16, 16), (8, 8, 8, 8), (8, 8, 16), (8, 24)), ids=str)
def test_sizes_on_the_shapes_of_llama_1b(chains: tuple[int, ...], air: bool) -> None:
    with torch.device("meta"):
        model = CoLMForCausalLM(CoLMConfig.preset("1B", chains=chains, share_kv=air))
    d, f, kv, vocab = 2048, 8192, 512, 32_000
    # 1,024ths of the square of a width that a product of chains has.
    share = sum(c * sum(chains[: i + 1]) for i, c in enumerate(chains))
    assert share == {1: 1024, 2: 768, 4: 640, 3: 704}[len(chains)] or (chains == (8, 24) and share == 832)
    keys = 2 * kv * d * 32 * chains[0] // 1024 if air else 2 * kv * d * share // 1024
    layer = keys + (2 * d * d + 3 * d * f) * share // 1024 + 2 * d
    assert sum(p.numel() for p in model.parameters()) == 2 * vocab * d + 16 * layer + d


# ---- bad input ----


@pytest.mark.parametrize(
    ("fields", "message"),
    (
        ({"chains": ()}, r"chains must be at least one integer of at least 1, got \(\)"),
        ({"chains": (4, 0)}, r"chains must be at least one integer of at least 1, got \(4, 0\)"),
        ({"chains": (4, 4.0)}, r"chains must be at least one integer of at least 1, got \(4, 4.0\)"),
        ({"chains": (1, 2)}, r"the sum of chains must divide num_attention_heads 8, got \(1, 2\)"),
        ({"chains": (1, 7)}, r"chains must be whole parts of num_key_value_heads 4, got \(1, 7\)"),
        ({"intermediate_size": 42}, r"chains must be whole parts of intermediate_size 42, got \(2, 6\)"),
        ({"hidden_size": 34, "head_dim": 4}, r"chains must be whole parts of hidden_size 34, got \(2, 6\)"),
        ({"share_kv": True}, r"num_key_value_heads must divide the heads of every chain, .* with share_kv, got 4"),
    ),
    ids=str,
)  # fmt: skip
def test_bad_configs(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^CoLMConfig: {message}$"):
        CoLMConfig(**{**TINY, **fields})


def test_bad_calls() -> None:
    model, ids = model_of(), torch.randint(61, (2, 5))
    for chains in (0, 3, -1, True, 1.0):
        with pytest.raises(ValueError, match=r"CoLMForCausalLM: chains must be an integer from 1 to 2, got"):
            model(ids, chains=chains)
    for call in (lambda: model.submodel(0), lambda: model.submodel(3)):
        with pytest.raises(ValueError, match=r"CoLMForCausalLM.submodel: chains must be an integer from 1 to 2, got"):
            call()
    with pytest.raises(ValueError, match=r"CoLMForCausalLM.generate: chains must be an integer from 1 to 2, got 0"):
        model.generate(ids, 2, chains=0)
    with pytest.raises(ValueError, match=r"CoLMForCausalLM.generate: prefill_chains must be None without share_kv"):
        model.generate(ids, 2, prefill_chains=1)
    with pytest.raises(ValueError, match=r"prefill_chains must be an integer from 1 to 2, got 3"):
        model_of(**AIR).generate(ids, 2, prefill_chains=3)
    with pytest.raises(ValueError, match=r"to_transformers: there must be one chain, as submodel\(1\) has, got 2"):
        model.to_transformers()
    with pytest.raises(ValueError, match=r"CoLMConfig: num_key_value_heads 4 of chains \(2, 6\) has no share for"):
        model.expand(1)
    with pytest.raises(ValueError, match=r"CoLMConfig: chains must be at least one integer of at least 1"):
        model.expand((0,))


# ---- training ----


@pytest.mark.slow
@by_air
def test_it_learns_text_in_every_chain(air: dict[str, Any]) -> None:
    """Bytes of CPython's help topics: each chain gets below what the frequency of bytes gives, and larger ones more."""
    text = torch.tensor(list("\n".join(topics[name] for name in sorted(topics)).encode()))
    known, held_out = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "chains": (4, 4)}
    torch.manual_seed(0)
    model = CoLMForCausalLM(CoLMConfig(**{**TINY, **sizes, **air}))
    counts = known.bincount(minlength=256).float() + 1
    by_frequency = -(counts / counts.sum())[held_out].log().mean().item()
    evaluation = held_out[: 64 * 60].view(-1, 64)

    def loss() -> Tensor:
        ids = known[torch.randint(len(known) - 64, (16, 1)) + torch.arange(64)]
        found: Tensor = model(ids, labels=ids, all_chains=True).loss
        return found

    train(model, loss, steps=150, rate=6e-3)
    with torch.inference_mode():
        first, second = model(evaluation, labels=evaluation, all_chains=True).chain_losses.tolist()
    assert second + 0.05 < first < by_frequency - 0.35, (first, second, by_frequency)
