"""M2-GPT (Monarch Mixer, arXiv 2310.12109, section 5.3): a language model without attention, and without MLPs.

Its weights and code were never published. Layers are causal mixers along the sequence, normalised before, between
learned causal Monarch matrices (`nn.CausalMonarchConvolution`) unless the config says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...nn import AddBiasResidualLayerNorm, CausalMonarchMixer, MixerState, MonarchMixerMLP
from ...nn._checkpoint import CheckpointedLayers
from ...nn._product import decoder_table
from ..common.checks import check_shape
from ..common.generation import check_sampling, continue_texts
from ..common.losses import next_token_loss
from ..common.outputs import HeadOutput
from ..common.pretrained import PretrainedModel
from .config import M2GPTConfig


class M2GPTLayer(nn.Module):
    """x + mixer(norm(x)), and where there is an MLP x + mlp(norm(x))."""

    def __init__(self, config: M2GPTConfig) -> None:
        super().__init__()
        self.mixer_norm = AddBiasResidualLayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mixer = CausalMonarchMixer(
            config.hidden_size,
            config.max_position_embeddings,
            monarch=config.monarch,
            block=config.monarch_block,
            residual=config.residual_long_conv,
            order=config.filter_order,
            emb_dim=config.emb_dim,
            omega=config.omega,
        )
        self.mlp_norm = self.mlp = None
        if config.use_mlp:
            self.mlp_norm = AddBiasResidualLayerNorm(config.hidden_size, config.layer_norm_eps)
            self.mlp = MonarchMixerMLP(
                config.hidden_size, config.intermediate_size, nblocks=config.nblocks, add_and_norm=False
            )

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, seqlen, hidden]; returns the same shape."""
        return self.finish(x + self.mixer(self.mixer_norm(x, None, None)))

    def start(self, x: Tensor) -> tuple[Tensor, MixerState]:
        """`forward` and the state after it, as `CausalMonarchMixer.start`."""
        out, state = self.mixer.start(self.mixer_norm(x, None, None))
        return self.finish(x + out), state

    def step(self, x: Tensor, state: MixerState) -> Tensor:
        """The next row [batch, hidden], as `CausalMonarchMixer.step`."""
        return self.finish(x + self.mixer.step(self.mixer_norm(x, None, None), state))

    def finish(self, x: Tensor) -> Tensor:
        """The MLP, where there is one; x: [..., hidden]."""
        if self.mlp is None or self.mlp_norm is None:
            return x
        return x + self.mlp(self.mlp_norm(x, None, None))


class M2GPTForCausalLM(PretrainedModel, CheckpointedLayers):
    """Predicts the next token at every place, from those up to it.

    Args:
        config: its options.
    """

    config_class = M2GPTConfig

    def __init__(self, config: M2GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([M2GPTLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = AddBiasResidualLayerNorm(config.hidden_size, config.layer_norm_eps)
        self.apply(self.init_weights)

    def get_input_embeddings(self) -> nn.Embedding:
        """The token table, for callers that know transformers models."""
        return self.tokens

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> HeadOutput:
        """Logits, and the loss where labels are given.

        Args:
            input_ids: int64 [batch, seqlen]. Padding at the end changes nothing before it.
            labels: int64 [batch, seqlen], as input_ids, not shifted: the token at place t + 1 is asked of place t. -100
                where the loss does not look.

        Returns:
            HeadOutput: loss, the mean cross-entropy over labelled tokens (0 where there is none), in float32 at least;
            logits [batch, seqlen, vocab].

        Raises:
            ValueError: input_ids that are not [batch, seqlen] or too long, labels of another shape.
        """
        name = type(self).__name__
        self._check_ids(input_ids, 0)
        check_shape(name, "labels", labels, tuple(input_ids.shape))
        x = self.tokens(input_ids)
        for layer in self.layers:
            x = self.run_layer(layer, x)
        logits = self._decode(x)
        loss = None if labels is None else next_token_loss(logits, labels)
        return HeadOutput(loss, logits)

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        eos_token_id: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Goes on from a prompt. The model should be in eval mode.

        The prompt takes one pass. After it, a token costs one row of each convolution, O(seqlen) a channel, by the
        histories in `nn.MixerState`.

        Args:
            input_ids: int64 [batch, length], length at least 1.
            max_new_tokens: how many tokens to add at most.
            temperature: 0 takes the likeliest token; above, logits are divided by it and a token is drawn.
            top_k: draws from this many likeliest tokens only.
            eos_token_id: a sequence that has it goes on with it alone; once all have, generation ends.
            generator: of the random numbers.

        Returns:
            int64 [batch, length + new tokens].

        Raises:
            ValueError: input_ids that are not [batch, length], empty or with the new tokens too long; a temperature
                below 0, a top_k below 1.
        """
        name = f"{type(self).__name__}.generate"
        check_sampling(name, max_new_tokens, temperature, top_k)
        self._check_ids(input_ids, max_new_tokens)
        if input_ids.shape[1] == 0:
            raise ValueError(f"{name}: input_ids must have at least one token, got shape {list(input_ids.shape)}")
        if not len(input_ids):
            return input_ids
        states: list[MixerState] = []

        def step(new: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
            x = self.tokens(torch.stack(list(new)))  # [batch, length, hidden]: the prompt, then single tokens
            if not states:
                for layer in self._layers():
                    x, state = layer.start(x)
                    states.append(state)
                return self._decode(x[:, -1])
            x = x.squeeze(1)
            for layer, state in zip(self._layers(), states, strict=True):
                x = layer.step(x, state)
            return self._decode(x)

        texts = continue_texts(
            step,
            list(input_ids),
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            eos_token_id=eos_token_id,
            generator=generator,
            drop_ended=False,  # states are of the whole batch
        )
        return nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=eos_token_id or 0)

    def _layers(self) -> list[M2GPTLayer]:
        return [layer for layer in self.layers if isinstance(layer, M2GPTLayer)]

    def _decode(self, x: Tensor) -> Tensor:
        table = decoder_table(self.tokens, self.config.vocab_size, x.device)
        return torch.nn.functional.linear(self.norm(x, None, None), table)

    def _check_ids(self, input_ids: Tensor, more: int) -> None:
        name, longest = type(self).__name__, self.config.max_position_embeddings
        if input_ids.dim() != 2:
            raise ValueError(f"{name}: input_ids must be [batch, seqlen], got {list(input_ids.shape)}")
        if input_ids.shape[1] + more > longest:
            raise ValueError(
                f"{name}: sequences must be at most max_position_embeddings = {longest} long, "
                f"got {input_ids.shape[1]} tokens{f' and {more} new ones' if more else ''}"
            )
