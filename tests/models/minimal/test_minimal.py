"""The minimal transformer against torch's attention with identities for what was removed, and digits that it reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.compare import assert_close
from helpers.compilations import Compilations
from helpers.parity import randomise
from helpers.training import accuracy_on_digits
from warpform import Packing
from warpform.models import MinimalTransformerConfig, MinimalTransformerForImageClassification
from warpform.models.minimal import SIMILARITIES, MinimalAttention
from warpform.nn import AttentionCore, Stack, Step

TINY: dict[str, Any] = {
    "image_size": 12, "patch_size": 3, "num_channels": 2, "hidden_size": 16, "num_hidden_layers": 2,
    "intermediate_size": 24, "num_labels": 5,
}  # fmt: skip
VARIANTS = [(similarity, value) for similarity in SIMILARITIES for value in (True, False)]


def model_of(**fields: Any) -> MinimalTransformerForImageClassification:
    model = randomise(MinimalTransformerForImageClassification(MinimalTransformerConfig(**{**TINY, **fields})), 0.3)
    assert isinstance(model, MinimalTransformerForImageClassification)
    return model.double()


def largest(t: Tensor) -> float:
    return float(t.detach().abs().max())


def assert_same(one: Tensor, other: Tensor) -> None:
    assert one.shape == other.shape and largest(one - other) <= 1e-12 * max(1.0, largest(other))


class Plain(nn.Module):
    """The same of torch's modules: identities and zeros stand where there is no matrix and no bias."""

    def __init__(self, model: MinimalTransformerForImageClassification) -> None:
        super().__init__()
        config = self.config = model.config
        width = config.hidden_size
        self.projection = nn.Conv2d(config.num_channels, width, config.patch_size, config.patch_size)
        self.positions = nn.Embedding(config.max_position_embeddings, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, config.num_attention_heads, config.intermediate_size, 0.0, "gelu", config.layer_norm_eps,
                batch_first=True, norm_first=config.norm_first,
            )
            for _ in range(config.num_hidden_layers)
        )  # fmt: skip
        self.norm = nn.LayerNorm(width, config.layer_norm_eps) if config.norm_first else None
        self.classifier = nn.Linear(width, config.num_labels)
        self.double()
        state = self.state_dict()
        for name, value in self.weights(model).items():
            state[name].copy_(value)

    def weights(self, model: MinimalTransformerForImageClassification) -> dict[str, Tensor]:
        """Its weights, as functions of those of the model."""
        config, width = self.config, self.config.hidden_size
        found = {"positions.weight": model.positions.weight}
        modules: dict[str, Any] = {"projection": model.embeddings.projection, "classifier": model.classifier}
        if model.norm is not None:
            modules["norm"] = model.norm
        per_layer = 2 if config.feed_forward else 1
        for i in range(config.num_hidden_layers):
            attention: Any = model.stack.branches[per_layer * i]
            modules[f"layers.{i}.norm1"] = attention.norm
            if config.feed_forward:
                feed_forward: Any = model.stack.branches[2 * i + 1]
                modules[f"layers.{i}.norm2"] = feed_forward.norm
                modules[f"layers.{i}.linear1"] = feed_forward.inwards
                modules[f"layers.{i}.linear2"] = feed_forward.outwards
            else:
                found[f"layers.{i}.linear2.weight"] = torch.zeros(width, config.intermediate_size)
                found[f"layers.{i}.linear2.bias"] = torch.zeros(width)
            eye, zero = torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
            inwards = attention.inwards
            if config.similarity == "separate":
                weights, biases = list(inwards.weight.split(width)), list(inwards.bias.split(width))
            elif config.similarity == "single":
                weights, biases = [inwards.weight, eye], [zero, zero]
            else:
                lower = torch.zeros(width, width, dtype=torch.float64)
                rows, columns = torch.tril_indices(width, width)
                lower = lower.index_put((rows, columns), inwards.triangle)
                weights, biases = [lower.t(), lower.t()], [zero, zero]
            if len(weights) < 3:
                values = attention.values
                weights.append(eye if values is None else values.weight)
                biases.append(zero if values is None else values.bias)
            found[f"layers.{i}.self_attn.in_proj_weight"] = torch.cat(weights)
            found[f"layers.{i}.self_attn.in_proj_bias"] = torch.cat(biases)
            out = attention.outwards
            found[f"layers.{i}.self_attn.out_proj.weight"] = out.weight if config.value else eye
            found[f"layers.{i}.self_attn.out_proj.bias"] = out.bias if config.value else zero
        for name, module in modules.items():
            found |= {f"{name}.weight": module.weight, f"{name}.bias": module.bias}
        return found

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.projection(pixels).flatten(2).transpose(1, 2) + self.positions.weight
        for layer in self.layers:
            if self.config.feed_forward or self.config.norm_first:
                x = layer(x)
            else:  # torch's second norm would stand behind a sum that is not there
                x = layer.norm1(x + layer._sa_block(x, None, None))
        return self.classifier((x if self.norm is None else self.norm(x)).mean(1))


