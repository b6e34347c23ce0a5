"""BERT (arXiv 1810.04805), padding-free (ByteTransformer, arXiv 2210.03052): packs once, unpacks once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import ACTIVATIONS, Embeddings, Encoder, EncoderLayer, FirstTokenPooler
from ..packing import Packing
from ._output import EncoderOutput
from ._registry import ConvertibleModel, config_overrides, register


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The options of a BERT encoder, under the names of transformers' `BertConfig`.

    Raises:
        ValueError: an unknown hidden_act, sizes that do not fit, a dropout outside [0, 1].
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    output_hidden_states: bool = False
    return_dict: bool = True

    def __post_init__(self) -> None:
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act must be one of {', '.join(ACTIVATIONS)}, got {self.hidden_act!r}")
        if self.num_attention_heads <= 0 or self.hidden_size % self.num_attention_heads != 0:
            raise ValueError(
                f"num_attention_heads must divide hidden_size {self.hidden_size}, got {self.num_attention_heads}"
            )
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")

    @classmethod
    def from_transformers(cls, fields: Mapping[str, Any], **overrides: Any) -> BertConfig:
        """From the fields of a transformers config. Fields that change nothing in the encoder are ignored.

        Raises:
            ValueError: an option that is not supported: is_decoder, add_cross_attention, output_attentions,
                pruned_heads, a position_embedding_type other than "absolute".
            TypeError: an override that is no field.
        """
        for name in ("is_decoder", "add_cross_attention", "output_attentions", "pruned_heads"):
            if fields.get(name):
                raise ValueError(f"BertConfig: {name}={fields[name]!r} is not supported")
        position = fields.get("position_embedding_type")
        if position not in (None, "absolute"):
            raise ValueError(f"BertConfig: position_embedding_type={position!r} is not supported, only 'absolute'")
        known = {f.name: fields[f.name] for f in dataclasses.fields(cls) if f.name in fields}
        if known.get("return_dict") is None:
            known.pop("return_dict", None)
        return cls(**{**known, **config_overrides(cls, overrides)})

    def to_transformers(self) -> dict[str, Any]:
        """The fields as keywords of transformers' `BertConfig`."""
        return dataclasses.asdict(self)


