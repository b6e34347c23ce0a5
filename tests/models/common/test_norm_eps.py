"""from_transformers takes the eps of each normalisation from the live module, and refuses one that is none."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.compare import assert_close
from helpers.parity import randomise
from warpform import models

transformers = pytest.importorskip("transformers")

WIDTH = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
}  # fmt: skip
GRID = {"image_size": 16, "patch_size": 2, "embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
DISENTANGLED = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 8}
MODELS: dict[str, dict[str, Any]] = {
    "Bert": WIDTH,
    "Albert": {**WIDTH, "embedding_size": 16},
    "DistilBert": {"vocab_size": 50, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    "Deberta": {**WIDTH, **DISENTANGLED},
    "DebertaV2": {**WIDTH, **DISENTANGLED, "norm_rel_ebd": "layer_norm", "position_buckets": 4, "conv_kernel_size": 3},
    "Swin": GRID,
    "Swinv2": GRID,
}


def make(name: str, head: str = "Model") -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**MODELS[name], attn_implementation="eager")
    return randomise(getattr(transformers, f"{name}{head}")(config))


def norms(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, m) for name, m in model.named_modules() if type(m).__name__.endswith("LayerNorm")]


def change(model: nn.Module) -> None:
    """Gives each normalisation an eps of its own, large enough to show: variances are about 1."""
    for i, (_, module) in enumerate(norms(model)):
        setattr(module, "eps" if hasattr(module, "eps") else "variance_epsilon", 0.1 + 0.05 * i)


def inputs(name: str) -> dict[str, Tensor]:
    if name.startswith("Swin"):
        return {"pixel_values": torch.randn(2, 3, 16, 16)}
    return {"input_ids": torch.randint(3, 50, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.int64)}


def check(name: str, model: nn.Module) -> nn.Module:
    given = inputs(name)
    ours = models.from_transformers(model)
    double = {k: x.double() if x.is_floating_point() else x for k, x in given.items()}
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(**double)[0]
        assert_close("out", ours(**given)[0], truth, model(**given)[0])
    return ours


@pytest.mark.parametrize("name", MODELS)
def test_eps_of_each_live_module(name: str) -> None:
    model = make(name)
    assert len(norms(model)) >= 4 or name == "Albert"
    change(model)
    ours = check(name, model)
    if name.startswith("Swin"):
        given = inputs(name)
        assert torch.equal(ours.resized(image_size=16)(**given)[0], ours(**given)[0])
    # An override of the config's eps goes before.
    if hasattr(model.config, "layer_norm_eps"):
        same = models.from_transformers(model, layer_norm_eps=0.7)
        found = {m.eps for n, m in same.named_modules() if hasattr(m, "eps")}
        assert 0.7 in found and found <= {0.7, 1e-5}


def test_eps_of_a_head() -> None:
    model = make("Bert", "ForMaskedLM")
    change(model)
    check("Bert", model)


def test_a_norm_that_was_replaced_is_refused() -> None:
    """A module with the same parameters that computes something else."""

    class Scale(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight + self.bias

    class Doubled(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    for make_other in (Scale, lambda norm: Doubled(32)):
        model = make("Bert")
        place = model.encoder.layer[1].output
        place.LayerNorm = make_other(place.LayerNorm)
        with pytest.raises(
            ValueError, match=r"encoder\.layer\.1\.output\.LayerNorm must be a LayerNorm, got .*(Scale|Doubled)"
        ):
            models.from_transformers(model)
    model = make("Bert")
    model.embeddings.LayerNorm = nn.RMSNorm(32)
    with pytest.raises(ValueError, match=r"embeddings\.LayerNorm"):
        models.from_transformers(model)
