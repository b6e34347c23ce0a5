"""attn_implementation="warpform" against transformers' own attention, and what happens where it cannot be used."""

from __future__ import annotations

import copy
import gc
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import warpform
from helpers.compare import assert_close
from warpform.integrations import transformers as integration

transformers = pytest.importorskip("transformers")

TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
}
GQA = {**TINY, "num_key_value_heads": 2}
MODELS = {
    "bert": ("Bert", TINY),
    "albert": ("Albert", {**TINY, "embedding_size": 16}),
    "distilbert": ("DistilBert", {"vocab_size": 97, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 40}),
    "llama": ("Llama", GQA),
    "mistral": ("Mistral", {**GQA, "sliding_window": 3}),
    "gemma2": ("Gemma2", {**GQA, "head_dim": 8, "sliding_window": 3, "attn_logit_softcapping": 2.0}),
}
PATTERNS = ("right", "left", "holes", "none")


def oracle_mask(**kwargs) -> Tensor:
    """transformers' own [B, 1, Sq, Sk], always."""
    return transformers.masking_utils.sdpa_mask(
        **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    )


def oracle_attention(module, q, k, v, mask, scaling=None, softcap=None, **kwargs):
    """Attention as it is written. transformers' eager one takes its softmax in float32 whatever the dtype."""
    k, v = (t.repeat_interleave(q.size(1) // t.size(1), 1) for t in (k, v))
    score = q @ k.transpose(2, 3) * scaling
    if softcap:
        score = softcap * torch.tanh(score / softcap)
    seen = torch.ones_like(score, dtype=torch.bool) if mask is None else mask.expand_as(score)
    alive = seen.any(-1, keepdim=True)
    weights = torch.softmax(score.masked_fill(~seen & alive, -torch.inf), -1) * alive
    return (weights @ v).transpose(1, 2), None


def exact(model: torch.nn.Module) -> torch.nn.Module:
    """transformers' model and mask in float64."""
    model = copy.deepcopy(model).double()
    model.set_attn_implementation("oracle")
    return model


@pytest.fixture(autouse=True)
def registered() -> None:
    integration.register()
    transformers.AttentionInterface.register("oracle", oracle_attention)
    transformers.AttentionMaskInterface.register("oracle", oracle_mask)
    torch.manual_seed(0)


def build(name: str, kind: str = "Model", **fields) -> torch.nn.Module:
    """A model whose every weight is random, with transformers' eager attention."""
    family, options = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**{**options, **fields})
    model = getattr(transformers, family + kind)._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key.lower() and key.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.1)
    return model


def ours(model: torch.nn.Module) -> torch.nn.Module:
    """The same weights, with warpform's attention."""
    config = copy.deepcopy(model.config)
    copied = type(model)._from_config(config, attn_implementation="warpform").eval()
    copied.load_state_dict(model.state_dict())
    assert copied.config._attn_implementation == "warpform" and model.config._attn_implementation == "eager"
    return copied.to(next(model.parameters()).dtype)


def make_mask(pattern: str, lengths: tuple[int, ...] = (9, 4, 1, 6), seqlen: int = 9) -> Tensor | None:
    mask = torch.arange(seqlen) < torch.tensor(lengths).unsqueeze(1)
    if pattern == "left":
        return mask.flip(1)
    if pattern == "holes":
        return torch.stack([row[torch.randperm(seqlen)] for row in mask])
    return None if pattern == "none" else mask


def states(model: torch.nn.Module, ids: Tensor, mask: Tensor | None, **kwargs) -> Tensor:
    if hasattr(model.config, "use_cache"):
        kwargs.setdefault("use_cache", False)
    return model(ids, attention_mask=None if mask is None else mask.long(), **kwargs).last_hidden_state


def judged_together(name: str) -> tuple[str, ...]:
    """The biases of query, key and value are judged as one: no softmax sees a key bias, so its gradient is 0 but for
    rounding and has no scale of its own, and that of the query bias is small as what it sums cancels."""
    for parts in ((".query.", ".key.", ".value."), ("q_lin.", "k_lin.", "v_lin.")):
        for part in parts:
            if name.endswith(part + "bias"):
                return tuple(name.replace(part, other) for other in parts)
    return (name,)


