"""The base of all encoders: it packs once, embeds, runs the layers on packed rows and unpacks once."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ...nn import Embeddings, Encoder
from ...packing import Packing
from .checks import check_shape, refuse_arguments
from .convertible import ConvertibleModel
from .outputs import EncoderOutput
from .pretrained import set_weight

Self = TypeVar("Self", bound="EncoderModel")


class PackedStates(NamedTuple):
    """The outputs of the layers, still packed."""

    hidden: Tensor  # [total, hidden]
    states: tuple[Tensor, ...] | None  # each [total, hidden], the last one is `hidden`
    packing: Packing
    padded: bool  # whether the inputs were padded, so that outputs must be
    pooled: Tensor | None = None  # [batch, hidden], what the pooler made of it, where there is one

    def restore(self, x: Tensor) -> Tensor:
        """x [total, ...], in the form of the inputs: [batch, seqlen, ...] if they were padded."""
        return self.packing.unpack(x) if self.padded else x

    def restore_states(self, last: Tensor | None = None) -> tuple[Tensor, ...] | None:
        """The states in the form of the inputs. `last`: the last one, where the caller has restored it already."""
        if self.states is None or not self.padded:
            return self.states
        return tuple(
            last if state is self.hidden and last is not None else self.packing.unpack(state) for state in self.states
        )


class EncoderModel(ConvertibleModel):
    """A padding-free encoder. An architecture makes `embeddings`, `encoder` and `pooler`, and names their weights.

    Its config has hidden_size, max_position_embeddings, initializer_range, output_hidden_states and return_dict.
    """

    drawn_convolutions = (nn.Conv1d,)

    embeddings: Embeddings
    encoder: Encoder
    pooler: nn.Module | None

    def get_input_embeddings(self) -> nn.Embedding:
        """The token table, for callers that know transformers models."""
        return self.embeddings.tokens

    def without_pooler(self: Self) -> Self:
        """The same parameters in a model without its pooler; itself where it has none."""
        if self.pooler is None:
            return self
        with torch.device("meta"):
            lean = type(self).build(self.config, with_optional=False)
        assert isinstance(lean, type(self))
        for name in dict(lean.named_parameters()):
            set_weight(lean, name, self.get_parameter(name))
        return lean.train(self.training)

    def embed(
        self,
        input_ids: Tensor | None,
        position_ids: Tensor,
        token_type_ids: Tensor | None,
        inputs_embeds: Tensor | None,
    ) -> Tensor:
        """Computes the input of the first layer, [total, hidden], from ids [total] or embeddings [total, width]."""
        return self.embeddings(input_ids, position_ids, token_type_ids, inputs_embeds)

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
        keep_packed: bool = False,
        **unsupported: Any,
    ) -> EncoderOutput | PackedStates | tuple[Any, ...]:
        """Padded: ids [batch, seqlen] and a mask of any pattern. Packed: ids [total] and their packing.

        Args:
            input_ids: int64 [batch, seqlen], or [total] with `packing`.
            attention_mask: bool or integer [batch, seqlen], nonzero = token; None = all are tokens. Not with `packing`.
            token_type_ids: as input_ids; None = type 0. Refused by models that have no token types.
            position_ids: as input_ids, or [1, seqlen]; None = a token's place in its padded row, as in transformers.
            inputs_embeds: [batch, seqlen, width] or [total, width], in place of input_ids; the width of the token
                table, which is the hidden size except in ALBERT.
            packing: says that all inputs are packed; then outputs are packed too.
            output_hidden_states: also return the embeddings and the output of every layer. None = as the config says.
            return_dict: False returns a tuple. None = as the config says.
            keep_packed: return the `PackedStates` of the last layer, which is what a head works on.
            **unsupported: other arguments of the transformers model, accepted when None or False.

        Returns:
            EncoderOutput. The pooler reads the first real token of each sequence: in a left-padded row transformers'
            pooler reads padding instead. Sequences without a token give zeros.

        Raises:
            ValueError: both or neither of input_ids and inputs_embeds; shapes that do not match; an argument that is
                not supported (output_attentions, past_key_values, encoder_hidden_states, a mask not 2-D), by name.
            NotImplementedError: training mode with attention dropout above 0.
        """
        run = self.run_packed(
            input_ids,
            attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            packing=packing,
            output_hidden_states=output_hidden_states,
            **unsupported,
        )
        pooled = None if self.pooler is None else self.pooler(run.hidden, run.packing)
        if keep_packed:
            return run._replace(pooled=pooled)
        # The last state is the last hidden state: unpacked once, not twice.
        hidden = run.restore(run.hidden)
        output = EncoderOutput(hidden, pooled, run.restore_states(hidden))
        if return_dict is None:
            return_dict = self.config.return_dict
        return output if return_dict else output.to_tuple()

    def run_packed(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        packing: Packing | None = None,
        output_hidden_states: bool | None = None,
        **unsupported: Any,
    ) -> PackedStates:
        """Runs the layers as `forward` does and leaves the rows packed, for heads, which work on packed rows too."""
        name = type(self).__name__
        refuse_arguments(name, unsupported)
        if token_type_ids is not None and self.embeddings.token_types is None:
            raise ValueError(f"{name}: token_type_ids is not supported, the model has no token types")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(f"{name}: exactly one of input_ids and inputs_embeds must be given")
        padded = packing is None
        if packing is None:
            packing = _packing(name, input_ids, inputs_embeds, attention_mask)
            shape: tuple[int, ...] = (packing.batch_size, packing.seqlen)
        else:
            if attention_mask is not None:
                raise ValueError(f"{name}: attention_mask must be None where packing is given, which says it already")
            shape = (packing.total,)
        width = self.embeddings.width
        if position_ids is not None and padded and position_ids.dim() == 2 and position_ids.shape[0] == 1:
            position_ids = position_ids.expand(shape)
        check_shape(name, "input_ids", input_ids, shape)
        check_shape(name, "token_type_ids", token_type_ids, shape)
        check_shape(name, "position_ids", position_ids, shape)
        check_shape(name, "inputs_embeds", inputs_embeds, (*shape, width))
        if padded:
            input_ids = None if input_ids is None else packing.pack(input_ids)
            token_type_ids = None if token_type_ids is None else packing.pack(token_type_ids)
            position_ids = None if position_ids is None else packing.pack(position_ids)
            inputs_embeds = None if inputs_embeds is None else packing.pack(inputs_embeds)
        if position_ids is None:
            if self.embeddings.positions is not None and packing.seqlen > self.config.max_position_embeddings:
                raise ValueError(
                    f"{name}: sequences must be at most max_position_embeddings = "
                    f"{self.config.max_position_embeddings} long, got {packing.seqlen}"
                )
            position_ids = packing.position_ids

        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        hidden = self.embed(input_ids, position_ids, token_type_ids, inputs_embeds)
        hidden, states = self.encoder(hidden, packing, output_hidden_states=output_hidden_states)
        return PackedStates(hidden, states, packing, padded)


def _packing(model: str, input_ids: Tensor | None, inputs_embeds: Tensor | None, mask: Tensor | None) -> Packing:
    if input_ids is not None:
        name, wanted, given = "input_ids", ["batch", "seqlen"], input_ids
    else:
        assert inputs_embeds is not None
        name, wanted, given = "inputs_embeds", ["batch", "seqlen", "hidden"], inputs_embeds
    if given.dim() != len(wanted):
        expected = f"[{', '.join(wanted)}]"
        raise ValueError(f"{model}: {name} must be {expected} where packing is None, got {list(given.shape)}")
    shape, device = given.shape[:2], given.device
    if mask is None:
        # Nothing to find out: with every token real, the capacity is the total and the host reads nothing.
        mask = torch.ones(shape, dtype=torch.bool, device=device)
        return Packing.from_mask(mask, capacity=shape[0] * shape[1])
    if mask.dim() != 2:
        raise ValueError(
            f"{model}: attention_mask must be 2-D [batch, seqlen] (masks per query are not supported), "
            f"got shape {list(mask.shape)}"
        )
    if mask.shape != shape:
        raise ValueError(f"{model}: attention_mask must have shape {list(shape)}, got {list(mask.shape)}")
    return Packing.from_mask(mask)
