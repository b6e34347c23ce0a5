"""The options of M2-BERT, its published sizes, and how a config follows from weights."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from ..common.config import ModelConfig, config_overrides, known_fields

POOLINGS = ("pooler", "cls", "mean")

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

    Presets are 80M, 110M, 260M and 341M (the paper's table 4 and appendix).

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
        sentence_pooling: what an embedding of a text is read from: "pooler", "cls" (the last state of the first token
            itself) or "mean" (over the tokens); None: "cls" with use_cls_token, else "pooler".
        mask_padding: keeps padding out of the mixers, so that outputs at tokens do not depend on it. False as in the
            published code, whose checkpoints were trained on sequences padded to their full length.

    Raises:
        ValueError: sizes that do not fit, a dropout outside [0, 1], an unknown problem_type or sentence_pooling.
    """

    model_type = "m2_bert"
    positive = (
        "vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings", "type_vocab_size",
        "long_conv_l_max", "hyena_filter_order", "monarch_mlp_nblocks",
    )  # fmt: skip
    divides = (("monarch_mlp_nblocks", "hidden_size"), ("monarch_mlp_nblocks", "intermediate_size"))
    probabilities = ("hidden_dropout_prob", "classifier_dropout")
    choices = {"sentence_pooling": (None, *POOLINGS)}
    # The names count the parameters of the masked-LM model on 128 positions; widths are the papers'.
    presets = {
        "80M": {"hidden_size": 768},
        "110M": {"hidden_size": 960},
        "260M": {"hidden_size": 1536},
        "341M": {"hidden_size": 1792},
    }

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
    sentence_pooling: str | None = None
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
        super().__post_init__()
        if self.hyena_emb_dim < 3 or self.hyena_emb_dim % 2 == 0:
            raise self.error(f"hyena_emb_dim must be odd and at least 3, got {self.hyena_emb_dim}")

    @property
    def pooling(self) -> str:
        """What an embedding of a text is read from: "pooler", "cls" or "mean"."""
        return self.sentence_pooling or ("cls" if self.use_cls_token else "pooler")

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
                raise cls.error(f"{name}={fields[name]!r} is not supported, only {value!r}")
        own = {f.name for f in dataclasses.fields(cls)}
        for name, value in fields.items():
            if value and name not in own | _HARMLESS | _REQUIRED.keys() and _EFFECTIVE.match(name):
                raise cls.error(f"{name}={value!r} is not known, and would change results if it acts")
        return cls(**{**known_fields(cls, fields), **config_overrides(cls, overrides)})


@dataclasses.dataclass
class M2GPTConfig(ModelConfig):
    """The options of M2-GPT.

    Attributes:
        vocab_size: tokens. The table is the decoder too.
        hidden_size, num_hidden_layers: of the layers.
        max_position_embeddings: the longest sequence, and the taps of the filters. There are no position embeddings:
            convolutions tell places apart.
        monarch: learned Monarch matrices around the gated convolution; False leaves the plain convolution.
        monarch_block: of `nn.CausalMonarchConvolution`; None = near the square root of twice the length.
        use_mlp: an MLP after each mixer; intermediate_size (None = 4 hidden_size) and nblocks are its own.
        residual_long_conv, filter_order, emb_dim, omega: of `nn.MonarchMixerSequenceMixer`.

    Raises:
        ValueError: sizes that do not fit.
    """

    model_type = "m2_gpt"
    positive = ("vocab_size", "hidden_size", "max_position_embeddings", "intermediate_size", "nblocks")

    vocab_size: int = 50264
    hidden_size: int = 768
    num_hidden_layers: int = 12
    max_position_embeddings: int = 1024
    monarch: bool = True
    monarch_block: int | None = None
    use_mlp: bool = False
    intermediate_size: int | None = None
    nblocks: int = 4
    residual_long_conv: bool = True
    filter_order: int = 128
    emb_dim: int = 5
    omega: float = 10.0
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        super().__post_init__()
        for name in ("hidden_size", "intermediate_size"):
            if self.use_mlp and getattr(self, name) % self.nblocks:
                raise self.error(f"nblocks must divide {name} {getattr(self, name)}, got {self.nblocks}")


@dataclasses.dataclass
class M2ViTConfig(ModelConfig):
    """The options of M2-ViT. Presets are S and B, the sizes of a ViT on patches of 16 x 16.

    Attributes:
        image_size, patch_size: pixels of a side, of images and of patches; patch_size divides image_size.
        num_channels: of an image.
        hidden_size, num_hidden_layers: of the blocks.
        intermediate_size: width of each half inside of the MLP; None = 4 hidden_size.
        nblocks: blocks of the MLP's products.
        residual_long_conv, filter_order, emb_dim, omega: of `nn.MonarchMixerSequenceMixer`.
        hidden_dropout_prob: in training, on what mixer and MLP add.
        num_labels, problem_type: of the classifier.

    Raises:
        ValueError: sizes that do not fit, a dropout outside [0, 1], an unknown problem_type.
    """

    model_type = "m2_vit"
    positive = (
        "image_size", "patch_size", "num_channels", "hidden_size", "intermediate_size", "nblocks", "filter_order",
    )  # fmt: skip
    divides = (("patch_size", "image_size"), ("nblocks", "hidden_size"), ("nblocks", "intermediate_size"))
    probabilities = ("hidden_dropout_prob",)
    presets = {
        "S": {"hidden_size": 384, "num_hidden_layers": 12},
        "B": {"hidden_size": 768, "num_hidden_layers": 12},
    }

    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    hidden_size: int = 768
    num_hidden_layers: int = 12
    intermediate_size: int | None = None
    nblocks: int = 4
    residual_long_conv: bool = True
    filter_order: int = 128
    emb_dim: int = 5
    omega: float = 10.0
    hidden_dropout_prob: float = 0.0
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    num_labels: int = 1000
    problem_type: str | None = None

    def __post_init__(self) -> None:
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        super().__post_init__()

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch_size) ** 2
