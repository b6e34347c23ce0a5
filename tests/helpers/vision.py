"""Vision models against those of transformers, in float64: outputs, losses, gradients, statistics, and files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from warpform import models
from warpform.models.common.convertible import ConvertibleModel


def randomise(model: nn.Module) -> nn.Module:
    """Every weight random and in float64, statistics of BatchNorm too, in eval mode.

    What is small at first, such as layer scale, and what is 0, such as biases, would hide mistakes.
    """
    model = model.double().eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2.0)
            elif not tensor.is_floating_point():
                tensor.fill_(3)  # num_batches_tracked
            elif tensor.dim() > 1:
                tensor.normal_(std=tensor[0].numel() ** -0.5)
            elif "norm" in name.lower() and name.endswith("weight"):
                tensor.uniform_(0.5, 1.5)
            else:
                tensor.normal_(std=0.5)
    return model


def assert_same(name: str, actual: Tensor, expected: Tensor) -> None:
    """Two float64 results that differ by no more than their rounding."""
    assert actual.shape == expected.shape, f"{name}: {list(actual.shape)}, expected {list(expected.shape)}"
    if actual.numel():
        error, size = float((actual - expected).detach().abs().max()), float(expected.detach().abs().max())
        assert error <= 1e-12 * max(1.0, size), f"{name}: error {error:.2e} beside {size:.2e}"


class Wrapped(nn.Module):
    """Calls a module, as an adapter does in whose place it is."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out


def wrap_products(model: nn.Module) -> int:
    """Puts a `Wrapped` in the place of every linear layer and convolution; returns how many there are."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    for name in names:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Wrapped(model.get_submodule(name)))
    return len(names)


def outputs_of(model: nn.Module, pixels: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
    """Everything that a model returns, by name."""
    out = model(pixels, output_hidden_states=True, **({} if labels is None else {"labels": labels}))
    found: dict[str, Tensor] = {}
    for name, value in out.items():
        found |= {f"{name}[{i}]": x for i, x in enumerate(value)} if isinstance(value, tuple) else {name: value}
    return found


def check_parity(
    theirs: nn.Module, pixels: Tensor, labels: Tensor | None = None, ours: ConvertibleModel | None = None
) -> None:
    """Every output, the gradient of every parameter by itself, and buffers after the step, in float64.

    What is differentiated is a random linear functional of all outputs.
    """
    theirs = copy.deepcopy(theirs)
    ours = models.from_transformers(copy.deepcopy(theirs)) if ours is None else copy.deepcopy(ours)
    assert ours.training == theirs.training
    outputs = {model: outputs_of(model, pixels, labels) for model in (theirs, ours)}
    assert list(outputs[ours]) == list(outputs[theirs])
    factors = {name: torch.randn_like(value) for name, value in outputs[theirs].items()}
    gradients: dict[nn.Module, dict[str, Tensor]] = {}
    for model, found in outputs.items():
        parameters = dict(model.named_parameters())
        total = torch.stack([(value * factors[name]).sum() for name, value in found.items()]).sum()
        gradients[model] = dict(zip(parameters, torch.autograd.grad(total, list(parameters.values())), strict=True))
    for name, value in outputs[ours].items():
        assert_same(name, value, outputs[theirs][name])
    for ours_of, theirs_of in (
        (gradients[ours], gradients[theirs]),
        (dict(ours.named_buffers()), dict(theirs.named_buffers())),
    ):
        named = {type(ours).file_name(name): value for name, value in theirs_of.items()}
        names = {name: parts for name, parts in ours.weight_names().items() if name in ours_of}
        assert set(names) == set(ours_of) and {part for parts in names.values() for part in parts} == set(named)
        for name, parts in names.items():
            whole = ours_of[name]
            chunks = ours.split_weight(name, whole, len(parts)) if len(parts) > 1 else (whole,)
            for part, chunk in zip(parts, chunks, strict=True):
                assert_same(part, chunk.double(), named[part].double())


def check_there_and_back(theirs: nn.Module, pixels: Tensor, folder: Path) -> None:
    """Parameters are shared or joined; what is written back, saved by either and read by either computes the same."""
    ours = models.from_transformers(theirs)
    own = ours.state_dict(keep_vars=True)
    assert set(own) == set(ours.weight_names()) and isinstance(ours, ConvertibleModel)
    live = {type(ours).file_name(name): x for name, x in theirs.state_dict(keep_vars=True).items()}
    for name, parts in ours.weight_names().items():
        assert (live[parts[0]] is own[name]) == (len(parts) == 1), name
    with torch.no_grad():
        for value in own.values():
            value.add_(torch.rand_like(value) * 0.1 if value.is_floating_point() else 1)
    assert ours.to_transformers() is theirs
    check_parity(theirs, pixels, ours=ours)
    theirs.save_pretrained(folder / "theirs")
    ours.save_pretrained(folder / "ours")
    with torch.no_grad():
        expected = outputs_of(ours, pixels)
        readers: dict[str, Any] = {
            "ours of theirs": lambda: type(ours).from_pretrained(folder / "theirs"),
            "ours of ours": lambda: type(ours).from_pretrained(folder / "ours"),
            "theirs of ours": lambda: type(theirs).from_pretrained(folder / "ours", dtype=torch.float64).eval(),
            "a new one": lambda: type(ours).from_pretrained(folder / "ours").to_transformers(),
        }
        for way, read in readers.items():
            model = read()
            assert type(model) is type(theirs if way in ("theirs of ours", "a new one") else ours)
            for name, value in outputs_of(model, pixels).items():
                assert_same(f"{way}: {name}", value, expected[name])
