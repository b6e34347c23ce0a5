"""Heads on M2-BERT: masked LM, sequence classification, and embeddings of texts."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn import AddBiasResidualLayerNorm, BiasActivation
from ...nn._product import product
from ..common.checks import check_shape
from ..common.losses import IGNORED, classification_loss, token_loss
from ..common.outputs import EncoderOutput, HeadOutput, Output
from ..common.texts import read_texts
from .bert import M2Base, M2BertModel, mean_over_tokens
from .config import POOLINGS, M2BertConfig

Self = TypeVar("Self", bound="M2Head")

# Fields of the config in which a head may differ from the model that it is put on.
HEAD_FIELDS = ("sentence_pooling", "use_normalized_embeddings")


class M2Head(M2Base):
    """M2-BERT and a head.

    Args:
        config: of the model; it holds the options of heads too.
        base: the model to put the head on, whose parameters are shared; None makes a new one. A pooler that the head
            does not use is left out.

    Raises:
        ValueError: base lacks the pooler that the head reads, or is not of the config.
    """

    reads_pooler = False

    def __init__(self, config: M2BertConfig, base: M2BertModel | None = None) -> None:
        super().__init__()
        name = type(self).__name__
        if base is None:
            base = M2BertModel(config, add_pooling_layer=bool(self.reads_pooler))
        elif dataclasses.replace(config, **{f: getattr(base.config, f) for f in HEAD_FIELDS}) != base.config:
            raise ValueError(f"{name}: config must be base.config where base is given")
        elif self.reads_pooler and base.pooler is None:
            raise ValueError(f"{name}: base must have a pooler, got one without")
        elif not self.reads_pooler and base.pooler is not None:
            with torch.device("meta"):
                lean = M2BertModel(config, add_pooling_layer=False)
            lean.embeddings, lean.encoder = base.embeddings, base.encoder
            base = lean.train(base.training)
        self.config = config
        self.bert = base
        self.make_head()
        table = base.embeddings.word_embeddings.weight
        for child in self.children():
            if child is not base:
                child.to(table.device, table.dtype)
        self.train(base.training)

    @classmethod
    def build(cls, config: M2BertConfig, *, with_optional: bool = True) -> M2Head:
        return cls(config)

    def make_head(self) -> None:
        """Sets the modules of the head, initialised."""

    def get_input_embeddings(self) -> nn.Embedding:
        """The token table, for callers that know transformers models."""
        return self.bert.get_input_embeddings()

    def run(self, input_ids: Tensor | None, attention_mask: Tensor | None, **inputs: Any) -> EncoderOutput:
        """The model's output, by name."""
        output = self.bert(input_ids, attention_mask, return_dict=True, **inputs)
        assert isinstance(output, EncoderOutput)
        return output

    def finish(
        self, run: EncoderOutput, loss: Tensor | None, logits: Tensor | None, return_dict: bool | None
    ) -> HeadOutput | tuple[Any, ...]:
        output = HeadOutput(loss, logits, run.hidden_states)
        if return_dict is None:
            return_dict = self.config.return_dict
        return output if return_dict else output.to_tuple()