def check_parity(eager: torch.nn.Module, forward, real: Tensor) -> None:
    """Outputs at real tokens and the gradient of every parameter; `forward` runs a model."""
    models = {"ours": ours(eager), "oracle": exact(eager), "eager": eager}
    weight = torch.randn_like(forward(eager))[real]
    found, grads = {}, {}
    for name, model in models.items():
        found[name] = forward(model)[real]
        loss = (found[name] * weight.to(found[name].dtype)).sum()
        parameters = dict(model.named_parameters())
        values = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        grads[name] = dict(zip(parameters, values, strict=True))
    assert_close("output", found["ours"], found["oracle"], found["eager"])
    for name, truth in grads["oracle"].items():
        assert (truth is None) == (grads["ours"][name] is None), name
        if truth is None:
            continue
        together = (
            torch.cat([grads[which][n] for n in judged_together(name)]) for which in ("ours", "oracle", "eager")
        )
        assert_close(name, *together, gradient=True)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", MODELS)
def test_parity(name: str, pattern: str) -> None:
    if pattern == "holes" and "sliding_window" in MODELS[name][1]:
        pytest.skip("refused: a window over tokens is not one over places")
    mask = make_mask(pattern, (23, 9, 1, 14), 23)
    ids = torch.randint(0, 97, (4, 23))
    real = torch.ones(4, 23, dtype=torch.bool) if mask is None else mask
    check_parity(build(name), lambda model: states(model, ids, mask), real)


@pytest.mark.parametrize("name", ["bert", "albert", "distilbert", "llama"])
def test_padding_is_not_attended_to(name: str) -> None:
    """Where a model passed no mask, what stands in padding would show."""
    # At the left: what is at the right no token of a causal model sees anyway.
    model, mask = ours(build(name)), make_mask("left")
    ids = torch.randint(0, 97, (4, 9))
    other = torch.where(mask, ids, torch.randint(0, 97, (4, 9)))
    with torch.no_grad():
        assert torch.equal(states(model, ids, mask)[mask], states(model, other, mask)[mask])
        assert not torch.equal(states(model, ids, mask)[mask], states(model, ids, None)[mask])


def test_row_without_tokens() -> None:
    model, mask = ours(build("bert")), make_mask("right", (3, 0, 9))
    out = states(model, torch.randint(0, 97, (3, 9)), mask)
    assert out.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    eager, mask, ids = build("llama").to(dtype), make_mask("right"), torch.randint(0, 97, (4, 9))
    with torch.no_grad():
        found, yardstick = states(ours(eager), ids, mask), states(eager, ids, mask)
        truth = states(exact(eager), ids, mask)
    assert found.dtype == dtype
    assert_close("output", found[mask], truth[mask], yardstick[mask])


# --- Packing is cached, and never stale ---


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The masks that Packing.from_mask was called with."""
    calls: list[Tensor] = []
    make = warpform.Packing.from_mask
    monkeypatch.setattr(
        integration.Packing, "from_mask", staticmethod(lambda mask, capacity=None: calls.append(mask) or make(mask))
    )
    return calls


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_packs_once_per_forward(name: str, mode, packings: list[Tensor]) -> None:
    model, ids = ours(build(name)), torch.randint(0, 97, (4, 9))
    with mode():
        for count, pattern in enumerate(("right", "left"), 1):
            states(model, ids, make_mask(pattern))
            assert len(packings) == count
        states(model, ids, None)
        assert len(packings) == 2, "no mask needs no Packing"


def attend(mask: Tensor | None, *, causal: bool = False, length: int = 4, **kwargs) -> Tensor:
    """integration.attention alone, on the same states each time."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = torch.randn(3, 2, 2, length, 8, generator=generator)
    config = SimpleNamespace(is_encoder_decoder=False)
    module = kwargs.pop("module", SimpleNamespace(is_causal=causal, config=config))
    return integration.attention(module, q, k, v, mask, **kwargs)[0]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_a_mask_changed_in_place_is_seen(dtype: torch.dtype, packings: list[Tensor]) -> None:
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).to(dtype)
    first = attend(mask)
    assert torch.equal(attend(mask), first) and len(packings) == 1
    view = mask[1]
    view[2] = 1  # through a view too
    assert torch.equal(attend(mask), attend(mask.clone()))
    assert not torch.equal(attend(mask), first) and len(packings) == 3


