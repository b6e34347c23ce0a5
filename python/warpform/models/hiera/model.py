"""Hiera (arXiv 2306.00989) without a head, and the initial weights of Hiera and TurboViT."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from ...nn import AddBiasResidualLayerNorm
from ..common.checks import check_shape, refuse_arguments
from ..common.convertible import ConvertibleModel
from ..common.init import NORMS
from ..common.outputs import Output
from ..common.pretrained import PretrainedModel
from .config import HieraConfig
from .trunk import HieraEmbeddings, HieraTrunk, checked_units
from .units import Units


@dataclasses.dataclass
class HieraOutput(Output):
    """The output of Hiera without a head. K is the largest number of units that an image keeps.

    Attributes:
        last_hidden_state: [batch, tokens, hidden], not normalised, in the order of transformers. With left out units
            tokens are those of K units, 0 where an image keeps fewer.
        pooler_output: [batch, hidden], the normalised mean over tokens, or None for a model without a pooler.
        bool_masked_pos: bool [batch, units], True for units that are kept, or None where all are.
        ids_restore: int64 [batch, units], the rank of each unit in the noise that chose, or None.
        hidden_states: on request, the embeddings and the output of every stage, [batch, tokens, channels].
        attentions: always None, for callers that look.
        reshaped_hidden_states: on request, the same as [batch, height, width, channels]; with left out units
            [batch, K, height and width of a unit, channels].
    """

    last_hidden_state: Tensor
    pooler_output: Tensor | None = None
    bool_masked_pos: Tensor | None = None
    ids_restore: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: None = None
    reshaped_hidden_states: tuple[Tensor, ...] | None = None


class HieraWeights(PretrainedModel):
    """The initial weights of Hiera and TurboViT, as published: all biases begin with initializer_range, and not with 0.

    Those of normalisations do too.
    """

    def init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.constant_(module.bias, std)
        elif isinstance(module, NORMS):
            nn.init.constant_(module.weight, self.config.layer_norm_init)
            nn.init.constant_(module.bias, std)  # type: ignore[arg-type]
        elif isinstance(module, HieraEmbeddings):
            nn.init.trunc_normal_(module.position_embeddings, std=std)


class HieraModel(HieraWeights, ConvertibleModel):
    """Hiera without a head. Called as `transformers.HieraModel`.

    Args:
        config: its options.
        add_pooling_layer: whether there is a pooler; without one `pooler_output` is None.
        is_mae: whether a call without bool_masked_pos leaves out the config's mask_ratio of units, drawn for each
            image, as for pre-training.
    """

    config_class = HieraConfig
    transformers_class = "HieraModel"
    transformers_config_class = "HieraConfig"
    weight_prefix = "hiera."
    ignored_weights = ("classifier.", "decoder.", "encoder_norm.", "multiscale_fusion.", "hidden_states_norms.")
    optional_module = "pooler"

    def __init__(self, config: HieraConfig, add_pooling_layer: bool = True, is_mae: bool = False) -> None:
        super().__init__()
        self.config = config
        self.is_mae = is_mae
        self.trunk = HieraTrunk(config)
        self.norm = AddBiasResidualLayerNorm(config.hidden_size, config.layer_norm_eps) if add_pooling_layer else None
        self.apply(self.init_weights)

    @classmethod
    def build(cls, config: HieraConfig, *, with_optional: bool = True) -> HieraModel:
        return cls(config, add_pooling_layer=with_optional)

    def adopt(self, hf_model: nn.Module) -> None:
        self.is_mae = bool(getattr(hf_model.get_submodule("embeddings"), "is_mae", False))

    def transformers_options(self) -> dict[str, Any]:
        return {"add_pooling_layer": self.norm is not None, "is_mae": self.is_mae}

    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        *,
        noise: Tensor | None = None,
        output_hidden_states: bool | None = None,
        interpolate_pos_encoding: bool | None = None,
        return_dict: bool | None = None,
        **unsupported: Any,
    ) -> HieraOutput | tuple[Any, ...]:
        """Images whose sides patch_stride * masked_unit_size divides, as in the original; others are refused.

        Args:
            pixel_values: [batch, channels, height, width], of image_size.
            bool_masked_pos: bool or integers [batch, units], units row by row: 1 for those that are kept, any number
                an image (masked autoencoding). None keeps all.
            noise: [batch, units], in place of random numbers: with is_mae the units of the smallest are kept.
            output_hidden_states: also return the embeddings and the output of every stage. None = as the config says.
            interpolate_pos_encoding: resizes positions for images of another size.
            return_dict: False returns a tuple. None = as the config says.
            **unsupported: other arguments of the transformers model, accepted when None or False.

        Raises:
            TypeError: bool_masked_pos of another dtype.
            ValueError: pixel_values or bool_masked_pos of another shape; an argument that is not supported, by name.
        """
        name, config = type(self).__name__, self.config
        refuse_arguments(name, unsupported)
        units = self.trunk.order(name, pixel_values, bool(interpolate_pos_encoding))
        kept = checked_units(name, bool_masked_pos, pixel_values.shape[0], units)
        ids_restore = None
        if kept is None and self.is_mae:
            kept, ids_restore = self.choose_units(pixel_values, units, noise)
        run = self.trunk(pixel_values, units, kept, interpolate_pos_encoding=bool(interpolate_pos_encoding))
        last = len(config.depths) - 1
        flat = units.reversed(run.padded(run.states[-1]), config.poolings(last))
        pooled = None if self.norm is None else self.norm(run.mean(), None, None)
        output = HieraOutput(flat, pooled, kept, ids_restore)
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        if output_hidden_states:
            padded = [
                (run.padded(state), pooled) for state, pooled in zip(run.states, self.state_poolings(), strict=True)
            ]
            output.hidden_states = tuple(units.reversed(state, pooled) for state, pooled in padded)
            join = units.join if kept is None else units.join_units
            output.reshaped_hidden_states = tuple(join(state, pooled) for state, pooled in padded)
        if return_dict is None:
            return_dict = config.return_dict
        return output if return_dict else output.to_tuple()

    def state_poolings(self) -> list[int]:
        """How often the tokens of the embeddings and of each stage are pooled."""
        return [0, *(self.config.poolings(stage) for stage in range(len(self.config.depths)))]

    def choose_units(self, pixel_values: Tensor, units: Units, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """The units of each image that are kept, bool [batch, units], and the rank of each, int64 [batch, units].

        noise: as of `forward`; None draws it.
        """
        shape = (pixel_values.shape[0], units.count)
        check_shape(type(self).__name__, "noise", noise, shape)
        if noise is None:
            noise = torch.rand(shape, device=pixel_values.device)
        ranks = noise.argsort(1).argsort(1)
        return ranks < int(units.count * (1 - self.config.mask_ratio)), ranks

    def weight_names(self) -> dict[str, tuple[str, ...]]:
        both = {"trunk.embeddings.projection": "embeddings.patch_embeddings.projection"}
        if self.norm is not None:
            both["norm"] = "pooler.layernorm"
        for stage, blocks in enumerate(self.trunk.stages):
            for i, block in enumerate(blocks.children()):
                ours, theirs = f"trunk.stages.{stage}.{i}", f"encoder.stages.{stage}.layers.{i}"
                both |= {
                    f"{ours}.attention.qkv": f"{theirs}.attn.qkv",
                    f"{ours}.attention.out": f"{theirs}.attn.proj",
                    f"{ours}.attention_norm": f"{theirs}.layernorm_before",
                    f"{ours}.feed_forward.up": f"{theirs}.mlp.fc1",
                    f"{ours}.feed_forward.down": f"{theirs}.mlp.fc2",
                    f"{ours}.feed_forward_norm": f"{theirs}.layernorm_after",
                }
                if block.projection is not None:
                    both[f"{ours}.projection"] = f"{theirs}.proj"
        names: dict[str, tuple[str, ...]] = {
            "trunk.embeddings.position_embeddings": ("embeddings.position_embeddings",)
        }
        for ours, theirs in both.items():
            for leaf in ("weight", "bias"):
                names[f"{ours}.{leaf}"] = (f"{theirs}.{leaf}",)
        return names
