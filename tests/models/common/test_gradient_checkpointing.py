"""Layers computed again in the backward pass: the same gradients bit by bit, in less memory, by transformers' names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.compare import assert_close
from warpform import models
from warpform.nn._checkpoint import CheckpointedLayers
from warpform.nn._product import dtype_of

DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.0}
WIDTH = {
    "vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 16,
}  # fmt: skip
POSITIONS = {"relative_attention": True, "pos_att_type": ("c2p", "p2c"), "max_relative_positions": 12}
GRID = {
    "image_size": 20, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 2, "drop_path_rate": 0.3,
    **DROPOUT,
}  # fmt: skip
M2 = {**WIDTH, "hyena_filter_order": 8, "num_hidden_layers": 2}
M2.pop("num_attention_heads")
IDS = torch.arange(14).view(2, 7) + 2
MASK = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
Loss = Callable[[Any], Tensor]


def classes(model: nn.Module) -> Tensor:
    return model(IDS, MASK, labels=torch.tensor([0, 1])).loss


def tokens(model: nn.Module) -> Tensor:
    return model(IDS, MASK, labels=IDS).loss


def parity(model: nn.Module) -> Tensor:
    return model(IDS, MASK, labels=IDS % 2).loss


def images(model: nn.Module) -> Tensor:
    x = torch.linspace(0, 30, 2 * 3 * 400).sin().view(2, 3, 20, 20).to(dtype_of(model))
    return model(x, labels=torch.tensor([0, 1])).loss


def voxels(model: nn.Module) -> Tensor:
    x = torch.linspace(0, 30, 2 * 2 * 216).sin().view(2, 2, 6, 6, 6).to(dtype_of(model))
    return model(x, torch.tensor([3, 40]), torch.tensor([0, 0])).square().sum()


def loops(model: nn.Module) -> Tensor:
    # 16 rows: in others the backward of LayerNorm on a CPU rounds a gradient that it adds unlike a sum by itself.
    x = torch.linspace(0, 30, 2 * 8 * 20).sin().view(2, 8, 20).to(dtype_of(model))
    return model(x, 3, no_grad_steps=1).square().sum()


DIT = {"input_size": 6, "patch_size": 2, "in_channels": 2, "hidden_size": 12, "depth": 2, "num_heads": 2}
VIT = {
    "image_size": 20, "patch_size": 5, "hidden_size": 16, "num_hidden_layers": 2, "filter_order": 8,
    "intermediate_size": 16, "hidden_dropout_prob": 0.1,
}  # fmt: skip
GPT = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "max_position_embeddings": 8, "filter_order": 8}
ALBERT = {**WIDTH, **DROPOUT, "embedding_size": 8}
DISTIL = {
    "vocab_size": 30, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 16,
    "attention_dropout": 0.0,
}  # fmt: skip
MINIMAL = {
    "image_size": 20, "patch_size": 5, "num_channels": 3, "hidden_size": 16, "num_hidden_layers": 2,
    "similarity": "symmetric",
}  # fmt: skip
POOL = {
    "depths": (2, 2), "hidden_sizes": (12, 16), "patch_sizes": (3, 3), "strides": (2, 2), "padding": (1, 1),
    "drop_path_rate": 0.3,
}  # fmt: skip
MIX = {
    "depths": (2, 2), "hidden_sizes": (12, 16), "patch_sizes": (3, 3), "strides": (2, 2), "mlp_ratios": (2, 2),
    "num_attention_heads": (1, 2), "sr_ratios": (2, 1), "drop_path_rate": 0.3, "hidden_dropout_prob": 0.1,
}  # fmt: skip
ALGO = {"hidden_size": 16, "num_attention_heads": 2, "loop_layers": 2}
MODELS: dict[str, tuple[str, str, dict[str, Any], Loss]] = {
    "Bert": ("BertForSequenceClassification", "BertConfig", {**WIDTH, **DROPOUT}, classes),
    "Albert": ("AlbertForMaskedLM", "AlbertConfig", ALBERT, tokens),
    "DistilBert": ("DistilBertForTokenClassification", "DistilBertConfig", DISTIL, parity),
    "Deberta": ("DebertaForMaskedLM", "DebertaConfig", {**WIDTH, **DROPOUT, **POSITIONS}, tokens),
    "DebertaV2": (
        "DebertaV2ForSequenceClassification", "DebertaV2Config",
        {**WIDTH, **DROPOUT, **POSITIONS, "conv_kernel_size": 3, "share_att_key": True, "position_buckets": 4}, classes,
    ),
    "Swin": ("SwinForImageClassification", "SwinConfig", GRID, images),
    "Swinv2": ("Swinv2ForImageClassification", "Swinv2Config", GRID, images),
    "PoolFormer": ("PoolFormerForImageClassification", "PoolFormerConfig", POOL, images),
    "Segformer": ("SegformerForImageClassification", "SegformerConfig", MIX, images),
    "M2Bert": ("M2BertForMaskedLM", "M2BertConfig", M2, tokens),
    "M2ViT": ("M2ViTForImageClassification", "M2ViTConfig", VIT, images),
    "M2GPT": ("M2GPTForCausalLM", "M2GPTConfig", GPT, lambda m: m(IDS, labels=IDS).loss),
    "DiT3D": ("DiT3DModel", "DiT3DConfig", DIT, voxels),
    "CoLM": ("CoLMForCausalLM", "CoLMConfig", {**WIDTH, "chains": (1, 1)}, tokens),
    "MoT": ("MoTForCausalLM", "MoTConfig", {**WIDTH, "qk_norm": "rms"}, tokens),
    "MoHD": ("MoHDForCausalLM", "MoHDConfig", {**WIDTH, "num_groups": 4, "num_shared": 1, "top_k": 1}, tokens),
    "Minimal": ("MinimalTransformerForImageClassification", "MinimalTransformerConfig", MINIMAL, images),
    "Wide": ("WideForSequenceClassification", "WideConfig", {**WIDTH, "head_dim": 24}, classes),
    "AlgoFormer": ("AlgoFormer", "AlgoFormerConfig", ALGO, loops),
}  # fmt: skip


def make(name: str) -> tuple[Any, Loss]:
    torch.manual_seed(0)
    model, config, fields, loss = MODELS[name]
    made = getattr(models, model)(getattr(models, config)(**fields)).train()
    with torch.no_grad():  # some begin with zeros, where little would be seen
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return made, loss


def gradients(model: nn.Module, loss: Loss) -> tuple[dict[str, Tensor | None], int]:
    """The gradients, and how many bytes were kept for them besides parameters."""
    kept: dict[int, int] = {}
    own = {parameter.data_ptr() for parameter in model.parameters()}

    def keep(x: Tensor) -> Tensor:
        if x.data_ptr() not in own:
            kept[x.data_ptr()] = x.untyped_storage().nbytes()
        return x

    model.zero_grad()
    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        value = loss(model)
    bytes_kept = sum(kept.values())
    value.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}, bytes_kept


def assert_same(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    for name, gradient in expected.items():
        if gradient is None:
            assert found[name] is None, name
        else:
            assert torch.equal(found[name], gradient), name


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_the_same_bit_by_bit(name: str) -> None:
    model, loss = make(name)
    assert model.supports_gradient_checkpointing and not model.is_gradient_checkpointing
    expected, bytes_without = gradients(model, loss)
    assert sum(gradient is not None for gradient in expected.values()) > len(expected) // 2
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    found, bytes_with = gradients(model, loss)
    assert_same(found, expected)
    assert bytes_with < bytes_without
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    again, bytes_again = gradients(model, loss)
    assert_same(again, expected)
    assert bytes_again == bytes_without


@pytest.mark.parametrize("name", MODELS)
def test_the_reentrant_kind(name: str) -> None:
    """It adds up the gradients of what is used more than once in another order, so they may be rounded otherwise."""
    model, loss = make(name)
    model.double()
    expected, _ = gradients(model, loss)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    found, _ = gradients(model, loss)
    for place, gradient in expected.items():
        if gradient is None:
            assert found[place] is None, place
        else:
            assert_close(place, found[place], gradient, gradient, gradient=True)


def test_names_of_transformers() -> None:
    model, loss = make("Bert")
    model.activation_checkpointing_enable()
    assert model.is_gradient_checkpointing
    model.activation_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.eval()  # only in training
    calls = []
    stack = next(m for m in model.modules() if isinstance(m, CheckpointedLayers))
    stack._gradient_checkpointing_func = lambda *args: calls.append(args)
    loss(model)
    assert not calls
    with pytest.raises(ValueError, match="every_n_layers must be 1 and offload False, got 2 and False"):
        model.activation_checkpointing_enable(every_n_layers=2)


def test_a_model_without_it() -> None:
    config = models.SequenceParallelTransformerConfig(**WIDTH)
    model = models.SequenceParallelTransformer(config)
    assert not model.supports_gradient_checkpointing and not model.is_gradient_checkpointing
    with pytest.raises(ValueError, match="SequenceParallelTransformer does not support gradient checkpointing"):
        model.gradient_checkpointing_enable()
    model.gradient_checkpointing_disable()


@pytest.mark.parametrize("name", ["Bert", "DebertaV2", "Swin"])
def test_through_a_model_of_transformers(name: str) -> None:
    """Its own methods reach the stack that was put into it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model, config, fields, _ = MODELS[name]
    fields = {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
    hf = getattr(transformers, model)(getattr(transformers, config)(**fields))
    place = hf.base_model_prefix
    setattr(hf, place, models.from_transformers(getattr(hf, place)))
    hf.train()

    def named(model: nn.Module) -> Tensor:
        if name == "Swin":
            return images(model)
        return model(input_ids=IDS, attention_mask=MASK, labels=torch.tensor([0, 1])).loss

    expected, bytes_without = gradients(hf, named)
    assert not hf.is_gradient_checkpointing
    hf.gradient_checkpointing_enable()
    assert hf.is_gradient_checkpointing and getattr(hf, place).is_gradient_checkpointing
    found, bytes_with = gradients(hf, named)
    assert_same(found, expected)
    assert bytes_with < bytes_without
    hf.gradient_checkpointing_disable()
    assert not getattr(hf, place).is_gradient_checkpointing
