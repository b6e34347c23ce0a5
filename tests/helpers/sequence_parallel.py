"""What ranks of a gloo group do in the tests of sequence parallelism: functions that every process can import."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from helpers.compare import assert_close
from warpform.distributed import (
    LocalGroup,
    RingMismatchError,
    SequenceParallel,
    SequenceParallelAttention,
    linformer_attention,
    ring_qk,
    rsa_attention,
    shard_sequence,
)
from warpform.models import SequenceParallelTransformer, SequenceParallelTransformerConfig
from warpform.models.sequence_parallel_transformer import next_tokens

LENGTH, BATCH, VOCABULARY = 24, 4, 31
FIELDS = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": LENGTH,
    "linformer_rank": 5,
}


@functools.cache
def mesh(data: int, sequence: int) -> dist.DeviceMesh:
    """(data, sequence) over all ranks of this process's group."""
    return dist.init_device_mesh("cpu", (data, sequence), mesh_dim_names=("data", "sequence"))


def batch(causal: bool, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens and labels of all replicas; ranks have different numbers of labels, one replica few."""
    ids = torch.randint(0, 5, (BATCH, LENGTH), generator=draw)  # that only these occur is soon learned
    some = torch.rand(BATCH, LENGTH, generator=draw) < torch.linspace(0.1, 0.9, LENGTH)
    labels = next_tokens(ids) if causal else ids
    labels = torch.where(some, labels, -100)
    labels[0, : LENGTH // 2] = -100
    return ids, labels


def model_of(attention: str, causal: bool, **fields: Any) -> SequenceParallelTransformer:
    make = SequenceParallelTransformerConfig.decoder if causal else SequenceParallelTransformerConfig.encoder
    model = SequenceParallelTransformer(make(**{**FIELDS, "attention": attention, **fields})).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Of a size that gradients change in its digits; scales of norms stay near 1.
            parameter.normal_(std=0.2).add_(name.endswith("norm.weight"))
    return model


def train(data: int, sequence: int, attention: str, causal: bool, layout: str, optimizer: str, steps: int = 20) -> None:
    """Steps of the same training by all ranks together, and by this process alone, side by side."""
    single = model_of(attention, causal, num_key_value_heads=2)
    start = {name: value.clone() for name, value in single.state_dict().items()}
    torch.manual_seed(100 + dist.get_rank())
    model = model_of(attention, causal, num_key_value_heads=2)  # weights of its own, but for those of the first rank
    if dist.get_rank() == 0:
        model.load_state_dict(start)
    plan = SequenceParallel.from_mesh(mesh(data, sequence), layout=layout)
    plan.apply(model)

    def make(of: nn.Module) -> torch.optim.Optimizer:
        if optimizer == "sgd":
            return torch.optim.SGD(of.parameters(), lr=0.1, momentum=0.9)
        return torch.optim.AdamW(of.parameters(), lr=1e-2)

    alone, together = make(single), make(model)
    draw = torch.Generator().manual_seed(7)
    for step in range(steps):
        ids, labels = batch(causal, draw)
        output = single(ids, labels)
        expected = output.loss
        alone.zero_grad()
        expected.backward()
        alone.step()
        loss = model(plan.shard_batch(ids), plan.shard_batch(labels)).loss
        together.zero_grad()
        loss.backward()
        plan.reduce_gradients(model)
        together.step()
        # What was learned cancels in the loss: the logarithm of a sum, of the size of logits, minus one of them.
        assert_close(f"loss of step {step}", loss, expected, expected, scale=float(output.logits.detach().abs().max()))
        if optimizer == "sgd":
            # Adam divides the gradient of key biases, which is nothing but rounding, by its own size.
            found = plan.state_dict(model)
            for name, value in single.state_dict().items():
                assert_close(f"{name} after step {step}", found[name], value, value, gradient=True)
    assert loss < expected_start(start, attention, causal), "it learned nothing"
    # What was cut is whole again, and the model works without a plan.
    whole = model_of(attention, causal, num_key_value_heads=2)
    whole.load_state_dict(plan.state_dict(model))
    with torch.inference_mode():
        logits = single(ids).logits
        if optimizer == "sgd":
            assert_close("logits", whole(ids).logits, logits, logits, gradient=True)
            mine = plan.shard_batch(logits)
            assert_close("logits of a rank", model(plan.shard_batch(ids)).logits, mine, mine, gradient=True)


def expected_start(start: dict[str, Tensor], attention: str, causal: bool) -> Tensor:
    """The loss that training began with."""
    model = model_of(attention, causal, num_key_value_heads=2)
    model.load_state_dict(start)
    with torch.inference_mode():
        return model(*batch(causal, torch.Generator().manual_seed(7))).loss


def average_with_ddp(data: int, sequence: int) -> None:
    """DistributedDataParallel over all ranks averages where the plan sums: the loss times the number of ranks."""
    model, other = model_of("ring", True), model_of("ring", True)
    plan = SequenceParallel.from_mesh(mesh(data, sequence))
    plan.apply(model)
    other.load_state_dict(model.state_dict())
    plan.apply(other)
    ids, labels = (plan.shard_batch(t) for t in batch(True, torch.Generator().manual_seed(1)))
    model(ids, labels).loss.backward()
    plan.reduce_gradients(model)
    wrapped = nn.parallel.DistributedDataParallel(other)
    (wrapped(ids, labels).loss * dist.get_world_size()).backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert_close(f"d {name}", q.grad, p.grad, p.grad, gradient=True)


def mean_of_unequal_ranks(data: int, sequence: int) -> None:
    """Ranks with 0, 1, 2 ... values: the mean of all, and each its own part of the gradient."""
    plan = SequenceParallel.from_mesh(mesh(data, sequence))
    rank, size = dist.get_rank(), dist.get_world_size()
    values = torch.arange(float(rank), dtype=torch.float64).add(rank).requires_grad_()
    mean = plan.mean(values.sum(), torch.tensor(len(values)))
    every = torch.cat([torch.arange(float(r), dtype=torch.float64) + r for r in range(size)])
    assert_close("mean", mean, every.mean(), every.mean())
    mean.backward()
    assert torch.equal(values.grad, torch.full_like(values, 1 / len(every)))
    none = torch.zeros((), requires_grad=True)
    nothing = plan.mean(3 * none, torch.tensor(0))
    nothing.backward()
    assert nothing == 0 and none.grad.isfinite()


def gradients_that_are_missing(data: int, sequence: int) -> None:
    """A parameter that only one rank used, and one in bfloat16: summed over all, in float32."""
    plan = SequenceParallel.from_mesh(mesh(data, sequence))
    rank, size = dist.get_rank(), dist.get_world_size()
    model = nn.Linear(3, 2).to(torch.bfloat16)
    if rank == 1:
        model.weight.grad = torch.ones_like(model.weight)
    model.bias.grad = torch.full_like(model.bias, 1 if rank else 256)
    plan.reduce_gradients(model)
    assert torch.equal(model.weight.grad, torch.ones_like(model.weight))
    # 256 + 1 is 256 in bfloat16, so a sum made in it would stay there.
    exact = torch.full_like(model.bias, 256 + size - 1, dtype=torch.float32)
    assert torch.equal(model.bias.grad, exact.to(torch.bfloat16)) and size > 3
    frozen = nn.Linear(3, 2).requires_grad_(False)
    plan.reduce_gradients(frozen)
    assert frozen.weight.grad is None


def weights_of_the_first_rank(data: int, sequence: int) -> None:
    """They begin alike on all ranks, and what is as long as the sequence is cut along it."""
    torch.manual_seed(dist.get_rank())
    model = model_of("linformer", False)
    parameters = list(model.parameters())
    torch.manual_seed(0)
    first = model_of("linformer", False)
    plan = SequenceParallel.from_mesh(mesh(data, sequence), layout="striped")
    assert plan.apply(model) is model
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    for (name, p), q in zip(model.named_parameters(), first.parameters(), strict=True):
        cut = plan.shard(q) if name.endswith("_projection") else q
        assert torch.equal(p, cut), name
    assert model.layers[0].attention.key_projection.shape == (5, LENGTH // sequence)
    assert torch.equal(plan.positions(LENGTH), torch.arange(plan.rank, LENGTH, sequence))
    for call, words in (
        (lambda: plan.apply(model), "applied before"),
        (lambda: plan.apply(nn.Linear(2, 2)), "SequenceParallelAttention"),
        (lambda: plan.shard(torch.zeros(2, LENGTH + 1)), "multiple of"),
        (lambda: plan.shard_batch(torch.zeros(data * 2 + 1, LENGTH)), "replicas divide"),
        (lambda: SequenceParallel.from_mesh(mesh(data, sequence), sequence="x"), "a dimension 'x'"),
        (lambda: SequenceParallel(mesh(data, sequence)), "group must be a ProcessGroup"),
        (lambda: SequenceParallel(plan.group, layout="x"), "layout must be one of"),
    ):
        try:
            call()
        except (TypeError, ValueError) as error:
            assert words in str(error), error
        else:
            raise AssertionError(words)
    # Without a dimension of data every rank has the same sequences.
    only = SequenceParallel.from_mesh(mesh(data, sequence)["sequence"])
    assert only.data_size == 1 and only.size == sequence and only.data_group is None


def same_as_in_one_process(size: int, dtype: torch.dtype) -> None:
    """RSA over gloo gives the bits that ranks in one process give, forward and backward. Linformer's products are done
    for all those ranks at once, in another order of summation: by the rule, in float64."""
    rank, local = dist.get_rank(), LocalGroup(size)
    q, dout = (torch.randn(2, 6 * size, 4, 8).to(dtype) for _ in range(2))
    k, v = (torch.randn(2, 6 * size, 2, 8).to(dtype) for _ in range(2))
    e, f = (torch.randn(5, 6 * size).to(dtype) for _ in range(2))
    for layout in ("contiguous", "zigzag", "striped"):
        every = [shard_sequence(t, group=local, dim=1, layout=layout) for t in (q, k, v, e, f, dout)]
        mine = [t[rank].clone().requires_grad_() for t in every]
        every = [t.requires_grad_() for t in every]
        expected = rsa_attention(*every[:3], group=local, causal=True, layout=layout)
        out = rsa_attention(*mine[:3], group=dist.group.WORLD, causal=True, layout=layout)
        assert torch.equal(out, expected[rank])
        found = torch.autograd.grad(out, mine[:3], mine[5].detach())
        wanted = torch.autograd.grad(expected, every[:3], every[5].detach())
        assert all(torch.equal(a, b[rank]) for a, b in zip(found, wanted, strict=True))
        if dtype != torch.float64:
            continue
        expected = linformer_attention(*every[:5], group=local)
        out = linformer_attention(*mine[:5], group=dist.group.WORLD)
        assert_close("linformer", out, expected[rank], expected[rank])
        found = torch.autograd.grad(out, mine[:5], mine[5].detach())
        wanted = torch.autograd.grad(expected, every[:5], every[5].detach())
        for name, a, b in zip(("q", "k", "v", "e", "f"), found, wanted, strict=True):
            assert_close(f"linformer d{name}", a, b[rank], b[rank], gradient=True)


def ranks_that_disagree(size: int) -> None:
    """All of them are told, before the first hop; and go on."""
    rank, group = dist.get_rank(), dist.group.WORLD
    q = torch.zeros(1, 4, 2, 8)
    odd = rank == size - 1
    for call in (
        lambda: ring_qk(q, q, group=group, causal=odd),
        lambda: ring_qk(q, q, group=group, scale=2.0 if odd else 1.0),
        lambda: ring_qk(*[q.double() if odd else q] * 2, group=group),
        lambda: rsa_attention(*[q[:, :2] if odd else q] * 3, group=group),
        lambda: linformer_attention(q, q, q, *[torch.zeros(5 if odd else 6, 4)] * 2, group=group),
    ):
        try:
            call()
        except RingMismatchError as error:
            assert f"on rank {size - 1}" in str(error), error
        else:
            raise AssertionError("nobody noticed")
    layer = SequenceParallelAttention(16, 2, attention="rsa")
    layer.plan = SequenceParallel(group, layout="contiguous")
    assert layer(torch.zeros(1, 4, 16))[0].shape == (1, 4, 16)
