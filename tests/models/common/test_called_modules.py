"""Adapters, hooks and parametrisations on the modules of a model act, wherever the fused operations read weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, parametrize, prune

from helpers.compare import assert_close
from helpers.parity import randomise
from warpform import models
from warpform.nn import AddBiasResidualLayerNorm, BlockdiagLinear, FeedForward
from warpform.nn._product import CPU_ROWS, is_plain, product

WIDTH = {
    "vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 16,
}  # fmt: skip
POSITIONS = {"relative_attention": True, "pos_att_type": ("c2p", "p2c"), "max_relative_positions": 12}
# 20 pixels are 5 patches, then 3: no window divides them, and merging pads too.
GRID = {"image_size": 20, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 2, "num_labels": 3}
STAGES = {"hidden_sizes": (8, 12), "patch_sizes": (3, 3), "strides": (2, 2), "depths": (1, 2)}
POOL = {**STAGES, "padding": (1, 1)}
MIX = {**STAGES, "num_attention_heads": (1, 2), "sr_ratios": (2, 1), "mlp_ratios": (2, 2)}
M2 = {
    "vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16,
    "max_position_embeddings": 8, "hyena_filter_order": 8,
}  # fmt: skip
GPT = {
    "vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "max_position_embeddings": 12, "filter_order": 8,
    "monarch_block": 4, "intermediate_size": 16, "use_mlp": True,
}  # fmt: skip
ROUTED = {**WIDTH, "num_groups": 4, "num_shared": 1, "top_k": 1, "gates": "both"}
PARALLEL = {**WIDTH, "tie_word_embeddings": False}
IDS = torch.arange(14).view(2, 7) + 2
MASK = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
TYPES = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0, 0]])
Call = Callable[[Any], Tensor]


def padded(model: nn.Module) -> Tensor:
    return model(IDS, MASK)[0]


def typed(model: nn.Module) -> Tensor:
    return model(IDS, MASK, token_type_ids=TYPES)[0]


def pooled(model: nn.Module) -> Tensor:
    return model(IDS, MASK).pooler_output


def whole(model: nn.Module) -> Tensor:
    return model(IDS)[0]


def waves(model: nn.Module, *shape: int) -> Tensor:
    dtype = next(model.parameters()).dtype
    return torch.linspace(0, 50, math.prod(shape), dtype=torch.float64).sin().view(shape).to(dtype)


def images(model: nn.Module) -> Tensor:
    return model(waves(model, 1, 3, 20, 20))[0]


def logits(model: nn.Module) -> Tensor:
    return model(IDS, MASK).logits


def labelled(model: nn.Module) -> Tensor:
    return model(IDS, MASK, labels=torch.where(IDS % 2 == 0, IDS, -100), return_logits=False).loss[None]


def generated(model: nn.Module) -> Tensor:
    """Logits token by token, as `generate` makes them, without its choice, which is not continuous."""
    x, states = model.tokens(IDS[:, :3]), []
    for layer in model.layers:
        x, state = layer.start(x)
        states.append(state)
    rows = [model._decode(x[:, -1])]
    for place in range(3, 6):
        x = model.tokens(IDS[:, place])
        for layer, state in zip(model.layers, states, strict=True):
            x = layer.step(x, state)
        rows.append(model._decode(x))
    return torch.stack(rows)


def voxels(model: nn.Module) -> Tensor:
    return model(waves(model, 2, 2, 6, 6, 6), torch.tensor([3.0, 40.0]), torch.tensor([0, 1]))


def deberta(version: str, head: str = "Model", **fields: Any) -> Callable[[], nn.Module]:
    config = getattr(models, f"Deberta{version}Config")
    return lambda: getattr(models, f"Deberta{version}{head}")(config(**WIDTH, **POSITIONS, **fields))


def bert(head: str) -> Callable[[], nn.Module]:
    return lambda: getattr(models, f"BertFor{head}")(models.BertConfig(**WIDTH))


def m2(head: str, **fields: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(models, f"M2Bert{head}")(models.M2BertConfig(**M2, **fields))


DIT = {"input_size": 6, "patch_size": 2, "in_channels": 2, "hidden_size": 12, "depth": 2, "num_heads": 2}
DISTIL = {"vocab_size": 20, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 16}
MODELS: dict[str, tuple[Callable[[], nn.Module], Call]] = {
    "BertModel": (lambda: models.BertModel(models.BertConfig(**WIDTH)), pooled),
    "BertForMaskedLM": (bert("MaskedLM"), typed),
    "BertForMaskedLM, loss alone": (bert("MaskedLM"), labelled),
    "BertForSequenceClassification": (bert("SequenceClassification"), padded),
    "BertForTokenClassification": (bert("TokenClassification"), padded),
    "Albert": (lambda: models.AlbertForMaskedLM(models.AlbertConfig(**WIDTH, embedding_size=8)), padded),
    "DistilBert": (lambda: models.DistilBertForSequenceClassification(models.DistilBertConfig(**DISTIL)), padded),
    "Deberta": (deberta("", "ForSequenceClassification", type_vocab_size=2, embedding_size=8), typed),
    "DebertaV2": (deberta("V2", conv_kernel_size=3, norm_rel_ebd="layer_norm", position_buckets=4), padded),
    "DebertaV2, shared": (deberta("V2", "ForMaskedLM", share_att_key=True), padded),
    "Swin": (lambda: models.SwinForImageClassification(models.SwinConfig(**GRID)), images),
    "Swinv2": (lambda: models.Swinv2ForImageClassification(models.Swinv2Config(**GRID)), images),
    "PoolFormer": (lambda: models.PoolFormerForImageClassification(models.PoolFormerConfig(**POOL)), images),
    "Segformer": (lambda: models.SegformerForImageClassification(models.SegformerConfig(**MIX)), images),
    "M2BertForMaskedLM": (m2("ForMaskedLM", hyena_training_additions=True), typed),
    "M2BertForSequenceClassification": (m2("ForSequenceClassification", mask_padding=True), padded),
    "M2BertForSentenceEmbedding": (m2("ForSentenceEmbedding", pool_all=True), padded),
    "M2ViT": (
        lambda: models.M2ViTForImageClassification(
            models.M2ViTConfig(
                image_size=20, patch_size=5, hidden_size=16, num_hidden_layers=1, filter_order=8, intermediate_size=16
            )
        ),
        images,
    ),
    "M2GPT": (lambda: models.M2GPTForCausalLM(models.M2GPTConfig(**GPT)), whole),
    "M2GPT, token by token": (lambda: models.M2GPTForCausalLM(models.M2GPTConfig(**GPT)), generated),
    "DiT3D": (lambda: models.DiT3DModel(models.DiT3DConfig(**DIT, window_size=2)), voxels),
    "MoHD": (lambda: models.MoHDForCausalLM(models.MoHDConfig(**ROUTED)), logits),
    "MoHD without gates": (
        lambda: models.MoHDForCausalLM(models.MoHDConfig(**{**ROUTED, "gates": "none"})),
        logits,
    ),
    "SequenceParallel": (
        lambda: models.SequenceParallelTransformer(models.SequenceParallelTransformerConfig.encoder(**PARALLEL)),
        whole,
    ),
}  # fmt: skip
LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, BlockdiagLinear)
NORMS = (AddBiasResidualLayerNorm, nn.LayerNorm, nn.RMSNorm)
SOME = ["BertForMaskedLM", "DebertaV2, shared", "Swinv2", "M2BertForMaskedLM", "M2GPT, token by token", "DiT3D", "MoHD"]


def make(name: str) -> tuple[nn.Module, Call]:
    torch.manual_seed(0)
    build, call = MODELS[name]
    return randomise(build().double(), std=0.3), call


def linear_maps(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, LINEAR)]


class Adapted(nn.Module):
    """A linear map and beside it one of low rank, as in LoRA (arXiv 2106.09685); it has nothing else of the map's."""

    def __init__(self, inner: nn.Module, delta: Tensor) -> None:
        super().__init__()
        self.inner = inner
        self.beside = copy.deepcopy(inner)
        self.beside.weight = nn.Parameter(delta)
        if hasattr(inner, "bias"):
            self.beside.bias = None
        self.on = True

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out + self.beside(x) if self.on else out


