"""MatFormer against LLaMA of transformers with feed-forwards cut by hand: for all, for each layer, for each token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.llama import exact_llama, next_token_mean, real_rows
from helpers.parity import make_mask, randomise
from helpers.training import train
from warpform import Packing, models
from warpform.models import DecoderConfig, DecoderForCausalLM, MatFormerConfig, MatFormerForCausalLM
from warpform.nn import nested

TINY: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
WIDTHS = (5, 10, 20, 40)


def model_of(**fields: Any) -> MatFormerForCausalLM:
    model = MatFormerForCausalLM(MatFormerConfig(**{**TINY, **fields})).double()
    randomise(model, std=0.2)
    return model


def dense_of(model: MatFormerForCausalLM) -> DecoderForCausalLM:
    dense = DecoderForCausalLM(DecoderConfig(**model.config.dense_fields())).to(model.dtype).eval()
    dense.load_state_dict(model.state_dict())
    return dense


def batch(vocab: int = TINY["vocab_size"]) -> tuple[Tensor, Tensor]:
    mask = make_mask("holes", (11, 7, 1, 5), 11)
    return torch.randint(vocab, mask.shape), mask


def largest(t: Tensor) -> float:
    return float(t.detach().abs().max())


def assert_same(one: Tensor, other: Tensor, what: str = "") -> None:
    assert largest(one - other) <= 1e-12 * max(1.0, largest(other)), what


def cut_at(hf: Any, widths: Sequence[int]) -> list[list[Tensor]]:
    """LLaMA whose feed-forwards have their first hidden dimensions alone, one number for each layer."""
    for layer, width in zip(hf.model.layers, widths, strict=True):
        mlp = layer.mlp
        for part in (mlp.gate_proj, mlp.up_proj):
            part.weight = nn.Parameter(part.weight[:width].detach())
            part.bias = None if part.bias is None else nn.Parameter(part.bias[:width].detach())
        mlp.down_proj.weight = nn.Parameter(mlp.down_proj.weight[:, :width].detach())
    return hf


def check_against(
    hf: Any, model: MatFormerForCausalLM, granularity: Any, given: tuple[Tensor, Tensor], watch: Any = None
) -> None:
    """Logits, the loss and the gradient of every parameter are those of LLaMA; beyond its widths gradients are 0.

    watch: called with the number of a row before LLaMA is given it.
    """
    ids, mask = given
    rows = real_rows(ids, mask)
    expected = []
    for i, (row, places) in enumerate(rows):
        if watch is not None:
            watch(i)
        # Without a mask they would take a gap in the positions for the beginning of another text.
        ones = torch.ones_like(row)
        expected.append(hf(row, attention_mask=ones, position_ids=places, use_cache=False).logits[0])
    out = model(ids, mask, labels=ids, granularity=granularity)
    assert_same(out.logits[mask.bool()], torch.cat(expected), "logits")
    loss = next_token_mean(expected, [row[0] for row, _ in rows])
    assert_same(out.loss, loss, "loss")
    theirs = dict(hf.named_parameters())
    truths = dict(zip(theirs, torch.autograd.grad(loss, list(theirs.values())), strict=True))
    dense = dense_of(model)
    names = dense.weight_names()
    grads = dict(zip(names, torch.autograd.grad(out.loss, [model.get_parameter(n) for n in names]), strict=True))
    for name, parts in names.items():
        chunks = dense.split_weight(name, grads[name]) if len(parts) > 1 else (grads[name],)
        for part, chunk in zip(parts, chunks, strict=True):
            padded = torch.zeros_like(chunk)
            padded[tuple(slice(n) for n in truths[part].shape)] = truths[part]
            assert_same(chunk, padded, part)


BIASES = {"mlp_bias": True, "attention_bias": True, "hidden_act": "gelu", "tie_word_embeddings": True}


@pytest.mark.parametrize("granularity", (0, 1, 2, 3, None, (0, 3, 1)), ids=str)
@pytest.mark.parametrize("fields", ({}, BIASES), ids=("llama", "biases"))
def test_a_granularity_is_a_llama_of_its_width(granularity: Any, fields: dict[str, Any]) -> None:
    model = model_of(**fields)
    each = granularity if isinstance(granularity, tuple) else (3 if granularity is None else granularity,) * 3
    check_against(cut_at(exact_llama(dense_of(model)), [WIDTHS[g] for g in each]), model, granularity, batch())


@pytest.mark.parametrize("granularity", (None, 3, (3, 3, 3)), ids=str)
def test_full_width_is_the_dense_decoder_bit_for_bit(granularity: Any) -> None:
    model, (ids, mask) = model_of().float(), batch()
    dense, how = dense_of(model), {"granularity": granularity}
    assert model.state_dict().keys() == dense.state_dict().keys()
    results = []
    for one, options in ((model, how), (dense, {})):
        out = one(ids, mask, labels=ids, **options)
        results.append((out.loss, out.logits, *torch.autograd.grad(out.loss, list(one.parameters()))))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


# ---- tokens ----


class Adapted(nn.Linear):
    """Stands in the place of a linear layer, as an adapter does."""


def adapt(model: MatFormerForCausalLM) -> MatFormerForCausalLM:
    for part in model.modules():
        if isinstance(part, nested.NestedFeedForward):
            part.inwards.__class__ = Adapted
    return model


WAYS = ("grouped", "routed", "masked", "too many groups")


def model_in(way: str, monkeypatch: Any, **fields: Any) -> MatFormerForCausalLM:
    monkeypatch.setattr(nested, "takes_groups", lambda x: way == "grouped")
    if way == "too many groups":  # one dimension is a group, and there are twice 40
        fields["granularities"] = (5, 11, 20, 40)
    model = model_of(**fields)
    calls = []
    for name in ("hidden_scatter_linear", "hidden_gather_linear"):
        routed = getattr(nested.ops, name)
        monkeypatch.setattr(nested.ops, name, lambda *a, f=routed, **k: (calls.append(1), f(*a, **k))[1])
    model.routed_calls = calls  # type: ignore[assignment]
    return adapt(model) if way == "masked" else model


@pytest.mark.parametrize("way", WAYS)
def test_tokens_have_the_widths_that_they_ask_for(way: str, monkeypatch: Any) -> None:
    """The oracle sets to 0, before the last product of LLaMA's feed-forward, what is beyond the width of a token."""
    model = model_in(way, monkeypatch, mlp_bias=True)
    hf, widths = exact_llama(dense_of(model)), torch.tensor(model.config.widths)
    ids, mask = batch()
    indices, used = torch.randint(4, mask.shape), torch.ones(0)

    def watch(row: int) -> None:
        nonlocal used
        used = torch.arange(40) < widths[indices[row][mask[row].bool()]].unsqueeze(1)

    for layer in hf.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda module, given: (given[0] * used,))
    # What stands at padding is not used.
    check_against(hf, model, indices.masked_fill(mask == 0, 99), (ids, mask), watch)
    assert len(model.routed_calls) == (2 * 3 if way == "routed" else 0)


