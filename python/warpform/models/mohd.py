"""Mixture of hidden dimensions (MoHD, arXiv 2412.05644): a LLaMA-style decoder whose tokens use some of their width.

Before each block of a layer a router chooses groups of the hidden dimensions; the block reads those of its input and
writes those of its output. What the sources leave open is an option; `MoHDConfig` says which is which.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..nn._checkpoint import CheckpointedLayers
from ..nn.hidden import SCALE_MODES, GroupFusion, HiddenLinear, HiddenRouter, Routed
from ..nn.rotary import apply_rotary, rotary_tables
from ..packing import Packing
from ._model import Model, ModelConfig
from ._output import Output

IGNORED = -100

# hidden, intermediate, layers, heads: sizes that come to these counts of parameters with 32,000 embeddings, in and out.
_SIZES = {
    "355M": (1024, 2560, 24, 16),
    "495M": (1280, 2752, 24, 20),
    "1.13B": (2048, 4032, 24, 32),
}
# How much wider the hidden dimension is, then groups, shared, routed: as many dimensions in use as the share of the
# dense model's that the name says, all of them from "2x" on.
_SETTINGS = {
    "50%": (1, 16, 6, 2),
    "75%": (1, 16, 9, 3),
    "2x": (2, 16, 6, 2),
    "3x": (3, 24, 6, 2),
    "4x": (4, 32, 6, 2),
}


@dataclasses.dataclass
class MoHDConfig(ModelConfig):
    """Sizes by default are those of the 355M decoder at 50 % activation.

    Certain from the paper's abstract: shared dimensions that are always on, specialised ones that are routed per token,
    activation scaling and group fusion. Second-hand, and so the defaults: N = 16 groups, three quarters of the active
    ones shared, attention and feed-forward both sparse, softmax scores, the scale N * sum(g), a Monarch matrix for
    fusion, a balance loss of weight 0.01. A guess: one router for each block, that gates multiply what a block reads
    and not what it writes, and all sizes but the number of parameters.

    Attributes:
        vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads,
            rms_norm_eps, rope_theta, max_position_embeddings, tie_word_embeddings, initializer_range: as in LLaMA.
        head_dim: None: that of `num_attention_heads` in `hidden_size`; wider models than the dense one keep its heads.
        num_groups, num_shared, top_k: groups of hidden dimensions, the first that all tokens use, and the choices.
            num_groups 0: a dense decoder.
        sparse_attention, sparse_feed_forward: which blocks are routed.
        route_in, route_out: whether a block reads, and writes, routed dimensions.
        gates: where the gates multiply: "in", "out", "both" or "none" (they are 1).
        scale_mode, renormalise: as in `nn.HiddenRouter`.
        fusion: a `nn.GroupFusion` after each routed output.
        balance_loss_weight: of the mean balance loss in the loss.

    Raises:
        ValueError: sizes that do not fit, an unknown choice.
    """

    vocab_size: int = 32_000
    hidden_size: int = 1024
    intermediate_size: int = 2560
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    num_groups: int = 16
    num_shared: int = 6
    top_k: int = 2
    sparse_attention: bool = True
    sparse_feed_forward: bool = True
    route_in: bool = True
    route_out: bool = True
    gates: str = "in"
    scale_mode: str = "sum"
    renormalise: bool = False
    fusion: bool = True
    balance_loss_weight: float = 0.01

    def __post_init__(self) -> None:
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "max_position_embeddings",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads must divide hidden_size {self.hidden_size} where head_dim is None, "
                f"got {self.num_attention_heads}"
            )
        if self.heads_dim % 2:
            raise ValueError(f"rotary positions need an even head_dim, got {self.heads_dim}")
        if self.kv_heads < 1 or self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"num_key_value_heads must divide num_attention_heads {self.num_attention_heads}, got {self.kv_heads}"
            )
        if self.num_groups and self.hidden_size % self.num_groups:
            raise ValueError(f"num_groups must divide hidden_size {self.hidden_size}, got {self.num_groups}")
        for name, choices in (("gates", ("in", "out", "both", "none")), ("scale_mode", SCALE_MODES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")

    @property
    def kv_heads(self) -> int:
        return self.num_attention_heads if self.num_key_value_heads is None else self.num_key_value_heads

    @property
    def heads_dim(self) -> int:
        """Dimensions of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def sparse(self) -> bool:
        """Whether anything is routed."""
        return self.num_groups > 0 and (self.sparse_attention or self.sparse_feed_forward)

    @classmethod
    def preset(cls, size: str = "355M", setting: str = "50%", **fields: Any) -> MoHDConfig:
        """A decoder of "355M", "495M" or "1.13B" parameters, "dense", at "50%" or "75%" activation, or "2x", "3x", "4x"
        as wide with as many dimensions in use as the dense one has ("2x" and wider: groups of the same number).

        Raises:
            ValueError: another size or setting.
        """
        if size not in _SIZES:
            raise ValueError(f"size must be one of {', '.join(_SIZES)}, got {size!r}")
        if setting not in ("dense", *_SETTINGS):
            raise ValueError(f"setting must be one of dense, {', '.join(_SETTINGS)}, got {setting!r}")
        hidden, intermediate, layers, heads = _SIZES[size]
        wider, groups, shared, routed = _SETTINGS.get(setting, (1, 0, 0, 0))
        sizes = {
            "hidden_size": hidden * wider,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "head_dim": hidden // heads,
            "num_groups": groups,
            "num_shared": shared,
            "top_k": routed,
        }
        return cls(**{**sizes, **fields})


