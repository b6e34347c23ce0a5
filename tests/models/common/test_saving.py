"""What is saved under transformers' names comes back the same: a swapped encoder, and models of this package."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.parity import randomise
from warpform import models

transformers = pytest.importorskip("transformers")
load_file = pytest.importorskip("safetensors.torch").load_file

WIDTH = {
    "vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 16,
}  # fmt: skip
POSITIONS = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
GRID = {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 4), "window_size": 4}
DISTIL = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "vocab_size": 30, "max_position_embeddings": 16}
STAGES = {
    "num_encoder_blocks": 2, "depths": [1, 1], "hidden_sizes": [8, 12], "patch_sizes": [3, 3], "strides": [2, 2],
}  # fmt: skip
POOL = {**STAGES, "padding": [1, 1]}
MIX = {
    **STAGES,
    "num_attention_heads": [1, 2],
    "sr_ratios": [2, 1],
    "mlp_ratios": [2, 2],
}
# The class with a head, the fields of its config, where its encoder is.
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "BertForSequenceClassification": ("Bert", WIDTH, "bert"),
    "BertForMaskedLM": ("Bert", WIDTH, "bert"),
    "BertForQuestionAnswering": ("Bert", WIDTH, "bert"),
    "AlbertForMaskedLM": ("Albert", {**WIDTH, "embedding_size": 8}, "albert"),
    "DistilBertForMaskedLM": ("DistilBert", DISTIL, "distilbert"),
    "DebertaForMaskedLM": ("Deberta", {**WIDTH, **POSITIONS}, "deberta"),
    "DebertaV2ForTokenClassification": ("DebertaV2", {**WIDTH, **POSITIONS, "position_buckets": 8}, "deberta"),
    "PoolFormerForImageClassification": ("PoolFormer", POOL, "poolformer"),
    "SegformerForImageClassification": ("Segformer", MIX, "segformer"),
    "SwinForImageClassification": ("Swin", GRID, "swin"),
    "Swinv2ForImageClassification": ("Swinv2", GRID, "swinv2"),
}
SMALL = ["BertForSequenceClassification", "DebertaForMaskedLM", "Swinv2ForImageClassification"]
IDS = torch.arange(14).view(2, 7) + 2
MASK = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The base class keeps what it learned, as in a program; progress bars are left out."""
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    family, fields, _ = MODELS[name]
    return randomise(getattr(transformers, name)(getattr(transformers, f"{family}Config")(**fields)))


def swapped(name: str) -> tuple[nn.Module, nn.Module]:
    """A model whose encoder was swapped and then trained a little, and the same in transformers alone."""
    model, place = make(name), MODELS[name][2]
    plain = copy.deepcopy(model)
    setattr(model, place, models.from_transformers(getattr(model, place)))
    with torch.no_grad():
        for one in (model, plain):
            for parameter in one.parameters():
                parameter.add_(0.0625)
    return model, plain


def run(model: nn.Module, name: str) -> Tensor:
    with torch.no_grad():
        if "Image" in name:
            return model(pixel_values=torch.linspace(0, 30, 3 * 256).sin().view(1, 3, 16, 16))[0]
        out = model(input_ids=IDS, attention_mask=MASK)[0]
        return out if "Sequence" in name else out[MASK.bool()]


