"""DistilBERT (arXiv 1910.01108), padding-free: BERT with half of the layers, without token types and pooler."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn import Embeddings, Encoder, EncoderLayer, first_tokens
from ...packing import Packing
from ..common.encoder import EncoderModel, PackedStates
from ..common.heads import HeadModel, MaskedLM, SequenceClassification, TokenClassification
from ..common.outputs import EncoderOutput, HeadOutput
from .config import DistilBertConfig

_EPS = 1e-12  # of every normalisation; not in the config


class DistilBertModel(EncoderModel):
    """DistilBERT's encoder. Called as `transformers.DistilBertModel`: same outputs at real tokens, 0 at padded ones.

    Args:
        config: its options.
    """

    config_class = DistilBertConfig
    transformers_class = "DistilBertModel"
    transformers_config_class = "DistilBertConfig"
    weight_prefix = "distilbert."
    ignored_weights = ("vocab_", "pre_classifier.", "classifier.", "qa_outputs.")
    constant_weights = ("embeddings.position_ids",)

    def __init__(self, config: DistilBertConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(
            config.vocab_size,
            config.dim,
            config.max_position_embeddings,
            0,
            padding_idx=config.pad_token_id,
            eps=_EPS,
            dropout=config.dropout,
        )
        self.encoder = Encoder(
            [
                EncoderLayer(
                    config.dim,
                    config.n_heads,
                    config.hidden_dim,
                    hidden_act=config.activation,
                    eps=_EPS,
                    hidden_dropout=(0.0, config.dropout),  # as transformers has it
                    attention_dropout=config.attention_dropout,
                )
                for _ in range(config.n_layers)
            ]
        )
        self.pooler = None
        self.apply(self.init_weights)
        if config.sinusoidal_pos_embds:
            assert self.embeddings.positions is not None
            with torch.no_grad():
                self.embeddings.positions.weight.copy_(_sinusoids(config.max_position_embeddings, config.dim))

    @classmethod
    def build(cls, config: DistilBertConfig, *, with_optional: bool = True) -> DistilBertModel:
        return cls(config)

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        packing: Packing | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        keep_packed: bool = False,
        **unsupported: Any,
    ) -> EncoderOutput | PackedStates | tuple[Any, ...]:
        """Does what `BertModel` does, with `transformers.DistilBertModel`'s order of arguments and no token types.

        Args:
            input_ids: int64 [batch, seqlen], or [total] with `packing`.
            attention_mask: bool or integer [batch, seqlen], nonzero = token; None = all are tokens. Not with `packing`.
            inputs_embeds: [batch, seqlen, dim] or [total, dim], in place of input_ids.
            position_ids: as input_ids, or [1, seqlen]; None = a token's place in its padded row.
            packing: says that all inputs are packed; then outputs are packed too.
            output_hidden_states: also return the embeddings and the output of every layer. None = as the config says.
            return_dict: False returns a tuple. None = as the config says.
            keep_packed: as of `BertModel`.
            **unsupported: other arguments, accepted when None or False.

        Raises:
            ValueError, NotImplementedError: as `BertModel`; token_type_ids that are not None.
        """
        return super().forward(
            input_ids,
            attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            packing=packing,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
            keep_packed=keep_packed,
            **unsupported,
        )

    def weight_names(self) -> dict[str, tuple[str, ...]]:
        names: dict[str, tuple[str, ...]] = {
            "embeddings.tokens.weight": ("embeddings.word_embeddings.weight",),
            "embeddings.positions.weight": ("embeddings.position_embeddings.weight",),
        }
        both: dict[str, tuple[str, ...]] = {"embeddings.norm": ("embeddings.LayerNorm",)}
        for i in range(self.config.n_layers):
            ours, theirs = f"encoder.layers.{i}", f"transformer.layer.{i}"
            both |= {
                f"{ours}.attention.qkv": tuple(f"{theirs}.attention.{x}" for x in ("q_lin", "k_lin", "v_lin")),
                f"{ours}.attention.out": (f"{theirs}.attention.out_lin",),
                f"{ours}.attention_norm": (f"{theirs}.sa_layer_norm",),
                f"{ours}.feed_forward.up": (f"{theirs}.ffn.lin1",),
                f"{ours}.feed_forward.down": (f"{theirs}.ffn.lin2",),
                f"{ours}.feed_forward_norm": (f"{theirs}.output_layer_norm",),
            }
        for name, parts in both.items():
            for leaf in ("weight", "bias"):
                names[f"{name}.{leaf}"] = tuple(f"{part}.{leaf}" for part in parts)
        return names


def _sinusoids(positions: int, dim: int) -> Tensor:
    """[positions, dim]: sin in even columns, cos in odd ones (arXiv 1706.03762, section 3.5)."""
    column = torch.arange(dim, dtype=torch.float64)
    place = torch.arange(positions, dtype=torch.float64).unsqueeze(1)
    angle = place / 10000 ** (2 * (column // 2) / dim)
    return torch.where(column % 2 == 0, angle.sin(), angle.cos())


class _WithoutTokenTypes(HeadModel):
    """A head on a model without token types, whose `forward` does not name them: trainers read the names of arguments
    to know which columns of a dataset a model takes."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        packing: Packing | None = None,
        return_dict: bool | None = None,
        **inputs: Any,
    ) -> HeadOutput | tuple[Any, ...]:
        """Does what the other models' head does, with transformers' order of arguments."""
        out: HeadOutput | tuple[Any, ...] = super().forward(
            input_ids,
            attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            packing=packing,
            return_dict=return_dict,
            **inputs,
        )
        return out


class DistilBertForMaskedLM(_WithoutTokenTypes, MaskedLM):
    """DistilBERT that predicts masked tokens."""

    base_class = DistilBertModel
    head_modules = {"head.dense": "vocab_transform", "head.norm": "vocab_layer_norm"}
    bias_name = "vocab_projector.bias"
    aliases = {"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"}
    activation_field = "activation"


class DistilBertForSequenceClassification(_WithoutTokenTypes, SequenceClassification):
    """DistilBERT with a classifier on relu(dense(first real token)), in place of the pooler that it does not have."""

    base_class = DistilBertModel
    uses_pooler = False
    head_modules = {"pre_classifier": "pre_classifier", "classifier": "classifier"}
    dropout_fields = ("seq_classif_dropout",)

    def make_head(self) -> None:
        super().make_head()
        self.pre_classifier = nn.Linear(self.config.dim, self.config.dim)

    def pool(self, run: PackedStates) -> Tensor:
        return F.relu(self.pre_classifier(first_tokens(run.hidden, run.packing)))


class DistilBertForTokenClassification(_WithoutTokenTypes, TokenClassification):
    """DistilBERT with a classifier on every token."""

    base_class = DistilBertModel
    dropout_fields = ("dropout",)
