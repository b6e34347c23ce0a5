"""warpform's Swin and Swin V2 against those of transformers: outputs and the gradient of every parameter."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.compare import assert_close, farthest
from helpers.compilations import Compilations
from helpers.parity import randomise
from warpform import models, ops
from warpform.nn import CosineWindowAttention, SwinBlock, WindowAttention
from warpform.ops._example import nudged

transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

SMALL = {"image_size": 32, "patch_size": 2, "embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
VERSIONS = ("Swin", "Swinv2")


versions = pytest.mark.parametrize("version", VERSIONS)


def hf_model(version: str, *, head: bool = False, pooler: bool = True, **fields: Any) -> nn.Module:
    """A transformers model in eval mode whose every weight is random.

    Products keep the size of what enters them: where they shrink it, the normalisation after them in Swin V2 amplifies
    rounding until two runs of one model differ by chance.
    """
    torch.manual_seed(0)
    options = {**SMALL, "num_labels": 5, "attn_implementation": "eager", **fields}
    config = getattr(transformers, f"{version}Config")(**options)
    if head:
        model = getattr(transformers, f"{version}ForImageClassification")(config)
    else:
        model = getattr(transformers, f"{version}Model")(config, add_pooling_layer=pooler)
    embeddings = getattr(model, version.lower(), model).embeddings
    table = embeddings.position_embeddings
    if table is not None and table.size(1) != embeddings.patch_embeddings.num_patches:
        pytest.skip("this release of transformers gives Swin a position too many, and its own forward fails")
    randomise(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("relative_position_bias_table"):
                parameter.normal_()
            elif name.endswith("logit_scale"):
                parameter.copy_(torch.linspace(0.5, 2.5, len(parameter)).view(parameter.shape))
            elif parameter.dim() > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return model


def outputs_of(model: nn.Module, pixels: Tensor, **inputs: Any) -> dict[str, Tensor]:
    """Everything a model returns, by name."""
    out = model(pixels.to(next(model.parameters()).dtype), output_hidden_states=True, **inputs)
    found: dict[str, Tensor] = {}
    for name, value in out.items():
        if isinstance(value, tuple):
            found |= {f"{name}[{i}]": state for i, state in enumerate(value)}
        else:
            found[name] = value
    return found


def score_size(model: nn.Module) -> float:
    """How large scores get by what is in the parameters: each is rounded to eps times that, and so is what follows."""
    sizes = [1.0]
    for name, parameter in model.named_parameters():
        if name.endswith("logit_scale"):
            sizes.append(16 + float(parameter.detach().max().clamp(max=math.log(100)).exp()))
        elif name.endswith("relative_position_bias_table"):
            sizes.append(float(parameter.detach().abs().max()))
    return max(sizes)


def check_output(name: str, actual: Tensor, model: nn.Module, pixels: Tensor, **how: Any) -> None:
    """actual beside the first output of a transformers model, by the rule of helpers.compare."""
    with torch.no_grad():
        eager = model(pixels, **how)[0]
        truth = copy.deepcopy(model).double()(pixels.double(), **how)[0]
    assert_close(name, actual, truth, eager, scale=score_size(model) * float(truth.abs().max()))


def logit_terms(model: nn.Module, loss_of: Callable[[nn.Module], Tensor]) -> dict[str, float]:
    """Of each gradient of a logit scale, by its name, the root of the sum of squares of what it adds up.

    It is one number a head for the scores of all pairs of tokens, of either sign; their rounding does not cancel.
    """
    model = copy.deepcopy(model)
    leaves: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        scale = module._parameters.pop("logit_scale", None)
        if scale is not None:
            pairs = module.relative_position_index.shape
            module.logit_scale = scale.detach().expand(-1, *pairs).clone().requires_grad_()  # [heads, N, N]
            leaves[f"{name}.logit_scale"] = module.logit_scale
    found = torch.autograd.grad(loss_of(model), list(leaves.values())) if leaves else ()
    return {name: float(g.square().sum((1, 2)).sqrt().max()) for name, g in zip(leaves, found, strict=True)}


def with_nudged_parameters(model: nn.Module) -> nn.Module:
    """A copy in float64."""
    model, generator = copy.deepcopy(model).double(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(nudged(parameter, generator))
    return model


def check_parity(model: nn.Module, pixels: Tensor, *, ours: nn.Module | None = None, gradients: bool = True) -> None:
    """Outputs, and the gradient of each parameter by itself, by the rule of helpers.compare."""
    oracle = copy.deepcopy(model).double()
    ours = models.from_transformers(copy.deepcopy(model)) if ours is None else ours
    outputs, grads = {}, {}
    weights: dict[str, Tensor] = {}

    def loss_of(m: nn.Module, found: dict[str, Tensor] | None = None) -> Tensor:
        loss = torch.zeros((), dtype=next(m.parameters()).dtype)
        for key, value in (outputs_of(m, pixels) if found is None else found).items():
            weights.setdefault(key, torch.randn(value.shape))
            loss = loss + (value * weights[key].to(value.dtype)).sum()
        return loss

    for name, m in (("oracle", oracle), ("eager", model), ("ours", ours), ("nudged", with_nudged_parameters(model))):
        outputs[name] = outputs_of(m, pixels)
        loss = loss_of(m, outputs[name])
        parameters = dict(m.named_parameters())
        found = torch.autograd.grad(loss, list(parameters.values())) if gradients else ()
        grads[name] = dict(zip(parameters, found, strict=gradients))
    assert list(outputs["ours"]) == list(outputs["eager"])
    size = score_size(model)
    for key, value in outputs["ours"].items():
        truth = outputs["oracle"][key]
        assert_close(key, value, truth, outputs["eager"][key], scale=size * float(truth.detach().abs().max()))
    if not gradients:
        return
    others = ("oracle", "eager", "nudged")
    theirs = {m: {type(ours).file_name(name): g for name, g in grads[m].items()} for m in others}
    terms = {type(ours).file_name(name): t for name, t in logit_terms(oracle, loss_of).items()}
    names = ours.weight_names()
    assert set(names) == set(grads["ours"])
    assert {part for parts in names.values() for part in parts} == set(theirs["oracle"])
    for name, parts in names.items():
        found = grads["ours"][name]
        truth, yardstick = (torch.cat([theirs[m][part] for part in parts]) for m in ("oracle", "eager"))
        if name.endswith("qkv.bias"):
            # A softmax does not see a constant added to a row, so the gradient of the key bias is 0 but for rounding,
            # which has no scale of its own; it is judged beside the other two.
            assert_close(name, found, truth, yardstick, gradient=True)
            continue
        for part, chunk in zip(parts, found.chunk(len(parts)), strict=True):
            truth, yardstick = theirs["oracle"][part], theirs["eager"][part]
            largest = max(float(truth.abs().max()), terms.get(part, 0.0))
            if part in terms:
                # One number a head: the eager sum may be off by nothing.
                yardstick = farthest(truth, yardstick, theirs["nudged"][part])
            assert_close(part, chunk, truth, yardstick, gradient=True, scale=size * largest)


SIZES = {
    "as_the_config": (32, 32),
    "windows_do_not_divide": (36, 36),
    "patches_do_not_divide": (33, 35),
    "odd_at_the_merge": (34, 38),
    "not_square": (20, 44),
    "large": (64, 48),
    "window_is_the_grid": (16, 30),  # second stage: 4 x 8 tokens, windows of 4
}


@versions
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_parity(version: str, size: tuple[int, int]) -> None:
    check_parity(hf_model(version), torch.randn(2, 3, *size))


OPTIONS: dict[str, dict[str, Any]] = {
    "no_qkv_bias": {"qkv_bias": False},
    "relu": {"hidden_act": "relu", "mlp_ratio": 2.5, "layer_norm_eps": 0.1},
    "window_5": {"window_size": 5},
    "window_9": {"window_size": 9},
    "three_stages": {"depths": (1, 3, 2), "num_heads": (1, 2, 4)},
    "one_stage": {"depths": (3,), "num_heads": (2,)},
    "one_channel": {"num_channels": 1},
    "no_pooler": {"pooler": False},
}


@pytest.mark.sampled
@versions
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_parity_of_options(version: str, options: dict[str, Any]) -> None:
    channels = options.get("num_channels", 3)
    check_parity(hf_model(version, **options), torch.randn(1, channels, 40, 36))


@pytest.mark.parametrize(
    ("version", "options", "size"),
    (
        ("Swin", {"use_absolute_embeddings": True}, (32, 32)),
        ("Swinv2", {"pretrained_window_sizes": (6, 3)}, (36, 28)),
        ("Swinv2", {"window_size": 12}, (32, 32)),  # windows shrink to the grid of the second stage at image_size
        ("Swinv2", {"window_size": 16}, (48, 40)),
        ("Swinv2", {"image_size": (16, 64)}, (24, 64)),
    ),
)
def test_parity_of_options_of_a_version(version: str, options: dict[str, Any], size: tuple[int, int]) -> None:
    model = hf_model(version, **options)
    check_parity(model, torch.randn(1, 3, *size))
    # The windows of a model that was made from the config alone, not from live modules.
    ours = models.from_transformers(model)
    with torch.device("meta"):
        alone = type(ours)(ours.config)
    for block, other in zip(ours.modules(), alone.modules(), strict=True):
        if isinstance(block, WindowAttention):
            assert (block.window_size, block.shift_size) == (other.window_size, other.shift_size)


@versions
def test_parity_at_224(version: str) -> None:
    fields = {"image_size": 224, "patch_size": 4, "embed_dim": 32, "depths": (2, 2, 2, 1), "num_heads": (1, 2, 4, 8)}
    check_parity(hf_model(version, window_size=7, **fields), torch.randn(1, 3, 224, 224))


@versions
def test_parity_of_the_classifier(version: str) -> None:
    model = hf_model(version, head=True)
    pixels, labels = torch.randn(3, 3, 30, 32), torch.tensor([0, 4, 2])
    check_parity(model, pixels)
    ours = models.from_transformers(model)
    assert type(ours) is getattr(models, f"{version}ForImageClassification")
    oracle = copy.deepcopy(model).double()
    out, eager, truth = (m(pixels.to(next(m.parameters()).dtype), labels=labels) for m in (ours, model, oracle))
    assert out[0] is out.loss and out[1] is out.logits and list(out) == list(eager) == ["loss", "logits"]
    assert_close("loss", out.loss, truth.loss, eager.loss)
    for kind, given in (("regression", torch.randn(3, 5)), ("multi_label_classification", torch.rand(3, 5).round())):
        model.config.problem_type = kind
        theirs = model(pixels, labels=given).loss
        torch.testing.assert_close(models.from_transformers(model)(pixels, given).loss, theirs)


def test_doubled_mask_of_transformers_and_logit_scales_past_the_clamp() -> None:
    """At the clamp of the logit scale, -100 once is not enough to keep regions apart, and -200 is."""
    # Heads of 4 channels and windows of 2 x 2, so that some token is far from itself and near to one beyond the seam.
    model = hf_model("Swinv2", depths=(2,), num_heads=(8,), window_size=2)
    with torch.no_grad():
        for block in model.encoder.layers[0].blocks:
            block.attention.self.logit_scale.copy_(torch.linspace(3.0, 7.0, 8).view(8, 1, 1))
    pixels = torch.randn(2, 3, 32, 36)
    check_parity(model, pixels)
    with torch.no_grad():
        once = models.from_transformers(model, mask_value=-100.0)(pixels).last_hidden_state
        assert (once - model(pixels).last_hidden_state).abs().max() > 0.01


def test_swin_clamps_below_its_window_and_forgets_it() -> None:
    """Below the window, transformers raises: the definition is the published code's, and the middle of the table."""
    model = hf_model("Swin", depths=(2,), num_heads=(2,), window_size=5)
    ours = models.from_transformers(model)
    pixels = torch.randn(2, 3, 6, 26)  # 3 x 13 tokens: windows of 3, and no shift
    smaller = hf_model("Swin", depths=(2,), num_heads=(2,), window_size=3)
    tables = {name: p for name, p in model.named_parameters() if name.endswith("bias_table")}
    with torch.no_grad():
        for name, parameter in smaller.named_parameters():
            whole = tables.get(name)
            source = dict(model.named_parameters())[name]
            parameter.copy_(source if whole is None else whole.view(9, 9, 2)[2:7, 2:7].reshape(25, 2))
        before = ours(torch.ones(1, 3, 32, 32)).last_hidden_state
    check_parity(smaller, pixels, ours=ours, gradients=False)
    with torch.no_grad():
        assert torch.equal(ours(torch.ones(1, 3, 32, 32)).last_hidden_state, before)