def low_rank(weight: Tensor) -> Tensor:
    rows = weight.detach().flatten(1)
    return (torch.randn(len(rows), 1, dtype=rows.dtype) @ torch.randn_like(rows[:1]) * 0.3).view_as(weight)


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def groups(model: nn.Module, kinds: tuple[type[nn.Module], ...], alone: bool) -> list[list[str]]:
    """The places of modules: each in a group of its own, or all in one."""
    places = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    return [[place] for place in places] if alone else [places]


ALONE = pytest.mark.parametrize("alone", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["all", "alone"])


@ALONE
@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_acts_as_its_weights_merged_do(name: str, alone: bool) -> None:
    """On every linear map, convolutions, tables and block-diagonal ones included."""
    model, call = make(name)
    before = call(model).detach()
    for places in groups(model, LINEAR, alone):
        modules = [model.get_submodule(place) for place in places]
        weights = [module.weight for module in modules]
        deltas = [low_rank(weight) for weight in weights]
        for module, weight, delta in zip(modules, weights, deltas, strict=True):
            module.weight = nn.Parameter(weight.detach() + delta)
        expected = call(model).detach()
        for module, weight in zip(modules, weights, strict=True):
            module.weight = weight
        adapted = [Adapted(module, delta) for module, delta in zip(modules, deltas, strict=True)]
        for place, module in zip(places, adapted, strict=True):
            put(model, place, module)
        # The oracle is made in float64 too, so its rounding is all that is allowed: see helpers.compare.
        what = ", ".join(places)
        assert_close(what, call(model).detach(), expected, expected)
        assert not torch.allclose(expected, before, rtol=1e-6, atol=0), f"{what} changes nothing"
        with torch.no_grad():
            assert_close(f"{what} without gradients", call(model), expected, expected)
            for module in adapted:
                module.on = False  # as PEFT's disable_adapter: nothing that was kept may be of the adapted map
            assert_close(f"{what} switched off", call(model), before, before)
        for place, module in zip(places, modules, strict=True):
            put(model, place, module)


