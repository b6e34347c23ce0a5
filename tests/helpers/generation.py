"""Generation with caches against the same tokens without them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def check_generation(model: Any, texts: Sequence[Tensor], new_tokens: int = 8) -> None:
    """Likeliest tokens are those of whole calls, an end token stops its own sequence alone, and draws repeat."""
    expected = []
    for text in texts:
        for _ in range(new_tokens):
            text = torch.cat((text, model(text[None]).logits[0, -1:].argmax(1)))
        expected.append(text)
    found = model.generate(texts, new_tokens)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    end = int(expected[0][len(texts[0]) + 2])
    stopped = model.generate(texts, new_tokens, eos_token_id=end)
    for text, whole, prompt in zip(stopped, expected, texts, strict=True):
        continued = whole[len(prompt) :].tolist()
        stop = len(prompt) + continued.index(end) + 1 if end in continued else len(whole)
        assert torch.equal(text, whole[:stop])
    drawn = [model.generate(texts, 4, temperature=1.0, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(*drawn, strict=True))