class _Transform(nn.Module):
    """LayerNorm(GELU(dense(x)))."""

    def __init__(self, config: M2BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = BiasActivation("gelu")
        self.LayerNorm = AddBiasResidualLayerNorm(config.hidden_size, 1e-12)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., hidden]; returns the same shape."""
        out: Tensor = self.LayerNorm(self.activation(*product(x, self.dense)), None, None)
        return out


class _Predictions(nn.Module):
    """The transform and the decoder, whose weight is the token table."""

    def __init__(self, config: M2BertConfig, table: nn.Parameter) -> None:
        super().__init__()
        self.transform = _Transform(config)
        # Made without weights: the table takes their place, and must not be drawn again.
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, device="meta")
        self.decoder.weight = table
        self.decoder.bias = nn.Parameter(torch.zeros(config.vocab_size))


class _LanguageHead(nn.Module):
    """For the names of the published code."""

    def __init__(self, config: M2BertConfig, table: nn.Parameter) -> None:
        super().__init__()
        self.predictions = _Predictions(config, table)


class M2BertForMaskedLM(M2Head):
    """M2-BERT that predicts masked tokens, with the token table as the decoder."""

    head_names = ("cls.",)

    def make_head(self) -> None:
        self.cls = _LanguageHead(self.config, cast("nn.Parameter", self.bert.embeddings.word_embeddings.weight))
        self.cls.predictions.transform.apply(self.init_weights)

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
        return_logits: bool = True,
        return_dict: bool | None = None,
        **inputs: Any,
    ) -> HeadOutput | tuple[Any, ...]:
        """Predicts the token at every place.

        Args:
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **inputs: as of `M2BertModel`.
            labels: int64 [batch, seqlen]: the token that belongs there, -100 where the loss does not look.
            num_items_in_batch: what the sum of the losses is divided by, in place of the number of labelled tokens.
            return_logits: False, with labels: only labelled tokens go through the decoder, the widest product of the
                model, and logits are None. Finding them is one read of the device.
            return_dict: False returns a tuple. None = as the config says.

        Returns:
            HeadOutput: loss, the mean cross-entropy over labelled tokens (0 where there is none), in float32 at least;
            logits [batch, seqlen, vocab].

        Raises:
            ValueError: as the model; labels of another shape; return_logits False without labels.
        """
        if labels is None and not return_logits:
            raise ValueError(f"{type(self).__name__}: return_logits=False needs labels")
        run = self.run(
            input_ids,
            attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **inputs,
        )
        hidden = run.last_hidden_state
        check_shape(type(self).__name__, "labels", labels, tuple(hidden.shape[:2]))
        loss = logits = None
        if labels is not None and not return_logits:
            chosen = (labels != IGNORED).nonzero(as_tuple=True)
            loss = token_loss(self.predict(hidden[chosen]), labels[chosen], num_items_in_batch)
        else:
            logits = self.predict(hidden)
            loss = None if labels is None else token_loss(logits.flatten(0, 1), labels.flatten(), num_items_in_batch)
        return self.finish(run, loss, logits, return_dict)

    def predict(self, hidden: Tensor) -> Tensor:
        """hidden: [..., hidden]; returns logits [..., vocab]."""
        predictions = self.cls.predictions
        logits: Tensor = predictions.decoder(predictions.transform(hidden))
        return logits


class M2BertForSequenceClassification(M2Head):
    """M2-BERT with a classifier on its pooler, or with use_cls_token on the first token itself."""

    reads_pooler = True
    head_names = ("classifier.",)

    def __init__(self, config: M2BertConfig, base: M2BertModel | None = None) -> None:
        self.reads_pooler = self.wants_pooler(config)  # type: ignore[misc]
        super().__init__(config, base)

    @classmethod
    def wants_pooler(cls, config: M2BertConfig) -> bool:
        return not config.use_cls_token

    @classmethod
    def check_published(cls, what: str, fields: Mapping[str, Any]) -> None:
        gather = fields.get("gather_sentence_embeddings")
        if gather:
            raise ValueError(
                f"{what}: gather_sentence_embeddings={gather!r} is not supported, as that gives embeddings and no "
                "logits: use M2BertForSentenceEmbedding"
            )

    def make_head(self) -> None:
        dropout = self.config.classifier_dropout
        self.dropout = nn.Dropout(self.config.hidden_dropout_prob if dropout is None else dropout)
        self.classifier = nn.Linear(self.config.hidden_size, self.config.num_labels)
        self.classifier.apply(self.init_weights)

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
        return_dict: bool | None = None,
        **inputs: Any,
    ) -> HeadOutput | tuple[Any, ...]:
        """Classifies sequences.

        Args:
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **inputs: as of `M2BertModel`.
            labels: [batch] integers (classes) or [batch] numbers (regression with one label), else [batch, num_labels].
                problem_type of the config says which loss; None finds out as transformers does.
            num_items_in_batch: what the sum of the losses is divided by, in place of the number of labels.
            return_dict: False returns a tuple. None = as the config says.

        Returns:
            HeadOutput: loss, in float32 at least; logits [batch, num_labels].

        Raises:
            ValueError: as the model; labels of another shape.
        """
        run = self.run(
            input_ids,
            attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **inputs,
        )
        if self.config.use_cls_token:  # without dropout, as in the published code
            logits = self.classifier(run.last_hidden_state[:, 0])
        else:
            logits = self.classifier(self.dropout(run.pooler_output))
        loss = None
        if labels is not None:
            loss = classification_loss(
                type(self).__name__, self.config.problem_type, logits, labels, num_items_in_batch
            )
        return self.finish(run, loss, logits, return_dict)


@dataclasses.dataclass
class SentenceOutput(Output):
    """The output of `M2BertForSentenceEmbedding`.

    Attributes:
        sentence_embedding: [batch, hidden].
        last_hidden_state: [batch, seqlen, hidden].
        hidden_states: on request, as in `EncoderOutput`.
    """

    sentence_embedding: Tensor
    last_hidden_state: Tensor = None  # type: ignore[assignment]  # outputs are made from a mapping too
    hidden_states: tuple[Tensor, ...] | None = None


class M2BertForSentenceEmbedding(M2Head):
    """M2-BERT that gives one vector for each text, as the published retrieval models.

    Those read the pooler, on the first token or with `pool_all` on the mean over tokens: `pooling` "pooler". With
    "cls" it is the last state of the first token itself, and with "mean" the mean over tokens, for models without a
    pooler.

    Args:
        config, base: as of `M2Head`.
        pooling: "pooler", "cls" or "mean". None: as sentence_pooling of the config says.
        normalize: whether vectors get length 1. None: as use_normalized_embeddings of the config says.

    The head's config says both as they are here, so that it is saved and loaded with them; `base` keeps its own.

    Raises:
        ValueError: another pooling; as of `M2Head`.
    """

    reads_pooler = True

    def __init__(
        self,
        config: M2BertConfig,
        base: M2BertModel | None = None,
        *,
        pooling: str | None = None,
        normalize: bool | None = None,
    ) -> None:
        pooling = config.pooling if pooling is None else pooling
        if pooling not in POOLINGS:
            raise ValueError(
                f"{type(self).__name__}: pooling must be pooler or mean, got {pooling!r}; cls is the first token itself"
            )
        normalize = config.use_normalized_embeddings if normalize is None else normalize
        if (pooling, normalize) != (config.pooling, config.use_normalized_embeddings):
            config = copy.copy(config)
            config.sentence_pooling, config.use_normalized_embeddings = pooling, normalize
        self.reads_pooler = self.wants_pooler(config)  # type: ignore[misc]
        super().__init__(config, base)
        self.pooling, self.normalize = pooling, normalize

    @classmethod
    def wants_pooler(cls, config: M2BertConfig) -> bool:
        return config.pooling == "pooler"

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        return_dict: bool | None = None,
        **inputs: Any,
    ) -> SentenceOutput | tuple[Any, ...]:
        """input_ids, attention_mask, **inputs: as of `M2BertModel`."""
        run = self.run(input_ids, attention_mask, **inputs)
        if self.pooling == "pooler":
            assert run.pooler_output is not None
            vectors = run.pooler_output
        elif self.pooling == "cls":
            vectors = run.last_hidden_state[:, 0]
        else:
            vectors = mean_over_tokens(run.last_hidden_state, attention_mask)
        if self.normalize:
            vectors = F.normalize(vectors, dim=1)
        output = SentenceOutput(vectors, run.last_hidden_state, run.hidden_states)
        if return_dict is None:
            return_dict = self.config.return_dict
        return output if return_dict else output.to_tuple()

    @torch.inference_mode()
    def encode(
        self, texts: str | Iterable[str], tokenizer: Callable[..., Any], *, batch_size: int = 32, pad: bool = True
    ) -> Tensor:
        """The vectors of texts, in their order. The model is in eval mode afterwards.

        Args:
            texts: a text, or many: a list, an array of numpy, a Series of pandas, a generator. Each is cut at
                max_position_embeddings tokens.
            tokenizer: called as a tokenizer of transformers.
            batch_size: texts at once.
            pad: to max_position_embeddings, as published checkpoints expect; False: to the longest of a batch, which is
                the same where `mask_padding` keeps padding out.

        Returns:
            [texts, hidden] on the device and in the dtype of the model; [hidden] for one text that is not in a
            container.

        Raises:
            TypeError: texts that are not strings.
            ValueError: batch_size below 1.
        """
        texts, single = read_texts(f"{type(self).__name__}.encode", texts)
        if batch_size < 1:
            raise ValueError(f"{type(self).__name__}.encode: batch_size must be at least 1, got {batch_size}")
        self.eval()
        found = [torch.empty(0, self.config.hidden_size, dtype=self.dtype, device=self.device)]
        for begin in range(0, len(texts), batch_size):
            inputs = tokenizer(
                texts[begin : begin + batch_size],
                padding="max_length" if pad else "longest",
                truncation=True,
                max_length=self.config.max_position_embeddings,
                return_tensors="pt",
            )
            ids, mask = (inputs[name].to(self.device) for name in ("input_ids", "attention_mask"))
            out = self(ids, mask, return_dict=True)
            assert isinstance(out, SentenceOutput)
            found.append(out.sentence_embedding)
        vectors = torch.cat(found)
        return vectors[0] if single else vectors
