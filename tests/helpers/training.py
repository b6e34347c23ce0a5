"""Short trainings, for tests that a model learns."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn


def train(
    model: nn.Module,
    loss: Callable[[], Tensor],
    steps: int,
    rate: float,
    weight_decay: float = 0.01,
    *,
    constant: bool = False,
) -> None:
    """`steps` steps of AdamW on the loss of a batch that `loss` draws; the learning rate peaks at `rate`, or is it."""
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=weight_decay)
    schedule = (
        torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        if constant
        else torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    )
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()


class Digits(NamedTuple):
    """scikit-learn's 1,797 images of digits, 8 x 8 pixels from -1 to 1; every fifth is held out."""

    images: Tensor  # [N, 1, 8, 8]
    labels: Tensor  # [N]
    held_out_images: Tensor
    held_out_labels: Tensor


def digits() -> Digits:
    """Skips the test where scikit-learn is missing."""
    found = pytest.importorskip("sklearn.datasets").load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(found.target)
    held_out = torch.arange(len(images)) % 5 == 0
    return Digits(images[~held_out], labels[~held_out], images[held_out], labels[held_out])


def accuracy_on_digits(model: nn.Module, steps: int, rate: float, batch: int = 64) -> float:
    """The part of the held-out digits that an image classifier reads rightly once it was trained on the others."""
    data = digits()

    def loss() -> Tensor:
        chosen = torch.randint(len(data.images), (batch,))
        found: Tensor = model(data.images[chosen], data.labels[chosen]).loss
        return found

    train(model.train(), loss, steps, rate, weight_decay=0.05)
    model.eval()
    with torch.inference_mode():
        right = model(data.held_out_images).logits.argmax(1) == data.held_out_labels
    return right.float().mean().item()