@ALONE
@pytest.mark.parametrize("name", MODELS)
def test_hooks_are_called(name: str, alone: bool) -> None:
    """Those of every module that holds weights."""
    model, call = make(name)
    before = call(model).detach()
    missed = []
    for places in groups(model, (*LINEAR, *NORMS), alone):
        called: set[str] = set()
        hooks = [
            model.get_submodule(place).register_forward_hook(lambda *_, place=place, called=called: called.add(place))
            for place in places
        ]
        found = call(model).detach()
        for hook in hooks:
            hook.remove()
        assert_close(", ".join(places), found, before, before)
        missed += [place for place in places if place not in called]
    assert not missed


class Rounded(nn.Module):
    """As quantised linear layers are: no parameters, and `weight` is a function."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._parts = ((linear.weight.detach() * 8).round() / 8, None if linear.bias is None else linear.bias.detach())

    def weight(self) -> Tensor:
        return self._parts[0]

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, *self._parts)


@pytest.mark.parametrize("name", MODELS)
def test_quantised_layers_act(name: str) -> None:
    model, call = make(name)
    model.float()  # as quantised layers want it
    before = call(model).detach()
    places = [place for place in linear_maps(model) if isinstance(model.get_submodule(place), nn.Linear)]
    rounded = {place: Rounded(model.get_submodule(place)) for place in places}
    for place, module in rounded.items():
        model.get_submodule(place).weight = nn.Parameter(module.weight())
    eager, oracle = call(model).detach(), call(copy.deepcopy(model).double()).detach()
    for place, module in rounded.items():
        put(model, place, module)
    assert_close(name, call(model).detach(), oracle, eager)
    assert not torch.allclose(eager, before, rtol=1e-3, atol=0)


def test_generation_with_quantised_layers() -> None:
    """Nothing about the model is asked of a layer's weight."""
    for name in ("MoHD", "M2GPT"):
        model, _ = make(name)
        for place in [n for n in linear_maps(model) if isinstance(model.get_submodule(n), nn.Linear)]:
            put(model, place, Rounded(model.get_submodule(place)))
        assert len(model.generate(IDS[:1, :3], 4)[0]) == 7


def slanted(module: nn.Module, args: Any, out: Any) -> Any:
    """Adds neither a multiple nor a constant, which a norm that follows would not see."""
    if isinstance(out, tuple):
        return slanted(module, args, out[0]), out[1]
    return out + torch.arange(out.numel(), dtype=out.dtype).sin().view(out.shape)


@pytest.mark.slow
@pytest.mark.parametrize("name", SOME)
def test_a_hook_that_changes_the_output_acts(name: str) -> None:
    model, call = make(name)
    before = call(model).detach()
    for place in [n for n, m in model.named_modules() if isinstance(m, (*LINEAR, *NORMS))]:
        hook = model.get_submodule(place).register_forward_hook(slanted)
        assert not torch.allclose(call(model), before, rtol=1e-6, atol=0), place
        hook.remove()


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


