"""SegFormer against transformers' in float64, its head by its formula, sizes, files, and scenes that it labels."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.compare import assert_close
from helpers.compilations import Compilations
from helpers.scenes import digit_scenes, mean_iou
from helpers.training import train
from helpers.vision import assert_same, check_parity, check_there_and_back, outputs_of, randomise
from warpform import models
from warpform.models.common.backbone import Backbone
from warpform.models.segformer.heads import SegformerDecodeHead

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

SMALL: dict[str, Any] = {
    "depths": (1, 2, 1), "hidden_sizes": (8, 16, 24), "num_attention_heads": (1, 2, 3), "sr_ratios": (4, 2, 1),
    "patch_sizes": (7, 3, 3), "strides": (4, 2, 2), "mlp_ratios": (4, 2, 3), "decoder_hidden_size": 12,
    "num_labels": 5, "classifier_dropout_prob": 0.0, "drop_path_rate": 0.0,
}  # fmt: skip
KINDS = ("Model", "ForImageClassification", "ForSemanticSegmentation")


def make(kind: str = "ForSemanticSegmentation", **fields: Any) -> nn.Module:
    torch.manual_seed(0)
    options = {**SMALL, **fields}
    # Its eager attention makes the softmax in float32 whatever the dtype.
    config = transformers.SegformerConfig(
        **options, num_encoder_blocks=len(options["depths"]), attn_implementation="sdpa"
    )
    return randomise(getattr(transformers, f"Segformer{kind}")(config))


def pixels_of(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


OPTIONS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "usual": ({}, (2, 3, 64, 48)),
    "keys leave out rows and columns": ({}, (1, 3, 73, 47)),  # 19 x 12 tokens by 4, 10 x 6 by 2
    "one row of keys": ({}, (2, 3, 13, 90)),
    "other options": ({"hidden_act": "relu", "num_channels": 1, "num_labels": 2}, (1, 1, 33, 40)),
    "an activation of its own": ({"hidden_act": "silu"}, (1, 3, 33, 40)),
    "four stages": (
        {
            "depths": (1, 1, 1, 1), "hidden_sizes": (8, 16, 40, 32), "num_attention_heads": (1, 2, 5, 8),
            "sr_ratios": (8, 4, 2, 1), "patch_sizes": (7, 3, 3, 3), "strides": (4, 2, 2, 2), "mlp_ratios": (4, 4, 4, 4),
        },
        (1, 3, 72, 64),  # 18 x 16 tokens at a ratio of 8 are 2 x 2 keys
    ),
}  # fmt: skip


@pytest.mark.sampled
@pytest.mark.parametrize("options, shape", OPTIONS.values(), ids=OPTIONS)
def test_parity(options: dict[str, Any], shape: tuple[int, ...]) -> None:
    model = make(**options)
    labels = torch.randint(options.get("num_labels", 5), (shape[0], *shape[2:]))
    labels[:, :5] = 255
    check_parity(model, pixels_of(*shape), labels)


@pytest.mark.parametrize("last", (True, False), ids=("reshaped", "not reshaped"))
@pytest.mark.parametrize("kind", KINDS[:2])
def test_parity_of_the_encoder(kind: str, last: bool) -> None:
    model = make(kind, reshape_last_stage=last)
    check_parity(model, pixels_of(2, 3, 40, 56), torch.tensor([4, 1]) if kind != "Model" else None)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_parity_in_training_and_files(kind: str, tmp_path: Path) -> None:
    """The head's BatchNorm takes a step here: its statistics and the gradients through them are compared too."""
    model, pixels = make(kind), pixels_of(2, 3, 40, 56)
    check_there_and_back(model, pixels, tmp_path)
    check_parity(model.train(), pixels)
    bare = models.from_pretrained(tmp_path / "ours")
    assert type(bare) is models.SegformerModel
    assert type(models.from_transformers(model)) is getattr(models, f"Segformer{kind}")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_other_dtypes(dtype: torch.dtype) -> None:
    model, pixels = make(), pixels_of(2, 3, 64, 48).to(dtype)
    with torch.inference_mode():
        truth = model(pixels.double()).logits
        eager = model.to(dtype)(pixels).logits
        assert_close("logits", models.from_transformers(model)(pixels).logits, truth, eager)


