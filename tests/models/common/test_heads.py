"""Heads of BERT, ALBERT and DistilBERT against those of transformers: logits, losses and every gradient."""

from __future__ import annotations

import copy
import functools
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
    "Bert": {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 100},
    "Albert": {
        "embedding_size": 20, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 100,
    },
    "DistilBert": {"dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 100},
}  # fmt: skip
HEADS = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification")
MODELS = [f"{family}{head}" for family in SIZES for head in HEADS]


def hf_model(name: str, **fields) -> torch.nn.Module:
    torch.manual_seed(0)
    family = name.partition("For")[0]
    options = {"vocab_size": 97, "num_labels": 5, "attn_implementation": "eager", **SIZES[family], **fields}
    return randomise(getattr(transformers, name)(getattr(transformers, f"{family}Config")(**options)))


def inputs_for(name: str, mask: Tensor) -> dict[str, Tensor]:
    inputs = {"input_ids": torch.randint(0, 97, mask.shape), "attention_mask": mask}
    if not name.startswith("Distil"):
        inputs["token_type_ids"] = torch.randint(0, 2, mask.shape)
    if "Sequence" in name:
        inputs["labels"] = torch.randint(0, 5, mask.shape[:1])
    else:
        labels = torch.randint(0, 97 if "Masked" in name else 5, mask.shape)
        inputs["labels"] = labels.masked_fill((mask == 0) | (torch.rand(mask.shape) < 0.5), -100)
    return inputs


def at_tokens(name: str, logits: Tensor, mask: Tensor) -> Tensor:
    return logits if "Sequence" in name else logits[mask.bool()]


@pytest.mark.parametrize("name", MODELS)
def test_parity(name: str) -> None:
    model = hf_model(name)
    # Sequence heads of transformers read column 0, which must be a token to be compared.
    mask = make_mask("right" if "Sequence" in name else "holes", (3, 17, 9), 21)
    batches = [inputs_for(name, mask) for _ in range(16)]
    inputs = batches[0]
    oracle, ours = copy.deepcopy(model).double(), models.from_transformers(copy.deepcopy(model))
    assert type(ours) is getattr(models, name)
    out, eager, truth = (m(**inputs) for m in (ours, model, oracle))
    assert out[0] is out.loss and out[1] is out.logits and list(out) == ["loss", "logits"]
    assert out.logits.shape == eager.logits.shape
    assert_close("logits", *(at_tokens(name, o.logits, mask) for o in (out, truth, eager)))
    check_losses(ours, model, oracle, batches)
    if "Sequence" not in name:
        assert not out.logits[mask == 0].any()
    check_gradients(ours, out.loss, (model, eager.loss), (oracle, truth.loss))


@pytest.mark.parametrize("family", SIZES)
def test_masked_lm_loss_without_logits(family: str) -> None:
    """Only labelled tokens go through the decoder, and the loss and its gradients are the same."""
    name = f"{family}ForMaskedLM"
    model = hf_model(name)
    oracle, ours = copy.deepcopy(model).double(), models.from_transformers(copy.deepcopy(model))
    mask = make_mask("holes", (3, 17, 9), 21)
    batches = [inputs_for(name, mask) for _ in range(16)]
    check_losses(functools.partial(ours, return_logits=False), model, oracle, batches)
    inputs, rows = batches[0], []
    ours.head.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    out = ours(**inputs, return_logits=False)
    assert out.logits is None and list(out) == ["loss"]
    check_gradients(ours, out.loss, (model, model(**inputs).loss), (oracle, oracle(**inputs).loss))
    ours(**inputs)
    assert rows == [int((inputs["labels"] >= 0).sum()), 29]