@dataclasses.dataclass
class MoHDOutput(Output):
    """Attributes:
    loss: a scalar, where labels were given: the mean cross-entropy of the next token, plus the weighted balance loss.
    logits: [B, S, vocab], 0 at padded tokens, or [total, vocab] where packed ids were given.
    balance_loss: the mean over routers, a scalar; None for a dense model.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    balance_loss: Tensor | None = None


class KeyValueCache:
    """Keys and values of all layers of B sequences, each at its own length, in one buffer allocated once.

    Args:
        config: of the model.
        batch_size: B.
        capacity: tokens that a sequence can come to.
        device, dtype: of the buffer.
    """

    def __init__(
        self, config: MoHDConfig, batch_size: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (config.num_hidden_layers, 2, batch_size, capacity, config.kv_heads, config.heads_dim)
        self.buffer = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = [0] * batch_size

    def append(self, layer: int, key: Tensor, value: Tensor, rows: Tensor) -> None:
        """Writes key and value [T, Hkv, D] to rows [T] of the buffer of a layer, counted over its [B, capacity]."""
        for kind, new in enumerate((key, value)):
            self.buffer[layer, kind].flatten(0, 1).index_copy_(0, rows, new)

    def read(self, layer: int, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys and values [total, Hkv, D] of a layer: those rows, or for None the rows of a single sequence."""
        key, value = self.buffer[layer].flatten(1, 2)
        if rows is None:
            return key[: self.lengths[0]], value[: self.lengths[0]]
        return key[rows], value[rows]


@dataclasses.dataclass
class _Step:
    """What every layer of one call needs: where tokens stand, which sequences they are of, and the cache."""

    cos: Tensor
    sin: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    cache: KeyValueCache | None = None
    written: Tensor | None = None  # rows of the cache that this call writes
    kept: Tensor | None = None  # rows of the cache that queries read; None: those of one sequence, in place


