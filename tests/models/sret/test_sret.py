"""SReT against a literal form of it under the published names, its permutations, and digits that it reads."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.compare import assert_close
from helpers.compilations import Compilations
from helpers.identities import assert_same, largest
from helpers.parity import randomise
from helpers.training import digits, train
from warpform.models import SReTConfig, SReTForImageClassification, from_pretrained
from warpform.models.common.pretrained import file_weights

# Heads of 6 and of 4 dimensions; 16, 4 and 1 tokens; the inner widths are rounded down.
TINY: dict[str, Any] = {
    "image_size": 32, "num_channels": 2, "hidden_sizes": (12, 12, 24), "depths": (2, 1, 1), "num_heads": (2, 3, 6),
    "groups": ((4, 2), (2, 4), (1, 1)), "mlp_ratio": 2.3, "between_ratio": 1.5, "drop_path_rate": 0.0, "num_labels": 5,
}  # fmt: skip
Draw = Callable[[int], Tensor]


class PlainAttention(nn.Module):
    def __init__(self, width: int, heads: int, groups: tuple[int, int]) -> None:
        super().__init__()
        self.heads, self.groups = heads, groups
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, run: int, draw: Draw | None) -> Tensor:
        batch, tokens, width = x.shape
        order = torch.arange(tokens)
        if run == 1 and self.groups[1] > 1 and draw is not None:
            order = draw(tokens)
        out = torch.empty_like(x)
        d = width // self.heads
        for run_of_tokens in order.chunk(self.groups[run]):
            q, k, v = self.qkv(x[:, run_of_tokens]).view(batch, -1, 3, self.heads, d).permute(2, 0, 3, 1, 4)
            p = (q @ k.mT * d**-0.5).softmax(-1)
            out[:, run_of_tokens] = (p @ v).transpose(1, 2).reshape(batch, -1, width)
        return self.proj(out)


class Coefficient(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.ones(1))


class PlainBlock(nn.Module):
    """The shared block; without attention the feed-forward in between."""

    def __init__(self, width: int, inner: int, attention: PlainAttention | None) -> None:
        super().__init__()
        self.attn = attention
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)})
        for i in range(1, 3 if attention is None else 5):
            self.add_module(f"coefficient{i}", Coefficient())
        for i in range(1, 2 if attention is None else 3):
            self.add_module(f"norm{i}", nn.LayerNorm(width, 1e-6))

    def c(self, i: int) -> Any:
        return self.get_submodule(f"coefficient{i}").bias

    def forward(self, x: Tensor, run: int, draw: Draw | None) -> Tensor:
        place = 0
        if self.attn is not None:
            x = self.c(1) * x + self.c(2) * self.attn(self.get_submodule("norm1")(x), run, draw)
            place = 1
        inner = F.gelu(self.mlp["fc1"](self.get_submodule(f"norm{place + 1}")(x)))
        return self.c(2 * place + 1) * x + self.c(2 * place + 2) * self.mlp["fc2"](inner)


class Plain(nn.Module):
    """The formulas, in torch's operations, under the names of the published state dict."""

    def __init__(self, config: SReTConfig) -> None:
        super().__init__()
        widths = config.hidden_sizes
        channels = (config.num_channels, widths[0] // 2, widths[0], widths[0])
        self.patch_embed, self.transformers, self.pools = nn.Module(), nn.ModuleList(), nn.ModuleList()
        for i in range(3):
            self.patch_embed.add_module(f"conv{i + 1}", nn.Conv2d(channels[i], channels[i + 1], 3, 2, 1))
            self.patch_embed.add_module(f"bn{i + 1}", nn.BatchNorm2d(channels[i + 1]))
        self.pos_embed = nn.Parameter(torch.randn(1, widths[0], config.image_size // 8, config.image_size // 8))
        for stage, width in enumerate(widths):
            blocks: list[nn.Module] = []
            for _ in range(config.depths[stage]):
                attention = PlainAttention(width, config.num_heads[stage], config.groups[stage])
                shared = PlainBlock(width, int(width * config.mlp_ratio), attention)
                for _ in range(2):
                    blocks += [shared, PlainBlock(width, int(width * config.between_ratio), None)]
            holder = nn.Module()
            holder.blocks = nn.ModuleList(blocks)
            self.transformers.append(holder)
            if stage + 1 < len(widths):
                pool = nn.Module()
                pool.conv = nn.Conv2d(width, widths[stage + 1], 3, 2, 1, groups=width)
                self.pools.append(pool)
        self.norm = nn.LayerNorm(widths[-1], 1e-6)
        self.head = nn.Linear(widths[-1], config.num_labels)

    def forward(self, x: Tensor, draw: Draw | None = None) -> Tensor:
        for i in range(1, 4):
            x = self.patch_embed.get_submodule(f"conv{i}")(x)
            x = self.patch_embed.get_submodule(f"bn{i}")(x).relu()
        x = x + self.pos_embed
        for stage, holder in enumerate(self.transformers):
            if stage:
                x = self.pools[stage - 1].conv(x)  # type: ignore[operator]
            sides = x.shape[2:]
            x = x.flatten(2).mT
            for i, block in enumerate(holder.blocks):  # type: ignore[arg-type]
                x = block(x, 1 if i % 4 == 2 else 0, draw)
            x = x.mT.unflatten(2, sides)
        return self.head(self.norm(x.mean((2, 3))))


def both(dtype: torch.dtype = torch.float64, **fields: Any) -> tuple[SReTForImageClassification, Plain]:
    """A model that was loaded from the state dict of its plain form, and that form."""
    config = SReTConfig(**{**TINY, **fields})
    plain = randomise(Plain(config), 0.3).to(dtype)
    assert isinstance(plain, Plain)
    for name, buffer in plain.named_buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand_like(buffer) + ("var" in name))
    weights = {name: weight.clone() for name, weight in plain.state_dict().items()}
    told = ("image_size", "num_channels", "hidden_sizes", "depths", "mlp_ratio", "between_ratio", "num_labels")
    model = SReTForImageClassification.from_published(
        weights, **{name: value for name, value in {**TINY, **fields}.items() if name not in told}
    )
    assert model.config == config and not model.training
    return model, plain


def images(batch: int = 3) -> Tensor:
    return torch.randn(batch, 2, 32, 32, dtype=torch.float64)


def drawn(seed: int) -> Draw:
    generator = torch.Generator().manual_seed(seed)
    return lambda tokens: torch.randperm(tokens, generator=generator)


def assert_same_gradients(model: SReTForImageClassification, plain: Plain) -> None:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    scale = max(largest(g) for g in expected.values() if g is not None)
    compared = set()
    for name, parts in model.weight_names().items():
        if name not in found:
            continue  # a buffer
        gradient = found[name]
        assert gradient is not None, name
        for part, chunk in zip(parts, model.split_weight(name, gradient, len(parts)), strict=True):
            other = expected[part]
            assert other is not None, part
            assert_same(chunk, other, part, scale=scale)
            compared.add(part)
    assert compared == set(expected)


@pytest.mark.parametrize(("size", "count"), [("T", 4_755_979), ("LT", 4_988_024), ("S", 20_899_692)])
def test_parameters_of_the_presets(size: str, count: int) -> None:
    with torch.device("meta"):
        config = SReTConfig.preset(size)
        model, plain = SReTForImageClassification(config), Plain(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    # The published state dict has the shared blocks under two names.
    assert (len(plain.state_dict()), len(list(plain.parameters()))) == (510, 341)
    assert {part for parts in model.weight_names().values() for part in parts} == {
        name for name in plain.state_dict() if not _second(name)
    }
    shapes = {name: weight.shape for name, weight in plain.state_dict().items()}
    names, own = model.weight_names(), model.state_dict()
    for name, parts in names.items():
        weight = own[name]
        assert all(shapes[part] == (weight.shape if len(parts) == 1 else (1,)) for part in parts), name


def _second(name: str) -> bool:
    parts = name.split(".")
    return parts[0] == "transformers" and int(parts[3]) % 4 == 2


def test_it_is_the_formula() -> None:
    """In float64, to 1e-12: logits, the gradient of every parameter, and the statistics of a step of training."""
    model, plain = both(permute="never")
    x, labels = images(), torch.tensor([4, 0, 2])
    with torch.no_grad():
        assert_same(model(x).logits, plain(x))
        (alone,) = model(x, return_dict=False)
        assert_same(alone, plain(x))
    model.train()
    plain.train()
    out, logits = model(x, labels), plain(x)
    loss = F.cross_entropy(logits, labels)
    assert_same(out.logits, logits)
    assert_same(out.loss, loss)
    out.loss.backward()
    loss.backward()
    assert_same_gradients(model, plain)
    statistics = dict(plain.named_buffers())
    assert len(statistics) == 9
    for name, buffer in model.named_buffers():
        assert_same(buffer.double(), statistics[name].double(), name)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_permutations_are_those_of_the_generator(checkpointing: bool) -> None:
    """In training, in the second run of blocks of more than one group; also where layers are computed again."""
    model, plain = both()
    model.train()
    plain.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    x = images()
    logits = model(x, generator=torch.Generator().manual_seed(3)).logits
    expected = plain(x, drawn(3))
    assert_same(logits, expected)
    logits[:, 0].sum().backward()
    expected[:, 0].sum().backward()
    assert_same_gradients(model, plain)
    with torch.no_grad():
        other = plain(x, drawn(4))
    assert largest(other - expected) > 1e-6


def test_when_tokens_are_permuted() -> None:
    x = images()
    by_rule = {}
    for permute in ("always", "train", "never"):
        model, _ = both(permute=permute)
        with torch.no_grad():
            in_eval = torch.equal(model(x).logits, model(x).logits)
            model.patch_embed.eval()
            model.train()
            model.patch_embed.eval()
            by_rule[permute] = (in_eval, torch.equal(model(x).logits, model(x).logits))
    assert by_rule == {"always": (False, False), "train": (True, False), "never": (True, True)}
    # As published, in eval mode too.
    model, plain = both(permute="always")
    with torch.no_grad():
        first = model(x, generator=torch.Generator().manual_seed(5)).logits
        assert_same(first, plain(x, drawn(5)))
        assert torch.equal(first, model(x, generator=torch.Generator().manual_seed(5)).logits)
        # Without a generator it is torch's own.
        torch.manual_seed(6)
        one = model(x).logits
        torch.manual_seed(6)
        assert torch.equal(one, model(x).logits)


def test_blocks_run_twice() -> None:
    """Each with the groups of its run; what runs in between is of each run alone."""
    model, _ = both()
    calls: list[str] = []
    runs: list[int] = []
    for name, module in model.named_modules():
        if name.count(".") == 2 and name.startswith(("blocks", "between")):
            module.register_forward_hook(lambda *args, name=name: calls.append(name))
        if name.endswith(".mixer"):
            module.register_forward_hook(lambda m, args, kw, out: runs.append(kw["run"]), with_kwargs=True)
    with torch.no_grad():
        hooked = model(x := images()).logits
    stage = [
        [f"blocks.{s}.{j}", f"between.{s}.{2 * j}", f"blocks.{s}.{j}", f"between.{s}.{2 * j + 1}"]
        for s, depth in enumerate(TINY["depths"])
        for j in range(depth)
    ]
    assert calls == [name for names in stage for name in names]
    assert runs == [0, 1] * sum(TINY["depths"])
    fresh = SReTForImageClassification.from_published(
        file_weights(model, model.state_dict()), num_heads=TINY["num_heads"], groups=TINY["groups"]
    )
    with torch.no_grad():  # hooks change nothing
        assert_same(fresh(x).logits, hooked)


def test_drop_path_rises_as_published() -> None:
    with torch.device("meta"):
        model = SReTForImageClassification(SReTConfig.preset("T"))
    blocks: Any = model.blocks
    between: Any = model.between
    rates = [[block.drop_path.probability for block in stage] for stage in blocks]
    # Shared block j of a stage has the rate of layer j of that stage, of twenty.
    assert rates == [[0.1 * (first + j) / 20 for j in range(depth)] for first, depth in ((0, 2), (4, 5), (14, 3))]
    assert all(block.drop_path.probability == 0 for stage in between for block in stage)


def test_published_weights() -> None:
    load = SReTForImageClassification.from_published
    _, plain = both()
    weights = dict(plain.state_dict())
    heads, groups = TINY["num_heads"], TINY["groups"]
    whole = load(weights, num_heads=heads, groups=groups)
    once = load({name: w for name, w in weights.items() if not _second(name)}, num_heads=heads, groups=groups)
    assert once.state_dict().keys() == whole.state_dict().keys()
    assert all(torch.equal(w, whole.state_dict()[name]) for name, w in once.state_dict().items())
    # They are not copied where that is not necessary.
    assert whole.head.weight.data_ptr() == plain.head.weight.data_ptr()

    with pytest.raises(ValueError, match=r"from_published: num_heads must be given for hidden_sizes \(12, 12, 24\)"):
        load(weights)
    changed = {**weights, "transformers.0.blocks.6.mlp.fc1.bias": weights["transformers.0.blocks.4.mlp.fc1.bias"] + 1}
    with pytest.raises(ValueError, match=r"blocks\.6\.mlp\.fc1\.bias must equal transformers\.0\.blocks\.4\.mlp"):
        load(changed, num_heads=heads, groups=groups)
    for name, problem in (("transformers.0.blocks.3.norm1.bias", "lack"), ("pos_embed", "lack"), ("other", "unknown")):
        changed = {**weights, name: weights["norm.bias"]}
        if problem == "lack":
            del changed[name]
        with pytest.raises(ValueError, match=rf"from_published.* {problem} {name}"):
            load(changed, num_heads=heads, groups=groups)
    with pytest.raises(ValueError, match=r"weights must have the published names, such as transformers\.0"):
        load({"embeddings.weight": weights["norm.bias"]})
    with pytest.raises(ValueError, match=r"fc1\.weight must have one ratio .* got shapes \[\(31, 12\), \(27, 12\)"):
        load({**weights, "transformers.0.blocks.0.mlp.fc1.weight": torch.zeros(31, 12)}, num_heads=heads, groups=groups)
    with pytest.raises(TypeError, match="SReTConfig has no field 'heads'"):
        load(weights, num_heads=heads, groups=groups, heads=1)


@pytest.mark.parametrize("size", ["T", "LT", "S"])
def test_sizes_are_read_off_weights(size: str) -> None:
    with torch.device("meta"):
        config = SReTConfig.preset(size, image_size=64, num_labels=3)
        weights = Plain(config).state_dict()
    from warpform.models.sret import published_fields

    fields = published_fields("here", weights, {})
    told = {name: value for name, value in vars(config).items() if name in fields}
    assert fields == told and set(vars(config)) - set(fields) == {
        "groups", "permute", "drop_path_rate", "layer_norm_eps", "problem_type",
    }  # fmt: skip


def test_files_have_the_published_names(tmp_path: Path) -> None:
    model, plain = both(permute="always")
    model.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "model.safetensors")
    state = plain.state_dict()
    assert stored.keys() == {name for name in state if not _second(name)}
    assert all(torch.equal(w, state[name]) for name, w in stored.items())
    again = from_pretrained(tmp_path)
    assert again.config == model.config and again.config.groups == TINY["groups"]


def test_a_training_run_keeps_the_weights_of_wide_heads() -> None:
    """Heads of 6 dimensions are widened in each call: after an update the model is still the formula."""
    model, plain = both(permute="never")
    x, labels = images(), torch.tensor([4, 0, 2])
    model.train()
    plain.train()
    for _ in range(2):
        for one, run in ((model, lambda: model(x, labels).loss), (plain, lambda: F.cross_entropy(plain(x), labels))):
            optimizer = torch.optim.SGD(one.parameters(), 0.05)
            optimizer.zero_grad()
            run().backward()
            optimizer.step()
    own, theirs = model.state_dict(), plain.state_dict()
    for name, parts in model.weight_names().items():
        weight = own[name]
        for part, chunk in zip(parts, model.split_weight(name, weight) if len(parts) > 1 else [weight], strict=True):
            assert_same(chunk.double(), theirs[part].double(), part)
    assert model.blocks[0][0].mixer.qkv.weight.shape == (36, 12)  # type: ignore[index]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model, plain = both(dtype)
    oracle = copy.deepcopy(plain).double()
    x = images(8).to(dtype)
    with torch.no_grad():
        assert_close("logits", model(x).logits, oracle(x.double()), plain(x))


def test_bad_input() -> None:
    model, _ = both()
    for bad in (torch.zeros(2, 32, 32), torch.zeros(2, 3, 32, 32)):
        with pytest.raises(ValueError, match=r"pixel_values must be of shape \[batch, 2, height, width\], got"):
            model(bad.double())
    for sides in ((16, 16), (32, 40), (31, 32), (0, 32)):
        with pytest.raises(ValueError, match=r"pixel_values must .*pixels.* got \[1, 2, "):
            model(torch.zeros(1, 2, *sides).double())
    with pytest.raises(ValueError, match=r"labels must have shape \[2\], got \[1\]"):
        model(images(2), torch.tensor([1]))
    assert model(images(0)).logits.shape == (0, 5)
    for fields, message in (
        ({"image_size": 36}, "image_size must be a multiple of 8, got 36"),
        ({"groups": ((3, 1), (1, 1), (1, 1))}, r"groups must divide the 16 tokens of stage 0, got \(3, 1\)"),
        ({"groups": ((1, 1), (2, 8), (1, 1))}, r"groups must divide the 4 tokens of stage 1, got \(2, 8\)"),
        ({"groups": ((4, 2), (1, 1))}, "groups must be two numbers of at least 1 for each of 3 stages"),
        ({"num_heads": (2, 5, 6)}, "num_heads must divide the 12 channels of stage 1, got 5"),
        ({"depths": (2, 0, 1)}, "depths must be a number of at least 1 for each of 3 stages"),
        ({"hidden_sizes": (12, 12, 18)}, r"hidden_sizes must each divide the next, got \(12, 12, 18\)"),
        ({"hidden_sizes": (9, 18, 36)}, r"hidden_sizes must begin with an even number, got \(9, 18, 36\)"),
        ({"permute": "sometimes"}, "permute must be one of always, train, never, got 'sometimes'"),
    ):
        with pytest.raises(ValueError, match=f"^SReTConfig: {message}"):
            SReTConfig(**{**TINY, **fields})


@pytest.mark.slow
@pytest.mark.parametrize("permute", ["never", "always"])
def test_compiles_as_one_graph(permute: str) -> None:
    torch._dynamo.reset()
    model, _ = both(permute=permute, depths=(1, 1, 1))
    backend = Compilations()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for batch in (4, 3, 5):
            x = images(batch)
            found = compiled(x).logits
            if permute == "never":
                assert_same(found, model(x).logits)
    assert backend.count == 1


@pytest.mark.slow
def test_exports() -> None:
    model, _ = both(depths=(1, 1, 1))
    x = images()
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},), strict=False)
    with torch.no_grad():
        assert_same(program.module()(images(5) * 0 + x[:1]).logits, model(x[:1].expand(5, -1, -1, -1)).logits)


@pytest.mark.slow
def test_it_reads_digits() -> None:
    """Digits at 32 x 32: 16 tokens, then 4."""
    torch.manual_seed(0)
    data = digits()
    config = SReTConfig(
        image_size=32, num_channels=1, hidden_sizes=(32, 64), depths=(1, 1), num_heads=(2, 4), groups=((4, 2), (1, 1)),
        num_labels=10,
    )  # fmt: skip
    model = SReTForImageClassification(config)

    def enlarged(pixels: Tensor) -> Tensor:
        return F.interpolate(pixels, scale_factor=4, mode="bilinear")

    def loss() -> Tensor:
        chosen = torch.randint(len(data.images), (64,))
        found: Tensor = model(enlarged(data.images[chosen]), data.labels[chosen]).loss
        return found

    train(model.train(), loss, steps=300, rate=2e-3, weight_decay=0.05)
    model.eval()
    with torch.inference_mode():
        found = model(enlarged(data.held_out_images)).logits
        assert torch.equal(found, model(enlarged(data.held_out_images)).logits)
    accuracy = (found.argmax(1) == data.held_out_labels).float().mean().item()
    assert accuracy >= 0.95, accuracy