@pytest.mark.parametrize("heads", (1, 4))
@pytest.mark.parametrize(("similarity", "value"), VARIANTS)
def test_it_is_attention_with_identities(similarity: str, value: bool, heads: int) -> None:
    """To 1e-12: logits, and the gradient of every parameter by way of the weights that torch's modules have of it."""
    for feed_forward, norm_first in ((False, True), (True, False), (False, False), (True, True)):
        model = model_of(
            similarity=similarity, value=value, feed_forward=feed_forward, norm_first=norm_first,
            num_attention_heads=heads,
        )  # fmt: skip
        plain, pixels, labels = Plain(model), torch.randn(3, 2, 12, 12).double(), torch.tensor([0, 4, 2])
        out = model(pixels, labels)
        logits = plain(pixels)
        assert_same(out.logits, logits)
        loss = nn.functional.cross_entropy(logits, labels)
        theirs = torch.autograd.grad(loss, list(plain.parameters()), allow_unused=True)
        grads = {name: grad for (name, _), grad in zip(plain.named_parameters(), theirs, strict=True)}
        # The gradient of each weight of torch's, handed on to the parameters that it is made of.
        made = {name: weight for name, weight in plain.weights(model).items() if weight.requires_grad}
        parameters = list(model.parameters())
        expected = torch.autograd.grad(list(made.values()), parameters, [grads[name] for name in made])
        for (name, _), one, other in zip(
            model.named_parameters(), torch.autograd.grad(out.loss, parameters), expected, strict=True
        ):
            assert largest(other) > 0 and largest(one - other) <= 1e-12 * max(1.0, largest(other)), name


def test_each_step_is_the_one_before_with_other_weights() -> None:
    """Queries and keys of W and the identity are the single W; that of L L^T is the symmetric one, for one head."""
    models = {name: model_of(similarity=name, bias=False) for name in SIMILARITIES}
    symmetric = models["symmetric"]
    for name in ("separate", "single"):
        state = models[name].state_dict()
        for key, weight in symmetric.state_dict().items():
            if key in state:
                state[key].copy_(weight)
        for place in (0, 2):
            known: Any = symmetric.stack.branches[place]
            branch: Any = models[name].stack.branches[place]
            lower = known.inwards.dense()
            whole = lower @ lower.t()
            eye = torch.eye(16, dtype=torch.float64)
            parts = [whole] if name == "single" else [whole, eye, known.values.weight]
            branch.inwards.weight.data.copy_(torch.cat(parts))
    pixels = torch.randn(3, 2, 12, 12).double()
    first, *others = (models[name](pixels).logits for name in SIMILARITIES)
    for other in others:
        assert_same(other, first)