@pytest.mark.parametrize(
    "name", ["BertForMaskedLM", *(pytest.param(name, marks=pytest.mark.slow) for name in SOME[1:])]
)
def test_parametrisations_act(name: str) -> None:
    """A parametrisation, pruning, and weight normalisation of both kinds, against the weights that they give."""
    model, call = make(name)
    plain = copy.deepcopy(model)

    def normalise(module: nn.Module) -> None:
        parametrizations.weight_norm(module)
        with torch.no_grad():
            module.parametrizations.weight.original0.mul_(1.5)

    def normalise_by_hook(module: nn.Module) -> None:
        torch.nn.utils.weight_norm(module)
        with torch.no_grad():
            module.weight_g.mul_(1.5)

    ways: list[Callable[[nn.Module], Any]] = [
        lambda module: parametrize.register_parametrization(module, "weight", Halved()),
        lambda module: prune.l1_unstructured(module, "weight", amount=0.3),
        normalise,
        normalise_by_hook,
    ]
    places = [n for n in linear_maps(model) if isinstance(model.get_submodule(n), nn.Linear)]
    for i, place in enumerate(places[:: max(1, len(places) // 8)]):
        changed = copy.deepcopy(model)
        module = changed.get_submodule(place)
        ways[i % len(ways)](module)
        module(torch.zeros(1, module.in_features, dtype=torch.float64))  # the older kinds set the weight in a hook
        untouched = plain.get_submodule(place).weight
        assert not torch.equal(module.weight, untouched)
        plain.get_submodule(place).weight = nn.Parameter(module.weight.detach().clone())
        expected = call(plain).detach()
        plain.get_submodule(place).weight = untouched
        assert_close(f"{place}, way {i % len(ways)}", call(changed).detach(), expected, expected)


def test_plain_modules_take_the_fused_path() -> None:
    """On a device that is not a CPU the bias is left for the operation that follows."""
    linear = nn.Linear(4, 6, device="meta")
    x = torch.empty(3, 4, device="meta")
    out, bias = product(x, linear)
    assert bias is linear.bias and out.shape == (3, 6)
    hook = linear.register_forward_hook(lambda *_: None)
    assert product(x, linear)[1] is None
    hook.remove()
    assert product(x, linear)[1] is linear.bias
    hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert not is_plain(linear, nn.Linear)
    hook.remove()
    assert is_plain(linear, nn.Linear)

    class Other(nn.Linear):
        pass

    assert product(x, Other(4, 6, device="meta"))[1] is None
    linear.forward = lambda x: x  # type: ignore[method-assign]
    assert not is_plain(linear, nn.Linear)


@pytest.mark.parametrize("name", MODELS)
def test_models_are_plain_when_made(name: str) -> None:
    model, _ = make(name)
    for place in linear_maps(model):
        module = model.get_submodule(place)
        assert is_plain(module, type(module)), place
        assert is_plain(copy.deepcopy(module), type(module)), place


def test_a_hook_sees_all_rows_at_once() -> None:
    """A CPU takes the rows of a feed-forward block in parts, where nothing looks."""
    block = FeedForward(4, 6).eval()
    x = torch.randn(CPU_ROWS + 3, 4)
    seen = []
    with torch.no_grad():
        expected = block(x)[0]
        for module in (block.up, block.activation, block.down):
            hook = module.register_forward_hook(lambda module, args, out: seen.append(len(out)))
            assert torch.equal(block(x)[0], expected) or seen
            hook.remove()
    assert seen == [len(x)] * 3


@pytest.mark.parametrize("name", ["Swin", "Swinv2", "DiT3D"])
def test_a_hook_that_keeps_the_output_has_that_of_the_tokens(name: str) -> None:
    """Padded windows need the projection of zeros besides, and DeBERTa that of positions."""
    model, call = make(name)
    kept: dict[str, Tensor] = {}
    for place, module in model.named_modules():
        if place.endswith("qkv"):
            module.register_forward_hook(lambda module, args, out, place=place: kept.update({place: out}))
    call(model)
    assert kept and all(out.dim() > 2 for out in kept.values())


@pytest.mark.parametrize("name", ["Swin", "Swinv2"])
def test_blocks_of_swin_may_be_wrapped(name: str) -> None:
    """Wrappers and hooks of a block find the tokens in it and out of it, not terms that are still to be added."""
    model, call = make(name)
    before = call(model).detach()

    class Wrapper(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.block(x)
            assert isinstance(out, Tensor) and out.shape == x.shape
            return out

    seen: list[Any] = []
    stages = model.base.stages
    stages[0][0] = Wrapper(stages[0][0])
    stages[1][1].register_forward_hook(lambda module, args, out: seen.append(out))
    assert_close(name, call(model).detach(), before, before)
    last = model.base.norm(seen[0], None, None).flatten(1, 2).mean(1)
    assert_close("the last block's", model.classifier(last).detach(), before, before)
    # As torch's own wrapper for checkpointing does.
    stages[1][0] = checkpoint_wrapper(stages[1][0])
    assert_close(name, call(model).detach(), before, before)
