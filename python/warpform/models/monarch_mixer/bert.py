"""M2-BERT (Monarch Mixer, arXiv 2310.12109): BERT without attention, sub-quadratic along the sequence and the width.

Parameters and buffers have the names and shapes of the published code, so a state dict is a published checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn import AddBiasResidualLayerNorm, MonarchMixerMLP, MonarchMixerSequenceMixer
from ...nn._checkpoint import CheckpointedLayers
from ...nn._product import row
from ...ops._dtypes import accumulation_dtype
from ..common.checks import check_shape, refuse_arguments
from ..common.outputs import EncoderOutput
from ..common.pretrained import PretrainedModel, fill, read_config
from ..common.weights import read_weights
from .config import M2BertConfig
from .weights import canonical, check_fields, config_of_weights

Self = TypeVar("Self", bound="M2Base")


class M2Base(PretrainedModel):
    """What M2-BERT and its heads do alike: published weights in and out.

    Attributes:
        reads_pooler: whether the model needs the pooler; None: it takes what there is.
        head_names: prefixes of the names of a head's own weights.
    """

    config_class = M2BertConfig
    reads_pooler: ClassVar[bool | None] = None
    head_names: ClassVar[tuple[str, ...]] = ()

    config: M2BertConfig

    @classmethod
    def build(cls, config: M2BertConfig, *, with_optional: bool = True) -> M2Base:
        raise NotImplementedError

    @classmethod
    def wants_pooler(cls, config: M2BertConfig) -> bool | None:
        """`reads_pooler` of a model with this config."""
        return cls.reads_pooler

    @classmethod
    def check_published(cls, what: str, fields: Mapping[str, Any]) -> None:
        """Raises ValueError for fields of a published config that this class does not serve."""

    @classmethod
    def from_published(
        cls: type[Self],
        weights: Mapping[str, Tensor],
        *,
        fields: Mapping[str, Any] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **overrides: Any,
    ) -> Self:
        """A model from weights under the published names, such as its checkpoints hold, in eval mode.

        Sizes follow from the weights. Weights of other heads and buffers of FFT libraries (`.flashfft.`) are ignored,
        and so are prefixes "model." and "module." of names.

        Args:
            weights: for instance `torch.load(path, weights_only=True)`, or what safetensors reads. They are copied.
            fields: of the published config.json or YAML (its `model_config`), for what weights do not tell:
                `M2BertConfig.from_published` says which are supported, and which are refused.
            dtype: None keeps that of the weights. Filters stay in float32 at least, whatever it is.
            device: None is the CPU.
            **overrides: fields of the config to change.

        Raises:
            ValueError: weights that are missing, unknown or of another shape; an option that is not supported, or that
                the weights contradict, by name.
            TypeError: an override that is no field.
        """
        what = f"{cls.__name__}.from_published"
        own = canonical(weights)
        inner = {name.removeprefix("bert."): w for name, w in own.items() if name.startswith("bert.")}
        try:
            sizes = config_of_weights(inner)
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from None
        fields = fields or {}
        check_fields(what, fields, sizes)
        cls.check_published(what, fields)
        config = M2BertConfig.from_published({**fields, **sizes}, **overrides)
        wanted = cls.wants_pooler(config)
        has_pooler = "pooler.dense.weight" in inner if wanted is None else wanted
        if "classifier." in cls.head_names and "num_labels" not in overrides and "classifier.weight" in own:
            config = M2BertConfig.from_published(vars(config), num_labels=own["classifier.weight"].shape[0])
        config.id2label = fields.get("id2label")
        with torch.device("meta"):
            model = cls.build(config, with_optional=has_pooler)
        assert isinstance(model, cls)
        kept = ("bert.", *cls.head_names) if cls.file_prefix == "" else ("bert.",)
        given = {name: w for name, w in own.items() if name.startswith(kept)}
        if not has_pooler:
            given = {name: w for name, w in given.items() if not name.startswith("bert.pooler.")}
        if config.use_positional_encodings:  # positions count from 0 always, and a file may lack them
            given["bert.embeddings.position_ids"] = torch.arange(config.max_position_embeddings)[None]
        table = inner["embeddings.word_embeddings.weight"]
        where = torch.device("cpu" if device is None else device)
        given = {name.removeprefix(cls.file_prefix): w.detach().to(where, copy=True) for name, w in given.items()}
        fill(model, given, f"{what}: the weights", table.dtype if dtype is None else dtype)
        return model.eval()

    @classmethod
    def from_pretrained(
        cls: type[Self],
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **overrides: Any,
    ) -> Self:
        """As `from_published`, from a folder with safetensors and, where there is one, a published `config.json`.

        Raises:
            FileNotFoundError: no such folder, no weights, or only pickled ones, which are never loaded.
            ValueError: as `from_published`; a file that cannot be read.
        """
        folder = Path(folder)
        fields = read_config(folder, required=False)
        return cls.from_published(read_weights(folder), fields=fields, dtype=dtype, device=device, **overrides)

    def to_published(self) -> dict[str, Tensor]:
        """The weights under their names in published checkpoints, not copied."""
        return {f"{self.file_prefix}{name}": w for name, w in self.state_dict().items()}


class M2BertEmbeddings(nn.Module):
    """LayerNorm(tokens + token types + positions), with the names of the published code."""

    position_ids: Tensor

    def __init__(self, config: M2BertConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, hidden, padding_idx=config.pad_token_id)
        self.position_embeddings = None
        if config.use_positional_encodings:
            self.position_embeddings = nn.Embedding(config.max_position_embeddings, hidden)
            # Constant, yet in the state dict, for published checkpoints hold it.
            self.register_buffer("position_ids", torch.arange(config.max_position_embeddings)[None])
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, hidden)
        self.LayerNorm = AddBiasResidualLayerNorm(hidden, config.layer_norm_eps)
        self.dropout = config.hidden_dropout_prob

    def forward(
        self,
        input_ids: Tensor | None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """ids: int64 [batch, seqlen]; inputs_embeds: [batch, seqlen, hidden] in place of input_ids; returns like that.

        token_type_ids None means type 0 everywhere, position_ids None a token's place.
        """
        x = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        bias = None
        if token_type_ids is None:
            # One type for all tokens is one row for all tokens: the bias of the fused sum.
            bias = row(self.token_type_embeddings, 0, x.device)
        else:
            x = x + self.token_type_embeddings(token_type_ids)
        if self.position_embeddings is not None:
            if position_ids is None:
                position_ids = torch.arange(x.shape[1], device=x.device)
            x = x + self.position_embeddings(position_ids)
        return F.dropout(self.LayerNorm(x, bias, None), self.dropout, training=self.training)


class M2BertLayer(nn.Module):
    """A mixer along the sequence, without a residual around it, and the gated MLP with one."""

    def __init__(self, config: M2BertConfig) -> None:
        super().__init__()
        assert config.long_conv_l_max is not None
        self.attention = MonarchMixerSequenceMixer(
            config.hidden_size,
            config.long_conv_l_max,
            bidirectional=config.bidirectional,
            residual=config.residual_long_conv,
            pre_norm=config.hyena_training_additions,
            order=config.hyena_filter_order,
            emb_dim=config.hyena_emb_dim,
            omega=config.hyena_w,
            w_mod=config.hyena_w_mod,
        )
        self.mlp = MonarchMixerMLP(
            config.hidden_size,
            config.intermediate_size,
            nblocks=config.monarch_mlp_nblocks,
            eps=config.layer_norm_eps,
            dropout=config.hidden_dropout_prob,
        )

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """hidden: [batch, seqlen, hidden]; mask: as of `MonarchMixerSequenceMixer`; returns like hidden."""
        return cast("Tensor", self.mlp(self.attention(hidden, mask)))


class M2BertEncoder(CheckpointedLayers):
    """The layers, one after another."""

    def __init__(self, config: M2BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList([M2BertLayer(config) for _ in range(config.num_hidden_layers)])

    def forward(self, hidden: Tensor, mask: Tensor | None = None, *, all_states: bool = False) -> tuple[Tensor, ...]:
        """hidden: [batch, seqlen, hidden]. Returns the last state, or with all_states the input and each layer's."""
        states = [hidden]
        for layer in self.layer:
            hidden = self.run_layer(layer, hidden, mask)
            states.append(hidden)
        return tuple(states) if all_states else (hidden,)


