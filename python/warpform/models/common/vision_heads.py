"""Heads on vision models that transformers has too: a model and what is put on it, and classifiers of images."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from .convertible import ConvertibleModel
from .losses import classification_loss
from .outputs import ImageClassifierOutput
from .pretrained import named_weights


class VisionHead(ConvertibleModel):
    """A vision model and what is put on it, whose modules have the names that they have in transformers.

    Args:
        config: of the model below; it holds the options of the head too.
        base: the model to put the head on, whose parameters are shared; None makes a new one.

    Attributes:
        base_class: the class of the model below. In transformers its weights are under its `weight_prefix`.

    Raises:
        TypeError: base is of another class.
        ValueError: base is not of the config.
    """

    base_class: ClassVar[type[ConvertibleModel]]
    is_encoder = False
    weight_prefix = ""

    base: Any

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if not hasattr(cls, "base_class"):
            return
        cls.config_class = cls.base_class.config_class
        cls.transformers_config_class = cls.base_class.transformers_config_class
        cls.transformers_class = cls.__name__

    def __init__(self, config: Any, base: ConvertibleModel | None = None) -> None:
        super().__init__()
        name = type(self).__name__
        if base is None:
            base = self.base_class.build(config)
        elif type(base) is not self.base_class:
            raise TypeError(f"{name}: base must be a {self.base_class.__name__}, got {type(base).__name__}")
        elif base.config != config:
            raise ValueError(f"{name}: config must be base.config where base is given")
        self.config = config
        self.base = base
        self.make_head()
        parameter = next(base.parameters())
        for child in self.children():
            if child is not base:
                child.apply(base.init_weights)
                child.to(parameter.device, parameter.dtype)
        self.train(base.training)

    def make_head(self) -> None:
        """Sets the modules of the head."""
        raise NotImplementedError

    @classmethod
    def build(cls, config: Any, *, with_optional: bool = True) -> VisionHead:
        return cls(config)

    @classmethod
    def file_name(cls, name: str) -> str:
        return cls.base_class.file_name(name)

    def adopt(self, hf_model: nn.Module) -> None:
        self.base.adopt(hf_model.get_submodule(self.base_class.weight_prefix.removesuffix(".")))

    def weight_names(self) -> dict[str, tuple[str, ...]]:
        prefix = self.base_class.weight_prefix
        names = {
            f"base.{ours}": tuple(f"{prefix}{part}" for part in parts)
            for ours, parts in self.base.weight_names().items()
        }
        return {**names, **{name: (name,) for name in named_weights(self) if not name.startswith("base.")}}


class ImageClassification(VisionHead):
    """A classifier on one vector an image."""

    def make_head(self) -> None:
        self.classifier = nn.Linear(self.config.hidden_size, self.config.num_labels)

    def pooled(self, run: Any) -> Tensor:
        """The vector of each image, [batch, hidden_size], from the output of the model below."""
        out: Tensor = run.pooler_output
        return out

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
        logits = self.classifier(self.pooled(run))
        loss = None
        if labels is not None:
            loss = classification_loss(
                type(self).__name__, self.config.problem_type, logits, labels, num_items_in_batch
            )
        states, maps = run.hidden_states, getattr(run, "reshaped_hidden_states", None)
        output = ImageClassifierOutput(loss, logits, states, None, maps)
        if return_dict is None:
            return_dict = self.config.return_dict
        return output if return_dict else output.to_tuple()
