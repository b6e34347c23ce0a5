"""Heads on Swin and Swin V2."""

from __future__ import annotations

from typing import ClassVar

from ..common.vision_heads import ImageClassification
from .base import SwinBase
from .config import SwinConfig
from .model import SwinModel, Swinv2Model


class SwinImageClassification(ImageClassification, SwinBase):
    """A classifier on the mean over tokens.

    Args:
        config, base: as of `VisionHead`.

    Raises:
        TypeError: base is of another class.
        ValueError: base has no pooler, or is not of the config.
    """

    base_class: ClassVar[type[SwinModel]]
    ignored_weights = ("decoder.",)

    def __init__(self, config: SwinConfig, base: SwinModel | None = None) -> None:
        if isinstance(base, SwinModel) and not base.has_pooler:
            raise ValueError(f"{type(self).__name__}: base must have a pooler, got one without")
        super().__init__(config, base)

    @classmethod
    def published_prefix(cls) -> str:
        return cls.base_class.weight_prefix

    def backbone(self) -> SwinModel:
        base: SwinModel = self.base
        return base


class SwinForImageClassification(SwinImageClassification):
    """Swin with a classifier on the mean over tokens."""

    base_class = SwinModel


class Swinv2ForImageClassification(SwinImageClassification):
    """Swin V2 with a classifier on the mean over tokens."""

    base_class = Swinv2Model
