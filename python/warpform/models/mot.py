"""Mixture-of-Transformers (arXiv 2411.04996): every weight of a layer by modality, attention over all tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..nn.cache import Caches
from ..nn.classes import ClassLayerNorm, ClassLinear, ClassRMSNorm
from ..nn.cores import GatedActivation
from ..nn.stack import Branch, Stack
from ..ops import RoutingPlan
from ..packing import Packing
from .common.checks import check_shape
from .common.outputs import HeadOutput
from .common.pretrained import check_names, load_weights
from .decoder.base import CausalLM
from .decoder.branches import attention_core
from .decoder.config import DecoderConfig
from .decoder.model import DecoderForCausalLM

__all__ = ["MoTConfig", "MoTForCausalLM"]

_SIZES = {
    "37M": (4, 256, 8, 768),
    "94M": (8, 512, 8, 1536),
    "443M": (24, 1024, 16, 2816),
    "1.5B": (24, 2048, 16, 5632),
    "7B": (32, 4096, 32, 11_008),
}


@dataclasses.dataclass
class MoTConfig(DecoderConfig):
    """The options of a Mixture-of-Transformers. Sizes by default are those of the 7B model.

    Presets are named by the matrices that a token uses, embeddings and head among them, whatever num_classes is: a
    model has 2 vocab_size d + num_classes layers (4 d^2 + 3 d f) weights in matrices.

    Attributes:
        num_classes: modalities, each with its own weights.
        qk_norm: how queries and keys are normalised, by modality: "rms", RMSNorm with a weight [head_dim]; "layer",
            LayerNorm with a weight and a bias for each head, as Chameleon has; None: not at all.
        others: as of `DecoderConfig`.

    Raises:
        ValueError: num_classes below 1, another qk_norm; as `DecoderConfig`.
    """

    model_type = "mot"
    other_model_types = ()
    positive = (*DecoderConfig.positive, "num_classes")
    choices = {**DecoderConfig.choices, "qk_norm": (None, "rms", "layer")}
    presets = {
        name: {"num_hidden_layers": layers, "hidden_size": d, "num_attention_heads": heads, "intermediate_size": f}
        for name, (layers, d, heads, f) in _SIZES.items()
    }

    vocab_size: int = 65_536
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    num_classes: int = 2
    qk_norm: str | None = None

    @classmethod
    def from_transformers(cls, fields: Mapping[str, Any], **overrides: Any) -> MoTConfig:
        """From the fields of a ChameleonConfig of transformers. Those of its image tokens are ignored.

        Raises:
            ValueError: no swin_norm, or an option that is not supported.
            TypeError: an override that is no field.
        """
        llama = {**fields, "model_type": "llama"}
        config = super().from_transformers(llama, **{"qk_norm": "layer", **overrides})
        if fields.get("model_type") != "chameleon" or not fields.get("swin_norm"):
            raise cls.error(
                "fields must be those of a Chameleon with swin_norm=True, whose norms stand on the output, got "
                f"model_type={fields.get('model_type')!r} and swin_norm={fields.get('swin_norm')!r}"
            )
        return cast("MoTConfig", config)


class MoTForCausalLM(CausalLM):
    """A decoder whose layers have weights for each modality, which are called classes of tokens here.

    With c the class of token i: h_i = x_i + Norm_c(O_c a_i), y_i = h_i + Norm_c(FFN_c(h_i)), where a is attention over
    all tokens up to i, of any class, with q_i = Q_c x_i and so on. All weights but the embeddings and the head are by
    class, the norm before the head too.

    A token's class says which weights read it, not what comes next: the head gives logits over the whole vocabulary.

    Args:
        config: its options.
    """

    config_class = MoTConfig
    drawn_convolutions = (ClassLinear,)
    config: MoTConfig

    def make_stack(self) -> Stack:
        """Attention and feed-forward of every layer."""
        config, width = self.config, self.config.num_attention_heads * self.config.heads_dim
        branches = []
        for layer in range(config.num_hidden_layers):
            norms = {"q_norm": self._head_norm(config.num_attention_heads), "k_norm": self._head_norm(config.kv_heads)}
            core = attention_core(config, layer, **norms)
            has_biases = (config.has_qkv_bias, config.attention_bias)
            branches.append(self._branch(core, core.width, width, has_biases))
            wide = config.intermediate_size
            activation = GatedActivation(config.hidden_act)
            branches.append(self._branch(activation, 2 * wide, wide, (config.mlp_bias, config.mlp_bias)))
        return Stack(branches)

    def _branch(self, core: nn.Module, wide: int, narrow: int, has_biases: tuple[bool, bool]) -> Branch:
        d, classes = self.config.hidden_size, self.config.num_classes
        return Branch(
            self.make_norm(),
            ClassLinear(d, wide, classes, has_biases[0]),
            core,
            ClassLinear(narrow, d, classes, has_biases[1]),
            placement="output",
        )

    def _head_norm(self, heads: int) -> nn.Module | None:
        config = self.config
        if config.qk_norm == "rms":
            return ClassRMSNorm(config.heads_dim, config.num_classes, config.rms_norm_eps)
        return ClassLayerNorm((heads, config.heads_dim), config.num_classes) if config.qk_norm == "layer" else None

    def make_norm(self) -> nn.Module:
        """The norm between the stack and the head, by class."""
        return ClassRMSNorm(self.config.hidden_size, self.config.num_classes, self.config.rms_norm_eps)

    # ---- whole sequences ----

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        classes: Tensor | None = None,
        labels: Tensor | None = None,
        packing: Packing | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **unsupported: Any,
    ) -> HeadOutput:
        """As `CausalLM.forward`, with the class of each token.

        Args:
            classes: integers from 0 to num_classes - 1, [B, S] or [total] as input_ids is; of padding, anything. None:
                all tokens are of class 0.
            input_ids, attention_mask, labels, packing, inputs_embeds: as of `CausalLM.forward`.
            position_ids, num_items_in_batch, **unsupported: as of `CausalLM.forward`.

        Returns:
            HeadOutput: loss, where labels were given; logits [B, S, vocab], 0 at padded tokens, or [total, vocab].

        Raises:
            TypeError: classes that are not integers.
            ValueError: classes of another shape; a class that there is not, which is seen on a CPU and with
                WARPFORM_VALIDATE=1, and elsewhere counts as the nearest; as `CausalLM.forward`.
        """
        self.refuse(unsupported)
        inputs = self.read(input_ids, attention_mask, labels, packing, inputs_embeds, position_ids, num_items_in_batch)
        packed = inputs.of_tokens("classes", classes)
        if packed is not None and not packed.is_floating_point():
            packed = packed.masked_fill(inputs.packing.indices < 0, 0)
        return self.run(inputs, inputs.step(plan=self.plan(packed, inputs.packing.position_ids)))

    def plan(self, classes: Tensor | None, tokens: Tensor) -> RoutingPlan | None:
        """The plan of classes, integer [T]; None: class 0 for all. tokens: any tensor [T] on the device."""
        number = self.config.num_classes
        if classes is None:
            if number == 1:
                return None
            classes = torch.zeros_like(tokens, dtype=torch.int64)
        try:
            return RoutingPlan.by_class(classes, number)
        except (TypeError, ValueError) as error:
            text = str(error).replace("RoutingPlan.by_class: token_class", f"{type(self).__name__}: classes")
            raise type(error)(text) from None

    # ---- generation ----

    def decode(
        self,
        tokens: Sequence[Tensor],
        caches: Caches,
        rows: Sequence[int] | None = None,
        *,
        classes: Sequence[Tensor] | Callable[[Sequence[Tensor]], Sequence[Tensor]] | None = None,
        **options: Any,
    ) -> Tensor:
        """As `CausalLM.decode`, with the classes of the tokens: tensors like them, or a function of them; None: 0."""
        found = classes(tokens) if callable(classes) else classes
        plan = self.plan(None if found is None else torch.cat(list(found)), torch.cat(list(tokens)))
        return super().decode(tokens, caches, rows, plan=plan, **options)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Tensor | Sequence[Tensor],
        max_new_tokens: int,
        *,
        classes: Tensor | Sequence[Tensor] | None = None,
        new_classes: int | Callable[[Tensor], Tensor] = 0,
        **sampling: Any,
    ) -> list[Tensor]:
        """Continues each prompt, as `CausalLM.generate` does.

        Args:
            prompts, max_new_tokens: as of `CausalLM.generate`.
            classes: of the tokens of the prompts, integers shaped as they are. None: all are of class 0.
            new_classes: the class of every token that is added; or a function, int64 tokens [n] -> their classes [n],
                such as lambda ids: (ids >= first_image_token).long() where each modality has ids of its own.
            **sampling: temperature, top_k, eos_token_id and generator, as of `CausalLM.generate`.

        Returns:
            B int64 tensors: prompts and what follows.

        Raises:
            TypeError, ValueError: classes as of `forward`, new_classes that is no class; as `CausalLM.generate`.
        """
        name, number = f"{type(self).__name__}.generate", self.config.num_classes
        texts = [prompts] if isinstance(prompts, Tensor) and prompts.dim() == 1 else list(prompts)
        if classes is None:
            given = [torch.zeros_like(text) for text in texts]
        else:
            given = [classes] if isinstance(classes, Tensor) and classes.dim() == 1 else list(classes)
        shapes = [[list(t.shape) for t in tensors] for tensors in (texts, given)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{name}: classes must be of the prompts' shapes {shapes[0]}, got {shapes[1]}")
        if not callable(new_classes) and not 0 <= new_classes < number:
            raise ValueError(f"{name}: new_classes must be within 0 to {number - 1}, got {new_classes}")
        waiting = [[c.to(self.device) for c in given]]

        def classes_of(tokens: Sequence[Tensor]) -> Sequence[Tensor]:
            if waiting:  # the first call has the prompts
                return waiting.pop()
            new = torch.cat(list(tokens))
            found = new_classes(new) if callable(new_classes) else torch.full_like(new, new_classes)
            check_shape(name, "what new_classes returns", found, tuple(new.shape))
            return [found]

        return self.continue_prompts(texts, max_new_tokens, classes=classes_of, **sampling)

    # ---- Chameleon of transformers ----

    @classmethod
    def from_transformers(cls, chameleon: nn.Module, num_classes: int, **overrides: Any) -> MoTForCausalLM:
        """A model whose every class has the weights of a Chameleon (arXiv 2405.09818), copied: upcycling.

        Until it is trained further it is the Chameleon, whatever the classes of tokens. It gives logits of image tokens
        too, which Chameleon of transformers sets to the least number. The tokeniser of images (`vqmodel`) is not taken.

        Args:
            chameleon: a `transformers.ChameleonForConditionalGeneration` with swin_norm=True in its config.
            num_classes: of the new model.
            **overrides: other fields of the config to change.

        Raises:
            TypeError: another model, or an override that is no field of the config.
            ValueError: a model without swin_norm, with an option that is not supported, or whose weights are not the
                architecture's (quantised or with adapters); num_classes below 1.
        """
        config, theirs, names = _read_chameleon("from_transformers", chameleon, num_classes=num_classes, **overrides)
        weights = {}
        for ours, parts in names.items():
            weight = torch.cat([theirs[part].detach() for part in parts])
            weights[ours] = weight if ours in _SHARED else torch.stack([weight] * num_classes)
        what = "MoTForCausalLM.from_transformers: the weights"
        return load_weights(cls, config, weights, what).train(chameleon.training)

    def to_transformers(self, chameleon: nn.Module) -> nn.Module:
        """Writes the weights of a model with one class into a Chameleon of the same config, and returns that.

        Args:
            chameleon: a `transformers.ChameleonForConditionalGeneration`, which keeps its tokeniser of images.

        Raises:
            TypeError: another model.
            ValueError: more than one class here; a Chameleon of another config.
        """
        config, theirs, names = _read_chameleon("to_transformers", chameleon, num_classes=1)
        differing = [name for name, value in vars(config).items() if value != getattr(self.config, name)]
        if differing:
            raise ValueError(
                "MoTForCausalLM.to_transformers: chameleon must have the config of this model, and that one class, "
                f"got other {', '.join(differing)}"
            )
        state = self.state_dict()
        with torch.no_grad():
            for ours, parts in names.items():
                weight = state[ours] if ours in _SHARED else state[ours][0]
                for part, rows in zip(parts, weight.split([len(theirs[part]) for part in parts]), strict=True):
                    theirs[part].copy_(rows)
        return chameleon


_SHARED = ("tokens.weight", "head.weight")  # what all classes have together


def _read_chameleon(
    method: str, chameleon: Any, **overrides: Any
) -> tuple[MoTConfig, dict[str, Tensor], dict[str, tuple[str, ...]]]:
    """The config for a Chameleon, its parameters but those of the tokeniser of images, and which of them are ours.

    The last says for each weight here those of a Chameleon that it holds for every class, joined on dim 0.
    """
    kind, what = type(chameleon), f"MoTForCausalLM.{method}"
    if kind.__name__ != "ChameleonForConditionalGeneration" or not kind.__module__.startswith("transformers."):
        raise TypeError(
            f"{what}: chameleon must be a ChameleonForConditionalGeneration of transformers, "
            f"got {kind.__module__}.{kind.__qualname__}"
        )
    config = MoTConfig.from_transformers(chameleon.config.to_dict(), **overrides)
    theirs = {name: w for name, w in chameleon.named_parameters() if not name.startswith("model.vqmodel.")}
    with torch.device("meta"):  # outside of the norms of heads, Chameleon's names are those of a LLaMA
        names = DecoderForCausalLM(DecoderConfig(**config.dense_fields())).weight_names()
    for layer in range(config.num_hidden_layers):
        for leaf in ("q_norm.weight", "q_norm.bias", "k_norm.weight", "k_norm.bias"):
            names[f"stack.branches.{2 * layer}.core.{leaf}"] = (f"model.layers.{layer}.self_attn.{leaf}",)
    check_names(names, theirs, f"{what}: the parameters of this {kind.__name__}")
    return config, theirs, names
