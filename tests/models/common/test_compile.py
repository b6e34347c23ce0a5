"""Whole models under torch.compile(fullgraph=True) and torch.export, and without values: meta, fake, FLOP counts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import warpform
from helpers.compilations import Compilations

transformers = pytest.importorskip("transformers")

TINY = {
    "vocab_size": 97,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 20,
}
RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 8}


def swapped(family: str, kind: str = "Model", **fields: object) -> nn.Module:
    config = getattr(transformers, f"{family}Config")(**fields)
    return warpform.models.from_transformers(getattr(transformers, family + kind)._from_config(config))


def mohd() -> nn.Module:
    config = warpform.models.MoHDConfig(**TINY, num_groups=4, num_shared=1, top_k=1, max_position_embeddings=12)
    return warpform.models.MoHDForCausalLM(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: swapped("Bert", **TINY),
    "classifier": lambda: swapped("Bert", "ForSequenceClassification", **TINY),
    "albert": lambda: swapped("Albert", **TINY, embedding_size=8),
    "distilbert": lambda: swapped("DistilBert", vocab_size=97, dim=16, n_layers=1, n_heads=2, hidden_dim=20),
    "colm": lambda: warpform.models.CoLMForCausalLM(warpform.models.CoLMConfig(**TINY, chains=(1, 1))),
    "deberta": lambda: swapped("Deberta", **TINY, **RELATIVE),
    "deberta-v2": lambda: swapped("DebertaV2", **TINY, **RELATIVE, position_buckets=4, conv_kernel_size=3),
    "decoder": lambda: swapped("Mistral", "ForCausalLM", **TINY, num_key_value_heads=1, sliding_window=4),
    "mohd": mohd,
    "mot": lambda: warpform.models.MoTForCausalLM(warpform.models.MoTConfig(**TINY, qk_norm="rms")),
}
COMPILED = [pytest.param(name, marks=() if name == "bert" else pytest.mark.slow) for name in MODELS]
# Batch, sequence length, share of real tokens: no token at all too.
BATCHES = ((3, 7, 0.6), (4, 9, 0.6), (5, 6, 0.0))


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    for batch, seqlen, share in BATCHES:
        yield torch.randint(0, 97, (batch, seqlen)), (torch.rand(batch, seqlen) < share).long()


class Result(nn.Module):
    """The first tensor of a model's output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.eval()

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        output = self.model(ids, attention_mask=mask)
        return output.logits if hasattr(output, "logits") else output.last_hidden_state


def gradients(model: nn.Module, out: Tensor) -> list[Tensor]:
    weight = torch.linspace(-1, 1, out.numel()).view_as(out)
    parameters = list(model.parameters())
    found = torch.autograd.grad((out * weight).sum(), parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


@pytest.mark.parametrize("name", COMPILED)
def test_one_graph_serves_every_mask(name: str) -> None:
    # In float64, where the order of a sum does not show.
    model = Result(MODELS[name]()).double()
    backend = Compilations()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for ids, mask in batches():
        found, expected = compiled(ids, mask), model(ids, mask)
        torch.testing.assert_close(found, expected)
        for one, other in zip(gradients(model, found), gradients(model, expected), strict=True):
            torch.testing.assert_close(one, other)
    assert backend.count == 1


@pytest.mark.slow
def test_inductor() -> None:
    model = Result(MODELS["bert"]())
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        for ids, mask in batches():
            torch.testing.assert_close(compiled(ids, mask), model(ids, mask))


@pytest.mark.parametrize("name", COMPILED)
def test_export_with_dynamic_sizes(name: str) -> None:
    model = Result(MODELS[name]())
    auto = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    ids, mask = next(batches())
    program = torch.export.export(model, (ids, mask), dynamic_shapes={"ids": auto, "mask": auto}, strict=False)
    with torch.no_grad():
        for ids, mask in batches():
            torch.testing.assert_close(program.module()(ids, mask), model(ids, mask))


def test_a_compiled_mohd_refuses_too_many_tokens() -> None:
    model = mohd().eval()
    compiled = torch.compile(Result(model), fullgraph=True, backend="eager")
    ids, mask = torch.randint(0, 97, (2, 14)), torch.ones(2, 14, dtype=torch.int64)
    mask[:, 12:] = 0
    compiled(ids, mask)
    # torch 2.10 shows the expression in place of the message.
    with pytest.raises(RuntimeError, match="at most max_position_embeddings|Runtime assertion failed for expression"):
        compiled(ids, torch.ones_like(mask))
    with pytest.raises(ValueError, match="at most max_position_embeddings"):
        model(ids, torch.ones_like(mask))


@pytest.mark.parametrize("name", MODELS)
def test_meta_tensors(name: str) -> None:
    model = Result(MODELS[name]())
    meta = copy.deepcopy(model).to("meta")
    ids, mask = next(batches())
    out = meta(ids.to("meta"), mask.to("meta"))
    assert out.is_meta and out.shape == model(ids, mask).shape
    out.sum().backward()


@pytest.mark.parametrize("name", MODELS)
def test_fake_tensors_and_flops(name: str) -> None:
    """Where there are no values to read, products are counted as if all tokens were real."""
    model = Result(MODELS[name]())
    ids, mask = next(batches())
    with FlopCounterMode(display=False) as real:
        expected = model(ids, torch.ones_like(mask))
    mode = FakeTensorMode()
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = nn.Parameter(mode.from_tensor(parameter.detach()))
        for key, buffer in module._buffers.items():
            module._buffers[key] = None if buffer is None else mode.from_tensor(buffer)
    fake = mode.from_tensor(ids), mode.from_tensor(mask)
    with mode, FlopCounterMode(display=False) as counted:
        assert model(*fake).shape == expected.shape
    assert counted.get_total_flops() == real.get_total_flops() > 0
