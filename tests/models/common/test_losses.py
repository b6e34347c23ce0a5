"""The losses that all models share: of the next token, over several batches, in half precision, without any label."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from warpform import Packing
from warpform.models import M2GPTForCausalLM, MoHDForCausalLM, SequenceParallelTransformer
from warpform.models.common.losses import IGNORED, mean_loss, next_token_loss, next_tokens, token_loss, token_loss_sum

FIELDS: dict[str, Any] = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "max_position_embeddings": 16}
HEADS: dict[str, Any] = {**FIELDS, "num_attention_heads": 2, "intermediate_size": 24}
DECODERS: dict[type, dict[str, Any]] = {
    M2GPTForCausalLM: FIELDS,
    MoHDForCausalLM: {**HEADS, "num_groups": 0},
    SequenceParallelTransformer: HEADS,
}


def rows(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Logits [10, 7] and labels, three of which do not count."""
    draw = torch.Generator().manual_seed(5)
    labels = torch.randint(7, (10,), generator=draw)
    return torch.randn(10, 7, generator=draw).to(dtype), labels.index_fill(0, torch.tensor([0, 4, 9]), IGNORED)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_mean_over_labels_that_count(dtype: torch.dtype) -> None:
    logits, labels = rows(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    loss = token_loss(logits, labels)
    assert loss.dtype == wide
    torch.testing.assert_close(loss, F.cross_entropy(logits.to(wide), labels))
    torch.testing.assert_close(token_loss(logits, labels.int(), 14), loss / 2)


def test_a_sum_and_a_count_over_batches_are_the_mean_over_all() -> None:
    logits, labels = rows(torch.float64)
    parts = [token_loss_sum(logits[i : i + 4], labels[i : i + 4]) for i in (0, 4, 8)]
    total, count = (torch.stack(part).sum() for part in zip(*parts, strict=True))
    assert int(count) == 7
    torch.testing.assert_close(mean_loss(total, count), token_loss(logits, labels))


def test_zero_where_no_label_counts() -> None:
    logits = rows()[0].requires_grad_()
    loss = token_loss(logits, torch.full((10,), IGNORED))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert float(loss.detach()) == 0.0 and not gradient.any()
    assert float(token_loss(logits.detach()[:0], torch.empty(0, dtype=torch.int64), 0)) == 0.0


@pytest.mark.parametrize("kind", DECODERS)
def test_models_of_which_no_label_counts(kind: Any) -> None:
    """A loss of 0, and gradients that are finite, where some kinds of mean are NaN."""
    torch.manual_seed(0)
    model = kind(kind.config_class(**DECODERS[kind]))
    ids = torch.arange(12).view(2, 6)
    loss = model(ids, labels=torch.full_like(ids, IGNORED)).loss
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("kind", DECODERS)
def test_models_in_bfloat16_have_a_loss_in_float32(kind: Any) -> None:
    torch.manual_seed(0)
    model = kind(kind.config_class(**DECODERS[kind])).to(torch.bfloat16)
    ids = torch.arange(12).view(2, 6)
    out = model(ids, labels=ids)
    assert out.loss.dtype == torch.float32 and out.logits.dtype == torch.bfloat16
    assert abs(float(out.loss.detach()) - math.log(30)) < 0.5


def test_next_tokens_of_whole_sequences() -> None:
    ids = torch.tensor([[5, 6, 7], [8, 9, IGNORED]])
    assert next_tokens(ids).tolist() == [[6, 7, IGNORED], [9, IGNORED, IGNORED]]
    assert next_tokens(ids[:, :1]).tolist() == [[IGNORED], [IGNORED]]


def test_next_tokens_of_packed_sequences() -> None:
    """Of lengths 3, 0, 1, 2; and rows after the last one, which hold no token."""
    ids = torch.arange(10, 18)
    offsets = torch.tensor([0, 3, 3, 4, 6], dtype=torch.int32)
    assert next_tokens(ids, offsets).tolist() == [11, 12, IGNORED, IGNORED, 15, IGNORED, IGNORED, IGNORED]
    assert next_tokens(ids[:6], offsets).tolist() == [11, 12, IGNORED, IGNORED, 15, IGNORED]
    assert next_tokens(ids[:0], offsets[:1]).tolist() == []


def test_the_loss_of_the_next_token_packed_and_padded() -> None:
    draw = torch.Generator().manual_seed(6)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]])
    ids, logits = torch.randint(7, mask.shape, generator=draw), torch.randn(4, 5, 7, generator=draw).double()
    labels = ids.masked_fill(mask == 0, IGNORED)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(next_token_loss(logits, labels), expected)
    for capacity in (None, 15):
        packing = Packing.from_mask(mask, capacity)
        packed = next_token_loss(packing.pack(logits), packing.pack(ids), packing.cu_seqlens)
        torch.testing.assert_close(packed, expected)
    torch.testing.assert_close(next_token_loss(logits, labels, items=12), expected / 2)
