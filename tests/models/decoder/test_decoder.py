"""The decoder against LLaMA, Mistral and Qwen2 of transformers: logits, every gradient, generation, files both ways."""

from __future__ import annotations

import copy
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.compare import assert_close
from helpers.generation import check_generation
from helpers.parity import check_gradients, check_losses, make_mask, randomise
from helpers.training import train
from warpform import Packing, _library, models
from warpform.models import DecoderConfig, DecoderForCausalLM
from warpform.nn import Branch, _product
from warpform.nn.cores import AttentionCore

transformers = pytest.importorskip("transformers")

VOCABULARY = 61
TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "hidden_act": "gelu"}),
    "llama3": ("Llama", {"rope_scaling": LLAMA3, "rope_theta": 500.0}),
    "linear": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "mistral": ("Mistral", {"sliding_window": 5, "head_dim": 16}),
    "full mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "sliding qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
}


def theirs(kind: str, **fields: Any) -> nn.Module:
    name, options = KINDS[kind]
    sizes = {**TINY, **options, **fields}
    config = getattr(transformers, f"{name}Config")(**sizes, attn_implementation="eager", pad_token_id=None)
    return randomise(getattr(transformers, f"{name}ForCausalLM")(config))


class ExactRotary(nn.Module):
    """transformers' rotary tables in float64, where it makes them in float32 whatever the model's dtype is."""

    def __init__(self, frequencies: Tensor) -> None:
        super().__init__()
        self.frequencies = frequencies

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = (position_ids.unsqueeze(-1) * self.frequencies).repeat(1, 1, 2)
        return angles.cos(), angles.sin()


def in_double(hf: nn.Module) -> nn.Module:
    """The oracle: their modules in float64."""
    hf = copy.deepcopy(hf).double()
    ours = models.from_transformers(hf)
    rotary = ours.stack.branches[0].core.rotary
    hf.model.rotary_emb = ExactRotary(rotary.frequencies())
    return hf


