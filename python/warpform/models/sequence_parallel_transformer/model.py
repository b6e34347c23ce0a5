"""A transformer for sequences longer than one device holds (arXiv 2105.13120): encoder or decoder.

Each rank holds some rows of every sequence. Normalisation and feed-forward blocks work on rows and stay local;
attention goes around the ring. Blocks normalise first, as in Megatron's BERT, which the paper builds on, and in GPT-2.

On one process it is a plain transformer. `distributed.SequenceParallel` makes the same module, with the same weights,
train over many.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from ...distributed.sequence_parallel import SequenceParallel, SequenceParallelAttention
from ...nn import FeedForward
from ...nn._product import apply_linear
from ...nn.norm import norm_of_sum
from ...nn.rotary import rotary_tables
from ..common.losses import mean_loss, token_loss_sum
from ..common.outputs import Output
from ..common.pretrained import PretrainedModel
from .config import SequenceParallelTransformerConfig


@dataclasses.dataclass
class SequenceParallelOutput(Output):
    """Of the rows of this rank.

    Attributes:
        loss: the mean over all labels of all ranks that are not -100 (0 where there is none), the same on every rank;
            None without labels.
        logits: [B, L/N, vocab].
        last_hidden_state: [B, L/N, hidden], after the last normalisation.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None


class SequenceParallelLayer(nn.Module):
    """h + attention(norm(h)), then h + feed_forward(norm(h)), on rows of a rank.

    What a block adds to the stream is added by the normalisation that follows, which passes over the rows anyway.
    """

    def __init__(self, config: SequenceParallelTransformerConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attention = SequenceParallelAttention(
            config.hidden_size,
            config.num_attention_heads,
            config.kv_heads,
            causal=config.causal,
            attention=config.attention,
            linformer_rank=config.linformer_rank,
            max_seqlen=config.max_position_embeddings,
        )
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.feed_forward = FeedForward(config.hidden_size, config.intermediate_size, config.hidden_act)

    def forward(
        self, added: Tensor, bias: Tensor | None, stream: Tensor | None, rotary: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """added [B, L/N, hidden] and bias [hidden], still to be added to stream; returns the same three."""
        normed, stream = norm_of_sum(self.attention_norm, added, bias, stream)
        added, bias = self.attention(normed, rotary)
        normed, stream = norm_of_sum(self.feed_forward_norm, added, bias, stream)
        added, bias = self.feed_forward(normed.flatten(0, 1))
        return added.view_as(stream), bias, stream


class SequenceParallelTransformer(PretrainedModel):
    """Tokens of this rank in, logits of this rank out; on one process all of them.

    Args:
        config: its options.
    """

    config_class = SequenceParallelTransformerConfig
    reset = PretrainedModel.init_weights

    def __init__(self, config: SequenceParallelTransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = (
            nn.Embedding(config.max_position_embeddings, config.hidden_size)
            if config.position_embedding == "learned"
            else None
        )
        self.layers = nn.ModuleList([SequenceParallelLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.plan: SequenceParallel | None = None  # set by SequenceParallel.apply
        self.apply(self.init_weights)  # projections of Linformer have a scale of their own
        if config.tie_word_embeddings:
            self.head.weight = self.tokens.weight

    def forward(
        self, input_ids: Tensor, labels: Tensor | None = None, position_ids: Tensor | None = None
    ) -> SequenceParallelOutput:
        """The rows of this rank, as `SequenceParallel.shard` gives them.

        Args:
            input_ids: int64 [B, L/N].
            labels: int64 [B, L/N], what each row is to predict; -100 counts for nothing. Nothing is shifted here, for
                the token after a rank's last row is another rank's: a decoder takes `next_tokens(input_ids)` of whole
                sequences, sharded alike.
            position_ids: int64 [L/N], where in the sequence each row is; None: as the plan shards them.

        Raises:
            ValueError: another shape, or a sequence longer than max_position_embeddings.
        """
        if input_ids.dim() != 2:
            raise ValueError(
                f"SequenceParallelTransformer: input_ids must be of shape [batch, L / N], got {list(input_ids.shape)}"
            )
        if labels is not None and labels.shape != input_ids.shape:
            raise ValueError(
                f"SequenceParallelTransformer: labels must be of shape {list(input_ids.shape)} as input_ids are, "
                f"got {list(labels.shape)}"
            )
        seqlen = input_ids.shape[1] * (1 if self.plan is None else self.plan.size)
        if seqlen > self.config.max_position_embeddings:
            raise ValueError(
                f"SequenceParallelTransformer: input_ids must have at most max_position_embeddings "
                f"{self.config.max_position_embeddings} tokens over all ranks, got {seqlen}"
            )
        if position_ids is None:
            position_ids = (
                torch.arange(seqlen, device=input_ids.device)
                if self.plan is None
                else self.plan.positions(seqlen, device=input_ids.device)
            )
        added = self.tokens(input_ids)
        rotary = None
        if self.positions is not None:
            added = added + self.positions(position_ids)
        else:
            rotary = rotary_tables(position_ids, self.config.head_dim, self.config.rope_theta, added.dtype)
        bias: Tensor | None = None
        stream: Tensor | None = None
        for layer in self.layers:
            added, bias, stream = layer(added, bias, stream, rotary)
        hidden, _ = norm_of_sum(self.norm, added, bias, stream)
        logits = apply_linear(hidden, self.head)
        loss = None if labels is None else self.loss(logits, labels)
        return SequenceParallelOutput(loss, logits, hidden)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean cross-entropy over all labels but -100, those of other ranks included; 0 where there is none.

        Ranks differ in how many labels they have, so a mean of the means of ranks would be another loss.
        """
        total, count = token_loss_sum(logits.flatten(0, 1), labels.flatten())
        return mean_loss(total, count) if self.plan is None else self.plan.mean(total, count)