@register
class BertModel(ConvertibleModel):
    """BERT's encoder. Called as `transformers.BertModel`: same outputs at real tokens, 0 at padded ones.

    Args:
        config: its options.
        add_pooling_layer: whether there is a pooler; without one `pooler_output` is None.
    """

    config_class = BertConfig
    transformers_class = "BertModel"
    transformers_config_class = "BertConfig"
    model_type = "bert"
    weight_prefix = "bert."
    ignored_weights = ("cls.", "classifier.", "qa_outputs.", "embeddings.position_ids", "embeddings.token_type_ids")
    optional_module = "pooler"

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(
            config.vocab_size,
            config.hidden_size,
            config.max_position_embeddings,
            config.type_vocab_size,
            padding_idx=config.pad_token_id,
            eps=config.layer_norm_eps,
            dropout=config.hidden_dropout_prob,
        )
        self.encoder = Encoder(
            [
                EncoderLayer(
                    config.hidden_size,
                    config.num_attention_heads,
                    config.intermediate_size,
                    hidden_act=config.hidden_act,
                    eps=config.layer_norm_eps,
                    hidden_dropout=config.hidden_dropout_prob,
                    attention_dropout=config.attention_probs_dropout_prob,
                )
                for _ in range(config.num_hidden_layers)
            ]
        )
        self.pooler = FirstTokenPooler(config.hidden_size) if add_pooling_layer else None
        self.apply(self._init_weights)

    @classmethod
    def build(cls, config: BertConfig, *, with_optional: bool = True) -> BertModel:
        return cls(config, add_pooling_layer=with_optional)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()

    def weight_names(self) -> dict[str, tuple[str, ...]]:
        names: dict[str, tuple[str, ...]] = {
            "embeddings.tokens.weight": ("embeddings.word_embeddings.weight",),
            "embeddings.positions.weight": ("embeddings.position_embeddings.weight",),
            "embeddings.token_types.weight": ("embeddings.token_type_embeddings.weight",),
        }
        both: dict[str, tuple[str, ...]] = {"embeddings.norm": ("embeddings.LayerNorm",)}
        for i in range(self.config.num_hidden_layers):
            ours, theirs = f"encoder.layers.{i}", f"encoder.layer.{i}"
            both |= {
                f"{ours}.attention.qkv": tuple(f"{theirs}.attention.self.{x}" for x in ("query", "key", "value")),
                f"{ours}.attention.out": (f"{theirs}.attention.output.dense",),
                f"{ours}.attention_norm": (f"{theirs}.attention.output.LayerNorm",),
                f"{ours}.feed_forward.up": (f"{theirs}.intermediate.dense",),
                f"{ours}.feed_forward.down": (f"{theirs}.output.dense",),
                f"{ours}.feed_forward_norm": (f"{theirs}.output.LayerNorm",),
            }
        if self.pooler is not None:
            both["pooler.dense"] = ("pooler.dense",)
        for name, parts in both.items():
            for leaf in ("weight", "bias"):
                names[f"{name}.{leaf}"] = tuple(f"{part}.{leaf}" for part in parts)
        return names

    def transformers_options(self) -> dict[str, Any]:
        return {"add_pooling_layer": self.pooler is not None}

    def get_input_embeddings(self) -> nn.Embedding:
        """The token table, for callers that know transformers models."""
        return self.embeddings.tokens

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        packing: Packing | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **unsupported: Any,
    ) -> EncoderOutput | tuple[Any, ...]:
        """Padded: ids [batch, seqlen] and a mask of any pattern. Packed: ids [total] and their packing.

        Args:
            input_ids: int64 [batch, seqlen], or [total] with `packing`.
            attention_mask: bool or integer [batch, seqlen], nonzero = token; None = all are tokens. Not with `packing`.
            token_type_ids: as input_ids; None = type 0.
            position_ids: as input_ids, or [1, seqlen]; None = a token's place in its padded row, as in transformers.
            inputs_embeds: [batch, seqlen, hidden] or [total, hidden], in place of input_ids.
            packing: says that all inputs are packed; then outputs are packed too.
            output_hidden_states: also return the embeddings and the output of every layer. None = as the config says.
            return_dict: False returns a tuple. None = as the config says.
            **unsupported: other arguments of the transformers model, accepted when None or False.

        Returns:
            EncoderOutput. The pooler reads the first real token of each sequence: in a left-padded row transformers'
            pooler reads padding instead. Sequences without a token give zeros.

        Raises:
            ValueError: both or neither of input_ids and inputs_embeds; shapes that do not match; an argument that is
                not supported (output_attentions, past_key_values, encoder_hidden_states, a mask not 2-D), by name.
            NotImplementedError: training mode with attention_probs_dropout_prob above 0.
        """
        for name, value in unsupported.items():
            if value is not None and value is not False:
                raise ValueError(f"BertModel: {name} is not supported")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("BertModel: exactly one of input_ids and inputs_embeds must be given")
        padded = packing is None
        if packing is None:
            packing = self._packing(input_ids, inputs_embeds, attention_mask)
            shape: tuple[int, ...] = (packing.batch_size, packing.seqlen)
        else:
            if attention_mask is not None:
                raise ValueError("BertModel: attention_mask must be None where packing is given, which says it already")
            shape = (packing.total,)
        hidden_size = self.config.hidden_size
        if position_ids is not None and padded and position_ids.dim() == 2 and position_ids.shape[0] == 1:
            position_ids = position_ids.expand(shape)
        _check_shape("input_ids", input_ids, shape)
        _check_shape("token_type_ids", token_type_ids, shape)
        _check_shape("position_ids", position_ids, shape)
        _check_shape("inputs_embeds", inputs_embeds, (*shape, hidden_size))
        if padded:
            input_ids = None if input_ids is None else packing.pack(input_ids)
            token_type_ids = None if token_type_ids is None else packing.pack(token_type_ids)
            position_ids = None if position_ids is None else packing.pack(position_ids)
            inputs_embeds = None if inputs_embeds is None else packing.pack(inputs_embeds)
        if position_ids is None:
            if packing.seqlen > self.config.max_position_embeddings:
                raise ValueError(
                    "BertModel: sequences must be at most max_position_embeddings = "
                    f"{self.config.max_position_embeddings} long, got {packing.seqlen}"
                )
            position_ids = packing.position_ids

        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        hidden = self.embeddings(input_ids, position_ids, token_type_ids, inputs_embeds)
        hidden, states = self.encoder(hidden, packing, output_hidden_states=output_hidden_states)
        pooled = None if self.pooler is None else self.pooler(hidden, packing)
        if padded:
            # The last state is the last hidden state: unpacked once, not twice.
            hidden, last = packing.unpack(hidden), hidden
            if states is not None:
                states = tuple(hidden if state is last else packing.unpack(state) for state in states)
        output = EncoderOutput(hidden, pooled, states)
        if return_dict is None:
            return_dict = self.config.return_dict
        return output if return_dict else output.to_tuple()

    def _packing(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, mask: Tensor | None) -> Packing:
        if input_ids is not None:
            name, wanted, given = "input_ids", ["batch", "seqlen"], input_ids
        else:
            assert inputs_embeds is not None
            name, wanted, given = "inputs_embeds", ["batch", "seqlen", "hidden"], inputs_embeds
        if given.dim() != len(wanted):
            expected = f"[{', '.join(wanted)}]"
            raise ValueError(f"BertModel: {name} must be {expected} where packing is None, got {list(given.shape)}")
        shape, device = given.shape[:2], given.device
        if mask is None:
            # Nothing to find out: with every token real, the capacity is the total and the host reads nothing.
            mask = torch.ones(shape, dtype=torch.bool, device=device)
            return Packing.from_mask(mask, capacity=shape[0] * shape[1])
        if mask.dim() != 2:
            raise ValueError(
                f"BertModel: attention_mask must be 2-D [batch, seqlen] (masks per query are not supported), "
                f"got shape {list(mask.shape)}"
            )
        if mask.shape != shape:
            raise ValueError(f"BertModel: attention_mask must have shape {list(shape)}, got {list(mask.shape)}")
        return Packing.from_mask(mask)


def _check_shape(name: str, value: Tensor | None, shape: tuple[int, ...]) -> None:
    if value is not None and tuple(value.shape) != shape:
        raise ValueError(f"BertModel: {name} must have shape {list(shape)}, got {list(value.shape)}")
