"""DiT-3D against the same written plainly from the paper, and a diffusion that it learns."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.compare import assert_close
from helpers.compilations import Compilations
from helpers.parity import randomise
from helpers.training import train
from warpform.models import DiT3DConfig, DiT3DModel

SMALL = {"input_size": 16, "patch_size": 2, "in_channels": 2, "hidden_size": 24, "depth": 4, "num_heads": 3}
CONFIGS = {
    "windows of 4 in 8 x 8 x 8": DiT3DConfig(**SMALL, num_classes=5),
    "windows that do not divide the grid": DiT3DConfig(
        input_size=(8, 12, 16), patch_size=4, in_channels=1, hidden_size=40, depth=5, num_heads=2, mlp_ratio=3.0,
        num_classes=3, learn_sigma=True, window_size=(2, 2, 3), window_block_indexes=(1, 2),
    ),
    "windows larger than the grid": DiT3DConfig(**{**SMALL, "input_size": (4, 6, 10)}, window_size=(3, 2, 4)),
    "global attention only": DiT3DConfig(**{**SMALL, "input_size": 8, "depth": 2}, window_block_indexes=()),
}  # fmt: skip


# ---- the model as the paper describes it ----


def plain_positions(grid: tuple[int, ...], width: int, dtype: torch.dtype) -> Tensor:
    """[tokens, width]: coordinate by coordinate."""
    half = width // 6
    rows = []
    for x in range(grid[0]):
        for y in range(grid[1]):
            for z in range(grid[2]):
                row: list[float] = []
                for place in (x, y, z):
                    angles = [place / 10_000 ** (i / half) for i in range(half)]
                    row += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
                rows.append(row + [0.0] * (width - 6 * half))
    return torch.tensor(rows, dtype=dtype)


def plain_attention(weights: Mapping[str, Tensor], tokens: Tensor, heads: int) -> Tensor:
    """tokens: [B, N, C]: all with all, head by head."""
    width = tokens.shape[-1]
    q, k, v = (tokens @ weights["qkv.weight"].T + weights["qkv.bias"]).split(width, dim=-1)
    outs = []
    for h in range(heads):
        part = slice(h * width // heads, (h + 1) * width // heads)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(width // heads)
        outs.append(scores.softmax(-1) @ v[..., part])
    return torch.cat(outs, dim=-1) @ weights["proj.weight"].T + weights["proj.bias"]


def plain_windows(
    weights: Mapping[str, Tensor], tokens: Tensor, heads: int, grid: tuple[int, ...], window: tuple[int, ...]
) -> Tensor:
    """tokens: [B, N, C]: cut into windows, of zeros where the grid ends, attended one by one, put back."""
    b, _, width = tokens.shape
    sizes = [-(-n // w) * w for n, w in zip(grid, window, strict=True)]
    padded = tokens.new_zeros(b, *sizes, width)
    padded[:, : grid[0], : grid[1], : grid[2]] = tokens.view(b, *grid, width)
    out = torch.empty_like(padded)
    for x in range(0, sizes[0], window[0]):
        for y in range(0, sizes[1], window[1]):
            for z in range(0, sizes[2], window[2]):
                place = (slice(None), *(slice(at, at + w) for at, w in zip((x, y, z), window, strict=True)))
                one = plain_attention(weights, padded[place].reshape(b, -1, width), heads)
                out[place] = one.view(b, *window, width)
    return out[:, : grid[0], : grid[1], : grid[2]].reshape(b, -1, width)


def plain_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-6)
    return normed * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def plain_model(weights: Mapping[str, Tensor], config: DiT3DConfig, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """DiT-3D: section 3 of arXiv 2307.01831, with the blocks of arXiv 2212.09748."""

    def under(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}

    def linear(name: str, value: Tensor) -> Tensor:
        return value @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    p, grid = config.patch_size, config.grid
    voxels = F.conv3d(x, weights["x_embedder.proj.weight"], weights["x_embedder.proj.bias"], stride=p)
    tokens = voxels.flatten(2).transpose(1, 2) + plain_positions(grid, config.hidden_size, x.dtype)
    angles = torch.stack([t.double() / 10_000 ** (i / 128) for i in range(128)], dim=1)
    waves = torch.cat([angles.cos(), angles.sin()], dim=1).to(x.dtype)
    condition = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", waves)))
    condition = F.silu(condition + weights["y_embedder.embedding_table.weight"][y])
    third = range(0, config.depth, 3)
    windowed = third if config.window_block_indexes is None else config.window_block_indexes
    size = (config.window_size,) * 3 if isinstance(config.window_size, int) else config.window_size
    window = tuple(min(w, n) for w, n in zip(size, grid, strict=True))
    for i in range(config.depth):
        name = f"blocks.{i}."
        parts = linear(f"{name}adaLN_modulation.1", condition).chunk(6, dim=1)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = parts
        attention, inputs = under(f"{name}attn."), plain_norm(tokens, shift, scale)
        if i in windowed:
            mixed = plain_windows(attention, inputs, config.num_heads, grid, window)
        else:
            mixed = plain_attention(attention, inputs, config.num_heads)
        tokens = tokens + gate.unsqueeze(1) * mixed
        inner = F.gelu(linear(f"{name}mlp.fc1", plain_norm(tokens, mlp_shift, mlp_scale)))
        tokens = tokens + mlp_gate.unsqueeze(1) * linear(f"{name}mlp.fc2", inner)
    shift, scale = linear("final_layer.adaLN_modulation.1", condition).chunk(2, dim=1)
    # Each token is painted into its voxels: what a transposed convolution does.
    painted = plain_norm(tokens, shift, scale).transpose(1, 2).reshape(len(x), -1, *grid)
    brush = weights["final_layer.linear.weight"].view(p, p, p, -1, config.hidden_size).permute(4, 3, 0, 1, 2)
    bias = weights["final_layer.linear.bias"].view(p, p, p, -1).permute(3, 0, 1, 2)
    return F.conv_transpose3d(painted, brush, stride=p) + bias.repeat(1, *grid)


# ---- ours ----


def make_model(config: DiT3DConfig, dtype: torch.dtype = torch.float32) -> DiT3DModel:
    """Every weight random: with DiT's initialisation blocks and output are 0."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return randomise(DiT3DModel(config))
    finally:
        torch.set_default_dtype(before)