def scores(model: MinimalTransformerForImageClassification, monkeypatch: Any) -> Tensor:
    """What the first layer's attention compares, before the softmax: [heads, rows, rows] of one image."""
    found = []
    attend = AttentionCore.attend

    def watched(self: AttentionCore, query: Tensor, key: Tensor, *rest: Any) -> Tensor:
        found.append(torch.einsum("ihd,jhd->hij", query, key) * query.shape[-1] ** -0.5)
        return attend(self, query, key, *rest)

    monkeypatch.setattr(AttentionCore, "attend", watched)
    model(torch.randn(1, 2, 12, 12).double())
    return found[0]


@pytest.mark.parametrize("heads", (1, 4))
def test_symmetric_scores(heads: int, monkeypatch: Any) -> None:
    """They are equal both ways, and their eigenvalues are at least 0."""
    model = model_of(similarity="symmetric", num_attention_heads=heads)
    found = scores(model, monkeypatch).detach()
    assert found.shape == (heads, 16, 16)
    assert_same(found, found.mT)
    eigenvalues = torch.linalg.eigvalsh(found)
    assert float(eigenvalues.min()) >= -1e-12 * float(eigenvalues.max())
    if heads == 1:
        branch: Any = model.stack.branches[0]
        lower = branch.inwards.dense()
        assert torch.equal(lower, lower.tril()) and bool((lower[torch.tril_indices(16, 16).unbind()] != 0).all())
    other = scores(model_of(similarity="single", num_attention_heads=heads), monkeypatch)
    assert largest(other - other.mT) > 0.01


def test_without_values_attention_adds_a_convex_sum() -> None:
    """Of the rows that it reads: the weights are at least 0, and 1 in sum."""
    branch: Any = model_of(similarity="single", value=False).stack.branches[0]
    assert isinstance(branch, MinimalAttention)
    x = torch.randn(9, 16, dtype=torch.float64)
    packing = Packing.from_lengths([4, 5])
    with torch.no_grad():
        normed, added = branch.norm(x), branch(x, Step.of(packing))
    for rows in (slice(0, 4), slice(4, 9)):
        # x is in general position: the weights are unique.
        rank = torch.linalg.matrix_rank(normed[rows])
        assert int(rank) == normed[rows].shape[0]
        weights = torch.linalg.lstsq(normed[rows].t(), added[rows].t()).solution
        assert float(weights.min()) > 0 and largest(weights.sum(0) - 1) <= 1e-12
        assert largest(weights.t() @ normed[rows] - added[rows]) <= 1e-12


@pytest.mark.parametrize(
    ("fields", "matrices"),
    (
        ({}, 12), ({"feed_forward": False}, 4), ({"feed_forward": False, "similarity": "single"}, 3),
        ({"feed_forward": False, "similarity": "symmetric"}, 2.5),
        ({"feed_forward": False, "similarity": "single", "value": False}, 1),
        ({"feed_forward": False, "similarity": "symmetric", "value": False}, 0.5),
        ({"feed_forward": False, "value": False}, 2),
    ),
)  # fmt: skip
def test_parameters_of_a_layer(fields: dict[str, Any], matrices: float) -> None:
    """In matrices of d^2, exactly; a triangle has its diagonal too, half a row of numbers more than half a matrix."""
    width = 128
    with torch.device("meta"):
        config = MinimalTransformerConfig(hidden_size=width, num_hidden_layers=1, **fields)
        model = MinimalTransformerForImageClassification(config)
        assert model(torch.zeros(2, 1, 28, 28)).logits.shape == (2, 10)
    counts = {"matrices": 0, "biases": 0, "norms": 0}
    for name, parameter in model.stack.named_parameters():
        kind = "norms" if "norm" in name else "biases" if name.endswith("bias") else "matrices"
        counts[kind] += parameter.numel()
    triangle = fields.get("similarity") == "symmetric"
    assert counts["matrices"] == matrices * width**2 + triangle * width // 2
    assert counts["norms"] == 2 * width * len(model.stack.branches)
    # Of queries, keys, values, output; and 4 + 1 of the feed-forward. One matrix for query and key has none.
    biases = 2 * (config.similarity == "separate") + 2 * config.value + 5 * config.feed_forward
    assert counts["biases"] == biases * width