def test_autocast() -> None:
    """Parameters stay float32, products are made in bfloat16, and every parameter has its gradient."""
    model = models.from_transformers(make(drop_path_rate=0.2)).float().train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(torch.randn(2, 3, 40, 56), torch.randint(5, (2, 40, 56))).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


ENCODERS = {
    "B0": 3_319_392, "B1": 13_151_424, "B2": 24_196_288, "B3": 44_072_128, "B4": 60_842_688, "B5": 81_443_008,
}  # fmt: skip


@pytest.mark.parametrize(
    "size", [pytest.param(n, marks=() if n in ("B0", "B2") else pytest.mark.slow) for n in ENCODERS]
)
def test_published_sizes(size: str) -> None:
    with torch.device("meta"):
        model = models.SegformerForSemanticSegmentation(models.SegformerConfig.preset(size, num_labels=19))
    assert sum(p.numel() for p in model.base.parameters()) == ENCODERS[size]
    whole = {"B0": 3_719_027, "B5": 84_607_955}
    if size in whole:
        assert sum(p.numel() for p in model.parameters()) == whole[size]
    assert model.base.channels[0] == (32 if size == "B0" else 64) and model.base.strides == (4, 8, 16, 32)


def test_backbone() -> None:
    model = models.from_transformers(make("Model"))
    assert isinstance(model, Backbone) and model.channels == (8, 16, 24) and model.strides == (4, 8, 16)
    pixels = pixels_of(2, 3, 40, 56)
    maps = model.feature_maps(pixels)
    assert [tuple(x.shape) for x in maps] == [(2, 10, 14, 8), (2, 5, 7, 16), (2, 3, 4, 24)]
    for one, other in zip(maps, model(pixels, output_hidden_states=True).hidden_states, strict=True):
        assert torch.equal(one.permute(0, 3, 1, 2), other)