class RoutedBlock(nn.Module):
    """What attention and feed-forward share: the norm, the router, the routed products, the fusion."""

    def __init__(self, config: MoHDConfig, sparse: bool, width_in: int, width_out: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        sparse = sparse and config.num_groups > 0
        self.router: HiddenRouter | None = None
        if sparse:
            self.router = HiddenRouter(
                config.hidden_size,
                config.num_groups,
                config.num_shared,
                config.top_k,
                scale_mode=config.scale_mode,
                renormalise=config.renormalise,
                gated=config.gates != "none",
            )
        self.inwards = HiddenLinear(config.hidden_size, width_in, route="in")
        self.outwards = HiddenLinear(width_out, config.hidden_size, route="out")
        self.fusion = GroupFusion(config.hidden_size, config.num_groups) if sparse and config.fusion else None
        self.route_in, self.route_out, self.gates = config.route_in, config.route_out, config.gates

    def enter(self, hidden: Tensor) -> tuple[Tensor, Routed | None]:
        """hidden [T, hidden] -> the product with what is read of it, and the choice."""
        x = self.norm(hidden)
        routed = None if self.router is None else self.router(x)
        if routed is None or not self.route_in:
            return self.inwards(x), routed
        gates = routed.gates if self.gates in ("in", "both") else None
        if not isinstance(self.inwards, HiddenLinear):  # an adapter, or another that takes the place of the layer
            return self.inwards(_gated(x, routed, gates)), routed
        return self.inwards(x, routed.plan, gates), routed

    def leave(self, x: Tensor, routed: Routed | None) -> Tensor:
        """x [T, ...] -> [T, hidden], what is added to the stream."""
        if routed is None or not self.route_out:
            out = self.outwards(x)
        else:
            gates = routed.gates if self.gates in ("out", "both") else None
            if isinstance(self.outwards, HiddenLinear):
                out = self.outwards(x, routed.plan, gates)
            else:
                out = _gated(self.outwards(x), routed, gates)
        return out if self.fusion is None else self.fusion(out)


def _gated(x: Tensor, routed: Routed, gates: Tensor | None) -> Tensor:
    """x [T, hidden], each group times its gate, 0 where the token does not use it: a routed product made of a dense."""
    factors = routed.plan.selected if gates is None else gates
    groups = x.unflatten(1, (factors.shape[1], -1))
    return (groups * factors.to(x.dtype).unsqueeze(2)).flatten(1)


class MoHDAttention(RoutedBlock):
    """Causal attention with rotary positions and grouped queries; queries, keys and values are one product."""

    def __init__(self, config: MoHDConfig) -> None:
        self.heads, self.kv_heads, self.head_dim = config.num_attention_heads, config.kv_heads, config.heads_dim
        width = self.heads * self.head_dim
        super().__init__(config, config.sparse_attention, width + 2 * self.kv_heads * self.head_dim, width)

    def forward(self, hidden: Tensor, step: _Step, layer: int) -> tuple[Tensor, Routed | None]:
        """hidden: [T, hidden] -> what is added to it, and the choice."""
        product, routed = self.enter(hidden)
        heads = (self.heads, self.kv_heads, self.kv_heads)
        query, key, value = product.unflatten(1, (-1, self.head_dim)).split(heads, 1)
        query, key = (apply_rotary(t, step.cos, step.sin) for t in (query, key))
        if step.cache is not None:
            assert step.written is not None
            step.cache.append(layer, key, value, step.written)
            key, value = step.cache.read(layer, step.kept)
        context = ops.varlen_attention(
            query,
            key,
            value,
            step.cu_seqlens_q,
            step.cu_seqlens_k,
            step.max_seqlen_q,
            step.max_seqlen_k,
            causal=True,
        )
        return self.leave(cast("Tensor", context).flatten(1), routed), routed


class MoHDFeedForward(RoutedBlock):
    """SwiGLU (arXiv 2002.05202): the product's first half through SiLU gates the second."""

    def __init__(self, config: MoHDConfig) -> None:
        super().__init__(config, config.sparse_feed_forward, 2 * config.intermediate_size, config.intermediate_size)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Routed | None]:
        """hidden: [T, hidden] -> what is added to it, and the choice."""
        product, routed = self.enter(hidden)
        gate, up = product.chunk(2, 1)
        return self.leave(F.silu(gate) * up, routed), routed


class MoHDLayer(nn.Module):
    """hidden + attention(hidden), then hidden + feed_forward(hidden), each of which normalises first."""

    def __init__(self, config: MoHDConfig) -> None:
        super().__init__()
        self.attention = MoHDAttention(config)
        self.feed_forward = MoHDFeedForward(config)

    def forward(self, hidden: Tensor, step: _Step, layer: int) -> tuple[Tensor, ...]:
        """hidden: [T, hidden] -> the same shape, and the balance losses of the routers.

        Tensors alone: the reentrant kind of checkpointing loses the gradients of what is within other things.
        """
        added, one = self.attention(hidden, step, layer)
        hidden = hidden + added
        added, other = self.feed_forward(hidden)
        return hidden + added, *(routed.balance_loss for routed in (one, other) if routed is not None)


