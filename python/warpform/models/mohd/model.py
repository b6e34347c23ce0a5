"""Mixture of hidden dimensions (MoHD, arXiv 2412.05644): a LLaMA-style decoder whose tokens use some of their width.

Before each block of a layer a router chooses groups of the hidden dimensions; the block reads those of its input and
writes those of its output. What the sources leave open is an option; `MoHDConfig` says which is which.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn._checkpoint import CheckpointedLayers
from ...nn._product import apply_linear
from ...nn.rotary import rotary_tables
from ...packing import Packing
from ..common.generation import check_sampling, continue_texts
from ..common.losses import next_token_loss
from ..common.outputs import Output
from ..common.pretrained import PretrainedModel
from .config import MoHDConfig
from .layers import KeyValueCache, MoHDLayer, RoutedBlock, Step


@dataclasses.dataclass
class MoHDOutput(Output):
    """Attributes:
    loss: a scalar, where labels were given: the mean cross-entropy of the next token (0 where no label counts), in
        float32 at least, plus the weighted balance loss.
    logits: [B, S, vocab], 0 at padded tokens, or [total, vocab] where packed ids were given.
    balance_loss: the mean over routers, a scalar; None for a dense model.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    balance_loss: Tensor | None = None


class MoHDForCausalLM(PretrainedModel, CheckpointedLayers):
    """The decoder with its language-model head.

    With every group shared, gates "none" (or a scale that makes them 1) and fusion at its beginning, it computes what
    the dense decoder with the same weights computes.
    """

    config_class = MoHDConfig

    def __init__(self, config: MoHDConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MoHDLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.apply(self.init_weights)
        if config.tie_word_embeddings:
            self.head.weight = self.tokens.weight

    def activated_parameters(self) -> int:
        """Parameters that one token's way through the layers multiplies: of routed weights the share in use.

        Embeddings and the head do not count: they are the same in all settings.
        """
        count = 0
        for name, parameter in self.layers.named_parameters():
            block = self.layers.get_submodule(name.rsplit(".", 2)[0])
            size = parameter.numel()
            if isinstance(block, RoutedBlock) and block.router is not None:
                inwards = name.endswith("inwards.weight") and block.route_in
                outwards = name.endswith("outwards.weight") and block.route_out
                if inwards or outwards:
                    router = block.router
                    size = size * (router.num_shared + router.top_k) // router.num_groups
            count += size
        return count

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        packing: Packing | None = None,
    ) -> MoHDOutput:
        """Padded: ids [B, S] and a mask of any pattern. Packed: ids [total] and their packing.

        Args:
            input_ids: int64 [B, S], or [total] with `packing`.
            attention_mask: bool or integer [B, S], nonzero = token; None = all are tokens. Not with `packing`.
            labels: like input_ids: the tokens themselves (shifted here), -100 where none is asked for.
            packing: says that ids and labels are packed; then logits are too.

        Raises:
            ValueError: shapes that do not match, a mask with `packing`, more tokens than max_position_embeddings (a
                RuntimeError in a compiled or exported model, which learns it from the mask as it runs).
        """
        padded = packing is None
        if packing is None:
            if input_ids.dim() != 2:
                raise ValueError(f"input_ids must be of shape [batch, seqlen], got {list(input_ids.shape)}")
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            if mask.shape != input_ids.shape:
                raise ValueError(
                    f"attention_mask must be of shape {list(input_ids.shape)} as input_ids is, got {list(mask.shape)}"
                )
            packing = Packing.from_mask(mask)
            input_ids = packing.pack(input_ids)
            labels = None if labels is None else packing.pack(labels)
        elif attention_mask is not None:
            raise ValueError("attention_mask must be None with packing, which says the same")
        if input_ids.shape != (packing.total,):
            raise ValueError(f"input_ids must be of shape [{packing.total}] as packing is, got {list(input_ids.shape)}")
        offsets, longest = packing.cu_seqlens, packing.max_seqlen
        limit = self.config.max_position_embeddings
        if torch.compiler.is_compiling():
            # The mask may say it only when the program runs, which then raises RuntimeError.
            torch._check(longest <= limit, lambda: "sequences must have at most max_position_embeddings tokens")
        elif longest > limit:
            raise ValueError(f"sequences must have at most max_position_embeddings, {limit}, tokens, got {longest}")
        cos, sin = self._rotary(_ranks(packing))
        hidden, losses = self._run(input_ids, Step(cos, sin, offsets, offsets, longest, longest))
        logits = apply_linear(hidden, self.head)
        balance = torch.stack(losses).mean() if losses else None
        loss = None
        if labels is not None:
            loss = next_token_loss(logits, labels, offsets)
            if balance is not None:
                loss = loss + self.config.balance_loss_weight * balance
        return MoHDOutput(loss, packing.unpack(logits) if padded else logits, balance)

    def _rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return rotary_tables(positions, self.config.heads_dim, self.config.rope_theta)

    def _run(self, ids: Tensor, step: Step) -> tuple[Tensor, list[Tensor]]:
        """ids [T] -> the normalised hidden states [T, hidden], and the balance losses of the routers."""
        hidden, losses = self.tokens(ids), []
        for i, layer in enumerate(self.layers):
            hidden, *balance = self.run_layer(layer, hidden, step, i)
            losses += balance
        return self.norm(hidden), losses

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
        """Continues each prompt, with a cache of keys and values; prompts need not be equally long.

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
        check_sampling(f"{type(self).__name__}.generate", max_new_tokens, temperature, top_k)
        if isinstance(prompts, Tensor):
            prompts = [prompts] if prompts.dim() == 1 else list(prompts)
        if not prompts or min(map(len, prompts)) == 0:
            raise ValueError("prompts must be tensors of at least one token each")
        longest = max(map(len, prompts)) + max_new_tokens
        if longest > self.config.max_position_embeddings:
            raise ValueError(
                f"prompts and max_new_tokens must come to at most max_position_embeddings, "
                f"{self.config.max_position_embeddings}, got {longest}"
            )
        device = self.device
        cache = KeyValueCache(self.config, len(prompts), longest, device, self.dtype)
        return continue_texts(
            lambda new, rows: self._decode(new, rows, cache),
            [prompt.to(device) for prompt in prompts],
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            eos_token_id=eos_token_id,
            generator=generator,
        )

    def _decode(self, new: Sequence[Tensor], active: Sequence[int], cache: KeyValueCache) -> Tensor:
        """The logits after the last of the new tokens of each active sequence, [len(active), vocab]."""
        device, capacity = cache.buffer.device, cache.buffer.size(3)
        before = [cache.lengths[b] for b in active]
        after = [n + len(tokens) for n, tokens in zip(before, new, strict=True)]
        positions = torch.cat([torch.arange(n, m) for n, m in zip(before, after, strict=True)])
        base = torch.tensor([b * capacity for b in active]).repeat_interleave(torch.tensor([len(t) for t in new]))
        kept = None
        if len(cache.lengths) > 1:
            kept = torch.cat([torch.arange(m) + b * capacity for b, m in zip(active, after, strict=True)]).to(device)
        for b, m in zip(active, after, strict=True):
            cache.lengths[b] = m
        cos, sin = self._rotary(positions.to(device))
        step = Step(
            cos,
            sin,
            _offsets([len(t) for t in new], device),
            _offsets(after, device),
            max(map(len, new)),
            max(after),
            cache,
            (positions + base).to(device),
            kept,
        )
        hidden, _ = self._run(torch.cat(list(new)), step)
        return apply_linear(hidden[step.cu_seqlens_q[1:] - 1], self.head)


def _offsets(lengths: list[int], device: torch.device) -> Tensor:
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(device, torch.int32)


def _ranks(packing: Packing) -> Tensor:
    """int64 [total]: the place of each token in its sequence, holes left out."""
    rows = torch.arange(packing.total, device=packing.cu_seqlens.device)
    sequence = torch.searchsorted(packing.cu_seqlens[1:].contiguous(), rows.int(), right=True)
    return rows - packing.cu_seqlens[sequence.clamp(max=packing.batch_size - 1)]