def test_epsilon() -> None:
    """1e-5 everywhere as transformers has it whatever its config says, and 1e-6 in blocks as the published code."""
    model = make("Model", layer_norm_eps=0.5)
    ours = models.from_transformers(model)
    assert {m.eps for m in ours.modules() if hasattr(m, "eps")} == {1e-5}
    check_parity(model, pixels_of(1, 3, 40, 40))
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    for i, norm in enumerate(norms):  # of live modules each is taken
        norm.eps = 0.1 + 0.05 * i
    check_parity(model, pixels_of(1, 3, 40, 40))
    published = models.from_transformers(model, block_norm_eps=1e-6)
    for name, module in published.named_modules():
        if hasattr(module, "eps"):
            outside = "embedding_norms" in name or "reduction_norm" in name
            assert module.eps == (1e-5 if outside else 1e-6), name
    assert ours.config.block_norm_eps == 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_epsilon_goes_with_the_model(kind: str, tmp_path: Path) -> None:
    """The config says the eps of live norms, so a folder keeps it, and a new model of transformers gets it."""
    model = make(kind)
    outside = ("patch_embeddings", "sequence_reduction")
    norms = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm) and not any(part in name for part in outside)
    ]
    for norm in norms:
        norm.eps = 0.3
    ours, pixels = models.from_transformers(model), pixels_of(1, 3, 40, 40)
    assert ours.config.block_norm_eps == 0.3
    expected = outputs_of(model, pixels)
    ours.save_pretrained(tmp_path)
    again = type(ours).from_pretrained(tmp_path)
    assert again.config.block_norm_eps == 0.3
    theirs = again.to_transformers()
    assert type(theirs) is type(model) and theirs is not model
    back = models.from_transformers(theirs)
    assert back.config == again.config
    for found in (again, theirs, back):
        for name, value in outputs_of(found, pixels).items():
            assert_same(name, value, expected[name])
    norms[-1].eps = 0.4  # of the last one alone: no one number says it
    mixed = models.from_transformers(model)
    assert mixed.config.block_norm_eps == 1e-5
    check_parity(model, pixels, ours=mixed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("states", (False, True), ids=("last", "states"))
def test_tuples(kind: str, states: bool) -> None:
    """Every place holds what transformers has there."""
    theirs = make(kind)
    ours, pixels = models.from_transformers(theirs), pixels_of(1, 3, 40, 40)
    expected, found = (m(pixels, output_hidden_states=states, return_dict=False) for m in (theirs, ours))
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for x, y in zip(one, other, strict=True) if isinstance(other, tuple) else ((one, other),):
            assert_same("place", x, y)


PUBLISHED = (
    ("segformer.encoder.patch_embeddings.{}.proj", "patch_embed{}.proj"),
    ("segformer.encoder.patch_embeddings.{}.layer_norm", "patch_embed{}.norm"),
    ("segformer.encoder.layer_norm.{}", "norm{}"),
    ("segformer.encoder.block.{}.", "block{}."),
    ("decode_head.linear_c.{}.", "decode_head.linear_c{}."),
)
PARTS = (
    ("layer_norm_", "norm"), ("attention.self.query", "attn.q"), ("attention.self.sr", "attn.sr"),
    ("attention.self.layer_norm", "attn.norm"), ("attention.output.dense", "attn.proj"), ("mlp.dense", "mlp.fc"),
    ("decode_head.linear_fuse", "decode_head.linear_fuse.conv"),
    ("decode_head.batch_norm", "decode_head.linear_fuse.bn"), ("decode_head.classifier", "decode_head.linear_pred"),
)  # fmt: skip


def published(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a transformers model under the names of the published code."""
    names: dict[str, Tensor] = {}
    for live, weight in model.state_dict().items():
        name = models.SegformerModel.file_name(live)
        for stage in range(3):
            for theirs, own in PUBLISHED:
                if theirs.format(stage) in name:
                    name = name.replace(theirs.format(stage), own.format(stage + 1))
                    break
        for theirs, own in PARTS:
            name = name.replace(theirs, own)
        names[f"head{name.removeprefix('classifier')}" if name.startswith("classifier") else name] = weight
    for name in [n for n in names if ".attention.self.key." in n]:
        both = [names.pop(name.replace("key", part)) for part in ("key", "value")]
        names[name.replace("attention.self.key", "attn.kv")] = torch.cat(both)
    return names


@pytest.mark.parametrize("kind", KINDS[1:])
def test_published_checkpoints(kind: str, tmp_path: Path) -> None:
    """The config is read off shapes but for heads; norms in blocks get the eps of the published code."""
    model = make(kind)
    weights = published(model)
    if kind == "ForSemanticSegmentation":  # as mmsegmentation saves it
        weights = {n if n.startswith("decode_head.") else f"backbone.{n}": w for n, w in weights.items()}
        weights["decode_head.conv_seg.weight"] = torch.zeros(1)
    assert any("patch_embed3.proj.weight" in n for n in weights) and any("block2.1.attn.kv.bias" in n for n in weights)
    rest = {"num_attention_heads": (1, 2, 3), "strides": (4, 2, 2)}
    other = {name: SMALL[name] for name in ("classifier_dropout_prob", "drop_path_rate")}
    ours = getattr(models, f"Segformer{kind}").from_published(weights, **rest, **other)
    same = models.from_transformers(model, block_norm_eps=1e-6)
    assert ours.config == (same.config if kind != "ForImageClassification" else dataclasses.replace(
        same.config, decoder_hidden_size=256))  # fmt: skip
    pixels = pixels_of(1, 3, 40, 56)
    assert not ours.training
    assert_same("logits", ours(pixels).logits, same(pixels).logits)
    bare = models.SegformerModel.from_published(weights, **rest)
    assert_same("bare", bare(pixels).last_hidden_state, same.base(pixels).last_hidden_state)
    ours.save_pretrained(tmp_path)
    assert_same("logits", type(ours).from_pretrained(tmp_path)(pixels).logits, ours(pixels).logits)
    for change, text in (
        ({"depths": (1, 1, 1)}, r"depths must be \(1, 2, 1\) as the weights tell, got \(1, 1, 1\)"),
        ({"num_channels": 1}, "num_channels must be 3 as the weights tell, got 1"),
    ):
        with pytest.raises(ValueError, match=f"from_published: {text}"):
            type(ours).from_published(weights, **rest, **change)
    with pytest.raises(ValueError, match="weights must have the published names"):
        type(ours).from_published(dict(model.named_parameters()))


def literal_head(head: SegformerDecodeHead, maps: list[Tensor]) -> Tensor:
    """The head by its formula, channels first, in eval mode."""
    found = []
    for x, module in zip(maps, head.linear_projections, strict=True):
        wide = torch.einsum("bhwc,oc->bohw", x, module.weight) + module.bias.view(1, -1, 1, 1)
        found.append(F.interpolate(wide, size=maps[0].shape[1:3], mode="bilinear", align_corners=False))
    fused = torch.einsum("bchw,oc->bohw", torch.cat(found[::-1], 1), head.linear_fuse.weight[:, :, 0, 0])
    norm = head.batch_norm
    spread = (norm.running_var + norm.eps).rsqrt() * norm.weight
    normal = (fused - norm.running_mean.view(1, -1, 1, 1)) * spread.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1)
    weight, bias = head.classifier.weight[:, :, 0, 0], head.classifier.bias
    return torch.einsum("bchw,oc->bohw", normal.clamp(min=0), weight) + bias.view(1, -1, 1, 1)


def test_the_head_by_its_formula_and_with_hooks() -> None:
    """What it computes without a concatenated map is what the modules compute one after the other."""
    head = randomise(SegformerDecodeHead((4, 6, 5), 7, 3))
    maps = [pixels_of(2, 9, 8, 4), pixels_of(2, 5, 4, 6), pixels_of(2, 2, 2, 5)]
    expected = literal_head(head, maps)
    assert_same("logits", head(maps), expected)
    seen: list[nn.Module] = []
    for module in head.modules():
        if module is not head and not isinstance(module, nn.ModuleList):
            module.register_forward_hook(lambda module, args, out: seen.append(module))
    assert_same("logits", head(maps), expected)
    assert len(seen) == 6


def test_hooks_of_the_encoder_are_called() -> None:
    model = models.from_transformers(make("Model"))
    pixels, seen = pixels_of(1, 3, 40, 56), []
    expected, other = model(pixels).last_hidden_state, copy.deepcopy(model)
    for module in other.modules():
        module.register_forward_hook(lambda module, args, out: seen.append(module))
    assert_same("last_hidden_state", other(pixels).last_hidden_state, expected)
    parts = (nn.Linear, nn.Conv2d)
    assert {m for m in other.modules() if isinstance(m, parts)} <= set(seen)


def test_gradient_checkpointing_and_dropout() -> None:
    """The same gradients bit by bit with every kind of dropout, whose numbers are drawn again in the backward pass."""
    model = models.from_transformers(make(drop_path_rate=0.3)).float()
    for module in model.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.2
    model.train()
    pixels, labels = torch.randn(2, 3, 40, 56), torch.randint(5, (2, 40, 56))
    found = []
    for again in (False, True):
        (model.gradient_checkpointing_enable if again else model.gradient_checkpointing_disable)()
        torch.manual_seed(3)
        loss = model(pixels, labels).loss
        found.append(torch.autograd.grad(loss, list(model.parameters())))
    assert all(map(torch.equal, *found))


def test_bad_input() -> None:
    model = models.from_transformers(make())
    with pytest.raises(ValueError, match=r"SegformerModel: pixel_values must be of shape \[batch, 3, height, width\]"):
        model(pixels_of(1, 4, 40, 40))
    # 12 pixels are 3 tokens, which a ratio of 4 makes no key of; 13 are 4.
    with pytest.raises(ValueError, match=r"pixel_values must have at least 13 pixels a side, got \[1, 3, 12, 40\]"):
        model(pixels_of(1, 3, 12, 40))
    assert model(pixels_of(1, 3, 13, 40)).logits.shape == (1, 5, 4, 10)
    assert model(pixels_of(0, 3, 40, 40)).logits.shape == (0, 5, 10, 10)
    with pytest.raises(ValueError, match=r"SegformerForSemanticSegmentation: labels must be of shape \[1, height, wid"):
        model(pixels_of(1, 3, 40, 40), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="output_attentions is not supported"):
        model(pixels_of(1, 3, 40, 40), output_attentions=True)
    dropping = models.SegformerModel(models.SegformerConfig(**SMALL, attention_probs_dropout_prob=0.1))
    with pytest.raises(NotImplementedError, match="attention dropout is not supported in training"):
        dropping(torch.randn(1, 3, 40, 40))
    assert dropping.eval()(torch.randn(1, 3, 40, 40)).last_hidden_state.shape == (1, 24, 3, 3)
    for fields, text in (
        ({"num_attention_heads": (1, 3, 5, 8)}, "num_attention_heads must divide the 64 channels of stage 1, got 3"),
        ({"sr_ratios": (8, 4, 2)}, "must be of equal lengths"),
        ({"sr_ratios": (8, 4, 2, 0)}, "sr_ratios must be above 0"),
        ({"decoder_hidden_size": 0}, "decoder_hidden_size must be at least 1"),
    ):
        with pytest.raises(ValueError, match=f"SegformerConfig: .*{text}"):
            models.SegformerConfig(**fields)


def test_loss_of_one_class() -> None:
    """The binary one, its mean over all pixels, those that are not labelled too, as in transformers."""
    model = models.from_transformers(make(num_labels=1))
    pixels, labels = pixels_of(2, 3, 40, 40), torch.randint(2, (2, 40, 40))
    labels[:, :9] = 255
    out = model(pixels, labels)
    wide = F.interpolate(out.logits, size=(40, 40), mode="bilinear")[:, 0]
    terms = torch.where(labels == 1, F.softplus(-wide), F.softplus(wide))
    assert_same("loss", out.loss, terms[:, 9:].sum() / labels.numel())


@pytest.mark.slow
def test_compiled_and_exported() -> None:
    names = ("hidden_sizes", "num_attention_heads", "sr_ratios", "patch_sizes", "strides", "mlp_ratios")
    model = models.from_transformers(make(depths=(1, 1), **{name: SMALL[name][:2] for name in names})).float()
    counted = Compilations()
    compiled = torch.compile(model, fullgraph=True, backend=counted)
    for batch in (2, 3):
        pixels, labels = torch.randn(batch, 3, 45, 40), torch.randint(5, (batch, 45, 40))
        for tensor in (pixels, labels):
            torch._dynamo.mark_dynamic(tensor, 0)
        loss, expected = (m(pixels, labels).loss for m in (compiled, model))
        torch.testing.assert_close(loss, expected)
        loss.backward()
    assert counted.count == 1
    size = torch.export.Dim("batch", max=64)
    program = torch.export.export(model.eval(), (pixels,), dynamic_shapes=({0: size}, *[None] * 0))
    torch.testing.assert_close(program.module()(pixels[:2]).logits, model(pixels[:2]).logits)


@pytest.mark.slow
def test_learns_digit_scenes() -> None:
    """Digits 0 to 3 and background; the five classes count alike, though nine pixels of ten are background."""
    torch.manual_seed(0)
    scenes, held_out = digit_scenes(600), digit_scenes(100, held_out=True)
    config = models.SegformerConfig(
        num_channels=1, depths=(1, 1, 1), hidden_sizes=(24, 48, 64), num_attention_heads=(1, 2, 4), sr_ratios=(4, 2, 1),
        patch_sizes=(3, 3, 3), strides=(2, 2, 2), mlp_ratios=(2, 2, 2), decoder_hidden_size=64, num_labels=5,
        drop_path_rate=0.0, classifier_dropout_prob=0.0, initializer_range=0.1,
    )  # fmt: skip
    model = models.SegformerForSemanticSegmentation(config).train()

    def loss() -> Tensor:
        chosen = torch.randint(len(scenes.images), (16,))
        found: Tensor = model(scenes.images[chosen], scenes.labels[chosen]).loss
        return found

    train(model, loss, steps=300, rate=3e-3)
    model.eval()
    with torch.inference_mode():
        logits = model(held_out.images).logits
        predicted = F.interpolate(logits, size=(32, 32), mode="bilinear").argmax(1)
    reached = mean_iou(predicted, held_out.labels, 5)
    assert reached >= 0.75, reached
