"""Each model that is listed is made from its config, saved, loaded in two ways, and gives the same outputs exactly."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from warpform import models
from warpform.models.common.config import ModelConfig
from warpform.models.common.convertible import ConvertibleModel
from warpform.models.common.pretrained import PretrainedModel
from warpform.models.families import FAMILIES, MODEL_TYPES

pytest.importorskip("safetensors")

WIDTH = {
    "vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 16,
}  # fmt: skip
GRID = {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 4), "window_size": 4}
UNITS = {
    "image_size": 16, "patch_size": 3, "patch_stride": 2, "patch_padding": 1, "masked_unit_size": 4,
    "depths": (1, 2, 1), "num_heads": (1, 2, 2), "masked_unit_attention": (True, True, False),
}  # fmt: skip
RESNET = {"layer_type": "basic", "embedding_size": 8, "hidden_sizes": (8, 12), "depths": (1, 1)}
POSITIONS = {"relative_attention": True, "pos_att_type": ("c2p", "p2c")}
FILTER = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "max_position_embeddings": 16}
# The beginning of the names of the classes, and a small config of each.
TINY: dict[str, dict[str, Any]] = {
    "Activator": {"image_size": 16, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
    "Albert": {**WIDTH, "embedding_size": 8},
    "AlgoFormer": {"hidden_size": 16, "num_attention_heads": 2, "loop_layers": 2, "max_position_embeddings": 16},
    "Bert": WIDTH,
    "CoLM": {**WIDTH, "chains": (1, 1), "qkv_bias": True, "tie_word_embeddings": True},
    "DebertaV2": {**WIDTH, **POSITIONS, "position_buckets": 8},
    "Deberta": {**WIDTH, **POSITIONS},
    "Decoder": {**WIDTH, "num_key_value_heads": 1, "sliding_window": 7, "architecture": "mistral"},
    "DistilBert": {
        "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "vocab_size": 30, "max_position_embeddings": 16,
    },
    "DiT3D": {"input_size": 4, "patch_size": 2, "hidden_size": 12, "depth": 2, "num_heads": 2, "window_size": 1},
    "DuoFormer": {
        "backbone": RESNET, "image_size": 16, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24,
        "scale_layers": 1, "patch_layers": 2, "scale_token": "features",
    },
    "Hiera": {**UNITS, "embed_dim": 8, "num_query_pool": 2, "out_features": ("stem", "stage2")},
    "Ladder": {**WIDTH, "num_key_value_heads": 1, "ladder_layers": (1,)},
    "MatFormer": {**WIDTH, "granularities": (6, 12, 24), "layer_sizes": (24, 12), "gated": False, "hidden_act": "gelu"},
    "MAXIM": {
        "features": 8, "depth": 2, "num_stages": 2, "num_groups": 1, "num_bottleneck_blocks": 1,
        "num_supervision_scales": 2, "high_res_stages": 1, "block_size_hr": (4, 2), "grid_size_hr": (2, 4),
        "block_size_lr": 2,
    },
    "MinimalTransformer": {
        "image_size": 16, "patch_size": 4, "num_channels": 3, "hidden_size": 16, "num_hidden_layers": 2,
        "similarity": "symmetric",
    },
    "MoHD": {**WIDTH, "num_groups": 4, "num_shared": 1, "top_k": 1, "tie_word_embeddings": True},
    "MoT": {**WIDTH, "num_key_value_heads": 1, "num_classes": 3, "qk_norm": "layer", "attention_bias": True},
    "M2Bert": {**FILTER, "monarch_mlp_nblocks": 2, "hyena_filter_order": 8},
    "M2GPT": {**FILTER, "filter_order": 8},
    "M2ViT": {
        "image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "nblocks": 2, "filter_order": 8,
        "num_labels": 3,
    },
    "P2AT": {
        "backbone": {**RESNET, "hidden_sizes": (8, 12, 16, 20), "depths": (1, 1, 1, 1)}, "hidden_size": 8,
        "num_attention_heads": 2, "key_dim": 4, "auxiliary_heads": True,
    },
    "PoolFormer": {
        "depths": (1, 1), "hidden_sizes": (8, 12), "patch_sizes": (3, 3), "strides": (2, 2), "padding": (1, 1),
        "layer_scale_init_value": 0.5,
    },
    "ResNet": {**RESNET, "out_features": ("stem", "stage2")},
    "Segformer": {
        "depths": (1, 1), "hidden_sizes": (8, 16), "patch_sizes": (3, 3), "strides": (2, 2), "mlp_ratios": (2, 2),
        "num_attention_heads": (1, 2), "sr_ratios": (2, 1), "decoder_hidden_size": 8,
    },
    "SequenceParallelTransformer": WIDTH,
    "SReT": {
        "image_size": 16, "hidden_sizes": (12, 24), "depths": (1, 1), "num_heads": (2, 2), "groups": ((2, 2), (1, 1)),
    },
    "Swinv2": GRID,
    "Swin": GRID,
    "TurboViT": {**UNITS, "hidden_sizes": (8, 12, 16), "mlp_ratios": (2.0, 1.0, 2.0)},
    "Wide": {**WIDTH, "head_dim": 24},
}  # fmt: skip


def make(name: str) -> PretrainedModel:
    torch.manual_seed(0)
    fields = next(fields for prefix, fields in TINY.items() if name.startswith(prefix))
    kind = getattr(models, name)
    model: PretrainedModel = kind(kind.config_class(**fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # some begin at zero, where outputs would tell nothing
            parameter.add_(0.01 * torch.randn_like(parameter))
    return model


def run(model: nn.Module) -> list[Tensor]:
    """All outputs. Weights from a file lie at any address, which may change the last bits of torch's products."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    ids = torch.arange(24).view(2, 12) + 3
    with torch.no_grad():
        if isinstance(model, models.DiT3DModel):
            return [model(torch.linspace(0, 9, 2 * 3 * 64).sin().view(2, 3, 4, 4, 4), torch.tensor([3, 500]))]
        if isinstance(model, models.AlgoFormer):
            return [model(torch.linspace(0, 30, 2 * 9 * 20).sin().view(2, 9, 20), 3)]
        image = hasattr(model.config, "num_channels") or hasattr(model.config, "backbone")
        out = model(torch.linspace(0, 30, 3 * 256).sin().view(1, 3, 16, 16) if image else ids)
    return [value for value in pytree.tree_leaves(list(out.values())) if isinstance(value, Tensor)]


