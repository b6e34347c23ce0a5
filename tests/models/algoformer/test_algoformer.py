"""AlgoFormer against GPT-2's blocks of transformers and calls of its parts; and it learns regression in context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.compare import assert_close
from helpers.compilations import Compilations
from helpers.parity import make_mask, randomise
from helpers.training import train
from warpform import Packing
from warpform.models import AlgoFormer, AlgoFormerConfig
from warpform.nn import Stack, Step

TINY: dict[str, Any] = {
    "input_size": 3, "output_size": 2, "hidden_size": 16, "num_attention_heads": 2, "pre_layers": 1, "loop_layers": 2,
    "post_layers": 1, "max_position_embeddings": 12,
}  # fmt: skip


def model_of(**fields: Any) -> AlgoFormer:
    model = randomise(AlgoFormer(AlgoFormerConfig(**{**TINY, **fields})), 0.2)
    assert isinstance(model, AlgoFormer)
    return model.double()


def rows_of(batch: int = 3, length: int = 9) -> Tensor:
    return torch.randn(batch, length, 3, dtype=torch.float64)


def largest(t: Tensor) -> float:
    return float(t.detach().abs().max())


def assert_same(one: Tensor, other: Tensor) -> None:
    assert one.shape == other.shape and largest(one - other) <= 1e-12 * max(1.0, largest(other))


class Plain(nn.Module):
    """The same of transformers' blocks, on whole rows."""

    def __init__(self, model: AlgoFormer) -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers")
        from transformers.models.gpt2.modeling_gpt2 import GPT2Block

        config = model.config
        theirs = transformers.GPT2Config(
            n_embd=config.hidden_size, n_head=config.num_attention_heads, n_inner=config.intermediate_size,
            n_positions=config.max_position_embeddings, resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0,
            attn_implementation="eager",
        )  # fmt: skip
        self.embed_values = nn.Linear(config.input_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        for part in ("pre", "loop", "post"):
            layers = getattr(config, f"{part}_layers")
            setattr(self, part, nn.ModuleList(GPT2Block(theirs, layer_idx=i) for i in range(layers)))
        self.head_0 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.head_1 = nn.Linear(config.hidden_size, config.output_size)
        self.double()
        for name, parameter in self.named_parameters():
            parameter.data.copy_(self.turned(name, model.get_parameter(self.ours(name))))

    @staticmethod
    def ours(name: str) -> str:
        """The model's name of a parameter of these."""
        for part in ("pre", "loop", "post"):
            for layer in range(3):
                for theirs, place in (
                    ("ln_1", f"{2 * layer}.norm"), ("attn.c_attn", f"{2 * layer}.inwards"),
                    ("attn.c_proj", f"{2 * layer}.outwards"), ("ln_2", f"{2 * layer + 1}.norm"),
                    ("mlp.c_fc", f"{2 * layer + 1}.inwards"), ("mlp.c_proj", f"{2 * layer + 1}.outwards"),
                ):  # fmt: skip
                    name = name.replace(f"{part}.{layer}.{theirs}.", f"{part}.branches.{place}.")
        return name.replace("embed_", "embed.").replace("head_", "head.")

    @staticmethod
    def turned(name: str, weight: Tensor) -> Tensor:
        """GPT-2 keeps the weights of its products the other way round."""
        return weight.t() if ".c_" in name and name.endswith("weight") else weight

    def run(self, blocks: nn.ModuleList, x: Tensor) -> Tensor:
        length = x.shape[1]
        hidden = torch.full((length, length), torch.finfo(x.dtype).min, dtype=x.dtype).triu(1)
        for block in blocks:
            x = block(x, attention_mask=hidden[None, None])
            x = x[0] if isinstance(x, tuple) else x
        return x

    def forward(self, x: Tensor, steps: int) -> Tensor:
        start = self.run(self.pre, self.embed_values(x) + self.embed_positions.weight[: x.shape[1]])
        z = torch.zeros_like(start)
        for _ in range(steps):
            z = self.run(self.loop, z + start)
        return self.head_1(self.head_0(self.run(self.post, z)))


@pytest.mark.parametrize("steps", (1, 3))
def test_it_is_made_of_blocks_of_gpt2(steps: int) -> None:
    """To 1e-12: values, and the gradient of every parameter."""
    model, x = model_of(), rows_of()
    plain = Plain(model)
    found, expected = model(x, steps), plain(x, steps)
    assert_same(found, expected)
    weights = torch.randn_like(found)
    theirs = torch.autograd.grad((expected * weights).sum(), list(plain.parameters()))
    names = [plain.ours(name) for name, _ in plain.named_parameters()]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    ours = torch.autograd.grad((found * weights).sum(), [model.get_parameter(name) for name in names])
    for (name, _), one, other in zip(plain.named_parameters(), ours, theirs, strict=True):
        assert largest(one) > 0, name
        assert_same(plain.turned(name, one), other)


@pytest.mark.parametrize("part", ("pre", "loop", "post"))
def test_a_stack_is_blocks_of_gpt2(part: str) -> None:
    """Each part alone, with the gradient of its input."""
    model = model_of(pre_layers=2, post_layers=2)
    stack, plain = getattr(model, part), Plain(model)
    assert isinstance(stack, Stack)
    x = torch.randn(2, 7, 16, dtype=torch.float64, requires_grad=True)
    expected = plain.run(getattr(plain, part), x)
    found = stack(x.flatten(0, 1), Step.of(Packing.from_lengths([7, 7]))).view_as(x)
    assert_same(found, expected)
    weights = torch.randn_like(found)
    ours, theirs = (torch.autograd.grad((y * weights).sum(), x)[0] for y in (found, expected))
    assert_same(ours, theirs)


def test_steps_are_calls_of_the_parts() -> None:
    """Bit for bit, after every step; and the model has the same parameters for any number of them."""
    model, x = model_of(), rows_of()
    before = [name for name, _ in model.named_parameters()]
    packing = Packing.from_lengths([9, 9, 9])
    step = Step.of(packing)
    start = model.pre(model.embed(packing.pack(x), step), step)
    assert torch.equal(packing.unpack(model.pre(model.embed(x).flatten(0, 1), step)), packing.unpack(start))
    z = torch.zeros_like(start)
    every = model(x, 5, return_all=True)
    assert every.shape == (5, 3, 9, 2)
    for t in range(5):
        z = model.loop(z + start, step)
        y = packing.unpack(model.head(model.post(z, step)))
        assert torch.equal(every[t], y) and torch.equal(model(x, t + 1), y)
    assert [name for name, _ in model.named_parameters()] == before
    assert largest(every[4] - every[3]) > 1e-3


def test_a_row_sees_itself_and_those_before_it() -> None:
    model, x = model_of(), rows_of()
    before = model(x, 3, return_all=True)
    other = x.clone()
    other[:, 5:] += 1.0
    after = model(other, 3, return_all=True)
    assert largest(after[:, :, :5] - before[:, :, :5]) <= 1e-12
    assert float((after - before)[:, :, 5:].detach().abs().amin((0, 1, 3)).min()) > 1e-6


def test_padding_changes_nothing() -> None:
    model, lengths = model_of(), [9, 4, 6]
    x = rows_of()
    mask = make_mask("right", lengths, 9)
    expected = model(x, 3, True, attention_mask=mask)
    assert expected.shape == (3, 3, 9, 2) and not expected[:, mask == 0].any()
    for alike in (torch.tensor(lengths), torch.tensor(lengths, dtype=torch.int32)):
        assert torch.equal(model(x, 3, True, lengths=alike), expected)
    packing = Packing.from_mask(mask)
    packed = model(packing.pack(x), 3, True, packing=packing)
    assert packed.shape == (3, 19, 2)
    assert torch.equal(torch.stack([packing.pack(y) for y in expected]), torch.stack([*packed]))
    for pattern in ("left", "holes"):
        moved = make_mask(pattern, lengths, 9)
        there = torch.randn_like(x)
        there[moved.bool()] = x[mask.bool()]
        assert torch.equal(model(there, 3, True, attention_mask=moved)[:, moved.bool()], expected[:, mask.bool()])
    for row, length in enumerate(lengths):
        assert_same(model(x[row : row + 1, :length], 3, True)[:, 0], expected[:, row, :length])


@pytest.mark.parametrize("return_all", (False, True))
def test_steps_without_a_gradient(return_all: bool) -> None:
    """The results are the same bit by bit. Gradients are those of a loop that begins with a constant; less is kept."""
    model, x = model_of(), rows_of()
    weights = torch.randn(5, 3, 9, 2, dtype=torch.float64)[slice(None) if return_all else -1]
    whole = model(x, 5, return_all)
    kept: list[int] = []

    def run(no_grad_steps: int) -> Tensor:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
            found: Tensor = model(x, 5, return_all, no_grad_steps=no_grad_steps)
        kept.append(sum(sizes))
        return found

    cut = run(2)
    assert torch.equal(cut, whole)
    run(0)
    assert kept[0] < kept[1]
    ours = torch.autograd.grad((cut * weights).sum(), list(model.parameters()))
    packing = Packing.from_lengths([9, 9, 9])
    step = Step.of(packing)
    start = model.pre(model.embed(packing.pack(x), step), step)
    z = torch.zeros_like(start)
    found = []
    for t in range(5):
        z = model.loop(z + start, step)
        z = z.detach() if t < 2 else z
        y = packing.unpack(model.head(model.post(z, step)))
        found.append(y.detach() if t < 2 else y)
    expected = torch.stack(found) if return_all else found[-1]
    theirs = torch.autograd.grad((expected * weights).sum(), list(model.parameters()))
    assert all(map(torch.equal, ours, theirs))
    full = torch.autograd.grad((whole * weights).sum(), list(model.parameters()))
    assert any(largest(one - other) > 1e-6 for one, other in zip(ours, full, strict=True))
    with torch.no_grad():
        assert not model(x, 5, no_grad_steps=2).requires_grad


def test_saved_and_loaded_for_any_steps(tmp_path: Path) -> None:
    model, x = model_of(), rows_of()
    model.save_pretrained(tmp_path)
    loaded = AlgoFormer.from_pretrained(tmp_path)
    assert torch.equal(loaded(x, 4, True), model(x, 4, True))


@pytest.mark.parametrize(
    ("fields", "layers"), (({}, 3), ({"pre_layers": 0, "post_layers": 0}, 1), ({"loop_layers": 3}, 5))
)
def test_sizes(fields: dict[str, int], layers: int) -> None:
    """A layer of GPT-2 has 12 d^2 + 13 d parameters."""
    with torch.device("meta"):
        model = AlgoFormer(AlgoFormerConfig(**fields))
        assert model(torch.zeros(2, 82, 20), 3).shape == (2, 82, 1)
    width = 256
    outside = (20 * width + width) + 82 * width + 2 * width + (width + 1)
    expected = layers * (12 * width**2 + 13 * width) + outside
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = model_of().to(dtype)
    eager, oracle = Plain(model).to(dtype), Plain(model)
    x = rows_of(8, 12).to(dtype)
    with torch.no_grad():
        assert_close("y", model(x, 2), oracle(x.double(), 2), eager(x, 2))


def test_bad_input() -> None:
    model, x = model_of(), rows_of()
    mask = torch.ones(3, 9, dtype=torch.bool)
    packing = Packing.from_mask(mask)
    for arguments, message in (
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 3, "no_grad_steps": 3}, "no_grad_steps must be from 0 to steps - 1, 2, got 3"),
        ({"steps": 3, "no_grad_steps": -1}, "no_grad_steps must be from 0 to steps - 1, 2, got -1"),
        ({"x": rows_of(1, 13)}, "sequences must have at most max_position_embeddings, 12, tokens, got 13"),
        ({"x": x[0]}, r"x must be of shape \[batch, seqlen, 3\], got \[9, 3\]"),
        ({"x": x[:, :, :2]}, r"x must have shape \[3, 9, 3\], got \[3, 9, 2\]"),
        ({"attention_mask": mask[:2]}, r"attention_mask must be of shape \[3, 9\] as x is, got \[2, 9\]"),
        ({"lengths": torch.tensor([1, 2])}, r"lengths must have shape \[3\], got \[2\]"),
        ({"lengths": torch.tensor([1, 2, 3]), "attention_mask": mask}, "lengths must be None with attention_mask"),
        ({"packing": packing}, r"x must have shape \[27, 3\], got \[3, 9, 3\]"),
        ({"packing": packing, "attention_mask": mask}, "attention_mask must be None with packing"),
    ):
        with pytest.raises(ValueError, match=f"^AlgoFormer: {message}"):
            model(**{"x": x, "steps": 2, **arguments})
    with pytest.raises(ValueError, match="lengths must be at most seqlen, 9, got 10"):
        model(x, 2, lengths=torch.tensor([1, 10, 2]))
    for fields, message in (
        ({"num_attention_heads": 3}, "num_attention_heads must divide hidden_size 16, got 3"),
        ({"pre_layers": -1}, "pre_layers must be at least 0, got -1"),
        ({"loop_layers": 0}, "loop_layers must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=f"^AlgoFormerConfig: {message}$"):
            AlgoFormerConfig(**{**TINY, **fields})


@pytest.mark.slow
def test_compiles_as_one_graph() -> None:
    model = model_of(pre_layers=0, loop_layers=1, post_layers=0)
    backend = Compilations()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for batch, length in ((4, 9), (5, 7), (6, 8)):
            x, mask = rows_of(batch, length), (torch.rand(batch, length) < 0.7).long()
            assert_same(compiled(x, 2, attention_mask=mask), model(x, 2, attention_mask=mask))
    assert backend.count == 1


def regressions(batch: int) -> tuple[Tensor, Tensor]:
    """Rows x_1, y_1, x_2, y_2, ... of 12 points in 4 dimensions, y = w x with a w of each sequence; and y [B, 12]."""
    points, weights = torch.randn(batch, 12, 4), torch.randn(batch, 4, 1) / 2
    values = points @ weights
    rows = torch.stack((points, nn.functional.pad(values, (0, 3))), 2)
    return rows.flatten(1, 2), values.squeeze(2)


@pytest.mark.slow
def test_it_learns_regression_in_context() -> None:
    """The error of the last points is below half of the first, of which nothing is known but that y is about 1."""
    torch.manual_seed(0)
    model = AlgoFormer(AlgoFormerConfig(4, 1, 32, 4, 1, 1, 1, 24))

    def loss() -> Tensor:
        rows, values = regressions(64)
        return (model(rows, 4)[:, ::2, 0] - values).square().mean()

    train(model, loss, steps=350, rate=2e-3, weight_decay=0.0, constant=True)
    rows, values = regressions(1000)
    with torch.inference_mode():
        errors = (model(rows, 4)[:, ::2, 0] - values).square().mean(0)
    assert float(errors[-3:].mean()) < 0.5 * float(errors[0]), errors
