"""What Swin and Swin V2, with a head and without, do alike: conversion, other sizes, classification."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _swin_names as names_of
from ._heads import classification_loss
from ._output import Output
from ._registry import ConvertibleModel, config_overrides, load_weights, set_parameter
from ._swin_config import Pair, SwinConfig, Swinv2Config, pair
from ._swin_published import check_constants, check_needed, check_told, check_version, published_config

if TYPE_CHECKING:
    from .swin import SwinModel

Self = TypeVar("Self", bound="SwinBase")


@dataclasses.dataclass
class SwinOutput(Output):
    """The output of Swin without a head.

    Attributes:
        last_hidden_state: [batch, tokens, hidden], normalised.
        pooler_output: [batch, hidden], the mean over tokens, or None for a model without a pooler.
        hidden_states: on request, the embeddings and the output of every stage, [batch, tokens, channels].
        attentions: always None, for callers that look.
        reshaped_hidden_states: on request, the same as [batch, channels, height, width].
    """

    last_hidden_state: Tensor
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: None = None
    reshaped_hidden_states: tuple[Tensor, ...] | None = None


@dataclasses.dataclass
class ImageClassifierOutput(Output):
    """The output of a classifier of images.

    Attributes:
        loss: a scalar, where labels were given.
        logits: [batch, num_labels].
        hidden_states, attentions, reshaped_hidden_states: as in `SwinOutput`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: None = None
    reshaped_hidden_states: tuple[Tensor, ...] | None = None


def resize_grid(rows: Tensor, before: Pair, after: Pair) -> Tensor:
    """rows [before height * width, n] -> [after height * width, n], bicubic; rows themselves where nothing changes."""
    if tuple(before) == tuple(after):
        return rows
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32)).t().unflatten(1, before).unsqueeze(0)
    resized = F.interpolate(wide, size=after, mode="bicubic", align_corners=False)
    return resized.squeeze(0).flatten(1).t().to(rows.dtype).contiguous()


class SwinBase(ConvertibleModel):
    """What Swin and Swin V2, with a head and without, do alike about conversion."""

    config: SwinConfig
    weight_prefix = "swin."

    @classmethod
    def file_name(cls, name: str) -> str:
        return names_of.file_name(name)

    @classmethod
    def canonical_weights(cls, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if names_of.is_published(weights):
            return names_of.from_published(weights, cls.published_prefix())
        return {names_of.file_name(name): w for name, w in names_of.without_constants(weights).items()}

    @classmethod
    def check_weights(cls, what: str, config: SwinConfig, weights: Mapping[str, Tensor]) -> None:
        if names_of.is_published(weights):
            check_constants(what, config, weights)

    @classmethod
    def published_prefix(cls) -> str:
        return cls.weight_prefix

    @classmethod
    def from_published(cls: type[Self], weights: Mapping[str, Tensor], **overrides: Any) -> Self:
        """A model from weights under the names of the published code, such as its checkpoints hold under "model".

        The config follows from the shapes of the weights, and from the constants that the published files hold beside
        them: masks tell image_size, and coordinates the window_size and pretrained_window_sizes of Swin V2. The weights
        are not copied where that is not necessary.

        Args:
            weights: for instance `torch.load(path, weights_only=True)["model"]`, or what safetensors reads.
            **overrides: fields of the config that the weights do not tell. Without the constants Swin V2 needs
                image_size, window_size and pretrained_window_sizes, and absolute positions for images that are not
                square need image_size. `resized` makes a model for other sizes.

        Raises:
            ValueError: weights under other names, of the other version of Swin, missing, unknown or of another shape; a
                field that is needed, by name; an override that the weights contradict, by name.
            TypeError: an override that is no field.
        """
        what = f"{cls.__name__}.from_published"
        if not names_of.is_published(weights):
            raise ValueError(f"{what}: weights must have the published names, such as patch_embed.proj.weight")
        check_version(what, cls.config_class, weights)
        fields = published_config(what, weights)
        config_overrides(cls.config_class, overrides)
        check_told(what, fields, overrides, ignored=("num_labels",) if cls.is_encoder else ())
        fields |= overrides
        check_needed(what, cls.config_class, fields)
        if cls.config_class is Swinv2Config:
            fields.setdefault("mask_value", -100.0)
        config = cls.config_class(**fields)
        return load_weights(cls, config, weights, what).eval()

    def backbone(self) -> SwinModel:
        """The model without its head."""
        raise NotImplementedError

    def resized(self: Self, *, window_size: int | Pair | None = None, image_size: int | Pair | None = None) -> Self:
        """This model for another window or image size, to go on training or to use it as it is.

        Swin's tables of relative positions, and absolute position embeddings, are resized by bicubic interpolation.
        Swin V2 goes on measuring distances in the windows that it was trained with. Other parameters are shared.

        Raises:
            ValueError: a size below 1.
        """
        changes: dict[str, Any] = {}
        if window_size is not None:
            changes["window_size"] = window_size
        if image_size is not None:
            changes["image_size"] = image_size
        if isinstance(self.config, Swinv2Config):
            trained = zip(self.config.pretrained_window_sizes or (), self.config.windows(), strict=True)
            changes["pretrained_window_sizes"] = tuple(before or own[0] for before, own in trained)
        config = dataclasses.replace(self.config, **changes)
        with torch.device("meta"):
            model = type(self).build(config, with_optional=self.backbone().has_pooler)
        assert isinstance(model, type(self))
        for name, parameter in self.named_parameters():
            shape = model.get_parameter(name).shape
            if shape != parameter.shape:
                if name.endswith("relative_position_bias_table"):
                    own, other = (pair(c.window_size) for c in (self.config, config))
                    before, after = ((2 * h - 1, 2 * w - 1) for h, w in (own, other))
                    rows = resize_grid(parameter.detach(), before, after)
                else:  # position embeddings
                    rows = resize_grid(parameter.detach()[0], self.config.patch_grid, config.patch_grid).unsqueeze(0)
                parameter = nn.Parameter(rows, requires_grad=parameter.requires_grad)
            set_parameter(model, name, parameter)
        for name, module in self.named_modules():
            if hasattr(module, "eps"):  # that of a transformers model may differ from the config's
                model.get_submodule(name).eps = module.eps
        model.restore_buffers()
        return model.train(self.training)


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
        cls.model_type = base.model_type
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
