"""The losses of all models. In float32 at least, and 0 where no label counts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

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
    return loss(logits, labels) if items is None else loss(logits, labels, reduction="sum") / _at_least_one(items)


def token_loss(logits: Tensor, labels: Tensor, items: Tensor | int | None = None) -> Tensor:
    """The mean cross-entropy over rows whose label is not `IGNORED`; 0 where there is none. In float32 at least.

    items: what the sum is divided by in place of the number of such rows.
    """
    labels = labels.long()
    if items is None:
        items = (labels != IGNORED).sum()
    return F.cross_entropy(_wide(logits), labels, ignore_index=IGNORED, reduction="sum") / _at_least_one(items)


def _at_least_one(items: Tensor | int) -> Tensor | int:
    """A divisor of a sum over so many labels, which is 0 where there are none."""
    return torch.where(items == 0, 1, items) if isinstance(items, Tensor) else items or 1


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