def real_logits(hf: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Their logits at real tokens, sequence by sequence without padding, each token at its padded place."""
    places = torch.arange(ids.shape[1])
    found = []
    for row, kept in zip(ids, mask.bool(), strict=True):
        if kept.any():
            # Without a mask they would take a gap in the positions for the beginning of another text.
            alone, ones = row[kept][None], torch.ones(1, int(kept.sum()), dtype=torch.int64)
            found.append(hf(alone, attention_mask=ones, position_ids=places[kept][None], use_cache=False).logits[0])
    return torch.cat(found)


def real_loss(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """The mean cross-entropy of the next token of the same sequence."""
    total, count = logits.new_zeros(()), 0
    for row, kept, out in zip(ids, mask.bool(), logits.split(mask.sum(1).tolist()), strict=True):
        total = total + F.cross_entropy(out[:-1], row[kept][1:], reduction="sum")
        count += max(0, int(kept.sum()) - 1)
    return total / count


def batch(pattern: str = "right") -> tuple[Tensor, Tensor]:
    mask = make_mask(pattern, (13, 9, 1, 4), 13)
    return torch.randint(VOCABULARY, mask.shape), mask


@pytest.mark.parametrize("pattern", ("right", "left", "holes"))
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_those_of_transformers(kind: str, pattern: str) -> None:
    eager = theirs(kind)
    oracle, ours = in_double(eager), models.from_transformers(copy.deepcopy(eager))
    assert isinstance(ours, DecoderForCausalLM)
    if pattern == "holes" and ours.config.sliding_window is not None:
        pytest.skip("transformers' window counts holes, ours counts tokens")
    ids, mask = batch(pattern)
    kept = mask.bool()
    out = ours(ids, mask, labels=ids)
    truth, yardstick = real_logits(oracle, ids, mask), real_logits(eager, ids, mask)
    assert_close("logits", out.logits[kept], truth, yardstick)
    assert not out.logits[~kept].any()
    losses = [real_loss(logits, ids, mask) for logits in (truth, yardstick)]
    check_gradients(ours, out.loss, (eager, losses[1]), (oracle, losses[0]))


def test_the_same_call_gives_the_same_result() -> None:
    """With padding on the right, and labels that leave it out, the loss is theirs too."""
    eager = theirs("llama")
    oracle, ours = in_double(eager), models.from_transformers(eager)
    batches = []
    for _ in range(6):
        ids, mask = (t[:2] for t in batch())
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    check_losses(ours, eager, oracle, batches)
    outputs = [model(**batches[0], use_cache=False).logits[mask.bool()] for model in (ours, oracle, eager)]
    assert_close("logits", *outputs)
    assert_close("unmasked", *(m(ids).logits for m in (ours, oracle, eager)))


@pytest.mark.parametrize("kind", KINDS)
def test_both_ways_and_through_files(kind: str, tmp_path: Path) -> None:
    hf = theirs(kind)
    ours, (ids, mask) = models.from_transformers(hf), batch()
    expected = ours(ids, mask).logits
    assert ours.to_transformers() is hf
    # One that was made here becomes a model of theirs, and takes a state dict of theirs.
    made = DecoderForCausalLM(ours.config)
    made.load_state_dict(hf.state_dict())
    assert torch.equal(made.eval()(ids, mask).logits, expected)
    back = made.to_transformers()
    assert type(back) is type(hf)
    state = hf.state_dict()
    assert all(torch.equal(weight, state[name]) for name, weight in back.state_dict().items())
    # Each reads what the other saved.
    ours.save_pretrained(tmp_path / "ours")
    found = models.from_pretrained(tmp_path / "ours")
    assert isinstance(found, DecoderForCausalLM) and found.config == ours.config
    assert_close("saved", found(ids, mask).logits, expected.double(), expected)
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert type(read) is type(hf)
    theirs_again = [real_logits(m, ids, mask) for m in (read, in_double(hf), hf)]
    assert_close("read by transformers", *theirs_again)
    hf.save_pretrained(tmp_path / "theirs")
    assert DecoderForCausalLM.from_pretrained(tmp_path / "theirs").config == ours.config


def test_positions_and_numbers_of_items_are_those_of_transformers() -> None:
    eager = theirs("llama")
    oracle, ours = in_double(eager), models.from_transformers(eager)
    ids = torch.randint(VOCABULARY, (2, 9))
    given = {"position_ids": torch.arange(3, 12)[None], "use_cache": False}
    results = [m(ids, attention_mask=torch.ones_like(ids), **given) for m in (ours, oracle, eager)]
    assert_close("logits", *(out.logits for out in results))
    texts = [torch.randint(VOCABULARY, (2, 9)) for _ in range(6)]
    check_losses(
        ours, eager, oracle, [{"input_ids": t, "labels": t, "num_items_in_batch": torch.tensor(5)} for t in texts]
    )


def test_texts_that_begin_again_within_a_row() -> None:
    """Positions that restart, without a mask: several texts in a row, as transformers' collator without padding has."""
    eager = theirs("llama")
    oracle, ours = in_double(eager), models.from_transformers(eager)
    ids = torch.randint(VOCABULARY, (2, 9))
    positions = torch.cat([torch.arange(n) for n in (4, 5, 2, 3, 4)]).view(2, 9)
    results = [m(ids, position_ids=positions, use_cache=False).logits for m in (ours, oracle, eager)]
    assert_close("logits", *results)
    whole = ours(ids, position_ids=torch.arange(9)[None]).logits
    assert torch.equal(whole, ours(ids).logits) and not torch.equal(whole, results[0])


def test_logits_in_blocks_have_the_dtype_and_width_of_the_head() -> None:
    """A CPU makes the logits of many padded rows in blocks; a head in float32 of more rows than the config names."""
    model = model_of().bfloat16()
    model.head = nn.Sequential(nn.Linear(48, 70, bias=False).bfloat16(), Widened())
    ids = torch.randint(VOCABULARY, (30, 40))
    mask = (torch.arange(40) < torch.arange(11, 41).unsqueeze(1)).long()
    with torch.inference_mode():
        few, many = model(ids[:3], mask[:3]).logits, model(ids, mask).logits
    assert few.dtype == many.dtype == torch.float32 and many.shape == (30, 40, 70)
    assert not many[mask == 0].any() and torch.equal(many, model(ids, mask).logits)


class Widened(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float()


def test_a_stack_that_was_changed_is_not_written_over_a_transformers_model() -> None:
    hf = theirs("llama")
    before = {name: w.clone() for name, w in hf.state_dict().items()}
    for change in (
        lambda m: m.stack.insert(2, copy.deepcopy(m.stack.branches[0])),
        lambda m: m.stack.insert(4, copy.deepcopy(m.stack.branches[1])),
        lambda m: m.stack.lags.__setitem__(3, 1),
        lambda m: setattr(m, "head", nn.Linear(48, 70, bias=False)),
    ):
        ours = models.from_transformers(hf)
        change(ours)
        with pytest.raises(ValueError, match="to_transformers: "):
            ours.to_transformers()
        assert all(torch.equal(w, before[name]) for name, w in hf.state_dict().items())
    ours = models.from_transformers(hf)
    ours.stack.lags[3] = 1
    with pytest.raises(ValueError, match="save_pretrained: the lags of the stack must be 0"):
        ours.save_pretrained("nowhere")


def test_losses_of_branches_are_shared_out_over_batches() -> None:
    """Gradients added up over batches with a number of items: as one batch, also for what is no sum over labels."""

    class Costly(Branch):
        def body(self, x: Tensor, step: Any, cache: Any = None) -> Any:
            out = super().body(x, step, cache)
            return out, torch.ones((), dtype=x.dtype)

    model, ids = model_of(), torch.randint(VOCABULARY, (4, 6))
    plain = model(ids, labels=ids).loss
    model.stack.branches[1].__class__ = Costly
    parts = [model(one, labels=one, num_items_in_batch=20).loss for one in ids.split(2)]
    assert float((sum(parts) - plain - 1).abs().detach()) < 1e-12
    assert float((model(ids, labels=ids).loss - plain - 1).abs().detach()) < 1e-12


def test_adapters_of_peft() -> None:
    peft = pytest.importorskip("peft")
    model, ids = model_of().float(), torch.randint(VOCABULARY, (2, 6))
    before = model(ids).logits
    config = peft.LoraConfig(r=2, target_modules=["inwards", "outwards"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    assert torch.equal(adapted(input_ids=ids).logits, before)
    adapted(input_ids=ids, labels=ids).loss.backward()
    trained = [name for name, p in adapted.named_parameters() if p.grad is not None]
    assert trained and all("lora" in name for name in trained)


def test_training_one_trains_the_other() -> None:
    hf = theirs("llama")
    ours, (ids, mask) = models.from_transformers(hf).train(), batch()
    ours(ids, mask, labels=ids).loss.backward()
    torch.optim.SGD(ours.parameters(), 0.1).step()
    ours.to_transformers()
    fresh = models.from_transformers(copy.deepcopy(hf))
    assert all(torch.equal(one, other) for one, other in zip(fresh.parameters(), ours.parameters(), strict=True))


def model_of(**fields: Any) -> DecoderForCausalLM:
    model = DecoderForCausalLM(DecoderConfig(**{**TINY, **fields})).double().eval()
    randomise(model)
    return model


def test_packed_padded_and_embedded_agree() -> None:
    model, (ids, mask) = model_of(), batch("holes")
    packing = Packing.from_mask(mask)
    padded = model(ids, mask, labels=ids)
    packed = model(packing.pack(ids), labels=packing.pack(ids), packing=packing)
    assert torch.equal(packing.pack(padded.logits), packed.logits) and torch.equal(padded.loss, packed.loss)
    embeds = model.get_input_embeddings()(ids)
    for given in (
        model(inputs_embeds=embeds, attention_mask=mask, labels=ids),
        model(inputs_embeds=packing.pack(embeds), packing=packing, labels=packing.pack(ids)),
    ):
        assert torch.equal(given.loss, padded.loss)
    embeds = embeds.detach().requires_grad_()
    assert torch.autograd.grad(model(inputs_embeds=embeds, attention_mask=mask, labels=ids).loss, embeds)[0].any()


@pytest.mark.parametrize("fields", ({}, {"sliding_window": 4, "architecture": "mistral"}), ids=("whole", "window"))
@pytest.mark.parametrize("prompts", ((5,), (3, 9, 1)), ids=("one", "ragged"))
def test_generation_with_caches_is_generation_without(prompts: tuple[int, ...], fields: dict[str, Any]) -> None:
    check_generation(model_of(**fields), [torch.randint(VOCABULARY, (n,)) for n in prompts])


def test_generation_is_that_of_transformers() -> None:
    hf = theirs("llama").double()
    hf.generation_config.eos_token_id = None
    ours = models.from_transformers(hf)
    text = torch.randint(VOCABULARY, (1, 7))
    expected = hf.generate(text, attention_mask=torch.ones_like(text), max_new_tokens=9, do_sample=False)
    assert torch.equal(ours.generate(text, 9)[0], expected[0])


def test_tokens_can_be_decoded_by_hand() -> None:
    """With caches of one's own: some sequences at a time, and one that is taken back to an earlier token."""
    model, ids = model_of(), torch.randint(VOCABULARY, (2, 6))
    expected = model(ids).logits
    with torch.inference_mode():
        caches = model.caches(2, 8)
        first = model.decode([ids[0, :4], ids[1, :2]], caches)
        second = model.decode([ids[1, 2:6]], caches, rows=[1])
        caches.rewind(1, 3)
        again = model.decode([ids[1, 3:5]], caches, rows=[1])
    for found, truth in ((first, expected[[0, 1], [3, 1]]), (second, expected[1:, 5]), (again, expected[1:, 4])):
        assert float((found - truth).detach().abs().max()) < 1e-12


@pytest.mark.skipif(not _library.cpu_isa(), reason="there are no kernels for this CPU")
@pytest.mark.parametrize("sequences", (1, 3))
def test_decoding_multiplies_by_the_kernel_for_few_rows(sequences: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WARPFORM_ONEDNN", "WARPFORM_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(_product, "_is_amd", lambda: True)
    monkeypatch.setattr(_product, "LEAST_WEIGHT", 1 << 18)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    model = model_of(hidden_size=512, intermediate_size=520, num_attention_heads=8, num_key_value_heads=8).float()
    ids, seen = torch.randint(VOCABULARY, (sequences, 12)), []
    multiply = _product._multiply_few
    monkeypatch.setattr(_product, "_multiply_few", lambda x, *rest: (seen.append(x.shape), multiply(x, *rest))[1])
    with torch.inference_mode():
        caches = model.caches(sequences, 12)
        model.decode(list(ids[:, :11]), caches)
        assert not seen
        found = model.decode(list(ids[:, 11:]), caches)
        # Two products of attention and two of the feed-forward block in each layer; the head is smaller.
        assert len(seen) == 4 * 2 and set(seen) == {(sequences, 512), (sequences, 520)}
        eager = model(ids).logits[:, -1]
        assert_close("logits", found, model.double()(ids).logits[:, -1], eager)


def test_a_branch_can_be_put_into_the_stack() -> None:
    """An adapter that adds nothing at first changes no logit and takes part in generation."""
    model, ids = model_of(), torch.randint(VOCABULARY, (2, 6))
    expected, texts = model(ids).logits, model.generate(ids, 5)
    core = AttentionCore(1, head_dim=8)
    adapter = Branch(nn.RMSNorm(48), nn.Linear(48, core.width), core, nn.Linear(8, 48)).double()
    nn.init.zeros_(adapter.outwards.weight)
    nn.init.zeros_(adapter.outwards.bias)
    model.stack.insert(2, adapter)
    assert torch.equal(model(ids).logits, expected)
    assert all(torch.equal(one, other) for one, other in zip(model.generate(ids, 5), texts, strict=True))
    model(ids, labels=ids).loss.backward()
    assert adapter.outwards.weight.grad.any()


@pytest.mark.parametrize(("size", "count"), (("llama", 6_738_415_616), ("mistral", 7_241_732_096)))
def test_sizes(size: str, count: int) -> None:
    """LLaMA-7B's and Mistral-7B's counts of parameters, without their memory."""
    fields: dict[str, Any] = {"architecture": size}
    if size == "mistral":
        fields |= {"num_key_value_heads": 8, "intermediate_size": 14_336, "sliding_window": 4096}
    with torch.device("meta"):
        model = DecoderForCausalLM(DecoderConfig(**fields))
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    eager = theirs("llama")
    rounded = copy.deepcopy(eager).to(dtype)
    oracle, ours = in_double(rounded), models.from_transformers(copy.deepcopy(rounded))
    ids, mask = batch()
    with torch.no_grad():
        truth, yardstick = (real_logits(m, ids, mask) for m in (oracle, rounded))
        assert_close("logits", ours(ids, mask).logits[mask.bool()], truth, yardstick)
        assert len(ours.generate([ids[0], ids[1, :4]], 3)) == 2


def test_bad_arguments() -> None:
    for fields, text in (
        ({"num_key_value_heads": 3}, "num_key_value_heads must divide num_attention_heads 4, got 3"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "num_attention_heads must divide hidden_size 48"),
        ({"hidden_act": "nothing"}, "hidden_act must be one of .* got 'nothing'"),
        ({"sliding_window": 0}, "sliding_window must be at least 1, the token itself, got 0"),
        ({"layer_types": ("full_attention",)}, "layer_types must be 2 of full_attention, sliding_attention"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type must be one of default, linear, llama3, got 'yarn'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_type linear needs factor"),
        ({"head_dim": 0}, "head_dim must be None or at least 1, got 0"),
        ({"rope_theta": 0.0}, "rope_theta must be above 0, got 0.0"),
        ({"head_dim": 7}, "rotary positions need an even head_dim, got 7"),
        ({"architecture": "gpt"}, "architecture must be one of llama, mistral, qwen2, got 'gpt'"),
    ):
        with pytest.raises(ValueError, match=f"DecoderConfig: .*{text}"):
            DecoderConfig(**{**TINY, **fields})
    model, (ids, mask) = model_of(), batch()
    for call, text in (
        (lambda: model(), "exactly one of input_ids and inputs_embeds"),
        (lambda: model(ids, use_cache=True), "use_cache is not supported"),
        (lambda: model(ids, position_ids=ids[:, 1:]), r"position_ids must have shape \[4, 13\], got \[4, 12\]"),
        (lambda: model(ids[0]), r"input_ids must be of shape \[batch, seqlen\], got \[13\]"),
        (lambda: model(ids, mask[:2]), r"attention_mask must be of shape \[4, 13\] as input_ids is, got \[2, 13\]"),
        (lambda: model(ids, labels=ids[:, 1:]), r"labels must have shape \[4, 13\], got \[4, 12\]"),
        (lambda: model(inputs_embeds=torch.ones(1, 2, 5)), r"inputs_embeds must have shape \[1, 2, 48\]"),
        (lambda: model(ids, mask, packing=Packing.from_mask(mask)), "attention_mask must be None with packing"),
        (lambda: model(ids, packing=Packing.from_mask(mask)), r"input_ids must have shape \[27\], got \[4, 13\]"),
        (lambda: model(torch.zeros(1, 65, dtype=torch.int64)), "at most max_position_embeddings, 64, tokens, got 65"),
        (lambda: model.generate(ids, 60), "at most max_position_embeddings, 64, got 73"),
        (lambda: model.generate([ids[0, :0]], 3), "prompts must be tensors of at least one token"),
        (
            lambda: model.generate(torch.tensor(3), 3),
            r"integer tensors of shape \[length\], got torch.int64 of shape \[\]",
        ),
        (lambda: model.generate([ids], 3), r"integer tensors of shape \[length\], got torch.int64 of shape \[4, 13\]"),
        (lambda: model.generate([[1, 2]], 3), r"integer tensors of shape \[length\], got \[1, 2\]"),
        (lambda: model.generate([ids[0].float()], 3), r"integer tensors of shape \[length\], got torch.float32"),
        (lambda: model.generate([], 3), "prompts must be tensors of at least one token"),
        (lambda: model.caches(1, 65), "capacity must be at most max_position_embeddings, 64, got 65"),
        (lambda: model.decode([ids[0, :0]], model.caches(1, 9)), "each of the 1 rows must get at least one token"),
        (lambda: model.generate(ids, 3, temperature=-1), "temperature must be at least 0"),
        (lambda: model.decode([ids[0]], model_of(num_hidden_layers=1).caches(1, 20)), "for 4 branches, got those of 2"),
        (lambda: model.decode([ids[0]], model_of(num_key_value_heads=4).caches(1, 20)), r"\[2, 12\], .* got \[4, 12\]"),
        (lambda: model.decode([ids[0]], model.caches(2, 20)), "tokens must be 2 tensors, one for each row, got 1"),
        (lambda: model.decode([ids[0]], model.caches(1, 12)), "a sequence may have at most 12 tokens, got 13"),
    ):
        with pytest.raises(ValueError, match=text):
            call()


def test_what_a_file_does_not_say_is_as_in_transformers() -> None:
    """And what only transformers reads comes along."""
    for kind, window in (("llama", None), ("mistral", 4096), ("qwen2", None)):
        sizes = {name: size for name, size in TINY.items() if name != "num_key_value_heads"}
        config = DecoderConfig.from_fields({**sizes, "num_attention_heads": 32, "head_dim": 2, "model_type": kind})
        name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}[kind]
        expected = getattr(transformers, f"{name}Config")(**sizes)
        assert config.sliding_window == window
        assert config.kv_heads == (8 if kind == "mistral" else 32)
        del expected
    config = DecoderConfig.from_transformers({**TINY, "eos_token_id": [7, 9], "bos_token_id": 5})
    assert config.eos_token_id == (7, 9) and config.bos_token_id == 5
    assert transformers.LlamaConfig(**config.to_transformers()).eos_token_id == [7, 9]
    with pytest.raises(TypeError, match="max_new_tokens must be an int, got 2.0"):
        model_of().generate(torch.ones(1, 2, dtype=torch.int64), 2.0)


def test_configs_that_one_side_lacks() -> None:
    for kind, fields, text in (
        ("Llama", {"attention_dropout": 0.1}, "attention_dropout=0.1 is not supported"),
        ("Llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type must be one of"),
    ):
        config = getattr(transformers, f"{kind}Config")(**TINY, **fields)
        hf = getattr(transformers, f"{kind}ForCausalLM")(config)
        with pytest.raises(ValueError, match=text):
            models.from_transformers(hf)
    for fields, text in (
        ({"sliding_window": 3}, "llama of transformers has no config with a sliding_window"),
        ({"qkv_bias": True}, "llama of transformers has no config with a qkv_bias of its own"),
        ({"architecture": "mistral", "attention_bias": True}, "mistral .* with biases of the feed-forward or"),
        ({"architecture": "qwen2"}, "qwen2 of transformers has no config with no qkv_bias"),
    ):
        with pytest.raises(ValueError, match=text):
            DecoderConfig(**{**TINY, **fields}).to_transformers()
    with pytest.raises(TypeError, match="LlamaForCausalLM"):
        models.from_transformers(transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=4, n_head=1)))


@pytest.mark.slow
def test_it_learns_text() -> None:
    """Bytes of CPython's help topics, far below what the frequency of bytes alone gives."""
    text = torch.tensor(list("\n".join(topics[name] for name in sorted(topics)).encode()))
    known, held_out = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 176, "max_position_embeddings": 96}
    model = DecoderForCausalLM(DecoderConfig(**{**TINY, **sizes}))
    counts = known.bincount(minlength=256).float() + 1
    by_frequency = -(counts / counts.sum())[held_out].log().mean().item()

    def loss() -> Tensor:
        ids = known[torch.randint(len(known) - 96, (16, 1)) + torch.arange(96)]
        return model(ids, labels=ids).loss

    train(model, loss, steps=250, rate=6e-3)
    evaluation = held_out[: 64 * 60].view(-1, 64)
    with torch.inference_mode():
        after = float(model.eval()(evaluation, labels=evaluation).loss)
    assert after < by_frequency - 0.8, (after, by_frequency)
