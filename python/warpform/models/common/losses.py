"""The losses of all models: in float32 at least, and 0 where no label counts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops._dtypes import accumulation_dtype
from .checks import check_shape

IGNORED = -100  # the label of tokens that no loss counts, as in transformers


def classification_loss(
    model: str, problem_type: str | None, logits: Tensor, labels: Tensor, items: Tensor | int | None = None
) -> Tensor:
    """The loss of logits [batch, classes], in float32 at least; problem_type None finds out which as transformers does.

    items: what the sum of the losses is divided by; None = the number of labels, which makes it their mean.

    Raises:
        ValueError: labels of another shape, named as those of `model`.
    """
    batch, classes = logits.shape
    kind = problem_type
    if kind is None:
        if classes == 1:
            kind = "regression"
        elif labels.dtype in (torch.int64, torch.int32):
            kind = "single_label_classification"
        else:
            kind = "multi_label_classification"
    if kind == "single_label_classification" or (kind == "regression" and classes == 1):
        if labels.dim() == 2 and labels.shape[1] == 1:
            labels = labels.flatten()
        check_shape(model, "labels", labels, (batch,))
    else:
        check_shape(model, "labels", labels, (batch, classes))
    if kind == "single_label_classification":
        return token_loss(logits, labels, items)
    logits = _wide(logits)
    labels = labels.to(logits.dtype).view_as(logits)
    loss = F.mse_loss if kind == "regression" else F.binary_cross_entropy_with_logits
    return loss(logits, labels) if items is None else mean_loss(loss(logits, labels, reduction="sum"), items)


def token_loss(logits: Tensor, labels: Tensor, items: Tensor | int | None = None) -> Tensor:
    """The mean cross-entropy over rows whose label is not `IGNORED`, a scalar; 0 where there is none.

    Args:
        logits: [rows, classes]; the loss is in float32 at least.
        labels: integers [rows].
        items: what the sum is divided by in place of the number of such rows.
    """
    total, count = token_loss_sum(logits, labels)
    return mean_loss(total, count if items is None else items)


def token_loss_sum(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the cross-entropy and the number of rows in it, for a mean over several devices or batches.

    Args:
        logits, labels: as of `token_loss`.

    Returns:
        The sum over rows whose label is not `IGNORED`, a scalar in float32 at least, and their number, int64.
    """
    labels = labels.long()
    total = F.cross_entropy(_wide(logits), labels, ignore_index=IGNORED, reduction="sum")
    return total, (labels != IGNORED).sum()


def next_tokens(input_ids: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """What a decoder is to predict: at each place the next token of its sequence, and `IGNORED` (-100) at the last.

    Args:
        input_ids: integers [B, L], tokens or labels; or [total] with cu_seqlens.
        cu_seqlens: integers [B + 1]: sequence b has rows cu_seqlens[b] to cu_seqlens[b + 1]. Rows after the last
            sequence hold no token and get `IGNORED`.

    Returns:
        Integers of the same shape.
    """
    following = F.pad(input_ids[..., 1:], (0, 1), value=IGNORED)
    if cu_seqlens is None:
        return following
    ends = torch.arange(1, input_ids.size(0) + 1, device=input_ids.device)
    return following.masked_fill(torch.isin(ends, cu_seqlens[1:]) | (ends > cu_seqlens[-1]), IGNORED)


def next_token_loss(
    logits: Tensor, labels: Tensor, cu_seqlens: Tensor | None = None, items: Tensor | int | None = None
) -> Tensor:
    """`token_loss` of a decoder, whose logits at a place are for the next token of its sequence.

    Args:
        logits: [B, L, vocab], or [total, vocab] with cu_seqlens.
        labels: integers [B, L] or [total]: the tokens themselves, not shifted, and `IGNORED` where none is asked for.
        cu_seqlens: as of `next_tokens`.
        items: as of `token_loss`.
    """
    return token_loss(logits.flatten(0, -2), next_tokens(labels, cu_seqlens).flatten(), items)


def segmentation_loss(
    model: str, logits: Tensor, labels: Tensor, ignore_index: int = 255, *, align_corners: bool = False
) -> Tensor:
    """The mean cross-entropy over labelled pixels, in float32 at least; 0 where there is none.

    Args:
        model: named in errors.
        logits: [batch, classes, h, w], resized bilinearly to the labels. With one class they are those of a pixel
            belonging to it, and the loss is the binary one, its mean over all pixels, as in transformers.
        labels: integers [batch, height, width].
        ignore_index: the label of pixels that the loss does not look at.
        align_corners: of the resizing.

    Raises:
        ValueError: labels of another shape.
    """
    if labels.dim() != 3 or labels.shape[0] != logits.shape[0]:
        raise ValueError(
            f"{model}: labels must be of shape [{logits.shape[0]}, height, width], got {list(labels.shape)}"
        )
    labels = labels.long()
    wide = F.interpolate(_wide(logits), size=labels.shape[1:], mode="bilinear", align_corners=align_corners)
    counted = labels != ignore_index
    if wide.shape[1] == 1:
        valid = counted & (labels >= 0)
        loss = F.binary_cross_entropy_with_logits(wide.squeeze(1), labels.to(wide.dtype), reduction="none")
        return (loss * valid).mean()
    total = F.cross_entropy(wide, labels, ignore_index=ignore_index, reduction="sum")
    return mean_loss(total, counted.sum())


def mean_loss(total: Tensor, count: Tensor | int) -> Tensor:
    """total / count, a scalar; total itself, which is then 0, where count is 0."""
    return total / (torch.where(count == 0, 1, count) if isinstance(count, Tensor) else count or 1)


def _wide(x: Tensor) -> Tensor:
    return x.to(accumulation_dtype(x.dtype))
