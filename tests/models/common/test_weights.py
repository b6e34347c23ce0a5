"""Reading folders of weights: what works, and what a user is told when it does not."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from helpers.compare import assert_close
from warpform.models import BertModel, from_pretrained

transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

IDS = torch.tensor([[5, 3, 9, 2]])


def config(**fields) -> object:
    return transformers.BertConfig(
        vocab_size=31, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, **fields
    )


@pytest.fixture
def saved(tmp_path: Path) -> tuple[torch.nn.Module, Path]:
    torch.manual_seed(0)
    model = transformers.BertModel(config()).eval()
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


def check_same(ours: BertModel, theirs: torch.nn.Module) -> None:
    assert not ours.training
    with torch.no_grad():
        out, oracle, eager = (m(IDS) for m in (ours, copy.deepcopy(theirs).double(), theirs))
    assert_close("hidden", out.last_hidden_state, oracle.last_hidden_state, eager.last_hidden_state)
    if eager.pooler_output is not None:
        assert_close("pooler", out.pooler_output, oracle.pooler_output, eager.pooler_output)


def rewrite(folder: Path, change: object) -> None:
    weights = safetensors_torch.load_file(folder / "model.safetensors")
    safetensors_torch.save_file(change(weights), folder / "model.safetensors")


def test_one_file(saved: tuple[torch.nn.Module, Path]) -> None:
    model, folder = saved
    check_same(from_pretrained(folder), model)
    check_same(from_pretrained(str(folder), device="cpu"), model)
    assert {p.dtype for p in from_pretrained(folder, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    assert from_pretrained(folder, attention_probs_dropout_prob=0.0).config.attention_probs_dropout_prob == 0.0


def test_round_trip_through_transformers(saved: tuple[torch.nn.Module, Path], tmp_path: Path) -> None:
    model, folder = saved
    from_pretrained(folder).to_transformers().save_pretrained(tmp_path / "again")
    check_same(from_pretrained(tmp_path / "again"), model)


def test_shards(saved: tuple[torch.nn.Module, Path], tmp_path: Path) -> None:
    model, _ = saved
    folder = tmp_path / "shards"
    model.save_pretrained(folder, max_shard_size="4KB")
    assert (folder / "model.safetensors.index.json").is_file() and len(list(folder.glob("*.safetensors"))) > 2
    check_same(from_pretrained(folder), model)

    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    shard = sorted(folder.glob("*.safetensors"))[0]
    moved = tmp_path / "moved.safetensors"
    shard.rename(moved)
    with pytest.raises(FileNotFoundError, match=f"{shard.name}, which is missing"):
        from_pretrained(folder)
    name = next(k for k, v in index["weight_map"].items() if v == shard.name)
    for outside in ("../moved.safetensors", str(moved)):
        index["weight_map"][name] = outside
        index_path.write_text(json.dumps(index))
        with pytest.raises(ValueError, match="not a file of the folder"):
            from_pretrained(folder)
    index["weight_map"] = {"a.weight": sorted(folder.glob("*.safetensors"))[0].name}
    index_path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"lists a\.weight, which its shard does not hold"):
        from_pretrained(folder)
    for broken in ("{}", "[]", "{"):
        index_path.write_text(broken)
        with pytest.raises(ValueError, match="not a valid index"):
            from_pretrained(folder)


def test_heads_are_ignored(tmp_path: Path) -> None:
    model = transformers.BertForSequenceClassification(config()).eval()
    model.save_pretrained(tmp_path)
    check_same(from_pretrained(tmp_path), model.bert)


def test_a_checkpoint_without_pooler_gives_a_model_without(tmp_path: Path) -> None:
    model = transformers.BertForMaskedLM(config()).eval()
    model.save_pretrained(tmp_path)
    ours = from_pretrained(tmp_path)
    assert ours.pooler is None
    check_same(ours, model.bert)


def test_old_names_and_constant_buffers(saved: tuple[torch.nn.Module, Path]) -> None:
    model, folder = saved

    def change(weights: dict) -> dict:
        old = {
            k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): w
            for k, w in weights.items()
        }
        return {**old, "embeddings.position_ids": torch.arange(512).unsqueeze(0)}

    rewrite(folder, change)
    check_same(from_pretrained(folder), model)


def test_missing_unknown_and_misshapen_weights_are_named(saved: tuple[torch.nn.Module, Path]) -> None:
    _, folder = saved
    key = "encoder.layer.1.attention.self.key.bias"
    original = (folder / "model.safetensors").read_bytes()

    rewrite(folder, lambda w: {k: v for k, v in w.items() if k != key})
    with pytest.raises(ValueError, match=f"lack {key}"):
        from_pretrained(folder)

    (folder / "model.safetensors").write_bytes(original)
    rewrite(folder, lambda w: {**w, "encoder.layer.2.output.dense.bias": torch.zeros(16)})
    with pytest.raises(ValueError, match=r"have unknown encoder\.layer\.2\.output\.dense\.bias"):
        from_pretrained(folder)

    (folder / "model.safetensors").write_bytes(original)
    rewrite(folder, lambda w: {**w, key: torch.zeros(17)})
    with pytest.raises(ValueError, match=rf"{key} must be .* of shape \[16\].* got torch.float32 of shape \[17\]"):
        from_pretrained(folder)

    rewrite(folder, lambda w: {**w, key: torch.zeros(16, dtype=torch.int8)})
    with pytest.raises(ValueError, match=f"{key} must be floating point"):
        from_pretrained(folder)

    rewrite(folder, lambda w: {k: v for k, v in w.items() if k == "pooler.dense.weight"})
    with pytest.raises(ValueError, match=r"lack .* and \d+ more"):
        from_pretrained(folder)


def test_nothing_is_unpickled(saved: tuple[torch.nn.Module, Path], tmp_path: Path) -> None:
    _, folder = saved
    (folder / "model.safetensors").unlink()
    witness = tmp_path / "executed"

    class Bomb:
        def __reduce__(self) -> tuple:
            return Path.touch, (witness,)

    with (folder / "pytorch_model.bin").open("wb") as file:
        pickle.dump(Bomb(), file)
    with pytest.raises(FileNotFoundError, match=r"pickled weights only \(pytorch_model\.bin\).*save_pretrained"):
        from_pretrained(folder)
    assert not witness.exists()


def test_folders_that_hold_no_model(saved: tuple[torch.nn.Module, Path], tmp_path: Path) -> None:
    _, folder = saved
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere"):
        from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        from_pretrained(tmp_path)
    shutil.copy(folder / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match="has no weights"):
        from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="not a valid safetensors file"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[]", "must hold a JSON object"),
        (b"{}", "model_type .* must be one of .*bert, .*got None"),
        (b'{"model_type": "gpt2"}', "got 'gpt2'"),
        (b'{"model_type": "bert", "is_decoder": true}', "is_decoder=True is not supported"),
        (b'{"model_type": "bert", "position_embedding_type": "relative_key_query"}', "relative_key_query"),
        (b'{"model_type": "bert", "num_attention_heads": 5}', "must divide"),
    ],
)
def test_bad_config_files(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        from_pretrained(tmp_path)