@pytest.mark.parametrize("way", WAYS)
def test_all_tokens_at_one_granularity_are_that_granularity(way: str, monkeypatch: Any) -> None:
    model, (ids, mask) = model_in(way, monkeypatch), batch()
    for g in range(4):
        assert_same(
            model(ids, mask, granularity=torch.full_like(ids, g)).logits, model(ids, mask, granularity=g).logits
        )


@pytest.mark.parametrize("way", WAYS)
def test_a_later_width_changes_no_earlier_logit(way: str, monkeypatch: Any) -> None:
    model, ids = model_in(way, monkeypatch), torch.randint(61, (2, 9))
    widths = torch.randint(4, ids.shape)
    other = widths.clone()
    other[:, 6:] = (other[:, 6:] + 1) % 4
    one, two = (model(ids, granularity=each.int()).logits for each in (widths, other))
    assert_same(one[:, :6], two[:, :6])
    assert largest(one[:, 6:] - two[:, 6:]) > 1e-3


def test_packed_padded_and_embedded_agree() -> None:
    model, (ids, mask) = model_of(), batch()
    packing, widths = Packing.from_mask(mask), torch.randint(4, ids.shape)
    for whole, packed in ((widths, packing.pack(widths)), (1, 1), ((0, 2, 1), [0, 2, 1])):
        padded = model(ids, mask, labels=ids, granularity=whole)
        given = {"packing": packing, "labels": packing.pack(ids), "granularity": packed}
        for out in (model(packing.pack(ids), **given), model(inputs_embeds=model.tokens(packing.pack(ids)), **given)):
            assert torch.equal(packing.pack(padded.logits), out.logits) and torch.equal(padded.loss, out.loss)
        assert not padded.logits[mask == 0].any()
    nothing = torch.zeros(1, 3, dtype=torch.int64)
    assert not model(nothing, nothing, granularity=nothing).logits.any()


# ---- generation ----


