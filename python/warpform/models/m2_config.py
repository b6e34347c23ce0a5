"""The options of M2-BERT, its published sizes, and how a config follows from weights."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ._config import PROBLEM_TYPES
from ._model import ModelConfig
from ._registry import config_overrides

# The parameters of the masked-LM model on 128 positions, in millions, are the names; widths are the papers'.
_PRESETS = {"80M": 768, "110M": 960, "260M": 1536, "341M": 1792}

# Fields of published configs that change results, with the only value that is supported.
_REQUIRED = {
    "monarch_mixer_sequence_mixing": True,
    "use_glu_mlp": True,
    "use_monarch_mlp": True,
    "hidden_act": "gelu",
    "attention_pooling": False,
    "sequence_token_planting": False,
    "use_learnable_monarch": False,
}
# Fields that look as if they changed results and do not: how training went, what kernels ran, options of attention and
# of generation. expand_positional_embeddings says how weights were made, and their shapes tell what came of it;
# gather_sentence_embeddings chooses between heads, which are classes here; the published filters have no dropout.
_HARMLESS = frozenset(
    {
        "expand_positional_embeddings", "gather_sentence_embeddings", "hyena_filter_dropout", "hyena_lr_pos_emb",
        "hyena_wd", "long_conv_kernel_learning_rate", "use_bfloat16", "use_cache", "use_flash_fft", "use_flash_mm",
        "use_pretrained", "use_return_dict",
    }
)  # fmt: skip
# An unknown field with such a name is refused where it has a value, rather than ignored.
_EFFECTIVE = re.compile(
    r"(use|hyena|monarch|long_conv|residual|pool|pooling|sequence|gather|expand|normalize)_|bidirect"
)


@dataclasses.dataclass
class M2BertConfig(ModelConfig):
    """The options of M2-BERT (arXiv 2310.12109) and its heads, under the names of the published code.

    Attributes:
        intermediate_size: width of each half inside of the MLP; None = 4 hidden_size.
        long_conv_l_max: taps of the filters; None = max_position_embeddings.
        hyena_w, hyena_w_mod, hyena_emb_dim, hyena_filter_order: of `nn.ImplicitFilter`: omega, w_mod, emb_dim, order.
        hyena_training_additions: a LayerNorm at the start of each mixer, as in the published fine-tuning.
        bidirectional, residual_long_conv: of `nn.MonarchMixerSequenceMixer`.
        monarch_mlp_nblocks: blocks of the MLP's products, and `use_positional_encodings` whether there are positions.
        pool_all: the pooler reads the mean over tokens of the mask, in place of the first token.
        use_cls_token: heads read the last state of the first token itself, and no pooler.
        use_normalized_embeddings: embeddings of texts get length 1.
        mask_padding: keeps padding out of the mixers, so that outputs at tokens do not depend on it. False as in the
            published code, whose checkpoints were trained on sequences padded to their full length.

    Raises:
        ValueError: sizes that do not fit, a dropout outside [0, 1], an unknown problem_type.
    """

    vocab_size: int = 30528
    hidden_size: int = 768
    num_hidden_layers: int = 12
    intermediate_size: int | None = None
    hidden_dropout_prob: float = 0.1
    max_position_embeddings: int = 128
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    use_positional_encodings: bool = True
    long_conv_l_max: int | None = None
    hyena_w: float = 10.0
    hyena_w_mod: float = 1.0
    hyena_emb_dim: int = 5
    hyena_filter_order: int = 128
    hyena_training_additions: bool = False
    bidirectional: bool = True
    residual_long_conv: bool = True
    monarch_mlp_nblocks: int = 4
    pool_all: bool = False
    use_cls_token: bool = False
    use_normalized_embeddings: bool = False
    mask_padding: bool = False
    output_hidden_states: bool = False
    return_dict: bool = True
    num_labels: int = 2
    classifier_dropout: float | None = None
    problem_type: str | None = None

    def __post_init__(self) -> None:
        for name, value in (
            ("intermediate_size", 4 * self.hidden_size),
            ("long_conv_l_max", self.max_position_embeddings),
        ):
            if getattr(self, name) is None:
                setattr(self, name, value)
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings", "type_vocab_size",
            "long_conv_l_max", "hyena_filter_order", "monarch_mlp_nblocks", "num_labels",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("hidden_size", "intermediate_size"):
            if getattr(self, name) % self.monarch_mlp_nblocks:
                raise ValueError(
                    f"monarch_mlp_nblocks must divide {name} {getattr(self, name)}, got {self.monarch_mlp_nblocks}"
                )
        if self.hyena_emb_dim < 3 or self.hyena_emb_dim % 2 == 0:
            raise ValueError(f"hyena_emb_dim must be odd and at least 3, got {self.hyena_emb_dim}")
        for name in ("hidden_dropout_prob", "classifier_dropout"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must be between 0 and 1, got {value}")
        if self.problem_type not in (None, *PROBLEM_TYPES):
            raise ValueError(
                f"problem_type must be None or one of {', '.join(PROBLEM_TYPES)}, got {self.problem_type!r}"
            )

    @classmethod
    def preset(cls, size: str, **overrides: Any) -> M2BertConfig:
        """80M, 110M, 260M or 341M (the paper's table 4 and appendix), with the overrides on top.

        Raises:
            ValueError: another size.
        """
        if size not in _PRESETS:
            raise ValueError(f"size must be one of {', '.join(_PRESETS)}, got {size!r}")
        return cls(**{"hidden_size": _PRESETS[size], **overrides})

    @classmethod
    def from_published(cls, fields: Mapping[str, Any], **overrides: Any) -> M2BertConfig:
        """From the fields of a published config. Fields that change nothing here are ignored.

        Raises:
            ValueError: an option that is not supported, by name: attention in place of the mixers, MLPs that are dense
                or not gated, a hidden_act other than "gelu", attention_pooling, sequence_token_planting,
                use_learnable_monarch; an unknown field with a value whose name says that it acts on the model, such as
                use_... or hyena_...; other unknown fields are ignored, as configs hold names and versions too.
            TypeError: an override that is no field.
        """
        for name, value in _REQUIRED.items():
            given = fields.get(name, value)
            if given != value and not (value is False and given is None):
                raise ValueError(f"M2BertConfig: {name}={fields[name]!r} is not supported, only {value!r}")
        own = {f.name for f in dataclasses.fields(cls)}
        for name, value in fields.items():
            if value and name not in own | _HARMLESS | _REQUIRED.keys() and _EFFECTIVE.match(name):
                raise ValueError(f"M2BertConfig: {name}={value!r} is not known, and would change results if it acts")
        names = [f.name for f in dataclasses.fields(cls)]
        known = {name: fields[name] for name in names if name in fields}
        if known.get("return_dict") is None:
            known.pop("return_dict", None)
        if "num_labels" not in known and fields.get("id2label"):
            known["num_labels"] = len(fields["id2label"])
        return cls(**{**known, **config_overrides(cls, overrides)})


def check_fields(what: str, fields: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
    """Raises ValueError where the fields of a published config are not what `config_of_weights` found, by name."""
    for name, told in sizes.items():
        given = fields.get(name)
        if given is None or given == told:
            continue
        if name == "vocab_size" and isinstance(given, int) and given + -given % 8 == told:
            continue  # the published code makes the vocabulary a multiple of 8, whatever its config says
        if name == "max_position_embeddings" and not sizes["use_positional_encodings"]:
            continue  # without positions it is a limit and no size
        raise ValueError(
            f"{what}: {name} must be {told!r} as the weights tell, and the published config says {given!r}"
        )


def config_of_weights(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields that published weights tell by their names and shapes; names begin as in the model without a head.

    Raises:
        ValueError: weights that lack what the fields are read from.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in weights:
            raise ValueError(f"weights must be those of M2-BERT under the published names, but lack {name}")
        return tuple(weights[name].shape)

    layers = {int(found[1]) for name in weights if (found := re.match(r"encoder\.layer\.(\d+)\.", name))}
    first = "encoder.layer.0."
    filters = f"{first}attention.filter_fn."
    vocab_size, hidden_size = shape("embeddings.word_embeddings.weight")
    nblocks, up, _ = shape(f"{first}mlp.gated_layers.weight")
    _, l_max, emb_dim = shape(f"{filters}pos_emb.z")
    positions = "embeddings.position_embeddings.weight"
    fields = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": len(layers),
        "intermediate_size": nblocks * up // 2,
        "type_vocab_size": shape("embeddings.token_type_embeddings.weight")[0],
        "use_positional_encodings": positions in weights,
        "max_position_embeddings": shape(positions)[0] if positions in weights else l_max,
        "long_conv_l_max": l_max,
        "hyena_emb_dim": emb_dim,
        "hyena_filter_order": shape(f"{filters}implicit_filter.0.weight")[0],
        "hyena_training_additions": f"{first}attention.layernorm.weight" in weights,
        "bidirectional": f"{filters}implicit_filter_rev.0.weight" in weights,
        "residual_long_conv": f"{first}attention.filter_fn2.bias" in weights,
        "monarch_mlp_nblocks": nblocks,
    }
    return fields
