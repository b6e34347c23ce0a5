"""Chain-of-Model (arXiv 2505.11820): a LLaMA whose first chains of hidden dimensions are smaller models by themselves.

CoLM-Air is the same with the keys and values of the first chain for all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ..nn.cache import Caches
from ..nn.chain import (
    ChainAttentionCore,
    ChainEmbedding,
    ChainGatedActivation,
    ChainHead,
    ChainLinear,
    ChainRMSNorm,
    checked_chains,
)
from ..nn.stack import Branch, Stack, Step, at_step
from ..packing import Packing
from .common.outputs import HeadOutput
from .decoder.base import CausalLM
from .decoder.config import DecoderConfig
from .decoder.inputs import Inputs
from .decoder.model import DecoderForCausalLM

__all__ = ["CoLMConfig", "CoLMForCausalLM"]


@dataclasses.dataclass
class CoLMConfig(DecoderConfig):
    """The options of a Chain-of-Model. Widths and heads are those of all chains together.

    `CoLMConfig.preset("1B", chains=(8, 24))` has the shapes of LLaMA-3.2-1B with a vocabulary of 32,000. The paper has
    chains of (16, 16), (8, 8, 8, 8), (8, 8, 16) and (8, 24) of them.

    Attributes:
        chains: C. Chain i has c_i / sum(C) of every width and of the heads; sum(C) divides the number of heads. One
            chain is a LLaMA.
        share_kv: CoLM-Air: the first chain has all keys and values. num_key_value_heads are its own, and head r of a
            chain reads the one numbered r mod num_key_value_heads.

    Raises:
        ValueError: chains that do not divide the heads or a width, and as `DecoderConfig`.
    """

    model_type = "colm"
    other_model_types: ClassVar[tuple[str, ...]] = ()
    presets = {
        "1B": {
            "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
            "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "chains": (16, 16),
        },
    }  # fmt: skip

    chains: tuple[int, ...] = (1,)
    share_kv: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.chains = tuple(self.chains)
        if not self.chains or any(isinstance(c, bool) or not isinstance(c, int) or c < 1 for c in self.chains):
            raise self.error(f"chains must be at least one integer of at least 1, got {self.chains}")
        heads, total = self.num_attention_heads, sum(self.chains)
        if heads % total:
            raise self.error(f"the sum of chains must divide num_attention_heads {heads}, got {self.chains}")
        for name in ("hidden_size", "intermediate_size", *(() if self.share_kv else ("num_key_value_heads",))):
            width = self.kv_heads if name == "num_key_value_heads" else getattr(self, name)
            if any(c * width % total for c in self.chains):
                raise self.error(f"chains must be whole parts of {name} {width}, got {self.chains}")
        if self.share_kv and any(count % self.kv_heads for count in self.shares(heads)):
            raise self.error(
                f"num_key_value_heads must divide the heads of every chain, {self.shares(heads)}, with share_kv, "
                f"got {self.num_key_value_heads}"
            )

    def shares(self, width: int) -> tuple[int, ...]:
        """How much of a width, or of a number of heads, each chain has."""
        return tuple(c * width // sum(self.chains) for c in self.chains)

    def with_chains(self, chains: Sequence[int]) -> CoLMConfig:
        """The config of other chains as wide as these for their numbers.

        Raises:
            ValueError: widths or heads that come to no whole number, and as for a config.
        """
        fields: dict[str, Any] = {"chains": tuple(chains)}
        wider = ["hidden_size", "intermediate_size", "num_attention_heads"]
        if self.share_kv:
            fields["num_key_value_heads"] = self.kv_heads
        elif self.num_key_value_heads is not None:
            wider.append("num_key_value_heads")
        for name in wider:
            fields[name], rest = divmod(getattr(self, name) * sum(chains), sum(self.chains))
            if rest:
                raise self.error(f"{name} {getattr(self, name)} of chains {self.chains} has no share for {chains}")
        return dataclasses.replace(self, **fields)


@dataclasses.dataclass
class CoLMOutput(HeadOutput):
    """The output of a Chain-of-Model.

    Attributes:
        loss: a scalar, where labels were given: that of the last chain in use, or with all_chains the mean over the
            chains in use, each counting alike.
        logits: of the last chain in use, [batch, seqlen, vocab], 0 at padded tokens, or [total, vocab].
        chain_losses: with labels and all_chains, [chains in use].
        chain_logits: with all_chains, for each chain in use its logits.
    """

    chain_losses: Tensor | None = None
    chain_logits: tuple[Tensor, ...] | None = None


class CoLMForCausalLM(CausalLM):
    """A decoder of chains with a language-model head for each of them.

    A chain sees itself and the chains before it. So the first k chains are a model by themselves: `chains=k` computes
    it alone, `submodel(k)` takes it out, and `expand` adds chains to a trained model. Every parameter belongs to one
    chain; where the first ones are frozen (Chain Tuning) they get no gradient, and none is computed.
    """

    config_class = CoLMConfig
    config: CoLMConfig

    # ---- the parts ----

    def make_tokens(self) -> nn.Module:
        return ChainEmbedding(self.config.vocab_size, self.config.shares(self.config.hidden_size))

    def make_stack(self) -> Stack:
        layers = range(self.config.num_hidden_layers)
        return Stack(branch for layer in layers for branch in (self._attention(layer), self._feed_forward()))

    def make_norm(self) -> nn.Module:
        return ChainRMSNorm(self.config.shares(self.config.hidden_size), self.config.rms_norm_eps)

    def make_head(self) -> nn.Module:
        return ChainHead(self.config.shares(self.config.hidden_size), self.config.vocab_size)

    def tie_head(self) -> None:
        self.head.weights = self.tokens.weights

    def _attention(self, layer: int) -> Branch:
        config = self.config
        heads, sizes = config.shares(config.num_attention_heads), config.shares(config.hidden_size)
        of_first = (config.kv_heads, *[0] * (len(heads) - 1))
        core = ChainAttentionCore(
            heads,
            of_first if config.share_kv else config.shares(config.kv_heads),
            config.heads_dim,
            share_kv=config.share_kv,
            window=config.window(layer),
            rope_theta=config.rope_theta,
            rope_scaling=config.rope_scaling,
        )
        return Branch(
            self.make_norm(),
            ChainLinear(sizes, core.widths, config.has_qkv_bias),
            core,
            ChainLinear([count * config.heads_dim for count in heads], sizes, config.attention_bias),
        )

    def _feed_forward(self) -> Branch:
        config = self.config
        sizes, inner = config.shares(config.hidden_size), config.shares(config.intermediate_size)
        return Branch(
            self.make_norm(),
            ChainLinear(sizes, [2 * size for size in inner], config.mlp_bias),
            ChainGatedActivation(inner, config.hidden_act),
            ChainLinear(inner, sizes, config.mlp_bias),
        )

    def init_weights(self, module: nn.Module) -> None:
        super().init_weights(module)
        if isinstance(module, ChainLinear | ChainEmbedding | ChainHead):
            for weight in module.weights:
                nn.init.normal_(weight, std=self.config.initializer_range)
            for bias in getattr(module, "biases", None) or ():
                nn.init.zeros_(bias)
        elif isinstance(module, ChainRMSNorm):
            for weight in module.weights:
                nn.init.ones_(weight)

    # ---- whole sequences ----

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        chains: int | None = None,
        all_chains: bool = False,
        labels: Tensor | None = None,
        packing: Packing | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **unsupported: Any,
    ) -> CoLMOutput:
        """As of `DecoderForCausalLM`, with the first chains or with the results of each.

        Args:
            input_ids, attention_mask, labels, packing: as of `DecoderForCausalLM`.
            inputs_embeds: of all chains, [B, S, hidden] or [total, hidden], in place of input_ids.
            position_ids, num_items_in_batch, **unsupported: as of `DecoderForCausalLM`.
            chains: runs so many of the first chains and nothing of the others. None: all.
            all_chains: gives the logits, and where there are labels the losses, of every chain in use, in one pass; the
                loss is the mean of them.

        Returns:
            CoLMOutput.

        Raises:
            ValueError: chains that there are not, and as of `DecoderForCausalLM`.
        """
        self.refuse(unsupported)
        checked_chains(type(self).__name__, chains, len(self.config.chains))
        inputs = self.read(input_ids, attention_mask, labels, packing, inputs_embeds, position_ids, num_items_in_batch)
        step = inputs.step(chains=chains)
        if not all_chains:
            out = self.run(inputs, step)
            return CoLMOutput(out.loss, out.logits)
        hidden = self.stack(self.embed(inputs, step), step, self.norm)
        each = cast("ChainHead", self.head).of_each(hidden, chains)
        losses = None if labels is None else torch.stack([self.loss(logits, inputs, step) for logits in each])
        restored = tuple(inputs.restore(logits) for logits in each)
        loss = None if losses is None else losses.mean()
        return CoLMOutput(loss, restored[-1], chain_losses=losses, chain_logits=restored)

    def embed(self, inputs: Inputs, step: Step) -> Tensor:
        """What the chains in use read, [total, their width]."""
        return super().embed(inputs, step)[:, : sum(self.config.shares(self.config.hidden_size)[: step.chains])]

    # ---- generation ----

    @torch.no_grad()
    def decode(
        self,
        tokens: Sequence[Tensor],
        caches: Caches,
        rows: Sequence[int] | None = None,
        *,
        prefill_chains: int | None = None,
        **options: Any,
    ) -> Tensor:
        """As `CausalLM.decode`. With prefill_chains all tokens but the last of each are run with so many chains alone.

        Raises:
            ValueError: prefill_chains without share_kv, or more than there are; and as there.
        """
        self._check_generation("decode", options.get("chains"), prefill_chains)
        if prefill_chains is not None:
            rows = range(len(caches.lengths)) if rows is None else rows
            first = [(text[:-1], row) for text, row in zip(tokens, rows, strict=False) if len(text) > 1]
            if first:
                texts, of = zip(*first, strict=True)
                step = Step.after(caches, [len(text) for text in texts], of, **{**options, "chains": prefill_chains})
                self.stack(at_step(self.tokens, torch.cat(texts), step), step)
            tokens = [text[-1:] for text in tokens]
        return super().decode(tokens, caches, rows, **options)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Tensor | Sequence[Tensor],
        max_new_tokens: int,
        *,
        chains: int | None = None,
        prefill_chains: int | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        eos_token_id: int | None = None,
        generator: torch.Generator | None = None,
    ) -> list[Tensor]:
        """Continues each prompt, as `DecoderForCausalLM.generate` does.

        Args:
            prompts, max_new_tokens, temperature, top_k, eos_token_id, generator: as of `DecoderForCausalLM.generate`.
            chains: runs so many of the first chains alone. None: all.
            prefill_chains: for CoLM-Air, whose caches hold keys and values of the first chain alone: all of a prompt
                but its last token is run with so many of the first chains. The tokens are those without, but for
                rounding. None: as many as `chains`.

        Returns:
            B int64 tensors: prompts and what follows.

        Raises:
            ValueError: as of `DecoderForCausalLM.generate`; chains that there are not, or prefill_chains without
                share_kv.
        """
        self._check_generation("generate", chains, prefill_chains)
        return self.continue_prompts(
            prompts,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            eos_token_id=eos_token_id,
            generator=generator,
            chains=chains,
            prefill_chains=prefill_chains,
        )

    def _check_generation(self, method: str, chains: int | None, prefill_chains: int | None) -> None:
        name, count = f"{type(self).__name__}.{method}", len(self.config.chains)
        checked_chains(name, chains, count)
        checked_chains(name, prefill_chains, count, "prefill_chains")
        if prefill_chains is not None and not self.config.share_kv:
            raise ValueError(
                f"{name}: prefill_chains must be None without share_kv, where every chain has keys of its own, "
                f"got {prefill_chains}"
            )

    # ---- other sizes of the same model ----

    def submodel(self, chains: int) -> CoLMForCausalLM:
        """The model of the first chains, a copy. Its logits are those of this model with so many chains.

        Raises:
            ValueError: 0 chains, or more than there are.
        """
        count = checked_chains(f"{type(self).__name__}.submodel", chains, len(self.config.chains))
        with torch.device("meta"):
            model = type(self)(self.config.with_chains(self.config.chains[:count]))
        own = self.state_dict()
        model.load_state_dict({name: own[name].clone() for name in model.state_dict()}, assign=True)
        return self._as_here(model)

    def expand(self, chains: int | Sequence[int]) -> CoLMForCausalLM:
        """A model with more chains behind those of this one, whose weights it has copies of.

        Weights of the new chains are drawn, but that their columns of the head are 0: the logits stay what they are.
        Where the head is tied, the new columns of the embedding are 0 with it.

        Args:
            chains: c of each new chain, in the units of `CoLMConfig.chains`, or of the only one.

        Raises:
            ValueError: chains for which the new config has no whole widths or heads.
        """
        added = (chains,) if isinstance(chains, int) else tuple(chains)
        model = type(self)(self.config.with_chains((*self.config.chains, *added)))
        with torch.no_grad():
            for weight in cast("ChainHead", model.head).weights:
                weight.zero_()
        model.to(self.device, self.dtype).load_state_dict(self.state_dict(), strict=False)
        return self._as_here(model)

    def _as_here(self, model: CoLMForCausalLM) -> CoLMForCausalLM:
        """The model, in the mode of this one, with what is frozen here frozen."""
        trained = {name: parameter.requires_grad for name, parameter in self.named_parameters()}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained.get(name, True))
        return model.train(self.training)

    @classmethod
    def from_decoder(cls, decoder: DecoderForCausalLM, *, share_kv: bool = False) -> CoLMForCausalLM:
        """A model of one chain from a LLaMA, a copy, for `expand`. Its unit of chains is a head.

        Args:
            decoder: of `models.from_transformers`, say.
            share_kv: whether further chains are to read the keys and values of this one.
        """
        fields = decoder.config.dense_fields()
        with torch.device("meta"):
            model = cls(CoLMConfig(**fields, chains=(decoder.config.num_attention_heads,), share_kv=share_kv))
        theirs = decoder.state_dict()
        state = {name: theirs[_dense_name(name)].clone() for name in model.state_dict()}
        if share_kv:
            _order_heads(model.config, state, to_dense=False)
        model.load_state_dict(state, assign=True)
        return model.train(decoder.training)

    def to_transformers(self) -> nn.Module:
        """A transformers model, `LlamaForCausalLM` unless the config says otherwise, with copies of the weights.

        Raises:
            ValueError: there are several chains. `submodel(1)` has the first alone.
            ImportError: transformers is not installed.
        """
        if len(self.config.chains) > 1:
            raise ValueError(
                f"{type(self).__name__}.to_transformers: there must be one chain, as submodel(1) has, "
                f"got {len(self.config.chains)}"
            )
        state = self.state_dict()
        if self.config.share_kv:
            _order_heads(self.config, state, to_dense=True)
        with torch.device("meta"):
            dense = DecoderForCausalLM(DecoderConfig(**self.config.dense_fields()))
        dense.load_state_dict({_dense_name(name): weight for name, weight in state.items()}, assign=True)
        return dense.train(self.training).to_transformers()


def _dense_name(name: str) -> str:
    """What a dense decoder calls a weight of the first chain."""
    return name.replace(".weights.0", ".weight").replace(".biases.0", ".bias")


def _order_heads(config: CoLMConfig, state: dict[str, Tensor], *, to_dense: bool) -> None:
    """Puts the heads of queries of one chain with share_kv into the order of LLaMA, or back, in a state dict.

    There query head h reads key head h // (heads / keys), here h mod keys.
    """
    heads, keys, dim = config.num_attention_heads, config.kv_heads, config.heads_dim
    order = torch.arange(heads * dim).view(heads // keys, keys, dim).transpose(0, 1).flatten()
    order = order if to_dense else order.argsort()
    for name, weight in state.items():
        # Attention stands at even places of the stack.
        part = name.split(".")
        if part[0] != "stack" or int(part[2]) % 2:
            continue
        index = order.to(weight.device)
        if part[3] == "inwards":
            state[name] = torch.cat((weight[: len(index)][index], weight[len(index) :]))
        elif part[3] == "outwards" and part[4] == "weights":
            state[name] = weight[:, index]