def options(model: nn.Module) -> dict[str, Any]:
    """The class of every module, and what it keeps in public attributes that are plain values, by its name."""
    plain = (bool, int, float, str, tuple, type(None))
    return {
        name: (type(module), {k: v for k, v in vars(module).items() if k[0] != "_" and isinstance(v, plain)})
        for name, module in model.named_modules()
    }


def assert_same(one: nn.Module, other: nn.Module) -> None:
    assert type(one) is type(other) and one.config == other.config and not other.training
    assert options(one) == options(other)
    own, read = one.state_dict(), other.state_dict()
    assert own.keys() == read.keys() and all(torch.equal(own[name], read[name]) for name in own)
    first, second = run(one), run(other)
    assert first and len(first) == len(second) and all(map(torch.equal, first, second))


@pytest.mark.parametrize("name", models.list_models())
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model = make(name)
    model.save_pretrained(tmp_path)
    assert_same(model, type(model).from_pretrained(tmp_path))
    # Of an architecture that transformers has, a folder gives the encoder.
    head = isinstance(model, ConvertibleModel) and not type(model).is_encoder
    found = models.from_pretrained(tmp_path)
    if not head:
        assert_same(model, found)
        return
    base: Any = model.base
    own, read = base.state_dict(), found.state_dict()
    assert all(torch.equal(own[weight], read[weight]) for weight in own)
    assert torch.equal(run(base)[0], run(found)[0])


