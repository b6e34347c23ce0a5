"""Rows of tokens, packed from what a model is called with, and the places that they have."""

from __future__ import annotations

import torch
from torch import Tensor

from ...nn.stack import Step
from ...packing import Packing
from .checks import check_shape


def read_rows(
    model: str,
    name: str,
    given: Tensor,
    more: tuple[int, ...],
    attention_mask: Tensor | None,
    packing: Packing | None,
    limit: int | None,
) -> tuple[Packing, bool, Tensor]:
    """Checks an argument that has a row for each token, and packs it.

    Args:
        model, name: of the model and of the argument, for errors.
        given: [B, S, *more], or [total, *more] with `packing`.
        more: the sizes of a row; () for ids.
        attention_mask: bool or integer [B, S], nonzero = token; None = all are tokens. Not with `packing`.
        packing: says that rows are packed.
        limit: the longest sequence, max_position_embeddings; None: any length.

    Returns:
        The packing; whether the caller's tensors are padded; the rows [total, *more].

    Raises:
        ValueError: shapes that do not match, a mask with `packing`, a sequence longer than the limit (a RuntimeError in
            a compiled or exported model, which learns it from the mask as it runs).
    """
    padded = packing is None
    if packing is None:
        if given.dim() != 2 + len(more):
            wanted = ", ".join(["batch", "seqlen", *map(str, more)])
            raise ValueError(f"{model}: {name} must be of shape [{wanted}], got {list(given.shape)}")
        if attention_mask is None:
            packing = full_packing(given.shape[0], given.shape[1], given.device)
        else:
            if attention_mask.shape != given.shape[:2]:
                raise ValueError(
                    f"{model}: attention_mask must be of shape {list(given.shape[:2])} as {name} is, "
                    f"got {list(attention_mask.shape)}"
                )
            packing = Packing.from_mask(attention_mask)
        shape: tuple[int, ...] = (packing.batch_size, packing.seqlen)
    elif attention_mask is not None:
        raise ValueError(f"{model}: attention_mask must be None with packing, which says the same")
    else:
        shape = (packing.total,)
    check_shape(model, name, given, (*shape, *more))
    if limit is not None:
        check_longest(model, packing, limit)
    return packing, padded, packing.pack(given) if padded else given


def check_longest(model: str, packing: Packing, limit: int) -> None:
    """Raises for a sequence of more than `limit` tokens, as `read_rows` says."""
    longest = packing.max_seqlen
    if torch.compiler.is_compiling():
        # The mask may say it only when the program runs, which then raises RuntimeError.
        torch._check(longest <= limit, lambda: "sequences must have at most max_position_embeddings tokens")
    elif longest > limit:
        raise ValueError(
            f"{model}: sequences must have at most max_position_embeddings, {limit}, tokens, got {longest}"
        )


def full_packing(batch: int, seqlen: int, device: torch.device) -> Packing:
    """The packing of a batch in which every token is real, for which the host reads nothing from the device."""
    mask = torch.ones((batch, seqlen), dtype=torch.bool, device=device)
    return Packing.from_mask(mask, capacity=batch * seqlen)


def step_by_places(packing: Packing) -> Step:
    """The step of whole sequences where a token's position is its place among the tokens of its sequence.

    So padding, wherever it is, moves no position. `Step.of` counts the padding too, as transformers does.
    """
    places = packing.pack(packing.ranks - packing.cu_seqlens[:-1].unsqueeze(1))
    return Step(places.long(), packing.cu_seqlens, packing.max_seqlen)
