"""LLaMA of transformers as an oracle in float64 throughout."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from warpform import models


class _Rotary(nn.Module):
    def __init__(self, frequencies: Tensor) -> None:
        super().__init__()
        self.frequencies = frequencies

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = (position_ids.unsqueeze(-1) * self.frequencies).repeat(1, 1, 2)
        return angles.cos(), angles.sin()


def exact_llama(decoder: models.DecoderForCausalLM) -> Any:
    """transformers' LlamaForCausalLM with copies of a decoder's weights, in float64.

    Its norms and rotary tables, which transformers makes in float32 whatever the dtype, are those of torch here.
    """
    hf: Any = copy.deepcopy(decoder).double().to_transformers()
    hf.model.rotary_emb = _Rotary(decoder.stack.branches[0].core.rotary.frequencies())
    for parent in list(hf.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                norm = nn.RMSNorm(child.weight.shape[0], child.variance_epsilon)
                norm.weight = child.weight
                setattr(parent, name, norm)
    return hf


def real_rows(ids: Tensor, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The real tokens of each row, [1, n], and their places in the padded row, [1, n]."""
    places = torch.arange(ids.shape[1])
    return [(row[kept][None], places[kept][None]) for row, kept in zip(ids, mask.bool(), strict=True)]


def next_token_mean(logits: list[Tensor], ids: list[Tensor]) -> Tensor:
    """The mean cross-entropy of the next token within each of the sequences, logits [n, vocab] and ids [n]."""
    losses = [
        nn.functional.cross_entropy(out[:-1], row[1:], reduction="none") for out, row in zip(logits, ids, strict=True)
    ]
    return torch.cat(losses).mean()