@pytest.mark.sampled
@pytest.mark.parametrize("normalize", [None, True, False])
@pytest.mark.parametrize("pooling", [None, "pooler", "cls", "mean"])
def test_a_sentence_embedding_keeps_its_pooling(pooling: str | None, normalize: bool | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = models.M2BertModel(models.M2BertConfig(**TINY["M2Bert"])).eval()
    kind = models.M2BertForSentenceEmbedding
    for head in (
        kind(base.config, base, pooling=pooling, normalize=normalize),
        kind(base.config, pooling=pooling, normalize=normalize).eval(),
    ):
        head.save_pretrained(tmp_path)
        loaded = kind.from_pretrained(tmp_path)
        assert_same(head, loaded)
        assert loaded.pooling == (pooling or "pooler") and loaded.normalize == bool(normalize)
        # The head is put on its own model again, and its options can be changed as it is loaded.
        again = kind(head.config, head.bert)
        assert (again.pooling, again.normalize) == (loaded.pooling, loaded.normalize)
        assert kind.from_pretrained(tmp_path, use_normalized_embeddings=True).normalize
    assert base.config == models.M2BertConfig(**TINY["M2Bert"])


def test_the_tables_say_what_the_families_have() -> None:
    for family, names in FAMILIES.items():
        module = getattr(models, family)
        assert sorted(module.__all__) == sorted(names)
        assert set(models.list_models(family)) <= set(names)
    for model_type, name in MODEL_TYPES.items():
        config_class = getattr(models, name).config_class
        assert model_type in (config_class.model_type, *config_class.other_model_types)
    with pytest.raises(ValueError, match="family must be one of activator"):
        models.list_models("nonsense")


def test_importing_the_table_imports_no_family() -> None:
    program = (
        "import sys, warpform.models as m; m.list_models(); "
        "found = [n for n in sys.modules if n.startswith('warpform.models.') "
        "and n.split('.')[2] not in ('families', 'auto', 'common')]; assert not found, found"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


class NormConfig(ModelConfig):
    model_type = "throw-away"

    def __init__(self, **unused: Any) -> None:
        pass

    @classmethod
    def from_fields(cls, fields: Any, **overrides: Any) -> NormConfig:
        return cls()

    def to_dict(self) -> dict[str, Any]:
        return {"model_type": self.model_type}


class Scaled(nn.Module):
    def __init__(self, restored: bool = True) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("steps", torch.arange(4.0), persistent=False)
        if restored:
            self.restore_buffers = lambda: setattr(self, "steps", torch.arange(4.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) + self.steps


class NormModel(PretrainedModel):
    config_class = NormConfig
    restored = True

    def __init__(self, config: NormConfig) -> None:
        super().__init__()
        self.config = config
        self.part = Scaled(self.restored)

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x)


class Forgetful(NormModel):
    restored = False


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_buffers_of_batch_norm_come_along(dtype: torch.dtype | None, tmp_path: Path) -> None:
    model = NormModel(NormConfig())
    for _ in range(3):
        model(torch.randn(8, 4) * 3 + 1)
    model.eval().save_pretrained(tmp_path)
    again = NormModel.from_pretrained(tmp_path, dtype=dtype)
    x = torch.randn(5, 4)
    norm = again.part.norm
    assert norm.num_batches_tracked is not None and int(norm.num_batches_tracked) == 3
    assert norm.num_batches_tracked.dtype == torch.int64
    if dtype is None:
        assert torch.equal(model(x), again(x))
    else:
        assert norm.running_var is not None and norm.running_var.dtype == torch.float64


def test_a_buffer_without_values_is_an_error(tmp_path: Path) -> None:
    model = Forgetful(NormConfig())
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"buffer part\.steps is in no file"):
        Forgetful.from_pretrained(tmp_path)