@pytest.mark.parametrize(
    ("granularity", "draft"), ((None, None), ((0, 3, 2), None), (None, 0), (1, (0, 1, 2)), ((0, 3, 2), 3)), ids=str
)
def test_generation_with_caches_and_drafts_is_generation_without(granularity: Any, draft: Any) -> None:
    model = model_of()
    texts, expected = [torch.randint(61, (n,)) for n in (3, 9, 1)], []
    for text in texts:
        for _ in range(7):
            text = torch.cat((text, model(text[None], granularity=granularity).logits[0, -1:].argmax(1)))
        expected.append(text)
    how = {"granularity": granularity, "draft": draft}
    for options in ({"draft_length": 1}, {"draft_length": 6}) if draft is not None else ({},):
        found = model.generate(texts, 7, **how, **options)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    end = int(expected[0][3 + 2])
    for text, whole, n in zip(model.generate(texts, 7, eos_token_id=end, **how), expected, (3, 9, 1), strict=True):
        after = whole[n:].tolist()
        assert torch.equal(text, whole[: n + after.index(end) + 1 if end in after else len(whole)])
    assert all(torch.equal(one, text) for one, text in zip(model.generate(texts, 0, **how), texts, strict=True))


def test_drafts_that_are_right_save_steps(monkeypatch: Any) -> None:
    model = model_of()
    steps, real = [], model.decode_all
    monkeypatch.setattr(model, "decode_all", lambda *a, **k: (steps.append(len(a[0][0])), real(*a, **k))[1])
    text = model.generate(torch.randint(61, (5,)), 12, draft=3, draft_length=4)[0]
    # One token comes of the prompt, five of each step of the full model, and the last takes what is left.
    assert len(text) == 17 and steps == [5, 5, 1]


# ---- extraction ----


def test_an_extracted_model_is_a_llama(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model, (ids, _) = model_of(tie_word_embeddings=True), batch()
    model.tokens.weight.requires_grad_(False)
    for g, width in enumerate(WIDTHS):
        small = model.extract(g)
        assert type(small) is DecoderForCausalLM and small.config.intermediate_size == width and not small.training
        assert not small.head.weight.requires_grad and small.head.weight is small.tokens.weight
        assert_same(small(ids).logits, model(ids, granularity=g).logits)
        cut = cut_at(exact_llama(dense_of(model)), (width,) * 3).state_dict()
        found = small.to_transformers().state_dict()
        assert found.keys() == cut.keys() and all(torch.equal(found[name], cut[name]) for name in cut)
        if g not in (0, 2):
            continue
        small.float().save_pretrained(tmp_path / str(g))
        read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / str(g))
        assert type(read).__name__ == "LlamaForCausalLM" and read.config.intermediate_size == width
        float32 = 1e-5 * largest(small(ids).logits)
        assert largest(read(ids).logits - small(ids).logits) < float32
        again = DecoderForCausalLM.from_pretrained(tmp_path / str(g))
        assert largest(again(ids).logits - small(ids).logits) < float32
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert not own & {p.untyped_storage().data_ptr() for p in model.extract(None).parameters()}


@pytest.mark.parametrize("gated", (True, False), ids=("gated", "plain"))
def test_what_is_no_llama_is_extracted_too(gated: bool, tmp_path: Path) -> None:
    """Mix'n'Match, and a feed-forward without a gate: a MatFormer, nested as before up to what is left."""
    model, (ids, mask) = model_of(gated=gated, mlp_bias=True, hidden_act="gelu"), batch()
    mixed = model.extract((0, 2, 1))
    assert isinstance(mixed, MatFormerForCausalLM) and mixed.config.sizes == (5, 20, 10)
    assert mixed.config.widths == (5, 10, 20) and mixed.config.gated == gated
    mixed.save_pretrained(tmp_path)
    tokens = torch.randint(3, ids.shape)
    for small in (mixed, models.from_pretrained(tmp_path)):
        assert_same(small(ids, mask).logits, model(ids, mask, granularity=(0, 2, 1)).logits)
        assert_same(small(ids, mask, granularity=1).logits, model(ids, mask, granularity=(0, 1, 1)).logits)
        assert_same(small.extract(1)(ids).logits, small(ids, granularity=1).logits)
        assert_same(small(ids, mask, granularity=tokens * 0 + 1).logits, small(ids, mask, granularity=1).logits)
    uniform = model.extract(1)
    assert isinstance(uniform, DecoderForCausalLM if gated else MatFormerForCausalLM)
    assert_same(uniform(ids).logits, model(ids, granularity=1).logits)
    if not gated:
        assert uniform.config.widths == (5, 10) and uniform.config.layer_sizes is None


