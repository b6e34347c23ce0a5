"""Heads on padding-free encoders: masked LM, and classification of sequences and of tokens. They work on packed rows.

An architecture derives from these and says which weights of its transformers counterpart go where.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...nn import MaskedLMHead
from ...nn._product import decoder_table
from ...packing import Packing
from .checks import check_shape
from .convertible import ConvertibleModel
from .encoder import EncoderModel, PackedStates
from .losses import IGNORED, classification_loss, token_loss
from .outputs import HeadOutput


class HeadModel(ConvertibleModel):
    """An encoder and a head.

    Args:
        config: of the encoder; it holds the options of heads too.
        base: the encoder to put the head on, whose parameters are shared; None makes a new one. The config is then its
            own. A pooler that the head does not use is left out.

    Attributes:
        base_class: the encoder's class.
        uses_pooler: whether the head reads the pooler's output.
        head_modules: for each module of the head its name in transformers.
        head_ignored: prefixes of weights in checkpoints that are those of other heads.
        head_spare: as `spare_weights`, of the head.

    Raises:
        TypeError: base is of another class.
        ValueError: base lacks the pooler that the head reads, or is not of the config.
    """

    base_class: ClassVar[type[EncoderModel]]
    uses_pooler: ClassVar[bool] = False
    head_modules: ClassVar[Mapping[str, str]] = {}
    head_ignored: ClassVar[tuple[str, ...]] = ()
    head_spare: ClassVar[tuple[str, ...]] = ()
    is_encoder = False
    weight_prefix = ""

    base: EncoderModel

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if not hasattr(cls, "base_class"):
            return
        base = cls.base_class
        cls.config_class = base.config_class
        cls.transformers_config_class = base.transformers_config_class
        cls.transformers_class = cls.__name__
        inner = [f"{base.weight_prefix}{name}" for name in base.constant_weights]
        if not cls.uses_pooler and base.optional_module is not None:
            inner.append(f"{base.weight_prefix}{base.optional_module}.")
        cls.ignored_weights = (*inner, *cls.head_ignored)
        cls.spare_weights = (*cls.head_spare, *(f"{base.weight_prefix}{name}" for name in base.spare_weights))

    def __init__(self, config: Any, base: EncoderModel | None = None) -> None:
        super().__init__()
        name = type(self).__name__
        if base is None:
            made = self.base_class.build(config, with_optional=self.uses_pooler)
            assert isinstance(made, EncoderModel)
            base = made
        elif not isinstance(base, self.base_class):
            raise TypeError(f"{name}: base must be a {self.base_class.__name__}, got {type(base).__name__}")
        elif base.config != config:
            raise ValueError(f"{name}: config must be base.config where base is given")
        elif self.uses_pooler and base.pooler is None:
            raise ValueError(f"{name}: base must have a pooler, got one without")
        self.config = config
        self.base = base if self.uses_pooler else base.without_pooler()
        self.make_head()
        for child in self.children():
            if child is not self.base:
                child.apply(base.init_weights)
        if not next(base.parameters()).is_meta:
            parameter = next(base.parameters())
            self.to(parameter.device, parameter.dtype)
        self.train(base.training)

    @classmethod
    def build(cls, config: Any, *, with_optional: bool = True) -> HeadModel:
        return cls(config)

    def make_head(self) -> None:
        """Sets the modules of the head."""
        raise NotImplementedError

    def weight_names(self) -> dict[str, tuple[str, ...]]:
        prefix = self.base_class.weight_prefix
        names = {
            f"base.{ours}": tuple(f"{prefix}{part}" for part in parts)
            for ours, parts in self.base.weight_names().items()
        }
        for ours, theirs in self.head_modules.items():
            for leaf in ("weight", "bias"):
                names[f"{ours}.{leaf}"] = (f"{theirs}.{leaf}",)
        return names

    def get_input_embeddings(self) -> nn.Embedding:
        """The token table, for callers that know transformers models."""
        return self.base.get_input_embeddings()

    def run(self, *inputs: Any, **named: Any) -> PackedStates:
        """Runs the encoder on its inputs and returns its last layer's output, packed."""
        run = self.base(*inputs, **named, keep_packed=True)
        assert isinstance(run, PackedStates)
        return run

    def finish(
        self, run: PackedStates, loss: Tensor | None, logits: Tensor | None, return_dict: bool | None
    ) -> HeadOutput | tuple[Any, ...]:
        output = HeadOutput(loss, logits, run.restore_states())
        if return_dict is None:
            return_dict = self.config.return_dict
        return output if return_dict else output.to_tuple()

    def token_labels(self, run: PackedStates, labels: Tensor) -> Tensor:
        """Labels [total], `IGNORED` in rows that hold no token, from labels in the form of the inputs."""
        packing = run.packing
        shape = (packing.batch_size, packing.seqlen) if run.padded else (packing.total,)
        check_shape(type(self).__name__, "labels", labels, shape)
        labels = packing.pack(labels) if run.padded else labels
        return torch.where(packing.indices >= 0, labels, IGNORED)