@pytest.mark.parametrize("name", MODELS)
def test_packed_inputs_and_ignored_labels(name: str) -> None:
    model = hf_model(name)
    ours, oracle = models.from_transformers(model), models.from_transformers(copy.deepcopy(model).double())
    inputs = inputs_for(name, make_mask("holes", (3, 17, 0, 9), 21))
    mask, labels = inputs.pop("attention_mask"), inputs.pop("labels")
    padded = ours(**inputs, attention_mask=mask, labels=labels, output_hidden_states=True)
    assert len(padded.hidden_states) == 3 and padded.hidden_states[-1].shape == (4, 21, 48)
    if "Sequence" in name:
        assert not padded.logits[2].any()
    else:
        # What the labels of padded tokens are does not matter.
        dirty = labels.masked_fill(mask == 0, 1)
        assert torch.equal(ours(**inputs, attention_mask=mask, labels=dirty).loss, padded.loss)
    with torch.no_grad():
        truth = oracle(**inputs, attention_mask=mask, labels=labels)
    for capacity in (None, 84):
        packing = warpform.Packing.from_mask(mask, capacity=capacity)
        packed = ours(
            **{key: packing.pack(value) for key, value in inputs.items()},
            labels=labels if "Sequence" in name else packing.pack(labels),
            packing=packing,
        )
        logits = packed.logits if "Sequence" in name else packing.unpack(packed.logits)
        if capacity is None:
            assert torch.equal(logits, padded.logits) and torch.equal(packed.loss, padded.loss)
        else:
            # Products of more rows may be added up in another order.
            assert_close("logits", logits, truth.logits, padded.logits)
            assert_close("loss", packed.loss, truth.loss, padded.loss, scale=float(truth.logits.abs().max()))
    as_tuple = ours(**inputs, attention_mask=mask, return_dict=False)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == 1
    if "Sequence" not in name:
        nothing = ours(**inputs, attention_mask=mask, labels=torch.full_like(mask, -100)).loss
        nothing.backward()
        assert nothing == 0 and all(p.grad is None or torch.isfinite(p.grad).all() for p in ours.parameters())


@pytest.mark.parametrize("problem", ["one number", "several numbers", "several classes", "named"])
def test_losses_of_sequence_classification(problem: str) -> None:
    fields = {
        "one number": {"num_labels": 1},
        "several numbers": {"problem_type": "regression"},
        "several classes": {},
        "named": {"problem_type": "multi_label_classification"},
    }[problem]
    labels = torch.randn(40) if problem == "one number" else torch.rand(40, 5).round()
    for family in SIZES:
        model = hf_model(f"{family}ForSequenceClassification", **fields)
        oracle, ours = copy.deepcopy(model).double(), models.from_transformers(copy.deepcopy(model))
        batches = [{"input_ids": torch.randint(0, 97, (40, 7)), "labels": labels} for _ in range(16)]
        assert_close(family, *(m(batches[0]["input_ids"]).logits for m in (ours, oracle, model)))
        check_losses(ours, model, oracle, batches)


@pytest.mark.parametrize("name", MODELS)
def test_folders(name: str, tmp_path: Path) -> None:
    model = hf_model(name)
    model.save_pretrained(tmp_path)
    ours = getattr(models, name).from_pretrained(tmp_path)
    inputs = inputs_for(name, make_mask("right", (17, 9), 17))
    mask = inputs["attention_mask"]
    oracle = copy.deepcopy(model).double()
    truth, eager = (at_tokens(name, m(**inputs).logits, mask) for m in (oracle, model))
    assert_close("read", at_tokens(name, ours(**inputs).logits, mask), truth, eager)
    back = ours.to_transformers()
    assert type(back) is type(model)
    assert_close("given back", at_tokens(name, back(**inputs).logits, mask), truth, eager)
    assert set(ours.state_dict()) == set(ours.weight_names())
    # The encoder under it, without the head.
    encoder = models.from_pretrained(tmp_path)
    assert type(encoder) is type(ours).base_class
    inputs.pop("labels")
    assert torch.equal(encoder(**inputs)[0], ours.base(**inputs)[0])


