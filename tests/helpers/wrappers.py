"""What ranks of tests/distributed/test_wrappers.py do: torch's wrappers for data parallelism around models."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from warpform import models

from .compare import assert_close
from .parity import randomise

WIDTH = {
    "vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 16, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
GRID = {
    "image_size": 20,
    "embed_dim": 16,
    "depths": (2, 2),
    "num_heads": (2, 4),
    "window_size": 2,
    "drop_path_rate": 0.0,
}


def make(name: str) -> Any:
    """The same on every rank, in float64."""
    torch.manual_seed(0)
    if name.startswith("Swin"):
        config = getattr(models, f"{name}Config")(**GRID)
        model = getattr(models, f"{name}ForImageClassification")(config)
    else:
        model = getattr(models, f"BertFor{name}")(models.BertConfig(**WIDTH))
    return randomise(model).double().train()


def inputs(name: str, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if name.startswith("Swin"):
        images = torch.randn(2, 3, 20, 20, generator=generator, dtype=torch.float64)
        return {"pixel_values": images, "labels": torch.tensor([0, 1])}
    ids = torch.randint(1, 30, (2, 7), generator=generator)
    # As many labels on every rank, so that the mean of the means of ranks is the mean of all.
    labels = {"MaskedLM": ids, "TokenClassification": ids % 2}.get(name, torch.tensor([0, 1]))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def mean_gradients(name: str) -> dict[str, Tensor]:
    """The mean over the ranks' batches of the gradients, made on one rank alone."""
    model, size = make(name), dist.get_world_size()
    for seed in range(size):
        (model(**inputs(name, seed)).loss / size).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def compare(name: str, found: dict[str, Tensor | None], expected: dict[str, Tensor]) -> None:
    for place, gradient in expected.items():
        actual = found[place]
        assert actual is not None, place
        # A softmax does not see the bias of keys, so its gradient is 0 but for rounding, which has the weight's scale.
        beside = expected[place.removesuffix("bias") + "weight"] if place.endswith("qkv.bias") else gradient
        scale = float(beside.abs().max())
        assert_close(f"{name} {place}", actual, gradient, gradient, gradient=True, scale=scale)


def parts(model: Any, name: str, which: str) -> list[nn.Module]:
    if name.startswith("Swin"):
        return [block for stage in model.base.stages for block in stage]
    layers = list(model.base.encoder.layers)
    return {"layers": layers, "layers and base": [*layers, model.base], "whole": []}[which]


def shard(name: str, which: str) -> None:
    """`fully_shard` of parts and of the whole: the gradients of all ranks' batches together."""
    expected = mean_gradients(name)
    model = make(name)
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    for part in parts(model, name, which):
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for _ in range(2):
        model.zero_grad()
        model(**inputs(name, dist.get_rank())).loss.backward()
    found = {n: None if p.grad is None else p.grad.full_tensor() for n, p in model.named_parameters()}
    compare(name, found, expected)


def replicate(name: str, static_graph: bool) -> None:
    """DistributedDataParallel, which looks for tensors in the output: every rank has the mean of the gradients."""
    expected = mean_gradients(name)
    model = make(name)
    wrapped = DistributedDataParallel(copy.deepcopy(model), static_graph=static_graph)
    for _ in range(2):
        wrapped.zero_grad()
        out = wrapped(**inputs(name, dist.get_rank()))
        assert isinstance(out, models.HeadOutput | models.ImageClassifierOutput)
        out.loss.backward()
        compare(name, {n: p.grad for n, p in wrapped.module.named_parameters()}, expected)