class MaskedLM(HeadModel):
    """Predicts a token at every place, with the token table as the decoder (BERT, arXiv 1810.04805, task 1).

    Attributes:
        bias_name: the name in transformers of the bias per token of the vocabulary.

    Raises:
        ValueError: tie_word_embeddings is False in the config.
    """

    bias_name: ClassVar[str]
    activation_field: ClassVar[str] = "hidden_act"

    def make_head(self) -> None:
        if not self.config.tie_word_embeddings:
            raise ValueError(f"{type(self).__name__}: tie_word_embeddings=False is not supported")
        tokens = self.base.embeddings.tokens
        self.head = MaskedLMHead(
            self.config.hidden_size,
            tokens.embedding_dim,
            tokens.num_embeddings,
            hidden_act=getattr(self.config, self.activation_field),
            eps=self.base.embeddings.norm.eps,
        )

    def weight_names(self) -> dict[str, tuple[str, ...]]:
        return {**super().weight_names(), "head.bias": (self.bias_name,)}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        packing: Packing | None = None,
        return_logits: bool = True,
        return_dict: bool | None = None,
        **inputs: Any,
    ) -> HeadOutput | tuple[Any, ...]:
        """Only real tokens go through the decoder, the widest product of the model.

        Args:
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, packing: as of the encoder.
            **inputs: further arguments of the encoder.
            labels: int64 in the form of input_ids: the token that belongs there, -100 where the loss does not look.
                Labels of padded tokens are not looked at, whatever they are.
            num_items_in_batch: what the sum of the losses is divided by, in place of the number of labelled tokens.
                transformers' Trainer gives it: the labelled tokens of all the batches that make one step.
            return_logits: False, with labels: only labelled tokens go through the decoder, which in training are few,
                and logits are None. Finding them is one read of the device.
            return_dict: False returns a tuple. None = as the config says.

        Returns:
            HeadOutput: loss, the mean cross-entropy over labelled tokens (0 where there is none: transformers gives
            NaN), taken in float32 at least; logits [batch, seqlen, vocab], 0 at padded tokens, or [total, vocab].

        Raises:
            ValueError: as the encoder; labels of another shape; return_logits False without labels.
        """
        if labels is None and not return_logits:
            raise ValueError(f"{type(self).__name__}: return_logits=False needs labels")
        run = self.run(
            input_ids,
            attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            packing=packing,
            **inputs,
        )
        table = decoder_table(self.base.embeddings.tokens, self.head.bias.shape[0], run.hidden.device)
        loss = logits = None
        if labels is not None:
            labels = self.token_labels(run, labels)
        if labels is not None and not return_logits:
            rows = (labels != IGNORED).nonzero().flatten()
            loss = token_loss(self.head(run.hidden[rows], table), labels[rows], num_items_in_batch)
        else:
            packed = self.head(run.hidden, table)
            loss = None if labels is None else token_loss(packed, labels, num_items_in_batch)
            logits = run.restore(packed)
        return self.finish(run, loss, logits, return_dict)


class Classification(HeadModel):
    """The base of the two classifiers.

    Attributes:
        dropout_fields: fields of the config; the first that is not None is the dropout before the classifier.
    """

    head_modules = {"classifier": "classifier"}
    dropout_fields: ClassVar[tuple[str, ...]]

    def make_head(self) -> None:
        values = [getattr(self.config, name) for name in self.dropout_fields]
        self.dropout = nn.Dropout(next(value for value in values if value is not None))
        self.classifier = nn.Linear(self.config.hidden_size, self.config.num_labels)


class TokenClassification(Classification):
    """A class for every token."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        packing: Packing | None = None,
        return_dict: bool | None = None,
        **inputs: Any,
    ) -> HeadOutput | tuple[Any, ...]:
        """Classifies real tokens.

        Args:
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, packing: as of the encoder.
            **inputs: further arguments of the encoder.
            labels: int64 in the form of input_ids, -100 where the loss does not look. Labels of padded tokens are not
                looked at.
            num_items_in_batch: as of `MaskedLM`.
            return_dict: False returns a tuple. None = as the config says.

        Returns:
            HeadOutput: loss, the mean cross-entropy over labelled tokens (0 where there is none), in float32 at least;
            logits [batch, seqlen, num_labels], 0 at padded tokens, or [total, num_labels].

        Raises:
            ValueError: as the encoder; labels of another shape.
        """
        run = self.run(
            input_ids,
            attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            packing=packing,
            **inputs,
        )
        logits = self.classifier(self.dropout(run.hidden))
        loss = None if labels is None else token_loss(logits, self.token_labels(run, labels), num_items_in_batch)
        return self.finish(run, loss, run.restore(logits), return_dict)


class SequenceClassification(Classification):
    """A class, several classes or numbers for every sequence, read from the pooler."""

    uses_pooler = True

    def pool(self, run: PackedStates) -> Tensor:
        """Returns the input of the classifier, [batch, hidden]."""
        assert run.pooled is not None
        return run.pooled

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        packing: Packing | None = None,
        return_dict: bool | None = None,
        **inputs: Any,
    ) -> HeadOutput | tuple[Any, ...]:
        """Classifies sequences by their first real token.

        Args:
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, packing: as of the encoder.
            **inputs: further arguments of the encoder.
            labels: [batch] integers (classes) or [batch] numbers (regression with one label), else [batch, num_labels].
                problem_type of the config says which loss; None finds out as transformers does: one label is a
                regression, integers are classes, other numbers several classes at once.
            num_items_in_batch: what the sum of the losses is divided by, in place of the number of labels.
            return_dict: False returns a tuple. None = as the config says.

        Returns:
            HeadOutput: loss, in float32 at least; logits [batch, num_labels], 0 for sequences without a token.

        Raises:
            ValueError: as the encoder; labels of another shape.
        """
        run = self.run(
            input_ids,
            attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            packing=packing,
            **inputs,
        )
        logits = self.classifier(self.dropout(self.pool(run)))
        logits = torch.where((run.packing.lengths > 0).unsqueeze(1), logits, logits.new_zeros(()))
        loss = None
        if labels is not None:
            loss = self._loss(logits, labels, num_items_in_batch)
        return self.finish(run, loss, logits, return_dict)

    def _loss(self, logits: Tensor, labels: Tensor, items: Tensor | int | None) -> Tensor:
        return classification_loss(type(self).__name__, self.config.problem_type, logits, labels, items)