def test_a_mask_changed_in_place_is_seen_in_inference_mode() -> None:
    """torch counts no writes there, so nothing is remembered of a user's mask."""
    with torch.inference_mode():
        mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
        first = attend(mask)
        mask[1, 2] = 1
        assert torch.equal(attend(mask), attend(mask.clone())) and not torch.equal(attend(mask), first)


@pytest.mark.parametrize("writer", ["torch", "numpy"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_model_sees_a_mask_changed_in_place(mode, writer: str) -> None:
    """Writes through numpy too, which torch does not count: a model's mask is made anew in each forward pass."""
    eager = build("bert")
    model, ids = ours(eager), torch.randint(0, 97, (4, 9))
    with mode():
        mask = make_mask("right")  # bool, so that transformers hands it on without a copy
        model(ids, attention_mask=mask)
        version = integration._version(mask)
        (mask if writer == "torch" else mask.numpy())[1] = True
        assert (integration._version(mask) == version) == (writer == "numpy" or version is None)
        found = model(ids, attention_mask=mask).last_hidden_state[mask]
        torch.testing.assert_close(found, eager(ids, attention_mask=mask).last_hidden_state[mask])


def test_a_new_mask_at_the_same_address_is_another_mask() -> None:
    storage = torch.zeros(8, dtype=torch.bool)
    results = []
    for lengths in ((4, 2), (1, 3)):
        made = torch.arange(4) < torch.tensor(lengths).unsqueeze(1)
        storage.copy_(made.flatten())
        mask = torch.from_dlpack(storage.numpy()).view(2, 4)  # the same memory, a counter of writes of its own
        assert mask._version == 0
        results.append(attend(mask))
        assert torch.equal(results[-1], attend(made))
        del mask
        gc.collect()
    assert not torch.equal(*results)


def test_nothing_outlives_its_mask() -> None:
    gc.collect()
    before = len(integration._known)
    mask = make_mask("right", (4, 2), 4)
    attend(mask)
    assert len(integration._known) == before + 1
    del mask
    gc.collect()
    assert len(integration._known) == before


# --- several sequences in one row ---

LENGTHS = (3, 1, 5)
EDGES = torch.tensor([0, 3, 4, 9], dtype=torch.int32)
POSITIONS = torch.tensor([[0, 1, 2, 0, 0, 1, 2, 3, 4]])
PACKED = {"cu_seq_lens_q": EDGES, "cu_seq_lens_k": EDGES, "max_length_q": 5, "max_length_k": 5}


def attend_packed(**given) -> Tensor:
    """integration.attention alone, on one row of nine tokens, the same each time."""
    q, k, v = torch.randn(3, 1, 2, 9, 8, generator=torch.Generator().manual_seed(1))
    return integration.attention(SimpleNamespace(is_causal=True), q, k, v, None, **given)[0]


@pytest.mark.parametrize("name", ["bert", "llama", "mistral"])
def test_packed_sequences(name: str) -> None:
    lengths = [*LENGTHS, 14, 2, 9]
    ids, edges = torch.randint(0, 97, (1, sum(lengths))), torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    packed = {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": 14, "max_length_k": 14}

    def forward(model: torch.nn.Module) -> Tensor:
        if model.config._attn_implementation == "warpform":
            return states(model, ids, None, position_ids=positions, **packed)
        return torch.cat([states(model, part, None) for part in ids.split(lengths, 1)], 1)  # one by one

    check_parity(build(name), forward, torch.ones_like(ids, dtype=torch.bool))


def test_packed_sequences_with_tensors_for_lengths_and_int64_offsets() -> None:
    model, ids = ours(build("llama")), torch.randint(0, 97, (1, 9))
    given = {key: torch.tensor(5) if key.startswith("max") else EDGES.long() for key in PACKED}
    with torch.no_grad():
        expected = states(model, ids, None, position_ids=POSITIONS, **PACKED)
        assert torch.equal(states(model, ids, None, position_ids=POSITIONS, **given), expected)
        with_mask = states(model, ids, torch.ones(1, 9), position_ids=POSITIONS, **PACKED)
        assert torch.equal(with_mask, expected)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_packed_sequences_by_position_ids_alone(name: str) -> None:
    """transformers sees them where there is neither a mask nor a cache, and its eager attention keeps them apart."""
    ids = torch.randint(0, 97, (2, 23))
    positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in ((3, 1, 5, 14), (23,))])
    everything = torch.ones(2, 23, dtype=torch.bool)
    check_parity(build(name), lambda model: states(model, ids, None, position_ids=positions), everything)


@pytest.mark.parametrize(
    "positions",
    [torch.arange(9)[None], torch.tensor([[0, 1, 0, 0, 0, 1, 2, 3, 4]]), torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5]])],
)
def test_position_ids_that_disagree_raise(positions: Tensor) -> None:
    model, ids = ours(build("llama")), torch.randint(0, 97, (1, 9))
    with pytest.raises(ValueError, match=r"position_ids must begin anew where cu_seq_lens_q says .* rows \[3, 4\]"):
        states(model, ids, None, position_ids=positions, **PACKED)
    for shape in ((1, 9), (9,)):
        with pytest.raises(ValueError, match="position_ids must begin anew"):
            attend_packed(position_ids=positions.view(shape), **PACKED)