def test_checkpoints_of_pretraining_and_with_both_names_of_tied_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for family, tied in (
        ("Bert", ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias")),
        ("Albert", ("predictions.decoder.weight", "predictions.decoder.bias")),
    ):
        config = getattr(transformers, f"{family}Config")(vocab_size=97, **SIZES[family])
        model = randomise(getattr(transformers, f"{family}ForPreTraining")(config))
        folder = tmp_path / family
        model.save_pretrained(folder)
        weights = safetensors_torch.load_file(folder / "model.safetensors")
        decoder = model.get_output_embeddings()
        weights |= {name: w.detach().clone() for name, w in zip(tied, (decoder.weight, decoder.bias), strict=True)}
        safetensors_torch.save_file(weights, folder / "model.safetensors")
        ids = torch.randint(0, 97, (2, 5))
        ours = getattr(models, f"{family}ForMaskedLM").from_pretrained(folder)
        truth, eager = (m(ids).prediction_logits for m in (copy.deepcopy(model).double(), model))
        assert_close(family, ours(ids).logits, truth, eager)
        with pytest.raises(ValueError, match="lack classifier.bias"):
            getattr(models, f"{family}ForTokenClassification").from_pretrained(folder)


def test_a_new_head_on_an_encoder_shares_its_parameters() -> None:
    config = models.BertConfig(vocab_size=97, **SIZES["Bert"], attention_probs_dropout_prob=0.0, num_labels=3)
    encoder = models.BertModel(config)
    for name in HEADS:
        model = getattr(models, f"Bert{name}")(config, encoder)
        assert model.base.embeddings.tokens.weight is encoder.embeddings.tokens.weight
        assert (model.base.pooler is None) == ("Sequence" not in name) and encoder.pooler is not None
        assert type(model.to_transformers()).__name__ == f"Bert{name}"
        assert model.training and model.get_input_embeddings() is model.base.embeddings.tokens
        labels = torch.zeros(2, dtype=torch.long) if "Sequence" in name else torch.zeros(2, 5, dtype=torch.long)
        model(torch.randint(0, 97, (2, 5)), labels=labels).loss.backward()
        assert all(p.grad is not None for p in model.parameters())
    half = models.BertForMaskedLM(config, models.BertModel(config).bfloat16())
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    out = half.eval()(torch.randint(0, 97, (2, 5)), labels=torch.zeros(2, 5, dtype=torch.long))
    assert out.logits.dtype == torch.bfloat16 and out.loss.dtype == torch.float32


def test_bad_input_names_the_argument() -> None:
    config = models.BertConfig(vocab_size=97, **SIZES["Bert"])
    model = models.BertForMaskedLM(config).eval()
    ids = torch.zeros(2, 5, dtype=torch.long)
    with pytest.raises(ValueError, match=r"BertForMaskedLM: labels must have shape \[2, 5\], got \[2, 4\]"):
        model(ids, labels=ids[:, :4])
    with pytest.raises(ValueError, match="BertForMaskedLM: return_logits=False needs labels"):
        model(ids, return_logits=False)
    with pytest.raises(ValueError, match="output_attentions is not supported"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match="BertForMaskedLM: tie_word_embeddings=False is not supported"):
        models.BertForMaskedLM(models.BertConfig(tie_word_embeddings=False))
    with pytest.raises(TypeError, match="base must be a BertModel, got Linear"):
        models.BertForMaskedLM(config, torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"config must be base\.config"):
        models.BertForMaskedLM(models.BertConfig(), model.base)
    with pytest.raises(ValueError, match="base must have a pooler"):
        models.BertForSequenceClassification(config, model.base)
    with pytest.raises(ValueError, match="problem_type must be None or one of"):
        models.BertConfig(problem_type="riddle")
    with pytest.raises(ValueError, match="num_labels must be at least 1"):
        models.AlbertConfig(num_labels=0)
    classifier = models.BertForSequenceClassification(config).eval()
    with pytest.raises(ValueError, match=r"labels must have shape \[2\], got \[3\]"):
        classifier(ids, labels=torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"labels must have shape \[2, 2\], got \[2\]"):
        classifier(ids, labels=torch.zeros(2))


def test_a_folder_of_another_architecture(tmp_path: Path) -> None:
    hf_model("AlbertForMaskedLM").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must be bert for a BertForMaskedLM, got 'albert'"):
        models.BertForMaskedLM.from_pretrained(tmp_path)
