"""Heads on Swin and Swin V2."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from ..common.losses import classification_loss
from ..common.outputs import ImageClassifierOutput
from .base import SwinBase
from .config import SwinConfig
from .model import SwinModel, Swinv2Model


class ImageClassification(SwinBase):
    """A classifier on the mean over tokens.

    Args:
        config: of the model below; it holds the options of the head too.
        base: the model to put the head on, whose parameters are shared; None makes a new one.

    Raises:
        TypeError: base is of another class.
        ValueError: base has no pooler, or is not of the config.
    """

    base_class: ClassVar[type[SwinModel]]
    is_encoder = False
    weight_prefix = ""
    ignored_weights = ("decoder.",)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        base = cls.base_class
        cls.config_class = base.config_class
        cls.transformers_config_class = base.transformers_config_class
        cls.transformers_class = cls.__name__

    def __init__(self, config: SwinConfig, base: SwinModel | None = None) -> None:
        super().__init__()
        name = type(self).__name__
        if base is None:
            base = self.base_class(config)
        elif type(base) is not self.base_class:
            raise TypeError(f"{name}: base must be a {self.base_class.__name__}, got {type(base).__name__}")
        elif base.config != config:
            raise ValueError(f"{name}: config must be base.config where base is given")
        elif not base.has_pooler:
            raise ValueError(f"{name}: base must have a pooler, got one without")
        self.config = config
        self.base = base
        parameter = next(base.parameters())
        self.classifier = nn.Linear(
            config.hidden_size, config.num_labels, device=parameter.device, dtype=parameter.dtype
        )
        base.init_weights(self.classifier)
        self.train(base.training)

    @classmethod
    def build(cls, config: SwinConfig, *, with_optional: bool = True) -> ImageClassification:
        return cls(config)

    @classmethod
    def published_prefix(cls) -> str:
        return cls.base_class.weight_prefix

    def backbone(self) -> SwinModel:
        return self.base

    def adopt(self, hf_model: nn.Module) -> None:
        self.base.adopt(hf_model.get_submodule(self.published_prefix().removesuffix(".")))

    def weight_names(self) -> dict[str, tuple[str, ...]]:
        prefix = self.published_prefix()
        names = {
            f"base.{ours}": tuple(f"{prefix}{part}" for part in parts)
            for ours, parts in self.base.weight_names().items()
        }
        return {**names, **{f"classifier.{leaf}": (f"classifier.{leaf}",) for leaf in ("weight", "bias")}}

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        *,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        **inputs: Any,
    ) -> ImageClassifierOutput | tuple[Any, ...]:
        """Classifies images.

        Args:
            pixel_values, **inputs: as of the model below.
            labels: [batch] integers (classes) or [batch] numbers (regression with one label), else [batch, num_labels].
                problem_type of the config says which loss; None finds out as transformers does.
            num_items_in_batch: what the sum of the losses is divided by, in place of the number of labels.
            return_dict: False returns a tuple. None = as the config says.

        Returns:
            ImageClassifierOutput: loss, in float32 at least; logits [batch, num_labels].

        Raises:
            ValueError: as the model below; labels of another shape.
        """
        run = self.base(pixel_values, return_dict=True, **inputs)
        logits = self.classifier(run.pooler_output)
        loss = None
        if labels is not None:
            loss = classification_loss(
                type(self).__name__, self.config.problem_type, logits, labels, num_items_in_batch
            )
        output = ImageClassifierOutput(loss, logits, run.hidden_states, None, run.reshaped_hidden_states)
        if return_dict is None:
            return_dict = self.config.return_dict
        return output if return_dict else output.to_tuple()


class SwinForImageClassification(ImageClassification):
    """Swin with a classifier on the mean over tokens."""

    base_class = SwinModel


class Swinv2ForImageClassification(ImageClassification):
    """Swin V2 with a classifier on the mean over tokens."""

    base_class = Swinv2Model
