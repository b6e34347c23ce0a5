"""warpform's DeBERTa, v1 to v3, against those of transformers. What all encoders share is tested in test_bert.py."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

import warpform
from helpers.compare import assert_close
from helpers.parity import check_gradients, check_losses, make_mask, randomise
from warpform import models

transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 100,
    "max_position_embeddings": 80,
    "relative_attention": True,
}
V1 = {**SIZES, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": -1, "type_vocab_size": 0}
# As microsoft/deberta-v3-base has it, smaller: rows of 70 tokens go past the exact buckets (8) and past the last one.
V3 = {
    **SIZES,
    "pos_att_type": "p2c|c2p",
    "position_buckets": 16,
    "max_relative_positions": 40,
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
}
# As microsoft/deberta-v2-xlarge has it.
V2_XLARGE = {**V3, "conv_kernel_size": 3, "conv_act": "gelu", "conv_groups": 1}
KINDS = {"v1": ("Deberta", V1), "v2-xlarge": ("DebertaV2", V2_XLARGE), "v3": ("DebertaV2", V3)}
HEADS = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification")


@pytest.fixture
def _torch_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """DebertaLayerNorm is written out in float32 whatever it is given; the oracle has to be in float64.

    The yardstick gets torch's too: autograd sums the gradient of a weight written out in another order.
    """

    def forward(self: torch.nn.Module, x: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.variance_epsilon)

    monkeypatch.setattr(transformers.models.deberta.modeling_deberta.DebertaLayerNorm, "forward", forward)


torch_norms = pytest.mark.usefixtures("_torch_norms")


def hf_model(kind: str, head: str = "Model", **fields) -> torch.nn.Module:
    torch.manual_seed(0)
    family, sizes = KINDS[kind]
    config = getattr(transformers, f"{family}Config")(**{**sizes, **fields})
    return randomise(getattr(transformers, f"{family}{head}")(config))


def inputs_for(model: torch.nn.Module, mask: Tensor) -> dict[str, Tensor]:
    types = model.config.type_vocab_size
    return {
        "input_ids": torch.randint(0, 97, mask.shape),
        "attention_mask": mask,
        "token_type_ids": torch.randint(0, max(types, 1), mask.shape),
    }


def beside(name: str) -> str | None:
    """The scale of rounding where a gradient cancels.

    The gradients of a row of scores add up to 0, and so what a bias adds to all of a row cancels: wholly for the key
    bias in q.k and for that of position keys, in part for the others.
    """
    for bias in ("query_proj.bias", "key_proj.bias", "pos_query_proj.bias", "pos_key_proj.bias"):
        if name.endswith(f"attention.self.{bias}"):
            return name.removesuffix(bias) + "value_proj.bias"
    for bias in ("q_bias", "pos_q_proj.bias"):
        if name.endswith(f"attention.self.{bias}"):
            return name.removesuffix(bias) + "v_bias"
    if name.endswith("encoder.LayerNorm.bias"):
        return name.replace("bias", "weight")
    # A few numbers, whose mean rounding is chance.
    return "classifier.weight" if name == "classifier.bias" else None


def check_parity(model: torch.nn.Module, inputs: dict[str, Tensor]) -> None:
    """Every hidden state and the gradient of every parameter."""
    oracle = copy.deepcopy(model).double()
    ours = models.from_transformers(copy.deepcopy(model))
    mask = inputs["attention_mask"].bool()
    outputs, losses = {}, {}
    for name, m in (("eager", model), ("oracle", oracle), ("ours", ours)):
        out = m(**inputs, output_hidden_states=True)
        assert torch.equal(out.last_hidden_state, out.hidden_states[-1])
        outputs[name] = out.hidden_states
        torch.manual_seed(5)
        losses[name] = sum((s[mask] * torch.randn(s.shape)[mask].to(s.dtype)).sum() for s in out.hidden_states)
        # What an option leaves unused has gradient 0, not none.
        losses[name] = losses[name] + sum(0 * p.sum() for p in m.parameters())
    assert len(outputs["ours"]) == len(outputs["eager"])
    for i, (found, truth, yardstick) in enumerate(
        zip(outputs["ours"], outputs["oracle"], outputs["eager"], strict=True)
    ):
        assert not found[~mask].any(), "padded tokens must be 0"
        assert_close(f"state {i}", found[mask], truth[mask], yardstick[mask])
    check_gradients(
        ours,
        losses["ours"],
        (model, losses["eager"]),
        (oracle, losses["oracle"]),
        is_key=lambda name: False,
        beside=beside,
    )


@torch_norms
@pytest.mark.parametrize("pattern", ("right", "left", "holes"))
@pytest.mark.parametrize("kind", KINDS)
def test_parity(kind: str, pattern: str) -> None:
    model = hf_model(kind)
    torch.manual_seed(1)
    check_parity(model, inputs_for(model, make_mask(pattern, (1, 70, 37), 70)))


NO_TERMS: dict[str, object] = {"pos_att_type": None}
EACH_TERM: list[dict[str, object]] = [{"pos_att_type": ["c2p"]}, {"pos_att_type": ["p2c"]}, NO_TERMS]


@pytest.mark.sampled
@torch_norms
@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        *(("v1", fields) for fields in EACH_TERM),
        ("v1", {"relative_attention": False}),
        ("v1", {"max_relative_positions": 13}),
        ("v1", {"type_vocab_size": 2, "position_biased_input": False}),
        ("v1", {"embedding_size": 20, "type_vocab_size": 2, "pad_token_id": None}),
        ("v1", {"hidden_act": "gelu_new", "layer_norm_eps": 0.3, "num_attention_heads": 1}),
        *(("v3", fields) for fields in EACH_TERM),
        *(("v3", {"share_att_key": False, **fields}) for fields in ({}, *EACH_TERM)),
        ("v3", {"relative_attention": False}),
        ("v3", {"position_buckets": -1}),
        ("v3", {"position_buckets": 0, "max_relative_positions": -1}),
        ("v3", {"position_buckets": 5, "max_relative_positions": 11}),
        ("v3", {"position_buckets": 256, "max_relative_positions": 512}),
        ("v3", {"norm_rel_ebd": "none", "position_biased_input": True}),
        ("v3", {"type_vocab_size": 2, "embedding_size": 20}),
        ("v3", {"embedding_size": 20, "position_biased_input": True, "type_vocab_size": 2, "hidden_act": "relu"}),
        ("v2-xlarge", {"conv_kernel_size": 7, "conv_groups": 4, "conv_act": "tanh", "num_hidden_layers": 1}),
        ("v2-xlarge", {"conv_kernel_size": 1, "layer_norm_eps": 0.3}),
    ],
    ids=str,
)
def test_parity_of_options(kind: str, fields: dict) -> None:
    model = hf_model(kind, **fields)
    torch.manual_seed(1)
    check_parity(model, inputs_for(model, make_mask("holes", (3, 17, 41), 50)))


@torch_norms
@pytest.mark.parametrize("kind", KINDS)
def test_parity_where_only_a_part_of_the_relative_positions_is_reached(kind: str) -> None:
    # 5 columns reach 9 distances; with all of them real, and with holes that make sequences shorter than distances.
    model = hf_model(kind)
    for mask in (torch.ones(2, 5, dtype=torch.long), torch.tensor([[1, 0, 0, 0, 1], [0, 1, 0, 1, 1]])):
        check_parity(model, inputs_for(model, mask))


def test_sequences_longer_than_max_position_embeddings_without_absolute_positions() -> None:
    model = hf_model("v3")
    model.embeddings.position_ids = torch.arange(200).unsqueeze(0)  # a buffer that transformers slices, then ignores
    check_parity(model, inputs_for(model, make_mask("right", (150, 9), 150)))
    with pytest.raises(ValueError, match="at most max_position_embeddings = 80 long, got 81"):
        models.from_transformers(hf_model("v1"))(torch.zeros(1, 81, dtype=torch.long))


@torch_norms
@pytest.mark.parametrize("kind", KINDS)
def test_packed_ids_and_embeddings(kind: str) -> None:
    model = hf_model(kind, embedding_size=20)
    oracle, ours = copy.deepcopy(model).double(), models.from_transformers(model)
    mask = make_mask("holes", (3, 17, 0, 9), 21)
    rows = mask.any(1)
    tokens, real = mask.bool(), mask[rows].bool()
    ids = torch.randint(0, 97, mask.shape)
    padded = ours(ids, mask, output_hidden_states=True).hidden_states
    truth, eager = (m(ids[rows], mask[rows], output_hidden_states=True).hidden_states for m in (oracle, model))
    for capacity in (None, 63):
        packing = warpform.Packing.from_mask(mask, capacity=capacity)
        packed = ours(packing.pack(ids), packing=packing, output_hidden_states=True)
        assert len(packed.hidden_states) == len(padded) == len(truth)
        for i, state in enumerate(map(packing.unpack, packed.hidden_states)):
            if capacity is None:
                assert torch.equal(state, padded[i])
            # Products of more rows may be added up in another order.
            assert_close(f"state {i}", state[tokens], truth[i][real], eager[i][real])
            assert not state[~tokens].any()
    x = torch.randn(4, 21, 20)
    embeds = oracle(inputs_embeds=x[rows].double(), attention_mask=mask[rows])[0]
    yardstick = model(inputs_embeds=x[rows], attention_mask=mask[rows])[0]
    found = ours(inputs_embeds=x, attention_mask=mask)[0]
    assert_close("embeddings", found[tokens], embeds[real], yardstick[real])
    for shape in ((2, 7), (0, 7), (2, 0)):
        empty = torch.zeros(shape, dtype=torch.long)
        out = ours(empty, empty)
        assert out.last_hidden_state.shape == (*shape, 48) and not out.last_hidden_state.any()


@pytest.mark.parametrize("kind", KINDS)
def test_nan_in_masked_positions_does_not_leak(kind: str) -> None:
    ours = models.from_transformers(hf_model(kind))
    mask = make_mask("holes", (3, 17, 9), 21)
    x = torch.randn(3, 21, 48)
    dirty = x.masked_fill((mask == 0).unsqueeze(-1), float("nan")).requires_grad_()
    out = ours(inputs_embeds=dirty, attention_mask=mask)[0]
    assert torch.equal(out, ours(inputs_embeds=x, attention_mask=mask)[0])
    out.sum().backward()
    assert torch.isfinite(dirty.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in ours.parameters() if p.grad is not None)


@torch_norms
@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind: str, tmp_path: Path) -> None:
    model = hf_model(kind)
    ours = models.from_transformers(model)
    assert set(ours.state_dict()) == set(ours.weight_names())
    fused = dict(model.named_parameters()).get("encoder.layer.0.attention.self.in_proj.weight")
    assert kind != "v1" or ours.encoder.layers[0].attention.qkv.weight is fused
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    assert ours.to_transformers() is model
    inputs = inputs_for(model, make_mask("right", (17, 9), 17))
    mask = inputs["attention_mask"].bool()
    expected = ours(**inputs)[0]
    truth, eager = (m(**inputs)[0][mask] for m in (copy.deepcopy(model).double(), model))
    assert_close("written back", expected[mask], truth, eager)

    model.save_pretrained(tmp_path)
    read = models.from_pretrained(tmp_path)
    assert type(read) is type(ours) and read.config == ours.config and not read.training
    assert torch.equal(read(**inputs)[0], expected)
    again = read.to_transformers()
    assert type(again) is type(model) and again is not model
    assert_close("read and given back", again(**inputs)[0][mask], truth, eager)


def test_weights_that_a_config_has_no_use_for(tmp_path: Path) -> None:
    """Published checkpoints hold absolute positions that the model does not add, and heads of pretraining."""
    model = hf_model("v3", "ForMaskedLM", legacy=False)
    model.save_pretrained(tmp_path)
    weights = safetensors_torch.load_file(tmp_path / "model.safetensors")
    for name in (
        "deberta.embeddings.position_embeddings.weight",
        "mask_predictions.dense.weight",
        "cls.predictions.bias",
    ):
        weights[name] = torch.randn(80, 48)
    safetensors_torch.save_file(weights, tmp_path / "model.safetensors")
    ids = torch.randint(0, 97, (2, 9))
    truth, eager = (m(ids, output_hidden_states=True) for m in (copy.deepcopy(model).double(), model))
    encoder = models.from_pretrained(tmp_path)
    assert_close("encoder", encoder(ids)[0], truth.hidden_states[-1], eager.hidden_states[-1])
    with_head = models.DebertaV2ForMaskedLM.from_pretrained(tmp_path)
    assert_close("logits", with_head(ids).logits, truth.logits, eager.logits)
    with pytest.raises(ValueError, match="lack cls.predictions.transform.LayerNorm.bias"):
        models.DebertaV2ForMaskedLM.from_pretrained(tmp_path, legacy=True)
    weights["deberta.embeddings.unheard_of"] = torch.randn(3)
    safetensors_torch.save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="have unknown embeddings.unheard_of"):
        models.from_pretrained(tmp_path)


# ---- heads ----


def labels_for(model: torch.nn.Module, head: str, mask: Tensor) -> Tensor:
    if head == "ForSequenceClassification":
        return torch.randint(0, model.config.num_labels, (len(mask),))
    classes = 97 if head == "ForMaskedLM" else model.config.num_labels
    return torch.randint(0, classes, mask.shape).masked_fill((mask == 0) | (torch.rand(mask.shape) < 0.3), -100)


@torch_norms
@pytest.mark.parametrize(
    ("kind", "head", "fields"),
    [
        *((kind, head, {"num_labels": 3}) for kind in ("v1", "v3") for head in HEADS),
        ("v1", "ForMaskedLM", {"legacy": False}),
        ("v1", "ForMaskedLM", {"embedding_size": 20}),
        ("v3", "ForMaskedLM", {"legacy": False, "hidden_act": "relu"}),
        ("v2-xlarge", "ForMaskedLM", {"embedding_size": 20}),
        ("v3", "ForSequenceClassification", {"pooler_hidden_act": "tanh", "cls_dropout": 0.3}),
    ],
    ids=str,
)
def test_parity_of_heads(kind: str, head: str, fields: dict, tmp_path: Path) -> None:
    model = hf_model(kind, head, **fields)
    oracle = copy.deepcopy(model).double()
    torch.manual_seed(1)
    # The classifier of transformers reads column 0, which in a row padded on the right is the first real token.
    mask = make_mask("right" if head == "ForSequenceClassification" else "holes", (3, 50, 21), 50)
    batches = [{**inputs_for(model, mask), "labels": labels_for(model, head, mask)} for _ in range(16)]
    inputs = batches[0]
    ours = models.from_transformers(copy.deepcopy(model))
    results = {name: m(**inputs) for name, m in (("ours", ours), ("oracle", oracle), ("eager", model))}
    tokens = mask.bool() if head != "ForSequenceClassification" else torch.ones(3, dtype=torch.bool)
    logits = {name: r.logits[tokens] for name, r in results.items()}
    assert_close("logits", logits["ours"], logits["oracle"], logits["eager"])
    assert not results["ours"].logits[~tokens].any()
    check_losses(ours, model, oracle, batches)
    losses = {name: r.loss for name, r in results.items()}
    unused = {name: sum(0 * p.sum() for p in m.parameters()) for name, m in
              (("ours", ours), ("oracle", oracle), ("eager", model))}  # fmt: skip
    check_gradients(
        ours,
        losses["ours"] + unused["ours"],
        (model, losses["eager"] + unused["eager"]),
        (oracle, losses["oracle"] + unused["oracle"]),
        is_key=lambda name: False,
        beside=beside,
    )

    model.save_pretrained(tmp_path)
    read = getattr(models, type(model).__name__).from_pretrained(tmp_path)
    assert type(read) is type(ours) and torch.equal(read(**inputs).logits, results["ours"].logits)
    back = read.to_transformers()
    assert type(back) is type(model)
    assert_close("given back", back(**inputs).logits[tokens], logits["oracle"], logits["eager"])


@torch_norms
@pytest.mark.parametrize(
    ("labels", "fields"),
    [
        (torch.tensor([2, -1, 0]), {}),
        (torch.tensor([-7, -1, -100]), {}),
        (torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0], [0.4, 0.4, 0.2]]), {}),
        (torch.tensor([0.3, -1.0, 2.0]), {"num_labels": 1}),
        (torch.tensor([2, 1, 0]), {"problem_type": "single_label_classification"}),
        (
            torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0]]),
            {"problem_type": "multi_label_classification"},
        ),
        (torch.tensor([[0.6, 0.2, 0.1], [0.4, 0.9, 0.3], [0.2, 0.5, 0.8]]), {"problem_type": "regression"}),
    ],
    ids=str,
)
def test_losses_of_the_sequence_classifier(labels: Tensor, fields: dict) -> None:
    for kind in ("v1", "v3"):
        model = hf_model(kind, "ForSequenceClassification", **{"num_labels": 3, **fields})
        oracle, ours = copy.deepcopy(model).double(), models.from_transformers(copy.deepcopy(model))
        batches = [{"input_ids": torch.randint(0, 97, (3, 7)), "labels": labels} for _ in range(16)]
        check_losses(ours, model, oracle, batches)


def test_shapes_of_labels_of_the_sequence_classifier() -> None:
    ours = models.from_transformers(hf_model("v3", "ForSequenceClassification", num_labels=3))
    ids = torch.randint(0, 97, (3, 7))
    labels = torch.tensor([2, 1, 0])
    assert torch.equal(ours(ids, labels=labels.unsqueeze(1)).loss, ours(ids, labels=labels).loss)
    for labels, shape in ((torch.zeros(2), r"\[3\], got \[2\]"), (torch.zeros(3, 2), r"\[3, 3\], got \[3, 2\]")):
        with pytest.raises(ValueError, match=f"labels must have shape {shape}"):
            ours(ids, labels=labels)


# ---- training, compilation, errors ----


@torch_norms
@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_where_transformers_has_it(kind: str) -> None:
    """With a probability of 1 what is dropped is exactly 0, so both sides agree without the same random numbers."""
    packing = warpform.Packing.from_lengths([9, 9])
    mask = torch.ones(2, 9, dtype=torch.long)
    x = torch.randn(2, 9, 48)
    for hidden_dropout in (1.0, 0.0):
        model = hf_model(kind, hidden_dropout_prob=hidden_dropout, attention_probs_dropout_prob=0.0)
        ours = models.from_transformers(model)
        if hidden_dropout == 0.0:  # of the relative positions alone, which otherwise nothing shows
            for theirs, layer in zip(model.encoder.layer, ours.encoder.layers, strict=True):
                assert layer.attention.position_dropout == theirs.attention.self.pos_dropout.p == 0.0
                theirs.attention.self.pos_dropout.p = layer.attention.position_dropout = 1.0
        oracle = copy.deepcopy(model.encoder).double()
        model.train(), oracle.train(), ours.train()
        eager, truth = model.encoder(x, mask).last_hidden_state, oracle(x.double(), mask).last_hidden_state
        found, _ = ours.encoder(x.flatten(0, 1), packing)
        assert_close(f"hidden dropout {hidden_dropout}", packing.unpack(found), truth, eager)
    dropping = models.from_transformers(hf_model(kind)).train()
    with pytest.raises(NotImplementedError, match="attention_probs_dropout_prob is 0.1"):
        dropping(torch.zeros(2, 5, dtype=torch.long))


@pytest.mark.parametrize("kind", KINDS)
def test_new_models_are_initialised_and_trainable(kind: str) -> None:
    family, sizes = KINDS[kind]
    config = getattr(models, f"{family}Config").from_transformers(sizes, attention_probs_dropout_prob=0.0)
    encoder = getattr(models, f"{family}Model")(config)
    assert type(encoder.to_transformers()).__name__ == f"{family}Model"
    for head in HEADS:
        model = getattr(models, f"{family}{head}")(config, encoder)
        assert model.training and model.base is encoder
        labels = torch.zeros(2, dtype=torch.long) if "Sequence" in head else torch.zeros(2, 50, dtype=torch.long)
        model(torch.randint(0, 97, (2, 50)), labels=labels).loss.backward()
        assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k == "v3" else pytest.mark.slow) for k in KINDS])
def test_compiles_whole_and_once_for_all_sizes(kind: str) -> None:
    torch._dynamo.reset()
    ours = models.from_transformers(hf_model(kind))
    graphs = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list) -> object:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend=backend)
    for lengths in ((3, 17, 9), (2, 5), (64,) * 5):
        packing = warpform.Packing.from_lengths(lengths)
        ids = torch.randint(0, 97, (packing.total,))
        with torch.no_grad():
            expected, out = ours(ids, packing=packing), compiled(ids, packing=packing)
        assert torch.equal(out[0], expected[0])
    assert len(graphs) == 1
    torch._dynamo.reset()


@torch_norms
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_and_autocast(kind: str) -> None:
    model = hf_model(kind)
    ours = models.from_transformers(model)
    ids, mask = torch.randint(0, 97, (2, 50)), make_mask("right", (50, 31), 50)
    real = mask.bool()
    oracle, eager = copy.deepcopy(model).double()(ids, mask)[0], copy.deepcopy(model).bfloat16()(ids, mask)[0]
    half = models.from_transformers(copy.deepcopy(model).bfloat16())(ids, mask)[0]
    assert half.dtype == torch.bfloat16
    assert_close("bfloat16", half[real], oracle[real], eager[real])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ours(ids, mask)[0]
    assert_close("autocast", out[real].bfloat16(), oracle[real], eager[real])


def test_bad_input_names_the_option() -> None:
    v1, v2 = models.DebertaConfig, models.DebertaV2Config
    for config in (v1, v2):
        name = config.__name__
        for fields, message in (
            ({"talking_head": True}, "talking_head=True is not supported"),
            ({**V1, "pooler_hidden_size": 12}, "pooler_hidden_size=12 is not supported, only 48"),
            ({**V1, "attention_head_size": 16}, "attention_head_size=16 is not supported, only 12"),
            ({"output_attentions": True}, "output_attentions=True is not supported"),
        ):
            with pytest.raises(ValueError, match=f"{name}: {message}"):
                config.from_transformers(fields)
        with pytest.raises(ValueError, match="num_attention_heads must divide hidden_size 48, got 5"):
            config(hidden_size=48, num_attention_heads=5)
        with pytest.raises(ValueError, match="pooler_hidden_act must be one of"):
            config(pooler_hidden_act="maxout")
        with pytest.raises(ValueError, match="cls_dropout must be between 0 and 1"):
            config(cls_dropout=1.5)
    assert v1.from_transformers(V1).pos_att_type == v2(pos_att_type="C2P | p2c").pos_att_type == ("c2p", "p2c")
    relative = {"relative_attention": True, "position_buckets": 32}
    with pytest.raises(ValueError, match="max_relative_positions must be at least 18 with 32 position_buckets, got 17"):
        v2(**relative, max_relative_positions=17)
    with pytest.raises(ValueError, match="position_buckets must be at least 2"):
        v2(relative_attention=True, position_buckets=1)
    with pytest.raises(ValueError, match="conv_kernel_size must be odd, or 0 for none, got 4"):
        v2(conv_kernel_size=4)
    with pytest.raises(ValueError, match="conv_kernel_size must be odd, got 4"):
        warpform.nn.TokenConvolution(8, 4)
    with pytest.raises(ValueError, match="conv_act must be one of"):
        v2(conv_act="maxout")
    with pytest.raises(
        ValueError, match="DebertaForMaskedLM: embedding_size must be hidden_size 48 where legacy is Fal"
    ):
        models.DebertaForMaskedLM(v1.from_transformers(V1, embedding_size=20, legacy=False))
    with pytest.raises(ValueError, match="DebertaV2ForMaskedLM: tie_word_embeddings=False is not supported"):
        models.DebertaV2ForMaskedLM(v2.from_transformers(V3, tie_word_embeddings=False))
    with pytest.raises(TypeError, match="DebertaV2Config has no field 'buckets'"):
        models.from_transformers(hf_model("v3"), buckets=2)
    with pytest.raises(TypeError, match="must be one of .*DebertaModel, .*DebertaV2Model.* of transformers"):
        models.from_transformers(torch.nn.Linear(2, 2))
    ours = models.from_transformers(hf_model("v3"))
    ids = torch.zeros(2, 5, dtype=torch.long)
    with pytest.raises(ValueError, match="DebertaV2Model: attention_mask must be 2-D"):
        ours(ids, torch.ones(2, 1, 5, 5))
    with pytest.raises(ValueError, match=r"DebertaV2Model: token_type_ids must have shape \[2, 5\]"):
        models.from_transformers(hf_model("v3", type_vocab_size=2))(ids, token_type_ids=ids[:1])