class M2BertPooler(nn.Module):
    """tanh(dense(x)) of the first token, or of the mean over tokens of the mask."""

    def __init__(self, config: M2BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.pool_all = config.pool_all

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """hidden: [batch, seqlen, hidden], mask: [batch, seqlen] or None; returns [batch, hidden]."""
        return torch.tanh(self.dense(mean_over_tokens(hidden, mask) if self.pool_all else hidden[:, 0]))


def mean_over_tokens(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """[batch, seqlen, hidden] to [batch, hidden], summed in float32 at least; mask None: all are tokens. 0 of none."""
    wide = hidden.to(accumulation_dtype(hidden.dtype))
    if mask is None:
        return wide.mean(1).to(hidden.dtype)
    weights = (mask != 0).to(wide.dtype)
    sums = torch.bmm(weights[:, None], wide.masked_fill((mask == 0)[:, :, None], 0.0)).squeeze(1)
    return (sums / weights.sum(1, keepdim=True).clamp(min=1)).to(hidden.dtype)


class M2BertModel(M2Base):
    """M2-BERT without a head, [batch, seqlen] ids in and hidden states out. Nothing in it is quadratic in seqlen.

    The mixers do not look at the attention mask, as in the published code: padding takes part. Published checkpoints
    expect every sequence padded to max_position_embeddings. For models of your own `mask_padding` changes that.

    Args:
        config: its options.
        add_pooling_layer: whether there is a pooler; without one `pooler_output` is None.
    """

    file_prefix = "bert."

    def __init__(self, config: M2BertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__()
        self.config = config
        self.embeddings = M2BertEmbeddings(config)
        self.encoder = M2BertEncoder(config)
        self.pooler = M2BertPooler(config) if add_pooling_layer else None
        self.apply(self.init_weights)

    @classmethod
    def build(cls, config: M2BertConfig, *, with_optional: bool = True) -> M2BertModel:
        return cls(config, add_pooling_layer=with_optional)

    def get_input_embeddings(self) -> nn.Embedding:
        """The token table, for callers that know transformers models."""
        return self.embeddings.word_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **unsupported: Any,
    ) -> EncoderOutput | tuple[Any, ...]:
        """Padded sequences through the model.

        Args:
            input_ids: int64 [batch, seqlen].
            attention_mask: bool or integer [batch, seqlen], nonzero = token. Read by pools over tokens, and by mixers
                where `mask_padding` says so, else by nothing.
            token_type_ids: as input_ids; None = type 0.
            position_ids: as input_ids, or [1, seqlen]; None = a token's place in its row.
            inputs_embeds: [batch, seqlen, hidden], in place of input_ids.
            output_hidden_states: also return the embeddings and the output of every layer. None = as the config says.
            return_dict: False returns a tuple. None = as the config says.
            **unsupported: other arguments of transformers' models, accepted when None or False.

        Returns:
            EncoderOutput, with states at padded places as they come out.

        Raises:
            ValueError: both or neither of input_ids and inputs_embeds; shapes that do not match; sequences longer than
                max_position_embeddings; an argument that is not supported, by name.
        """
        name = type(self).__name__
        refuse_arguments(name, unsupported)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(f"{name}: exactly one of input_ids and inputs_embeds must be given")
        given, dims = (inputs_embeds, 3) if input_ids is None else (input_ids, 2)
        assert given is not None
        if given.dim() != dims:
            kind, form = ("input_ids", "") if dims == 2 else ("inputs_embeds", ", hidden")
            raise ValueError(f"{name}: {kind} must be [batch, seqlen{form}], got {list(given.shape)}")
        batch, seqlen = given.shape[:2]
        if position_ids is not None and position_ids.dim() == 2 and position_ids.shape[0] == 1:
            position_ids = position_ids.expand(batch, -1)
        check_shape(name, "attention_mask", attention_mask, (batch, seqlen))
        check_shape(name, "token_type_ids", token_type_ids, (batch, seqlen))
        check_shape(name, "position_ids", position_ids, (batch, seqlen))
        check_shape(name, "inputs_embeds", inputs_embeds, (batch, seqlen, self.config.hidden_size))
        if position_ids is None and seqlen > self.config.max_position_embeddings:
            raise ValueError(
                f"{name}: sequences must be at most max_position_embeddings = {self.config.max_position_embeddings} "
                f"long, got {seqlen}"
            )
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        hidden = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds)
        mask = attention_mask if self.config.mask_padding else None
        states = self.encoder(hidden, mask, all_states=output_hidden_states)
        pooled = None if self.pooler is None else self.pooler(states[-1], attention_mask)
        output = EncoderOutput(states[-1], pooled, states if output_hidden_states else None)
        if return_dict is None:
            return_dict = self.config.return_dict
        return output if return_dict else output.to_tuple()
