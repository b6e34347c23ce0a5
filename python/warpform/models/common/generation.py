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


def continue_by_drafts(
    step: Step,
    draft: Step,
    verify: Callable[[Sequence[Tensor], Sequence[int]], Tensor],
    rewind: Callable[[int, int], None],
    prompts: Sequence[Tensor],
    max_new_tokens: int,
    *,
    draft_length: int,
    eos_token_id: int | None = None,
) -> list[Tensor]:
    """Continues each prompt by its likeliest tokens; a cheaper model drafts some, which are then seen in one step.

    What the model itself would take at each place stands, so drafts change no token (speculative decoding, arXiv
    2211.17192, for likeliest tokens). Products of several tokens may round otherwise than those of one. Draft and model
    may share their caches, as the model writes over what the draft wrote.

    Args:
        step: gives the logits after the prompts.
        draft: the step of the cheaper model.
        verify: as `step`, with the logits after each of the new tokens, [tokens of all rows, vocab].
        rewind: called with a row and a number of tokens, makes the caches forget those of the row behind them.
        prompts, max_new_tokens, eos_token_id: as of `continue_texts`.
        draft_length: at most so many tokens are drafted before the model sees them.

    Returns:
        B int64 tensors: prompts and what follows.
    """
    if max_new_tokens == 0:
        return [prompt.clone() for prompt in prompts]
    device, rows = prompts[0].device, list(range(len(prompts)))
    texts: list[list[int]] = [prompt.tolist() for prompt in prompts]
    ends = [len(text) + max_new_tokens for text in texts]
    found = step(prompts, rows).argmax(1).unsqueeze(1).tolist()
    while True:
        for row, tokens in zip(rows, found, strict=True):
            stop = tokens.index(eos_token_id) + 1 if eos_token_id in tokens else len(tokens)
            texts[row] += tokens[: min(stop, ends[row] - len(texts[row]))]
        rows = [row for row in rows if len(texts[row]) < ends[row] and texts[row][-1] != eos_token_id]
        if not rows:
            return [torch.tensor(text, device=device) for text in texts]
        # The caches lack the last token of each text.
        chain = [torch.tensor([texts[row][-1] for row in rows], device=device)]
        for _ in range(min(draft_length, max(ends[row] - len(texts[row]) for row in rows) - 1)):
            chain.append(draft(list(chain[-1].unsqueeze(1)), rows).argmax(1))
        for row in rows:
            rewind(row, len(texts[row]) - 1)
        drafted = torch.stack(chain, 1)
        best = verify(list(drafted), rows).argmax(1).view(drafted.shape)
        agreed = (best[:, :-1] == drafted[:, 1:]).long().cumprod(1).sum(1).tolist()
        for row, count in zip(rows, agreed, strict=True):
            rewind(row, len(texts[row]) + count)
        found = [tokens[: count + 1] for tokens, count in zip(best.tolist(), agreed, strict=True)]
