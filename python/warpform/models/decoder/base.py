"""A language model on a stack of branches: what is before and behind the stack, the loss, and generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...nn._product import even_blocks, in_blocks
from ...nn.cache import Caches
from ...nn.stack import Stack, Step, at_step
from ...packing import Packing
from ..common.checks import refuse_arguments
from ..common.generation import check_sampling, continue_texts
from ..common.losses import next_token_loss
from ..common.outputs import HeadOutput
from ..common.pretrained import PretrainedModel
from .branches import layer_branches
from .config import DecoderConfig
from .inputs import Inputs, read_inputs

# Of logits that are made at a time on a CPU: as much as the allocator of the C library gives again without new pages.
_BLOCK_BYTES = 24 << 20


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
        self.set_stack()
        self.norm = self.make_norm()
        self.head = self.make_head()
        self.apply(self.init_weights)
        if config.tie_word_embeddings:
            self.tie_head()

    # ---- the parts; a system swaps some ----

    def make_tokens(self) -> nn.Module:
        """The embeddings of tokens."""
        return nn.Embedding(self.config.vocab_size, self.config.hidden_size)

    def set_stack(self) -> None:
        """Sets `stack`."""
        self.stack = self.make_stack()

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
        loss = self.token_loss(logits, inputs)
        return loss + inputs.share * torch.stack(step.losses).sum() if step.losses else loss

    def token_loss(self, logits: Tensor, inputs: Inputs) -> Tensor:
        """The mean cross-entropy of the next token, a scalar."""
        assert inputs.labels is not None
        return next_token_loss(logits, inputs.labels, inputs.packing.cu_seqlens, inputs.items)

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
        position_ids: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **unsupported: Any,
    ) -> HeadOutput:
        """Padded: ids [B, S] and a mask of any pattern. Packed: ids [total] and their packing.

        Args:
            input_ids: int64 [B, S], or [total] with `packing`.
            attention_mask: bool or integer [B, S], nonzero = token; None = all are tokens. Not with `packing`.
            labels: like input_ids: the tokens themselves (shifted here), -100 where none is asked for.
            packing: says that ids, embeddings and labels are packed; then logits are too.
            inputs_embeds: [B, S, hidden] or [total, hidden], in place of input_ids.
            position_ids: int64 like input_ids, or [1, S]; None = a token's place in its padded row, as in transformers.
                In a batch without a mask a position that is not the next one begins another text, as there too (not
                in a compiled model).
            num_items_in_batch: what the sum of the losses is divided by, in place of the number of labels.
            **unsupported: other arguments of transformers' models, accepted when None or False, as use_cache=False.

        Returns:
            HeadOutput: loss, where labels were given, in float32 at least, 0 where no label counts; logits
            [B, S, vocab], 0 at padded tokens, or [total, vocab].

        Raises:
            ValueError: both or neither of input_ids and inputs_embeds, shapes that do not match, a mask with `packing`,
                an argument that is not supported, by name; more tokens than max_position_embeddings (a RuntimeError in
                a compiled or exported model, which learns it from the mask as it runs).
        """
        self.refuse(unsupported)
        inputs = self.read(input_ids, attention_mask, labels, packing, inputs_embeds, position_ids, num_items_in_batch)
        return self.run(inputs, inputs.step())

    def refuse(self, unsupported: dict[str, Any]) -> None:
        """Raises ValueError for an argument of transformers' models that is not supported and asks for something."""
        defaults = {"return_dict": True, "logits_to_keep": 0}
        given = {name: v for name, v in unsupported.items() if name not in defaults or v != defaults[name]}
        refuse_arguments(type(self).__name__, given)

    def prepare_inputs_for_generation(self, *inputs: Any, **named: Any) -> dict[str, Any]:
        """peft looks for this method of transformers' models; `generate` makes its inputs itself.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(f"{type(self).__name__}.generate makes its inputs itself")

    def read(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        packing: Packing | None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        items: Tensor | int | None = None,
    ) -> Inputs:
        """The arguments of `forward`, checked and packed."""
        given = (input_ids, attention_mask, labels, packing, inputs_embeds, position_ids, items)
        return read_inputs(type(self).__name__, self.config, *given)

    def embed(self, inputs: Inputs, step: Step) -> Tensor:
        """What the stack reads, [total, hidden]."""
        if inputs.embeds is not None:
            return inputs.embeds
        assert inputs.ids is not None
        return at_step(self.tokens, inputs.ids, step)

    def run(self, inputs: Inputs, step: Step) -> HeadOutput:
        """The output for inputs in one step."""
        hidden = self.stack(self.embed(inputs, step), step, self.norm)
        if inputs.labels is None and inputs.padded and inputs.shape is None and in_blocks(hidden):
            return HeadOutput(None, self._padded_logits(hidden, inputs.packing, step))
        logits = self.logits(hidden, step)
        loss = None if inputs.labels is None else self.loss(logits, inputs, step)
        return HeadOutput(loss, inputs.restore(logits))

    def _padded_logits(self, hidden: Tensor, packing: Packing, step: Step) -> Tensor:
        """The logits [B, S, vocab] of hidden [total, hidden], 0 where there is padding; without a gradient, on a CPU.

        Some rows at a time: all logits at once would be written to fresh pages of memory, and then once more, padded.
        """
        count = max(64, _BLOCK_BYTES // (self.config.vocab_size * hidden.element_size()))
        out: Tensor | None = None
        for rows, places in zip(even_blocks(hidden, count), even_blocks(packing.indices, count), strict=True):
            logits = self.logits(rows, step)
            if out is None:
                out = logits.new_empty(packing.batch_size * packing.seqlen, logits.shape[1])
                out[packing.ranks.flatten() < 0] = 0
            out.index_copy_(0, places, logits)
        assert out is not None  # there are more rows than a block has
        return out.view(packing.batch_size, packing.seqlen, -1)

    # ---- generation ----

    def caches(self, batch: int, capacity: int) -> Caches:
        """Empty caches for `batch` sequences of at most `capacity` tokens, for `decode`.

        Raises:
            ValueError: a capacity above max_position_embeddings.
        """
        if capacity > self.config.max_position_embeddings:
            raise ValueError(
                f"{type(self).__name__}.caches: capacity must be at most max_position_embeddings, "
                f"{self.config.max_position_embeddings}, got {capacity}"
            )
        return self.stack.caches(batch, capacity, self.device, self.dtype)

    @torch.no_grad()
    def decode(
        self, tokens: Sequence[Tensor], caches: Caches, rows: Sequence[int] | None = None, **options: Any
    ) -> Tensor:
        """The logits after new tokens behind those that the caches hold, which then hold the new ones too.

        There are no gradients. Caches that were made in inference mode are used in inference mode.

        Args:
            tokens: int64 tensors of at least one token, for each of the sequences `rows`.
            caches: of this model.
            rows: which sequences of the caches these are, increasing; None: all.
            **options: attributes of the `Step`.

        Returns:
            [len(tokens), vocab]: after the last token of each.

        Raises:
            ValueError: caches of another model or without room; another number of tokens than of rows, or none for a
                row; rows that do not increase.
        """
        hidden, step = self._after(tokens, caches, rows, options)
        return self.logits(hidden[step.cu_seqlens[1:] - 1], step)

    @torch.no_grad()
    def decode_all(
        self, tokens: Sequence[Tensor], caches: Caches, rows: Sequence[int] | None = None, **options: Any
    ) -> Tensor:
        """`decode`, with the logits after each of the new tokens: [total, vocab], sequence after sequence."""
        hidden, step = self._after(tokens, caches, rows, options)
        return self.logits(hidden, step)

    def _after(
        self, tokens: Sequence[Tensor], caches: Caches, rows: Sequence[int] | None, options: dict[str, Any]
    ) -> tuple[Tensor, Step]:
        """The normalised stream of new tokens, [total, hidden], and their step."""
        rows = range(len(caches.lengths)) if rows is None else rows
        if len(tokens) != len(rows):
            raise ValueError(
                f"{type(self).__name__}.decode: tokens must be {len(rows)} tensors, one for each row, got {len(tokens)}"
            )
        step = Step.after(caches, [len(new) for new in tokens], rows, **options)
        hidden = self.stack(at_step(self.tokens, torch.cat(list(tokens)), step), step, self.norm)
        return hidden, step

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
        check_sampling(f"{type(self).__name__}.generate", max_new_tokens, temperature, top_k)
        prompts = self.read_prompts(prompts, max_new_tokens)
        caches = self.caches(len(prompts), max(map(len, prompts)) + max_new_tokens)
        return continue_texts(
            lambda new, rows: self.decode(new, caches, rows, **options),
            prompts,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            eos_token_id=eos_token_id,
            generator=generator,
        )

    def read_prompts(self, prompts: Tensor | Sequence[Tensor], max_new_tokens: int) -> list[Tensor]:
        """The prompts of `generate`, checked, one tensor for each, on the device of the model."""
        name = f"{type(self).__name__}.generate"
        if isinstance(prompts, Tensor):
            prompts = list(prompts) if prompts.dim() == 2 else [prompts]
        for prompt in prompts:
            if not isinstance(prompt, Tensor) or prompt.dim() != 1 or prompt.is_floating_point():
                got = f"{prompt.dtype} of shape {list(prompt.shape)}" if isinstance(prompt, Tensor) else repr(prompt)
                raise ValueError(f"{name}: prompts must be integer tensors of shape [length], got {got}")
        if not len(prompts) or min(map(len, prompts)) == 0:
            raise ValueError(f"{name}: prompts must be tensors of at least one token each")
        longest = max(map(len, prompts)) + max_new_tokens
        if longest > self.config.max_position_embeddings:
            raise ValueError(
                f"{name}: prompts and max_new_tokens must come to at most max_position_embeddings, "
                f"{self.config.max_position_embeddings}, got {longest}"
            )
        return [prompt.to(self.device) for prompt in prompts]