def test_position_ids_that_agree_pass() -> None:
    """An offset as RoBERTa's, an empty sequence, rows past the last one, and positions of three axes."""
    for positions in (POSITIONS, POSITIONS[0], torch.arange(9).expand(3, 1, 9)):
        assert torch.equal(attend_packed(position_ids=positions, **PACKED), attend_packed(**PACKED))
    check = integration._check_positions
    check(POSITIONS + 2, EDGES, 9)
    check(POSITIONS, torch.tensor([0, 3, 3, 4, 9]), 9)
    check(torch.cat([POSITIONS, torch.zeros(1, 3, dtype=torch.int64)], 1), EDGES, 12)


def test_offsets_with_padding_or_incomplete_raise() -> None:
    model, ids = ours(build("llama")), torch.randint(0, 97, (1, 9))
    with pytest.raises(ValueError, match="an attention_mask with padding and cu_seq_lens_q exclude each other"):
        states(model, ids, make_mask("right", (7,)), position_ids=POSITIONS, **PACKED)
    for key in PACKED:
        some = {name: value for name, value in PACKED.items() if name != key}
        with pytest.raises(ValueError, match="go together; one is missing"):
            states(model, ids, None, position_ids=POSITIONS, **some)


# --- generation, cross-attention, compilation ---


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
@pytest.mark.parametrize("pattern", ["left", "full"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_generation(name: str, pattern: str, cache: str | None) -> None:
    """Queries fewer than keys: they are the last ones."""
    eager = build(name, "ForCausalLM")
    ids, mask = torch.randint(0, 97, (3, 6)), make_mask("left", (6, 3, 1) if pattern == "left" else (6, 6, 6), 6)
    how = {"cache_implementation": cache} if cache else {"use_cache": False}
    results = []
    for model in (ours(eager), exact(eager), eager):
        tokens = model.generate(
            ids, attention_mask=mask.long(), do_sample=False, max_new_tokens=4, pad_token_id=0, eos_token_id=None,
            output_logits=True, return_dict_in_generate=True, **how,
        )  # fmt: skip
        results.append((tokens.sequences, torch.stack(tokens.logits)))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[2][0], results[1][0])
    assert_close("logits", *(logits for _, logits in results))


def test_several_tokens_after_a_cache() -> None:
    """A prompt in two parts, padded on the left."""
    eager = build("llama")
    model, ids, mask = ours(eager), torch.randint(0, 97, (4, 9)), make_mask("left")
    with torch.no_grad():
        first = model(ids[:, :5], attention_mask=mask[:, :5].long(), use_cache=True)
        second = model(ids[:, 5:], attention_mask=mask.long(), past_key_values=first.past_key_values)
        whole, truth = states(eager, ids, mask), states(exact(eager), ids, mask)
    both = torch.cat([first.last_hidden_state, second.last_hidden_state], 1)
    # Positions count from the padded row's beginning in both.
    assert_close("output", both[mask], truth[mask], whole[mask])


def test_cross_attention_over_padding() -> None:
    """As many queries as keys, and yet not the same sequence: the mask is of the keys alone."""
    config = transformers.BartConfig(
        vocab_size=97, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=40, decoder_ffn_dim=40, dropout=0.0, pad_token_id=1,
    )  # fmt: skip
    eager = transformers.BartModel._from_config(config, attn_implementation="eager").eval()
    model, ids, mask = ours(eager), torch.randint(3, 97, (4, 9)), make_mask("right")
    outputs = []
    with torch.no_grad():
        for one in (model, exact(eager), eager):
            out = one(ids, attention_mask=mask.long(), decoder_input_ids=ids.flip(1), use_cache=False)
            outputs.append(out.last_hidden_state)
    assert_close("every decoder position", *outputs)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_compiles_as_one_graph(name: str) -> None:
    model = ours(build(name))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for pattern in ("right", "left"):
            ids, mask = torch.randint(0, 97, (4, 9)), make_mask(pattern)
            torch.testing.assert_close(states(compiled, ids, mask)[mask], states(model, ids, mask)[mask])


def test_a_model_can_be_switched() -> None:
    model, ids, mask = build("bert"), torch.randint(0, 97, (4, 9)), make_mask("right")
    with torch.no_grad():
        before = states(model, ids, mask)[mask]
        model.set_attn_implementation("warpform")
        torch.testing.assert_close(states(model, ids, mask)[mask], before)
        model.set_attn_implementation("sdpa")
        torch.testing.assert_close(states(model, ids, mask)[mask], before)


# --- what raises ---


@pytest.mark.parametrize("kind", ["Model", "ForSequenceClassification"])
@pytest.mark.parametrize("family", ["Deberta", "DebertaV2"])
def test_a_model_that_ignores_it_raises(family: str, kind: str) -> None:
    """transformers itself takes any name that is registered, and runs DeBERTa's own attention."""
    config, make = getattr(transformers, f"{family}Config"), getattr(transformers, family + kind)
    ignores = rf'{family}{kind} ignores attn_implementation="warpform".*see warpform\.models\.from_transformers'
    with pytest.raises(ValueError, match=ignores):
        make._from_config(config(**TINY), attn_implementation="warpform")
    model = make(config(**TINY))
    for name in ("warpform", {"": "warpform"}):
        with pytest.raises(ValueError, match=ignores):
            model.set_attn_implementation(name)
    assert model.config._attn_implementation == "eager"


def test_dropout_raises_in_training_only() -> None:
    model = ours(build("bert"))
    ids, mask = torch.randint(0, 97, (4, 9)), make_mask("right")
    states(model, ids, mask)
    with pytest.raises(
        NotImplementedError, match="attention dropout is not supported, got 0.1; .*attention_probs_dropout"
    ):
        states(model.train(), ids, mask)
    states(ours(build("bert", attention_probs_dropout_prob=0.0)).train(), ids, mask).sum().backward()


@pytest.mark.parametrize("dims", [3, 4])
def test_a_mask_of_more_dimensions_raises(dims: int) -> None:
    model, ids = ours(build("bert")), torch.randint(0, 97, (2, 5))
    with pytest.raises(ValueError, match=r"attention_mask must be of shape \[batch, keys\], got"):
        model(ids, attention_mask=torch.ones(2, 1, 5, 5)[:, 0] if dims == 3 else torch.ones(2, 1, 5, 5))


def test_mixed_devices_raise() -> None:
    mask = torch.ones(2, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="attention_mask must be on cpu as query is, got meta"):
        attend(mask.to("meta"))
    q = torch.randn(2, 2, 4, 8)
    for name in ("key", "value"):
        states = {"key": q, "value": q, name: q.to("meta")}
        with pytest.raises(ValueError, match=f"{name} must be on cpu as query is, got meta"):
            integration.attention(SimpleNamespace(is_causal=False), q, attention_mask=mask, **states)
    packed = {**PACKED, "position_ids": POSITIONS}
    for name in ("cu_seq_lens_q", "cu_seq_lens_k", "position_ids"):
        with pytest.raises(ValueError, match=f"{name} must be on cpu as query is, got meta"):
            attend_packed(**{**packed, name: packed[name].to("meta")})


def test_bad_masks_raise() -> None:
    with pytest.raises(TypeError, match="attention_mask must be bool or integer, got float32"):
        attend(torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"attention_mask must be of shape \[2, at most 4\], got"):
        attend(torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="a causal attention_mask must cover the 4 queries"):
        attend(torch.ones(2, 3, dtype=torch.bool), causal=True)
    with pytest.raises(ValueError, match="a sliding window needs masks without holes"):
        attend(torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]]), sliding_window=2)
    with pytest.raises(ValueError, match="nothing says whether SimpleNamespace is causal"):
        attend(None, module=SimpleNamespace())
    model = ours(build("llama"))
    with pytest.raises(ValueError, match="attention_mask must cover the 9 keys"):
        model(torch.randint(0, 97, (2, 9)), attention_mask=torch.ones(2, 5))


