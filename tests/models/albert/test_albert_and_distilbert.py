"""warpform's ALBERT and DistilBERT against those of transformers. What all encoders share is tested in test_bert.py."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

import warpform
from helpers.compare import assert_close
from helpers.parity import check_gradients, make_mask, randomise
from warpform import models

transformers = pytest.importorskip("transformers")

ALBERT = {
    "vocab_size": 97,
    "embedding_size": 20,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 100,
}
DISTILBERT = {"vocab_size": 97, "dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 100}


def hf_model(kind: str, *, pooler: bool = True, **fields) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "albert":
        config = transformers.AlbertConfig(**{**ALBERT, "attn_implementation": "eager", **fields})
        return randomise(transformers.AlbertModel(config, add_pooling_layer=pooler))
    config = transformers.DistilBertConfig(**{**DISTILBERT, "attn_implementation": "eager", **fields})
    return randomise(transformers.DistilBertModel(config))


def inputs_for(kind: str, mask: Tensor) -> dict[str, Tensor]:
    inputs = {"input_ids": torch.randint(0, 97, mask.shape), "attention_mask": mask}
    if kind == "albert":
        inputs["token_type_ids"] = torch.randint(0, 2, mask.shape)
    return inputs


def check_parity(kind: str, model: torch.nn.Module, inputs: dict[str, Tensor], *, gradients: bool = True) -> None:
    oracle = copy.deepcopy(model).double()
    ours = models.from_transformers(copy.deepcopy(model))
    mask = inputs["attention_mask"].bool()
    first = mask.long().argmax(1)
    outputs, losses = {}, {}
    for name, m in (("eager", model), ("oracle", oracle), ("ours", ours)):
        out = m(**inputs, output_hidden_states=True)
        states = list(out.hidden_states)
        if getattr(m, "pooler", None) is not None:
            # transformers pools column 0 whatever it is, warpform the first real token.
            at_first = states[-1][torch.arange(len(mask)), first]
            states.append(out.pooler_output if m is ours else torch.tanh(m.pooler(at_first)))
        outputs[name] = states
        torch.manual_seed(5)
        losses[name] = sum(
            ((s[mask] if s.dim() == 3 else s) * torch.randn(s.shape)[mask if s.dim() == 3 else ...].to(s.dtype)).sum()
            for s in states
        )
    assert len(outputs["ours"]) == len(outputs["eager"])
    for i, (found, truth, yardstick) in enumerate(
        zip(outputs["ours"], outputs["oracle"], outputs["eager"], strict=True)
    ):
        if found.dim() == 3:
            assert not found[~mask].any(), "padded tokens must be 0"
            found, truth, yardstick = found[mask], truth[mask], yardstick[mask]
        assert_close(f"state {i}", found, truth, yardstick)
    if gradients:
        check_gradients(ours, losses["ours"], (model, losses["eager"]), (oracle, losses["oracle"]))


@pytest.mark.parametrize("pattern", ["right", "left", "holes"])
@pytest.mark.parametrize("kind", ["albert", "distilbert"])
def test_parity(kind: str, pattern: str) -> None:
    torch.manual_seed(1)
    check_parity(kind, hf_model(kind), inputs_for(kind, make_mask(pattern, (1, 70, 37), 70)))


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("albert", {"num_hidden_layers": 5, "num_hidden_groups": 2}),
        ("albert", {"num_hidden_layers": 7, "num_hidden_groups": 3}),
        ("albert", {"num_hidden_layers": 4, "num_hidden_groups": 2, "inner_group_num": 2}),
        ("albert", {"hidden_act": "gelu", "layer_norm_eps": 0.3}),
        ("albert", {"pooler": False, "pad_token_id": None}),
        ("distilbert", {"activation": "relu", "sinusoidal_pos_embds": True}),
        ("distilbert", {"pad_token_id": None, "n_heads": 1}),
    ],
)
def test_parity_of_options(kind: str, fields: dict) -> None:
    check_parity(kind, hf_model(kind, **fields), inputs_for(kind, make_mask("holes", (3, 17, 9), 21)))


def test_packed_ids_positions_and_embeddings() -> None:
    for kind, width in (("albert", 20), ("distilbert", 48)):
        model = hf_model(kind)
        oracle, ours = copy.deepcopy(model).double(), models.from_transformers(model)
        mask = make_mask("holes", (3, 17, 0, 9), 21)
        ids, positions = torch.randint(0, 97, mask.shape), torch.randint(0, 512, mask.shape)
        packing = warpform.Packing.from_mask(mask)
        padded = ours(ids, mask, position_ids=positions)
        packed = ours(packing.pack(ids), position_ids=packing.pack(positions), packing=packing)
        assert torch.equal(packing.unpack(packed[0]), padded[0])
        rows = mask.any(1)
        tokens, real = mask.bool(), mask[rows].bool()
        truth, eager = (m(ids[rows], mask[rows], position_ids=positions[rows])[0] for m in (oracle, model))
        assert_close("positions", padded[0][tokens], truth[real], eager[real])
        x = torch.randn(4, 21, width)
        truth = oracle(inputs_embeds=x[rows].double(), attention_mask=mask[rows])[0]
        eager = model(inputs_embeds=x[rows], attention_mask=mask[rows])[0]
        found = ours(inputs_embeds=x, attention_mask=mask)[0]
        assert_close("embeddings", found[tokens], truth[real], eager[real])


@pytest.mark.parametrize("kind", ["albert", "distilbert"])
def test_there_and_back(kind: str, tmp_path: Path) -> None:
    model = hf_model(kind)
    ours = models.from_transformers(model)
    assert set(ours.state_dict()) == set(ours.weight_names())
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    assert ours.to_transformers() is model
    inputs = inputs_for(kind, make_mask("right", (17, 9), 17))
    mask = inputs["attention_mask"].bool()
    expected = ours(**inputs)[0]
    truth, eager = (m(**inputs)[0][mask] for m in (copy.deepcopy(model).double(), model))
    assert_close("written back", expected[mask], truth, eager)

    model.save_pretrained(tmp_path)
    read = models.from_pretrained(tmp_path)
    assert type(read) is type(ours) and not read.training
    assert torch.equal(read(**inputs)[0], expected)
    again = read.to_transformers()
    assert type(again) is type(model) and again is not model
    assert_close("read and given back", again(**inputs)[0][mask], truth, eager)


def test_new_models_are_initialised_and_trainable() -> None:
    albert = models.AlbertModel(models.AlbertConfig(**ALBERT))
    assert len(albert.encoder.layers) == 1 and albert.encoder.order == (0, 0, 0)
    sinusoids = models.DistilBertModel(models.DistilBertConfig(**DISTILBERT, sinusoidal_pos_embds=True))
    config = transformers.DistilBertConfig(**DISTILBERT, sinusoidal_pos_embds=True)
    theirs = transformers.DistilBertModel(config).embeddings.position_embeddings.weight
    angles = torch.arange(512).double()[:, None] / 10000 ** (torch.arange(0, 48, 2).double() / 48)
    truth = torch.stack([angles.sin(), angles.cos()], -1).flatten(1)
    assert_close("sinusoids", sinusoids.embeddings.positions.weight, truth, theirs)
    for model in (albert, sinusoids):
        ids = torch.randint(0, 97, (2, 5))
        if model is sinusoids:
            with pytest.raises(NotImplementedError, match="attention_dropout"):
                model(ids)
            model = models.DistilBertModel(models.DistilBertConfig(**DISTILBERT, attention_dropout=0.0))
        out = model(ids)
        out[-1].square().sum().backward()
        assert all(p.grad is not None for p in model.parameters())


def test_dropout_is_where_transformers_has_it() -> None:
    """With a probability of 1 what is dropped is exactly 0, so both sides agree without the same random numbers."""
    for kind, fields in (
        ("albert", {"hidden_dropout_prob": 1.0, "attention_probs_dropout_prob": 0.0}),
        ("distilbert", {"dropout": 1.0, "attention_dropout": 0.0}),
    ):
        model = hf_model(kind, **fields)
        ours = models.from_transformers(model)
        x = torch.randn(2, 9, 48)
        eager = model.encoder if kind == "albert" else model.transformer
        oracle = copy.deepcopy(eager).double()
        if kind == "albert":
            hidden, start = x[..., :20], ours.projection(x[..., :20])
        else:
            hidden = start = x
        eager.train(), oracle.train(), ours.train()
        theirs, truth = eager(hidden, None).last_hidden_state, oracle(hidden.double(), None).last_hidden_state
        packing = warpform.Packing.from_lengths([9, 9])
        found, _ = ours.encoder(start.flatten(0, 1), packing)
        assert_close(kind, packing.unpack(found), truth, theirs)


def test_compiles_whole_and_once_for_all_sizes() -> None:
    for kind in ("albert", "distilbert"):
        torch._dynamo.reset()
        ours = models.from_transformers(hf_model(kind))
        graphs = []

        def backend(graph: torch.fx.GraphModule, example_inputs: list, graphs: list = graphs) -> object:
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


def test_bad_input_names_the_option() -> None:
    with pytest.raises(ValueError, match="num_hidden_groups must be between 1 and num_hidden_layers 3, got 4"):
        models.AlbertConfig(**ALBERT, num_hidden_groups=4)
    with pytest.raises(ValueError, match="inner_group_num must be at least 1"):
        models.AlbertConfig(**ALBERT, inner_group_num=0)
    with pytest.raises(ValueError, match="n_heads must divide dim 48, got 5"):
        models.DistilBertConfig(**{**DISTILBERT, "n_heads": 5})
    with pytest.raises(ValueError, match="activation must be one of"):
        models.DistilBertConfig(activation="maxout")
    with pytest.raises(ValueError, match="attention_dropout must be between 0 and 1"):
        models.DistilBertConfig(attention_dropout=1.5)
    with pytest.raises(ValueError, match="AlbertConfig: position_embedding_type='relative_key' is not supported"):
        models.AlbertConfig.from_transformers({"position_embedding_type": "relative_key"})
    with pytest.raises(ValueError, match="output_attentions=True is not supported"):
        models.DistilBertConfig.from_transformers({"output_attentions": True})
    with pytest.raises(TypeError, match="DistilBertConfig has no field 'hidden_dropout_prob'"):
        models.from_transformers(hf_model("distilbert"), hidden_dropout_prob=0.0)
    ids = torch.zeros(2, 5, dtype=torch.long)
    distilbert = models.from_transformers(hf_model("distilbert"))
    with pytest.raises(ValueError, match="DistilBertModel: token_type_ids is not supported"):
        distilbert(ids, token_type_ids=ids)
    with pytest.raises(ValueError, match="DistilBertModel: attention_mask must be 2-D"):
        distilbert(ids, torch.ones(2, 1, 5, 5))
    albert = models.from_transformers(hf_model("albert"))
    with pytest.raises(ValueError, match="AlbertModel: output_attentions is not supported"):
        albert(ids, output_attentions=True)
    with pytest.raises(ValueError, match=r"AlbertModel: inputs_embeds must have shape \[2, 5, 20\]"):
        albert(inputs_embeds=torch.zeros(2, 5, 48))