@pytest.mark.parametrize("way", WAYS)
def test_tokens_of_layers_that_differ(way: str, monkeypatch: Any) -> None:
    model = model_in(way, monkeypatch, layer_sizes=(20, 5, 40))
    ids, mask = batch()
    widths = torch.randint(4, ids.shape)
    found = model(ids, mask, granularity=widths).logits
    monkeypatch.setattr(nested, "takes_groups", lambda x: True)
    assert_same(found, model(ids, mask, granularity=widths).logits)
    assert_same(model(ids, granularity=torch.full_like(ids, 1)).logits, model(ids, granularity=1).logits)


# ---- sizes, other dtypes, errors ----


@pytest.mark.parametrize(
    ("size", "count", "smallest"),
    (
        ("78M", 78_118_912, None),
        ("180M", 181_403_648, None),
        ("310M", 309_854_208, None),
        ("463M", 463_470_592, None),
        ("850M", 846_200_832, 581_959_680),
    ),
)
def test_sizes(size: str, count: int, smallest: int | None) -> None:
    """The matrices of the paper's MatLM, without norms; S of the largest is its feed-forward's first eighth."""
    with torch.device("meta"):
        model = MatFormerForCausalLM(MatFormerConfig.preset(size))
    assert sum(p.numel() for p in model.parameters() if p.dim() == 2) == count
    if smallest is not None:
        assert sum(p.numel() for p in model.extract(0).parameters() if p.dim() == 2) == smallest


def test_granularities_are_widths_or_parts() -> None:
    assert MatFormerConfig(**TINY).widths == WIDTHS
    for given in ((10, 40), (0.25, 1), [0.25, 1.0]):
        config = MatFormerConfig(**TINY, granularities=given)
        assert config.widths == (10, 40) and config.sizes == (40,) * 3
        assert MatFormerConfig.from_fields(config.to_dict()) == config
    assert MatFormerConfig(**{**TINY, "intermediate_size": 36}, granularities=(1 / 3, 1.0)).widths == (12, 36)


def test_a_drawn_granularity_is_uniform() -> None:
    model = model_of()
    generator = torch.Generator().manual_seed(3)
    drawn = [model.sample(generator) for _ in range(400)]
    assert all(70 < drawn.count(g) < 130 for g in range(4)) and len(set(drawn)) == 4
    generator.manual_seed(3)
    assert [model.sample(generator) for _ in range(400)] == drawn and model.sample() in range(4)


@pytest.mark.parametrize("way", WAYS)
def test_bfloat16_and_checkpointing(way: str, monkeypatch: Any) -> None:
    model, (ids, mask) = model_in(way, monkeypatch, gated=False), batch()
    widths = torch.randint(4, ids.shape)
    for granularity in (2, widths):
        how = {"labels": ids, "granularity": granularity}
        wanted = torch.autograd.grad(model.train()(ids, mask, **how).loss, list(model.parameters()))
        model.stack.gradient_checkpointing = True
        found = torch.autograd.grad(model(ids, mask, **how).loss, list(model.parameters()))
        model.stack.gradient_checkpointing = False
        for one, other in zip(found, wanted, strict=True):
            assert_same(one, other)
    half = model.bfloat16().eval()
    out = half(ids, mask, labels=ids, granularity=widths)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in half.parameters())
    exact = half.double()(ids, mask, granularity=widths).logits
    assert largest(out.logits - exact) < 0.1 * largest(exact)


@pytest.mark.slow
@pytest.mark.parametrize("granularity", (None, 1, "tokens"), ids=str)
def test_compiled(granularity: Any) -> None:
    model, (ids, mask) = model_of(num_hidden_layers=1), batch()
    given = torch.randint(4, ids.shape) if granularity == "tokens" else granularity
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(compiled(ids, mask, granularity=given).logits, model(ids, mask, granularity=given).logits)


def test_many_rows_are_taken_in_blocks() -> None:
    """On a CPU, in inference: as without."""
    model, ids = model_of(max_position_embeddings=700, num_hidden_layers=1), torch.randint(61, (1, 650))
    tokens = torch.randint(4, ids.shape)
    for granularity in (1, tokens):
        with torch.inference_mode():
            found = model(ids, granularity=granularity).logits
        assert_same(found, model(ids, granularity=granularity).logits)


