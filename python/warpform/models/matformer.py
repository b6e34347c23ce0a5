"""MatFormer: one set of weights that holds feed-forwards of several widths, each inside the next (arXiv 2310.07707)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, TypeAlias, cast

import torch
from torch import Tensor, nn

from ..nn.nested import NestedFeedForward, TokenWidths
from ..nn.stack import Stack
from ..ops import _check
from ..packing import Packing
from .common.generation import check_sampling, continue_by_drafts
from .common.outputs import HeadOutput
from .common.pretrained import named_weights, set_weight
from .decoder.base import CausalLM
from .decoder.branches import attention_branch
from .decoder.config import DecoderConfig
from .decoder.inputs import Inputs
from .decoder.model import DecoderForCausalLM

Granularity: TypeAlias = "int | Sequence[int] | None"


def _matlm(hidden_size: int) -> dict[str, object]:
    return {
        "vocab_size": 256_000, "hidden_size": hidden_size, "intermediate_size": 4 * hidden_size, "gated": False,
        "hidden_act": "gelu", "num_hidden_layers": 16, "num_attention_heads": 16, "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
    }  # fmt: skip


@dataclasses.dataclass
class MatFormerConfig(DecoderConfig):
    """A LLaMA-style decoder whose feed-forwards are nested. Presets have the sizes of the paper's MatLM.

    Attributes:
        granularities: the widths of the feed-forward, increasing: integers, the last intermediate_size; or, where any
            is a float, parts of intermediate_size, the last 1.
        gated: whether the feed-forward has a gate, as LLaMA's; MatLM's has none.
        layer_sizes: for each layer the largest of the widths that it has, where layers differ, as Mix'n'Match extracts
            them. Wider granularities use all of such a layer. None: intermediate_size.

    Raises:
        ValueError: widths that are not positive whole numbers, do not increase or end below intermediate_size; another
            number of layer_sizes than of layers, or one that is no width.
    """

    model_type = "matformer"
    other_model_types: ClassVar[tuple[str, ...]] = ()
    presets = {
        "78M": _matlm(256), "180M": _matlm(512), "310M": _matlm(768), "463M": _matlm(1024), "850M": _matlm(1536),
    }  # fmt: skip

    granularities: tuple[float, ...] = (1 / 8, 1 / 4, 1 / 2, 1.0)
    gated: bool = True
    layer_sizes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.granularities = tuple(self.granularities)
        widths, full = self.widths, self.intermediate_size
        parts = self._parts()
        if (
            not widths
            or any(abs(part - width) > 1e-6 * full for part, width in zip(parts, widths, strict=True))
            or any(low >= high for low, high in zip((0, *widths), widths, strict=False))
            or widths[-1] != full
        ):
            raise self.error(
                f"granularities must be increasing widths, or parts that make whole widths, the last of all "
                f"{full} of intermediate_size, got {self.granularities}"
            )
        if self.layer_sizes is not None:
            self.layer_sizes = tuple(self.layer_sizes)
            if len(self.layer_sizes) != self.num_hidden_layers or not set(self.layer_sizes) <= set(widths):
                raise self.error(
                    f"layer_sizes must be {self.num_hidden_layers} of the widths {widths}, got {self.layer_sizes}"
                )

    def _parts(self) -> list[float]:
        unit = self.intermediate_size if any(isinstance(one, float) for one in self.granularities) else 1
        return [unit * one for one in self.granularities]

    @property
    def widths(self) -> tuple[int, ...]:
        """The hidden dimensions of the feed-forward at each granularity."""
        return tuple(round(part) for part in self._parts())

    @property
    def sizes(self) -> tuple[int, ...]:
        """The hidden dimensions that the feed-forward of each layer has in all."""
        return self.layer_sizes or (self.intermediate_size,) * self.num_hidden_layers


class MatFormerForCausalLM(CausalLM):
    """A decoder that runs at any of its granularities, one for all, for each layer or for each token.

    Attention is whole at each of them. To train all, draw one for each step with `sample`. Parameters and their names
    are those of the dense decoder, `DecoderForCausalLM`: `load_state_dict` takes the state dict of one.

    Args:
        config: its options.
    """

    config_class = MatFormerConfig
    config: MatFormerConfig

    def make_stack(self) -> Stack:
        """The branches of a decoder, with nested feed-forwards."""
        config = self.config
        feed_forwards = [
            NestedFeedForward(
                config.hidden_size,
                size,
                layer,
                activation=config.hidden_act,
                gated=config.gated,
                bias=config.mlp_bias,
                eps=config.rms_norm_eps,
            )
            for layer, size in enumerate(config.sizes)
        ]
        return Stack(part for layer, one in enumerate(feed_forwards) for part in (attention_branch(config, layer), one))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        granularity: Granularity | Tensor = None,
        labels: Tensor | None = None,
        packing: Packing | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **unsupported: Any,
    ) -> HeadOutput:
        """As of `DecoderForCausalLM`, at a granularity.

        Args:
            input_ids, attention_mask, labels, packing, inputs_embeds: as of `DecoderForCausalLM`.
            position_ids, num_items_in_batch, **unsupported: as of `DecoderForCausalLM`.
            granularity: None: full width. An integer: the place in the config's granularities, from 0 on, for all
                layers. A sequence: one for each layer (Mix'n'Match). A tensor: integers shaped as input_ids, one for
                each token; those of padding are not used. An integer in it that is none of the places is seen on a CPU
                and with WARPFORM_VALIDATE=1; elsewhere it counts as the nearest.

        Returns:
            HeadOutput: loss, where labels were given, and logits.

        Raises:
            TypeError: a granularity that is no integer.
            ValueError: as of `DecoderForCausalLM`; a granularity that there is not, another number of them than of
                layers, or a tensor of another shape.
        """
        self.refuse(unsupported)
        inputs = self.read(input_ids, attention_mask, labels, packing, inputs_embeds, position_ids, num_items_in_batch)
        if isinstance(granularity, Tensor):
            width: TokenWidths | tuple[int, ...] | None = self._token_widths(granularity, inputs)
        else:
            width = self.layer_widths(granularity)
        return self.run(inputs, inputs.step(width=width))

    def layer_widths(self, granularity: Granularity) -> tuple[int, ...] | None:
        """The width of each layer at a granularity, as of `forward`; None: all full. It is what `Step.width` takes.

        Raises:
            TypeError, ValueError: as of `forward`.
        """
        if granularity is None:
            return None
        config, layers = self.config, self.config.num_hidden_layers
        several = isinstance(granularity, Sequence) and not isinstance(granularity, str)
        chosen: list[Any] = list(cast("Sequence[int]", granularity)) if several else [granularity] * layers
        if any(isinstance(one, (bool, Tensor)) or not hasattr(one, "__index__") for one in chosen):
            raise TypeError(f"{self._wanted}, got {granularity!r}")
        if len(chosen) != layers or any(not 0 <= one < len(config.widths) for one in chosen):
            raise ValueError(f"{self._wanted}, got {granularity!r}")
        return tuple(min(config.widths[one], size) for one, size in zip(chosen, config.sizes, strict=True))

    @property
    def _wanted(self) -> str:
        config = self.config
        return (
            f"{type(self).__name__}: granularity must be None, an integer from 0 to {len(config.widths) - 1}, the "
            f"place in the widths {config.widths}, or {config.num_hidden_layers} such integers, one for each layer"
        )

    def _token_widths(self, granularity: Tensor, inputs: Inputs) -> TokenWidths:
        name, most = type(self).__name__, len(self.config.widths) - 1
        if granularity.is_floating_point() or granularity.is_complex() or granularity.dtype == torch.bool:
            raise TypeError(f"{name}: granularity must be integers, got {_check.describe(granularity)}")
        indices = cast("Tensor", inputs.of_tokens("granularity", granularity)).long()
        if _check.cheap_to_read(indices) and indices.numel():
            least, largest = (int(one) for one in indices.aminmax())
            if least < 0 or largest > most:
                raise ValueError(
                    f"{name}: granularity must be within 0 to {most}, got {least if least < 0 else largest}"
                )
        return TokenWidths(indices.clamp(0, most), self.config.widths)

    def sample(self, generator: torch.Generator | None = None) -> int:
        """A granularity drawn uniformly, for a step of training.

        Args:
            generator: of the draw; None: torch's own.
        """
        device = None if generator is None else generator.device
        return int(torch.randint(len(self.config.widths), (), generator=generator, device=device))

    def extract(self, granularity: Granularity = None) -> CausalLM:
        """The model of one granularity by itself, a copy that shares no memory with this one.

        Args:
            granularity: None, an integer, or one for each layer, as of `forward`.

        Returns:
            A `DecoderForCausalLM`, which `to_transformers()` makes a LLaMA. Where layers differ in width, or the
            feed-forward has no gate, no LLaMA is the same: it is a `MatFormerForCausalLM`, nested as before up to the
            widths that are left.

        Raises:
            TypeError, ValueError: as of `forward`; a model with adapters or other parameters besides its own.
        """
        config = self.config
        sizes = self.layer_widths(granularity) or config.sizes
        fields = {**config.dense_fields(), "intermediate_size": max(sizes)}
        widths = tuple(width for width in config.widths if width <= max(sizes))
        model: CausalLM
        with torch.device("meta"):
            if config.gated and len(set(sizes)) == 1:
                model = DecoderForCausalLM(DecoderConfig(**fields))
            else:
                fields |= {"granularities": widths, "gated": config.gated}
                fields["layer_sizes"] = None if len(set(sizes)) == 1 else sizes
                model = MatFormerForCausalLM(MatFormerConfig(**fields))
        own = named_weights(self)
        if set(own) != set(named_weights(model)):
            raise ValueError(f"{type(self).__name__}.extract: merge adapters into the model before it is extracted")
        cut = {
            f"{name}.{leaf}": weight
            for name, part in self.stack.named_modules(prefix="stack")
            if isinstance(part, NestedFeedForward)
            for leaf, weight in part.cut(sizes[part.layer]).items()
        }
        for name, weight in own.items():
            copied = cut[name] if name in cut else weight.detach().clone()
            set_weight(model, name, nn.Parameter(copied, requires_grad=weight.requires_grad))
        if config.tie_word_embeddings:
            model.tie_head()
        return model.train(self.training)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Tensor | Sequence[Tensor],
        max_new_tokens: int,
        *,
        granularity: Granularity = None,
        draft: Granularity = None,
        draft_length: int = 4,
        temperature: float = 0.0,
        top_k: int | None = None,
        eos_token_id: int | None = None,
        generator: torch.Generator | None = None,
    ) -> list[Tensor]:
        """Continues each prompt, as `DecoderForCausalLM.generate` does, at a granularity.

        Args:
            prompts, max_new_tokens, temperature, top_k, eos_token_id, generator: as of `DecoderForCausalLM.generate`.
            granularity: None, an integer, or one for each layer, as of `forward`.
            draft: a smaller granularity, which drafts tokens that this one then sees in one step; both use the same
                caches, and the tokens are those without drafts, but for rounding. None: no drafts.
            draft_length: so many tokens are drafted at a time.

        Returns:
            B int64 tensors: prompts and what follows.

        Raises:
            TypeError: a granularity that is no integer.
            ValueError: as of `DecoderForCausalLM.generate`; a granularity that there is not, a draft_length below 1, or
                drafts with a temperature.
        """
        width = self.layer_widths(granularity)
        if draft is None:
            return self.continue_prompts(
                prompts,
                max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                eos_token_id=eos_token_id,
                generator=generator,
                width=width,
            )
        name, drafted = f"{type(self).__name__}.generate", self.layer_widths(draft)
        check_sampling(name, max_new_tokens, temperature, top_k)
        if temperature > 0:
            raise ValueError(
                f"{name}: temperature must be 0 with draft, which is for likeliest tokens, got {temperature}"
            )
        if draft_length < 1:
            raise ValueError(f"{name}: draft_length must be at least 1, got {draft_length}")
        texts = self.read_prompts(prompts, max_new_tokens)
        # Drafts may pass the last position by some tokens, which are taken back.
        capacity = max(map(len, texts)) + max_new_tokens + draft_length
        caches = self.stack.caches(len(texts), capacity, self.device, self.dtype)
        return continue_by_drafts(
            lambda new, rows: self.decode(new, caches, rows, width=width),
            lambda new, rows: self.decode(new, caches, rows, width=drafted),
            lambda new, rows: self.decode_all(new, caches, rows, width=width),
            caches.rewind,
            texts,
            max_new_tokens,
            draft_length=draft_length,
            eos_token_id=eos_token_id,
        )


__all__ = ["MatFormerConfig", "MatFormerForCausalLM"]