def test_sizes_of_readers_of_digits() -> None:
    """Whole classifiers of 8 x 8 pixels in patches of 2 x 2, with a feed-forward as wide as the stream."""
    fields = {"image_size": 8, "patch_size": 2, "hidden_size": 32, "intermediate_size": 32}
    for more, count in (
        ({}, 26_922),
        ({"feed_forward": False, "similarity": "single", "value": False}, 5_418),
    ):
        with torch.device("meta"):
            model = MinimalTransformerForImageClassification(MinimalTransformerConfig(**fields, **more))
        assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_other_dtypes(similarity: str, dtype: torch.dtype) -> None:
    model = model_of(similarity=similarity, value=False).to(dtype)
    oracle = Plain(model.double())
    pixels = torch.randn(8, 2, 12, 12).to(dtype)
    eager = Plain(model).to(dtype)
    model.to(dtype)
    with torch.no_grad():
        assert_close("logits", model(pixels).logits, oracle(pixels.double()), eager(pixels))


def test_bad_input() -> None:
    model = model_of()
    for bad in (torch.randn(2, 2, 12), torch.randn(2, 1, 12, 12), torch.randn(2, 2, 12, 9)):
        with pytest.raises(ValueError, match=r"pixel_values must be of shape \[batch, 2, 12, 12\], got"):
            model(bad.double())
    with pytest.raises(ValueError, match=r"labels must have shape \[2\], got \[1\]"):
        model(torch.randn(2, 2, 12, 12).double(), torch.tensor([1]))
    for fields, message in (
        ({"similarity": "other"}, "similarity must be one of separate, single, symmetric, got 'other'"),
        ({"num_attention_heads": 3}, "num_attention_heads must divide hidden_size 16 where head_dim is None, got 3"),
        ({"head_dim": 8}, "head_dim must be None or hidden_size / num_attention_heads, .* got 8 with 1 heads"),
        ({"patch_size": 5}, "patch_size must divide image_size 12, got 5"),
    ):
        with pytest.raises(ValueError, match=f"^MinimalTransformerConfig: {message}"):
            MinimalTransformerConfig(**{**TINY, **fields})


def test_one_layer_of_a_stack_serves_alone() -> None:
    """Images of a batch do not see each other, and `stack` is an `nn.Stack`."""
    model = model_of(similarity="symmetric", value=False)
    assert isinstance(model.stack, Stack)
    pixels = torch.randn(3, 2, 12, 12).double()
    whole = model(pixels).logits
    for i in range(3):
        assert_same(model(pixels[i : i + 1]).logits, whole[i : i + 1])


@pytest.mark.slow
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_compiles_as_one_graph(similarity: str) -> None:
    model = model_of(num_hidden_layers=1, similarity=similarity, value=False)
    backend = Compilations()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for rows in (4, 3, 5):
            pixels = torch.randn(rows, 2, 12, 12).double()
            assert_same(compiled(pixels).logits, model(pixels).logits)
    assert backend.count == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    (
        {}, {"similarity": "symmetric", "feed_forward": False},
        {"similarity": "single", "value": False, "feed_forward": False},
    ),
)  # fmt: skip
def test_it_reads_digits(fields: dict[str, Any]) -> None:
    torch.manual_seed(0)
    sizes = {"image_size": 8, "patch_size": 2, "hidden_size": 32, "intermediate_size": 32}
    model = MinimalTransformerForImageClassification(MinimalTransformerConfig(**sizes, **fields))
    accuracy = accuracy_on_digits(model, steps=300, rate=5e-3)
    assert accuracy >= 0.9, accuracy