def make_inputs(config: DiT3DConfig, batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(batch, config.in_channels, *config.voxels)
    return x, torch.linspace(0, 999, batch).round(), torch.arange(batch) % config.num_classes


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_and_gradients_are_those_of_the_paper(name: str) -> None:
    """In float64, where only rounding is left: 1e-10 of the largest value, each gradient by itself."""
    config = CONFIGS[name]
    model = make_model(config, torch.float64)
    x, t, y = make_inputs(config)
    x = x.double().requires_grad_()
    leaves = {"x": x, **dict(model.named_parameters())}
    out = model(x, t, y)
    theirs = plain_model(leaves, config, x, t, y)
    dout = torch.randn_like(out)
    pairs = {"out": (out, theirs)}
    gradients = [torch.autograd.grad(o, list(leaves.values()), dout) for o in (out, theirs)]
    pairs |= dict(zip(leaves, zip(*gradients, strict=True), strict=True))
    for what, (actual, truth) in pairs.items():
        assert truth.any(), f"{what}: nothing to compare with"
        assert (actual - truth).abs().max() <= 1e-10 * truth.abs().max(), what


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_in_the_dtypes_of_use(name: str, dtype: torch.dtype) -> None:
    config = CONFIGS[name]
    model = make_model(config).to(dtype)
    weights = dict(model.named_parameters())
    x, t, y = make_inputs(config)
    x = x.to(dtype)
    with torch.inference_mode():
        eager = plain_model(weights, config, x, t, y)
        oracle = plain_model({n: w.double() for n, w in weights.items()}, config, x.double(), t, y)
        assert_close("out", model(x, t, y), oracle, eager)


def test_positions_of_the_published_sizes() -> None:
    config = DiT3DConfig.preset("S")
    with torch.device("meta"):
        assert DiT3DModel(config).pos_embed.shape == (1, 512, 384)
    small = DiT3DModel(DiT3DConfig(**{**SMALL, "input_size": (4, 6, 8)}))
    truth = plain_positions((2, 3, 4), 24, torch.float64)
    assert_close("positions", small.pos_embed[0], truth, truth.float())


def test_windows_take_effect() -> None:
    """A change of one voxel stays in its window where all blocks are windowed, and goes everywhere where one is not."""
    for blocks, everywhere in (((0, 1, 2, 3), False), ((0, 1, 3), True)):
        model = make_model(DiT3DConfig(**SMALL, window_block_indexes=blocks))
        x, t, y = make_inputs(model.config, 1)
        other = x.clone()
        other[0, 0, 9, 2, 13] += 1
        with torch.inference_mode():
            changed = (model(x, t, y) != model(other, t, y)).any(dim=1)[0]
        inside = torch.zeros_like(changed)
        inside[8:, :8, 8:] = True  # a window is 4 tokens, 8 voxels, wide
        assert changed[inside].float().mean() > 0.99
        assert changed[~inside].float().mean() > 0.99 if everywhere else not changed[~inside].any()


@pytest.mark.parametrize(
    ("size", "count"), [("S", 32_610_624), ("B", 129_806_784), ("L", 578_450_496), ("XL", 674_071_104)]
)
def test_presets(size: str, count: int) -> None:
    with torch.device("meta"):
        model = DiT3DModel(DiT3DConfig.preset(size))
    assert sum(p.numel() for p in model.parameters()) == count
    windows = [block.attn.window_size for block in model.blocks]
    assert windows == [None if i % 3 else (4, 4, 4) for i in range(model.config.depth)]
    assert model.config.grid == (8, 8, 8)


def test_names_of_weights_are_the_published_ones() -> None:
    with torch.device("meta"):
        names = set(DiT3DModel(DiT3DConfig.preset("S", depth=1)).state_dict())
    layers = [
        "x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.linear",
        "final_layer.adaLN_modulation.1", "blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.mlp.fc1",
        "blocks.0.mlp.fc2", "blocks.0.adaLN_modulation.1",
    ]  # fmt: skip
    leaves = {f"{layer}.{leaf}" for layer in layers for leaf in ("weight", "bias")}
    assert names == {"pos_embed", "y_embedder.embedding_table.weight"} | leaves


def test_training_starts_from_zero_and_reaches_every_weight() -> None:
    model = DiT3DModel(CONFIGS["windows of 4 in 8 x 8 x 8"])
    x, t, y = make_inputs(model.config)
    assert not model(x, t, y).any()
    for block in model.blocks:
        tokens = torch.randn(2, 8, 8, 8, 24)
        assert torch.equal(block(tokens, torch.randn(2, 24)), tokens)
    # Zeros open one after another: the output first, then what is before it.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (model(x, t, y) - x).square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_guidance() -> None:
    model = make_model(CONFIGS["windows that do not divide the grid"], torch.float64).train()
    config = model.config
    x, t, y = make_inputs(config)
    x = x.double()
    none, every = torch.zeros(3, dtype=torch.bool), torch.ones(3, dtype=torch.bool)
    given, null = model(x, t, y, drop_labels=none), model(x, t, y, drop_labels=every)
    assert given.shape == (3, 2, 8, 12, 16) and not torch.equal(given, null)
    assert torch.equal(null, model(x, t)) and torch.equal(null, model(x, t, torch.full((3,), config.num_classes)))
    for scale in (0.0, 1.0, 4.0):
        out = model.forward_with_guidance(x, t, y, scale)
        noise = null[:, :1] + scale * (given[:, :1] - null[:, :1])
        truth = torch.cat([noise, given[:, 1:]], dim=1)
        assert_close(f"guided, {scale}", out, truth, truth)


def test_labels_are_dropped_in_training_only() -> None:
    batch = 24
    model = make_model(DiT3DConfig(**{**SMALL, "input_size": 4, "depth": 1}, num_classes=2, class_dropout_prob=0.5))
    x, t = torch.randn(1, 2, 4, 4, 4).expand(batch, -1, -1, -1, -1), torch.full((batch,), 7)
    y = torch.ones(batch, dtype=torch.int64)
    with torch.inference_mode():
        given, null = model(x, t, y), model(x, t)
        assert torch.equal(given, model(x, t, y))
        out = model.train()(x, t, y)
    distance = [(out - other).flatten(1).abs().amax(1) for other in (given, null)]
    dropped = distance[1] < distance[0]
    assert 0 < dropped.sum() < batch
    assert torch.minimum(*distance).max() < 1e-3 * (given - null).abs().max()


def test_bad_input() -> None:
    model = make_model(DiT3DConfig(**{**SMALL, "input_size": 4, "depth": 1}, class_dropout_prob=0.0))
    x, t, y = make_inputs(model.config, 2)
    model(x, t, y)
    for bad in (x[0], x[:, :1], x[..., :2]):
        with pytest.raises(ValueError, match=r"DiT3DModel: x must be of shape \[batch, 2, 4, 4, 4\], got"):
            model(bad, t, y)
    with pytest.raises(ValueError, match=r"DiT3DModel: t must be of shape \[2\], got \[1\]"):
        model(x, t[:1], y)
    with pytest.raises(ValueError, match=r"DiT3DModel: y must be of shape \[2\], got \[2, 1\]"):
        model(x, t, y[:, None])
    with pytest.raises(TypeError, match="y must be int64"):
        model(x, t, y.float())
    with pytest.raises(TypeError, match="t must be integers or floats"):
        model(x, t > 0, y)
    with pytest.raises(TypeError, match="drop_labels must be bool"):
        model(x, t, y, drop_labels=y)
    for call in (lambda: model(x, t), lambda: model.forward_with_guidance(x, t, y, 2.0)):
        with pytest.raises(ValueError, match="there must be a null class, but class_dropout_prob is 0"):
            call()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input_size": 30}, "patch_size must divide input_size 30, got 4"),
        ({"input_size": (32, 32)}, "input_size must be one number or three"),
        ({"window_size": 0}, "window_size must be at least 1 along every axis, got 0"),
        ({"num_heads": 7}, "num_heads must divide hidden_size 1152, got 7"),
        ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
        ({"hidden_size": 4, "num_heads": 1}, "hidden_size must be at least 6"),
        ({"class_dropout_prob": 1.0}, "class_dropout_prob must be at least 0 and below 1"),
        ({"window_block_indexes": (0, 28)}, "window_block_indexes must be from 0 to 27"),
        ({"hidden_act": "no"}, "hidden_act must be one of"),
        ({"mlp_ratio": 0.0}, "mlp_ratio must give at least one channel"),
    ],
)
def test_bad_config(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiT3DConfig(**fields)


def test_bad_preset() -> None:
    with pytest.raises(ValueError, match="size must be one of S, B, L, XL, got 'M'"):
        DiT3DConfig.preset("M")


@pytest.mark.slow
def test_compiles_as_one_graph_for_all_batch_sizes() -> None:
    model = make_model(CONFIGS["windows that do not divide the grid"])
    backend = Compilations()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for batch in (2, 3, 5):
        x, t, y = make_inputs(model.config, batch)
        with torch.inference_mode():
            out, eager = compiled(x, t, y), model(x, t, y)
        assert_close(f"batch of {batch}", out, eager.double(), eager)
    assert backend.count == 1


def shapes(classes: Tensor, size: int) -> Tensor:
    """[B, 1, size, size, size]: 1 inside and -1 outside of a ball (class 0) or a box (1), anywhere, of any size."""
    batch = len(classes)
    axes = torch.meshgrid(*[torch.arange(size) + 0.5] * 3, indexing="ij")
    offsets = torch.stack(axes) - (size * (0.3 + 0.4 * torch.rand(batch, 3)))[:, :, None, None, None]
    ball, box = offsets.norm(dim=1), offsets.abs().amax(dim=1)
    distance = torch.where(classes[:, None, None, None] == 0, ball, box)
    radius = size * (0.15 + 0.3 * torch.rand(batch))[:, None, None, None]
    return torch.where(distance < radius, 1.0, -1.0).unsqueeze(1)


@pytest.mark.slow
def test_it_learns_to_denoise_shapes() -> None:
    """The loss falls by a factor of 4: to less than half of what the best multiple of x for each timestep leaves."""
    torch.manual_seed(0)
    config = DiT3DConfig(
        input_size=8, patch_size=2, in_channels=1, hidden_size=48, depth=2, num_heads=3, num_classes=2, window_size=2,
    )  # fmt: skip
    model, steps, batch = DiT3DModel(config).train(), 250, 16

    def noisy(count: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        y, u = torch.randint(2, (count,)), torch.rand(count)
        clean, noise = shapes(y, 8), torch.randn(count, 1, 8, 8, 8)
        angle = (u * math.pi / 2)[:, None, None, None, None]  # x = cos(angle) clean + sin(angle) noise
        return angle.cos() * clean + angle.sin() * noise, 1000 * u, y, noise, angle

    held_out = noisy(256)

    def loss(x: Tensor, t: Tensor, y: Tensor, noise: Tensor, angle: Tensor) -> Tensor:
        return (model(x, t, y) - noise).square().mean()

    # Voxels are 1 or -1, so of a sample at this angle sin(angle) x is the best multiple of x, up to their mean.
    x, _, _, noise, angle = held_out
    by_factor = (angle.sin() * x - noise).square().mean().item()
    with torch.inference_mode():
        before = loss(*held_out).item()
    train(model, lambda: loss(*noisy(batch)), steps, rate=5e-3, weight_decay=0.0)
    model.eval()
    with torch.inference_mode():
        after = loss(*held_out).item()
    assert after < before / 4 and after < by_factor / 2, (before, after, by_factor)