def assert_weights(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


@pytest.mark.parametrize("name", MODELS)
def test_a_swapped_encoder_comes_back(name: str, tmp_path: Path) -> None:
    model, plain = swapped(name)
    before = {n: w.clone() for n, w in model.state_dict().items()}
    model.save_pretrained(tmp_path / "swapped")
    plain.save_pretrained(tmp_path / "plain")
    assert_weights(
        load_file(tmp_path / "swapped" / "model.safetensors"), load_file(tmp_path / "plain" / "model.safetensors")
    )
    found, info = type(model).from_pretrained(tmp_path / "swapped", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(run(found.eval(), name), run(plain, name))
    assert_weights(model.state_dict(), before)  # saving changes nothing


@pytest.mark.parametrize("name", MODELS)
def test_state_dicts_of_transformers_are_taken(name: str) -> None:
    model, plain = swapped(name)
    expected = run(model, name)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    given = plain.state_dict()
    names = list(given)
    result = other.load_state_dict(given, strict=False)
    assert not result.missing_keys and not result.unexpected_keys
    assert list(given) == names  # the caller's dictionary stays as it was
    assert torch.equal(run(other, name), expected)
    result = other.load_state_dict(model.state_dict())
    assert torch.equal(run(other, name), expected)
    # Into the encoder alone, and a weight that is missing is told.
    place = MODELS[name][2]
    inner = getattr(plain, place).state_dict()
    getattr(other, place).load_state_dict(inner, strict=False)
    left_out = next(n for n in inner if n.endswith("weight"))
    del inner[left_out]
    missing = getattr(other, place).load_state_dict(inner, strict=False).missing_keys
    assert len(missing) == 1


@pytest.mark.parametrize("name", SMALL)
def test_shards_and_other_dtypes(name: str, tmp_path: Path) -> None:
    model, plain = swapped(name)
    for one, folder in ((model, "swapped"), (plain, "plain")):
        one.half().save_pretrained(tmp_path / folder, max_shard_size="8KB")
    assert (tmp_path / "swapped" / "model.safetensors.index.json").is_file()
    files = {
        folder: {n: w for p in sorted((tmp_path / folder).glob("*.safetensors")) for n, w in load_file(p).items()}
        for folder in ("swapped", "plain")
    }
    assert_weights(files["swapped"], files["plain"])
    found = type(model).from_pretrained(tmp_path / "swapped", dtype=torch.float16)
    assert_weights(found.state_dict(), plain.state_dict())


def test_a_state_dict_that_is_given(tmp_path: Path) -> None:
    """Trainers gather it from ranks, under the model's own names."""
    model, plain = swapped("BertForSequenceClassification")
    state = {n: 2 * w for n, w in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state)
    found = load_file(tmp_path / "model.safetensors")
    assert_weights(found, {n: 2 * w for n, w in plain.state_dict().items()})
    del state["bert.encoder.layers.0.attention.qkv.weight"]
    with pytest.raises(ValueError, match=r"lacks encoder\.layers\.0\.attention\.qkv\.weight, which transformers needs"):
        model.save_pretrained(tmp_path, state_dict=state)


def test_adapters_that_are_not_merged_are_refused(tmp_path: Path) -> None:
    model, _ = swapped("BertForSequenceClassification")

    class Adapted(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.base_layer, self.beside = linear, nn.Linear(16, 24)

        def forward(self, x: Tensor) -> Tensor:
            return self.base_layer(x) + self.beside(x)

    up = model.bert.encoder.layers[0].feed_forward
    plain, up.up = up.up, Adapted(up.up)
    for one in (model, model.bert):
        with pytest.raises(ValueError, match="feed_forward.up"):
            one.save_pretrained(tmp_path / "refused")
    assert not list(tmp_path.glob("**/*.safetensors"))
    up.up = plain
    model.save_pretrained(tmp_path / "merged")


def test_models_of_transformers_that_hold_none_are_saved_as_before(tmp_path: Path) -> None:
    _, plain = swapped("BertForSequenceClassification")
    plain.save_pretrained(tmp_path, state_dict={n: w for n, w in plain.state_dict().items() if "pooler" not in n})
    assert not any("pooler" in n for n in load_file(tmp_path / "model.safetensors"))


OWN: dict[str, Callable[[Any], Any]] = {
    "encoder": lambda hf: models.from_transformers(hf.base_model),
    "head": lambda hf: models.from_transformers(hf) if hasattr(models, type(hf).__name__) else None,
}


@pytest.mark.parametrize("part", OWN)
@pytest.mark.parametrize("name", MODELS)
def test_models_of_this_package_come_back(name: str, part: str, tmp_path: Path) -> None:
    hf = make(name)
    model = OWN[part](hf)
    if model is None:
        pytest.skip("no counterpart")
    theirs = hf.base_model if part == "encoder" else hf
    theirs.config.id2label = {0: "no", 1: "yes"}
    model.config.id2label = {0: "no", 1: "yes"}
    model.save_pretrained(tmp_path / "a" / "b", safe_serialization=True)
    folder = tmp_path / "a" / "b"
    fields = json.loads((folder / "config.json").read_text())
    assert fields["architectures"] == [type(theirs).__name__] and fields["dtype"] == "float32"
    assert fields["model_type"] == theirs.config.model_type and fields["id2label"] == {"0": "no", "1": "yes"}
    found = type(model).from_pretrained(folder)
    assert found.config == model.config and found.config.id2label == {0: "no", 1: "yes"}
    assert_weights(found.state_dict(), model.state_dict())
    # Heads that have no use for a pooler are on an encoder without one.
    pooler = {"add_pooling_layer": False} if getattr(theirs, "pooler", 0) is None else {}
    back, info = type(theirs).from_pretrained(folder, output_loading_info=True, **pooler)
    assert not any(info.values()), info
    assert_weights(back.state_dict(), theirs.state_dict())
    assert torch.equal(run(back.eval(), name), run(theirs, name))


def test_where_to_save(tmp_path: Path) -> None:
    model = models.BertModel(models.BertConfig(**WIDTH))
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is not a folder"):
        model.save_pretrained(tmp_path / "file")
    weights = {n: 3 * w for n, w in model.state_dict().items()}
    model.bfloat16().save_pretrained(tmp_path, state_dict=weights)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert_weights(dict(models.from_pretrained(tmp_path).state_dict()), weights)
    with pytest.raises(ValueError, match="holds extra, which transformers has no name for"):
        model.save_pretrained(tmp_path, state_dict={**weights, "extra": torch.ones(1)})