def test_bad_arguments() -> None:
    wanted = r"MatFormerConfig: granularities must be increasing widths, or parts .* 40 of intermediate_size, got "
    for given in ((), (10, 5, 40), (0, 40), (5, 10), (5, 50), (0.3, 0.31, 1.0), (0.5, 0.5, 1.0), (0.5,), (-5, 40)):
        with pytest.raises(ValueError, match=wanted):
            MatFormerConfig(**TINY, granularities=given)
    for sizes in ((5, 10), (5, 10, 15)):
        with pytest.raises(ValueError, match=r"MatFormerConfig: layer_sizes must be 3 of the widths \(5, 10, 20, 40\)"):
            MatFormerConfig(**TINY, layer_sizes=sizes)
    with pytest.raises(ValueError, match="size must be one of 78M, 180M, 310M, 463M, 850M, got '1B'"):
        MatFormerConfig.preset("1B")
    model, (ids, mask) = model_of(), batch()
    place = (
        r"MatFormerForCausalLM: granularity must be None, an integer from 0 to 3, .* or 3 such integers, one for each"
    )
    for given in (4, -1, 40, (0, 1), (0, 1, 2, 3), (0, 1, 4), ()):
        for call in (
            lambda g: model(ids, granularity=g),
            lambda g: model.generate(ids, 2, granularity=g),
            lambda g: model.generate(ids, 2, draft=g),
            model.extract,
        ):
            with pytest.raises(ValueError, match=place):
                call(given)
    for given in (0.5, True, "S", (0, 1.0, 2), (None, 1, 1)):
        with pytest.raises(TypeError, match=place):
            model(ids, granularity=given)
    with pytest.raises(TypeError, match=place):
        model.generate(ids, 2, granularity=torch.zeros_like(ids))
    packing = Packing.from_mask(mask)
    for call, error, text in (
        (
            lambda: model(ids, granularity=ids[:, 1:]),
            ValueError,
            r"granularity must have shape \[4, 11\], got \[4, 10\]",
        ),
        (lambda: model(packing.pack(ids), packing=packing, granularity=ids % 4), ValueError, r"must have shape \[24\]"),
        (lambda: model(ids, granularity=mask * 4), ValueError, "granularity must be within 0 to 3, got 4"),
        (lambda: model(ids, granularity=-mask), ValueError, "granularity must be within 0 to 3, got -1"),
        (lambda: model(ids, granularity=mask.float()), TypeError, "granularity must be integers, got float32"),
        (lambda: model(ids, granularity=mask.bool()), TypeError, "granularity must be integers, got bool"),
        (lambda: model.generate(ids, 2, draft=0, temperature=1.0), ValueError, "temperature must be 0 with draft"),
        (lambda: model.generate(ids, 2, draft=0, draft_length=0), ValueError, "draft_length must be at least 1, got 0"),
        (lambda: model.generate(ids, 60, draft=0), ValueError, "at most max_position_embeddings, 64, got 71"),
    ):
        with pytest.raises(error, match=text):
            call()
    model.stack.branches[1].inwards = nn.Sequential(model.stack.branches[1].inwards)
    with pytest.raises(ValueError, match="extract: merge adapters"):
        model.extract(1)


# ---- training ----


@pytest.mark.slow
def test_all_widths_learn_text_in_one_model() -> None:
    """Bytes of CPython's help topics: every granularity far below what the frequency of bytes alone gives."""
    text = torch.tensor(list("\n".join(topics[name] for name in sorted(topics)).encode()))
    known, held_out = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2}
    sizes |= {"max_position_embeddings": 96, "initializer_range": 0.1}
    model = MatFormerForCausalLM(MatFormerConfig(**{**TINY, **sizes}))
    counts = known.bincount(minlength=256).float() + 1
    by_frequency = -(counts / counts.sum())[held_out].log().mean().item()
    generator = torch.Generator().manual_seed(0)

    def loss() -> Tensor:
        ids = known[torch.randint(len(known) - 96, (16, 1)) + torch.arange(96)]
        return model(ids, labels=ids, granularity=model.sample(generator)).loss

    train(model, loss, steps=200, rate=6e-3)
    evaluation = held_out[: 64 * 60].view(-1, 64)
    with torch.inference_mode():
        losses = [float(model.eval()(evaluation, labels=evaluation, granularity=g).loss) for g in range(4)]
    assert max(losses) < by_frequency - 0.6, (losses, by_frequency)
    prompt = held_out[:20]
    assert torch.equal(model.generate(prompt, 40, draft=0)[0], model.generate(prompt, 40)[0])
    small = model.extract(0)(evaluation, labels=evaluation)
    assert abs(float(small.loss.detach()) - losses[0]) < 1e-5