@pytest.mark.parametrize("name", integration._UNSUPPORTED)
def test_what_changes_scores_raises(name: str) -> None:
    with pytest.raises(NotImplementedError, match=rf"\({name}\) is not supported, as SimpleNamespace asks for"):
        attend(None, **{name: torch.ones(1)})
    attend(None, **{name: None})


def test_probabilities_raise() -> None:
    with pytest.raises(NotImplementedError, match="output_attentions needs attn_implementation"):
        attend(None, output_attentions=True)


def test_a_relative_position_bias_raises() -> None:
    config = transformers.T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=40, num_layers=1, num_heads=4)
    # Older releases of transformers have attention of T5's own, for which the name is refused as for DeBERTa.
    refusals = (NotImplementedError, ValueError)
    with pytest.raises(refusals, match="a bias on attention scores .position_bias. is not supported|T5.* ignores"):
        model = transformers.T5EncoderModel._from_config(config, attn_implementation="warpform").eval()
        model(torch.randint(0, 97, (2, 5)))


def test_masks_that_are_not_understood_raise() -> None:
    from transformers.masking_utils import create_causal_mask, create_chunked_causal_mask

    config = transformers.LlamaConfig(**GQA, attn_implementation="warpform")
    states = torch.randn(2, 6, 32)
    given = {"config": config, "inputs_embeds": states, "attention_mask": None, "past_key_values": None}
    assert create_causal_mask(**given).shape == (2, 6)
    with pytest.raises(NotImplementedError, match="masks attention by .*<lambda>"):
        create_causal_mask(**given, and_mask_function=lambda b, h, q, k: q != k)
    config.attention_chunk_size = 2
    with pytest.raises(NotImplementedError, match="masks attention by chunked_overlay"):
        create_chunked_causal_mask(**given)


