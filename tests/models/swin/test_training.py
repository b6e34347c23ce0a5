"""Swin learns to read digits: scikit-learn's 1,797 images of 8 x 8 pixels, of which every fifth is held out."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from warpform import models

datasets = pytest.importorskip("sklearn.datasets")

ACCURACY = 0.96


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For many small steps: threads that wait for each other take far longer where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("version", ("Swin", "Swinv2"))
def test_learns_digits(version: str) -> None:
    torch.manual_seed(0)
    digits = datasets.load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(digits.target)
    held_out = torch.arange(len(images)) % 5 == 0
    # 4 x 4 patches in windows of 2 x 2, shifted in every second block, merged until one token is the image.
    config = getattr(models, f"{version}Config")(
        image_size=8, patch_size=2, num_channels=1, embed_dim=32, depths=(2, 2, 1), num_heads=(2, 4, 8), window_size=2,
        mlp_ratio=2.0, drop_path_rate=0.0, num_labels=10,
    )  # fmt: skip
    model = getattr(models, f"{version}ForImageClassification")(config).train()
    train_images, train_labels = images[~held_out], labels[~held_out]
    steps, batch = 300, 64
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(train_images), (batch,))
        loss = model(train_images[chosen], train_labels[chosen]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.inference_mode():
        accuracy = (model(images[held_out]).logits.argmax(1) == labels[held_out]).float().mean().item()
    assert accuracy >= ACCURACY, accuracy
