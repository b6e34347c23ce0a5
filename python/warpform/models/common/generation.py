"""What decoders that generate text do alike: the choice of each token, and the end of each sequence.

A model brings its own step, with whatever it keeps between steps: keys and values, or states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...ops._dtypes import accumulation_dtype

# Called with the tokens that the model has not seen yet, an int64 tensor for each row (the prompts in the first call, a
# single token in each later one), and with the rows: which of the B sequences these are. Returns the logits after the
# last token of each, [rows, vocab].
Step = Callable[[Sequence[Tensor], Sequence[int]], Tensor]


def check_sampling(name: str, max_new_tokens: int, temperature: float, top_k: int | None) -> None:
    """Raises ValueError, or TypeError, which begins with `name`, for numbers that no generation can follow."""
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int):
        raise TypeError(f"{name}: max_new_tokens must be an int, got {max_new_tokens!r}")
    if max_new_tokens < 0 or temperature < 0 or (top_k is not None and top_k < 1):
        raise ValueError(
            f"{name}: max_new_tokens and temperature must be at least 0 and top_k at least 1, "
            f"got {max_new_tokens}, {temperature} and {top_k}"
        )


def choose_tokens(
    logits: Tensor, *, temperature: float = 0.0, top_k: int | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """The next token of each row.

    Args:
        logits: [rows, vocab].
        temperature: 0 takes the likeliest token; above, logits are divided by it and a token is drawn from their
            softmax, in float32 at least.
        top_k: draws from this many likeliest tokens only; None: from all.
        generator: of the draws, on the device of the logits; None: torch's own.

    Returns:
        int64 [rows].
    """
    if temperature == 0:
        return logits.argmax(1)
    logits = logits.to(accumulation_dtype(logits.dtype)) / temperature
    if top_k is not None and top_k < logits.shape[1]:
        least = logits.topk(top_k, dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)


def continue_texts(
    step: Step,
    prompts: Sequence[Tensor],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    eos_token_id: int | None = None,
    generator: torch.Generator | None = None,
    drop_ended: bool = True,
) -> list[Tensor]:
    """Continues each prompt by the tokens that `choose_tokens` takes from the logits of a step.

    Args:
        step: gives the logits; `Step` says how it is called.
        prompts: B int64 tensors of at least one token, on the device of the model.
        max_new_tokens: at most so many are added to each.
        temperature, top_k, generator: as of `choose_tokens`.
        eos_token_id: ends a sequence, and is its last token. None: nothing does, and nothing is read from the device.
        drop_ended: whether later steps leave out the sequences that have ended, as a cache of keys and values allows.
            False: every step has all rows, for models whose states belong to a whole batch.

    Returns:
        B int64 tensors: prompts and what follows.
    """
    rows, new = list(range(len(prompts))), list(prompts)
    texts, running = [[prompt] for prompt in prompts], set(rows)
    for _ in range(max_new_tokens):
        tokens = choose_tokens(step(new, rows), temperature=temperature, top_k=top_k, generator=generator)
        new = list(tokens.unsqueeze(1))
        for row, token in zip(rows, new, strict=True):
            if row in running:
                texts[row].append(token)
        if eos_token_id is None:
            continue
        ended = (tokens == eos_token_id).tolist()
        running -= {row for row, end in zip(rows, ended, strict=True) if end}
        if not running:
            break
        if drop_ended:
            new = [token for token, end in zip(new, ended, strict=True) if not end]
            rows = [row for row, end in zip(rows, ended, strict=True) if not end]
    return [torch.cat(text) for text in texts]
