"""Modules of chains against dense products with zeros, and what of later chains must not reach earlier ones."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.compare import assert_close
from warpform import ops
from warpform.nn import ChainLinear, ChainRMSNorm, _product, chain
from warpform.nn.chain import ChainAttentionCore, ChainEmbedding, ChainHead
from warpform.ops import RoutingPlan

IN, OUT = (3, 5, 4), (2, 6, 7)


def largest(t: Tensor) -> float:
    return float(t.detach().abs().max())


def product(bias: bool = True, dtype: torch.dtype = torch.float64) -> tuple[ChainLinear, Tensor]:
    return ChainLinear(IN, OUT, bias).to(dtype), torch.randn(9, sum(IN), dtype=dtype, requires_grad=True)


def dense(layer: ChainLinear, x: Tensor) -> Tensor:
    return F.linear(x, layer.dense(), None if layer.biases is None else torch.cat(list(layer.biases)))


def of_both(layer: ChainLinear, x: Tensor) -> list[list[Tensor]]:
    """The output and the gradients of x and of every parameter, by the layer and by the dense product."""
    weight = torch.randn(*x.shape[:-1], sum(OUT), dtype=x.dtype)
    wanted = (x, *layer.parameters())
    return [[out, *torch.autograd.grad((out * weight).sum(), wanted)] for out in (layer(x), dense(layer, x))]


# ---- ChainLinear ----


@pytest.mark.parametrize("bias", (False, True))
def test_it_is_the_dense_product_with_zeros(bias: bool) -> None:
    layer, x = product(bias)
    assert [w.shape for w in layer.weights] == [(2, 3), (6, 8), (7, 12)] and (layer.biases is None) is not bias
    zeros = torch.ones(3, 3).triu(1).bool().repeat_interleave(torch.tensor(OUT), 0)
    zeros = zeros.repeat_interleave(torch.tensor(IN), 1)
    assert not layer.dense()[zeros].any() and layer.dense()[~zeros].all()
    for rows in (x, x.detach().view(3, 3, -1).requires_grad_(), x.detach()[0].requires_grad_()):
        for found, expected in zip(*of_both(layer, rows), strict=True):
            assert found.shape == expected.shape and largest(found - expected) <= 1e-12 * max(1.0, largest(expected))
    with torch.no_grad():
        assert largest(layer(x) - dense(layer, x)) <= 1e-12


def test_a_view_of_wider_rows_and_no_rows() -> None:
    layer, _ = product()
    wide = torch.randn(4, 20, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(layer(wide[:, 5:17]).sum(), wide)
    (expected,) = torch.autograd.grad(dense(layer, wide[:, 5:17]).sum(), wide)
    assert largest(found - expected) <= 1e-12
    empty = torch.zeros(0, 12, dtype=torch.float64, requires_grad=True)
    out = layer(empty)
    out.sum().backward()
    assert out.shape == (0, 15) and empty.grad is not None and not layer.weights[2].grad.any()


@pytest.mark.parametrize("onednn", ("0", "1"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_other_dtypes(dtype: torch.dtype, onednn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WARPFORM_ONEDNN", onednn)
    layer, x = ChainLinear((64, 64, 128), (32, 96, 64), True).to(dtype), torch.randn(40, 256).to(dtype).requires_grad_()
    truth = ChainLinear((64, 64, 128), (32, 96, 64), True).double()
    truth.load_state_dict(layer.state_dict())
    wide = x.detach().double().requires_grad_()
    weight = torch.randn(40, 192).to(dtype)
    runs = []
    for one, rows, out in ((layer, x, layer(x)), (truth, wide, dense(truth, wide)), (layer, x, dense(layer, x))):
        wanted = (rows, *one.parameters())
        runs.append([out, *torch.autograd.grad((out * weight).sum(), wanted)])
    for i, (found, oracle, eager) in enumerate(zip(*runs, strict=True)):
        assert_close(f"{i}", found, oracle, eager, gradient=i > 0)


def test_gradients_of_gradients() -> None:
    layer = ChainLinear((1, 2), (2, 1), True).double()
    parameters = dict(layer.named_parameters())

    def run(x: Tensor, *values: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (x,))
        return found

    inputs = (torch.randn(3, 3, dtype=torch.float64, requires_grad=True), *parameters.values())
    assert torch.autograd.gradcheck(run, inputs, check_batched_grad=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("frozen", ((0,), (0, 1), (2,), (0, 1, 2)), ids=str)
def test_frozen_chains_get_no_gradient_and_change_none(frozen: tuple[int, ...]) -> None:
    layer, x = product()
    dout = torch.randn(9, sum(OUT), dtype=torch.float64)
    layer(x).backward(dout)
    expected = {name: p.grad for name, p in layer.named_parameters()}
    layer.zero_grad()
    own = {f"{kind}.{i}" for kind in ("weights", "biases") for i in frozen}
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name not in own)
    out = layer(x)
    # What backward computes: x, the number of chains, weights, biases.
    computed = out.grad_fn.apply(dout)[2:]
    for (name, _), gradient in zip(layer.named_parameters(), computed, strict=True):
        assert gradient is None if name in own else torch.equal(gradient, expected[name]), name
    # x alone may be what has no gradient.
    if len(frozen) < 3:
        layer(x.detach()).backward(dout)
        for name, parameter in layer.named_parameters():
            assert parameter.grad is None if name in own else torch.equal(parameter.grad, expected[name]), name


@pytest.mark.parametrize("k", (1, 2))
def test_the_first_chains_alone(k: int) -> None:
    layer, x = product()
    width_in, width_out = sum(IN[:k]), sum(OUT[:k])
    part = layer(x[:, :width_in], chains=k)
    assert torch.equal(part, layer(x)[:, :width_out])
    part.sum().backward()
    for i, weight in enumerate(layer.weights):
        assert (weight.grad is not None) == (i < k)
    assert x.grad is not None and not x.grad[:, width_in:].any()


def test_nan_of_later_chains_reaches_no_earlier_one() -> None:
    layer, x = product()
    weight = torch.randn(9, sum(OUT), dtype=torch.float64)
    weight[:, OUT[0] :] = 0
    clean = layer(x)[:, : OUT[0]]
    expected = torch.autograd.grad((clean * weight[:, : OUT[0]]).sum(), (x, layer.weights[0]))
    spoiled = x.detach().clone()
    spoiled[:, IN[0] :] = torch.nan
    spoiled.requires_grad_()
    with torch.no_grad():
        for later in (*list(layer.weights)[1:], *list(layer.biases)[1:]):
            later.fill_(torch.nan)
    out = layer(spoiled)
    assert torch.equal(out[:, : OUT[0]], clean) and out[:, OUT[0] :].isnan().all()
    dx, dw = torch.autograd.grad((out[:, : OUT[0]] * weight[:, : OUT[0]]).sum(), (spoiled, layer.weights[0]))
    assert torch.equal(dw, expected[1])
    assert largest(layer(spoiled[:, : IN[0]], 1) - clean) == 0
    # Through the whole product zeros meet the weights of later chains: with one chain they do not.
    (dx,) = torch.autograd.grad((layer(spoiled[:, : IN[0]], 1) * weight[:, : OUT[0]]).sum(), spoiled)
    assert torch.equal(dx, expected[0])


@pytest.mark.parametrize("sizes", ((1, 1), (8, 24), (2, 1, 3), (5,)), ids=str)
def test_one_launch_from_the_dense_weight_is_the_same(sizes: tuple[int, ...]) -> None:
    """`RoutingPlan.chains` with inputs of width 4 a unit and outputs of 6."""
    layer = ChainLinear([4 * s for s in sizes], [6 * s for s in sizes], True).double()
    x = torch.randn(7, 4 * sum(sizes), dtype=torch.float64, requires_grad=True)
    dout = torch.randn(7, 6 * sum(sizes), dtype=torch.float64)
    wanted = (x, *layer.parameters())
    expected = [out := layer(x), *torch.autograd.grad(out, wanted, dout)]
    plan = RoutingPlan.chains(7, sizes)
    out = ops.hidden_gather_linear(x, layer.dense(), plan, bias=torch.cat(list(layer.biases)))
    found = [out, *torch.autograd.grad(out, wanted, dout)]
    for one, other in zip(found, expected, strict=True):
        assert largest(one - other) <= 1e-12 * max(1.0, largest(other))
    # In scatter the plan means the transposed weight: here, the gradient of x.
    back = ops.hidden_scatter_linear(dout, layer.dense().t(), plan)
    assert largest(back - expected[1]) <= 1e-12


def cifar(chains: Sequence[int]) -> nn.Module:
    """The multilayer perceptron of the paper's table 13 for CIFAR images of 3072 numbers; the dense one has biases."""
    widths = [[width * c // sum(chains) for c in chains] for width in (768, 1024, 512, 256)]
    layers = [ChainLinear(one, other, len(chains) == 1) for one, other in itertools.pairwise(widths)]
    return nn.Sequential(nn.Linear(3072, 768), *layers, nn.Linear(256, 10))


@pytest.mark.parametrize(
    ("chains", "count"),
    (
        ((4, 4, 4, 4), 3_263_754), ((8, 8), 3_443_978), ((4, 12), 3_534_090), ((4, 4, 8), 3_353_866),
        ((16,), 3_806_218),
    ),
    ids=str,
)  # fmt: skip
def test_sizes_of_table_13(chains: tuple[int, ...], count: int) -> None:
    with torch.device("meta"):
        model = cifar(chains)
    assert sum(p.numel() for p in model.parameters()) == count
    assert model(torch.zeros(2, 3072, device="meta")).shape == (2, 10)


def test_the_head_is_exported_for_any_rows() -> None:
    head, rows = ChainHead(IN, 6).eval(), torch.export.Dim("rows", min=1, max=1000)
    for chains in (2, None):
        width = sum(IN[:chains])
        example = (torch.randn(5, width), chains)
        exported = torch.export.export(head, example, dynamic_shapes=({0: rows}, None)).module()
        for count in (1, 2, 9, 100):
            x = torch.randn(count, width)
            whole = torch.cat(list(head.weights)[:chains], 1).detach()
            assert_close("logits", exported(x, chains), x.double() @ whole.double().t(), x @ whole.t())


@pytest.mark.parametrize("rows", (1, 3, 20))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_products_of_the_head_add_into_one_result(
    rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In inference, by the kernel for few rows and by oneDNN or float32 for many."""
    monkeypatch.setenv("WARPFORM_ONEDNN", "1")
    monkeypatch.delenv("WARPFORM_BACKEND", raising=False)
    for name, value in (("LEAST_WEIGHT", 1), ("LEAST_WIDTH", 1), ("_is_amd", lambda: True)):
        monkeypatch.setattr(_product, name, value)
    monkeypatch.setattr(_product, "_lacks_products", lambda dtype: True)
    head, x = ChainHead(IN, 6).to(dtype), torch.randn(rows, 1, sum(IN)).to(dtype)
    results: list[Tensor] = []
    add = _product.add_linear_
    monkeypatch.setattr(chain, "add_linear_", lambda out, *rest: (results.append(out), add(out, *rest))[1])
    with torch.inference_mode():
        found = head(x)
    whole = torch.cat(list(head.weights), 1).detach()
    assert found.shape == (rows, 1, 6) and len(results) == len(IN) - 1
    assert all(out.data_ptr() == found.data_ptr() for out in results)
    parts = x.split(IN, -1)
    eager = sum(F.linear(part, weight.detach()) for part, weight in zip(parts, head.weights, strict=True))
    assert_close("logits", found, x.double() @ whole.double().t(), eager)


def test_autocast_and_compile(fresh_dynamo: None) -> None:
    layer, x = product(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    layer, x = product()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(x).square().sum(), (x, *layer.parameters()))
    expected = torch.autograd.grad(layer(x).square().sum(), (x, *layer.parameters()))
    for one, other in zip(found, expected, strict=True):
        assert largest(one - other) <= 1e-12 * max(1.0, largest(other))


# ---- the others ----


def test_a_norm_for_each_chain() -> None:
    norm = ChainRMSNorm(IN, 1e-3).double()
    with torch.no_grad():
        for weight in norm.weights:
            weight.uniform_(0.5, 1.5)
    x = torch.randn(2, 4, sum(IN), dtype=torch.float64, requires_grad=True)
    parts = zip(x.split(IN, -1), IN, norm.weights, strict=True)
    expected = torch.cat([F.rms_norm(part, (size,), weight, 1e-3) for part, size, weight in parts], -1)
    found = norm(x)
    dout = torch.randn_like(expected)
    runs = [[out, *torch.autograd.grad(out, (x, *norm.parameters()), dout)] for out in (found, expected)]
    for one, other in zip(*runs, strict=True):
        assert largest(one - other) <= 1e-12 * max(1.0, largest(other))
    assert torch.equal(norm(x[..., : sum(IN[:2])], 2), found[..., : sum(IN[:2])])


def joined_weights(head: ChainHead, x: Tensor) -> bool:
    """Tells whether the head makes one product with all of its weights."""
    with torch.profiler.profile() as profile:
        head(x)
    return any(event.key == "aten::cat" for event in profile.key_averages())


@pytest.mark.parametrize("rows", ((4, 5), (2, 1)), ids=("many", "few"))
def test_embedding_and_head_are_dense_ones_in_columns(rows: tuple[int, int]) -> None:
    embedding, head = ChainEmbedding(11, IN).double(), ChainHead(IN, 6).double()
    ids = torch.randint(11, rows)
    x = F.embedding(ids, torch.cat(list(embedding.weights), 1))
    assert torch.equal(embedding(ids), x) and torch.equal(embedding(ids, 2), x[..., : sum(IN[:2])])
    whole = torch.cat(list(head.weights), 1)
    for k, logits in enumerate(head.of_each(x), 1):
        width = sum(IN[:k])
        assert largest(logits - x[..., :width] @ whole[:, :width].t()) <= 1e-12
        assert largest(head(x[..., :width], k) - logits) <= 1e-12
        with torch.no_grad():
            found = head(x[..., :width], k)
        assert found.shape == logits.shape and largest(found - logits) <= 1e-12

    assert joined_weights(head, x) == (rows == (4, 5))
    leaves = (x.detach().requires_grad_(), *head.weights)
    dout = torch.randn(*rows, 6, dtype=torch.float64)
    exact = (dout @ whole, *(dout.flatten(0, 1).t() @ x.flatten(0, 1)).split(IN, 1))
    for logits in (head(leaves[0]), head.of_each(leaves[0])[-1]):
        for found, truth in zip(torch.autograd.grad(logits, leaves, dout), exact, strict=True):
            assert largest(found - truth) <= 1e-12
    # A part with a frozen weight is a product of its own, whose gradient is not computed.
    head.weights[0].requires_grad_(False)
    assert not joined_weights(head, x.detach())
    head(x.detach()).backward(dout)
    assert head.weights[0].grad is None
    for weight, truth in list(zip(head.weights, exact[1:], strict=True))[1:]:
        assert largest(weight.grad - truth) <= 1e-12


@pytest.mark.parametrize(
    ("make", "message"),
    (
        (lambda: ChainLinear((2, 2), (2,)), r"ChainLinear: out_sizes must be 2 numbers of at least 1, got \[2\]"),
        (lambda: ChainLinear((2, 0), (2, 2)), r"ChainLinear: in_sizes must be 2 numbers of at least 1, got \[2, 0\]"),
        (lambda: ChainLinear((), ()), r"ChainLinear: in_sizes must be numbers, one for each chain, of at least 1"),
        (lambda: ChainRMSNorm((0,)), r"ChainRMSNorm: sizes must be 1 numbers of at least 1, got \[0\]"),
        (lambda: ChainLinear(IN, OUT)(torch.ones(11)), r"ChainLinear: x must be of shape \[..., 12\], got \[11\]"),
        (lambda: ChainLinear(IN, OUT)(torch.ones(2, 12), 2), r"ChainLinear: x must be of shape \[..., 8\]"),
        (lambda: ChainLinear(IN, OUT)(torch.ones(2, 12), 0), "ChainLinear: chains must be an integer from 1 to 3"),
        (lambda: ChainRMSNorm(IN)(torch.ones(2, 12), 4), "ChainRMSNorm: chains must be an integer from 1 to 3, got 4"),
        (lambda: ChainRMSNorm(IN)(torch.ones(2, 13)), r"ChainRMSNorm: x must be of shape \[..., 12\], got \[2, 13\]"),
        (lambda: ChainHead(IN, 5)(torch.ones(2, 13)), r"ChainHead: x must be of shape \[..., 12\], got \[2, 13\]"),
        (
            lambda: ChainAttentionCore((2, 4), (2, 1), 8),
            r"ChainAttentionCore: kv_heads must have the same ratio to the heads of every chain, \[2, 4\], got",
        ),
        (
            lambda: ChainAttentionCore((3, 3), (2, 0), 8, share_kv=True),
            r"ChainAttentionCore: kv_heads must be those of the first chain alone and divide the heads of every chain",
        ),
    ),
)  # fmt: skip
def test_bad_input(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        make()