class MoHDForCausalLM(Model, CheckpointedLayers):
    """The decoder with its language-model head.

    With every group shared, gates "none" (or a scale that makes them 1) and fusion at its beginning, it computes what
    the dense decoder with the same weights computes.
    """

    def __init__(self, config: MoHDConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MoHDLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.apply(self._init_weights)
        if config.tie_word_embeddings:
            self.head.weight = self.tokens.weight

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)

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
        hidden, losses = self._run(input_ids, _Step(cos, sin, offsets, offsets, longest, longest))
        logits = self.head(hidden)
        balance = torch.stack(losses).mean() if losses else None
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits, _next_tokens(labels, packing), ignore_index=IGNORED)
            if balance is not None:
                loss = loss + self.config.balance_loss_weight * balance
        return MoHDOutput(loss, packing.unpack(logits) if padded else logits, balance)

    def _rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return rotary_tables(positions, self.config.heads_dim, self.config.rope_theta)

    def _run(self, ids: Tensor, step: _Step) -> tuple[Tensor, list[Tensor]]:
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
        eos_token_id: int | None = None,
        generator: torch.Generator | None = None,
    ) -> list[Tensor]:
        """Continues each prompt, with a cache of keys and values; prompts need not be equally long.

        Args:
            prompts: B int64 tensors, each of at least one token; or one tensor, [B, length] or for one prompt [length].
            max_new_tokens: at most so many are added to each.
            temperature: 0 takes the most probable token, above it one is drawn.
            eos_token_id: ends a sequence, and is its last token.
            generator: of the draws.

        Returns:
            B int64 tensors: prompts and what follows.

        Raises:
            ValueError: no prompts, an empty one, or one that would come to more than max_position_embeddings tokens.
        """
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
        texts = [prompt.to(device) for prompt in prompts]
        active, new = list(range(len(prompts))), list(texts)
        for _ in range(max_new_tokens):
            logits = self._decode(new, active, cache)
            if temperature > 0:
                chosen = torch.multinomial((logits.float() / temperature).softmax(1), 1, generator=generator)
            else:
                chosen = logits.argmax(1, keepdim=True)
            for b, token in zip(active, chosen, strict=True):
                texts[b] = torch.cat((texts[b], token))
            if eos_token_id is not None:
                ended = (chosen.squeeze(1) == eos_token_id).tolist()
                chosen = chosen[[i for i, end in enumerate(ended) if not end]]
                active = [b for b, end in zip(active, ended, strict=True) if not end]
                if not active:
                    break
            new = list(chosen)
        return texts

    def _decode(self, new: list[Tensor], active: list[int], cache: KeyValueCache) -> Tensor:
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
        step = _Step(
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
        hidden, _ = self._run(torch.cat(new), step)
        return self.head(hidden[step.cu_seqlens_q[1:] - 1])


def _offsets(lengths: list[int], device: torch.device) -> Tensor:
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(device, torch.int32)


def _ranks(packing: Packing) -> Tensor:
    """int64 [total]: the place of each token in its sequence, holes left out."""
    rows = torch.arange(packing.total, device=packing.cu_seqlens.device)
    sequence = torch.searchsorted(packing.cu_seqlens[1:].contiguous(), rows.int(), right=True)
    return rows - packing.cu_seqlens[sequence.clamp(max=packing.batch_size - 1)]


def _next_tokens(labels: Tensor, packing: Packing) -> Tensor:
    """labels [total] one place earlier, and none for the last token of each sequence."""
    following = F.pad(labels[1:], (0, 1), value=IGNORED)
    rows = torch.arange(packing.total, device=labels.device)
    last = torch.isin(rows + 1, packing.cu_seqlens[1:])
    return following.masked_fill(last, IGNORED)
