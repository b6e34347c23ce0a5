"""Scenes of two digits whose pixels have classes: a small task of segmentation."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .training import digits

BACKGROUND = 0


class Scenes(NamedTuple):
    """Images of 32 x 32 pixels in [0, 1]: noise below 0.2, and a digit of 14 x 14 in each half."""

    images: Tensor  # [N, 1, 32, 32]
    labels: Tensor  # int64 [N, 32, 32]: 0 is background, 1 + d a pixel of digit d


def digit_scenes(count: int, *, held_out: bool = False, classes: int = 4) -> Scenes:
    """Scenes of digits below `classes`, drawn by torch's generator. A pixel brighter than 0.35 has its digit's class.

    Skips the test where scikit-learn is missing.

    Args:
        count: of scenes.
        held_out: whether from the digits that others are not made of.
        classes: how many of the ten digits there are.
    """
    data = digits()
    pixels, values = (data.held_out_images, data.held_out_labels) if held_out else (data.images, data.labels)
    chosen = values < classes
    pixels, values = (pixels[chosen] + 1) / 2, values[chosen]
    large = F.interpolate(pixels, size=(14, 14), mode="bilinear")[:, 0]
    images, labels = 0.2 * torch.rand(count, 1, 32, 32), torch.zeros(count, 32, 32, dtype=torch.int64)
    which, rows, columns = (torch.randint(most, (count, 2)) for most in (len(values), 19, 3))
    for i in range(count):
        for half in range(2):
            digit, top, left = int(which[i, half]), int(rows[i, half]), int(columns[i, half]) + 16 * half
            place = (slice(top, top + 14), slice(left, left + 14))
            images[(i, 0, *place)] = torch.maximum(images[(i, 0, *place)], large[digit])
            labels[(i, *place)][large[digit] > 0.35] = 1 + values[digit]
    return Scenes(images, labels)


def mean_iou(predicted: Tensor, labels: Tensor, classes: int) -> float:
    """The mean over classes of intersection over union; classes that are in neither do not count."""
    confusion = torch.bincount((labels * classes + predicted).flatten(), minlength=classes**2).view(classes, classes)
    both, either = confusion.diag(), confusion.sum(0) + confusion.sum(1) - confusion.diag()
    return float((both[either > 0] / either[either > 0]).mean())