def test_a_decoder_made_bidirectional() -> None:
    """config.is_causal = False: the mask says so, the attention module does not."""
    eager = build("llama")
    model, ids, mask = ours(eager), torch.randint(0, 97, (4, 9)), make_mask("right")
    for one in (eager, model):
        one.config.is_causal = False
    with torch.no_grad():
        for given in (mask, None):
            real = mask if given is not None else torch.ones_like(mask)
            torch.testing.assert_close(states(model, ids, given)[real], states(eager, ids, given)[real])


def test_importing_warpform_does_not_import_transformers() -> None:
    code = (
        "import sys, warpform; warpform.integrations.transformers.register; "
        "warpform.compat.flash_attn.flash_attn_func; warpform.compat.torch_varlen.varlen_attn; "
        "assert 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_without_transformers_register_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=rf"needs transformers {re.escape(integration.OLDEST)} or later"):
        integration.register()


def test_an_older_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 5.4 mask functions got cache_position in place of q_length and q_offset."""

    def sdpa_mask(batch_size, cache_position, kv_length, kv_offset=0, mask_function=None, attention_mask=None): ...

    monkeypatch.setattr(transformers.masking_utils, "sdpa_mask", sdpa_mask)
    with pytest.raises(
        ImportError, match=rf"needs transformers {re.escape(integration.OLDEST)} or later, got \d+\.\d+"
    ):
        integration.register()


def test_the_oldest_transformers_is_one_number() -> None:
    """The error, the extras that install it, and the page that tells of it."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "docs").is_dir():
        pytest.skip("needs a checkout")
    extras = re.findall(r'"transformers>=([\d.]+)"', (root / "pyproject.toml").read_text(encoding="utf-8"))
    assert extras and set(extras) == {integration.OLDEST}
    assert f"needs transformers {integration.OLDEST} or later" in (root / "docs" / "drop-in.md").read_text("utf-8")
    assert f"before {integration.OLDEST}" in str(integration.register.__doc__)
