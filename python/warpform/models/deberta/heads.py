"""Heads on DeBERTa and on its versions 2 and 3."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn import BiasActivation, first_tokens
from ...ops._dtypes import accumulation_dtype
from ..common.checks import check_shape
from ..common.encoder import PackedStates
from ..common.heads import MaskedLM, SequenceClassification, TokenClassification
from ..common.losses import IGNORED, token_loss
from ..common.weights import rename
from .model import DebertaModel, DebertaV2Model

# transformers' names in the older form of the head, and in that of pretraining.
_LM_HEAD = ((r"cls\.predictions\.(transform\.)?", "lm_predictions.lm_head."),)


class _DebertaMaskedLM(MaskedLM):
    """Both forms of the head: the older one (legacy in the config) and that of pretraining, alike but in names."""

    head_modules = {"head.dense": "cls.predictions.transform.dense", "head.norm": "cls.predictions.transform.LayerNorm"}
    bias_name = "cls.predictions.bias"
    aliases = {
        "cls.predictions.decoder.weight": "deberta.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }
    head_ignored = ("mask_predictions.",)
    head_spare = ("cls.", "lm_predictions.")

    def make_head(self) -> None:
        if not self.config.legacy and self.config.embedding_size != self.config.hidden_size:
            raise ValueError(
                f"{type(self).__name__}: embedding_size must be hidden_size {self.config.hidden_size} where legacy is "
                f"False, got {self.config.embedding_size}"
            )
        super().make_head()

    def weight_names(self) -> dict[str, tuple[str, ...]]:
        names = super().weight_names()
        if self.config.legacy:
            return names
        return {name: tuple(rename(part, _LM_HEAD) for part in parts) for name, parts in names.items()}


class _DebertaSequenceClassification(SequenceClassification):
    """A classifier on act(dense(first real token)), a pooler that belongs to the head."""

    uses_pooler = False
    head_modules = {"pooler": "pooler.dense", "classifier": "classifier"}
    dropout_fields = ("cls_dropout", "hidden_dropout_prob")

    def make_head(self) -> None:
        super().make_head()
        self.pooler = nn.Linear(self.config.hidden_size, self.config.hidden_size)
        self.pooler_activation = BiasActivation(self.config.pooler_hidden_act)

    def pool(self, run: PackedStates) -> Tensor:
        first = F.dropout(first_tokens(run.hidden, run.packing), self.config.pooler_dropout, training=self.training)
        return self.pooler_activation(self.pooler(first), None)

    def _loss(self, logits: Tensor, labels: Tensor, items: Tensor | int | None) -> Tensor:
        # Without a problem_type, transformers has rules for DeBERTa alone: one label a sequence is a class, or no class
        # if it is negative; several labels are the probabilities of the classes.
        batch, classes = logits.shape
        if self.config.problem_type is not None or classes == 1:
            return super()._loss(logits, labels, items)
        if labels.dim() == 1 or labels.shape[-1] == 1:
            labels = labels.flatten().long()
            check_shape(type(self).__name__, "labels", labels, (batch,))
            return token_loss(logits, torch.where(labels < 0, IGNORED, labels), items)
        check_shape(type(self).__name__, "labels", labels, (batch, classes))
        wide = logits.to(accumulation_dtype(logits.dtype))
        losses = -(wide.log_softmax(-1) * labels).sum(-1)
        return losses.mean() if items is None else losses.sum() / items


class DebertaForMaskedLM(_DebertaMaskedLM):
    """DeBERTa that predicts masked tokens."""

    base_class = DebertaModel


class DebertaForSequenceClassification(_DebertaSequenceClassification):
    """DeBERTa with a classifier on the first real token."""

    base_class = DebertaModel


class DebertaForTokenClassification(TokenClassification):
    """DeBERTa with a classifier on every token."""

    base_class = DebertaModel
    dropout_fields = ("hidden_dropout_prob",)


class DebertaV2ForMaskedLM(_DebertaMaskedLM):
    """DeBERTa-v2 or v3 that predicts masked tokens."""

    base_class = DebertaV2Model


class DebertaV2ForSequenceClassification(_DebertaSequenceClassification):
    """DeBERTa-v2 or v3 with a classifier on the first real token."""

    base_class = DebertaV2Model


class DebertaV2ForTokenClassification(TokenClassification):
    """DeBERTa-v2 or v3 with a classifier on every token."""

    base_class = DebertaV2Model
    dropout_fields = ("hidden_dropout_prob",)
