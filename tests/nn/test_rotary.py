"""Rotary positions against the product of complex numbers, in both layouts; and far positions keep their place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from warpform.models import SequenceParallelTransformer, SequenceParallelTransformerConfig
from warpform.nn.rotary import Rotary, apply_rotary, rotary_tables

POSITIONS = torch.tensor([0, 1, 5, 1000, 2**20 + 1])


def turned(x: Tensor, theta: float) -> Tensor:
    """x [..., T, H, D] as D / 2 complex numbers, each times exp(i angle), in float64."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = (POSITIONS.double()[:, None] * frequencies)[:, None]  # [T, 1, D / 2]
    z = torch.complex(*x.double().split(half, -1)) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([z.real, z.imag], -1)


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(5, 3, 8), (2, 5, 3, 8)], ids=["packed", "sequences"])
def test_it_turns_pairs(shape: tuple[int, ...], dtype: torch.dtype, theta: float) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    cos, sin = rotary_tables(POSITIONS, 8, theta, dtype)
    assert cos.dtype == sin.dtype == torch.promote_types(dtype, torch.float32) and cos.shape == (5, 4)
    out = apply_rotary(x, cos, sin)
    # Tables, products and sum in float32 at least, then one rounding to the dtype.
    unit = 8 * torch.finfo(cos.dtype).eps + (0.0 if dtype == cos.dtype else torch.finfo(dtype).eps / 2)
    assert out.dtype == dtype and out.shape == x.shape
    assert (out.double() - turned(x, theta)).abs().max() <= unit * x.double().abs().max() * 2**0.5


def test_tables_of_each_sequence() -> None:
    """Positions [B, L] turn each sequence by its own."""
    x = torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(2))
    both = torch.stack([POSITIONS, POSITIONS.flip(0)])
    out = apply_rotary(x, *rotary_tables(both, 8))
    for sequence, positions, expected in zip(x, both, out, strict=True):
        assert torch.equal(apply_rotary(sequence, *rotary_tables(positions, 8)), expected)


def test_far_positions_in_bfloat16() -> None:
    """Neighbours far away attend to each other as those near the beginning do, to the rounding of the dtype."""
    torch.manual_seed(0)
    config = SequenceParallelTransformerConfig.decoder(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    model = SequenceParallelTransformer(config).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter, dtype=torch.float32))
    ids = torch.arange(12).view(1, 12)
    with torch.inference_mode():
        near, far = (model(ids, position_ids=torch.arange(12) + begin).logits.float() for begin in (0, 30_000))
    assert (near - far).abs().max() <= 4 * torch.finfo(torch.bfloat16).eps * near.abs().max()


@pytest.mark.parametrize(
    "scaling",
    (
        None,
        {"rope_type": "linear", "factor": 3.0},
        {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        },
    ),
    ids=("default", "linear", "llama3"),
)  # fmt: skip
def test_frequencies_are_those_of_transformers(scaling: dict[str, object] | None) -> None:
    """Theirs are float32: each may differ by the roundings of a few operations."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(
        hidden_size=64, num_attention_heads=1, rope_theta=500.0, rope_scaling=scaling, max_position_embeddings=4096
    )
    expected = llama.LlamaRotaryEmbedding(config).inv_freq.double()
    found = Rotary(64, 500.0, scaling).frequencies()
    assert ((found - expected) / expected).abs().max() < 16 * torch.finfo(torch.float32).eps


def test_the_rest_of_a_head_stays() -> None:
    x = torch.randn(5, 3, 8)
    tables = rotary_tables(POSITIONS, 4)
    out = apply_rotary(x, *tables)
    assert torch.equal(out[..., :4], apply_rotary(x[..., :4], *tables)) and torch.equal(out[..., 4:], x[..., 4:])