@versions
def test_images_of_any_size(version: str) -> None:
    ours = models.from_transformers(hf_model(version))
    for size in ((1, 1), (2, 40), (5, 3), (65, 31), (7, 7)):
        out = ours(torch.randn(2, 3, *size), output_hidden_states=True)
        rows, columns = (-(-n // 2) for n in size)
        assert out.reshaped_hidden_states[0].shape == (2, 32, rows, columns)
        assert out.reshaped_hidden_states[-1].shape == (2, 64, -(-rows // 2), -(-columns // 2))
        out.last_hidden_state.sum().backward()
    assert ours(torch.randn(0, 3, 32, 32)).pooler_output.shape == (0, 64)


@versions
def test_hidden_states_before_downsampling(version: str) -> None:
    ours = models.from_transformers(hf_model(version))
    pixels = torch.randn(1, 3, 34, 32)
    out = ours(pixels, output_hidden_states=True, output_hidden_states_before_downsampling=True)
    assert [s.shape[1:] for s in out.reshaped_hidden_states] == [(32, 17, 16), (32, 17, 16), (64, 9, 8)]
    after = ours(pixels, output_hidden_states=True)
    merged = ours.merges[0](out.reshaped_hidden_states[1].permute(0, 2, 3, 1))
    torch.testing.assert_close(merged.permute(0, 3, 1, 2), after.reshaped_hidden_states[1])


# ---- there and back ----


@versions
@pytest.mark.parametrize("head", (False, True), ids=("bare", "head"))
def test_there_and_back(version: str, head: bool, tmp_path: Path) -> None:
    model = hf_model(version, head=head)
    ours = models.from_transformers(model)
    theirs = {type(ours).file_name(name): p for name, p in model.named_parameters()}
    for name, parts in ours.weight_names().items():
        assert (theirs[parts[0]] is ours.get_parameter(name)) == (len(parts) == 1), name
    assert set(ours.state_dict()) == set(ours.weight_names())
    before = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    assert ours.to_transformers() is model
    for (name, old), new in zip(before.named_parameters(), model.parameters(), strict=True):
        assert not torch.equal(old, new), f"{name} was not written back"
    check_parity(model, torch.randn(1, 3, 32, 40), ours=ours)

    model.save_pretrained(tmp_path)
    saved = safetensors_torch.load_file(tmp_path / "model.safetensors")
    assert any(name.endswith("attention.self.query.weight") for name in saved)
    pixels = torch.randn(2, 3, 30, 32)
    expected = ours(pixels)[0]
    reader = type(ours).from_pretrained if head else models.from_pretrained
    read = reader(tmp_path)
    assert type(read) is type(ours) and not read.training
    assert torch.equal(read(pixels)[0], expected)
    again = read.to_transformers()
    assert type(again) is type(model) and again is not model
    check_output("written back", expected, again, pixels)

    # A file that was written with the names of live modules.
    state = {name: value.clone() for name, value in model.state_dict().items()}
    safetensors_torch.save_file(state, tmp_path / "model.safetensors")
    assert torch.equal(reader(tmp_path)(pixels)[0], expected)
    if head:  # what is not the model's own is ignored
        bare = models.from_pretrained(tmp_path)
        assert type(bare) is getattr(models, f"{version}Model")
        assert torch.equal(ours.classifier(bare(pixels).pooler_output), expected)


def published(model: nn.Module, window: int, grid: int) -> dict[str, Tensor]:
    """A transformers classifier's weights in the layout of the published code, constants included."""
    names: dict[str, Tensor] = {}
    prefix = model.base_model_prefix
    weights = {models.SwinModel.file_name(name): p.detach() for name, p in model.named_parameters()}
    for name, weight in weights.items():
        name = name.removeprefix(f"{prefix}.").removeprefix("encoder.")
        for theirs, own in (
            ("embeddings.patch_embeddings.projection", "patch_embed.proj"), ("embeddings.norm", "patch_embed.norm"),
            ("layernorm_before", "norm1"), ("layernorm_after", "norm2"), ("layernorm", "norm"),
            ("attention.output.dense", "attn.proj"), ("intermediate.dense", "mlp.fc1"), ("output.dense", "mlp.fc2"),
            ("continuous_position_bias_mlp", "cpb_mlp"), ("attention.self", "attn"), ("classifier", "head"),
        ):  # fmt: skip
            name = name.replace(theirs, own)
        names[name] = weight
    for name in [n for n in names if n.endswith("attn.query.weight")]:
        stem = name.removesuffix("query.weight")
        names[f"{stem}qkv.weight"] = torch.cat([names.pop(f"{stem}{p}.weight") for p in ("query", "key", "value")])
        if f"{stem}key.bias" in names:
            names[f"{stem}qkv.bias"] = torch.cat([names.pop(f"{stem}{p}.bias") for p in ("query", "key", "value")])
        elif f"{stem}query.bias" in names:
            names[f"{stem}q_bias"], names[f"{stem}v_bias"] = (names.pop(f"{stem}{p}.bias") for p in ("query", "value"))
        names[f"{stem}relative_position_index"] = torch.zeros(window**2, window**2, dtype=torch.int64)
        if prefix == "swinv2":
            names[f"{stem}relative_coords_table"] = torch.zeros(1, 2 * window - 1, 2 * window - 1, 2)
    names["layers.0.blocks.1.attn_mask"] = torch.zeros((grid // window) ** 2, window**2, window**2)
    return names


@versions
def test_published_checkpoints(version: str, tmp_path: Path) -> None:
    model = hf_model(version, head=True)
    weights = published(model, 4, 16)
    for name in ("patch_embed.proj.weight", "layers.1.blocks.0.attn.qkv.weight", "layers.0.downsample.norm.weight"):
        assert name in weights
    classifier = getattr(models, f"{version}ForImageClassification")
    ours = classifier.from_published(weights)
    assert not ours.training
    for name in (*SMALL, "num_labels", "qkv_bias", "mlp_ratio", "num_channels"):
        assert getattr(ours.config, name) == getattr(models.from_transformers(model).config, name), name
    pixels = torch.randn(2, 3, 32, 36)
    same = models.from_transformers(model, **({"mask_value": -100.0} if version == "Swinv2" else {}))
    assert torch.equal(ours(pixels).logits, same(pixels).logits)

    bare = getattr(models, f"{version}Model").from_published(weights)
    assert torch.equal(bare(pixels).pooler_output, same.base(pixels).pooler_output)

    # The same file beside a config of transformers.
    model.config.save_pretrained(tmp_path)
    safetensors_torch.save_file(
        {name: w.clone().contiguous() for name, w in weights.items()}, tmp_path / "model.safetensors"
    )
    read = classifier.from_pretrained(tmp_path)
    check_output("logits", read(pixels).logits, model, pixels)

    with pytest.raises(ValueError, match=r"from_published: weights must have the published names"):
        classifier.from_published(dict(model.named_parameters()))
    with pytest.raises(ValueError, match=r"from_published lack classifier"):
        classifier.from_published({n: w for n, w in weights.items() if not n.startswith("head.")})
    del weights["layers.0.blocks.0.mlp.fc2.bias"]
    with pytest.raises(ValueError, match=r"from_published lack .*layers\.0\.blocks\.0\.output\.dense\.bias"):
        classifier.from_published(weights)


def with_constants(weights: dict[str, Tensor], windows: list[int], trained: list[int], grid: int) -> dict[str, Tensor]:
    """Published weights of Swin V2 with the constants that belong to windows and grid, as the paper defines them."""
    weights = {n: w for n, w in weights.items() if not n.endswith(("relative_coords_table", "index", "attn_mask"))}
    for stage, (window, before) in enumerate(zip(windows, trained, strict=True)):
        steps = 8 * torch.arange(1 - window, window, dtype=torch.float32) / ((before or window) - 1)
        table = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1).unsqueeze(0)
        table = table.sign() * torch.log2(table.abs() + 1.0) / math.log2(8)
        for block in range(2):
            place = f"layers.{stage}.blocks.{block}"
            weights[f"{place}.attn.relative_coords_table"] = table
            weights[f"{place}.attn.relative_position_index"] = torch.zeros(window**2, window**2, dtype=torch.int64)
            if block and grid >> stage > window:
                weights[f"{place}.attn_mask"] = torch.zeros(((grid >> stage) // window) ** 2, window**2, window**2)
    return weights


def without(weights: dict[str, Tensor], *ends: str) -> dict[str, Tensor]:
    return {name: weight for name, weight in weights.items() if not name.endswith(ends)}


@pytest.mark.sampled
@pytest.mark.parametrize(("image", "trained"), [(32, (0, 0)), (32, (6, 3)), (32, (12, 24)), (8, (6, 3)), (16, (0, 0))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_constants_of_published_swinv2(image: int, trained: tuple[int, int], dtype: torch.dtype) -> None:
    """What the constants tell needs no argument and cannot be denied; what nothing tells needs one."""
    grid = image // 2
    windows = [min(4, grid), min(4, grid // 2)]
    model = hf_model("Swinv2", head=True, image_size=image, pretrained_window_sizes=trained)
    weights = with_constants(published(model, 4, 16), windows, list(trained), grid)
    weights = {n: w.to(dtype) if n.endswith("coords_table") else w for n, w in weights.items()}
    classifier, pixels = models.Swinv2ForImageClassification, torch.randn(2, 3, image, image)
    expected = models.from_transformers(model, mask_value=-100.0)(pixels).logits
    sizes = tuple(before or window for before, window in zip(trained, windows, strict=True))
    if image == 8:  # without masks the smaller window of the second stage tells
        assert not any(name.endswith("mask") for name in weights)
    for overrides in ({}, {"image_size": (image, image), "pretrained_window_sizes": list(sizes), "window_size": 4}):
        ours = classifier.from_published(weights, **overrides)
        assert ours.config.pretrained_window_sizes == sizes and ours.config.patch_grid == (grid, grid)
        assert torch.equal(ours(pixels).logits, expected)
    bare = without(weights, "coords_table", "index", "mask")
    told = {"image_size": image, "window_size": 4, "pretrained_window_sizes": trained}
    assert torch.equal(classifier.from_published(bare, **told)(pixels).logits, expected)
    for name in told:
        with pytest.raises(ValueError, match=f"from_published: {name} must be given"):
            classifier.from_published(bare, **{n: v for n, v in told.items() if n != name})
    with pytest.raises(ValueError, match=r"from_published: pretrained_window_sizes\[0\] must be"):
        classifier.from_published(weights, pretrained_window_sizes=(5, sizes[1]))
    with pytest.raises(ValueError, match=r"from_published: .*image_size"):
        classifier.from_published(weights, image_size=4)
    with pytest.raises(ValueError, match="from_published: window_size"):
        classifier.from_published(weights, window_size=2)
    if dtype == torch.float16:  # too coarse to tell a wrong number from a window's
        return
    weights["layers.0.blocks.0.attn.relative_coords_table"] *= 1.2
    with pytest.raises(ValueError, match=r"layers\.0\.blocks\.0.* is of no window of pretraining"):
        classifier.from_published(weights)


def test_constants_beside_a_config(tmp_path: Path) -> None:
    """A published file in a folder with transformers' config, which its constants contradict."""
    model = hf_model("Swinv2", pretrained_window_sizes=(6, 3))
    weights = with_constants(published(model, 4, 16), [4, 4], [6, 3], 16)
    safetensors_torch.save_file({n: w.clone() for n, w in weights.items()}, tmp_path / "model.safetensors")
    model.config.save_pretrained(tmp_path)
    models.Swinv2Model.from_pretrained(tmp_path)
    model.config.pretrained_window_sizes = [0, 0]
    model.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"pretrained_window_sizes\[0\] must be 6 as the coordinates of layers"):
        models.Swinv2Model.from_pretrained(tmp_path)


def test_masks_of_published_swinv2() -> None:
    """Where all windows are alike, masks alone tell the size of images, and another size is refused."""
    weights = with_constants(published(hf_model("Swinv2"), 4, 16), [4, 4], [0, 0], 16)
    model = models.Swinv2Model
    with pytest.raises(ValueError, match="from_published: image_size must be given"):
        model.from_published(without(weights, "attn_mask"))
    with pytest.raises(ValueError, match="image_size 64 gives stage 0 a grid of .32, 32., and the mask of"):
        model.from_published(weights, image_size=64)
    # The second stage shifts its windows at 32 pixels, and at 16 it does not.
    pixels = torch.randn(1, 3, 32, 32)
    outputs = [
        model.from_published(without(weights, "attn_mask"), image_size=size)(pixels).last_hidden_state
        for size in (32, 16)
    ]
    assert not torch.allclose(*outputs)
    assert torch.equal(model.from_published(weights)(pixels).last_hidden_state, outputs[0])


@versions
def test_weights_that_contradict_an_override(version: str) -> None:
    weights = published(hf_model(version, head=True), 4, 16)
    model = getattr(models, f"{version}ForImageClassification")
    for name, value in {
        "embed_dim": 64, "num_channels": 1, "patch_size": 4, "depths": (2,), "num_heads": [4, 4], "mlp_ratio": 2,
        "qkv_bias": False, "use_absolute_embeddings": True, "num_labels": 7,
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"from_published: {name} must be .* as the weights tell, got"):
            model.from_published(weights, **{name: value})
    for name, value in (("image_size", 64), ("window_size", 8)):
        with pytest.raises(ValueError, match=f"from_published: .*{name} {value}"):
            model.from_published(weights, **{name: value})
    same = {"patch_size": (2, 2), "depths": [2, 2], "mlp_ratio": 4, "image_size": [32, 32], "window_size": 4}
    model.from_published(weights, **same)
    getattr(models, f"{version}Model").from_published(weights, num_labels=7)  # it has none
    with pytest.raises(TypeError, match="has no field 'windows'"):
        model.from_published(weights, windows=3)
    other = models.SwinModel if version == "Swinv2" else models.Swinv2Model
    with pytest.raises(ValueError, match=r"from_published: weights must be of Swin( V2)?, got those of Swin"):
        other.from_published(weights)


def test_absolute_positions_of_published_swin() -> None:
    """They tell the size of images that are square."""
    model = hf_model("Swin", use_absolute_embeddings=True)
    weights = without(published(model, 4, 16), "attn_mask")
    weights["absolute_pos_embed"] = weights.pop("embeddings.position_embeddings")
    assert models.SwinModel.from_published(weights).config.image_size == 32
    with pytest.raises(ValueError, match=r"image_size 64 gives a grid of .32, 32., and absolute_pos_embed is for 256"):
        models.SwinModel.from_published(weights, image_size=64)
    weights["absolute_pos_embed"] = weights["absolute_pos_embed"][:, :128]
    with pytest.raises(ValueError, match="image_size must be given"):
        models.SwinModel.from_published(weights)
    assert models.SwinModel.from_published(weights, image_size=(16, 32)).config.patch_grid == (8, 16)


def test_what_a_live_swinv2_was_changed_to_is_kept() -> None:
    model = hf_model("Swinv2", depths=(2,), num_heads=(2,))
    model.encoder.layers[0].blocks[1].shift_size = 1
    check_parity(model, torch.randn(1, 3, 32, 32))


# ---- other windows and image sizes ----


def test_swin_at_another_window() -> None:
    ours = models.from_transformers(hf_model("Swin", head=True))
    larger = ours.resized(window_size=6, image_size=48)
    assert larger.config.window_size == 6 and larger.config.image_size == 48 and not larger.training
    name = "base.stages.1.1.attention.relative_position_bias_table"
    before, after = ours.get_parameter(name), larger.get_parameter(name)
    expected = torch.nn.functional.interpolate(
        before.t().view(1, -1, 7, 7), size=(11, 11), mode="bicubic", align_corners=False
    )
    torch.testing.assert_close(after, expected.flatten(2)[0].t())
    for other, parameter in larger.named_parameters():
        assert (parameter is ours.get_parameter(other)) != other.endswith("bias_table"), other
    pixels = torch.randn(1, 3, 48, 48)
    larger(pixels).logits.sum().backward()
    assert after.grad is not None and before.grad is None
    # A table that is the same for all offsets stays so, and then the window alone changes.
    with torch.no_grad():
        for other, parameter in ours.named_parameters():
            if other.endswith("bias_table"):
                parameter.fill_(1.5)
        again = ours.resized(window_size=6)
    for other, parameter in again.named_parameters():
        if other.endswith("bias_table"):
            torch.testing.assert_close(parameter, torch.full_like(parameter, 1.5))


def test_swin_with_windows_that_are_not_square() -> None:
    ours = models.from_transformers(hf_model("Swin"))
    for window in ((2, 6), (5, 3)):
        other = ours.resized(window_size=window)
        out = other(torch.randn(1, 3, 32, 32)).last_hidden_state
        assert out.isfinite().all()
        with pytest.raises(ValueError, match="window_size must be square in transformers"):
            other.to_transformers()


def test_swinv2_at_another_window_measures_as_before() -> None:
    ours = models.from_transformers(hf_model("Swinv2", window_size=4))
    larger = ours.resized(window_size=8, image_size=64)
    assert larger.config.pretrained_window_sizes == (4, 4)
    assert all(larger.get_parameter(name) is p for name, p in ours.named_parameters())
    # The same distances have the same bias.
    small, large = ours.stages[0][0].attention, larger.stages[0][0].attention
    inner = large.position_bias(large.distances).view(15, 15, -1)[4:11, 4:11]
    torch.testing.assert_close(inner.reshape(49, -1), small.position_bias(small.distances))
    # And it is what transformers makes of such a config.
    config = transformers.Swinv2Config(**larger.config.to_transformers())
    theirs = transformers.Swinv2Model(config).eval()
    theirs.load_state_dict(larger.to_transformers().state_dict())
    pixels = torch.randn(1, 3, 64, 64)
    check_output("resized", larger(pixels)[0], theirs, pixels)
    assert larger.resized(window_size=4, image_size=32).config.pretrained_window_sizes == (4, 4)


def test_absolute_positions_at_another_size() -> None:
    model = hf_model("Swin", use_absolute_embeddings=True)
    ours = models.from_transformers(model)
    pixels = torch.randn(1, 3, 48, 48)
    with pytest.raises(ValueError, match=r"pixel_values must give \(16, 16\) patches.* got \(24, 24\)"):
        ours(pixels)
    for found in (ours(pixels, interpolate_pos_encoding=True)[0], ours.resized(image_size=48)(pixels)[0]):
        check_output("interpolated", found, model, pixels, interpolate_pos_encoding=True)


# ---- models of their own ----


@pytest.mark.parametrize(("size", "millions"), (("T", 28.3), ("S", 49.6), ("B", 87.8), ("L", 196.5)))
def test_presets_have_the_published_sizes(size: str, millions: float) -> None:
    with torch.device("meta"):
        model = models.SwinForImageClassification(models.SwinConfig.preset(size, num_labels=1000))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions


@versions
def test_new_models_are_initialised_and_trainable(version: str) -> None:
    config = getattr(models, f"{version}Config")(**SMALL, drop_path_rate=0.2, hidden_dropout_prob=0.1)
    model = getattr(models, f"{version}ForImageClassification")(config)
    assert model.training
    loss = model(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 1, 0])).loss
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    again = getattr(models, f"{version}ForImageClassification")(config, model.base)
    assert again.base is model.base
    theirs = model.eval().to_transformers()
    pixels = torch.randn(8, 3, 32, 32)
    check_output("logits", model(pixels)[0], theirs, pixels)


@versions
def test_dropped_paths_are_whole_samples(version: str) -> None:
    options = {**SMALL, "depths": (1,), "num_heads": (2,)}
    model = getattr(models, f"{version}Model")(getattr(models, f"{version}Config")(**options))
    block = model.stages[0][0]
    block.drop_path.probability = 0.5
    hidden = torch.randn(64, 4, 4, 32)
    kept = (block.train()(hidden) != hidden).flatten(1).any(1)
    assert 0 < kept.sum() < 64
    block.drop_path.probability = 1.0
    assert torch.equal(block(hidden), hidden)
    assert not torch.equal(block.eval()(hidden), hidden)


def test_blocks_one_by_one_are_the_blocks_in_a_row() -> None:
    model = models.from_transformers(hf_model("Swin"))
    pixels = torch.randn(1, 3, 32, 32)
    hidden = model.embeddings(pixels)
    for block in model.stages[0]:
        hidden = block(hidden)
    after = model(pixels, output_hidden_states=True, output_hidden_states_before_downsampling=True).hidden_states[1]
    torch.testing.assert_close(hidden.flatten(1, 2), after)


def test_blocks_in_three_dimensions() -> None:
    block = SwinBlock(16, 2, (2, 4, 4), shift_size=(1, 2, 2))
    hidden = torch.randn(2, 3, 9, 8, 16, requires_grad=True)
    block(hidden).sum().backward()
    assert hidden.grad.isfinite().all()
    # Video Swin: an axis that is no longer than the window is one window, unshifted; others stay.
    attention = WindowAttention(16, 2, (4, 4, 4), shift_size=(2, 2, 2))
    found, bias = attention(hidden)
    assert bias is None
    qkv = attention.qkv(hidden).unflatten(-1, (3, 2, 8))
    table = attention.relative_position_bias_table.view(7, 7, 7, 2)[1:6].reshape(-1, 2)
    padding = attention.qkv.bias.view(3, 2, 8)
    context = ops.window_attention(qkv, table, window_size=(3, 4, 4), shift_size=(0, 2, 2), qkv_bias=padding)
    torch.testing.assert_close(found, attention.out(context))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@versions
def test_half_precision(version: str, dtype: torch.dtype) -> None:
    model = models.from_transformers(hf_model(version))
    pixels = torch.randn(2, 3, 36, 32)
    expected = model(pixels).last_hidden_state
    with torch.autocast("cpu", dtype=dtype):
        mixed = model(pixels).last_hidden_state
    half = copy.deepcopy(model).to(dtype)(pixels.to(dtype)).last_hidden_state
    assert half.dtype == dtype
    for found in (mixed, half):
        assert (found.float() - expected).abs().mean() < 20 * torch.finfo(dtype).eps * expected.abs().mean()


def test_distances_stay_exact_in_half_precision() -> None:
    attention = CosineWindowAttention(16, 2, (7, 7))
    exact = attention.distances.clone()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert torch.equal(attention.to(dtype).distances, exact)
        assert attention.position_bias(attention.distances).dtype == torch.float32


@pytest.mark.slow
@versions
def test_compiles_whole_and_once_for_all_batches(version: str) -> None:
    torch._dynamo.reset()
    ours = models.from_transformers(hf_model(version, depths=(2, 1)))
    backend = Compilations()
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend=backend)
    for batch in (2, 5, 3):
        pixels = torch.randn(batch, 3, 40, 36)
        with torch.no_grad():
            torch.testing.assert_close(compiled(pixels)[0], ours(pixels)[0])
    assert backend.count == 1
    torch._dynamo.reset()


@versions
def test_exports_with_a_dynamic_batch(version: str) -> None:
    ours = models.from_transformers(hf_model(version), return_dict=False)
    shapes = {"pixel_values": {0: torch.export.Dim.AUTO}}
    program = torch.export.export(ours, (torch.randn(2, 3, 36, 32),), dynamic_shapes=shapes)
    pixels = torch.randn(5, 3, 36, 32)
    torch.testing.assert_close(program.module()(pixels)[0], ours(pixels)[0])


# ---- errors ----


def test_bad_configs_name_the_field() -> None:
    for fields, message in (
        ({"num_heads": (3, 4)}, "num_heads must divide the 32 channels of stage 0, got 3"),
        ({"num_heads": (2,)}, "depths and num_heads must be of equal lengths"),
        ({"window_size": 0}, "window_size must be one number or two, at least 1, got 0"),
        ({"image_size": (1, 2, 3)}, r"image_size must be one number or two, at least 1, got \(1, 2, 3\)"),
        ({"hidden_act": "maxout"}, "hidden_act must be one of"),
        ({"drop_path_rate": 1.5}, "drop_path_rate must be between 0 and 1, got 1.5"),
        ({"num_labels": 0}, "num_labels must be at least 1"),
        ({"problem_type": "guess"}, "problem_type must be None or one of"),
    ):
        for config in (models.SwinConfig, models.Swinv2Config):
            with pytest.raises(ValueError, match=message):
                config(**{**SMALL, **fields})
    with pytest.raises(ValueError, match="pretrained_window_sizes must have 2 numbers"):
        models.Swinv2Config(**SMALL, pretrained_window_sizes=(4,))
    with pytest.raises(ValueError, match="use_absolute_embeddings=True is not supported in Swin V2"):
        models.Swinv2Config(**SMALL, use_absolute_embeddings=True)
    with pytest.raises(ValueError, match="size must be one of T, S, B, L, got 'XL'"):
        models.SwinConfig.preset("XL")


def test_bad_arguments() -> None:
    ours = models.from_transformers(hf_model("Swin", attention_probs_dropout_prob=0.1))
    with pytest.raises(ValueError, match=r"SwinModel: pixel_values must be of shape \[batch, 3, height, width\], got"):
        ours(torch.randn(1, 4, 32, 32))
    with pytest.raises(ValueError, match="SwinModel: output_attentions is not supported"):
        ours(torch.randn(1, 3, 32, 32), output_attentions=True)
    with pytest.raises(NotImplementedError, match="attention_probs_dropout_prob is 0.1"):
        ours.train()(torch.randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match="num_heads must divide hidden_size 16, got 3"):
        WindowAttention(16, 3, (4, 4))
    with pytest.raises(ValueError, match=r"shift_size must be below window_size \(4, 4\), got \(4, 0\)"):
        WindowAttention(16, 2, (4, 4), shift_size=(4, 0))
    with pytest.raises(TypeError, match="base must be a Swinv2Model, got SwinModel"):
        models.Swinv2ForImageClassification(models.Swinv2Config(**SMALL), ours)
    no_pooler = models.SwinModel(models.SwinConfig(**SMALL), add_pooling_layer=False)
    with pytest.raises(ValueError, match="base must have a pooler"):
        models.SwinForImageClassification(no_pooler.config, no_pooler)
    with pytest.raises(ValueError, match="labels must have shape"):
        model = models.SwinForImageClassification(models.SwinConfig(**SMALL))
        model(torch.randn(2, 3, 32, 32), torch.zeros(3, dtype=torch.int64))
