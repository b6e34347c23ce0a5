"""Swin learns to read digits."""

from __future__ import annotations

import pytest
import torch

from helpers.training import accuracy_on_digits
from warpform import models


@pytest.mark.slow
@pytest.mark.parametrize("version", ("Swin", "Swinv2"))
def test_learns_digits(version: str) -> None:
    torch.manual_seed(0)
    # 4 x 4 patches in windows of 2 x 2, shifted in every second block, merged until one token is the image.
    config = getattr(models, f"{version}Config")(
        image_size=8, patch_size=2, num_channels=1, embed_dim=32, depths=(2, 2, 1), num_heads=(2, 4, 8), window_size=2,
        mlp_ratio=2.0, drop_path_rate=0.0, num_labels=10,
    )  # fmt: skip
    accuracy = accuracy_on_digits(getattr(models, f"{version}ForImageClassification")(config), steps=300, rate=2e-3)
    assert accuracy >= 0.96, accuracy
