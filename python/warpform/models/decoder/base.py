"""A language model on a stack of branches: what is before and behind the stack, the loss, and generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...nn.cache import Caches
from ...nn.stack import Stack, Step, at_step
from ...packing import Packing
from ..common.generation import check_sampling, continue_texts
from ..common.losses import next_token_loss
from ..common.outputs import HeadOutput
from ..common.pretrained import PretrainedModel
from .branches import layer_branches
from .config import DecoderConfig
from .inputs import Inputs, read_inputs


class CausalLM(PretrainedModel):
    """Embeddings, a stack, a norm and a head. A system derives from it and says how its stack is made.

    Args:
        config: its options.
    """

    config_class = DecoderConfig

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = self.make_tokens()
        self.stack = self.make_stack()
        self.norm = self.make_norm()
        self.head = self.make_head()
        self.apply(self.init_weights)
        if config.tie_word_embeddings:
            self.tie_head()

    # ---- the parts; a system swaps some ----

    def make_tokens(self) -> nn.Module:
        """The embeddings of tokens."""
        return nn.Embedding(self.config.vocab_size, self.config.hidden_size)

    def make_stack(self) -> Stack:
        """The stack."""
        return Stack(layer_branches(self.config))

    def make_norm(self) -> nn.Module:
        """The norm between the stack and the head."""
        return nn.RMSNorm(self.config.hidden_size, self.config.rms_norm_eps)

    def make_head(self) -> nn.Module:
        """The product that gives logits."""
        return nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False)

    def tie_head(self) -> None:
        """Makes one parameter of the weights of embeddings and head."""
        self.head.weight = self.tokens.weight

    def logits(self, hidden: Tensor, step: Step) -> Tensor:
        """hidden [rows, hidden], normalised -> [rows, vocab]."""
        return at_step(self.head, hidden, step)

    def loss(self, logits: Tensor, inputs: Inputs, step: Step) -> Tensor:
        """The mean cross-entropy of the next token, and what branches add to it."""
        assert inputs.labels is not None
        loss = next_token_loss(logits, inputs.labels, inputs.packing.cu_seqlens)
        return sum(step.losses, loss)

    # ---- whole sequences ----

    def get_input_embeddings(self) -> nn.Module:
        """The token table, for callers that know transformers models."""
        return self.tokens

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        packing: Packing | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> HeadOutput:
        """Padded: ids [B, S] and a mask of any pattern. Packed: ids [total] and their packing.

        Args:
            input_ids: int64 [B, S], or [total] with `packing`.
            attention_mask: bool or integer [B, S], nonzero = token; None = all are tokens. Not with `packing`.
            labels: like input_ids: the tokens themselves (shifted here), -100 where none is asked for.
            packing: says that ids, embeddings and labels are packed; then logits are too.
            inputs_embeds: [B, S, hidden] or [total, hidden], in place of input_ids.

        Returns:
            HeadOutput: loss, where labels were given, in float32 at least, 0 where no label counts; logits
            [B, S, vocab], 0 at padded tokens, or [total, vocab].

        Raises:
            ValueError: both or neither of input_ids and inputs_embeds, shapes that do not match, a mask with `packing`,
                more tokens than max_position_embeddings (a RuntimeError in a compiled or exported model, which learns
                it from the mask as it runs).
        """
        inputs = self.read(input_ids, attention_mask, labels, packing, inputs_embeds)
        return self.run(inputs, Step.of(inputs.packing))

    def read(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        packing: Packing | None,
        inputs_embeds: Tensor | None = None,
    ) -> Inputs:
        """The arguments of `forward`, checked and packed."""
        return read_inputs(
            type(self).__name__, self.config, input_ids, attention_mask, labels, packing, inputs_embeds
        )

    def embed(self, inputs: Inputs) -> Tensor:
        """What the stack reads, [total, hidden]."""
        if inputs.embeds is not None:
            return inputs.embeds
        embedded: Tensor = self.tokens(inputs.ids)
        return embedded

    def run(self, inputs: Inputs, step: Step) -> HeadOutput:
        """The output for inputs in one step."""
        logits = self.logits(self.stack(self.embed(inputs), step, self.norm), step)
        loss = None if inputs.labels is None else self.loss(logits, inputs, step)
        return HeadOutput(loss, inputs.restore(logits))

    # ---- generation ----

    def caches(self, batch: int, capacity: int) -> Caches:
        """Empty caches for `batch` sequences of at most `capacity` tokens, for `decode`."""
        return self.stack.caches(batch, capacity, self.device, self.dtype)

    def decode(
        self, tokens: Sequence[Tensor], caches: Caches, rows: Sequence[int] | None = None, **options: Any
    ) -> Tensor:
        """The logits after new tokens behind those that the caches hold, which then hold the new ones too.

        Args:
            tokens: int64 tensors of at least one token, for each of the sequences `rows`.
            caches: of this model.
            rows: which sequences of the caches these are, increasing; None: all.
            **options: attributes of the `Step`.

        Returns:
            [len(tokens), vocab]: after the last token of each.

        Raises:
            ValueError: caches of another model or without room; another number of tokens than of rows.
        """
        rows = range(len(caches.lengths)) if rows is None else rows
        if len(tokens) != len(rows):
            raise ValueError(
                f"{type(self).__name__}.decode: tokens must be {len(rows)} tensors, one for each row, got {len(tokens)}"
            )
        step = Step.after(caches, [len(new) for new in tokens], rows, **options)
        hidden = self.stack(at_step(self.tokens, torch.cat(list(tokens)), step), step, self.norm)
        return self.logits(hidden[step.cu_seqlens[1:] - 1], step)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Tensor | Sequence[Tensor],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        eos_token_id: int | None = None,
        generator: torch.Generator | None = None,
    ) -> list[Tensor]:
        """Continues each prompt, with caches of what branches keep; prompts need not be equally long.

        Args:
            prompts: B int64 tensors, each of at least one token; or one tensor, [B, length] or for one prompt [length].
            max_new_tokens: at most so many are added to each.
            temperature: 0 takes the likeliest token; above, logits are divided by it and a token is drawn.
            top_k: draws from this many likeliest tokens only.
            eos_token_id: ends a sequence, and is its last token.
            generator: of the draws.

        Returns:
            B int64 tensors: prompts and what follows.

        Raises:
            ValueError: no prompts, an empty one, or one that would come to more than max_position_embeddings tokens; a
                max_new_tokens or temperature below 0, a top_k below 1.
        """
        return self.continue_prompts(
            prompts,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            eos_token_id=eos_token_id,
            generator=generator,
        )

    def continue_prompts(
        self,
        prompts: Tensor | Sequence[Tensor],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        eos_token_id: int | None = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> list[Tensor]:
        """`generate`, with attributes of the `Step` as further options."""
        name = f"{type(self).__name__}.generate"
        check_sampling(name, max_new_tokens, temperature, top_k)
        if isinstance(prompts, Tensor):
            prompts = [prompts] if prompts.dim() == 1 else list(prompts)
        if not prompts or min(map(len, prompts)) == 0:
            raise ValueError(f"{name}: prompts must be tensors of at least one token each")
        longest = max(map(len, prompts)) + max_new_tokens
        if longest > self.config.max_position_embeddings:
            raise ValueError(
                f"{name}: prompts and max_new_tokens must come to at most max_position_embeddings, "
                f"{self.config.max_position_embeddings}, got {longest}"
            )
        device = self.device
        caches = self.caches(len(prompts), longest)
        return continue_texts(
            lambda new, rows: self.decode(new, caches, rows, **options),
            [prompt.to(device) for prompt in prompts],
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            eos_token_id=eos_token_id,
            generator=generator,
        )
